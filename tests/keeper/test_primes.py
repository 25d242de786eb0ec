"""Openings that are replayed, in front of a simulated LM Studio with a prompt cache, on a virtual clock."""

import asyncio
import json
import random
import sys
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import pytest

from keepalive.core.facts import (
    InstanceLost,
    LoadEnded,
    ModelId,
    OpeningRead,
    OpeningsLearned,
    PrimeEnded,
    PrimeOutcome,
    ReleaseAsked,
    RequestEnded,
    RequestStarted,
)
from keepalive.core.records import Model
from keepalive.core.states import State
from keepalive.keeper.given import Keep, Replay, Server
from keepalive.lmstudio.client import Client
from keepalive.simulator.exchange import Refusal, Request
from keepalive.simulator.models import SimModel
from tests.keeper.test_keeper import POLICY, a_site, a_world, events, model, warm
from tests.kit.world import InProcess, Judge, Site, World, virtually

A = ModelId("local", "a")
PATH = "/v1/chat/completions"
LONG = [{"role": "system", "content": " ".join(f"rule{n}" for n in range(1000))}]


def opening(messages: list[dict[str, str]], said: str = ".") -> Replay:
    return PATH, {
        "messages": [*messages, {"role": "user", "content": said}],
        "max_tokens": 1,
        "stream": False,
    }


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


async def first_token(site: Site, messages: list[dict[str, str]], said: str = ".") -> float:
    """How long a user waits for it, past the daemon."""
    began = asyncio.get_running_loop().time()
    _, body = opening(messages, said)
    sent = json.dumps({**body, "model": "a", "stream": True, "max_tokens": 5}).encode()
    reply = await site.studio.handle(Request("POST", PATH, "", {}, sent))
    pieces = reply.body
    if isinstance(pieces, bytes):
        raise LookupError("the model went away")  # noqa: TRY004
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


def test_an_opening_that_is_too_deep_to_be_sent_is_refused_and_the_daemon_lives_on():
    async def go(judge: Judge) -> tuple[Told, Model]:
        world, told = primed_world(judge)
        deep: list[Any] = []
        for _ in range(sys.getrecursionlimit()):
            deep = [deep]
        path, body = world.openings["agent"]
        world.openings["agent"] = path, {**body, "tools": deep}
        world.start()
        await until(told, 1)
        known = model(world, "a")
        await world.kill()
        return told, known

    told, known = virtually(go)

    assert told.outcomes == [("agent", "refused")]
    assert known.state is State.WARM


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

    assert told.outcomes[:6] == [("one", "ok"), ("two", "ok")] * 3
    assert len(events(site, "load.started")) == 3


def test_a_quiet_model_is_pinged_by_what_it_has_read_in_turn_so_that_no_ping_takes_its_place():
    """With one slot a ping of its own would leave nothing of an opening in the cache."""

    async def go(judge: Judge) -> tuple[float, Told, Site]:
        world, told = primed_world(judge, "one", "two", parallel=2)
        site = world.sites[0]
        world.start()
        await until(told, 2)
        await asyncio.sleep(3600)
        seconds = await first_token(site, [{"role": "system", "content": "one"}, *LONG])
        assert model(world, "a").last_ping.at > 3300
        await world.kill()
        return seconds, told, site

    seconds, told, site = virtually(go)

    assert len(told.ends) >= 12
    assert set(told.outcomes[::2]) == {("one", "ok")}
    assert set(told.outcomes[1::2]) == {("two", "ok")}
    assert max(prompt - known for prompt, known in cached(site)[3:]) <= 4
    assert seconds < 0.5


def test_a_model_that_hangs_is_found_by_a_ping_of_its_own_in_no_more_time_than_ever():
    async def go(judge: Judge) -> tuple[Told, Model]:
        world, told = primed_world(judge)
        world.start()
        await until(told, 1)
        world.sites[0].studio.set_faults(answer="hang")
        await until(told, 2)
        took = told.ends[1].seconds
        await asyncio.sleep(70)
        known = model(world, "a")
        assert took == pytest.approx(POLICY.ping_timeout)
        await world.kill()
        return told, known

    told, known = virtually(go)

    assert told.outcomes == [("agent", "ok"), ("agent", "timeout")]
    assert known.busy
    assert known.priming.unfit == ()


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


# --- in nobody's way --------------------------------------------------------------------------------------

NOTICED = 0.4
# A keeper takes a look before it does something, and users come between its ticks.
ROUNDING = 0.1


