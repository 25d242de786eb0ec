"""The shell: what is planned is done, by the real client in front of real simulated servers, on a virtual clock.

What LM Studio saw is what counts: its own journal is asked.
"""

import asyncio
import random
from collections.abc import Callable, Coroutine, Iterable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest

from keepalive.core import apply as applying
from keepalive.core import calls, listings
from keepalive.core import plan as planning
from keepalive.core.actions import Load, SendPing, Unload
from keepalive.core.errors import (
    Cut,
    NotWarm,
    Reason,
    Refused,
    TimedOut,
    Unauthorized,
    Unexpected,
    Unreachable,
    UpstreamError,
)
from keepalive.core.explain import explain
from keepalive.core.facts import (
    DrainEnded,
    DrainStarted,
    Entry,
    Fact,
    Instance,
    Listed,
    ListingFailed,
    ListingStarted,
    LoadEnded,
    LoadOutcome,
    LoadRemembered,
    LoadStarted,
    ModelId,
    PingEnded,
    PingOutcome,
    PingStarted,
    ReleaseAsked,
    RequestEnded,
    RequestsCounted,
    RequestStarted,
    Tier,
    Trouble,
    UnloadStarted,
    UsedElsewhere,
    WaitEnded,
    WaitStarted,
    WarmAsked,
    WindowClosed,
)
from keepalive.core.records import Cause, Eviction, Model, Pending, Policy, Upstream, UpstreamState
from keepalive.core.states import IllegalMove, State
from keepalive.keeper import errands
from keepalive.keeper.given import Keep, Server
from keepalive.keeper.keeper import Keeper
from keepalive.lmstudio import wire
from keepalive.lmstudio.client import Client
from keepalive.simulator.models import SimModel
from keepalive.simulator.studio import Studio
from tests.kit.world import Broken, InProcess, Judge, Site, World, run_virtually, virtually

POLICY = Policy(refresh_interval=15.0, ping_interval=300.0, ping_timeout=60.0, load_timeout=900.0)


def a_site(judge: Judge, name: str = "local", *models: SimModel, tier: str = "v1", **faults: Any) -> Site:
    kept = list(models) or [SimModel("a", load_seconds=12.0), SimModel("b", load_seconds=3.0)]
    studio = Studio(kept, tier=tier, faults=faults)  # type: ignore[arg-type]
    return Site(name, studio, judge, kept, refresh=15.0)


def a_world(*sites: Site, **changes: Any) -> World:
    keeps = [Keep(ModelId(s.name, m.key), POLICY) for s in sites for m in s.models]
    chance = random.Random(0)
    return World(0, list(sites), keeps, sites[0].judge, chance, **{"tick": 1.0, **changes})


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


@pytest.mark.parametrize(
    ("by", "cause"), [("somebody's request", Cause.DISPLACED), ("a hand", Cause.BY_HAND)]
)
def test_what_pushed_a_model_out_is_looked_for_where_listings_show_it(by: str, cause: Cause):
    """Somebody else's copy is gone; a load that may have taken its place is not in the plain listing."""

    async def go(judge: Judge) -> Eviction | None:
        site = a_site(judge, "local", SimModel("a", load_seconds=1.0), SimModel("other", load_seconds=60.0))
        world = a_world(site)
        world.keeps = world.keeps[:1]
        site.studio.load("a", seconds=0)
        world.start()
        await warm(world)
        # So that its last idleness is shorter than one that it has outlived.
        await asyncio.sleep(340)
        site.studio.evict("a")
        if by == "somebody's request":
            site.studio.load("other")
        await asyncio.sleep(16)
        last = model(world, "a").last_eviction
        await world.kill()
        return last

    last = virtually(go)
    assert last is not None
    assert last.cause is cause


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
        large = SimModel("a", size_bytes=20 * 10**9, load_seconds=200.0)
        site = a_site(judge, "local", large, v0_shows_loading=False)
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


def test_a_wrong_token_is_said_and_asked_again_once_a_minute():
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
    assert 2 * 16 <= asked <= 2 * 17


def test_an_hour_of_refused_connections_changes_no_model_and_ends_within_three_seconds():
    class Changes:
        def __init__(self) -> None:
            self.tries, self.models = 0, 0

        def observe(self, fact: Fact, before: Model | Upstream, after: Model | Upstream) -> None:
            if isinstance(before, Model):
                self.models += before != after
            elif isinstance(fact, ListingFailed):
                self.tries += 1

    async def go(judge: Judge) -> tuple[int, int, float]:
        site, seen, loop = a_site(judge), Changes(), asyncio.get_running_loop()
        world = a_world(site, observers=[seen])
        world.start()
        await warm(world)
        site.studio.restart(3700.0)
        await asyncio.sleep(60)
        seen.tries, seen.models = 0, 0
        await asyncio.sleep(3600)
        tries, changes = seen.tries, seen.models
        while not site.studio.memory.loads:
            await asyncio.sleep(0.1)
        began = loop.time()
        back = next(e["t"] for e in site.studio.log() if e["kind"] == "restart.up")
        await world.kill()
        return tries, changes, began - back

    tries, changes, took = virtually(go)

    assert 1500 < tries <= 1800
    assert changes == 0
    assert took <= 3.0


