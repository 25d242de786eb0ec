"""A WebSocket of LM Studio's own SDKs: what its caller says goes on as it came, and when.

`getOrLoad` and `loadModel` for a model that we keep wait for our load, or LM Studio would make a second copy beside it.
What is said after them on that connection waits behind them; what keeps the connection alive does not. Once the model
is warm, or waiting is of no use, they go on, and LM Studio says what it says. Predictions count as use of their model.

Who waits for `getOrLoad` hears how far our load is, in the messages in which LM Studio itself would tell him. Who waits
with `loadModel` does not: another copy is loaded for him afterwards, and its progress begins at nothing.
"""

import asyncio
from collections.abc import Sequence
from typing import Final, Protocol

from keepalive.core.errors import NotWarm
from keepalive.core.facts import InstanceLost, ModelId, ModelsChanged, RequestEnded, RequestStarted, WarmAsked
from keepalive.core.keeping import Keeping
from keepalive.http1 import Ticker, Tunnel
from keepalive.protocols import sdk
from keepalive.protocols.frames import GOING_AWAY, FrameReader, Kind, Piece, close_frame, text_frame
from keepalive.protocols.sdk import Id, Said, Wish

#: A larger message is not read: its prediction does not count as use.
MESSAGE_BYTES: Final = 1_048_576
#: What may wait behind a held message before its caller is no longer read.
HELD_BYTES: Final = 4_194_304
#: Instances whose names are remembered.
INSTANCES: Final = 1_000
#: Calls under way on one connection; of a caller with more it is not known when he has none.
CALLS: Final = 10_000
#: Progress is told in steps of this, and no more often than heartbeats could be.
STEP: Final = 0.01


class Owner(Protocol):
    """What all tunnels share: a `Proxy`."""

    keeping: Keeping
    instances: "Instances"
    waiting: int
    ticker: Ticker


class Instances:
    """The names of instances that answers have shown, by upstream and reference; the oldest are forgotten."""

    def __init__(self) -> None:
        self._names: dict[tuple[str, str], tuple[str, ...]] = {}

    def remember(self, upstream: str, shown: sdk.Shown) -> None:
        names = (shown.identifier, shown.key) if shown.key is not None else (shown.identifier,)
        for name in (shown.reference, shown.identifier):
            self._names.pop((upstream, name), None)
            self._names[upstream, name] = names
        while len(self._names) > 2 * INSTANCES:
            del self._names[next(iter(self._names))]

    def names(self, upstream: str, asked: Said) -> Sequence[str]:
        """What the model of a prediction may be called, the likeliest first."""
        known = self._names.get((upstream, asked.reference or asked.name or ""), ())
        return (asked.name, *known) if asked.name is not None else known


