"""What a caller is told by us: that events will come, that they still will, or why they will not.

Until the first byte has gone out everything may still be decided. Behind it, whatever is said has to stand where
an event may, in the words of the route; where none may, the connection is broken, so that nobody takes a part
for the whole.
"""

import math
from collections.abc import Mapping
from typing import Final

from keepalive.core.callers import Outcome
from keepalive.core.errors import Cut, TimedOut, Unreachable, UpstreamError
from keepalive.core.facts import ModelId
from keepalive.core.keeping import View
from keepalive.http1 import NO_STORE, Caller, Headers, ReplyHead, cors, end_to_end
from keepalive.protocols.answers import bare_error, error_code, error_object, event_error, plain_words
from keepalive.protocols.begun import Begun
from keepalive.protocols.routes import Protocol, Route
from keepalive.protocols.words import NO_ERROR, error_body, error_event, response_failed, told_people
from keepalive.proxy.account import Account
from keepalive.proxy.relay import Events, Push, Whole
from keepalive.proxy.silence import Silence

_UNBUFFERED: Final = (b"X-Accel-Buffering", b"no")
_EVENTS: Headers = [
    (b"Content-Type", b"text/event-stream"),
    (b"Cache-Control", b"no-cache, no-store"),
    _UNBUFFERED,
]