def test_a_model_that_is_lost_while_one_listing_is_is_missed_as_soon_as_the_next_one_comes():
    async def go(judge: Judge) -> tuple[float, float]:
        site, loop = a_site(judge), asyncio.get_running_loop()
        world = a_world(site)
        world.start()
        await warm(world)
        life = world.life
        assert life is not None
        site.studio.set_faults({"list_reply": "hang"})
        site.studio.evict("a")
        began = loop.time()
        while not life.keeper.snapshot().upstreams[0].failures:
            await asyncio.sleep(0.1)
        failed = loop.time()
        site.studio.set_faults({"list_reply": "ok"})
        while not site.studio.memory.loads:
            await asyncio.sleep(0.1)
        loaded = loop.time()
        await world.kill()
        return failed - began, loaded - failed

    lost, missed = virtually(go)

    assert 10.0 <= lost <= 26.0  # one interval, and the time that a listing may take
    assert missed <= 3.5


@pytest.mark.parametrize("tier", ["v1", "openai"])
def test_a_server_that_says_that_it_loads_is_loading_for_those_who_wait_and_warm_soon_after(tier: str):
    async def go(judge: Judge) -> tuple[State, UpstreamState, str | None, float]:
        site, loop = (
            a_site(judge, "local", SimModel("a", load_seconds=1.0), tier=tier),
            asyncio.get_running_loop(),
        )
        world = a_world(site)
        world.start()
        await warm(world)
        site.studio.set_faults({"loading_503": "always"})
        await asyncio.sleep(100)
        life = world.life
        assert life is not None
        kept, upstream = model(world, "a"), life.keeper.snapshot().upstreams[0]
        waiting = asyncio.ensure_future(life.keeper.waiting.ensure_warm([kept.id]))
        await asyncio.sleep(100)
        site.studio.set_faults({"loading_503": "no"})
        began = loop.time()
        await waiting
        took = loop.time() - began
        await world.kill()
        return kept.state, upstream.state, kept.reason, took

    state, upstream, reason, took = virtually(go)

    assert (state, upstream) == (State.LOADING, UpstreamState.UP)
    assert reason == "the server says that it is loading: Loading model"
    assert took <= 6.0


@pytest.mark.parametrize(
    ("tier", "faults"),
    [
        ("v1", {"needs_image": True}),
        ("v0", {"needs_image": True}),
        ("openai", {"needs_image": True}),
        ("v1", {"content_refused": "plain", "content_refused_status": 500}),
        ("openai", {"content_refused": "plain", "content_refused_status": 500}),
    ],
)
def test_a_model_that_takes_no_ping_is_loaded_once_and_warm_and_says_what_to_set(
    tier: str, faults: dict[str, Any]
):
    async def go(judge: Judge) -> tuple[Model, list[dict[str, Any]]]:
        site = a_site(judge, "local", SimModel("a", load_seconds=5.0), tier=tier, **faults)
        world = a_world(site)
        world.start()
        await warm(world, 120)
        await asyncio.sleep(1000)
        kept = model(world, "a")
        await world.kill()
        return kept, site.studio.log()

    kept, log = virtually(go)

    assert kept.state is State.WARM
    assert kept.reason.startswith("its ping is refused: ")
    assert kept.reason.endswith('; set ping in [[models]] "a": one that it takes, or "off"')
    assert len([e for e in log if e["kind"] == "load.started"]) <= 1


@pytest.mark.parametrize(
    ("kind", "ping", "route"),
    [
        ("reranker", None, "rerank"),
        (None, ("/v1/rerank", {"query": "ping", "documents": ["ping"]}), "rerank"),
        ("llm", ("/v1/completions", {"prompt": ".", "max_tokens": 1}), "completions"),
    ],
)
def test_a_model_is_pinged_with_what_its_kind_or_its_owner_says(
    kind: str | None, ping: tuple[str, dict[str, Any]] | None, route: str
):
    async def go(judge: Judge) -> tuple[Model, list[str]]:
        known = SimModel("a", load_seconds=5.0, kind="reranker" if route == "rerank" else "llm")
        site = a_site(judge, "local", known)
        world = a_world(site)
        world.keeps = [replace(world.keeps[0], kind=kind, ping=ping)]
        world.start()
        await warm(world)
        await asyncio.sleep(700)
        kept = model(world, "a")
        await world.kill()
        routes = [
            e["route"] for e in site.studio.log() if e["kind"] == "request" and e["route"] not in LISTED
        ]
        return kept, routes

    kept, routes = virtually(go)

    assert (kept.state, kept.last_ping.outcome, kept.reason) == (State.WARM, PingOutcome.OK, None)
    assert routes == ["load", route, route, route]


@pytest.mark.parametrize("status", [429, 504])
@pytest.mark.parametrize("tier", ["v1", "v0"])
def test_a_ping_that_something_in_front_turns_away_is_no_verdict_on_the_model(tier: str, status: int):
    async def go(judge: Judge) -> Model:
        site = a_site(judge, "local", SimModel("a", load_seconds=5.0), tier=tier)
        world = a_world(site)
        world.start()
        await warm(world, 120)
        site.studio.set_faults({"turned_away": status})
        await asyncio.sleep(1000)
        kept = model(world, "a")
        await world.kill()
        return kept

    kept = virtually(go)

    assert (kept.state, kept.last_ping.outcome) == (State.WARM, PingOutcome.TIMEOUT)
    assert kept.reason is not None


