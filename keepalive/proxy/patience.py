"""Heartbeats: a caller who waits for events is told what for, before it or anything between gives up."""

from keepalive.core.keeping import Keeping
from keepalive.http1 import Caller, Ticker
from keepalive.protocols.routes import Route
from keepalive.protocols.words import heartbeat_comment, heartbeat_reasoning
from keepalive.proxy.account import Account
from keepalive.proxy.answer import Answer


class Patience:
    """Fills the silence of one answer, from `begin` to `stop`."""

    __slots__ = (
        "_account",
        "_answer",
        "_bytes",
        "_caller",
        "_interval",
        "_keeping",
        "_quiet",
        "_route",
        "_ticker",
        "_visible",
    )

    def __init__(
        self, caller: Caller, route: Route, account: Account, answer: Answer, keeping: Keeping, ticker: Ticker
    ) -> None:
        self._caller = caller
        self._route = route
        self._account = account
        self._answer = answer
        self._keeping = keeping
        self._ticker = ticker
        self._visible = False
        self._interval = 0.0
        self._quiet = 0.0
        self._bytes = 0

    def begin(self, interval: float, *, visible: bool) -> None:
        """From now on; `visible` as reasoning, until the answer itself begins."""
        self._interval = interval
        self._visible = visible
        self._ticker.add(self)

    def stop(self) -> None:
        self._ticker.discard(self)

    def tick(self, now: float) -> None:
        passed = self._answer.passed
        # Looked at here, so that the hot path has nothing to say to us.
        if passed is not None and passed.bytes != self._bytes:
            self._bytes = passed.bytes
            self._quiet = 0.0
        self._quiet += self._ticker.interval
        if self._quiet + self._ticker.interval / 2 >= self._interval:
            self.beat()

    def beat(self) -> None:
        """Tells the caller what it waits for, where an event may stand."""
        caller, account, model = self._caller, self._account, self._account.model
        if caller.finished or model is None:
            return
        self._quiet = 0.0
        if not caller.started:
            self._answer.promise()
        elif caller.paused or self._answer.torn:
            return
        view = self._keeping.view(model)
        elapsed = account.now() - account.began if view.elapsed is None else view.elapsed
        if self._visible:
            passed = self._answer.passed
            if passed and passed.bytes:
                # Who asked for words cannot read comments, and in the answer no words of ours have a place.
                return
            words = heartbeat_reasoning(self._route, model.key, view.state, elapsed, view.eta, view.progress)
        else:
            silence = self._answer.silence
            silent = None if silence is None else silence.seconds
            words = heartbeat_comment(model.key, view.state, elapsed, view.eta, silent, view.progress)
        self._answer.spoke = True
        caller.push(words)
