"""The forwarder: what callers point their base URL at.

A request for a model that we keep is passed on only after `ensure_warm` said so; everything else passes
untouched. Until the first byte of an upstream's answer has gone out everything may still be decided; after it
nothing is tried again. What measures a stream stands behind it and cannot touch it.
"""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import chain
from math import inf
from typing import Final
from urllib.parse import quote

from keepalive.core.callers import Key, Outcome, Seen
from keepalive.core.errors import Cut, NotWarm, Unreachable, UpstreamError
from keepalive.core.facts import InstanceLost, ModelId, ModelsChanged, WarmAsked, fold_key
from keepalive.core.keeping import Keeping
from keepalive.http1 import (
    NO_STORE,
    BadHead,
    Caller,
    Headers,
    Reply,
    RequestHead,
    Ticker,
    cors,
    end_to_end,
    plain_refusal,
)
from keepalive.protocols.asked import NO_BODY
from keepalive.protocols.joined import is_plain, joined
from keepalive.protocols.routes import Route, heartbeat_in, named_in, route_of, stored_in
from keepalive.protocols.words import error_body, no_heartbeat, refusal_code
from keepalive.proxy import access
from keepalive.proxy.body import Room
from keepalive.proxy.call import Call, Notes, Step
from keepalive.proxy.homes import Homes
from keepalive.proxy.listings import answer_listing
from keepalive.proxy.reading import reading
from keepalive.proxy.sdk import Instances, SdkCalls
from keepalive.proxy.settings import Settings
from keepalive.proxy.stored import Stored
from keepalive.proxy.upstreams import UPGRADE, Upstreams

#: A question of ours that was asked this long ago has reached LM Studio, answered or not.
ON_ITS_WAY: Final = 1.0

_EXTENSIONS: Final = b"sec-websocket-extensions"


