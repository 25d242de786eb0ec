"""The shell: what is planned is done, by the real client in front of real simulated servers, on a virtual clock.

What LM Studio saw is what counts: its own journal is asked.
"""

import asyncio
import random
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest

from keepalive.core import apply as applying
from keepalive.core import calls, listings
from keepalive.core import plan as planning
from keepalive.core.actions import Unload
from keepalive.core.errors import Reason
from keepalive.core.explain import explain
from keepalive.core.facts import (
    Fact,
    ListingFailed,
    LoadEnded,
    LoadOutcome,
    ModelId,
    PingEnded,
    PingOutcome,
    PingStarted,
    ReleaseAsked,
    RequestEnded,
    RequestStarted,
    Trouble,
    UnloadStarted,
    WarmAsked,
    WindowClosed,
)
from keepalive.core.records import Model, Policy, Upstream, UpstreamState
from keepalive.core.states import IllegalMove, State
from keepalive.keeper.keeper import Keep, Keeper, Server
from keepalive.lmstudio.client import Client
from keepalive.simulator.models import SimModel
from keepalive.simulator.studio import Studio
from tests.kit.world import Broken, InProcess, Judge, Site, World, run_virtually

POLICY = Policy(refresh_interval=15.0, ping_interval=300.0, ping_timeout=60.0, load_timeout=900.0)


def a_site(judge: Judge, name: str = "local", *models: SimModel, tier: str = "v1", **faults: Any) -> Site:
    kept = list(models) or [SimModel("a", load_seconds=12.0), SimModel("b", load_seconds=3.0)]
    studio = Studio(kept, tier=tier, faults=faults)  # type: ignore[arg-type]
    return Site(name, studio, judge, kept, refresh=15.0)


def a_world(*sites: Site, **changes: Any) -> World:
    keeps = [Keep(ModelId(s.name, m.key), POLICY) for s in sites for m in s.models]
    chance = random.Random(0)
    return World(0, list(sites), keeps, sites[0].judge, chance, **{"tick": 1.0, **changes})


def virtually(make: Callable[[Judge], Coroutine[Any, Any, Any]]) -> Any:
    """Run a scenario; afterwards no invariant may have been broken on the way."""

    async def go() -> Any:
        judge = Judge(asyncio.get_running_loop().time)
        result = await make(judge)
        if judge.broken:
            raise Broken("; ".join(judge.broken))
        return result

    return run_virtually(go)


def events(site: Site, *kinds: str) -> list[tuple[str, str]]:
    return [(e["kind"], e["instance_id"]) for e in site.studio.log() if e["kind"] in kinds]


def states(world: World) -> dict[str, State]:
    assert world.life is not None
    return {m.id.key: m.state for m in world.life.keeper.snapshot().models}


def model(world: World, key: str) -> Model:
    assert world.life is not None
    return next(m for m in world.life.keeper.snapshot().models if m.id.key == key)


async def warm(world: World, seconds: float = 60.0) -> None:
    end = asyncio.get_running_loop().time() + seconds
    while set(states(world).values()) != {State.WARM}:
        assert asyncio.get_running_loop().time() < end, world.story()
        await asyncio.sleep(1.0)


# --- the promises ---------------------------------------------------------------------------------------


def test_cold_models_are_loaded_once_each_one_after_the_other_and_proved():
    async def go(judge: Judge) -> Site:
        world = a_world(a_site(judge))
        world.start()
        await warm(world)
        await asyncio.sleep(600)
        await world.kill()
        return world.sites[0]

    site = virtually(go)

    assert events(site, "load.started", "load.ended") == [
        ("load.started", "a"),
        ("load.ended", "a"),
        ("load.started", "b"),
        ("load.ended", "b"),
    ]


def test_ten_thousand_wishes_at_once_are_one_load():
    async def go(judge: Judge) -> Site:
        world = a_world(a_site(judge, "local", SimModel("a", load_seconds=30.0)))
        world.start()
        for n in range(2000):
            world.record(WarmAsked, ModelId("local", "a"))
            world.life.keeper.tick()
            if n % 50 == 0:
                await asyncio.sleep(0.5)
        await warm(world)
        await world.kill()
        return world.sites[0]

    assert events(virtually(go), "load.started") == [("load.started", "a")]


