"""Who may be in memory where there is not enough for all: who is let in, who goes for it, and who waits.

- `always` models come first, in the order of the config; for them and for whoever waits room is made, in the order
  in which they came. What nobody waits for is only ever loaded into room that is free.
- A load that nobody has asked for is given up for whoever waits behind it, where LM Studio can be told so.
- Only a copy goes that we loaded, of a model that is `auto` and that nobody uses, the least recently used first and
  no more than is needed. Superfluous copies of our own go before all others.
- Where nothing idle is enough, callers wait. After `patience` what costs least to load again is drained: it answers
  to the end and is given to nobody else. Nothing of this is remembered: with the reason the drain is gone, too.
- A refusal for want of memory tells a limit, which holds for a while and until a load shows that it has gone.
- What crashed soon after it had been loaded is loaded again when one of those has gone that it crashed beside.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from keepalive.core.demand import FORGOTTEN, demand
from keepalive.core.facts import ModelId, Occupant, Tier, fold_key
from keepalive.core.records import Claim, Model, Upstream, is_loading
from keepalive.core.states import State

# Who has just been served comes again: the request that was woken is on its way, and so is an agent's next step.
SETTLE = 3.0
# Beside its file a model takes memory for context and buffers. A fifth is what LM Studio's own estimates come to.
MARGIN = 1.2
# What took the memory when LM Studio refused a load may give it back: then it is asked again.
REFUSAL_HOLDS = 300.0
# Beside what it crashed it may get on well another time: others may have been larger then.
CROWD_HOLDS = 3600.0
# How long after a load or an unload LM Studio's word on what fits may still be that from before.
WORD_LAG = 5.0
# A model that a loss or a failure befell this recently is not loaded for nobody.
AHEAD_AFTER = 300.0


def takes(model: Model) -> int | None:
    """The bytes that it takes in memory; None where nothing tells."""
    if model.policy.memory is not None:
        return model.policy.memory
    if model.need is not None and model.need.memory_bytes > 0:
        return model.need.memory_bytes
    return round(model.size_bytes * MARGIN) if model.size_bytes else None


def source(model: Model) -> str | None:
    """What `takes` goes by."""
    if model.policy.memory is not None:
        return "config"
    if model.need is not None and model.need.memory_bytes > 0:
        return "estimate"
    return "size" if model.size_bytes else None


def limit(upstream: Upstream, models: Sequence[Model], now: float) -> int | None:
    """The bytes that models may take together, as far as that is known."""
    known = [] if upstream.memory is None else [upstream.memory]
    granted = [m.granted_claim for m in models if m.granted_claim]
    known += [
        m.refused_claim.bytes - 1 for m in models if m.refused_claim and _holds(m.refused_claim, granted, now)
    ]
    return min(known, default=None)


def _holds(refused: Claim, granted: Iterable[Claim], now: float) -> bool:
    since = refused.since
    return now < since + REFUSAL_HOLDS and not any(
        g.since > since and g.bytes >= refused.bytes for g in granted
    )


def limit_source(upstream: Upstream, models: Sequence[Model], now: float) -> str | None:
    known = limit(upstream, models, now)
    return None if known is None else "config" if known == upstream.memory else "refusal"


def used(upstream: Upstream, models: Iterable[Model]) -> int:
    """The bytes that models take now, whoever loaded them, as far as that is known."""
    models = tuple(models)
    return _used_by_others(upstream, models) + sum((takes(m) or 0) * copies(m) for m in models)


def _used_by_others(upstream: Upstream, models: Iterable[Model]) -> int:
    return sum(round((o.size_bytes or 0) * MARGIN) * o.copies for o in others(upstream, models))


def others(upstream: Upstream, models: Iterable[Model]) -> list[Occupant]:
    """What is in memory there of models that nobody keeps."""
    if not upstream.occupants:
        return []
    # A variant that is kept is listed in the row of its key, with all copies of that; what is kept by an alias of
    # llama-server's, under its name there.
    keys = [fold_key(name) for m in models for name in (m.id.key, *(i.id for i in m.instances))]
    kept = {*keys, *(key.rpartition("@")[0] for key in keys)}
    return [one for one in upstream.occupants if one.key not in kept]


def strangers(upstream: Upstream, models: Sequence[Model]) -> list[str]:
    """The keys of what is in memory there and was not loaded by us."""
    loaded = [m.id.key for m in models if m.instances and not m.ours and m.load_started is None]
    return [*(one.key for one in others(upstream, models)), *loaded]


def _there(upstream: Upstream, models: Sequence[Model]) -> int:
    """How many models are in memory or on their way there, whoever's."""
    mine = {fold_key(m.id.key) for m in models}
    foreign = sum(one.copies for one in others(upstream, models)) + len(upstream.arriving - mine)
    return foreign + sum(copies(m) for m in models)


