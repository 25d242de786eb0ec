"""Days of everything going wrong, judged by the invariants; `world.py` says how.

KEEPALIVE_SEED=n chooses the base seed, KEEPALIVE_SEED=random draws it, KEEPALIVE_HOURS=n says the hours in all
(`make simulation`: a thousand). A failure names its seed, and `world.live(seed, hours, calm=…)` shows it again.
"""

import asyncio
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from keepalive.core import apply as applying
from keepalive.core import calls, listings, moves, upstreams
from keepalive.core import plan as planning
from keepalive.core.actions import Unload
from keepalive.core.facts import (
    Listed,
    ListingFailed,
    LoadEnded,
    LoadOutcome,
    ModelId,
    PingStarted,
    Trouble,
    UnloadStarted,
)
from keepalive.core.records import Model, Policy
from keepalive.core.states import State
from keepalive.keeper import keeper
from keepalive.keeper.given import Keep
from keepalive.simulator.models import SimModel
from keepalive.simulator.studio import Studio
from tests.kit import PROJECT
from tests.kit.world import (
    HOUR,
    KINDS,
    Broken,
    InProcessSocket,
    Judge,
    Site,
    VirtualLoop,
    World,
    live,
    run_virtually,
)

FIRST = 20261122
CHOSEN = os.environ.get("KEEPALIVE_SEED", str(FIRST))
SEED = random.SystemRandom().randrange(10**9) if CHOSEN == "random" else int(CHOSEN)
HOURS = float(os.environ.get("KEEPALIVE_HOURS", "34"))
# In pieces that several workers share; in each some worlds of dense trouble, and one that is calm and longer than the
# day that a lease lasts. What finds more is another world, not more hours in one.
PIECES = max(1, round(HOURS / 40))
DENSE, DENSE_HOURS = (8, 1.0) if HOURS < 500 else (3, 3.0)
CALM_HOURS = max(HOURS / PIECES - DENSE * DENSE_HOURS, 1.0)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("piece", range(PIECES))
def test_days_of_every_trouble_break_no_invariant_and_always_end_warm(piece: int, run_folder: Path):
    print(f"base seed {SEED}")
    injected: Counter[str] = Counter()
    happened: Counter[str] = Counter()
    for n in range(piece * DENSE, (piece + 1) * DENSE):
        _, world = live(SEED + n, DENSE_HOURS)
        injected += world.injected
        happened += world.judge.counted
    _, world = live(SEED - 1 - piece, CALM_HOURS, calm=True)
    injected += world.injected
    happened += world.judge.counted
    (run_folder / f"trouble-{piece}").write_text("\n".join(injected) + "\n")
    told = sorted(run_folder.glob("trouble-*"))
    if len(told) == PIECES:  # the last of them to end tries what chance left out of all
        met = {kind for file in told for kind in file.read_text().splitlines()}
        for seed in range(SEED, SEED + 20):
            if left := tuple(kind for kind in KINDS if kind not in met):
                _, world = live(seed, 0.5, kinds=left, pace=60.0)
                happened += world.judge.counted
                met |= set(world.injected)
        assert set(KINDS) - met == set()
    print(f"{injected.total()} faults: {dict(injected)}")
    print(f"told apart from mistakes of ours: {dict(happened)}")

    assert injected.total() > 20
    assert happened["evicted: unknown, seen by the socket"] == 0


@pytest.mark.parametrize("number", range(3))
def test_trouble_where_models_are_let_go_for_each_other_breaks_no_invariant_either(number: int):
    print(f"base seed {SEED}")
    _, world = live(SEED + number, 0.5, short=True, kinds=(*KINDS, *["users"] * 40), pace=60.0)

    assert world.injected["users"] > 3


def test_the_same_seed_gives_the_same_trace():
    first, _ = live(SEED, 0.2)
    again, _ = live(SEED, 0.2)
    other, _ = live(SEED + 1, 0.2)
    code = f"from tests.kit.world import live; print(live({SEED}, 0.2)[0])"
    elsewhere = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": "7"},
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=True,
    )

    assert first == again
    assert first == elsewhere.stdout.strip()
    assert first != other


class Raises:
    def observe(self, fact: object, before: object, after: object) -> None:
        raise RuntimeError("the disk is full")