def test_an_evicted_model_comes_back_and_is_never_pinged_while_away():
    async def go(judge: Judge) -> Site:
        world = a_world(a_site(judge))
        world.start()
        await warm(world)
        for _ in range(3):
            world.sites[0].studio.evict("a")
            await warm_again(world)
        await world.kill()
        return world.sites[0]

    site = virtually(go)

    assert len(events(site, "load.started")) == 5
    assert [e for e in site.studio.log() if e["kind"] == "load.started" and e["owner"] != "rest"] == []


async def warm_again(world: World) -> None:
    await asyncio.sleep(20.0)
    await warm(world, 120.0)


def test_what_somebody_else_loaded_is_taken_and_left_alone_when_released():
    async def go(judge: Judge) -> Site:
        site = a_site(judge)
        site.studio.load("a", seconds=0)
        world = a_world(site)
        world.start()
        await warm(world)
        for key in "ab":
            world.record(WindowClosed, ModelId("local", key))
        await asyncio.sleep(300)
        await world.kill()
        return site

    site = virtually(go)

    assert events(site, "load.started", "unloaded") == [
        ("load.started", "a"),
        ("load.started", "b"),
        ("unloaded", "b"),
    ]


def test_a_model_that_somebody_else_is_bringing_back_is_not_loaded_beside_that():
    async def go(judge: Judge) -> Site:
        site = a_site(judge, "local", SimModel("a", load_seconds=60.0))
        world = a_world(site)
        world.start()
        await warm(world, 100)
        site.studio.evict("a")
        site.studio.load("a")
        await asyncio.sleep(100)
        await warm(world)
        await world.kill()
        return site

    assert events(virtually(go), "load.started") == [("load.started", "a"), ("load.started", "a")]


def test_a_model_in_use_is_unloaded_only_once_its_users_have_left():
    async def go(judge: Judge) -> tuple[list[Any], Site]:
        site = a_site(judge, "local", SimModel("a", load_seconds=1.0))
        world = a_world(site)
        world.start()
        await warm(world)
        world.record(RequestStarted, ModelId("local", "a"))
        world.record(ReleaseAsked, ModelId("local", "a"))
        await asyncio.sleep(300)
        still = events(site, "unloaded")
        world.record(lambda at, m: RequestEnded(at, m, True), ModelId("local", "a"))
        await asyncio.sleep(100)
        await world.kill()
        return still, site

    still, site = virtually(go)

    assert still == []
    assert events(site, "unloaded") == [("unloaded", "a")]


def test_a_busy_model_is_not_a_dead_one():
    """For an hour each answer takes longer than any ping waits: not one load, and warm all the time."""

    async def go(judge: Judge) -> tuple[set[State], Site]:
        site = a_site(judge, "local", SimModel("a", load_seconds=1.0))
        world = a_world(site)
        world.start()
        await warm(world)
        site.studio.set_faults(prompt_seconds=200.0)
        seen = set()
        for _ in range(360):
            await asyncio.sleep(10)
            seen.add(states(world)["a"])
        assert model(world, "a").busy
        await world.kill()
        return seen, site

    seen, site = virtually(go)

    assert seen == {State.WARM}
    assert events(site, "load.started") == [("load.started", "a")]


def test_a_server_that_is_too_busy_to_list_keeps_its_warm_models():
    async def go(judge: Judge) -> tuple[set[State], Site]:
        site = a_site(judge, "local", SimModel("a", load_seconds=1.0))
        world = a_world(site)
        world.start()
        await warm(world)
        site.studio.set_faults(list_reply="hang")
        seen = set()
        for _ in range(28):
            await asyncio.sleep(10)
            seen.add(states(world)["a"])
        site.studio.set_faults(list_reply=None)
        await asyncio.sleep(60)
        await world.kill()
        return seen, site

    seen, site = virtually(go)

    assert seen == {State.WARM}
    assert events(site, "load.started") == [("load.started", "a")]


def test_a_load_that_is_not_answered_is_not_sent_again():
    async def go(judge: Judge) -> Site:
        site = a_site(judge, "local", SimModel("a", load_seconds=200.0), v0_shows_loading=False)
        site.studio.set_faults(load_reply={"value": "fin", "times": 1}, load_reply_after_seconds=1.0)
        world = a_world(site)
        world.start()
        await warm(world, 400)
        await world.kill()
        return site

    assert events(virtually(go), "load.started") == [("load.started", "a")]