@pytest.mark.parametrize(("tier", "written"), [("v1", None), ("v0", None), ("openai", "a")])
def test_a_key_in_other_letters_is_written_as_it_is_where_that_counts(tier: str, written: str | None):
    async def go(judge: Judge) -> str | None:
        world = a_world(a_site(judge, "local", SimModel("a", load_seconds=5.0), tier=tier))
        life = world.start()
        await warm(world, 120)
        meaning = await life.keeper.meanings.meaning("A", 1.0)
        same = await life.keeper.meanings.meaning("a", 1.0)
        await world.kill()
        assert same.written(same.models[0]) is None
        return meaning.written(meaning.models[0])

    assert virtually(go) == written


def test_a_model_whose_ping_is_off_is_never_asked():
    async def go(judge: Judge) -> tuple[State, list[str]]:
        site = a_site(judge, "local", SimModel("a", load_seconds=5.0))
        world = a_world(site)
        world.keeps = [replace(world.keeps[0], policy=replace(POLICY, pinged=False))]
        world.start()
        await warm(world)
        await asyncio.sleep(700)
        state = model(world, "a").state
        await world.kill()
        routes = [
            e["route"] for e in site.studio.log() if e["kind"] == "request" and e["route"] not in LISTED
        ]
        return state, routes

    assert virtually(go) == (State.WARM, ["load"])


LISTED = ("list", "list_v0", "list_openai", "greeting")


def test_a_token_that_is_refused_for_a_moment_keeps_nothing_cold_for_longer_than_a_minute():
    async def go(judge: Judge) -> tuple[set[str], float]:
        site = a_site(judge, auth_token="sk-lm-x:y", auth_on_chat_only=True)
        world = a_world(site)
        world.start()
        await asyncio.sleep(100)
        states_then = {m.state for m in world.life.keeper.snapshot().models}
        site.studio.set_faults({"auth_token": ""})
        mended = asyncio.get_running_loop().time()
        await warm(world, 90)
        took = asyncio.get_running_loop().time() - mended
        await world.kill()
        return states_then, took

    states_then, took = virtually(go)

    assert State.BACKOFF in states_then
    assert took <= 61


def test_reading_the_config_anew_asks_at_once_what_was_refused_for_its_token_or_held_off():
    async def go(judge: Judge) -> list[bool]:
        warmed = []
        for faults in ({"unauthorized": True}, {"load_result": "guardrail"}):
            world = a_world(a_site(judge, **faults))
            life = world.start()
            await asyncio.sleep(20)
            world.sites[0].studio.set_faults(dict.fromkeys(faults))
            site = world.sites[0]
            life.keeper.configure([Server(site.name, life.clients[0], site.refresh)], world.keeps)
            await asyncio.sleep(25)
            warmed.append(set(states(world).values()) == {State.WARM})
            await world.kill()
        return warmed

    assert virtually(go) == [True, True]


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
        said = explain(snapshot.upstreams[0], snapshot.models, snapshot.models[1], 99.0)
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
        said = [explain(snapshot.upstreams[0], snapshot.models, m, 99.0) for m in snapshot.models]
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


def test_a_key_that_a_reload_writes_in_other_letters_is_the_same_model_and_its_copy_is_let_go_for_nobody():
    async def go() -> None:
        now = 0.0

        def clock() -> float:
            nonlocal now
            now += 0.001
            return now

        keeper, gib = Keeper(clock), 1 << 30
        server = Server("local", Client("local", "http://127.0.0.1:1"), memory=20 * gib)
        policy = Policy(auto=True, memory=9 * gib)
        before, after, other = (ModelId("local", key) for key in ("Foo", "foo", "bar"))

        def lists(*loaded: str) -> None:
            rows = {
                k: Entry(k, instances=(Instance(k),) if k in loaded else (), loading=False)
                for k in ("foo", "bar")
            }
            keeper.record(Listed(clock(), "local", clock() - 0.0005, Tier.V1, rows, True))

        keeper.configure([server], [Keep(before, policy)])
        lists()
        keeper.record(LoadStarted(clock(), before))
        keeper.record(LoadEnded(clock(), before, LoadOutcome.OK, elapsed=5.0, seconds=5.0, instance_id="foo"))
        lists("foo")
        keeper.configure([server], [Keep(after, policy), Keep(other, policy)])
        lists("foo")

        kept = keeper.model(after)
        assert kept is not None
        assert [m.id for m in keeper.siblings(after)] == [after, other]
        assert kept.ours == {"foo"}
        keeper.record(RequestStarted(clock(), after))
        keeper.record(WaitStarted(clock(), other))
        now += 100
        lists("foo")
        planned = planning.plan(keeper.upstream("local"), keeper.siblings(after), clock())
        assert [type(action) for action in planned if not isinstance(action, SendPing)] == [Load]
        await server.client.close()

    run_virtually(go)


