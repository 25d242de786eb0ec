"""More models than memory: the real keeper with its real client before a simulated LM Studio that is too small."""

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from keepalive.core.errors import NotWarm
from keepalive.core.explain import explain
from keepalive.core.facts import (
    ModelId,
    ReleaseAsked,
    RequestEnded,
    RequestStarted,
    WarmAsked,
    WindowClosed,
    WindowOpened,
)
from keepalive.core.records import Policy
from keepalive.core.states import State
from keepalive.keeper.given import Keep
from keepalive.simulator.models import SimModel
from keepalive.simulator.studio import Studio
from tests.kit.world import Judge, Site, World, virtually

GB = 10**9
PATIENCE = 120.0
POLICY = Policy(load_timeout=900.0, auto=True, patience=PATIENCE)


@dataclass
class Caller:
    """What one request came to."""

    model: str
    came: float
    served: float | None = None
    refused: str | None = None
    cut: bool = False


@dataclass
class People:
    """Requests for models of one site, each held by the keeper until its model is warm."""

    world: World
    callers: list[Caller] = field(default_factory=list)
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    def ask(self, key: str, seconds: float = 5.0) -> Caller:
        caller = Caller(key, self.world.judge.now())
        self.callers.append(caller)
        self.tasks.append(asyncio.ensure_future(self._ask(caller, seconds)))
        return caller

    async def _ask(self, caller: Caller, seconds: float) -> None:
        world, site = self.world, self.world.sites[0]
        assert world.life is not None
        keeper, model = world.life.keeper, ModelId(site.name, caller.model)
        try:
            await keeper.waiting.ensure_warm([model])
        except NotWarm as error:
            caller.refused = str(error)
            return
        caller.served = world.judge.now()
        there = [i for i in site.studio.memory.instances.values() if i.model.key == caller.model]
        caller.cut = not there
        keeper.record(RequestStarted(world.life.clock(), model))
        world.judge.in_use[model] += 1
        if there:
            site.studio.memory.grow(there[0])
        try:
            await asyncio.sleep(seconds)
            caller.cut = caller.cut or site.studio.memory.instances.get(there[0].id) is not there[0]
        finally:
            world.judge.in_use[model] -= 1
            keeper.record(RequestEnded(world.life.clock(), model, answered=not caller.cut))

    async def all_served(self) -> None:
        await asyncio.gather(*self.tasks)


def a_site(
    judge: Judge, *models: SimModel, memory: float | None = None, really: float | None = None, **faults: Any
) -> Site:
    """A server whose config says `memory` GB, and whose guardrails begin at `really`."""
    if really is not None:
        faults["memory_bytes"] = int(really * GB)
    studio = Studio(models, tier=faults.pop("tier", "v1"), faults=faults)
    budget = None if memory is None else int(memory * GB)
    return Site("local", studio, judge, list(models), refresh=15.0, memory=budget)


def a_world(site: Site, policies: dict[str, Policy] | None = None, **changes: Any) -> World:
    """Models take what their size is, exactly."""

    def policy(model: SimModel) -> Policy:
        known = (policies or {}).get(model.key, POLICY)
        return known if known.memory is not None else replace(known, memory=model.size_bytes)

    keeps = [Keep(ModelId(site.name, m.key), policy(m), kind=m.kind) for m in site.models]
    return World(0, [site], keeps, site.judge, random.Random(0), **{"tick": 1.0, **changes})


def sim(key: str, gigabytes: float, seconds: float = 10.0) -> SimModel:
    return SimModel(key, size_bytes=int(gigabytes * GB), load_seconds=seconds)


def loaded(site: Site) -> list[str]:
    return sorted(i.model.key for i in site.studio.memory.instances.values())


def events(site: Site, *kinds: str) -> list[tuple[str, str]]:
    return [(e["kind"], e["model"]) for e in site.studio.log() if e["kind"] in kinds]


def state(world: World, key: str) -> State:
    assert world.life is not None
    known = world.life.keeper.model(ModelId("local", key))
    assert known is not None
    return known.state


def why(world: World, key: str) -> str | None:
    assert world.life is not None
    snapshot = world.life.keeper.snapshot()
    models = snapshot.of("local")
    model = next(m for m in models if m.id.key == key)
    return explain(snapshot.upstreams[0], models, model, snapshot.now)