class Proxy:
    """Handles the exchanges of a listener. One for the life of the daemon."""

    def __init__(
        self,
        settings: Settings,
        keeping: Keeping,
        seen: Callable[[Seen], None],
        notes: Notes | None = None,
    ) -> None:
        self.settings = settings
        self.notes = notes
        self.keeping = keeping
        self.seen = seen
        self.now = asyncio.get_running_loop().time
        #: Requests that have not been answered to the end, and those of them that wait for a model.
        self.in_progress = 0
        self.waiting = 0
        self.calls: set[Call] = set()
        self.room = Room(settings.kept_bytes)
        self.ticker = Ticker(_turn(settings))
        self.upstreams = Upstreams(settings)
        self.stopping: str | None = None
        self.stored = Stored()
        self.instances = Instances()
        self.tunnels: set[SdkCalls] = set()
        self._draining = False
        self._homes = Homes()
        self._given_up: dict[Call, str] = {}
        #: When an upstream was last heard of, by an answer that came to its end.
        self.heard: dict[str, float] = {}

    def configure(self, settings: Settings) -> None:
        """New settings for the requests that come from now on; those under way keep what they began with."""
        self.settings = settings
        self.upstreams.configure(settings)
        self.room.most = settings.kept_bytes
        self.ticker.interval = _turn(settings)

    async def __call__(self, caller: Caller, route: Route | None = None) -> None:
        """Answers one request, as one for `route` where it is not its path that tells."""
        head = caller.head
        read = reading(head, self.settings, route)
        head.target = read.target
        call = Call(self, caller, read)
        self.in_progress += 1
        self.calls.add(call)
        try:
            if self.stopping is not None:
                call.answer.fail(503, self.stopping, "shutting_down", retry_after=5)
            else:
                # None waits inside another: a stream goes on for long, and keeps nothing of the steps before it.
                step: Step = self._serve(call)
                while step is not None:
                    step = await step
        except asyncio.CancelledError:
            if caller.gone:
                call.account.outcome = Outcome.CLIENT_GONE
            elif caller.refused is not None:
                account, status = call.account, caller.refused.status
                account.outcome, account.status, account.error = (
                    Outcome.REJECTED,
                    status,
                    refusal_code(status),
                )
            elif self.stopping is not None:
                call.answer.fail(503, self.stopping, "shutting_down", retry_after=5)
                return
            elif call in self._given_up:
                call.answer.stalled(self._given_up[call])
                return
            else:
                call.account.outcome = Outcome.TIMEOUT  # of whoever asked in the name of a caller
            raise
        finally:
            self.calls.discard(call)
            self._given_up.pop(call, None)
            self.in_progress -= 1
            call.end()

    async def _serve(self, call: Call) -> Step:
        """What becomes of one request."""
        read, answer = call.reading, call.answer
        if read.ours is not None:
            # Passed on, it would come back once more, and again, until no socket is left.
            return answer.fail(508, self.upstreams.avoid(read.ours), "loop", outcome=Outcome.REJECTED)
        call.account.key = read.key
        if read.refused is not None:
            return answer.fail(*read.refused, outcome=Outcome.REJECTED)
        if read.preflight is not None:
            return answer.allow(read.preflight)
        if read.no_mode is not None:
            return answer.fail(404, no_heartbeat(read.no_mode), "unknown_heartbeat", outcome=Outcome.REJECTED)
        if read.websocket:
            return self._tunnel(call)
        if not read.names:
            return self._show(call)
        if read.codings is None:
            # LM Studio might unpack it and find the model that we did not see.
            why = "send the body as gzip or deflate, or uncompressed"
            return answer.fail(415, why, "unsupported_encoding", outcome=Outcome.REJECTED)
        try:
            asked = await call.body.gather(
                call.caller,
                read.codings,
                self.settings.limits.body_bytes,
                conversation=len(self.upstreams.pools) > 1,  # else all of them are at home at one upstream
            )
        except BadHead as bad:
            code = refusal_code(bad.status)
            return answer.fail(bad.status, bad.text, code, outcome=Outcome.REJECTED)
        if asked is None:
            return answer.fail(503, "too many requests are waiting", "overloaded", retry_after=1)
        call.asked = asked if read.form is None else call.body.read_form(read.form)
        return self._ask(call)

    async def _ask(self, call: Call) -> Step:
        """For whoever is meant by the body."""
        asked, route = call.asked, call.route
        if route.name == "unload":
            return self._unload(call)
        if asked.misnamed:
            why = "model is no name: write the key of a model, as text"
            return call.answer.fail(400, why, "invalid_model", outcome=Outcome.REJECTED)
        if not asked.readable:
            return self._pass(call, self.upstreams.default)  # LM Studio says what is wrong with it
        # In a body that is not there the default could not be named.
        stands_in = route.inference and bool(route.kind) and asked is not NO_BODY
        meaning = await self.keeping.meaning(asked.model, default=stands_in)
        if meaning.stands_in and any(self._is_of_another_kind(model, route) for model in meaning.models):
            # Whoever asks for vectors is not to wait for a model that only writes, nor to have it loaded.
            meaning = await self.keeping.meaning(asked.model, default=False)
        models, upstream = meaning.models, meaning.upstream
        if route.foreign:
            models = tuple(model for model in models if not self.keeping.is_lm_studio(model.upstream))
            if not models and self.keeping.is_lm_studio(upstream):
                # Which only says so. Whoever got his base URL wrong is not to wait for a model first.
                return self._pass(call, upstream)
        call.meaning = meaning
        if route.name == "load" and self.settings.join_loads:
            if not models and asked.model and is_plain(call.body.plain()):
                models = tuple(await self.keeping.meant(asked.model))
            if models:
                return self._join(call, models)
        if not route.inference:
            return self._pass(call, upstream)
        home = await self._home(call, asked.previous) if asked.previous and route.stores else None
        if meaning.renamed and home not in (None, *(model.upstream for model in models)):
            # Who names nobody goes on from an answer where that is: the default model has no answers there.
            stays = await self.keeping.meaning(asked.model, default=False)
            if not stays.known:
                call.meaning, meaning, models = stays, stays, ()
        if models:
            return self._hold(call, self._at(home, models))
        upstream = home or upstream
        perhaps = meaning.perhaps if meaning.known else self.keeping.present(upstream, route.kind)
        return self._pass(call, upstream, perhaps)

    def _is_of_another_kind(self, model: ModelId, route: Route) -> bool:
        """Where that is known: LM Studio's listings tell these two apart."""
        both = {self.keeping.view(model).kind, route.kind}
        return both == {"llm", "embedding"} and self.keeping.is_lm_studio(model.upstream)

    async def _show(self, call: Call) -> Step:
        """What no body names a model for."""
        head, route, upstream = call.caller.head, call.route, self.upstreams.default
        if route.rows and head.method == b"GET":
            if len(self.upstreams.pools) > 1 or self.keeping.rows(upstream):
                return answer_listing(call, self.upstreams, self.keeping, self.settings.list_timeout)
        elif route.one:
            upstream = await self._whereabouts(call)
        elif route.stored and (ident := stored_in(head.target)) is not None:
            upstream = await self._home(call, ident) or upstream
        return self._pass(call, upstream)

    async def _whereabouts(self, call: Call) -> str:
        """The upstream of the model that a path names, by the name that is known there."""
        head = call.caller.head
        path, name, query = named_in(head.target)
        meaning = await self.keeping.meaning(name or None, default=False)
        written = meaning.written()
        if written is not None:
            head.target = path + quote(written, safe="").encode() + query
        return meaning.upstream

    async def _home(self, call: Call, ident: str) -> str | None:
        headers = call.caller.head.headers
        return await self.stored.home(ident, self.upstreams, headers, self.settings.list_timeout)

    def _at(self, home: str | None, models: Sequence[ModelId]) -> Sequence[ModelId]:
        """Those where an answer is stored that is to be gone on from, while that upstream is there."""
        if home is None:
            return models
        there = [m for m in models if m.upstream == home and self.keeping.view(m).state != "unknown"]
        return there or models

    async def _hold(self, call: Call, models: Sequence[ModelId]) -> Step:
        """For a model that we keep: passed on once that is warm."""
        call.hold(models)
        again = True  # one more attempt, for a request that nothing was generated for
        while True:
            try:
                model = self._ready(call, models) or await self._warm(call, models)
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
            if call.fine(reply, ahead=again):
                return call.relay(reply)
            try:
                lost = await call.read_refusal(reply, ahead=again)
            except BaseException:
                call.close(reply)
                raise
            if not (again and lost is not None and lost.retryable):
                return call.relay(reply)
            call.close(reply)
            again = False

    def _ready(self, call: Call, models: Sequence[ModelId]) -> ModelId | None:
        """The model to ask, where one is warm: where the conversation was last, while that is still good."""
        conversation = call.asked.conversation
        if conversation is None:
            return self.keeping.ready(models)
        home = self._homes.find(conversation)
        model = self.keeping.ready([home]) if home is not None and home in models else None
        model = model or self.keeping.ready(models)
        if model is not None:
            self._homes.remember(conversation, model)
        return model

    async def _warm(self, call: Call, models: Sequence[ModelId]) -> ModelId:
        """The model to ask, once it is warm."""
        began = call.account.now()
        self.waiting += 1
        call.beat()
        try:
            async with asyncio.timeout_at(call.deadline):
                model = await self.keeping.ensure_warm(models)
        finally:
            self.waiting -= 1
            call.account.waited += call.account.now() - began
        if call.asked.conversation is not None:
            self._homes.remember(call.asked.conversation, model)
        return model

    async def _join(self, call: Call, models: Sequence[ModelId]) -> None:
        """A caller's load of a model that we keep is our one load, whatever else it asks for."""
        call.hold(models)
        for model in models:
            if not self.keeping.view(model).wanted:
                self.keeping.record(WarmAsked(call.account.now(), model))
        began = call.account.now()
        try:
            model = self._ready(call, models) or await self._warm(call, models)
        except TimeoutError:
            return call.answer.not_ready(models[0], self.keeping.view(models[0]))
        except NotWarm as error:
            later = error.retry_after or 5
            return call.answer.fail(503, str(error), "model_not_ready", retry_after=later)
        call.account.model = model
        body, differs = joined(
            call.body.plain(), self.keeping.view(model), model.key, call.account.now() - began
        )
        headers = [(b"Content-Type", b"application/json"), (b"X-Keepalive-Load", b"joined")]
        if differs:
            headers.append((b"X-Keepalive-Load-Differs", ", ".join(differs).encode()))
        call.account.outcome = Outcome.OK
        return call.answer.whole(200, [*headers, *NO_STORE], body)

    async def _pass(self, call: Call, upstream: str, perhaps: Sequence[ModelId] = ()) -> None:
        """Straight through."""
        try:
            reply = await call.ask(upstream, None, perhaps=perhaps)
        except UpstreamError as error:
            return call.answer.broken(error)
        try:
            return await call.relay(reply)
        finally:
            if call.route.changes:
                self.keeping.record(ModelsChanged(call.account.now(), upstream))

    async def _unload(self, call: Call) -> None:
        """A caller may unload what is ours. It is known at once, not with the next listing.

        A ping of ours that came there behind it would load the model again, with a timer. So it waits for those that
        are on their way; the next is not due for minutes.
        """
        meaning = await self.keeping.meaning(call.asked.instance, default=False)
        models = [model for model in meaning.models if model.upstream == meaning.upstream]
        for _ in range(100):
            if not any(self.keeping.view(model).questioned for model in models):
                break
            await asyncio.sleep(ON_ITS_WAY / 100)
        for model in models:
            copy = self.keeping.view(model).instance_id
            if copy is not None and self._is_alias(call.asked.instance, model.upstream):
                call.rename(copy, "instance_id")
        await self._pass(call, meaning.upstream)
        if call.account.status == 200:
            for model in models:
                self.keeping.record(InstanceLost(call.account.now(), model, "a caller unloaded it"))

    def _is_alias(self, name: str | None, upstream: str) -> bool:
        """Of the config, which LM Studio does not know. A copy that is gone is none: another must not go for it."""
        aliases = chain.from_iterable(self.keeping.rows(upstream).values())
        return name is not None and fold_key(name) in map(fold_key, aliases)

    async def _tunnel(self, call: Call) -> None:
        """A WebSocket: bytes both ways until both sides are done.

        It goes to the first upstream: an SDK opens it before it names a model. That one is not told that an SDK could
        compress: what is said in compressed frames cannot be heard, and would load models beside the keeper.
        """
        upstream, head = self.upstreams.default, call.caller.head
        if call.route.websocket:
            head.say([pair for pair in head.headers if pair[0].lower() != _EXTENSIONS])
        try:
            reply = await call.ask(upstream, None, upgrade=True)
        except UpstreamError as error:
            return call.answer.broken(error)
        calls = self._listen(reply, upstream, call.route)
        try:
            if calls is not None:
                self.tunnels.add(calls)
                calls.leaving = self._draining
            if reply.head.status != 101:
                return await call.relay(reply)
            call.account.status = 101
            headers = [*end_to_end(reply.head.headers), *UPGRADE]
            await call.caller.tunnel(reply, headers, calls)
            call.account.outcome = Outcome.OK
        except Cut as error:
            return call.answer.broken(error)
        finally:
            call.close(reply)
            if calls is not None:
                self.tunnels.discard(calls)
                await calls.close()
        return None

    def _listen(self, reply: Reply, upstream: str, route: Route) -> SdkCalls | None:
        """Who reads along in a tunnel: in those of LM Studio's SDKs, unless the frames are compressed all the same."""
        if not route.websocket or reply.head.values(_EXTENSIONS):
            return None
        return SdkCalls(self, upstream, route.kind, joins=self.settings.join_loads)

    def silences(self) -> dict[ModelId | None, float]:
        """How long the quietest of the answers that have begun has been silent, by its model."""
        longest: dict[ModelId | None, float] = {}
        for call in self.calls:
            silent = call.answer.silence.seconds if call.answer.silence is not None else None
            if silent is not None:
                model = call.account.model
                longest[model] = max(silent, longest.get(model, 0.0))
        return longest

    def admit(self, head: RequestHead) -> tuple[Key | None, access.Refused | None]:
        """The caller's key, where it showed one; what a caller is told that may not ask."""
        return access.admit(head, self.settings)

    def refusal(self, status: int, message: str, head: RequestHead | None) -> tuple[Headers, bytes]:
        """Words the end of a connection whose bytes were no request, or no whole one: as its route does."""
        if head is None:
            return plain_refusal(status, message, head)
        route = route_of(head.method, heartbeat_in(head.target)[1])
        grant = cors.granted(head, self.settings.allowed_origins)
        body = error_body(route, status, message, refusal_code(status))
        return [(b"Content-Type", b"application/json"), *NO_STORE, *grant], body

    def turned_down(self, status: int, head: RequestHead | None) -> None:
        """Counts and logs what ended before it was a request, where it looked like one."""
        if head is not None:
            route = route_of(head.method, heartbeat_in(head.target)[1])
            with suppress(Exception):  # it is bookkeeping
                self.seen(Seen(None, route.name, None, Outcome.REJECTED, status, error=refusal_code(status)))

    def give_up(self, upstream: str, silent: float) -> None:
        """Ends the requests that wait for a first byte of an upstream which has listed nothing for so long.

        Where it answers others, it works, and listings are merely late.
        """
        others = (call.silent(upstream) for call in self.calls)
        silent = min(
            silent, self.now() - self.heard.get(upstream, -inf), *(s for s in others if s is not None)
        )
        for call in self.calls - self._given_up.keys():
            why = call.unheard(upstream, silent)
            if why is not None:
                self._given_up[call] = why
                call.caller.cancel()

    def drain(self) -> None:
        """Ends the connections of SDKs on which nothing is under way, and the others when that is over."""
        self._draining = True
        for calls in list(self.tunnels):
            calls.leave()

    def stop(self, why: str = "the proxy is shutting down") -> None:
        """Ends every open request in the way of its route, and refuses new ones."""
        self.stopping = why
        for call in list(self.calls):
            call.caller.cancel()

    async def close(self) -> None:
        await self.upstreams.close()


def _turn(settings: Settings) -> float:
    """Heartbeats are due to a tenth, and no wake-up comes more often than it is worth."""
    return min(max(settings.heartbeat / 10, 0.01), 0.5)