def test_a_load_that_may_be_under_way_goes_on_by_the_letters_in_which_it_was_written_down():
    async def go() -> None:
        keeper = Keeper(asyncio.get_running_loop().time)
        server = Server("local", Client("local", "http://127.0.0.1:1"))
        before, after = ModelId("local", "Foo"), ModelId("local", "foo")
        keeper.configure([server], [Keep(before, Policy())])
        keeper.record(LoadRemembered(0.1, before, 0.0, None, False))
        keeper.configure([server], [Keep(after, Policy())])

        # The daemon tells the new one of it, which writes that down.
        assert {m.id: m.pending for m in keeper.snapshot().models} == {after: None}
        await server.client.close()

    run_virtually(go)


def test_what_is_kept_is_not_adopted_a_second_time_in_the_letters_of_an_earlier_life():
    async def go() -> None:
        keeper = Keeper(asyncio.get_running_loop().time)
        server = Server("local", Client("local", "http://127.0.0.1:1"))
        keeper.configure(
            [server], [Keep(ModelId("local", "foo"), Policy())], adopt=lambda m: Keep(m, Policy())
        )
        for key in ("Foo", "foo", "bar"):
            keeper.adopt(ModelId("local", key))

        assert [m.id.key for m in keeper.snapshot().models] == ["foo", "bar"]
        await server.client.close()

    run_virtually(go)


# --- what others ask of it, while nothing runs --------------------------------------------------------------------


class Still:
    """A keeper that is told what happens, and does nothing about it; all that it told its observers."""

    def __init__(self, *keys: str, upstream: str = "local", **changes: Any) -> None:
        self.now = 100.0
        self.facts: list[Fact] = []
        self.keeper = Keeper(self.clock, [self])
        self.ids = [ModelId(upstream, key) for key in keys]
        self.server = Server(upstream, Client(upstream, "http://127.0.0.1:1"))
        self.unused = self.keeper.configure([self.server], [Keep(m, POLICY, **changes) for m in self.ids])

    def clock(self) -> float:
        self.now += 0.001
        return self.now

    def observe(self, fact: Fact, before: object, after: object) -> None:
        if isinstance(before, Model):
            self.facts.append(fact)

    def listed(self, *loaded: str, keys: Iterable[str] = "ab", tier: Tier = Tier.V1) -> None:
        rows = {k: Entry(k, instances=(Instance(k),) if k in loaded else ()) for k in keys}
        self.keeper.record(Listed(self.clock(), self.server.name, self.now, tier, rows))

    def warm(self, model: ModelId) -> None:
        self.keeper.record(PingStarted(self.clock(), model))
        self.keeper.record(PingEnded(self.clock(), model, PingOutcome.OK))

    def load_fails(self, model: ModelId, outcome: LoadOutcome = LoadOutcome.FAILED) -> None:
        self.keeper.record(LoadStarted(self.clock(), model))
        self.keeper.record(LoadEnded(self.clock(), model, outcome, 1.0, message="no memory"))

    def of(self, kind: type[Fact]) -> list[Fact]:
        return [fact for fact in self.facts if isinstance(fact, kind)]


async def settled(task: asyncio.Future[Any]) -> bool:
    """Whether it is done, after all that can happen at once has happened."""
    for _ in range(10):
        await asyncio.sleep(0)
    return task.done()


def test_a_name_means_a_kept_key_in_any_case_or_a_numbered_copy_of_one():
    still = Still("Acme/Gemma", "qwen:2")

    assert still.keeper.meanings.find("acme/GEMMA") == (ModelId("local", "Acme/Gemma"),)
    assert still.keeper.meanings.find("acme/gemma:3") == (ModelId("local", "Acme/Gemma"),)
    assert still.keeper.meanings.find("qwen:2") == (ModelId("local", "qwen:2"),)
    assert still.keeper.meanings.find("qwen:2:1") == (ModelId("local", "qwen:2"),)
    assert still.keeper.meanings.find("qwen") == ()
    assert still.keeper.meanings.find("acme/gemma:q4") == ()


def test_a_name_that_several_servers_keep_means_all_of_them_in_the_order_of_the_config():
    servers = [Server(name, Client(name, "http://127.0.0.1:1")) for name in ("one", "two")]
    keeps = [Keep(ModelId("two", "a"), POLICY), Keep(ModelId("one", "A"), POLICY)]
    keeper = Keeper(Still().clock)
    keeper.configure(servers, keeps)

    assert keeper.meanings.find("a") == (ModelId("two", "a"), ModelId("one", "A"))
    assert keeper.siblings(ModelId("one", "A"))[0].id == ModelId("one", "A")
    assert keeper.siblings(ModelId("three", "a")) == ()
    assert keeper.model(ModelId("three", "a")) is None
    assert keeper.model(ModelId("one", "b")) is None