def copies(model: Model) -> int:
    """Those in memory, or on their way there."""
    coming = model.load_started is not None or model.pending is not None
    return max(len(model.instances), 1 if coming else 0)


def manages(upstream: Upstream, models: Iterable[Model]) -> bool:
    """Whether memory is a matter here at all, and can be seen."""
    if upstream.tier is Tier.OPENAI:
        return False
    limited = upstream.memory is not None or upstream.places is not None
    return limited or any(m.policy.auto for m in models)


def is_in_use(model: Model, now: float) -> bool:
    """Whether anybody works with it, or is about to, by all that we know."""
    if model.in_use or model.calling or model.pending is not None or model.wanted:
        return True
    if model.engaged or model.seen_by.late:
        return True  # somebody who does not ask through us is at it, or may be
    if model.draining:
        return False  # those who wait for it wait until it comes again
    return model.callers > 0 or now < model.last_use + SETTLE


def next_to_go(models: Iterable[Model], now: float) -> list[Model]:
    """Whose copies may go now, those first that are missed least."""
    idle = [m for m in models if may_go(m) and not is_in_use(m, now) and not _is_held_off(m, now)]
    return sorted(idle, key=lambda m: (not m.draining, m.last_use, -m.rank))


def _is_held_off(model: Model, now: float) -> bool:
    """Whether LM Studio has just refused to unload it: asking again and again is of no use."""
    return model.letting_go is not None and model.retry_at is not None and now < model.retry_at


def may_go(model: Model) -> bool:
    """Whether it is all ours, and let go for others."""
    return model.policy.auto and len(model.instances) > 0 and all(i.id in model.ours for i in model.instances)


@dataclass(frozen=True, slots=True)
class Arrangement:
    """What is to become of the memory of one upstream."""

    loads: tuple[Model, ...] = ()  # there is room for these now
    coming: tuple[Model, ...] = ()  # and for these, when those have gone that nobody uses
    ahead: Model | None = None  # nobody waits, and this one would fit
    given_up: tuple[ModelId, ...] = ()  # loads ahead that somebody waits behind
    unloads: tuple[tuple[Model, str], ...] = ()  # copies that make room
    drains: frozenset[ModelId] = frozenset()
    waits: Mapping[ModelId, str] = field(default_factory=lambda: MappingProxyType({}))
    # There is none, and nothing that we could do would make any.
    never: Mapping[ModelId, str] = field(default_factory=lambda: MappingProxyType({}))
    claims: Mapping[ModelId, int] = field(default_factory=lambda: MappingProxyType({}))


def arrange(
    upstream: Upstream, models: Sequence[Model], ready: Sequence[Model], slots: int, now: float
) -> Arrangement:
    """Who of `ready`, in this order, is let in, at most `slots` of them, and what has to happen for it.

    `ready` are models that could be loaded now were there room, and of those that nobody waits for the `auto` ones.
    """
    return _Arranging(upstream, models, now).run(ready, slots)


