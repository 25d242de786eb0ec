"""Days of several daemons as one, with everything going wrong between them; `cluster_world.py` says how it is judged.

KEEPALIVE_SEED and KEEPALIVE_HOURS as for `tests/keeper/test_simulation.py`; of a cluster the short form is minutes.
A failure names its seed, and `cluster_world.live_together(seed, hours, …)` shows it again.
"""

import os
import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from keepalive.cluster import hold
from keepalive.cluster.etcd import Etcd
from keepalive.cluster.grounds import Grounds
from keepalive.cluster.hold import Hold
from keepalive.cluster.member import Cluster
from keepalive.cluster.rows import Picture
from keepalive.cluster.seeing import Seeing
from keepalive.cluster.writing import Writing
from keepalive.core import apply as applying
from keepalive.core import listings, room
from keepalive.core.facts import ListingFailed, Trouble
from keepalive.core.records import Model
from tests.kit.cluster_world import CLUSTER_KINDS, MORE_KINDS, Member, live_together
from tests.kit.world import Broken

FIRST = 20261122
CHOSEN = os.environ.get("KEEPALIVE_SEED", str(FIRST))
SEED = random.SystemRandom().randrange(10**9) if CHOSEN == "random" else int(CHOSEN)
HOURS = float(os.environ.get("KEEPALIVE_HOURS", "0"))
# In pieces that several workers share; in each some hours of dense trouble of each sort, and days that are calm.
PIECES = max(1, round(HOURS / 40))
DENSE_HOURS = 1.0 if HOURS else 0.15
CALM_HOURS = max(HOURS / PIECES - 3 * DENSE_HOURS, 0.0)


@pytest.mark.timeout(3000 if HOURS else 400)
@pytest.mark.parametrize("piece", range(PIECES))
def test_days_of_every_trouble_between_daemons_load_nothing_twice_and_always_end_warm(
    piece: int, run_folder: Path
):
    print(f"base seed {SEED}")
    injected: Counter[str] = Counter()
    happened: Counter[str] = Counter()
    lives = [(DENSE_HOURS, {"sound": sound, "short": short}) for sound, short in SORTS]
    if CALM_HOURS:
        lives.append((CALM_HOURS, {"sound": True, "calm": True}))
    for n, (hours, sort) in enumerate(lives):
        _, world = live_together(SEED + 10 * piece + n, hours, **sort)
        injected += world.injected
        happened += world.judge.counted + world.answers
    print(f"{injected.total()} faults: {dict(injected)}")
    print(f"what happened, and what was told apart from mistakes of ours: {dict(happened)}")

    if HOURS or SEED == FIRST:  # in minutes of another seed there may be less
        assert injected.total() > 5
        assert happened["well again"] > 2
    (run_folder / f"cluster-trouble-{piece}").write_text("\n".join(injected) + "\n")
    told = sorted(run_folder.glob("cluster-trouble-*"))
    if HOURS >= 400 and len(told) == PIECES:  # the last of them to end speaks for all
        kinds = {kind for file in told for kind in file.read_text().splitlines()}
        assert {*CLUSTER_KINDS, *MORE_KINDS} - kinds == set()


# Whether nothing is wrong with LM Studio itself, and whether models are let go for each other.
SORTS = ((True, False), (True, True), (False, False))


def test_the_same_seed_gives_the_same_trace():
    first, _ = live_together(SEED + 1, 0.03, sound=True)
    again, _ = live_together(SEED + 1, 0.03, sound=True)

    assert first == again


# --- planted bugs -----------------------------------------------------------------------------------------


def counts_its_lease_by_the_wall_clock(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Member, "awake", Member.wall)


