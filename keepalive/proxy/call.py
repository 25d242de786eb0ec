"""One request on its way to an upstream, and the answer on its way back."""

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Sequence
from typing import Final, Protocol, TypeAlias

from keepalive.core.callers import Begun, Outcome, Seen
from keepalive.core.errors import Reason, UpstreamError
from keepalive.core.facts import InstanceLost, ModelId, RequestEnded, RequestStarted
from keepalive.core.keeping import Keeping
from keepalive.core.names import Meaning
from keepalive.http1 import Caller, Reply, Ticker
from keepalive.protocols.answers import event_error
from keepalive.protocols.asked import NOTHING_ASKED
from keepalive.protocols.encodings import readable
from keepalive.protocols.lost import Lost, looks_lost
from keepalive.protocols.meter import Meter, Words
from keepalive.protocols.routes import Heartbeat, Route
from keepalive.proxy.account import Account
from keepalive.proxy.answer import Answer
from keepalive.proxy.body import RELEASED, Body, Room
from keepalive.proxy.patience import Patience
from keepalive.proxy.reading import Reading
from keepalive.proxy.relay import Events, Whole, first_error, first_event, looks_like_error, no_error
from keepalive.proxy.settings import Settings
from keepalive.proxy.silence import Silence
from keepalive.proxy.stored import Stored, Watch
from keepalive.proxy.upstreams import Upstreams

#: What is to be done next of a request, once the present step is over; None at the end.
Step: TypeAlias = "Coroutine[object, object, Step] | None"

#: Of an upstream's error answer: read before it is decided what becomes of it.
ERROR_BYTES: Final = 262_144


class Notes(Protocol):
    """Who wants to know what requests for some models begin with."""

    def wants(self, model: ModelId, /) -> bool: ...

    def note(self, model: ModelId, route: Route, body: bytes, /) -> Begun | None:
        """The opening that a request begins with, where the model had read that before."""


class Owner(Protocol):
    """What all requests share: a `Proxy`."""

    settings: Settings
    keeping: Keeping
    upstreams: Upstreams
    room: Room
    ticker: Ticker
    stored: Stored
    seen: Callable[[Seen], None]
    notes: Notes | None
    now: Callable[[], float]  # the event loop's
    heard: dict[str, float]  # when each upstream last answered to the end


