"""llama-server as a router in LM Studio's place, from the first request to the last byte: the real daemon before an
imitation of it and, where it is installed, before itself."""

import asyncio
import contextlib
import http.client
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from keepalive.core import calls, room
from keepalive.service.daemon import Daemon
from tests.kit.installed import ROUTER
from tests.kit.live import PATIENCE, asked, daemon, model, settings, until
from tests.kit.llama import LlamaRouter, made_model
from tests.kit.router import Router

CHAT = "/v1/chat/completions"
MISSING = ROUTER.why_not()
REAL = pytest.param(
    "real",
    marks=[
        pytest.mark.real_server,
        pytest.mark.timeout(600),
        pytest.mark.skipif(MISSING is not None, reason=MISSING or ""),
    ],
)
# Bytes as the config says them: noise takes next to nothing.
ROOM_FOR_ONE = 'memory = "12GB"'
GB = 10**9


class Engine:
    """Either of them, by what both can do."""

    def __init__(self, router: Router | LlamaRouter) -> None:
        self.router = router
        self.url = router.url
        self.real = isinstance(router, LlamaRouter)

    def states(self) -> dict[str, str]:
        return self.router.states()

    def loads(self, key: str) -> int:
        return self.router.loads(key) if isinstance(self.router, LlamaRouter) else self.router.loads[key]

    def requests(self, key: str) -> int:
        """How many have reached a model."""
        if isinstance(self.router, LlamaRouter):
            return self.router.log().count(f"proxying request to model {key} on")
        return self.router.served[key]

    def breaks(self, key: str) -> None:
        if isinstance(self.router, LlamaRouter):
            self.router.breaks(key)
        else:
            self.router.rows[key].broken = True


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody here comes again: what was just used may go at once, and is asked again soon."""
    monkeypatch.setattr(room, "SETTLE", 0.1)
    monkeypatch.setattr(calls, "IN_USE_POLL", 0.3)


@pytest.fixture(params=["imitation", REAL])
def engine(
    request: pytest.FixtureRequest, tmp_path: Path, run_folder: Path
) -> Callable[..., contextlib.AbstractContextManager[Engine]]:
    """Makes one with models a, b and c."""

    @contextlib.contextmanager
    def made(**how: Any) -> Iterator[Engine]:
        if request.param == "real":
            noise = made_model(run_folder, by=ROUTER)
            with LlamaRouter(tmp_path, noise, ["a", "b", "c"], **how) as real:
                yield Engine(real)
        else:
            with Router(**how) as imitation:
                for key in ("a", "b", "c"):
                    imitation.model(key, load_seconds=0.3)
                yield Engine(imitation)

    return made


def auto(key: str, gigabytes: int = 9) -> str:
    return f'key = "{key}"\nkeep = "auto"\nmemory = "{gigabytes}GB"'


async def chat(url: str, name: str, tokens: int = 2, **more: Any) -> tuple[int, str]:
    body = {"model": name, "messages": [{"role": "user", "content": "x"}], "max_tokens": tokens}
    status, _, text = await asked(url + CHAT, "POST", {**body, "ignore_eos": True, **more})
    return status, text


def streamed(url: str, then: Callable[[], None]) -> str:
    """All of an answer of a; `then` happens once it has begun."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=PATIENCE)
    with contextlib.closing(connection):
        body = {"model": "a", "messages": [{"role": "user", "content": "x"}], "max_tokens": 4000}
        connection.request("POST", CHAT, json.dumps({**body, "ignore_eos": True, "stream": True}))
        answer = connection.getresponse()
        first = answer.readline()
        then()
        return (first + answer.read()).decode()


async def reaches(running: Daemon, key: str, state: str) -> dict[str, Any]:
    await until(lambda: model(running, key)["state"] == state, f"{key} is {state}")
    return model(running, key)


async def is_(engine: Engine, key: str, value: str) -> None:
    await until(lambda: engine.states()[key] == value, f"{key} is {value}")


async def test_a_model_is_loaded_by_a_call_proved_by_a_ping_and_let_go_when_it_is_released(engine) -> None:
    with engine() as there:
        async with daemon(settings(there.url, "a")) as running:
            await reaches(running, "a", "warm")
            (upstream,) = running.status()["upstreams"]
            status, _ = await chat(running.url, "a")
            loaded = there.states()
            await asked(running.admin_url + "/api/models/a/release", "POST")
            seen = model(running, "a")
            loads = there.loads("a")

    assert (upstream["tier"], upstream["state"], upstream["sdk"]) == ("llama", "up", "off")
    assert status == 200
    assert loaded == {"a": "loaded", "b": "unloaded", "c": "unloaded"}
    assert (seen["loads"], seen["wanted"], loads) == (1, False, 1)


