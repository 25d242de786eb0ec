"""One request on its way through the simulator: where it waits, and what may wake or fail it there."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Any, NoReturn

from keepalive.simulator.exchange import Cut, Request
from keepalive.simulator.faults import Value
from keepalive.simulator.journal import Happened
from keepalive.simulator.machine import Machine
from keepalive.simulator.models import Instance, Load, Slot


class Call:
    """Every wait of a request goes through `until`, so an eviction, a crash or a restart reaches it
    anywhere."""

    def __init__(self, machine: Machine, n: int, request: Request, route: str) -> None:
        self.machine = machine
        self.n = n
        self.request = request
        self.route = route
        self.asked: str | None = None  # the model as the client wrote it
        self.key: str | None = None  # the model it stands for, once that is known
        self.variant: str | None = None  # which of the model's, where the name tells one
        self.phase = "waiting"
        self.instance: Instance | None = None
        self.granted = False
        self.load: Load | None = None  # the one it asked for and waits for
        self.slot: Slot | None = None
        self.prompt_ends: float | None = None
        self.prompt_words = self.cached_words = 0
        self.generating = False
        self.tokens = 0
        self.payload: dict[str, Any] = {}
        self._hung = False
        self._failure: Exception | None = None
        self._wake: asyncio.Future[None] | None = None
        self._faults: dict[str, Value] = {}
        machine.calls[n] = self

    def fault(self, name: str) -> Value:
        """A fault's value for this request: settled at the first look, so that a stream does not change its
        mind."""
        if name not in self._faults:
            key = self.key or self.asked
            self._faults[name] = self.machine.faults.take(name, key, self.route, self.request.path)
        return self._faults[name]

    def flag(self, name: str) -> bool:
        return bool(self.fault(name))

    def number(self, name: str) -> float:
        return float(self.fault(name))

    def word(self, name: str) -> str:
        return str(self.fault(name))

    def fail(self, failure: Exception) -> None:
        if self._failure is None:
            self._failure = failure
        self.wake()

    def wake(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    async def until(self, ready: Callable[[], bool], within: float | None = None) -> bool:
        """Wait for a condition whose makers call `wake`; False when it did not come true `within` that many
        seconds."""
        rung = False

        def ring() -> None:
            nonlocal rung
            rung = True
            self.wake()

        timer = None if within is None else self.machine.clock.call_later(within, ring)
        try:
            while True:
                if self._failure is not None:
                    raise self._failure
                if not self._hung and ready():
                    return True
                if not self._hung and rung:
                    return False
                self._wake = asyncio.get_running_loop().create_future()
                try:
                    await self._wake
                finally:
                    self._wake = None
        finally:
            if timer is not None:
                timer.cancel()

    async def pause(self, seconds: float) -> None:
        if seconds > 0:
            await self.until(lambda: False, within=seconds)
        else:
            await asyncio.sleep(0)  # a long answer without pauses must not keep the loop to itself
            await self.until(lambda: True)

    async def hang(self) -> NoReturn:
        """Never answer. Ends by cancellation or by a restart, as it would on a socket."""
        self._hung = True
        await self.until(lambda: False)
        raise AssertionError("a request that hangs went on")

    def leave_hanging(self) -> None:
        self._hung = True

    # what becomes of it

    def generation_started(self, instance: Instance) -> None:
        self.generating = True
        self.machine.journal.write(
            Happened.GENERATION_STARTED,
            request=self.n,
            route=self.route,
            model=instance.model.key,
            instance_id=instance.id,
            owner=instance.owner,
            asked=self.asked,
        )

    def generation_ended(self, outcome: str) -> None:
        """Frees the slot; idempotent, so that every way out may call it."""
        instance = self.instance
        self.machine.memory.leave(self)
        if self.generating:
            self.generating = False
            self.machine.journal.write(
                Happened.GENERATION_ENDED,
                request=self.n,
                model=self.key,
                instance_id=instance.id if instance else None,
                tokens=self.tokens,
                prompt=self.prompt_words,
                cached=self.cached_words,
                outcome=outcome,
            )

    def client_gone(self) -> None:
        machine = self.machine
        if machine.calls.pop(self.n, None) is None:
            return
        machine.journal.write(Happened.CLIENT_GONE, request=self.n, route=self.route, phase=self.phase)
        if self.load is not None:
            if self in self.load.waiters:
                self.load.waiters.remove(self)
            if self.flag("load_cancelled_by_disconnect") and not self.load.waiters:
                machine.memory.cancel_load(self.load)
        if self.prompt_ends is not None and self.flag("prompt_finishes_after_disconnect"):
            # The server's own log line: "If the model is busy processing the prompt, it will finish first."
            machine.clock.call_at(self.prompt_ends, lambda: self.generation_ended("client_gone"))
        elif self.prompt_ends is not None and (late := self.number("disconnect_noticed_seconds")) > 0:
            machine.clock.call_later(late, lambda: self.generation_ended("client_gone"))
        else:
            self.generation_ended("client_gone")

    def ended(self, end: BaseException | None = None) -> None:
        if self.machine.calls.pop(self.n, None) is None:
            return
        if isinstance(end, Cut):
            self.machine.journal.write(Happened.CUT, request=self.n, route=self.route, how=end.how)
        self.generation_ended("cut" if isinstance(end, Cut) else "ended")


class Body:
    """A streamed body. It ends its call however it ends: read to the end, broken off, or closed before its
    start (a plain async generator that was never started would not notice being closed)."""

    def __init__(self, call: Call, first: bytes | None, rest: AsyncGenerator[bytes]) -> None:
        self._call = call
        self._first = first
        self._rest = rest
        self._over = False

    def __aiter__(self) -> "Body":
        return self

    async def __anext__(self) -> bytes:
        if self._over:
            raise StopAsyncIteration
        if self._first is not None:
            first, self._first = self._first, None
            return first
        try:
            return await anext(self._rest)
        except asyncio.CancelledError:
            self._call.client_gone()
            self._over = True
            raise
        except BaseException as end:
            self._over = True
            self._call.ended(end)
            raise

    async def aclose(self) -> None:
        if not self._over:
            self._over = True
            self._call.client_gone()
            await self._rest.aclose()
