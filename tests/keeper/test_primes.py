"""Openings that are replayed, in front of a simulated LM Studio with a prompt cache, on a virtual clock."""

import asyncio
import json
from dataclasses import replace
from typing import Any

import pytest

from keepalive.core.facts import (
    LoadEnded,
    ModelId,
    OpeningsLearned,
    PrimeEnded,
    PrimeOutcome,
    ReleaseAsked,
    RequestEnded,
    RequestStarted,
)
from keepalive.core.records import Model
from keepalive.core.states import State
from keepalive.keeper.keeper import Keep, Replay, Server
from keepalive.lmstudio.client import Client
from keepalive.simulator.exchange import Request
from keepalive.simulator.models import SimModel
from tests.keeper.test_keeper import POLICY, a_site, a_world, events, model, virtually, warm
from tests.kit.world import InProcess, Judge, Site, World

A = ModelId("local", "a")
PATH = "/v1/chat/completions"
LONG = [{"role": "system", "content": " ".join(f"rule{n}" for n in range(1000))}]


def opening(messages: list[dict[str, str]]) -> Replay:
    return PATH, {"messages": [*messages, {"role": "user", "content": "."}], "max_tokens": 1, "stream": False}


class Told:
    """What was recorded of openings."""

    def __init__(self) -> None:
        self.ends: list[PrimeEnded] = []

    def observe(self, fact: object, before: object, after: object) -> None:
        if isinstance(fact, PrimeEnded) and isinstance(after, Model):
            self.ends.append(fact)

    @property
    def outcomes(self) -> list[tuple[str, str]]:
        return [(end.opening, end.outcome.value) for end in self.ends]


def primed_world(judge: Judge, *names: str, **faults: Any) -> tuple[World, Told]:
    """One model that reads a hundred words in a second; each opening has a thousand."""
    site = a_site(judge, "local", SimModel("a", load_seconds=3.0), prompt_token_seconds=0.01, **faults)
    world, told = a_world(site), Told()
    world.observers = [told]
    wishes = dict.fromkeys(names or ("agent",))
    world.keeps = [Keep(A, POLICY, openings=wishes)]
    world.openings = {name: opening([{"role": "system", "content": name}, *LONG]) for name in wishes}
    return world, told


async def until(told: Told, count: int) -> None:
    for _ in range(600):
        if len(told.ends) >= count:
            return
        await asyncio.sleep(1)
    raise AssertionError(f"only {told.outcomes}")


async def first_token(site: Site, messages: list[dict[str, str]]) -> float:
    """How long a user waits for it, past the daemon."""
    began = asyncio.get_running_loop().time()
    _, body = opening(messages)
    sent = json.dumps({**body, "model": "a", "stream": True, "max_tokens": 5}).encode()
    reply = await site.studio.handle(Request("POST", PATH, "", {}, sent))
    pieces = reply.body
    assert not isinstance(pieces, bytes)
    await anext(pieces.__aiter__())
    seconds = asyncio.get_running_loop().time() - began
    await reply.read()
    return seconds


def cached(site: Site) -> list[tuple[int, int]]:
    """Of each prompt that was read: its words, and how many of them were remembered."""
    ends = [e for e in site.studio.log() if e["kind"] == "generation.ended" and e["outcome"] == "ok"]
    return [(e["prompt"], e["cached"]) for e in ends]


def test_after_a_load_the_opening_is_replayed_and_the_next_user_waits_for_his_own_words_alone():
    async def go(judge: Judge) -> tuple[float, float, Told, Model]:
        world, told = primed_world(judge)
        site = world.sites[0]
        world.start()
        await until(told, 1)
        known = model(world, "a")
        primed = await first_token(site, [{"role": "system", "content": "agent"}, *LONG])
        other = await first_token(site, [{"role": "system", "content": "other"}, *LONG])
        await world.kill()
        return primed, other, told, known

    primed, other, told, known = virtually(go)

    (end,) = told.ends
    assert (end.opening, end.outcome) == ("agent", PrimeOutcome.OK)
    assert 10.0 < end.seconds < 10.2
    assert end.tokens == 1010  # two system messages, a dot, and 8 for the template
    assert known.priming.done[0].tokens == 1010
    assert known.ping_at == pytest.approx(end.at + POLICY.ping_interval)
    assert other > 10.0
    assert primed < 0.5


def test_every_load_is_followed_by_it_again():
    async def go(judge: Judge) -> tuple[Told, Site]:
        world, told = primed_world(judge, "one", "two")
        world.start()
        await until(told, 2)
        world.sites[0].studio.evict("a")
        await until(told, 4)
        world.sites[0].studio.crash("a")
        await until(told, 6)
        await asyncio.sleep(2000)
        await world.kill()
        return told, world.sites[0]

    told, site = virtually(go)

    assert told.outcomes == [("one", "ok"), ("two", "ok")] * 3
    assert len(events(site, "load.started")) == 3