async def test_two_models_take_turns_in_the_room_of_one(engine) -> None:
    with engine() as there:
        text = settings(there.url, auto("a"), auto("b"), upstream=ROOM_FOR_ONE)
        async with daemon(text) as running:
            answers = [(await chat(running.url, key))[0] for key in ("a", "b", "a")]
            states = there.states()
            _, _, page = await asked(running.admin_url + "/metrics")
            loads = [there.loads(key) for key in "ab"]
            if isinstance(there.router, LlamaRouter):
                assert list(there.router.processes()) == ["a"]

    assert answers == [200, 200, 200]
    assert states == {"a": "loaded", "b": "unloaded", "c": "unloaded"}
    assert loads == [2, 1]
    assert 'keepalive_model_unloads_total{model="a",upstream="local",cause="room"} 1.0' in page


async def test_an_answer_under_way_goes_on_to_its_end_while_another_waits_for_its_room(engine) -> None:
    with engine() as there:
        if not there.real:
            there.router.answer_seconds = 1.0
        text = settings(there.url, auto("a"), auto("b"), upstream=ROOM_FOR_ONE, defaults='patience = "0s"')
        async with daemon(text) as running:
            long = asyncio.create_task(chat(running.url, "a", tokens=500))
            await until(lambda: model(running, "a")["in_flight"] == 1, "a answers")
            other = asyncio.create_task(chat(running.url, "b"))
            await until(lambda: "makes room" in (model(running, "a")["reason"] or ""), "a is drained")
            assert there.states()["b"] == "unloaded"
            (status, answer), (other_status, _) = await asyncio.gather(long, other)

    assert (status, other_status) == (200, 200)
    assert json.loads(answer)["choices"][0]["finish_reason"] == "length"


async def test_nothing_is_unloaded_under_the_answer_of_somebody_who_asks_the_router_itself(engine) -> None:
    with engine() as there:
        if not there.real:
            there.router.answer_seconds = 1.0
        text = settings(there.url, auto("a"), auto("b"), upstream=ROOM_FOR_ONE)
        async with daemon(text) as running:
            await chat(running.url, "a")
            before = there.requests("a")
            stranger = asyncio.create_task(chat(there.url, "a", tokens=700))
            await until(lambda: there.requests("a") > before, "the stranger is answered")
            other = asyncio.create_task(chat(running.url, "b"))
            status, answer = await stranger
            other_status, _ = await other

    assert (status, other_status) == (200, 200)
    assert json.loads(answer)["choices"][0]["finish_reason"] == "length"


async def test_no_more_models_are_loaded_than_the_router_keeps(engine) -> None:
    """Else it would push out what it finds idlest, be it always to be kept or somebody else's."""
    with engine(most=2) as there:
        text = settings(there.url, "a", auto("b"), auto("c"))
        async with daemon(text) as running:
            await reaches(running, "a", "warm")
            answers = [(await chat(running.url, key))[0] for key in ("b", "c", "b")]
            loads = [there.loads(key) for key in "abc"]
            states = there.states()
            evictions = model(running, "a")["evictions"]

    assert answers == [200, 200, 200]
    assert loads == [1, 2, 1]
    assert states == {"a": "loaded", "b": "loaded", "c": "unloaded"}
    assert evictions == 0


async def test_what_the_router_pushes_out_for_a_stranger_is_seen_and_loaded_again(engine) -> None:
    with engine(most=1) as there:
        async with daemon(settings(there.url, "a")) as running:
            await reaches(running, "a", "warm")
            status, _ = await chat(there.url, "b")
            await until(lambda: model(running, "a")["evictions"] == 1, "it is missed")
            cause = model(running, "a")["last_eviction"]["cause"]
            theirs = "b was loaded by somebody else"
            await until(lambda: theirs in (model(running, "a")["reason"] or ""), "it says who is in the way")
            states = there.states()

    assert status == 200
    assert cause == "displaced"
    # what a stranger has loaded stays
    assert states == {"a": "unloaded", "b": "loaded", "c": "unloaded"}


async def test_a_load_that_fails_says_with_what_its_process_ended_and_holds_up_no_other(engine) -> None:
    with engine() as there:
        there.breaks("a")
        async with daemon(settings(there.url, "a", "b")) as running:
            await reaches(running, "b", "warm")
            failed = await reaches(running, "a", "backoff")

    assert failed["reason"] == "it could not be loaded: its process ended with 1"


async def test_a_model_that_is_killed_alone_is_a_crash_and_is_loaded_again(engine) -> None:
    with engine() as there:
        async with daemon(settings(there.url, "a")) as running:
            await reaches(running, "a", "warm")
            there.router.kill_process("a")
            await until(lambda: model(running, "a")["evictions"] == 1, "it is missed")
            cause = model(running, "a")["last_eviction"]["cause"]
            await reaches(running, "a", "warm")

    assert cause == "crash"