async def test_who_asks_for_a_warm_model_is_sent_to_the_least_busy_and_never_counted_as_waiting():
    still = Still("a", "b")
    still.listed("a", "b")
    for model in still.ids:
        still.warm(model)
    still.keeper.record(RequestStarted(still.clock(), still.ids[0]))
    both = await still.keeper.waiting.ensure_warm(still.ids)
    one = await still.keeper.waiting.ensure_warm(still.ids[:1])

    assert (both.key, one.key) == ("b", "a")
    assert still.of(WaitStarted) == []


def test_requests_for_a_warm_model_are_counted_and_told_of_together_by_whoever_looks_first():
    still = Still("a", "b")
    still.listed("a", "b")
    still.warm(model := still.ids[0])
    told = len(still.facts)
    for answered in (True, False, True):
        still.keeper.record(RequestStarted(still.clock(), model))
        still.keeper.record(RequestEnded(still.clock(), model, answered))
    still.keeper.record(RequestStarted(still.clock(), model))
    last = still.now - 0.001
    untold = still.facts[told:]
    glanced = still.keeper.glance(model)
    seen = still.keeper.snapshot().models[0]

    assert untold == []
    assert glanced is not None
    assert (glanced.in_flight, seen.in_flight) == (0, 1)
    assert (seen.active_at, seen.used_at) == (last, last)
    assert [(f.started, f.ended) for f in still.of(RequestsCounted)] == [(4, 3)]
    assert still.keeper.snapshot().models[0] is seen


@pytest.mark.parametrize(
    "look",
    [
        lambda keeper, model: keeper.model(model),
        lambda keeper, model: keeper.siblings(model)[0],
        lambda keeper, model: keeper.record(WaitStarted(1.0, model)) or keeper.glance(model),
        lambda keeper, model: keeper.record(ListingStarted(1.0, "local")) or keeper.glance(model),
    ],
)
def test_nobody_reads_a_record_without_the_requests_that_came_before(
    look: Callable[[Keeper, ModelId], Model],
):
    still = Still("a")
    still.listed("a", keys="a")
    still.warm(model := still.ids[0])
    still.keeper.record(RequestStarted(still.clock(), model))

    assert look(still.keeper, model).in_flight == 1


async def test_with_several_warm_models_those_that_are_counted_and_not_folded_yet_make_one_busy_too():
    still = Still("a", "b")
    still.listed("a", "b")
    for model in still.ids:
        still.warm(model)
    sent = []
    for _ in range(4):
        sent.append(await still.keeper.waiting.ensure_warm(still.ids))
        still.keeper.record(RequestStarted(still.clock(), sent[-1]))

    assert [model.key for model in sent] == ["a", "b", "a", "b"]


def test_an_answer_brings_a_model_back_at_once_that_is_not_taken_for_warm():
    still = Still("a")
    still.listed("a", keys="a")
    model = still.ids[0]
    still.keeper.record(RequestStarted(still.clock(), model))
    still.keeper.record(RequestEnded(still.clock(), model, answered=True))
    glanced = still.keeper.glance(model)

    assert glanced is not None
    assert glanced.state is State.WARM


async def test_what_a_name_means_follows_what_is_listed():
    still = Still("a")
    still.listed("a", keys="a")
    unknown = await still.keeper.meanings.meaning("other", 0.0)
    again = await still.keeper.meanings.meaning("other", 0.0)
    still.listed("a", keys=["a", "other"])
    known = await still.keeper.meanings.meaning("other", 0.0)

    assert again is unknown
    assert (unknown.known, known.known) == (False, True)


async def test_who_waits_is_woken_when_it_is_warm_and_is_told_of_as_served():
    still = Still("a", "b")
    still.listed("a", "b")
    waiting = asyncio.ensure_future(still.keeper.waiting.ensure_warm(still.ids))
    early = await settled(waiting)
    still.now = 110.0
    still.warm(still.ids[1])

    assert not early
    assert await settled(waiting)
    assert waiting.result().key == "b"
    assert [fact.model.key for fact in still.of(WaitStarted)] == ["a", "b"]
    ended = still.of(WaitEnded)
    assert [(fact.model.key, fact.served) for fact in ended] == [("a", True), ("b", True)]
    assert [fact.seconds for fact in ended] == [pytest.approx(10.0, abs=0.1)] * 2
    assert [m.waiting for m in still.keeper.snapshot().models] == [0, 0]


async def test_who_waits_while_a_model_makes_room_is_woken_when_it_need_not():
    still = Still("a")
    still.listed("a")
    still.warm(still.ids[0])
    still.keeper.record(DrainStarted(still.clock(), still.ids[0]))
    waiting = asyncio.ensure_future(still.keeper.waiting.ensure_warm(still.ids))
    early = await settled(waiting)
    still.keeper.record(DrainEnded(still.clock(), still.ids[0]))

    assert not early
    assert await settled(waiting)
    assert waiting.result() == still.ids[0]


async def test_who_leaves_while_waiting_was_not_served_and_wakes_nobody_else():
    still = Still("a")
    still.listed("a")
    leaving, staying = (asyncio.ensure_future(still.keeper.waiting.ensure_warm(still.ids)) for _ in range(2))
    await settled(leaving)
    leaving.cancel()
    gone = await settled(leaving)
    stays = not await settled(staying)
    still.warm(still.ids[0])

    assert (gone, stays, await settled(staying)) == (True, True, True)
    assert [fact.served for fact in still.of(WaitEnded)] == [False, True]