@pytest.mark.parametrize("how", ["error_500", "error_200", "html_500", "empty_body", "truncated_json"])
def test_an_answer_that_does_not_say_that_the_load_is_over_does_not_end_it(how: str):
    async def go(judge: Judge) -> Site:
        site = a_site(judge, "local", SimModel("a", load_seconds=100.0), v0_shows_loading=False)
        site.studio.set_faults(load_reply={"value": how, "times": 1}, load_reply_after_seconds=1.0)
        world = a_world(site)
        world.start()
        await warm(world, 400)
        await world.kill()
        return site

    assert events(virtually(go), "load.started") == [("load.started", "a")]


def test_a_restart_of_lm_studio_is_mended_in_the_order_of_the_config():
    async def go(judge: Judge) -> tuple[list[str], Site]:
        site = a_site(judge)
        world = a_world(site)
        world.start()
        await warm(world)
        site.studio.restart(120.0)
        await asyncio.sleep(30)
        said = [f"{m.state}: {m.reason}" for m in world.life.keeper.snapshot().models]
        await asyncio.sleep(120)
        await warm(world, 120)
        await world.kill()
        return said, site

    said, site = virtually(go)

    assert said == ["unknown: nothing listens at http://local:1234"] * 2
    assert [i for _, i in events(site, "load.started")] == ["a", "b", "a", "b"]


def test_a_refusal_for_want_of_memory_is_said_and_not_hammered():
    async def go(judge: Judge) -> tuple[Model, Site]:
        site = a_site(judge, "local", SimModel("a", load_seconds=1.0), load_result="guardrail")
        world = a_world(site)
        world.start()
        await asyncio.sleep(1500)
        result = model(world, "a")
        await world.kill()
        return result, site

    refused, site = virtually(go)

    assert refused.state is State.BACKOFF
    assert "insufficient system resources" in (refused.reason or "")
    assert len(events(site, "load.started")) == 5


def test_a_wrong_token_is_said_and_asked_again_only_every_five_minutes():
    async def go(judge: Judge) -> tuple[Model, Upstream, int]:
        site = a_site(judge, auth_token="sk-lm-x:y")
        world = a_world(site)
        world.start()
        await asyncio.sleep(1000)
        snapshot = world.life.keeper.snapshot()
        asked = len([e for e in site.studio.log() if e["kind"] == "request"])
        await world.kill()
        return snapshot.models[0], snapshot.upstreams[0], asked

    kept, upstream, asked = virtually(go)

    assert (kept.state, upstream.state) == (State.UNKNOWN, UpstreamState.UNAUTHORIZED)
    assert kept.reason == (
        "http://local:1234 wants an API token: name one with api_token_env or api_token_file"
    )
    assert asked <= 2 * 4


def test_an_answer_of_another_model_is_never_taken_for_ours():
    async def go(judge: Judge) -> Model:
        site = a_site(judge, "local", SimModel("a", load_seconds=1.0), answer_model="qwen")
        world = a_world(site)
        world.start()
        await asyncio.sleep(120)
        result = model(world, "a")
        await world.kill()
        return result

    kept = virtually(go)

    assert (kept.state, kept.reason) == (State.BACKOFF, "qwen answered the ping in its place")


def test_a_key_that_is_not_there_is_said_and_does_not_stop_the_others():
    async def go(judge: Judge) -> dict[str, tuple[State, str | None]]:
        site = a_site(judge)
        world = a_world(site)
        world.keeps.append(Keep(ModelId("local", "aa"), POLICY))
        world.judge.load_timeouts[ModelId("local", "aa")] = 900
        world.start()
        await asyncio.sleep(60)
        result = {m.id.key: (m.state, m.reason) for m in world.life.keeper.snapshot().models}
        await world.kill()
        return result

    assert virtually(go) == {
        "a": (State.WARM, None),
        "b": (State.WARM, None),
        "aa": (State.COLD, "LM Studio does not list this key; listed are a"),
    }


# --- several upstreams ------------------------------------------------------------------------------------