def test_observers_that_raise_change_nothing():
    plain, _ = live(SEED, 0.2)
    watched, world = live(SEED, 0.2, observers=[Raises()])

    assert watched == plain
    assert len(world.reported) > 100


# --- killed at every step -----------------------------------------------------------------------------


def small(tier: str, sdk: float | None = None, **faults: Any) -> World:
    """Two cold models, loaded one after the other within ten seconds; `sdk`: by the socket, in so many each."""
    judge = Judge(asyncio.get_running_loop().time)
    took = (5.0, 3.0) if sdk is None else (sdk, sdk)
    models = [SimModel("acme/a", load_seconds=took[0]), SimModel("acme/b", load_seconds=took[1])]
    studio = Studio(models, tier=tier, faults=faults)  # type: ignore[arg-type]
    site = Site("alpha", studio, judge, models, refresh=15.0, auto_evict=False, sdk=sdk is not None)
    policy = Policy(load_timeout=20.0)
    keeps = [Keep(ModelId("alpha", m.key), policy) for m in models]
    return World(0, [site], keeps, judge, random.Random(0))


def killed_at(step: int | None, tier: str, remembers: bool, **faults: Any) -> tuple[int, World]:
    """The steps of the scenario, and its world after a kill -9 at one of them and a new start."""

    async def go() -> tuple[int, World]:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        world = small(tier, **faults)
        world.remembers = remembers
        first = world.start()

        def on_step(n: int) -> None:
            if n == step:
                first.kill()
                loop.call_soon(world.start)

        loop.on_step = on_step
        await asyncio.sleep(10.0)
        steps = loop.steps
        for _ in range(20):
            await asyncio.sleep(10.0)
            assert world.life is not None
            if all(m.state is State.WARM for m in world.life.keeper.snapshot().models):
                break
        await world.kill()
        world.check_reports()
        world.sites[0].studio.close()
        return steps, world

    return run_virtually(go)


@pytest.mark.parametrize(
    ("tier", "remembers", "faults"),
    [
        ("v1", True, {"v0_shows_loading": False}),
        ("v1", True, {"v0_shows_loading": False, "listing_lag_seconds": 20.0}),
        ("v1", False, {}),
        ("v1", True, {"sdk": 0.1, "v0_shows_loading": False}),
        ("v1", True, {"load_reply": {"value": "fin", "times": 1}, "load_reply_after_seconds": 1.0}),
        ("v0", True, {"auto_evict": False}),
        ("v0", False, {"auto_evict": False}),
    ],
)
def test_killed_at_any_step_and_started_again_it_loads_nothing_twice(
    tier: str, remembers: bool, faults: dict[str, Any]
):
    steps, _ = killed_at(None, tier, remembers, **faults)
    for step in range(1, steps + 1):
        _, world = killed_at(step, tier, remembers, **faults)

        assert world.judge.broken == [], f"killed at step {step}"
        loaded = [i.model.key for i in world.sites[0].studio.memory.instances.values()]
        assert sorted(loaded) == ["acme/a", "acme/b"], f"killed at step {step}"
    assert steps > 10


# What LM Studio says of a load of 0.6 s: that it has found the model, nine times how far it is, and that it is there.
MESSAGES = 11


@pytest.mark.parametrize("dies", [False, True])
def test_whichever_message_of_a_load_is_the_last_of_its_socket_each_model_is_loaded_once(
    dies: bool, monkeypatch: pytest.MonkeyPatch
):
    """`dies`: the load goes with its socket, of which nobody knows whether LM Studio does that."""
    ended = InProcessSocket._hang_up

    def end(socket: InProcessSocket) -> None:
        ended(socket)
        for load in list(socket.site.studio.memory.loads.values()) if dies else ():
            socket.site.studio.memory.cancel_load(load)

    monkeypatch.setattr(InProcessSocket, "_hang_up", end)

    async def go(messages: int) -> tuple[list[str], dict[str, int]]:
        world = small("v1", sdk=0.6, load_cuts_socket=messages)
        life, studio = world.start(), world.sites[0].studio
        await asyncio.sleep(600.0)
        assert [m.state for m in life.keeper.snapshot().models] == [State.WARM, State.WARM]
        begun = Counter(e["model"] for e in studio.log() if e["kind"] == "load.started")
        await world.kill()
        return world.judge.broken, begun

    for messages in range(MESSAGES + 1):
        broken, begun = run_virtually(lambda m=messages: go(m))

        assert (messages, broken) == (messages, [])
        # Before the first message it has not begun, and with the last one it is over.
        lost = int(dies and 0 < messages < MESSAGES - 1)
        assert (messages, begun) == (messages, {"acme/a": 1 + lost, "acme/b": 1})