def test_a_user_who_comes_meanwhile_ends_it_at_once_and_it_is_gone_on_with_when_he_has_left():
    async def go(judge: Judge) -> tuple[Told, Site, list[float]]:
        world, told = primed_world(judge, prompt_finishes_after_disconnect=False)
        site = world.sites[0]
        world.start()
        await warm(world)
        await asyncio.sleep(4)
        assert model(world, "a").priming.under_way == "agent"
        came = asyncio.get_running_loop().time()
        world.record(RequestStarted, A)
        await asyncio.sleep(0)
        await asyncio.sleep(30)
        left = asyncio.get_running_loop().time()
        world.record(lambda at, m: RequestEnded(at, m, True), A)
        await until(told, 2)
        await world.kill()
        return told, site, [came, left]

    told, site, (came, left) = virtually(go)

    assert told.outcomes == [("agent", "given_up"), ("agent", "ok")]
    assert told.ends[0].at == pytest.approx(came, abs=0.001)
    (gone,) = [e for e in site.studio.log() if e["kind"] == "client.gone"]
    assert gone["t"] == pytest.approx(came, abs=0.001)
    assert told.ends[1].at > left
    assert told.ends[1].seconds < 8.0  # it had read some of it already


def test_what_is_released_is_unloaded_and_not_primed_to_the_end():
    async def go(judge: Judge) -> tuple[Told, Site]:
        world, told = primed_world(judge)
        world.start()
        await warm(world)
        await asyncio.sleep(4)
        world.record(ReleaseAsked, A)
        await asyncio.sleep(100)
        await world.kill()
        return told, world.sites[0]

    told, site = virtually(go)

    assert told.outcomes == [("agent", "given_up")]
    assert events(site, "unloaded") == [("unloaded", "a")]


def test_a_load_of_another_model_goes_first():
    async def go(judge: Judge) -> tuple[Told, float]:
        site = a_site(judge, prompt_token_seconds=0.01)
        world, told = a_world(site), Told()
        ends: list[LoadEnded] = []

        class Loads:
            def observe(self, fact: object, before: object, after: object) -> None:
                if isinstance(fact, LoadEnded) and isinstance(after, Model):
                    ends.append(fact)

        world.observers = [told, Loads()]
        world.keeps = [Keep(A, POLICY, openings={"agent": None}), Keep(ModelId("local", "b"), POLICY)]
        world.openings = {"agent": opening(LONG)}
        world.start()
        await until(told, 1)
        await world.kill()
        return told, ends[1].at

    told, loaded = virtually(go)

    assert told.outcomes == [("agent", "ok")]
    assert told.ends[0].at - told.ends[0].seconds > loaded


@pytest.mark.parametrize(
    ("faults", "outcomes", "words"),
    [
        ({"answer": "context_length"}, [("agent", "refused")], "exceeds the available context size"),
        ({"content_refused": "plain"}, [("agent", "refused")], "Error rendering prompt with jinja template"),
        (
            {"answer": {"value": "html_500", "times": 1, "route": PATH}},
            [("agent", "error"), ("agent", "ok")],
            None,
        ),
        ({"answer": {"value": "fin", "times": 2}}, [("agent", "error"), ("agent", "error")], "broke off"),
    ],
)
def test_whatever_comes_of_it_the_model_stays_warm_and_is_not_asked_for_ever(
    faults: dict[str, Any], outcomes: list[tuple[str, str]], words: str | None
):
    async def go(judge: Judge) -> tuple[Told, Model, Site]:
        world, told = primed_world(judge)
        site = world.sites[0]
        world.keeps = [replace(world.keeps[0], policy=replace(POLICY, pinged=False))]
        site.studio.set_faults(**faults)
        world.start()
        await until(told, len(outcomes))
        await asyncio.sleep(1500)
        known = model(world, "a")
        await world.kill()
        return told, known, site

    told, known, site = virtually(go)

    assert told.outcomes == outcomes
    assert known.state is State.WARM
    assert len(events(site, "load.started")) == 1
    if words is None:
        assert known.priming.unfit == ()
    else:
        assert words in known.priming.unfit[0][1]


def test_an_answer_of_another_model_primes_nothing():
    async def go(judge: Judge) -> Told:
        world, told = primed_world(judge, answer_model={"value": "b", "times": 2})
        world.keeps = [replace(world.keeps[0], policy=replace(POLICY, pinged=False))]
        world.start()
        await until(told, 2)
        await world.kill()
        return told

    told = virtually(go)

    assert told.outcomes == [("agent", "error")] * 2
    assert told.ends[0].message == "b answered in its place"


def test_what_is_no_longer_known_is_not_sent():
    async def go(judge: Judge) -> tuple[Told, Site]:
        world, told = primed_world(judge)
        world.openings.clear()
        world.start()
        await until(told, 1)
        await world.kill()
        return told, world.sites[0]

    told, site = virtually(go)

    assert told.outcomes == [("agent", "refused")]
    assert len(cached(site)) == 1  # the ping


def test_another_server_behind_the_name_is_primed_anew_and_the_old_work_is_dropped():
    async def go(judge: Judge) -> tuple[Told, Site]:
        world, told = primed_world(judge, prompt_finishes_after_disconnect=False)
        site = world.sites[0]
        world.keeps = [replace(world.keeps[0], learns=True)]
        life = world.start()
        await warm(world)
        world.record(OpeningsLearned, A, ("learned",))
        await asyncio.sleep(4)
        life.replayable = False
        other = Client("local", "http://local:1234", transport=InProcess(site, life.number))
        life.keeper.configure([Server("local", other)], world.keeps)
        await until(told, 1)
        assert model(world, "a").priming.learned == ("learned",)
        await world.kill()
        return told, site

    told, site = virtually(go)

    assert told.outcomes[0] == ("agent", "ok")
    assert len(told.ends) <= 2
    assert len([e for e in site.studio.log() if e["kind"] == "client.gone"]) >= 1
