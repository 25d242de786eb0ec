"""Answers that say that the model went away."""

import re
from dataclasses import dataclass
from typing import Final

from keepalive.core.errors import Reason, says_loading
from keepalive.protocols.answers import error_message


@dataclass(frozen=True, slots=True)
class Lost:
    """An answer that says the model is not there any more.

    `message` is ours, not the answer's. `retryable`: with the model back, the same request may go well. What
    crashed once under a request may do so again: that one is for its caller to decide.
    """

    reason: Reason
    message: str
    retryable: bool


# LM Studio's status codes do not tell these apart, its words do; the first that occurs counts.
_LOST: Final = (
    ("the model has crashed", Lost(Reason.CRASHED, "the model has crashed", retryable=False)),
    (
        "model was unloaded while the request was still in queue",
        Lost(Reason.UNLOADED, "the model was unloaded while requests were waiting for it", retryable=True),
    ),
    (
        "model unloaded",
        Lost(Reason.UNLOADED, "the model was unloaded in the middle of an answer", retryable=True),
    ),
    (
        "model is unloaded",
        Lost(Reason.UNLOADED, "the model was unloaded in the middle of an answer", retryable=True),
    ),
    ("model reloaded", Lost(Reason.UNLOADED, "the model was reloaded under a request", retryable=True)),
    ("no models loaded", Lost(Reason.UNLOADED, "no model is loaded", retryable=True)),
    # llama-server's router: no process runs any more, or it is gone and that was not seen yet, or it ended under
    # the request.
    ("model is not loaded", Lost(Reason.UNLOADED, "the model is not loaded", retryable=True)),
    (
        "proxy error: could not establish connection",
        Lost(Reason.UNLOADED, "the process of the model is gone", retryable=True),
    ),
    (
        "proxy error: failed to read connection",
        Lost(Reason.UNLOADED, "the process of the model ended under a request", retryable=False),
    ),
    ("operation canceled", Lost(Reason.UNLOADED, "a load of the model was cancelled", retryable=True)),
)

#: It was started anew, and nobody has noticed yet.
_LOADS: Final = Lost(Reason.LOADING, "the server says that it is loading", retryable=True)

#: Where nothing is loaded on demand LM Studio says so of a model that it lists and does not hold.
_UNKNOWN: Final = Lost(Reason.UNLOADED, "LM Studio does not find the model", retryable=True)

#: A page of what stands in front of it: LM Studio, and every other server, says what it says as JSON or in words above.
_AWAY: Final = Lost(Reason.OTHER, "what stands in front of LM Studio does not reach it", retryable=True)

# llama-server's router, too: it had its process a moment ago. "Is not running" alone is said of much else.
_NOT_RUNNING: Final = re.compile(r"\bmodel name=.+ is not running")
_GONE: Final = Lost(Reason.UNLOADED, "the process of the model is gone", retryable=True)

# It says so with 502. HAProxy, Traefik, Envoy and Apache have words for it, since nginx turns away by 503 those who ask
# too often; Cloudflare has statuses: refused, not there, not to be found, no tunnel.
_UNREACHED: Final = re.compile(
    r"no (?:server is available|available server|healthy upstream)|upstream connect error|"
    r"due to maintenance downtime"
)
_AWAY_STATUSES: Final = (502, 521, 522, 523, 530)


def looks_lost(status: int, body: bytes, asked: str | None = None) -> Lost | None:
    """Whether an error says that the model went away. `body` is that of an answer, or an error event's data.

    `asked`: the name by which it was asked for, where that is one which LM Studio lists. A 200 counts only with an
    `error` in it: an answer may well speak about crashes.
    """
    message = error_message(body)
    told = message is not None
    if message is None and status >= 400:
        message = body[:4096].decode("utf-8", "replace")
    if message is None:
        return None
    message = message.casefold()
    lost = next((lost for words, lost in _LOST if words in message), None)
    if lost is None and _NOT_RUNNING.search(message):
        return _GONE
    if lost is None and status == 503 and says_loading(message):
        return _LOADS
    if lost is None and asked and f'invalid model identifier "{asked.casefold()}"' in message:
        return _UNKNOWN  # of this one alone: a request may name others, as a draft
    if lost is None and not told:
        away = status in _AWAY_STATUSES or (status == 503 and _UNREACHED.search(message))
        return _AWAY if away else None
    return lost