# --- planted bugs -----------------------------------------------------------------------------------------


def loads_without_a_listing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(planning, "_is_fresh", lambda upstream, model, now: True)


def believes_stale_listings(patch: pytest.MonkeyPatch) -> None:
    listed = listings.listed

    def believe(model: Model, fact: Listed) -> Model:
        after = listed(replace(model, asked=-1.0, touched_at=-1.0), fact)
        return replace(after, touched_at=model.touched_at)

    patch.setitem(applying.CHANGES, Listed, believe)  # type: ignore[arg-type]
    patch.setattr(planning, "_is_fresh", lambda u, m, now: now - u.answered_at <= planning.FRESH)


def takes_no_answer_for_a_failure(patch: pytest.MonkeyPatch) -> None:
    ended = calls.load_ended

    def fail(model: Model, fact: LoadEnded) -> Model:
        if fact.outcome is LoadOutcome.UNKNOWN:
            fact = replace(fact, outcome=LoadOutcome.FAILED)
        return ended(model, fact)

    patch.setitem(applying.CHANGES, LoadEnded, fail)  # type: ignore[arg-type]


def pings_what_is_absent(patch: pytest.MonkeyPatch) -> None:
    def is_due(model: Model, now: float) -> bool:
        due = model.ping_at is None or now >= model.ping_at
        return model.needed and not model.calling and due and model.state is State.COLD

    patch.setattr(planning, "_ping_is_due", is_due)
    started = lambda model, fact: replace(model, pinging=True)  # noqa: E731
    patch.setitem(applying.CHANGES, PingStarted, started)  # type: ignore[arg-type]


def unloads_what_is_not_ours(patch: pytest.MonkeyPatch) -> None:
    def unloads(
        upstream: object, models: list[Model], now: float, room: object
    ) -> list[tuple[Model, Unload]]:
        idle = [m for m in models if not m.needed and m.instances and planning._is_unloadable(m, now)]
        return [(m, Unload(m.id, m.instances[0].id)) for m in idle]

    patch.setattr(planning, "_unloads", unloads)
    started = lambda model, fact: replace(model, unloading=True)  # noqa: E731
    patch.setitem(applying.CHANGES, UnloadStarted, started)  # type: ignore[arg-type]


