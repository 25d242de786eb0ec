"""What one LM Studio consists of, whoever asks: its clock, its switches, its memory, its journal, the requests in
flight; and what somebody who sits in front of it can do.
"""

import random
from collections.abc import Callable, Iterable, Mapping
from email.utils import formatdate
from typing import Any, Literal, get_args

from keepalive.simulator.clock import Clock, Timer
from keepalive.simulator.exchange import Cut
from keepalive.simulator.faults import Faults
from keepalive.simulator.journal import Event, Happened, Journal
from keepalive.simulator.memory import Memory
from keepalive.simulator.models import DEFAULT_MODELS, Guest, Instance, Load, SimModel, Stored
from keepalive.simulator.speech import EPOCH

Tier = Literal["v1", "v0", "openai"]
TIERS: tuple[Tier, ...] = get_args(Tier)


class Machine:
    """Make it inside or outside a loop, use it inside one."""

    def __init__(
        self,
        models: Iterable[SimModel] = DEFAULT_MODELS,
        *,
        tier: Tier = "v1",
        faults: Mapping[str, Any] | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self.clock = Clock()
        self.journal = Journal(self.clock.now)
        self.faults = Faults(rng or random.Random(0), self.clock)  # noqa: S311 - a simulation, not a secret
        self.memory = Memory(models, self.clock, self.faults, self.journal)
        self.tier: Tier = tier
        self.up = True
        self.vanished = False
        self.boots = 1  # connections from before the last one mean nothing to it
        self.stored: dict[str, Stored] = {}  # by their response ids
        self.mark = ""  # goes into response ids: two servers must not give the same ones
        # Whoever owns sockets for this studio hears of a restart: False as it goes down, True as it is back.
        self.on_power: list[Callable[[bool], None]] = []
        self._return: Timer | None = None
        self.calls: dict[int, Guest] = {}
        self._numbers = 0
        self.faults.patch(faults or {})
        self.faults.watchers.append(self._faults_changed)

    def date(self) -> str:
        """What its clock says, as a header has it."""
        return formatdate(EPOCH + self.clock.now(), usegmt=True)

    def set_faults(self, changes: Mapping[str, Any] | None = None, /, **more: Any) -> None:
        """Merge changes into the faults; None puts one back to its default. `FaultError` names what is
        wrong."""
        self.faults.patch({**(changes or {}), **more})

    def load(
        self,
        model: str,
        *,
        seconds: float | None = None,
        context_length: int | None = None,
        identifier: str | None = None,
    ) -> Load:
        """Somebody loads a model by hand. With `seconds=0` it is there when this returns."""
        found = self._known(model)
        variant = self.memory.variant(found, model)
        if identifier is not None and identifier in (self.memory.instances.keys() | self.memory.loads.keys()):
            raise ValueError(f'an instance with the identifier "{identifier}" already exists')

        def take(name: str) -> bool | int | float | str:
            return self.faults.take(name, found.key)

        return self.memory.start_load(
            found,
            "by hand",
            take,
            seconds=seconds,
            context_length=context_length,
            identifier=identifier,
            variant=variant,
        )

    def evict(self, name: str) -> None:
        """An instance, or every copy of a model, goes as Auto-Evict would take it: in mid-answer if need
        be."""
        for instance in self._instances(name):
            self.memory.evict(instance, by="control")

    def crash(self, name: str, stays_listed: bool = False) -> None:
        for instance in self._instances(name):
            self.memory.crash(instance, stays_listed)

    def advance(self, seconds: float) -> None:
        """Skip time: timers, loads and pauses due on the way come due now."""
        self.clock.advance(seconds)

    def restart(self, down_seconds: float = 0.0) -> None:
        """LM Studio ends and starts again: nobody listens for a while, every answer breaks off, nothing is
        loaded."""
        self.journal.write(Happened.DOWN, seconds=down_seconds)
        self._go()
        self.vanished = False
        for call in list(self.calls.values()):
            call.fail(Cut("fin"))
        for tell in list(self.on_power):
            tell(False)
        if down_seconds > 0:
            self._return = self.clock.call_later(down_seconds, self._back)
        else:
            self._back()

    def vanish(self, seconds: float) -> None:
        """The power goes, or the cable: no connection is ended, every open exchange is silent for good. What stands
        there after `seconds` began anew and knows of none of them."""
        self.journal.write(Happened.VANISHED, seconds=seconds)
        self._go()
        self.vanished = True
        for call in self.calls.values():
            call.leave_hanging()
        self.calls.clear()
        self._return = self.clock.call_later(seconds, self._back)

    def set_tier(self, tier: Tier) -> None:
        if tier not in TIERS:
            raise ValueError(f'there is no tier "{tier}"; write one of {", ".join(TIERS)}')
        self.tier = tier
        self.journal.write(Happened.TIER, tier=tier)

    def log(self, since: int = 0) -> list[Event]:
        """What happened after event number `since`."""
        return self.journal.since(since)

    @property
    def in_flight(self) -> int:
        return len(self.calls)

    def close(self) -> None:
        """Stop all timers, so that nothing of this world outlives its test."""
        self.clock.stop()

    def next_number(self) -> int:
        """Of a request, whichever way it comes."""
        self._numbers += 1
        return self._numbers

    # inner

    def _go(self) -> None:
        self.up = False
        self.boots += 1
        self.memory.forget_all()
        if self.faults.flag("restart_forgets_responses"):
            self.stored.clear()
        if self._return is not None:
            self._return.cancel()  # a restart during a restart counts from its own beginning

    def _back(self) -> None:
        self.up = True
        self.journal.write(Happened.UP)
        if self.vanished:
            self.vanished = False
            return  # its port was never closed
        for tell in list(self.on_power):
            tell(True)

    def _faults_changed(self, names: list[str]) -> None:
        self.journal.write(Happened.FAULTS, names=names)
        for call in list(self.calls.values()):
            call.wake()  # those held by `stalled` look again

    def _known(self, name: str) -> SimModel:
        if model := self.memory.find(name):
            return model
        raise ValueError(
            f'there is no model "{name}" on this disk; there are {", ".join(self.memory.models)}'
        )

    def _instances(self, name: str) -> list[Instance]:
        if name in self.memory.instances and name not in self.memory.models:
            return [self.memory.instances[name]]
        found = self.memory.copies(self._known(name))
        if not found:
            raise ValueError(f'"{name}" is not loaded')
        return found