@dataclass(frozen=True)
class Arrival:
    """Somebody comes at `at` with an opening (of those that are primed, or his own), and says so many words."""

    at: float
    begins: str
    words: int
    leaves: float | None = None  # in mid-answer


def drawn(seed: int, names: tuple[str, ...]) -> tuple[list[Arrival], list[float]]:
    """Users, and when LM Studio loses the model."""
    chance = random.Random(seed)
    arrivals, at = [], 0.0
    # Of two who begin alike at once only one finds it in the cache, and the other's copy helps a third: who that is
    # would be a matter of luck.
    free_at: dict[str, float] = {}
    while len(arrivals) < 12:
        at += chance.choice([0.05, chance.uniform(0.05, 4), chance.uniform(1, 20), chance.uniform(1, 200)])
        begins = chance.choice([*names, "own"])
        if at < free_at.get(begins, 0.0) or begins == "own":
            begins = f"own{len(arrivals)}"
        free_at[begins] = at + 30
        leaves = chance.uniform(0, 5) if chance.random() < 0.2 else None
        arrivals.append(Arrival(at, begins, chance.choice([1, 10, 200]), leaves))
    return arrivals, [chance.uniform(0, at) for _ in range(chance.randrange(3))]


async def visit(world: World, arrival: Arrival, n: int) -> float | None:
    """The way of a request through the daemon: held until the model is warm, then passed on; its first token."""
    began, life = asyncio.get_running_loop().time(), world.life
    assert life is not None
    await life.keeper.waiting.ensure_warm([A])
    waited = asyncio.get_running_loop().time() - began
    world.record(RequestStarted, A)
    answered = False
    try:
        if arrival.begins in world.openings:
            world.record(OpeningRead, A, arrival.begins)
        own = " ".join(f"word{n}-{k}" for k in range(arrival.words))
        messages = [{"role": "system", "content": arrival.begins}, *LONG]
        async with asyncio.timeout(arrival.leaves):
            seconds = await first_token(world.sites[0], messages, own)
        answered = True
        return waited + seconds
    except (Refusal, LookupError, TimeoutError):
        return None  # he left, or the model did
    finally:
        world.record(lambda at, m: RequestEnded(at, m, answered), A)


def lived(seed: int, names: tuple[str, ...], slots: int, *, primes: bool) -> tuple[list[float | None], Told]:
    """When each of the users had his first token, with priming or without."""

    async def go(judge: Judge) -> tuple[list[float | None], Told]:
        faults = {"prompt_finishes_after_disconnect": False, "disconnect_noticed_seconds": NOTICED}
        world, told = primed_world(judge, *names, parallel=slots, **faults)
        if not primes:
            world.keeps = [replace(world.keeps[0], openings={})]
        arrivals, losses = drawn(seed, names)
        world.start()

        async def come(n: int, arrival: Arrival) -> float | None:
            await asyncio.sleep(arrival.at)
            return await visit(world, arrival, n)

        async def lose(at: float) -> None:
            await asyncio.sleep(at)
            with suppress(ValueError):
                world.sites[0].studio.evict("a")
                world.record(
                    InstanceLost, A, "Model unloaded."
                )  # or who looks when would be a matter of luck

        visits = [asyncio.ensure_future(come(n, arrival)) for n, arrival in enumerate(arrivals)]
        await asyncio.gather(*map(lose, losses), *visits)
        await world.kill()
        return [visit.result() for visit in visits], told

    result: tuple[list[float | None], Told] = virtually(go)
    return result


@pytest.mark.parametrize(("names", "slots"), [(("one",), 1), (("one", "two"), 16)])
def test_no_users_first_token_is_later_than_without_by_more_than_lm_studio_takes_to_see_a_caller_leave(
    names: tuple[str, ...], slots: int
):
    saved, given_up = 0.0, 0
    for seed in range(12):
        without, _ = lived(seed, names, slots, primes=False)
        with_it, told = lived(seed, names, slots, primes=True)

        for n, (before, now) in enumerate(zip(without, with_it, strict=True)):
            if before is not None and now is not None:
                assert now <= before + NOTICED + ROUNDING, (
                    f"seed {seed}, user {n}: {before:.2f} s, now {now:.2f} s"
                )
                saved += before - now
        given_up += sum(end.outcome is PrimeOutcome.GIVEN_UP for end in told.ends)
    print(f"{saved:.0f} s saved, {given_up} times given up")

    assert saved > 50
    assert given_up > 0
