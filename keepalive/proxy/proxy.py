"""The forwarder: what callers point their base URL at.

A request for a model that we keep is passed on only after `ensure_warm` said so; everything else passes
untouched. Until the first byte of an upstream's answer has gone out everything may still be decided; after it
nothing is tried again. What measures a stream stands behind it and cannot touch it.
"""

import asyncio
from collections.abc import Callable, Sequence

from keepalive.core.callers import Key, Outcome, Seen
from keepalive.core.errors import Cut, NotWarm, Unreachable, UpstreamError
from keepalive.core.facts import ModelId
from keepalive.core.keeping import Keeping
from keepalive.http1 import Caller, RequestHead, Ticker, end_to_end, values
from keepalive.protocols.routes import Route, route_of
from keepalive.proxy import access
from keepalive.proxy.body import Room
from keepalive.proxy.call import Call
from keepalive.proxy.homes import Homes
from keepalive.proxy.settings import Settings
from keepalive.proxy.upstreams import UPGRADE, Upstreams


class Proxy:
    """Handles the exchanges of a listener. One for the life of the daemon."""

    def __init__(self, settings: Settings, keeping: Keeping, seen: Callable[[Seen], None]) -> None:
        self.settings = settings
        self.keeping = keeping
        self.seen = seen
        #: Requests that have not been answered to the end, and those of them that wait for a model.
        self.in_progress = 0
        self.waiting = 0
        self.calls: set[Call] = set()
        self.room = Room(settings.kept_bytes)
        self.ticker = Ticker(_turn(settings))
        self.upstreams = Upstreams(settings)
        self.stopping: str | None = None
        self._homes = Homes()

    def configure(self, settings: Settings) -> None:
        """New settings for the requests that come from now on; those under way keep what they began with."""
        self.settings = settings
        self.upstreams.configure(settings)
        self.room.most = settings.kept_bytes
        self.ticker.interval = _turn(settings)

    async def __call__(self, caller: Caller, route: Route | None = None) -> None:
        """Answers one request, as one for `route` where it is not its path that tells."""
        call = Call(self, caller, route or route_of(caller.head.method, caller.head.target))
        self.in_progress += 1
        self.calls.add(call)
        try:
            if self.stopping is not None:
                call.answer.fail(503, self.stopping, "shutting_down", retry_after=5)
            else:
                await self._serve(call)
        except asyncio.CancelledError:
            if caller.gone:
                call.account.outcome = Outcome.CLIENT_GONE
            elif caller.refused is not None:
                call.account.outcome, call.account.status = Outcome.REJECTED, caller.refused.status
            elif self.stopping is not None:
                call.answer.fail(503, self.stopping, "shutting_down", retry_after=5)
                return
            else:
                call.account.outcome = Outcome.TIMEOUT  # of whoever asked in the name of a caller
            raise
        finally:
            self.calls.discard(call)
            self.in_progress -= 1
            call.end()

    async def _serve(self, call: Call) -> None:
        """What becomes of one request."""
        head, answer = call.caller.head, call.answer
        call.account.key, refused = self.admit(head)
        if refused is not None:
            return answer.fail(*refused, outcome=Outcome.REJECTED)
        if head.upgrade is not None and head.upgrade.lower() == b"websocket":
            return await self._tunnel(call)
        if not (call.route.inference and head.method == b"POST"):
            return await self._pass(call)
        if values(head.headers, b"content-encoding"):
            # LM Studio would unpack it and find the model that we did not see.
            why = "send the body uncompressed"
            return answer.fail(415, why, "unsupported_encoding", outcome=Outcome.REJECTED)
        asked = await call.body.gather(call.caller)
        if asked is None:
            return answer.fail(503, "too many requests are waiting", "overloaded", retry_after=1)
        call.asked = asked
        models = self.keeping.find(asked.model) if asked.model is not None else ()
        return await (self._hold(call, models) if models else self._pass(call))

    async def _hold(self, call: Call, models: Sequence[ModelId]) -> None:
        """For a model that we keep: passed on once that is warm."""
        call.hold(models)
        again = True  # one more attempt, for a request that nothing was generated for
        while True:
            try:
                model = await self._warm(call, models)
                reply = await call.ask(model.upstream, model)
            except TimeoutError:
                return call.answer.not_ready(models[0], self.keeping.view(models[0]))
            except NotWarm as error:
                later = error.retry_after or 5
                return call.answer.fail(503, str(error), "model_not_ready", retry_after=later)
            except Unreachable as error:
                call.lost(str(error))
                others = [other for other in models if other.upstream != model.upstream]
                if not others and not again:
                    return call.answer.broken(error)
                again = again and bool(others)
                models = others or models
                continue
            except UpstreamError as error:
                return call.answer.broken(error)
            try:
                lost = await call.read_refusal(reply)
                if not (again and lost is not None and lost.retryable):
                    return await call.relay(reply)
                again = False
            finally:
                call.close(reply)

    async def _warm(self, call: Call, models: Sequence[ModelId]) -> ModelId:
        """The model to ask, once it is warm: where the conversation was last, while that is still good."""
        home = self._homes.find(call.asked.conversation)
        if home is not None and home in models and self.keeping.view(home).state == "warm":
            models = [home]
        cold = all(self.keeping.view(model).state != "warm" for model in models)
        began = call.account.now()
        if cold:
            self.waiting += 1
            call.beat()
        try:
            async with asyncio.timeout_at(call.deadline):
                model = await self.keeping.ensure_warm(models)
        finally:
            if cold:
                self.waiting -= 1
            call.account.waited += call.account.now() - began
        self._homes.remember(call.asked.conversation, model)
        return model

    async def _pass(self, call: Call) -> None:
        """Straight through."""
        try:
            reply = await call.ask(self.upstreams.default, None)
        except UpstreamError as error:
            return call.answer.broken(error)
        try:
            return await call.relay(reply)
        finally:
            call.close(reply)

    async def _tunnel(self, call: Call) -> None:
        """A WebSocket: bytes both ways until both sides are done."""
        try:
            reply = await call.ask(self.upstreams.default, None, upgrade=True)
        except UpstreamError as error:
            return call.answer.broken(error)
        try:
            if reply.head.status != 101:
                return await call.relay(reply)
            call.account.status = 101
            await call.caller.tunnel(reply, [*end_to_end(reply.head.headers), *UPGRADE])
            call.account.outcome = Outcome.OK
        except Cut as error:
            return call.answer.broken(error)
        finally:
            call.close(reply)
        return None

    def admit(self, head: RequestHead) -> tuple[Key | None, access.Refused | None]:
        """The caller's key, where it showed one; what a caller is told that may not ask."""
        return access.admit(head, self.settings)

    def stop(self, why: str = "the proxy is shutting down") -> None:
        """Ends every open request in the way of its route, and refuses new ones."""
        self.stopping = why
        for call in list(self.calls):
            call.task.cancel()

    async def close(self) -> None:
        await self.upstreams.close()


def _turn(settings: Settings) -> float:
    """Heartbeats are due to a tenth, and no wake-up comes more often than it is worth."""
    return min(max(settings.heartbeat / 10, 0.01), 0.5)