def never_backs_off(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(moves, "BACKOFF_MAX", 0.5)
    patch.setattr(calls, "BACKOFF_MAX", 0.5)


def forgets_its_load_in_a_restart(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(World, "remembers", False, raising=False)


def takes_a_closed_port_for_the_end_of_a_load(patch: pytest.MonkeyPatch) -> None:
    def failed(model: Model, fact: ListingFailed) -> Model:
        after = listings.listing_failed(model, fact)
        return replace(after, pending=None) if fact.trouble is Trouble.REFUSED else after

    patch.setitem(applying.CHANGES, ListingFailed, failed)


def unloads_what_is_in_use(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Model, "needed", property(lambda model: model.wanted))
    patch.setattr(planning, "LINGER", 0.0)
    patch.setattr(
        planning,
        "_is_unloadable",
        lambda model, now: not model.calling and not model.wanted and (model.retry_at or 0.0) <= now,
    )


def displaces_what_is_not_ours(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(planning, "blocked_by", lambda upstream, models, model: None)


def waits_for_ever(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(listings, "_resolve", lambda model, pending, at, told: None)


def forgets_the_lag_of_the_listing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(calls, "LISTING_LAG", 0.0)
    patch.setattr(listings, "LISTING_LAG", 0.0)


def lists_twice_at_once(patch: pytest.MonkeyPatch) -> None:
    plan = planning.plan
    patch.setattr(keeper, "plan", lambda u, models, now: plan(replace(u, listing=False), models, now))


def forgets_why(patch: pytest.MonkeyPatch) -> None:
    move = moves.move
    for place in (moves, listings, calls, applying):
        patch.setattr(place, "move", lambda model, sign, at, reason: move(model, sign, at, None))


def looks_at_a_lost_server_late(patch: pytest.MonkeyPatch) -> None:
    failed = upstreams._upstream_failed
    patch.setattr(
        upstreams, "_upstream_failed", lambda u, fact: replace(failed(u, fact), due_at=fact.at + 100)
    )


def waits_for_a_load_that_died_with_the_power(patch: pytest.MonkeyPatch) -> None:
    waits_for_ever(patch)


# Each with what finds it, in what trouble, and how far from the first seed the world lies that shows it soon. They are
# the same worlds whatever the seed of the run is: a life that tries the other tests need not have what it takes.
PLANTED: list[tuple[Callable[[pytest.MonkeyPatch], None], str, tuple[str, ...], int]] = [
    (loads_without_a_listing, "I0", ("evicted", "restart"), 1),
    (believes_stale_listings, "I9", ("listing slow", "load fails"), 3),
    (takes_no_answer_for_a_failure, "I3", ("load cut", "load unanswered"), 5),
    (pings_what_is_absent, "I4", ("evicted",), 0),
    (unloads_what_is_not_ours, "I5", ("another loads it", "window", "restart"), 11),
    (never_backs_off, "I10", ("load fails", "load refused"), 7),
    (forgets_its_load_in_a_restart, "I3", ("killed while loading",), 7),
    (takes_a_closed_port_for_the_end_of_a_load, "I3", ("evicted", "port closed"), 7),
    (unloads_what_is_in_use, "I5", ("answer stalls", "window", "by hand"), 6),
    (displaces_what_is_not_ours, "I5", ("another loads by request", "evicted", "upgraded or downgraded"), 2),
    (waits_for_ever, "I15", ("load cut", "load fails", "load garbled"), 6),
    (forgets_the_lag_of_the_listing, "I3", ("listing lags", "load cut"), 4),
    (lists_twice_at_once, "I10", ("listing slow", "stalled"), 0),
    (forgets_why, "I8", ("unreachable", "load fails"), 0),
    (looks_at_a_lost_server_late, "I17", ("away for long",), 0),
    (looks_at_a_lost_server_late, "I17", ("vanishes",), 2),
    (looks_at_a_lost_server_late, "I17", ("401 for a moment",), 6),
    (looks_at_a_lost_server_late, "I17", ("says that it loads",), 3),
    (waits_for_a_load_that_died_with_the_power, "I17", ("power cut while loading",), 8),
]


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("plant", "invariant", "kinds", "first"), PLANTED, ids=[p[0].__name__ for p in PLANTED]
)
def test_a_planted_bug_is_found(
    plant: Callable[[pytest.MonkeyPatch], None],
    invariant: str,
    kinds: tuple[str, ...],
    first: int,
    monkeypatch: pytest.MonkeyPatch,
):
    plant(monkeypatch)
    changes: dict[str, Any] = {"kinds": kinds, "pace": 60.0}
    if plant is forgets_its_load_in_a_restart:
        changes["remembers"] = False
    # What never ends is seen at the end, for which everybody is given an hour.
    hours = 0.3 if invariant == "I15" else 0.5
    found = None
    for seed in range(FIRST + first, FIRST + first + 40):
        try:
            live(seed, hours, **changes)
        except Broken as broken:
            if f"{invariant} at " in str(broken) or f"{invariant}: " in str(broken):
                found = str(broken).split("\n")[0]
                break
    print(found)

    assert found is not None


def test_a_world_without_faults_is_warm_within_minutes_and_stays_so():
    async def go() -> World:
        world = small("v1")
        world.start()
        await asyncio.sleep(40.0)
        assert world.life is not None
        for _ in range(100):
            assert [m.state for m in world.life.keeper.snapshot().models] == [State.WARM, State.WARM]
            await asyncio.sleep(HOUR / 100)
        await world.kill()
        return world

    world = run_virtually(go)

    assert world.judge.broken == []
    assert {key: len(times) for key, times in world.judge.loads_sent.items()} == {
        ("alpha", "acme/a"): 1,
        ("alpha", "acme/b"): 1,
    }
    assert all(11 <= len(times) <= 13 for times in world.judge.pings_sent.values())


def test_a_world_in_which_nothing_can_happen_is_told_with_all_stacks():
    async def go() -> None:
        await asyncio.get_running_loop().create_future()

    with pytest.raises(Broken, match="deadlock"):
        run_virtually(go)