class _Arranging:
    def __init__(self, upstream: Upstream, models: Sequence[Model], now: float) -> None:
        self.now = now
        self.models = models
        self.upstream = upstream
        self.limit = limit(upstream, models, now)
        # LM Studio 0.3.x keeps one model on demand, and the next load is what displaces it.
        self.displacing = upstream.tier is Tier.V0 and upstream.displaces is not False
        self.unloads_by_call = upstream.tier is not Tier.V0
        self.used = _used_by_others(upstream, models) + sum(self._takes(m) * copies(m) for m in models)
        self.places = sum(map(self._holds, models))
        self.there = _there(upstream, models)
        self.idle = next_to_go(models, now)
        self.spare = self._superfluous()
        self.with_spare = {m.id for m, _ in self.spare}
        # By HTTP there is no word to end a load; where its progress is told there is one.
        self.could_end = [m for m in models if m.ahead and m.progress is not None and not m.giving_up]
        self.given_up: list[ModelId] = []
        self.leaving = [m for m in models if m.unloading]
        self.taken_out = 0
        self.out: frozenset[str] = frozenset()  # folded keys of those that are thought of as gone
        # LM Studio's word is of what was loaded when it was asked: a while ago, where something has changed since.
        self.word_counts = all(upstream.asked > m.touched_at + WORD_LAG for m in models)
        self.unloads: list[tuple[Model, str]] = []
        self.drains: set[ModelId] = {m.id for m in self.leaving if m.draining}
        self.reserved: set[ModelId] = set()
        self.waits: dict[ModelId, str] = {}
        self.never: dict[ModelId, str] = {}
        self.claims: dict[ModelId, int] = {}

    # --- what there is --------------------------------------------------------------------------------

    def _place(self, model: Model) -> bool:
        """Where nothing is known of the limit, there is one place, for whatever is `auto`."""
        return model.policy.auto or self.displacing

    def _holds(self, model: Model) -> bool:
        return self._place(model) and (bool(model.ours) or is_loading(model))

    def _is_taken(self, model: Model) -> bool:
        """Whether there is one place for it, and another one has that."""
        return self._alone(model) and self._place(model) and self.places > 0

    def _alone(self, model: Model) -> bool:
        word = model.need is not None and model.need.passes_guardrails is not None
        known = self.upstream.memory is not None or self.upstream.places is not None
        return self.displacing or not (known or word)

    def _is_full(self) -> bool:
        """Whether a load would push out whatever its server finds idlest, be it kept or somebody else's."""
        return self.upstream.places is not None and self.there >= self.upstream.places

    def _takes(self, model: Model) -> int:
        bytes_ = takes(model)
        if bytes_ is None:
            # It may take all there is: then it is alone.
            return self.limit or 0
        return bytes_

    def _crashed_beside(self, model: Model) -> list[Model]:
        """Those that are there, all of them, of whom one has to go before it is loaded again; none where none may."""
        if model.crowd is None or self.now >= model.crowd[1] + CROWD_HOLDS:
            return []
        there = {key: m for m in self.models if copies(m) and (key := fold_key(m.id.key)) not in self.out}
        others = there.keys() | {one.key for one in self.upstream.occupants if one.key not in self.out}
        if not model.crowd[0] <= others:
            return []
        return [m for key, m in there.items() if key in model.crowd[0] and may_go(m)]

    def _lacks(self, model: Model) -> bool:
        if model.crowd is not None and self._crashed_beside(model):
            return True
        if self._is_taken(model) or self._is_full():
            return True
        if self.word_counts and not self.taken_out and model.need and model.need.passes_guardrails is False:
            return True
        return self.limit is not None and self.used + self._takes(model) > self.limit

    # --- who is let in --------------------------------------------------------------------------------

    def run(self, ready: Sequence[Model], slots: int) -> Arrangement:
        asked = [m for m in ready if m.needed]
        granted: list[Model] = []
        coming: list[Model] = []
        self._reserve()
        room_is_kept = False
        for model in asked:
            if model.id in self.never:
                continue
            if slots <= 0:
                if model.callers and self.could_end:
                    self._give_up(self.could_end[0])
                break
            if room_is_kept and not self._is_always(model):
                self.waits[model.id] = "waits for room: others have waited longer"
                continue
            before = self.used, self.there
            if model.id in self.reserved:
                self.used -= self._takes(model)
                self.there -= 1
            if not self._lacks(model):
                granted.append(model)
                coming.append(model)
                self._let_in(model)
                slots -= 1
            elif self._make_room(model):
                coming.append(model)
                self._let_in(model)
                if self.displacing:
                    granted.append(model)
                slots -= 1
            else:
                # For what cannot come nobody is held up.
                if model.callers:
                    self._give_up_for(model)
                hopes = model.id not in self.never
                room_is_kept = room_is_kept or (hopes and self._is_patient_no_more(model))
                self.used, self.there = before
        ahead = None
        if slots > 0 and not self.leaving and all(m.id in self.never for m in asked):
            ahead = self._ahead(ready)
        return Arrangement(
            tuple(granted),
            tuple(coming),
            ahead,
            tuple(self.given_up),
            tuple(self.unloads),
            frozenset(self.drains),
            self.waits,
            self.never,
            self.claims,
        )

    def _is_always(self, model: Model) -> bool:
        return not model.policy.auto

    def _let_in(self, model: Model) -> None:
        self.used += self._takes(model)
        self.places += self._place(model)
        self.there += 1
        if takes(model) is not None:
            self.claims[model.id] = self.used

    def _reserve(self) -> None:
        """Room for `always` models that are not there yet, as many of the first of them as fit."""
        budget, together = self.upstream.memory, 0
        places, always = self.upstream.places, 0
        for model in sorted(self.models, key=lambda m: m.rank):
            if self._is_always(model) and model.wanted and model.listed:
                bytes_ = self._takes(model)
                absent = not copies(model)
                if budget is not None and absent and together + bytes_ > budget:
                    first = (
                        f", of which {gigabytes(together)} are for those that come first" if together else ""
                    )
                    self.never[model.id] = (
                        f"there is no room for it: {self._size(model)}, and the budget is {gigabytes(budget)}{first}"
                    )
                    continue
                if places is not None and absent and always >= places:
                    self.never[model.id] = f"there is no room for it: {self._number()}, which come first"
                    continue
                together += bytes_
                always += 1
                if absent:
                    self.used += bytes_
                    self.there += 1
                    self.reserved.add(model.id)
        for model in self.models:
            if not model.policy.auto or model.instances:
                continue
            bytes_ = self._takes(model)
            if budget is not None and bytes_ > budget - together:
                beside = f" beside what is always kept ({gigabytes(together)})" if together else ""
                self.never[model.id] = (
                    f"there is no room for it: {self._size(model)}, and the budget is "
                    f"{gigabytes(budget)}{beside}"
                )
            elif places is not None and always >= places:
                self.never[model.id] = f"there is no room for it: {self._number()}, which are always kept"

    # --- who goes for it ------------------------------------------------------------------------------

    def _make_room(self, model: Model) -> bool:
        """Whether room comes without anybody's being asked to end; else says what it waits for."""
        before = self._room()
        for other in self.leaving:
            self._take_out(other)
        if not self._lacks(model):
            self.waits[model.id] = (
                f"waits for room: {_names(self.leaving)} {_verb(self.leaving, 'is', 'are')} being unloaded"
            )
            self.leaving = []
            return True
        left = self._room()
        idle = self.idle if self._can_empty() else []
        chosen = self._choose(model, idle)
        if chosen is not None:
            going = [*chosen, *[m for m, _ in self.spare]]
            self.waits[model.id] = f"waits for room: {_names(going)} {_verb(going, 'makes', 'make')} room"
            self._go(chosen)
            self.leaving = []
            return True
        busy = self._busy() if self._can_empty() else []
        if self._is_patient_no_more(model):
            self._reset(left)
            chosen = self._choose(model, [*idle, *busy])
            if chosen is not None:
                self.drains |= {m.id for m in chosen}
        self._reset(before)
        self.waits[model.id] = self._what_for(model, busy)
        return False

    def _give_up(self, load: Model) -> None:
        self.given_up.append(load.id)
        self.could_end.remove(load)

    def _give_up_for(self, model: Model) -> None:
        """End the loads that nobody waits for, where the room that they take is what is missing."""
        before = self._room()
        ended: list[Model] = []
        for load in self.could_end:
            if not self._lacks(model):
                break
            ended.append(load)
            self._take_out(load)
        idle = self.idle if self._can_empty() else []
        if ended and self._choose(model, idle) is not None:
            for load in ended:
                self._give_up(load)
        self._reset(before)

    def _can_empty(self) -> bool:
        return self.unloads_by_call or self.displacing

    def _superfluous(self) -> list[tuple[Model, str]]:
        """Further copies of ours, of which one is enough."""
        if not self.unloads_by_call:
            return []
        found = []
        for model in self.models:
            ours = [i.id for i in model.instances if i.id in model.ours]
            extra = ours[1:] if len(ours) == len(model.instances) else ours
            used = model.in_use or model.calling or model.engaged or model.seen_by.late
            if extra and not used and not _is_held_off(model, self.now):
                found.append((model, extra[-1]))
        return found

    def _choose(self, model: Model, candidates: Sequence[Model]) -> list[Model] | None:
        """Beside what is spare, of `candidates` the first that make room for `model`, and none that need not go."""
        for other, _ in self.spare:
            self.used -= self._takes(other)
            self.there -= 1
            self.taken_out += 1
        chosen = list(candidates)
        for other in chosen:
            self._take_out(other)
        if self._lacks(model):
            return None
        for other in reversed(candidates):
            self._put_back(other)
            if self._lacks(model):
                self._take_out(other)
            else:
                chosen.remove(other)
        return chosen

    def _take_out(self, model: Model) -> None:
        self.used -= self._takes(model) * self._copies_left(model)
        self.places -= self._holds(model)
        self.there -= self._copies_left(model)
        self.taken_out += 1
        self.out |= {fold_key(model.id.key)}

    def _put_back(self, model: Model) -> None:
        self.used += self._takes(model) * self._copies_left(model)
        self.places += self._holds(model)
        self.there += self._copies_left(model)
        self.taken_out -= 1
        self.out -= {fold_key(model.id.key)}

    def _room(self) -> tuple[int, int, int, int, frozenset[str]]:
        return self.used, self.places, self.there, self.taken_out, self.out

    def _reset(self, room: tuple[int, int, int, int, frozenset[str]]) -> None:
        self.used, self.places, self.there, self.taken_out, self.out = room

    def _copies_left(self, model: Model) -> int:
        """Without the one that is spare, which is not counted twice."""
        return copies(model) - (model.id in self.with_spare)

    def _go(self, chosen: Sequence[Model]) -> None:
        gone = {m.id for m in chosen}
        # Until they are gone nobody gets them.
        self.drains |= {m.id for m in chosen if m.draining}
        self.idle = [m for m in self.idle if m.id not in gone]
        if self.unloads_by_call:
            self.unloads += [(m, i.id) for m in chosen for i in m.instances[-1:]]
            self.unloads += self.spare
        self.spare = []

    def _busy(self) -> list[Model]:
        """Who could be drained, those first that cost least to load again.

        What has just been loaded answers those who waited for it first.
        """
        busy = [
            m
            for m in self.models
            if may_go(m)
            and m.state is State.WARM
            and is_in_use(m, self.now)
            and not m.calling
            and not m.wanted
            and (m.draining or not m.callers)
        ]
        return sorted(busy, key=lambda m: (not m.draining, m.expected_load or 0.0, m.last_use, -m.rank))

    def _is_patient_no_more(self, model: Model) -> bool:
        return self.now >= model.in_line_since + model.policy.patience

    # --- what nobody waits for ------------------------------------------------------------------------

    def _ahead(self, ready: Sequence[Model]) -> Model | None:
        # Whoever is needed lacks room, or he would have been let in before this.
        wished = [
            m
            for m in ready
            if not m.failures
            and (m.last_eviction is None or self.now >= m.last_eviction.at + AHEAD_AFTER)
            and (m.policy.idle is None or self.now < m.use_at + m.policy.idle)
            and takes(m) is not None
            and not self._lacks(m)
        ]
        wished = [m for m in wished if demand(m, self.now) >= FORGOTTEN]
        best = max(wished, key=lambda m: (demand(m, self.now), -m.rank), default=None)
        if best is not None:
            self._let_in(best)
        return best

    # --- what is said of it ---------------------------------------------------------------------------

    def _what_for(self, model: Model, busy: Sequence[Model]) -> str:
        if crowd := self._crashed_beside(model):
            lack = f"it crashed when it was loaded beside {_names(crowd)}"
        elif self._is_taken(model):
            lack = "one model at a time fits for all that is known"
        elif self._is_full():
            lack = self._number()
        elif self.limit is None:
            lack = f"it takes {gigabytes(self._takes(model))}, and LM Studio says that it does not fit"
        else:
            free = max(0, self.limit - self.used)
            lack = f"{self._size(model)}, and {gigabytes(free)} are free"
        if not self._could_ever(model):
            foreign = strangers(self.upstream, self.models)
            was = "was" if len(foreign) == 1 else "were"
            whose = f"; {', '.join(foreign[:3])} {was} loaded by somebody else" if foreign else ""
            self.never[model.id] = f"there is no room for it: {lack}{whose}"
            return self.never[model.id]
        if busy:
            some = busy[:3]
            if any(m.id in self.drains for m in busy):
                verb = _verb(some, "makes room when its", "make room when their")
            else:
                verb = _verb(
                    some, "is in use; it makes room when its", "are in use; they make room when their"
                )
            return f"waits for room: {lack}; {_names(some)} {verb} answers have ended"
        return f"waits for room: {lack}"

    def _size(self, model: Model) -> str:
        if takes(model) is None:
            return "nothing tells what it takes (memory in [[models]] would)"
        return f"it takes {gigabytes(self._takes(model))}"

    def _number(self) -> str:
        many = self.upstream.places
        return f"llama-server keeps {many} model{'' if many == 1 else 's'} at a time (--models-max)"

    def _could_ever(self, model: Model) -> bool:
        """Whether it would fit if all went that we may ever let go, or that nobody wants any more."""
        ours = [
            m
            for m in self.models
            if (m.ours or is_loading(m))
            and (m.policy.auto or (self.unloads_by_call and not m.wanted))
            and self._can_empty()
        ]
        places = self.upstream.places
        if places is not None and self.there - sum(copies(m) for m in ours) >= places:
            return False
        if self.limit is None:
            # Only what goes can change that: there is one place, or LM Studio has said that it does not fit.
            return places is not None or bool(ours)
        return self.used - sum(self._takes(m) * copies(m) for m in ours) + self._takes(model) <= self.limit


def _names(models: Iterable[Model]) -> str:
    return ", ".join(dict.fromkeys(m.id.key for m in models))


def _verb(models: Iterable[Model], one: str, many: str) -> str:
    return one if len({m.id.key for m in models}) == 1 else many


def gigabytes(bytes_: float) -> str:
    return f"{bytes_ / 1e9:.1f} GB"