# --- loaded when asked for, and let go for others -------------------------------------------------


def test_nothing_is_loaded_before_somebody_asks_and_then_what_he_asks_for():
    async def go(judge: Judge) -> tuple[list[str], list[str]]:
        site = a_site(judge, sim("a", 9), sim("b", 9), memory=10)
        world = a_world(site)
        world.start()
        await asyncio.sleep(600)
        before = loaded(site)
        people = People(world)
        people.ask("b")
        await people.all_served()
        await world.kill()
        return before, loaded(site)

    assert virtually(go) == ([], ["b"])


def test_the_least_recently_used_makes_room_and_no_more_goes_than_has_to():
    async def go(judge: Judge) -> tuple[list[str], Site]:
        site = a_site(judge, sim("a", 9), sim("b", 9), sim("c", 9), sim("d", 9), memory=30)
        world = a_world(site)
        world.start()
        people = People(world)
        for key in "abcad":
            people.ask(key)
            await people.all_served()
            await asyncio.sleep(10)
        await world.kill()
        return loaded(site), site

    there, site = virtually(go)

    assert there == ["a", "c", "d"]
    assert events(site, "unloaded") == [("unloaded", "b")]


def test_an_answer_is_never_cut_off_and_its_model_goes_once_it_has_ended():
    async def go(judge: Judge) -> tuple[Caller, Caller, str | None]:
        site = a_site(judge, sim("a", 9), sim("b", 9), memory=10)
        world = a_world(site)
        world.start()
        people = People(world)
        long = people.ask("a", seconds=1000.0)
        await asyncio.sleep(60)
        other = people.ask("b")
        await asyncio.sleep(60)
        said = why(world, "b")
        await people.all_served()
        await world.kill()
        return long, other, said

    long, other, said = virtually(go)

    assert not long.cut
    assert other.served is not None
    assert 1000 < other.served < 1030
    assert said == (
        "waits for room: it takes 9.0 GB, and 1.0 GB are free; a is in use; it makes room when its answers have ended"
    )


def test_a_model_that_is_never_idle_is_drained_and_both_are_served_in_batches():
    async def go(judge: Judge) -> tuple[list[Caller], Site]:
        site = a_site(judge, sim("a", 9), sim("b", 9), memory=10)
        world = a_world(site)
        world.start()
        people = People(world)
        for _ in range(400):
            people.ask("a", seconds=8.0)
            people.ask("b", seconds=8.0)
            await asyncio.sleep(5)
        await people.all_served()
        await world.kill()
        return people.callers, site

    callers, site = virtually(go)

    assert not [c for c in callers if c.cut or c.refused or c.served is None]
    assert max(c.served - c.came for c in callers if c.served is not None) < 2 * PATIENCE + 60
    # 2000 s; each stays for as long as the patience of the others lasts.
    assert 10 <= len(events(site, "load.started")) <= 24


def test_a_stranger_in_the_way_is_said_at_once_and_left_alone():
    async def go(judge: Judge) -> tuple[Caller, list[str]]:
        site = a_site(judge, sim("a", 9), sim("x", 9), memory=10)
        world = a_world(site)
        world.keeps.pop()
        site.studio.load("x", seconds=1.0)
        world.start()
        await asyncio.sleep(30)
        people = People(world)
        caller = people.ask("a")
        await people.all_served()
        await world.kill()
        return caller, loaded(site)

    caller, there = virtually(go)

    # Of what nobody keeps only its file's size is known.
    assert caller.refused == (
        "a cannot be had: there is no room for it: it takes 9.0 GB, and 0.0 GB are free; x was loaded by somebody else"
    )
    assert there == ["x"]


def test_who_waits_when_a_stranger_takes_the_room_for_good_is_told_and_does_not_wait_to_the_end():
    async def go(judge: Judge) -> list[Caller]:
        site = a_site(judge, sim("a", 9), sim("b", 14), sim("stranger", 8), memory=20)
        world = a_world(site)
        world.keeps = world.keeps[:2]
        world.start()
        people = People(world)
        people.ask("a", 600.0)
        await asyncio.sleep(40)
        held = people.ask("b")
        await asyncio.sleep(20)
        assert held.refused is None
        site.studio.load("stranger", seconds=0)
        await asyncio.sleep(20)
        await world.kill()
        for task in people.tasks:
            task.cancel()
        await asyncio.gather(*people.tasks, return_exceptions=True)
        return people.callers

    held = virtually(go)[-1]

    assert held.refused is not None
    assert "stranger was loaded by somebody else" in held.refused