def test_ten_models_on_three_upstreams_of_which_one_is_down_and_one_hangs():
    async def go(judge: Judge) -> tuple[Any, list[Site], float]:
        sites = [
            a_site(judge, "good", *(SimModel(k, load_seconds=5.0) for k in "abcd")),
            a_site(judge, "down", *(SimModel(k) for k in "efg")),
            a_site(judge, "hung", *(SimModel(k) for k in "hij")),
        ]
        sites[0].max_loading = 2
        sites[1].network, sites[2].network = "closed", "hangs"
        world = a_world(*sites)
        world.start()
        while not all(states(world)[k] is State.WARM for k in "abcd"):
            await asyncio.sleep(0.1)
        took = asyncio.get_running_loop().time()
        await asyncio.sleep(120)
        snapshot = world.life.keeper.snapshot()
        sites[1].network = sites[2].network = "open"
        await asyncio.sleep(120)
        await warm(world, 30)
        await world.kill()
        return snapshot, sites, took

    snapshot, sites, took = virtually(go)

    assert took < 12
    assert [i for _, i in events(sites[0], "load.started")] == ["a", "b", "c", "d"]
    assert [e["t"] for e in sites[0].studio.log() if e["kind"] == "load.started"][:3] == [0.0, 0.0, 5.0]
    assert [u.state for u in snapshot.upstreams] == [UpstreamState.UP, UpstreamState.DOWN, UpstreamState.DOWN]
    assert {m.id.key: m.reason for m in snapshot.models if m.id.upstream != "good"} == {
        **dict.fromkeys("efg", "nothing listens at http://down:1234"),
        **dict.fromkeys("hij", "no connection to http://hung:1234 within 5 s"),
    }


def test_a_model_that_waits_for_its_turn_says_for_whom():
    async def go(judge: Judge) -> str | None:
        site = a_site(judge, "local", SimModel("a", load_seconds=60.0), SimModel("b"))
        world = a_world(site)
        world.start()
        await asyncio.sleep(30)
        snapshot = world.life.keeper.snapshot()
        said = explain(snapshot.upstreams[0], snapshot.models, snapshot.models[1])
        await world.kill()
        return said

    assert virtually(go) == "waits for its turn: a is loading"


# --- LM Studio 0.3.x and other servers ---------------------------------------------------------------------


def test_on_an_old_server_the_first_listed_model_wins_and_the_other_says_why():
    async def go(judge: Judge) -> tuple[list[str | None], Site]:
        site = a_site(judge, tier="v0")
        world = a_world(site)
        world.start()
        await asyncio.sleep(3600)
        snapshot = world.life.keeper.snapshot()
        said = [explain(snapshot.upstreams[0], snapshot.models, m) for m in snapshot.models]
        assert snapshot.models[0].state is State.WARM
        await world.kill()
        return said, site

    said, site = virtually(go)

    assert said == [None, "LM Studio 0.3.x keeps one model at a time here, and a comes first in the config"]
    assert len(events(site, "load.started")) == 3
    assert [i.ttl_seconds for i in site.studio.memory.instances.values()] == [86400.0]


def test_a_server_without_residency_is_kept_warm_by_pings_alone():
    async def go(judge: Judge) -> tuple[Site, set[State]]:
        site = a_site(judge, "local", SimModel("a", load_seconds=5.0), tier="openai", default_ttl_seconds=400)
        world = a_world(site)
        world.start()
        await warm(world)
        seen = set()
        for _ in range(360):
            await asyncio.sleep(10)
            seen.add(states(world)["a"])
        await world.kill()
        return site, seen

    site, seen = virtually(go)

    assert seen == {State.WARM}
    assert events(site, "load.started", "expired") == [("load.started", "a")]


# --- observers ---------------------------------------------------------------------------------------------


def test_an_observer_that_raises_is_reported_and_changes_nothing():
    class Raises:
        def observe(self, fact: Fact, before: object, after: object) -> None:
            raise ValueError(type(fact).__name__)

    async def go(judge: Judge, observers: list[Any]) -> tuple[str, int]:
        world = a_world(a_site(judge), observers=observers)
        world.start()
        await asyncio.sleep(400)
        await world.kill()
        return judge.trace.hexdigest(), len(world.reported)

    plain, none = virtually(lambda judge: go(judge, []))
    watched, some = virtually(lambda judge: go(judge, [Raises()]))

    assert watched == plain
    assert none == 0
    assert some > 50