class Answer:
    """The answer to one request, as far as it has come."""

    __slots__ = (
        "_account",
        "_begun",
        "_caller",
        "_grant",
        "_route",
        "passed",
        "promised",
        "silence",
        "spoke",
    )

    def __init__(self, caller: Caller, route: Route, account: Account, grant: Headers) -> None:
        self._caller = caller
        self._route = route
        self._account = account
        self._grant = grant
        self._begun = Begun() if route.protocol is Protocol.RESPONSES else None
        #: 200 and events were promised: by us, or with the head of an answer that is still to be passed on.
        self.promised = False
        #: Something of ours stands before the upstream's first byte.
        self.spoke = False
        #: The upstream's answer, once it passes.
        self.passed: Events | Whole | None = None
        #: Of the upstream's answer, from its head on.
        self.silence: Silence | None = None

    @property
    def torn(self) -> bool:
        """The caller has a part of an event: nothing may follow but the rest of it."""
        return isinstance(self.passed, Events) and self.passed.torn

    @property
    def unseen(self) -> bool:
        """Nobody but the caller wants the bytes of a stream."""
        return self._begun is None

    @property
    def push(self) -> Push:
        """For the bytes of a stream."""
        return self._caller.push if self._begun is None else self._push_response

    def promise(self) -> None:
        self.promised = True
        self._account.status = 200
        self._caller.start(200, [*_EVENTS, *self._grant, *self._account.headers()])

    def allow(self, headers: Headers) -> None:
        """What a browser asked before it lets its page ask."""
        self._account.status, self._account.outcome = 204, Outcome.OK
        self._caller.start(204, headers)
        self._caller.finish()

    def begin(self, head: ReplyHead, *, stream: bool) -> None:
        """The upstream's head becomes ours, if we did not promise one."""
        if self.promised:
            return
        self.promised = stream
        self._account.status = head.status
        bodiless = self._caller.head.method == b"HEAD" or head.status == 304
        sized = not (bodiless or stream or head.body < 0 or head.status == 204)
        without = () if bodiless else (b"content-length",)
        headers = end_to_end(head.headers, without=without)
        if head.events and head.get(b"x-accel-buffering") is None:
            # nginx keeps a stream to itself until its end, unless it is told in the answer.
            headers.append(_UNBUFFERED)
        self._caller.start(
            head.status,
            (cors.joined(headers, self._grant) if self._grant else headers) + self._account.headers(),
            reason=head.reason,
            length=head.body if sized else None,
        )

    def _push_response(self, data: bytes) -> None:
        self._caller.push(data)
        if self._begun is not None:
            self._begun.feed(data)

    def cut(self) -> None:
        """The upstream's answer has broken off."""
        if isinstance(self.passed, Events):
            self.fail(502, "the upstream's answer was cut", "upstream_cut", outcome=Outcome.CUT)
        else:
            self._account.outcome = Outcome.CUT
            self._caller.abort()

    def stalled(self, why: str) -> None:
        """It had begun, and was given up."""
        self.fail(504, why, "stalled", outcome=Outcome.STALLED)

    def told_error(self, data: bytes) -> None:
        """A stream has come to its end with the upstream's own error event, which said `data`."""
        if self._begun is not None and not self._begun.failed:
            # LM Studio sends `error` alone. OpenAI's clients raise at it, but others wait for this one.
            error = error_object(data)
            code = error_code(error) or "upstream_error"
            self._caller.push(response_failed(str(error.get("message")), code, self._begun))

    def fail(
        self,
        status: int,
        message: str,
        code: str,
        *,
        retry_after: float | None = None,
        outcome: Outcome = Outcome.UPSTREAM_ERROR,
        error: Mapping[str, object] = NO_ERROR,
    ) -> None:
        """The end, in the way of the route: an error answer, or an error event where events were promised.

        `error` has what the upstream said, as it said it.
        """
        caller = self._caller
        self._account.outcome = outcome
        if caller.finished or caller.gone:
            return
        self._account.error = code
        if not caller.started:
            self._account.status = status
            kind = (b"Content-Type", b"application/json")
            headers = [kind, *NO_STORE, *self._grant, *self._account.headers()]
            if retry_after is not None:
                headers.append((b"Retry-After", b"%d" % max(1, math.ceil(retry_after))))
            if status == 401:
                headers.append((b"WWW-Authenticate", b"Bearer"))
            caller.answer(status, headers, error_body(self._route, status, message, code))
        elif (self.promised or isinstance(self.passed, Events)) and not self.torn:
            self.push(error_event(self._route, message, code, status=status, error=error, begun=self._begun))
            caller.finish()
        else:
            caller.abort()

    def whole(self, status: int, headers: Headers, body: bytes) -> None:
        """An answer that we have put together."""
        self._account.status = status
        self._caller.answer(status, cors.joined(headers, self._grant) + self._account.headers(), body)

    def explain(self, status: int, body: bytes) -> None:
        """The upstream gave another answer than the events that were promised."""
        error = error_object(body) or error_object(event_error(body))
        if not error and status >= 400:
            error = bare_error(body)
        words = plain_words(body)
        instead = f"the upstream answered {status}{f': {words}' if words else ' without events'}"
        message = str(error.get("message") or instead)
        # In whatever layout it was told: a prompt that was too long is known by the words.
        error = error or {"message": message}
        self.fail(502 if status < 400 else status, message, f"upstream_{status}", error=error)

    def not_ready(self, model: ModelId, view: View) -> None:
        reason = f": {view.reason}" if view.reason else ""
        self.fail(
            503,
            f"{model.key} is {told_people(view.state)} and did not get warm in time{reason}",
            "model_not_ready",
            retry_after=view.eta or view.retry_after or 5,
            outcome=Outcome.TIMEOUT,
        )

    def broken(self, error: UpstreamError) -> None:
        """The upstream gave no answer that could be passed on."""
        if isinstance(error, TimedOut):
            self.fail(504, str(error), "upstream_timeout", outcome=Outcome.TIMEOUT)
        elif isinstance(error, Unreachable) and self._account.model is not None:
            self.fail(503, str(error), "upstream_unreachable", retry_after=5)
        elif isinstance(error, Unreachable):
            self.fail(502, str(error), "upstream_unreachable")
        else:
            cut = isinstance(error, Cut)
            self.fail(502, str(error), "upstream_cut", outcome=Outcome.CUT if cut else Outcome.UPSTREAM_ERROR)