def test_without_a_budget_one_is_there_at_a_time_and_always_stays():
    async def go(judge: Judge) -> tuple[list[str], Site]:
        site = a_site(judge, sim("k", 9), sim("a", 1), sim("b", 1))
        world = a_world(site, {"k": replace(POLICY, auto=False)})
        world.start()
        people = People(world)
        for key in "abab":
            people.ask(key)
            await people.all_served()
            await asyncio.sleep(10)
        await world.kill()
        return loaded(site), site

    there, site = virtually(go)

    assert there == ["b", "k"]
    assert events(site, "unloaded") == [("unloaded", "a"), ("unloaded", "b"), ("unloaded", "a")]


@pytest.mark.parametrize(
    ("memory", "takes"),
    [
        pytest.param(30, 9, id="another program has taken a third of it"),
        pytest.param(20, 6, id="models take half as much again as is thought"),
        pytest.param(None, 9, id="LM Studio alone knows"),
    ],
)
def test_guardrails_that_begin_below_the_budget_are_learned_and_not_hammered(
    memory: float | None, takes: int
):
    async def go(judge: Judge) -> tuple[list[Caller], Site]:
        models = [sim("a", 9), sim("b", 9), sim("c", 9)]
        site = a_site(judge, *models, memory=memory or 1000, really=20)
        policy = replace(POLICY, memory=takes * GB)
        world = a_world(site, {m.key: policy for m in models})
        world.start()
        people = People(world)
        for key in "abc":
            people.ask(key)
            await people.all_served()
            await asyncio.sleep(10)
        await world.kill()
        return people.callers, site

    callers, site = virtually(go)

    assert [c.refused for c in callers] == [None] * 3
    assert callers[-1].served is not None
    assert callers[-1].served - callers[-1].came < 30
    assert events(site, "load.failed") == [("load.failed", "c")]
    assert loaded(site) == ["b", "c"]


def test_a_model_that_lm_studio_drops_again_and_again_is_no_loop_of_loads():
    async def go(judge: Judge) -> Site:
        site = a_site(judge, sim("a", 9, 2.0), memory=10)
        world = a_world(site)
        world.start()
        people = People(world)
        people.ask("a")
        for _ in range(600):
            await asyncio.sleep(1)
            for instance in list(site.studio.memory.instances.values()):
                site.studio.memory.crash(instance, stays_listed=False)
            if not people.tasks[-1].done():
                continue
            people.ask("a")
        await world.kill()
        for task in people.tasks:
            task.cancel()
        await asyncio.gather(*people.tasks, return_exceptions=True)
        return site

    assert len(events(virtually(go), "load.started")) <= 12


def test_of_two_upstreams_one_loads_what_is_asked_for_and_the_other_where_that_one_is_gone():
    async def go(judge: Judge) -> list[list[str]]:
        sites = [replace(a_site(judge, sim("a", 9), memory=10), name=name) for name in ("near", "far")]
        keeps = [Keep(ModelId(site.name, "a"), replace(POLICY, memory=9 * GB)) for site in sites]
        world = World(0, sites, keeps, judge, random.Random(0), tick=1.0)
        life = world.start()
        await asyncio.sleep(20)
        both = [keep.model for keep in keeps]
        first = await life.keeper.waiting.ensure_warm(both)
        await asyncio.sleep(60)
        seen = [[first.upstream], *(loaded(site) for site in sites)]
        sites[0].studio.restart(3000.0)
        await asyncio.sleep(30)
        seen.append([(await life.keeper.waiting.ensure_warm(both)).upstream])
        sites[0].studio.restart(0.0)
        await asyncio.sleep(30)
        sites[1].studio.restart(3000.0)
        await asyncio.sleep(5)
        # Who waits where it then goes away does not wait there.
        waits = asyncio.ensure_future(life.keeper.waiting.ensure_warm(both))
        await asyncio.sleep(2)
        sites[0].studio.restart(3000.0)
        sites[1].studio.restart(10.0)
        seen.append([(await waits).upstream])
        await world.kill()
        return seen

    assert virtually(go) == [["near"], ["a"], [], ["far"], ["far"]]


