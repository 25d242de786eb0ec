"""What a running daemon says when a command asks it. Nothing of a server's words reaches a terminal unseen."""

import http.client
import json
import os
import urllib.error
import urllib.request
from email.message import Message
from typing import Any

from keepalive import __version__
from keepalive.core.errors import KeepaliveError

# The daemon answers from memory. Longer than this, it is not the daemon.
ANSWER_TIMEOUT = 10.0
# A refusal of the daemon is a sentence. More than this is somebody else's page.
REFUSAL_MAX = 4096
# The daemons that answered and are of another version, by their addresses.
foreign: dict[str, str] = {}


class NoAnswer(KeepaliveError):
    """The daemon cannot be asked; `final` when asking again will not help."""

    def __init__(self, message: str, *, final: bool = False) -> None:
        super().__init__(message)
        self.final = final


def fetch(
    address: str,
    route: str = "/api/status",
    *,
    method: str = "GET",
    timeout: float = ANSWER_TIMEOUT,
    holds: str = "models",
) -> Any:
    """The document that the daemon at `address` answers with, which has to have `holds` in it.

    Raises:
        NoAnswer: nothing that can be used came within `timeout` seconds.
    """
    # No proxy: the daemon is near, and a proxy would not be.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    key = os.environ.get("KEEPALIVE_ADMIN_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        request = urllib.request.Request(address + route, method=method, headers=headers)  # noqa: S310
        with opener.open(request, timeout=timeout) as answer:
            _refuse_clients(address, answer.headers)
            document = json.load(answer)
    except urllib.error.HTTPError as error:
        hint = "; set KEEPALIVE_ADMIN_KEY" if error.code == 401 else ""
        with error:
            _refuse_clients(address, error.headers)
            message = f"{address} answered {error.code}: {_refusal(error)}{hint}"
        raise NoAnswer(message, final=True) from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise NoAnswer(f"what answers at {address} is not keepalive") from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        reason = _line(getattr(reason, "strerror", None) or reason)
        where = "Another address: --url or KEEPALIVE_ADMIN_URL."
        raise NoAnswer(f"no daemon at {address} ({reason}). Is it running? {where}") from error
    if not isinstance(document, dict) or holds not in document:
        raise NoAnswer(f"what answers at {address} is not keepalive", final=True)
    version = document.get("version", __version__)
    if version != __version__:
        foreign[address] = _line(version)
    return document


def _refuse_clients(address: str, headers: Message) -> None:
    """The other address of a daemon, where applications ask, is what people have at hand. What it passes on says so."""
    if headers.get("Server-Timing", "").startswith("wait;dur="):
        why = "is where applications ask; commands ask the admin address"
        default = "(server.admin_listen, 127.0.0.1:9235 by default)"
        raise NoAnswer(f"{address} {why} {default}", final=True)


def _refusal(error: urllib.error.HTTPError) -> str:
    """What the daemon says about it, else the phrase of its status."""
    try:
        reason = json.loads(error.read(REFUSAL_MAX))["error"]
    except (OSError, ValueError, TypeError, KeyError, http.client.HTTPException):
        reason = error.reason
    return _line(reason)


def _line(said: object) -> str:
    return "".join(c if c.isprintable() else " " for c in str(said))