async def refusal(still: Still, *models: ModelId) -> tuple[str, float | None]:
    """Why waiting is of no use, and for how long."""
    with pytest.raises(NotWarm) as caught:
        await asyncio.wait_for(still.keeper.waiting.ensure_warm(models or still.ids), 10)
    return str(caught.value), caught.value.retry_after


async def test_what_is_not_kept_is_not_waited_for():
    still = Still("a")

    assert await refusal(still, ModelId("local", "z")) == ("z is no longer kept here", None)
    with pytest.raises(NotWarm, match=r"^no such model is kept here$"):
        await still.keeper.waiting.ensure_warm([])


async def test_a_load_that_failed_is_waited_for_once_and_then_said():
    still = Still("a")
    still.listed()
    still.load_fails(still.ids[0])
    waiting = asyncio.ensure_future(still.keeper.waiting.ensure_warm(still.ids))
    first = await settled(waiting)
    still.listed()
    still.load_fails(still.ids[0])

    assert not first
    assert await settled(waiting)
    with pytest.raises(NotWarm, match=r"^a cannot be had now: no memory$"):
        waiting.result()
    assert (await refusal(still))[1] == pytest.approx(10.0, abs=0.1)


async def test_what_was_taken_is_waited_for_however_long_it_is_held_off():
    still = Still("a")
    for _ in range(4):
        still.listed("a")
        still.warm(still.ids[0])
        still.listed()
    held_off = still.keeper.model(still.ids[0])
    waiting = asyncio.ensure_future(still.keeper.waiting.ensure_warm(still.ids))

    assert held_off is not None
    assert (held_off.state, held_off.contested) == (State.BACKOFF, True)
    assert not await settled(waiting)
    waiting.cancel()


async def test_a_server_that_wants_another_token_is_not_waited_for():
    still = Still("a")
    still.keeper.record(
        ListingFailed(still.clock(), "local", still.now, Trouble.UNAUTHORIZED, "it wants a token")
    )

    assert await refusal(still) == ("a cannot be had: it wants a token", None)


async def test_what_is_not_listed_or_would_push_out_another_is_not_waited_for():
    unlisted, blocked = Still("a"), Still("a")
    unlisted.listed(keys="xy")
    blocked.listed("b", tier=Tier.V0)

    assert await refusal(unlisted) == ("a cannot be had: LM Studio does not list this key", None)
    assert await refusal(blocked) == (
        "a cannot be had: loading it on LM Studio 0.3.x could push out b, which we did not load",
        None,
    )


async def test_where_one_of_several_may_get_warm_it_is_waited_for_and_else_the_first_says_why():
    still = Still("a", "b")
    still.listed(keys="b")
    waiting = asyncio.ensure_future(still.keeper.waiting.ensure_warm(still.ids))
    early = await settled(waiting)
    still.listed(keys="x")

    assert not early
    assert await settled(waiting)
    with pytest.raises(NotWarm, match=r"^a cannot be had: "):
        waiting.result()


async def test_who_waits_for_what_a_reload_removes_is_told():
    still = Still("a")
    still.listed()
    waiting = asyncio.ensure_future(still.keeper.waiting.ensure_warm(still.ids))
    early = await settled(waiting)
    still.keeper.configure([still.server], [])

    assert not early
    assert await settled(waiting)
    with pytest.raises(NotWarm, match=r"^a is no longer kept here$"):
        waiting.result()


# --- a reload, and all that it leaves ------------------------------------------------------------------------


def test_a_new_model_is_known_as_the_config_says_it_and_since_now():
    still = Still("a", "b", kind="embedding", windowed=True, window_open=False)
    snapshot = still.keeper.snapshot()

    assert still.unused == []
    assert [(m.id.key, m.rank, m.kind, m.windowed, m.window_open) for m in snapshot.models] == [
        ("a", 0, "embedding", True, False),
        ("b", 1, "embedding", True, False),
    ]
    assert [m.since for m in snapshot.models] == [pytest.approx(100.0, abs=0.1)] * 2
    assert snapshot.upstreams[0].since == pytest.approx(100.0, abs=0.1)
    assert Still("a").keeper.snapshot().models[0].kind == "llm"


def test_a_reload_says_which_clients_are_used_no_more():
    still = Still("a")
    keeps = [Keep(still.ids[0], POLICY)]
    same = still.keeper.configure([replace(still.server, max_loading=3, auto_evict=True)], keeps)
    other = Server("local", Client("local", "http://127.0.0.1:2"), refresh_interval=5.0)
    replaced = still.keeper.configure([other], keeps)
    removed = still.keeper.configure([], [])

    assert (same, replaced, removed) == ([], [still.server.client], [other.client])


def test_an_upstream_is_kept_as_the_reload_says_and_its_state_stays():
    still = Still("a")
    still.listed()
    still.keeper.configure([replace(still.server, refresh_interval=5.0, max_loading=3, auto_evict=True)], [])
    upstream = still.keeper.snapshot().upstreams[0]

    assert (upstream.refresh_interval, upstream.max_loading, upstream.auto_evict) == (5.0, 3, True)
    assert upstream.state is UpstreamState.UP