async def test_a_router_that_is_killed_is_seen_and_all_is_loaded_again_when_it_is_back(engine) -> None:
    with engine() as there:
        async with daemon(settings(there.url, "a", "b")) as running:
            for key in "ab":
                await reaches(running, key, "warm")
            await asyncio.to_thread(there.router.kill)
            await until(lambda: running.status()["upstreams"][0]["state"] == "down", "it is down")
            # A listing that is broken off says nothing of models; that nothing listens any more does.
            for key in "ab":
                await reaches(running, key, "unknown")
            await asyncio.to_thread(there.router.start)
            for key in "ab":
                await reaches(running, key, "warm")
            states = there.states()
            loads = [there.loads(key) for key in "ab"]

    assert states == {"a": "loaded", "b": "loaded", "c": "unloaded"}
    assert loads == [2, 2]


async def test_a_caller_of_a_cold_model_waits_for_the_one_load(engine) -> None:
    with engine() as there:
        async with daemon(settings(there.url, auto("a"), auto("b"))) as running:
            answers = await asyncio.gather(*(chat(running.url, "a") for _ in range(4)))
            loads = there.loads("a")

    assert [status for status, _ in answers] == [200] * 4
    assert loads == 1


async def test_no_other_route_of_the_router_makes_it_load_what_is_kept() -> None:
    with Router() as there:
        there.model("a", load_seconds=60.0)
        async with daemon(settings(there.url, 'key = "a"\nmax_wait = "100ms"')) as running:
            paths = ("/chat/completions", "/completion", "/embeddings", "/v1/messages/count_tokens")
            answers = [await asked(running.url + path, "POST", {"model": "a"}) for path in paths]
            told = [line for line in there.asked if line.startswith("POST")]

    assert [status for status, *_ in answers] == [503] * len(paths)
    assert told in ([], ["POST /models/load"])


async def test_what_was_primed_is_not_read_again_when_a_caller_begins_with_it(engine, tmp_path: Path) -> None:
    system = {"role": "system", "content": " ".join(f"Rule {n}: wash your hands." for n in range(40))}
    (tmp_path / "agent.json").write_text(json.dumps({"messages": [system]}))
    with engine() as there:
        text = settings(there.url, f'key = "a"\nprime = "{tmp_path / "agent.json"}"')
        async with daemon(text) as running:
            primed = await until(lambda: (p := model(running, "a")["primed"])["at"] and p, "it is primed")
            status, text = await chat(running.url, "a", messages=[system, {"role": "user", "content": "x"}])

    assert status == 200
    assert primed["openings"] == 1
    if there.real:
        timings = json.loads(text)["timings"]
        assert timings["prompt_n"] < 60 < timings["cache_n"]


@pytest.mark.parametrize("engine", [REAL], indirect=True)
async def test_a_model_with_an_idle_timer_is_kept_awake(engine) -> None:
    with engine(sleep=8) as there:
        async with daemon(settings(there.url, "a", defaults='ping_interval = "1h"')) as running:
            await reaches(running, "a", "warm")
            await until(lambda: there.requests("a") >= 3, "it is pinged")
            slept = there.router.log().count("entering sleeping state")
            evictions = model(running, "a")["evictions"]

    assert (slept, evictions) == (0, 0)


async def test_a_model_that_fell_asleep_is_woken_and_not_loaded_twice() -> None:
    with Router() as router:
        router.model("a")
        async with daemon(settings(router.url, "a")) as running:
            await reaches(running, "a", "warm")
            router.falls_asleep("a")
            await until(lambda: model(running, "a")["evictions"] == 1, "it is missed")
            cause = model(running, "a")["last_eviction"]["cause"]
            await reaches(running, "a", "warm")

    assert cause == "timer"
    assert router.loads["a"] == 1


async def test_models_that_nobody_wrote_down_are_kept_once_they_are_asked_for(engine) -> None:
    with engine(most=1) as there:
        text = settings(there.url, auto("a"), server='unlisted = "auto"')
        async with daemon(text) as running:
            answers = [(await chat(running.url, key))[0] for key in ("a", "c", "b")]
            kept = [m["key"] for m in running.status()["models"]]
            states = there.states()
            loads = [there.loads(key) for key in "abc"]

    assert answers == [200, 200, 200]
    assert kept == ["a", "c", "b"]
    assert states == {"a": "unloaded", "b": "loaded", "c": "unloaded"}
    assert loads == [1, 1, 1]


@pytest.mark.parametrize("engine", [REAL], indirect=True)
async def test_an_answer_whose_model_is_killed_under_it_counts_as_cut_and_the_model_is_loaded_again(
    engine,
) -> None:
    with engine() as there:
        async with daemon(settings(there.url, "a")) as running:
            await reaches(running, "a", "warm")
            text = await asyncio.to_thread(streamed, running.url, lambda: there.router.kill_process("a"))
            await until(lambda: there.loads("a") == 2, "it is loaded again")
            await reaches(running, "a", "warm")
            again, _ = await chat(running.url, "a")
            _, _, page = await asked(running.admin_url + "/metrics")

    # llama-server ends it as if it were whole: the bytes pass as they come, and are seen for what they are
    assert text.endswith("proxy error: Failed to read connection")
    assert re.search(r'^keepalive_proxy_requests_total{.*outcome="cut".*} 1.0$', page, re.MULTILINE)
    assert again == 200