def uses_its_lease_to_the_end(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(hold, "MARGIN", 0.0)


def loads_without_asking_the_hand(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Cluster, "acts", lambda cluster, upstream: True)


def acts_on_waking_before_it_has_asked(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Hold, "good", lambda held, now: held.asked > 0)


def writes_no_intent(patch: pytest.MonkeyPatch) -> None:
    async def begin(cluster: Cluster, model: Model) -> bool:
        return cluster.acts(model.id.upstream)

    patch.setattr(Cluster, "begin", begin)


def passes_over_the_intent_of_another(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Seeing, "_see_load", lambda *_: None)


def forgets_an_intent_that_is_resolved(patch: pytest.MonkeyPatch) -> None:
    spent = Writing._spent

    def all_but_loads(
        writing: Writing, upstream: str, models: Mapping[Any, Any]
    ) -> Iterable[tuple[str, bytes | None]]:
        found = spent(writing, upstream, models)
        return [(key, value) for key, value in found if not key.startswith("loads/") or value]

    patch.setattr(Writing, "_spent", all_but_loads)


def takes_a_watch_for_whole(patch: pytest.MonkeyPatch) -> None:
    """It looks when it is told, and neither when it renews its lease nor when a watch begins."""
    watch, answered, look_again = Etcd.watch, Grounds.is_answered, Cluster.look_again

    async def told(etcd: Etcd, prefix: str) -> Any:
        first = True
        async for _ in watch(etcd, prefix):
            if not first:
                yield
            first = False

    def renewed(grounds: Grounds) -> None:
        answered(grounds)
        grounds.renewed = grounds.saw  # type: ignore[attr-defined]

    def look(cluster: Cluster) -> None:
        if getattr(cluster._grounds, "renewed", False):
            cluster._grounds.renewed = False  # type: ignore[attr-defined]
        else:
            look_again(cluster)

    patch.setattr(Etcd, "watch", told)
    patch.setattr(Grounds, "is_answered", renewed)
    patch.setattr(Cluster, "look_again", look)


def unloads_what_others_use(patch: pytest.MonkeyPatch) -> None:
    async def clear(cluster: Cluster, model: Model) -> bool:
        return cluster.acts(model.id.upstream)

    patch.setattr(Cluster, "clear", clear)
    patch.setattr(Picture, "uses_elsewhere", lambda picture, instance: {})


def takes_a_closed_port_for_the_end_of_a_load(patch: pytest.MonkeyPatch) -> None:
    def failed(model: Model, fact: ListingFailed) -> Model:
        after = listings.listing_failed(model, fact)
        return replace(after, pending=None) if fact.trouble is Trouble.REFUSED else after

    patch.setitem(applying.CHANGES, ListingFailed, failed)


def tells_nobody_whose_copies_there_are(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Model, "unknown_there", property(lambda model: frozenset()))


def lets_go_of_what_is_waited_for(patch: pytest.MonkeyPatch) -> None:
    def is_in_use(model: Model, now: float) -> bool:
        return model.in_use or model.calling or model.pending is not None or model.wanted

    patch.setattr(room, "is_in_use", is_in_use)


LOADING = ("killed while loading", "stopped while loading", "a model is lost")
# Each with what finds it, in what trouble, and how far from the first seed the first world lies that has what it takes.
PLANTED: list[tuple[Callable[[pytest.MonkeyPatch], None], tuple[str, ...], tuple[str, ...], int]] = [
    (counts_its_lease_by_the_wall_clock, ("C1", "C2"), ("a clock is set", "cut from etcd while loading"), 1),
    (uses_its_lease_to_the_end, ("C2",), ("cut from etcd",), 2),
    (loads_without_asking_the_hand, ("C1", "C2", "I3"), LOADING, 0),
    (acts_on_waking_before_it_has_asked, ("C1", "C2", "I3"), ("stopped while loading", "cut from etcd"), 1),
    (writes_no_intent, ("I3",), LOADING, 0),
    (passes_over_the_intent_of_another, ("I3",), LOADING, 0),
    (forgets_an_intent_that_is_resolved, ("C3",), LOADING, 0),
    (takes_a_watch_for_whole, ("C3", "C5"), ("watches die",), 1),
    (unloads_what_others_use, ("I5",), ("a clock is set",), 5),
    (takes_a_closed_port_for_the_end_of_a_load, ("I3",), ("cut from a server while loading",), 0),
    (tells_nobody_whose_copies_there_are, ("C5",), ("cut from a server",), 6),
    (lets_go_of_what_is_waited_for, ("C6",), ("a clock is set",), 0),
]


@pytest.mark.parametrize(
    ("plant", "invariants", "kinds", "first"), PLANTED, ids=[p[0].__name__ for p in PLANTED]
)
def test_a_planted_bug_is_found(
    plant: Callable[[pytest.MonkeyPatch], None],
    invariants: tuple[str, ...],
    kinds: tuple[str, ...],
    first: int,
    monkeypatch: pytest.MonkeyPatch,
):
    plant(monkeypatch)
    short = plant in (
        takes_a_watch_for_whole,
        unloads_what_others_use,
        tells_nobody_whose_copies_there_are,
        lets_go_of_what_is_waited_for,
    )
    changes: dict[str, Any] = {"kinds": kinds, "pace": 30.0}
    if plant is unloads_what_others_use:
        changes |= {"callers": 10.0, "token_seconds": 5.0}
    if plant is lets_go_of_what_is_waited_for:
        changes |= {"callers": 5.0, "token_seconds": 0.2}
    found = None
    for seed in range(FIRST + first, FIRST + first + 20):
        try:
            live_together(seed, 0.3, sound=True, short=short, **changes)
        except Broken as broken:
            found = str(broken).split("\n")[0]
            if any(f"{one} at " in found for one in invariants):
                break
            found = None
    print(found)

    assert found is not None