# --- idle, windows, hands -------------------------------------------------------------------------


def test_what_lies_idle_goes_after_its_time_and_is_not_loaded_again_for_nobody():
    async def go(judge: Judge) -> tuple[list[list[str]], Site]:
        site = a_site(judge, sim("a", 9), memory=10)
        world = a_world(site, {"a": replace(POLICY, idle=600.0)})
        world.start()
        people, seen = People(world), []
        people.ask("a")
        await people.all_served()
        for _ in range(3):
            await asyncio.sleep(400)
            seen.append(loaded(site))
        await asyncio.sleep(7200)
        await world.kill()
        return seen, site

    seen, site = virtually(go)

    assert seen == [["a"], [], []]
    assert len(events(site, "load.started")) == 1


def test_at_the_start_of_its_window_it_is_loaded_ahead_and_let_go_at_its_end():
    async def go(judge: Judge) -> list[list[str]]:
        site = a_site(judge, sim("a", 9), memory=10)
        world = a_world(site)
        world.keeps = [replace(k, windowed=True, window_open=False) for k in world.keeps]
        world.start()
        await asyncio.sleep(100)
        seen = [loaded(site)]
        for fact in (WindowOpened, WindowClosed):
            world.record(fact, ModelId("local", "a"))
            await asyncio.sleep(200)
            seen.append(loaded(site))
        await world.kill()
        return seen

    assert virtually(go) == [[], ["a"], []]


def test_asked_for_by_hand_it_comes_and_then_is_let_go_like_any_other():
    async def go(judge: Judge) -> list[list[str]]:
        site = a_site(judge, sim("a", 9), sim("b", 9), memory=10)
        world = a_world(site)
        world.start()
        seen = []
        for fact, key in ((WarmAsked, "a"), (WarmAsked, "b"), (WarmAsked, "b"), (ReleaseAsked, "b")):
            world.record(fact, ModelId("local", key))
            await asyncio.sleep(100)
            seen.append(loaded(site))
        await world.kill()
        return seen

    assert virtually(go) == [["a"], ["b"], ["b"], []]


def test_a_hole_is_filled_with_what_was_asked_for_of_late():
    async def go(judge: Judge) -> tuple[list[str], Site]:
        site = a_site(judge, sim("a", 9), sim("b", 9), sim("big", 20), sim("c", 5), memory=20)
        world = a_world(site)
        world.start()
        people = People(world)
        for key in ("a", "a", "b", "big", "c"):
            people.ask(key)
            await people.all_served()
            await asyncio.sleep(10)
        await asyncio.sleep(60)
        await world.kill()
        return loaded(site), site

    there, _ = virtually(go)

    assert there == ["a", "c"]


@pytest.mark.parametrize("sees", [True, False], ids=["by the socket", "by HTTP"])
def test_who_comes_during_a_load_ahead_does_not_wait_for_its_end_where_that_can_be_given_up(sees: bool):
    async def go(judge: Judge) -> tuple[list[Caller], Site]:
        site = replace(a_site(judge, sim("a", 9, 100.0), sim("big", 20), sim("c", 5), memory=20), sdk=sees)
        world = a_world(site)
        world.start()
        people = People(world)
        for key in ("a", "big"):
            people.ask(key)
            await people.all_served()
            await asyncio.sleep(10)
        world.record(ReleaseAsked, ModelId("local", "big"))
        await until(lambda: [load.model.key for load in site.studio.memory.loads.values()] == ["a"])
        await asyncio.sleep(20)
        people.ask("c")
        await people.all_served()
        await asyncio.sleep(150)
        await world.kill()
        return people.callers, site

    callers, site = virtually(go)

    last = callers[-1]
    assert last.served is not None
    assert (last.served - last.came < 15) is sees
    assert len(events(site, "load.cancelled")) == sees
    # It is loaded after him.
    assert loaded(site) == ["a", "c"]


