"""What can go wrong.

KeepaliveError
├── ConfigError            a config that cannot be used (in config, with all its mistakes)
├── ClientError            a request to a daemon came to nothing (in client, with its kinds)
├── NotWarm                a model was asked for and does not get warm
└── UpstreamError          LM Studio did not do what it was asked
    ├── Forgone            we did not ask: another daemon acts there now
    ├── Unreachable        nobody answered the connection; `refused` when the port is closed
    ├── TimedOut           connected, then no answer in time: a question, not a verdict
    ├── Cut                the connection broke after the request had been sent
    ├── GivenUp            a load was ended because we asked for its end
    ├── Unauthorized       it wants another token
    ├── Unexpected         it answered what LM Studio does not answer
    └── Refused            it understood and said no; `reason` classifies why
"""

import re
from enum import StrEnum


class KeepaliveError(Exception):
    """Any failure that we expect and explain. `str()` of it is a sentence for a person."""


class NotWarm(KeepaliveError):
    """Waiting for a model has no prospect: its load failed or is refused. `str()` says why."""

    def __init__(self, reason: str, retry_after: float | None = None) -> None:
        super().__init__(reason)
        self.retry_after = retry_after  # seconds until it is tried again


class UpstreamError(KeepaliveError):
    """LM Studio did not do what it was asked."""


class Forgone(UpstreamError):
    """Nothing was sent: at the last moment it was no longer ours to act there."""


class Unreachable(UpstreamError):
    """No connection. `refused`: the host says that nothing listens, so whatever ran there is gone.

    `tls`: somebody is there, and we and he do not agree on that.
    """

    def __init__(self, message: str, *, refused: bool = False, tls: bool = False) -> None:
        super().__init__(message)
        self.refused = refused
        self.tls = tls


class TimedOut(UpstreamError):
    """No answer within the bound of this call. The work may well go on over there."""


class Cut(UpstreamError):
    """The connection ended before the answer did. The work may well go on over there."""


class GivenUp(UpstreamError):
    """The load is over without a copy, because it was told to be."""


class Unauthorized(UpstreamError):
    """401 or 403: no token, a wrong one, or one without the permission."""


class Unexpected(UpstreamError):
    """An answer of another shape: not JSON, cut short, too large, of another program."""

    def __init__(self, message: str, *, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status  # None when the answer did not come whole


class Reason(StrEnum):
    """Why LM Studio said no, read from the text of its answer, because its status codes do not say."""

    RESOURCES = "resources"
    CRASHED = "crashed"
    UNLOADED = "unloaded"
    UNKNOWN_MODEL = "unknown_model"
    UNKNOWN_ROUTE = "unknown_route"
    UNAUTHORIZED = "unauthorized"
    LOAD_FAILED = "load_failed"
    IN_USE = "in_use"
    LOADING = "loading"  # the server itself is not ready yet, and says so
    OTHER = "other"


class Refused(UpstreamError):
    """LM Studio answered with an error of its own; `status` is what it sent, which may be 200."""

    def __init__(self, message: str, *, reason: Reason, status: int) -> None:
        super().__init__(message)
        self.reason = reason
        self.status = status


_TAG = re.compile(r"<[^>]*>")
_LOADING = re.compile(
    r"\b(?:(?<!error )(?<!failed )(?:re)?loading|starting|(?:warming|booting|spinning|waking) up|initiali[sz]ing|"
    r"being (?:re)?(?:loaded|initiali[sz]ed)|not (?:yet )?ready|not yet (?:loaded|initiali[sz]ed)|"
    r"not (?:been )?(?:loaded|initiali[sz]ed) yet)\b",
    re.IGNORECASE,
)
_FAILING = re.compile(r"overload|\bbusy\b|\bfailed\b|out of memory|too many", re.IGNORECASE)


def says_loading(text: str) -> bool:
    """Whether a 503, in whatever layout, says that something is still on its way, and not that something is wrong."""
    said = _TAG.sub(" ", text[:4096])
    return _LOADING.search(said) is not None and _FAILING.search(said) is None