def test_an_illegal_move_of_ours_ends_the_run():
    async def go() -> None:
        keeper = Keeper(asyncio.get_running_loop().time)
        site = a_site(Judge(asyncio.get_running_loop().time))
        client = Client("local", "http://local:1234", transport=InProcess(site, 1))
        identity = ModelId("local", "a")
        keeper.configure([Server("local", client)], [Keep(identity, POLICY)])
        with pytest.raises(IllegalMove):
            keeper.record(PingStarted(1.0, identity))
        await client.close()

    run_virtually(go)


# --- configure -----------------------------------------------------------------------------------------------


class Told:
    """What changed in the records, without the listings that change nothing."""

    def __init__(self) -> None:
        self.changed: list[str] = []

    def observe(self, fact: Fact, before: Model | Upstream, after: Model | Upstream) -> None:
        if isinstance(before, Model) and isinstance(after, Model) and before.state is not after.state:
            self.changed.append(f"{after.id.key} {after.state}")


def test_a_reload_leaves_untouched_models_alone_and_lets_removed_ones_go():
    async def go(judge: Judge) -> tuple[list[str], dict[str, State], Site]:
        told = Told()
        site = a_site(judge, "local", *(SimModel(k, load_seconds=2.0) for k in "abc"))
        world = a_world(site, observers=[told])
        world.keeps = [k for k in world.keeps if k.model.key != "c"]
        world.start()
        await warm(world)
        told.changed.clear()
        keeper, server = world.life.keeper, servers(world)[0]
        keeps = [Keep(ModelId("local", key), replace(POLICY, ping_interval=600)) for key in "ca"]
        world.judge.load_timeouts[ModelId("local", "c")] = 900
        world.life.replayable = False
        unused = keeper.configure([server], keeps)
        assert unused == []
        await asyncio.sleep(120)
        result = told.changed, states(world), site
        assert [m.id.key for m in keeper.snapshot().models] == ["c", "a"]
        assert "b" not in keeper._shelves["local"].models
        await world.kill()
        return result

    changed, now, site = virtually(go)

    assert now == {"c": State.WARM, "a": State.WARM}
    assert [c for c in changed if c.startswith("a ")] == []
    assert events(site, "unloaded") == [("unloaded", "b")]


def servers(world: World) -> list[Server]:
    assert world.life is not None
    return [
        Server(site.name, client, site.refresh, site.max_loading)
        for site, client in zip(world.sites, world.life.clients, strict=True)
    ]


def test_a_removed_model_that_we_found_is_forgotten_and_left_in_memory():
    async def go(judge: Judge) -> Site:
        site = a_site(judge, "local", SimModel("a"))
        site.studio.load("a", seconds=0)
        world = a_world(site)
        world.start()
        await warm(world)
        world.life.keeper.configure(servers(world), [])
        await asyncio.sleep(200)
        assert world.life.keeper.snapshot().models == ()
        assert world.life.keeper._shelves["local"].models == {}
        await world.kill()
        return site

    assert events(virtually(go), "unloaded") == []


def test_a_reload_in_the_middle_of_a_load_does_not_begin_another():
    async def go(judge: Judge) -> tuple[list[Any], Site]:
        site = a_site(judge, "local", SimModel("a", load_seconds=60.0), v0_shows_loading=False)
        world = a_world(site)
        world.start()
        await asyncio.sleep(10)
        other = Client("local", "http://local:1234", transport=InProcess(site, 1))
        world.life.replayable = False
        unused = world.life.keeper.configure([Server("local", other)], world.keeps)
        for client in unused:
            await client.close()
        await warm(world, 1000)
        await world.kill()
        return unused, site

    unused, site = virtually(go)

    assert len(unused) == 1
    assert events(site, "load.started") == [("load.started", "a")]


def test_a_model_removed_in_the_moment_of_its_ping_ends_nothing():
    async def go(judge: Judge) -> None:
        site = a_site(judge, "local", SimModel("a", load_seconds=1.0))
        world = a_world(site)
        keeper_of = world.start().keeper

        class Removes:
            def observe(self, fact: Fact, before: object, after: object) -> None:
                if isinstance(fact, PingStarted):
                    asyncio.get_running_loop().call_soon(keeper_of.configure, servers(world), [])

        keeper_of._observers = [*keeper_of._observers, Removes()]
        await asyncio.sleep(100)
        assert world.life.failure() is None
        await world.kill()

    virtually(go)