class SdkCalls:
    """One of them. `close` it in the end."""

    def __init__(self, owner: Owner, upstream: str, kind: str, *, joins: bool) -> None:
        self._owner = owner
        self._upstream = upstream
        self._kind = kind
        self._waits = (Wish.GET_OR_LOAD, Wish.LOAD) if joins else (Wish.GET_OR_LOAD,)
        self._now = asyncio.get_running_loop().time
        self._caller = FrameReader(masked=True, limit=MESSAGE_BYTES)
        self._answers = FrameReader(masked=False, limit=MESSAGE_BYTES)
        self._tunnel: Tunnel | None = None
        self._wait: asyncio.Task[None] | None = None
        self._held: list[Piece] = []  # the message that waits, and what waits behind it
        self._held_id: Id | None = None
        self._held_bytes = 0
        self._uses: dict[Id, Sequence[ModelId]] = {}
        self._changes: dict[Id, Said] = {}  # loads and unloads under way
        self._under_way: set[Id] = set()  # and all other calls
        self._countless = False  # he has had more than are remembered
        self._told = -1.0  # how far the load is, to who waits for it
        self._awaited: Sequence[ModelId] = ()
        self.leaving = False
        self._over = False  # one side has said that it closes

    # --- from the tunnel --------------------------------------------------------------------------

    def opened(self, tunnel: Tunnel) -> None:
        self._tunnel = tunnel

    def said(self, data: bytes) -> bytes:
        on = b"".join([self._heard(piece) for piece in self._caller.feed(data)])
        while self._caller.deaf and self._wait is not None:
            on += self._release()
        self._measure()
        return on

    def left(self) -> bytes:
        self._drop()
        return self._caller.rest()

    def answered(self, data: bytes) -> None:
        for piece in self._answers.feed(data):
            if piece.kind is not Kind.MESSAGE:
                self._over = self._over or piece.kind is Kind.CLOSE
                continue
            answer = sdk.answered(piece.text)
            for shown in answer.instances:
                self._owner.instances.remember(self._upstream, shown)
            if answer.ended is not None:
                self._under_way.discard(answer.ended)
                self._end_use(answer.ended, answered=answer.well)
                self._end_change(answer.ended, done=answer.well)
        if self.leaving:
            self._leave_if_idle()

    def leave(self) -> None:
        """End it as soon as no call is under way on it, as a server does that goes away."""
        self.leaving = True
        self._leave_if_idle()

    def _leave_if_idle(self) -> None:
        busy = self._countless or self._under_way or self._uses or self._changes or self._wait is not None
        if busy or self._over or self._tunnel is None or not (self._caller.between and self._answers.between):
            return
        self._over = True
        self._tunnel.tell(close_frame(GOING_AWAY, masked=False))
        self._tunnel.send(close_frame(GOING_AWAY, masked=True))
        self._tunnel.close()

    async def close(self) -> None:
        wait = self._wait
        self._drop()
        for ident in list(self._uses):
            self._end_use(ident, answered=False)
        if wait is not None:
            await asyncio.wait([wait])

    # --- what the caller says ---------------------------------------------------------------------

    def _heard(self, piece: Piece) -> bytes:
        """What goes on now."""
        if piece.kind is Kind.CONTROL:
            return piece.data
        if piece.kind is Kind.CLOSE:
            self._over = True
            self._drop()
            return piece.data
        asked = sdk.said(piece.text)
        if self._wait is None:
            return self._on(piece, asked)
        if asked.wish is Wish.KEEP_ALIVE:
            return piece.data
        self._hold(piece)
        if asked.wish is Wish.CANCEL and asked.id == self._held_id:
            return self._release()
        return b""

    def _on(self, piece: Piece, asked: Said) -> bytes:
        """A message whose turn it is."""
        if asked.wish in self._waits:
            if asked.plain and asked.name is not None:
                self._owner.keeping.take_up(asked.name)
            models = self._kept([asked.name] if asked.name is not None else [])
            if models and all(self._owner.keeping.view(model).state != "warm" for model in models):
                for model in models:
                    # Whoever has it loaded means to use it for a while, not for one request.
                    if not self._owner.keeping.view(model).wanted:
                        self._owner.keeping.record(WarmAsked(self._now(), model))
                self._hold(piece)
                self._held_id = asked.id
                if asked.wish is Wish.GET_OR_LOAD:
                    self._awaited, self._told = models, -1.0
                    self._owner.ticker.add(self)
                self._wait = asyncio.create_task(self._until_warm(models))
                self._wait.add_done_callback(self._waited)
                return b""
        self._note(asked)
        return piece.data

    def _note(self, asked: Said) -> None:
        """What goes on, and is to be known when it is over."""
        if asked.id is None or asked.wish is Wish.CANCEL:
            return
        self._under_way.add(asked.id)
        if len(self._under_way) > CALLS:
            self._under_way.clear()
            self._countless = True
        if asked.wish is Wish.USE:
            self._begin_use(asked.id, self._owner.instances.names(self._upstream, asked))
        elif asked.wish in (Wish.LOAD, Wish.UNLOAD):
            self._changes[asked.id] = asked

    def _kept(self, names: Sequence[str]) -> list[ModelId]:
        """The models on this upstream that are kept under the first name that means any."""
        for name in names:
            found = [model for model in self._owner.keeping.find(name) if model.upstream == self._upstream]
            if found:
                return found
        return []

    def _begin_use(self, ident: Id, names: Sequence[str]) -> None:
        if ident in self._uses:
            return
        # An instance that no answer has shown can be any that is there.
        models = self._kept(names) if names else self._owner.keeping.present(self._upstream, self._kind)
        self._uses[ident] = models
        for model in models:
            self._owner.keeping.record(RequestStarted(self._now(), model))

    def _end_use(self, ident: Id, *, answered: bool) -> None:
        models = self._uses.pop(ident, ())
        for model in models:
            self._owner.keeping.record(RequestEnded(self._now(), model, answered and len(models) == 1))

    def _end_change(self, ident: Id, *, done: bool) -> None:
        """A caller may load another copy, and unload what is ours: that is known at once, not with the next listing."""
        change = self._changes.pop(ident, None)
        if change is None or not done:
            return
        keeping, now = self._owner.keeping, self._now()
        keeping.record(ModelsChanged(now, self._upstream))
        if change.wish is Wish.UNLOAD:
            for model in self._kept(self._owner.instances.names(self._upstream, change)):
                keeping.record(InstanceLost(now, model, "a caller unloaded it"))

    # --- waiting ----------------------------------------------------------------------------------

    async def _until_warm(self, models: Sequence[ModelId]) -> None:
        self._owner.waiting += 1
        try:
            async with asyncio.timeout(self._owner.keeping.view(models[0]).max_wait):
                await self._owner.keeping.ensure_warm(models)
        except (TimeoutError, NotWarm):
            pass  # what is to be said of it is LM Studio's
        finally:
            self._owner.waiting -= 1

    def tick(self, now: float) -> None:
        """Tells who waits how far the load is, between two messages of LM Studio's."""
        if self._tunnel is None or self._held_id is None or not self._answers.between or self._over:
            return
        progress = self._owner.keeping.view(self._awaited[0]).progress
        if progress is None or progress < self._told + STEP:
            return
        self._told = progress
        told = sdk.load_progress(self._held_id, progress)
        if told is not None:
            self._tunnel.tell(text_frame(told))

    def _waited(self, wait: asyncio.Task[None]) -> None:
        if wait is not self._wait or self._tunnel is None:
            return
        self._tunnel.send(self._release())
        self._measure()

    def _release(self) -> bytes:
        """The message that was held, and what waited behind it up to the next that waits."""
        first, *behind = self._held
        self._drop()
        self._note(sdk.said(first.text))
        return first.data + b"".join([self._heard(piece) for piece in behind])

    def _drop(self) -> None:
        """Nothing waits any more; when the caller leaves, what did would be for nobody."""
        self._held.clear()
        self._held_bytes = 0
        wait, self._wait, self._held_id = self._wait, None, None
        self._owner.ticker.discard(self)
        if wait is not None:
            wait.cancel()

    def _hold(self, piece: Piece) -> None:
        self._held.append(piece)
        self._held_bytes += len(piece.data)

    def _measure(self) -> None:
        if self._tunnel is not None:
            self._tunnel.hold(self._held_bytes > HELD_BYTES)