def test_an_upstream_is_up_while_it_answers():
    still = Still("a")
    seen = [still.keeper.up()]
    still.listed()
    seen.append(still.keeper.up())
    still.keeper.record(ListingFailed(still.clock(), "local", still.now, Trouble.REFUSED, "nothing listens"))
    seen.append(still.keeper.up())

    assert seen == [set(), {"local"}, set()]


def test_how_long_a_load_still_takes_is_told_of_what_is_kept_and_has_been_loaded_before():
    still = Still("a")
    still.listed()
    still.keeper.record(LoadStarted(still.clock(), still.ids[0]))
    unknown = still.keeper.ready_in(still.ids[0])
    still.keeper.record(LoadEnded(still.clock(), still.ids[0], LoadOutcome.OK, 30.0, instance_id="a"))
    still.listed("a")
    still.listed()
    still.keeper.record(LoadStarted(still.clock(), still.ids[0]))
    still.now += 10.0

    assert unknown is None
    assert still.keeper.ready_in(still.ids[0]) == pytest.approx(20.0, abs=0.1)
    assert still.keeper.ready_in(ModelId("local", "z")) is None
    assert still.keeper.ready_in(ModelId("gpu", "a")) is None


def test_upstreams_stand_in_the_order_of_the_config():
    still = Still("a")
    other = Server("other", Client("other", "http://127.0.0.1:2"))
    still.keeper.configure([other, still.server], [])

    assert [u.name for u in still.keeper.snapshot().upstreams] == ["other", "local"]


def test_a_removed_model_is_only_there_to_be_let_go_and_forgets_what_was_asked_when_it_comes_back():
    still = Still("a", "b")
    still.listed("a")
    still.keeper.record(ReleaseAsked(still.clock(), still.ids[0]))
    still.keeper.configure([still.server], [Keep(still.ids[1], POLICY)])
    let_go = still.keeper.siblings(still.ids[0])
    still.keeper.configure([still.server], [Keep(m, POLICY) for m in still.ids])

    assert [(m.id.key, m.rank, m.retired) for m in let_go] == [("b", 0, False), ("a", 1, True)]
    assert still.keeper.model(still.ids[0]).asked_for is None


def test_what_was_asked_by_hand_outlasts_a_reload():
    still = Still("a")
    still.keeper.record(ReleaseAsked(still.clock(), still.ids[0]))
    still.keeper.configure([still.server], [Keep(still.ids[0], POLICY)])

    assert still.keeper.model(still.ids[0]).asked_for is False


def test_behind_another_client_all_is_unknown_but_what_users_and_people_did_and_a_load_under_way():
    still = Still("a", "b")
    model = still.ids[0]
    still.listed("b")
    still.keeper.record(LoadStarted(104.0, model))
    still.keeper.record(LoadEnded(110.0, model, LoadOutcome.OK, 6.0, instance_id="a"))
    still.now = 110.0
    still.listed("a", "b")
    still.warm(model)
    still.listed("b")
    still.keeper.record(RequestStarted(still.clock(), model))
    still.keeper.record(WaitStarted(still.clock(), model))
    still.keeper.record(WarmAsked(still.clock(), model))
    still.keeper.record(UsedElsewhere(still.clock(), model, 2, True))
    still.keeper.record(LoadStarted(120.0, model))
    before = still.keeper.model(model)
    still.now = 125.0
    other = Server("local", Client("local", "http://127.0.0.1:2"))
    still.keeper.configure([other], [Keep(m, POLICY) for m in still.ids])
    after, beside = still.keeper.model(model), still.keeper.model(still.ids[1])

    why = "it was begun before this daemon was started or its config read anew, and nobody saw it end"

    assert after == Model(
        id=model,
        policy=POLICY,
        since=pytest.approx(125.0, abs=0.1),
        reason=f"an earlier load may still be under way, because {why}",
        asked_for=True,
        recent_loads=(6.0,),
        loads=1,
        evictions=1,
        last_eviction=before.last_eviction,
        waiting=1,
        waiting_since=before.waiting_since,
        callers_elsewhere=2,
        in_flight=1,
        used_elsewhere=True,
        use_at=before.use_at,
        elsewhere_at=before.elsewhere_at,
        asks=1.0,
        asks_at=before.asks_at,
        pending=Pending(120.0, 120.0 + 12.0 + 45.0, alive_at=after.since, expected=6.0, why=why),
    )
    assert beside == Model(id=still.ids[1], rank=1, policy=POLICY, since=after.since)
    assert still.keeper.snapshot().upstreams[0] == Upstream("local", since=after.since)


def test_a_load_that_has_ended_and_is_not_listed_yet_is_waited_for_behind_another_client():
    """As long as a listing may lag; and it is no failure if it never shows: that may be another server."""
    still = Still("a")
    model = still.ids[0]
    still.listed()
    still.keeper.record(LoadStarted(104.0, model))
    still.keeper.record(LoadEnded(110.0, model, LoadOutcome.OK, 6.0, instance_id="a"))
    still.now = 112.0
    other = Server("local", Client("local", "http://127.0.0.1:2"))
    still.keeper.configure([other], [Keep(model, POLICY)])
    seen = []
    for still.now in (120.0, 154.0, 156.0):
        still.listed()
        seen.append((still.keeper.model(model).state, still.keeper.model(model).failures))

    assert seen == [(State.LOADING, 0), (State.LOADING, 0), (State.COLD, 0)]