def test_facts_about_what_is_no_longer_in_the_config_are_ignored():
    async def go() -> None:
        keeper = Keeper(asyncio.get_running_loop().time)
        keeper.configure([], [])
        keeper.record(ListingFailed(1.0, "gone", 0.5, Trouble.TIMEOUT, "x"))
        keeper.record(WarmAsked(2.0, ModelId("gone", "a")))

        assert keeper.snapshot().models == ()

    run_virtually(go)


# --- each promise, broken once: the judge sees it ----------------------------------------------------------------


def everything(judge: Judge) -> Coroutine[Any, Any, None]:
    """A scenario in which each promise is put to the test."""

    async def go() -> None:
        models = SimModel("a", load_seconds=90.0), SimModel("b", load_seconds=5.0)
        site = a_site(judge, "local", *models, v0_shows_loading=False)
        site.studio.load("b", seconds=0)
        world = a_world(site)
        world.start()
        await asyncio.sleep(120)
        site.studio.set_faults(prompt_seconds=100.0)
        await asyncio.sleep(900)
        site.studio.set_faults(
            prompt_seconds=None,
            load_reply={"value": "fin", "times": 1},
            load_reply_after_seconds=0.5,
        )
        with suppress(ValueError):
            site.studio.evict("a")
        await asyncio.sleep(120)
        world.record(ReleaseAsked, ModelId("local", "b"))
        await asyncio.sleep(300)
        if world.life is not None and world.life.failure() is not None:
            judge.fail("I0", "the daemon died")
        await world.kill()
        if len(events(site, "load.started")) > 3:
            judge.fail("P5", "loaded what was busy")

    return go()


def test_the_scenario_breaks_no_promise_as_it_is():
    virtually(everything)


def p1(patch: pytest.MonkeyPatch) -> None:
    ended = calls.load_ended

    def fail(model: Model, fact: LoadEnded) -> Model:
        unknown = fact.outcome is LoadOutcome.UNKNOWN
        return ended(model, replace(fact, outcome=LoadOutcome.FAILED) if unknown else fact)

    patch.setitem(applying.CHANGES, LoadEnded, fail)  # type: ignore[arg-type]


def p2(patch: pytest.MonkeyPatch) -> None:
    due = lambda m, now: m.needed and m.state is State.COLD and not m.calling  # noqa: E731
    started = lambda m, fact: replace(m, pinging=True)  # noqa: E731
    patch.setattr(planning, "_ping_is_due", due)
    patch.setitem(applying.CHANGES, PingStarted, started)  # type: ignore[arg-type]


def p3(patch: pytest.MonkeyPatch) -> None:
    def unloads(upstream: Upstream, models: list[Model], now: float) -> list[Any]:
        idle = [m for m in models if not m.needed and m.instances and planning._is_unloadable(m, now)]
        return [(m, Unload(m.id, m.instances[0].id)) for m in idle]

    started = lambda m, fact: replace(m, unloading=True)  # noqa: E731
    patch.setattr(planning, "_unloads", unloads)
    patch.setitem(applying.CHANGES, UnloadStarted, started)  # type: ignore[arg-type]


def p5(patch: pytest.MonkeyPatch) -> None:
    ended = calls.ping_ended

    def dead(model: Model, fact: PingEnded) -> Model:
        if fact.outcome is PingOutcome.TIMEOUT:
            fact = replace(fact, outcome=PingOutcome.ERROR, why=Reason.CRASHED)
        return ended(model, fact)

    patch.setitem(applying.CHANGES, PingEnded, dead)  # type: ignore[arg-type]


def p6(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(listings, "_resolve", lambda model, pending, at, told: None)
    patch.setattr(listings, "_present", lambda model, at, entry: model)


@pytest.mark.parametrize(
    ("breaks", "seen"), [(p1, "I3"), (p2, "I4"), (p3, "I5"), (p5, "P5")], ids=["P1", "P2", "P3", "P5"]
)
def test_a_broken_promise_is_seen(breaks: Any, seen: str, monkeypatch: pytest.MonkeyPatch):
    breaks(monkeypatch)

    with pytest.raises(Broken, match=seen):
        virtually(everything)


def test_a_daemon_that_does_not_recover_is_seen(monkeypatch: pytest.MonkeyPatch):
    p6(monkeypatch)

    async def go(judge: Judge) -> None:
        world = a_world(a_site(judge))
        world.start()
        await world.settle(600)

    with pytest.raises(Broken, match="I15"):
        virtually(go)