async def until(true: Callable[[], bool]) -> None:
    while not true():
        await asyncio.sleep(1)


# --- memory that is not what anybody thinks --------------------------------------------------------


@pytest.mark.parametrize(
    ("memory", "low"),
    [(20, 1.33), (None, 0.67)],
    ids=["estimates are too high", "and too low, and nothing else tells"],
)
def test_memory_that_is_not_what_it_seems_makes_no_loop_of_loads_and_nobody_waits_for_ever(
    memory: float | None, low: float
):
    """In pieces, taken by models that grow, and gone when a load has ended well: always so for m3."""
    chance = random.Random(7)
    dropped = [{"value": 0.0, "model": "m3"}, {"value": 0.0, "chance": 0.2}, {"value": 20.0, "chance": 0.2}]
    faults = {"fragmentation": 0.1, "growth_bytes": 300_000_000, "drops_after_seconds": dropped}

    async def go(judge: Judge) -> tuple[list[Caller], Site]:
        models = [sim(f"m{n}", size, 10.0) for n, size in enumerate([9, 7, 6, 4])]
        site = a_site(judge, *models, memory=memory, really=20, estimate_factor=low, **faults)
        world = a_world(replace(site, sdk=True))
        world.keeps = [replace(k, policy=POLICY) for k in world.keeps]
        world.start().clients[0].expect({m.key: {} for m in models})
        people = People(world)
        for _ in range(60):
            await asyncio.sleep(chance.expovariate(1 / 10))
            people.ask(f"m{min(int(chance.expovariate(0.6)), 3)}", chance.expovariate(1 / 8))
        async with asyncio.timeout(1800):
            await people.all_served()
        await world.kill()
        return people.callers, site

    callers, site = virtually(go)

    # Each is told one thing or the other, and in time.
    assert all((c.served is None) is (c.refused is not None) for c in callers)
    assert len([c for c in callers if c.served is not None]) >= 20
    assert len(events(site, "load.started")) <= 40
    assert len(events(site, "crashed")) >= 3
    assert events(site, "load.started").count(("load.started", "m3")) <= 8


# --- whatever comes -------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(2))
def test_whoever_comes_when_all_are_served_nobody_is_cut_off_and_no_load_serves_nobody(seed: int):
    chance = random.Random(seed)
    sizes = [chance.choice([2, 4, 7, 9, 14]) for _ in range(6)]
    rate = chance.choice([3.0, 15.0, 60.0])

    async def go(judge: Judge) -> tuple[list[Caller], Site, list[Any]]:
        models = [sim(f"m{n}", size, chance.choice([3.0, 20.0, 45.0])) for n, size in enumerate(sizes)]
        memory = chance.choice([16, 20, 28])
        site = a_site(judge, *models, memory=memory, really=memory)
        world = a_world(site)
        world.start()
        people = People(world)
        end = judge.now() + 1200
        while judge.now() < end:
            await asyncio.sleep(chance.expovariate(1 / rate))
            favourite = chance.random() < 0.4
            people.ask("m0" if favourite else f"m{chance.randrange(6)}", chance.expovariate(1 / 12))
        async with asyncio.timeout(7200):
            await people.all_served()
        await world.kill()
        assert world.life is not None
        return people.callers, site, [f for f, _ in world.life.facts]

    callers, site, facts = virtually(go)

    assert not [c for c in callers if c.cut or c.refused]
    waited = sorted(c.served - c.came for c in callers if c.served is not None)
    assert len(waited) == len(callers)
    # Six models, each of which may have to wait for all others: their patience, their loads, their answers.
    assert waited[-1] < 6 * (PATIENCE + 45 + 80)
    ahead = {f.model.key: 0 for f in facts if type(f).__name__ == "LoadStarted"}
    began: Counter[str] = Counter()
    for fact in facts:
        match type(fact).__name__:
            case "LoadStarted":
                assert began[fact.model.key] == 0 or ahead[fact.model.key] or fact.ahead, "it served nobody"
                began[fact.model.key], ahead[fact.model.key] = 1, fact.ahead
            case "RequestStarted" | "RequestsCounted":
                began[fact.model.key] = 0
    assert events(site, "load.failed") == []
