"""The targets of messages: one thread for each, so that one that hangs holds up nobody, the daemon's end included.

What cannot be sent is tried again for a while, in its order. A target that is dead is one line of log, and so is its
return. An address holds secrets: it is told by its number and by what apprise calls its kind, and apprise's own log,
which may quote it, is not heard.
"""

import logging
import socket
import threading
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from keepalive.observers.notify.news import Event, Message

# While a target is dead: more than this nobody reads afterwards.
WAITING = 50
RETRY = 60.0
TRIES = 30

KINDS = {
    Event.RECOVERED: "success",
    Event.EVICTED: "warning",
    Event.FAILING: "failure",
    Event.UPSTREAM_DOWN: "failure",
}


class Post:
    """Sends to one address. `tell` is given what the log says, from the thread."""

    def __init__(
        self,
        number: int,
        url: str,
        tell: Callable[[str, Mapping[str, object]], None],
        *,
        retry: float = RETRY,
    ) -> None:
        self._number = number
        self._url = url
        self._tell = tell
        self._retry = retry
        self._messages: deque[Message] = deque(maxlen=WAITING)
        self._woken = threading.Event()
        self._ended = threading.Event()
        self._dead = False
        threading.Thread(target=self._run, name=f"notify {number}", daemon=True).start()

    def put(self, message: Message) -> None:
        self._messages.append(message)
        self._woken.set()

    def end(self) -> None:
        self._ended.set()
        self._woken.set()

    def _run(self) -> None:
        try:
            service = self._service()
            why = "apprise knows no such address"
        except ImportError:
            service, why = None, "apprise is not installed; pip install 'keepalive[notify]'"
        except Exception as error:  # noqa: BLE001  # whatever it makes of an address that people wrote
            service, why = None, f"apprise cannot use it: {type(error).__name__}"
        if service is None:
            self._tell("notify.unavailable", {"target": self._number, "reason": why})
            return
        while not self._ended.is_set():
            self._woken.wait()
            self._woken.clear()
            while self._messages and not self._ended.is_set():
                self._deliver(service, self._messages.popleft())

    def _service(self) -> Any:
        # Here and not where it is configured: it takes a second, and users' streams go on meanwhile.
        import apprise

        own = logging.getLogger("apprise")
        own.addHandler(logging.NullHandler())
        own.propagate = False
        return apprise.Apprise.instantiate(self._url, suppress_exceptions=True)

    def _deliver(self, service: Any, message: Message) -> None:
        for _ in range(TRIES):
            if self._send(service, message):
                if self._dead:
                    self._dead = False
                    self._tell("notify.works_again", self._name(service))
                self._tell("notify.sent", {**self._name(service), "kind": message.event.value})
                return
            if not self._dead:
                self._dead = True
                again = {"reason": "it did not take the message", "retry_in": self._retry}
                self._tell("notify.failed", {**self._name(service), **again})
            if self._ended.wait(self._retry):
                return

    def _send(self, service: Any, message: Message) -> bool:
        title = f"keepalive on {socket.gethostname()}: {message.title}"
        try:
            return bool(service.notify(title=title, body=message.body, notify_type=KINDS[message.event]))
        except Exception:  # noqa: BLE001  # plug-ins of many hands
            return False

    def _name(self, service: Any) -> dict[str, object]:
        return {"target": self._number, "service": str(service.service_name)}