class Call:
    """One request. `relay` or `close` every reply that `ask` returned, and `end` it in any case."""

    __slots__ = (
        "_first",
        "_forwarded",
        "_knows_lost",
        "_owner",
        "_patience",
        "_to_note",
        "_watch",
        "account",
        "answer",
        "asked",
        "body",
        "caller",
        "deadline",
        "meaning",
        "reading",
        "route",
    )

    def __init__(self, owner: Owner, caller: Caller, reading: Reading) -> None:
        self.caller = caller
        self.reading = reading
        self.route = route = reading.route
        self.account = Account(route.name, owner.now)
        self.answer = Answer(caller, route, self.account, reading.grant)
        self._patience: Patience | None = None
        self.body = Body(owner.room)
        self.asked = NOTHING_ASKED
        self.deadline = 0.0
        self._owner = owner
        self.meaning: Meaning | None = None
        self._forwarded: Sequence[ModelId] = ()  # told the keeper; its end is still to be told
        self._first = b""  # of the answer's body, read already
        self._knows_lost = False  # the keeper does, of this answer
        self._watch: Watch | None = None
        self._to_note = b""

    # --- to the upstream --------------------------------------------------------------------------

    def hold(self, models: Sequence[ModelId]) -> None:
        """The request is for models that we keep: from here on silence is filled."""
        settings, account, view_of = self._owner.settings, self.account, self._owner.keeping.view
        model, view = models[0], view_of(models[0])
        if view.state != "warm":
            views = ((other, view_of(other)) for other in models[1:])
            model, view = next((pair for pair in views if pair[1].state == "warm"), (model, view))
        account.model, account.state = model, view.state
        wish = self.reading.wish
        self.deadline = account.began + (view.max_wait if wish is None else min(view.max_wait, wish))
        if self.asked.stream and self.route.streams:
            mode = self.reading.heartbeat or settings.heartbeat_mode
            if mode is not Heartbeat.OFF:
                self._patience = Patience(
                    self.caller, self.route, account, self.answer, self._owner.keeping, self._owner.ticker
                )
                self._patience.begin(settings.heartbeat, visible=mode is Heartbeat.REASONING)

    def beat(self) -> None:
        """The model is not warm: whoever may be told so is told at once."""
        if self._patience is not None:
            self._patience.beat()

    def rename(self, name: str, field: str = "model") -> None:
        """It asks for `name` from now on."""
        if self.body.rename(name, field):
            head, packed = self.caller.head, b"content-encoding"
            head.say([pair for pair in head.headers if pair[0].lower() != packed])

    async def ask(
        self,
        upstream: str,
        model: ModelId | None,
        *,
        perhaps: Sequence[ModelId] = (),
        upgrade: bool = False,
    ) -> Reply:
        """Passes the request on; its answer's head. `perhaps` may answer where LM Studio chooses who does."""
        caller, account = self.caller, self.account
        if not self.body.data and caller.head.body:
            # Small bodies come at once; only the others are sent while they come, and cannot be sent again.
            self.body.data = await caller.read()
        meaning = self.meaning
        name = meaning.written(model) if meaning is not None and meaning.renamed else None
        if name is not None:
            self.rename(name)
        self._watch = Watch(self._owner.stored, upstream) if self.route.stores else None
        account.model = model
        account.sent_at = account.now()
        self._first = b""
        self._knows_lost = False
        self._forwarded = perhaps if model is None else (model,)
        for one in self._forwarded:
            self._owner.keeping.record(RequestStarted(account.sent_at, one))
        try:
            reply = await self._owner.upstreams.send(
                upstream,
                caller,
                self.reading,
                self.body.data,
                # Between the bytes of a compressed stream no heartbeat has a place, and in them no id is seen.
                readable=self.asked.stream or self.route.stores,
                upgrade=upgrade,
                once=self.route.changes,  # a load that is sent twice is a second copy in memory
            )
        except UpstreamError:
            self._told(answered=False)
            raise
        if not (upgrade or reply.complete):
            self._listen(reply)
        return reply

    def _listen(self, reply: Reply) -> None:
        owner, model = self._owner, self.account.model
        timeout = owner.settings.stall_timeout if model is None else owner.keeping.view(model).stall_timeout
        self.answer.silence = Silence(reply, self, timeout, owner.ticker)
        self.answer.silence.begin(self.account.now())

    def passed_bytes(self) -> int | None:
        """Of the answer, once it passes."""
        return None if self.answer.passed is None else self.answer.passed.bytes

    def resting(self) -> tuple[float, float] | None:
        """For how long the model has been seen to rest, and how long ago that was."""
        model = self.account.model
        return None if model is None else self._owner.keeping.view(model).resting

    def fine(self, reply: Reply, *, ahead: bool) -> bool:
        """Whether `read_refusal` need not be asked: so much has come of an answer that it is seen to be none."""
        head = reply.head
        return head.status == 200 and (not ahead or no_error(reply.begun, stream=head.stream))

    async def read_refusal(self, reply: Reply, *, ahead: bool) -> Lost | None:
        """Whether this answer says that the model went away; then the keeper knows it too.

        `ahead`: an answer that looks like a good one is looked into, too, before any of it is passed on.
        """
        head = reply.head
        if head.status >= 400:
            self._first = await reply.read(ERROR_BYTES)
            return self._look(head.status, readable(self._first, head.values(b"content-encoding")))
        if not ahead or head.status != 200:
            return None
        if head.stream:
            # The caller has its head as soon as ever: nothing but events can follow, whoever sends them.
            self.answer.begin(head, stream=True)
            if not reply.kept_bytes:
                self.caller.flush()  # else it leaves with them
            self._first = await first_event(reply)
        else:
            self._first = await first_error(reply)
        if b'"error"' not in self._first:
            return None  # as nearly always: an error has that word, whatever it looks like
        error = event_error(self._first) if head.stream else self._first
        return self._look(200, error) if error else None

    def _look(self, status: int, body: bytes) -> Lost | None:
        lost = looks_lost(status, body, self._named)
        if lost is not None and not self._knows_lost:
            self._knows_lost = True
            self.lost(lost.message, lost.reason)
        return lost

    def lost(self, message: str, why: Reason | None = None) -> None:
        model = self.account.model or self._only
        if model is not None:
            self._owner.keeping.record(InstanceLost(self.account.now(), model, message, why))

    def close(self, reply: Reply) -> None:
        self.caller.passes = None
        if self.answer.silence is not None:
            self._stop_listening()
        reply.close()
        if self._forwarded:
            self._told(answered=False)

    @property
    def _only(self) -> ModelId | None:
        """Who answers, where that is no guess: LM Studio chooses only where there is but one."""
        chosen = self.account.model is not None or (self.meaning is not None and not self.meaning.known)
        return self._forwarded[0] if chosen and len(self._forwarded) == 1 else None

    @property
    def _named(self) -> str | None:
        """What the upstream was asked for, where that is a model that we keep, by its key.

        Of an instance's name a server may know nothing though the model is there: that instance went, or never was.
        """
        model, meaning = self.account.model, self.meaning
        if model is None or meaning is None:
            return None
        name = meaning.written(model) or self.asked.model or ""
        return name if name.casefold() == model.key.casefold() else None

    def _stop_listening(self) -> None:
        silence, self.answer.silence = self.answer.silence, None
        if silence is not None:
            silence.stop()

    def _told(self, *, answered: bool) -> None:
        answered = answered and self._only is not None
        models, self._forwarded = self._forwarded, ()
        for model in models:
            now = self.account.now()
            self._owner.keeping.record(RequestEnded(now, model, answered))
            if answered:
                self._owner.heard[model.upstream] = now

    # --- back to the caller -----------------------------------------------------------------------

    def relay(self, reply: Reply) -> Coroutine[object, object, None]:
        """The upstream's answer becomes ours, byte for byte, while what is returned here is awaited.

        `reply` is closed in the end.
        """
        try:
            return self._begin(reply)
        except BaseException:
            self.close(reply)
            raise

    def _begin(self, reply: Reply) -> Coroutine[object, object, None]:
        caller, head = self.caller, reply.head
        self._note_later(head.status)
        self.body.release()
        self.body, self.asked = RELEASED, NOTHING_ASKED  # what it asked goes no further
        stream = head.stream and head.status == 200 and caller.head.method != b"HEAD"
        if self._stalled():
            return self._leave(reply)
        if self.answer.promised and not stream:
            return self._explain(reply)
        self.answer.begin(head, stream=stream)
        readable = head.status == 200 and not head.values(b"content-encoding")
        caller.forget_head()
        head.forget()
        if stream:
            return self._relay_events(reply)
        return self._relay_whole(
            reply, Words(self.route.protocol) if readable and self.route.inference else None
        )

    def _note_later(self, status: int) -> None:
        """What the request begins with is looked at once the first bytes of its answer are on their way."""
        notes, model = self._owner.notes, self.account.model
        if notes is None or model is None or status != 200 or self.body.packed or not notes.wants(model):
            return
        self._to_note = self.body.data
        asyncio.get_running_loop().call_soon(self._note)

    def _note(self) -> None:
        body, self._to_note = self._to_note, b""
        notes, model = self._owner.notes, self.account.model
        if body and notes is not None and model is not None:
            with contextlib.suppress(Exception):  # it is bookkeeping
                self.account.begun = notes.note(model, self.route, body)

    async def _relay_events(self, reply: Reply) -> None:
        account, answer = self.account, self.answer
        try:
            events = await self._pass_events(reply)
            while not (reply.complete or reply.cut):
                await reply.ending()
            meter = events.meter
            error = meter.error if meter is not None else None
            stalled = False
            if not reply.complete:
                stalled = self._broke_off()
            else:
                events.finish()
                account.outcome = Outcome.OK
                if meter is not None and not meter.ended:
                    account.outcome = Outcome.CUT if error is None else Outcome.UPSTREAM_ERROR
                    if error is not None:
                        answer.told_error(error)
                elif meter is not None and not meter.said and error is None:
                    account.outcome = Outcome.EMPTY
                self.caller.finish()
            lost = self._look(200, error) if error is not None else None
            answered = meter is not None and meter.first_token_seconds is not None and meter.said
            self._told(answered=answered and lost is None and not stalled)
        finally:
            self.close(reply)

    async def _pass_events(self, reply: Reply) -> Events:
        """From now on they go to the caller as they come."""
        answer, now = self.answer, self.account.now
        if self.caller.paused:
            await self.caller.drained()
        self.caller.passes = reply
        events = Events(answer.push, now, Meter(self.route.protocol, self.account.began), answer)
        answer.passed = events
        self._pour(reply, events.take)
        self.caller.flush()
        events.writer = self.caller.chunk_writer()
        if events.writer is not None and self._watch is None and answer.unseen:
            reply.pour_chunks(events)
        return events

    async def _relay_whole(self, reply: Reply, words: Words | None) -> None:
        try:
            if self.caller.paused:
                await self.caller.drained()
            self.caller.passes = reply
            if self._patience is not None:
                self._patience.stop()
            whole = self.answer.passed = Whole(self.caller.push, words)
            self._pour(reply, whole.take)
            if not (reply.complete or reply.cut):
                self.caller.flush()
            if reply.complete or await reply.ended():
                self._whole_ended(whole, reply.head.status)
            else:
                self._broke_off()
        finally:
            self.close(reply)

    def _whole_ended(self, whole: Whole, status: int) -> None:
        self.caller.finish()
        if status < 400 and not looks_like_error(whole.first):
            empty = whole.empty
            self.account.outcome = Outcome.EMPTY if empty else Outcome.OK
            # Who says nothing has proved nothing: the next ping will ask.
            self._told(answered=status == 200 and not empty)
        else:
            self.account.outcome = Outcome.UPSTREAM_ERROR
            if status < 400:
                self._look(status, whole.first)

    async def _leave(self, reply: Reply) -> None:
        self.close(reply)

    def _pour(self, reply: Reply, take: Callable[[bytes], None]) -> None:
        """What has come of it, and what comes."""
        if self._watch is not None:
            take = self._watched(take, self._watch)
        if self._first:
            take(self._first)
            self._first = b""  # a stream goes on for long
        reply.pour(take)

    def _watched(self, take: Callable[[bytes], None], watch: Watch) -> Callable[[bytes], None]:
        def take_and_look(data: bytes) -> None:
            take(data)
            watch.look(data)

        return take_and_look

    async def _explain(self, reply: Reply) -> None:
        """An answer that is no event stream, to a caller that was promised one."""
        try:
            body = self._first or await reply.read(ERROR_BYTES)
            if not self._stalled():
                said = readable(body, reply.head.values(b"content-encoding"))
                self.answer.explain(reply.head.status, said)
        finally:
            self.close(reply)

    def _broke_off(self) -> bool:
        """The upstream's answer has ended before its end; whether because we gave it up."""
        if self._stalled():
            return True
        self.answer.cut()
        return False

    def _stalled(self) -> bool:
        silence = self.answer.silence
        if silence is None or not silence.stalled:
            return False
        self.answer.stalled(silence.why)
        self.lost(silence.why)  # a model that does so has to prove that it answers
        return True

    def silent(self, upstream: str) -> float | None:
        """For how long the answer has been silent; None where none of that upstream has begun."""
        model, silence = self.account.model, self.answer.silence
        if model is None or model.upstream != upstream or silence is None:
            return None
        return silence.seconds

    def unheard(self, upstream: str, silent: float) -> str | None:
        """Why nothing will come of it any more; `upstream` has been silent for so long, in all that it is asked.

        A long prompt may be read for as long as it takes, but not by somebody who does not answer anything.
        """
        model, silence = self.account.model, self.answer.silence
        if model is None or model.upstream != upstream or not self._forwarded:
            return None
        timeout = self._owner.keeping.view(model).stall_timeout
        begun = (silence is not None and silence.begun) or self.passed_bytes()
        if timeout is None or begun or min(silent, self.account.now() - self.account.sent_at) < timeout:
            return None
        return f"LM Studio has answered nothing at all for {timeout:g} s"

    def end(self) -> None:
        """The request is over, however it went."""
        if self._patience is not None:
            self._patience.stop()
        if self.body is not RELEASED:
            self.body.release()
        if self._forwarded:
            self._told(answered=False)
        if self._to_note:
            self._note()
        passed = self.answer.passed
        meter = passed.meter if isinstance(passed, Events) else None
        with contextlib.suppress(Exception):  # it is bookkeeping
            self._owner.seen(self.account.seen(passed.bytes if passed is not None else 0, meter))