def test_a_load_of_somebody_else_is_not_ours_behind_another_client():
    still = Still("a")
    rows = {"a": Entry("a", loading=True)}
    still.keeper.record(Listed(still.clock(), "local", still.now, Tier.V1, rows))
    loading = still.keeper.model(still.ids[0])
    other = Server("local", Client("local", "http://127.0.0.1:2"))
    still.keeper.configure([other], [Keep(still.ids[0], POLICY)])

    assert loading.state is State.LOADING
    assert still.keeper.model(still.ids[0]).pending is None


# --- what an answer means ----------------------------------------------------------------------------------------


def said_no(reason: Reason, status: int) -> Refused:
    return Refused("no", reason=reason, status=status)


@pytest.mark.parametrize(
    ("error", "tier", "outcome"),
    [
        (said_no(Reason.RESOURCES, 500), Tier.V1, LoadOutcome.REFUSED),
        (said_no(Reason.RESOURCES, 500), Tier.OPENAI, LoadOutcome.REFUSED),
        (said_no(Reason.LOAD_FAILED, 500), Tier.V1, LoadOutcome.FAILED),
        (said_no(Reason.LOADING, 500), Tier.OPENAI, LoadOutcome.UNKNOWN),
        (said_no(Reason.OTHER, 399), Tier.V1, LoadOutcome.UNKNOWN),
        (said_no(Reason.OTHER, 400), Tier.V1, LoadOutcome.FAILED),
        (said_no(Reason.OTHER, 499), Tier.V1, LoadOutcome.FAILED),
        (said_no(Reason.OTHER, 408), Tier.V1, LoadOutcome.UNKNOWN),
        (said_no(Reason.OTHER, 409), Tier.V1, LoadOutcome.UNKNOWN),
        (said_no(Reason.OTHER, 408), Tier.OPENAI, LoadOutcome.UNKNOWN),
        (said_no(Reason.LOAD_FAILED, 409), Tier.V1, LoadOutcome.FAILED),
        (said_no(Reason.OTHER, 500), Tier.V1, LoadOutcome.UNKNOWN),
        (said_no(Reason.OTHER, 500), Tier.V0, LoadOutcome.UNKNOWN),
        (said_no(Reason.OTHER, 500), Tier.OPENAI, LoadOutcome.FAILED),
        (said_no(Reason.OTHER, 501), Tier.OPENAI, LoadOutcome.UNKNOWN),
        (said_no(Reason.OTHER, 399), Tier.OPENAI, LoadOutcome.UNKNOWN),
        (Unexpected("garbled", status=404), Tier.V1, LoadOutcome.UNKNOWN),
        (Unexpected("garbled", status=404), Tier.OPENAI, LoadOutcome.FAILED),
        (Unexpected("garbled", status=400), Tier.OPENAI, LoadOutcome.FAILED),
        (Unexpected("garbled", status=502), Tier.OPENAI, LoadOutcome.UNKNOWN),
        (Unexpected("cut short"), Tier.OPENAI, LoadOutcome.UNKNOWN),
    ],
)
def test_a_load_has_failed_only_where_the_answer_says_that_it_is_over(
    error: Refused | Unexpected, tier: Tier, outcome: LoadOutcome
):
    assert errands._load_outcome(error, tier) is outcome


@pytest.mark.parametrize(
    ("words", "status", "outcome"),
    [
        ("Error rendering prompt with jinja template: \"filter 'tojson' not found\"", 400, "refused"),
        ("Unable to generate parser for this template", 500, "refused"),
        ("invalid model: 'm' not found", 400, "error"),
        ("The model has crashed in its template", 400, "error"),
    ],
)
def test_what_a_template_misses_is_no_missing_model(words: str, status: int, outcome: str):
    error = wire.refusal(status, {"error": {"message": words}})

    assert error is not None
    assert errands._what_came_of_it(error, Tier.V1)[0] == outcome


@pytest.mark.parametrize(
    ("error", "trouble"),
    [
        (Unauthorized("no"), Trouble.UNAUTHORIZED),
        (Unreachable("no", refused=True), Trouble.REFUSED),
        (Unreachable("no"), Trouble.UNREACHABLE),
        (TimedOut("no"), Trouble.TIMEOUT),
        (Cut("no"), Trouble.BAD_ANSWER),
        (Unexpected("no"), Trouble.BAD_ANSWER),
        (said_no(Reason.OTHER, 500), Trouble.BAD_ANSWER),
    ],
)
def test_only_a_closed_port_says_that_what_ran_there_is_gone(error: UpstreamError, trouble: Trouble):
    assert errands._trouble(error) is trouble


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
    def unloads(upstream: Upstream, models: list[Model], now: float, room: object) -> list[Any]:
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
    patch.setattr(listings, "_present", lambda model, at, entry, trusted: model)


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
