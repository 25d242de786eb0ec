"""llama-server as a router, over real sockets: an imitation, which is itself held to recordings of the real one."""

import asyncio
import http.client
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from keepalive.core.errors import (
    Cut,
    GivenUp,
    Reason,
    Refused,
    TimedOut,
    Unauthorized,
    Unexpected,
    Unreachable,
)
from keepalive.core.facts import Instance, Odd, Tier
from keepalive.lmstudio import llama
from keepalive.lmstudio.client import Client
from tests.kit import live
from tests.kit.router import Refused as Denied
from tests.kit.router import Router, Row

RECORDED = Path(__file__).parents[1] / "data" / "router"


@pytest.fixture
def router() -> Iterator[Router]:
    with Router() as made:
        made.model("a")
        made.model("b")
        yield made


def client(router: Router) -> Client:
    return Client("local", router.url, connect_timeout=1.0, list_timeout=2.0)


def ask(router: Router, method: str, path: str, body: Any = None) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", router.port, timeout=10)
    try:
        connection.request(method, path, None if body is None else json.dumps(body))
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


async def eventually(router: Router, key: str, value: str) -> None:
    await live.until(lambda: router.states()[key] == value, f"{key} is {value}")


# --- the imitation -------------------------------------------------------------------------------------


def recorded(name: str) -> tuple[str, str, Any, int, Any]:
    """Method, path and body that were sent, and status and body that came."""
    text = (RECORDED / f"{name}.txt").read_text()
    sent, _, came = text.partition("\n--- recv")
    method, path = re.findall(r"(GET|POST) (\S+) HTTP", sent)[0]
    body = re.findall(r"^\{.*\}$", sent, re.MULTILINE)
    status = int(re.findall(r"HTTP/1.1 (\d+)", came)[0])
    return (
        method,
        path,
        json.loads(body[0]) if body else None,
        status,
        json.loads(came.split("\n\n")[1].split("\n")[0]),
    )


@pytest.mark.parametrize(
    ("name", "before"),
    [
        ("health", "unloaded"),
        ("load", "unloaded"),
        ("load-broken", "unloaded"),
        ("load-unknown", "unloaded"),
        ("load-again-loaded", "loaded"),
        ("load-again-while-loading", "loading"),
        ("unload", "loaded"),
        ("unload-again", "unloaded"),
        ("chat-broken", "unloaded"),
        ("chat-noautoload", "unloaded"),
        ("chat-nomodel", "unloaded"),
        ("chat-unknown", "unloaded"),
    ],
)
async def test_the_imitation_answers_as_the_real_one_was_recorded(name: str, before: str):
    method, path, body, status, answer = recorded(name)
    with Router() as router:
        for key in ("moe4", "t1", "broken"):
            router.model(key).broken = key == "broken"
        if before != "unloaded":
            router.rows["moe4"].load_seconds = 0.1 if before == "loaded" else 30.0
            router.load(router.rows["moe4"])
            await eventually(router, "moe4", before)

        assert await asyncio.to_thread(ask, router, method, path, body) == (status, answer)


def recorded_events() -> list[Any]:
    text = (RECORDED / "models-sse.txt").read_text()
    return [json.loads(line) for line in re.findall(r"^data: (.*)$", text, re.MULTILINE)]


def test_the_progress_of_a_load_is_read_off_the_recorded_events():
    events = recorded_events()

    seen = [done for event in events if (done := llama.progress(event, {"moe4"})) is not None]
    ends = [event["data"]["status"] for event in events if llama.ends(event, {"moe4"})]

    assert (seen[0], seen[-1], len(seen)) == (0.0, 1.0, 21)
    assert seen == sorted(seen)
    assert ends == ["loaded", "unloaded"]


def test_the_stages_of_a_load_count_alike():
    told = {
        "stages": ["text_model", "spec_model", "mmproj_model", "x"],
        "current": "spec_model",
        "value": 0.5,
    }

    assert llama.progress({"model": "a", "data": {"status": "loading", "progress": told}}, {"a"}) == 0.375


@pytest.mark.parametrize(
    "event",
    [
        None,
        [],
        {"model": "a"},
        {"model": "a", "data": None},
        {"model": "a", "data": {"progress": 1}},
        {"model": "a", "data": {"progress": {"stages": [], "current": "x", "value": 0.5}}},
        {"model": "a", "data": {"progress": {"stages": ["x"], "current": ["x"], "value": True}}},
        {"model": "a", "data": {"progress": {"stages": ["x"], "current": "x", "value": 7}}},
        {"model": ["a"], "data": {}},
    ],
)
def test_events_that_nobody_understands_say_nothing(event: Any):
    assert llama.progress(event, {"a"}) is None
    assert not llama.ends(event, {"a"})


# --- listing -------------------------------------------------------------------------------------------


async def test_a_router_is_known_by_its_own_word_and_lists_what_is_loaded_and_what_is_not(router: Router):
    router.rows["a"].aliases = ("other",)
    router.load(router.rows["a"])
    await eventually(router, "a", "loaded")
    async with client(router) as upstream:
        listing = await upstream.listing()

    assert (listing.tier, listing.places) == (Tier.LLAMA, 4)
    entry = listing.entries["a"]
    assert entry.instances == (Instance("a", 8192),)
    assert (entry.size_bytes, entry.context_max, entry.loading) == (1043712, 8192, False)
    assert listing.entries["other"] is entry
    assert listing.entries["b"].instances == ()
    assert listing.entries["b"].size_bytes is None


@pytest.mark.parametrize(
    ("listed", "props", "tier"),
    [
        ({"data": [{"id": "x", "owned_by": "llamacpp", "status": {"value": "loaded"}}]}, {}, Tier.OPENAI),
        (
            {"data": [{"id": "x", "owned_by": "me", "status": {"value": "loaded"}}]},
            {"role": "router"},
            Tier.OPENAI,
        ),
        ({"data": [{"id": "x", "owned_by": "llamacpp"}]}, {"role": "router"}, Tier.OPENAI),
        ({"data": []}, {"role": "router", "max_instances": 0}, Tier.LLAMA),
        ({"data": []}, Denied(401, "no", "no"), Tier.OPENAI),
        ({"data": []}, Denied(500, "no", "no"), Tier.OPENAI),
        (
            {"data": [{"id": "x", "owned_by": "llamacpp", "status": {"value": "loaded"}}]},
            Denied(401, "", ""),
            None,
        ),
    ],
)
async def test_a_router_is_known_by_its_listing_and_its_word(
    listed: Any, props: Any, tier: Tier | None, router: Router, monkeypatch: pytest.MonkeyPatch
):
    def answer(method: str, target: str, body: Any) -> Any:
        match target:
            case "/v1/models":
                return listed
            case "/props" if isinstance(props, dict):
                return props
            case "/props":
                raise props
        raise Denied(404, "File Not Found", "not_found_error")

    monkeypatch.setattr(router, "answer", answer)
    async with client(router) as upstream:
        if tier is None:
            with pytest.raises(Unauthorized):
                await upstream.listing()
        else:
            assert (await upstream.listing()).tier is tier


async def test_loading_sleeping_and_failing_are_told_apart(router: Router):
    router.model("c").broken = True
    router.rows["a"].load_seconds = 30.0
    for key in ("a", "b", "c"):
        router.load(router.rows[key])
    await eventually(router, "b", "loaded")
    await live.until(lambda: router.rows["c"].exit_code == 1, "it has failed")
    router.falls_asleep("b")
    async with client(router) as upstream:
        found = (await upstream.listing()).entries

    assert [found[key].loading for key in ("a", "b", "c")] == [True, False, False]
    assert [found[key].asleep for key in ("a", "b", "c")] == [False, True, False]
    assert [found[key].exit_code for key in ("a", "b", "c")] == [None, None, 1]
    assert not any(found[key].instances for key in ("a", "b", "c"))


async def test_how_long_a_model_may_idle_is_told_by_its_arguments():
    with Router(sleep=300, most=0) as router:
        router.load(router.model("a"))
        await eventually(router, "a", "loaded")
        async with client(router) as upstream:
            listing = await upstream.listing()

    assert listing.entries["a"].instances == (Instance("a", 8192, ttl=300.0),)
    assert listing.places is None


def row(path: Path) -> dict[str, Any]:
    return {
        "id": "a",
        "owned_by": "llamacpp",
        "status": {"value": "unloaded", "args": ["llama-server", "--model", str(path), "--port", "1"]},
    }


async def test_the_size_of_what_was_never_loaded_is_that_of_its_files_where_they_lie_here(
    router: Router, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for n in (1, 2):
        (tmp_path / f"x-0000{n}-of-00002.gguf").write_bytes(b"x" * 700)
    listed = {"data": [row(tmp_path / "x-00001-of-00002.gguf"), row(tmp_path / "gone.gguf") | {"id": "b"}]}
    monkeypatch.setattr(router, "listing", lambda: listed)
    async with client(router) as upstream:
        found = (await upstream.listing()).entries

    assert found["a"].size_bytes == 1400
    assert found["b"].size_bytes is None


# --- loading, unloading --------------------------------------------------------------------------------


async def test_a_load_comes_back_when_the_model_is_there_and_tells_how_far_it_is(router: Router):
    told: list[float] = []
    router.rows["a"].load_seconds = 0.5
    async with client(router) as upstream:
        loaded = await upstream.load(
            "a", {"context_length": 9}, timeout=10, tier=Tier.LLAMA, told=told.append
        )

    assert router.states()["a"] == "loaded"
    assert loaded.instance_id == "a"
    assert told
    assert told == sorted(told)
    assert router.loads["a"] == 1


async def test_a_load_that_fails_says_with_what_its_process_ended(router: Router):
    router.rows["a"].broken = True
    async with client(router) as upstream:
        with pytest.raises(Refused, match="its process ended with 1") as failed:
            await upstream.load("a", {}, timeout=10, tier=Tier.LLAMA)

    assert failed.value.reason is Reason.LOAD_FAILED


async def test_a_load_of_a_model_that_is_not_there_says_so(router: Router):
    async with client(router) as upstream:
        with pytest.raises(Refused, match="not there") as failed:
            await upstream.load("nobody", {}, timeout=10, tier=Tier.LLAMA)

    assert failed.value.reason is Reason.UNKNOWN_MODEL


async def test_somebody_elses_load_is_waited_for_and_is_not_ours(router: Router):
    router.rows["a"].load_seconds = 0.3
    router.load(router.rows["a"])
    async with client(router) as upstream:
        loaded = await upstream.load("a", {}, timeout=10, tier=Tier.LLAMA)

    assert loaded.instance_id is None
    assert router.loads["a"] == 1


async def test_a_load_that_somebody_ends_is_over(router: Router):
    router.rows["a"].load_seconds = 60.0
    async with client(router) as upstream:
        loading = asyncio.create_task(upstream.load("a", {}, timeout=30, tier=Tier.LLAMA))
        await eventually(router, "a", "loading")
        await asyncio.to_thread(router.unload, router.rows["a"])
        with pytest.raises(Refused, match="could not be loaded"):
            await loading


async def test_a_load_of_ours_can_be_given_up_and_nobody_elses(router: Router):
    for key in ("a", "b"):
        router.rows[key].load_seconds = 60.0
    router.load(router.rows["b"])
    async with client(router) as upstream:
        loading = asyncio.create_task(upstream.load("a", {}, timeout=30, tier=Tier.LLAMA))
        await live.until(lambda: "GET /v1/models" in router.asked, "it is waited for")
        for key in ("a", "b"):
            await upstream.give_up(key, tier=Tier.LLAMA)
        with pytest.raises(GivenUp):
            await loading

    assert router.states() == {"a": "unloaded", "b": "loading"}


async def test_a_load_without_an_end_is_given_up_in_time(router: Router):
    router.rows["a"].load_seconds = 60.0
    async with client(router) as upstream:
        with pytest.raises(TimedOut):
            await upstream.load("a", {}, timeout=0.3, tier=Tier.LLAMA)


async def test_a_router_that_dies_under_a_load_is_seen(router: Router):
    router.rows["a"].load_seconds = 60.0
    async with client(router) as upstream:
        loading = asyncio.create_task(upstream.load("a", {}, timeout=30, tier=Tier.LLAMA))
        await eventually(router, "a", "loading")
        await asyncio.to_thread(router.kill)
        with pytest.raises((Unreachable, Cut)):
            await loading


async def test_a_sleeping_model_is_woken_by_a_load_and_not_loaded_twice(router: Router):
    router.load(router.rows["a"])
    await eventually(router, "a", "loaded")
    router.falls_asleep("a")
    async with client(router) as upstream:
        loaded = await upstream.load("a", {}, timeout=10, tier=Tier.LLAMA)

    assert loaded.instance_id == "a"
    assert router.states()["a"] == "loaded"
    assert router.loads["a"] == 1


async def test_an_unload_comes_back_when_the_memory_is_free(router: Router):
    router.load(router.rows["a"])
    await eventually(router, "a", "loaded")
    async with client(router) as upstream:
        await upstream.unload("a", tier=Tier.LLAMA, timeout=5)
        assert router.states()["a"] == "unloaded"
        await upstream.unload("a", tier=Tier.LLAMA, timeout=5)  # somebody was faster


async def test_an_unload_is_over_though_somebody_has_it_loaded_again_at_once(
    router: Router, monkeypatch: pytest.MonkeyPatch
):
    def stop(row: Row) -> None:
        router._becomes(row, "unloaded", exit_code=0)
        row.load_seconds = 60.0
        router.load(row)

    router.load(router.rows["a"])
    await eventually(router, "a", "loaded")
    monkeypatch.setattr(router, "_stop", stop)
    async with client(router) as upstream:
        await upstream.unload("a", tier=Tier.LLAMA, timeout=10)

    assert router.loads["a"] == 2


async def test_nothing_is_unloaded_under_the_answer_of_a_stranger(router: Router):
    router.answer_seconds = 1.0
    router.load(router.rows["a"])
    await eventually(router, "a", "loaded")
    chat = "POST", "/v1/chat/completions", {"model": "a", "messages": []}
    async with client(router) as upstream:
        stranger = asyncio.create_task(asyncio.to_thread(ask, router, *chat))
        await live.until(lambda: router.rows["a"].answering == 1, "it answers")
        with pytest.raises(Refused, match="answers somebody"):
            await upstream.unload("a", tier=Tier.LLAMA, timeout=5)

        assert (await stranger)[0] == 200
        await upstream.unload("a", tier=Tier.LLAMA, timeout=5)


async def test_no_ping_and_no_opening_loads_anything(router: Router):
    async with client(router) as upstream:
        with pytest.raises(Refused) as absent:
            await upstream.ping("a", ["a"], kind="llm", tier=Tier.LLAMA, timeout=5)
        own = "/v1/chat/completions?x=1", {"messages": []}
        with pytest.raises(Refused):
            await upstream.ping("a", ["a"], kind="llm", tier=Tier.LLAMA, timeout=5, own=own)
        with pytest.raises(Refused):
            await upstream.prime(own, "a", ["a"], tier=Tier.LLAMA, timeout=5)

        assert absent.value.reason is Reason.UNLOADED
        assert not router.loads

        router.load(router.rows["a"])
        await eventually(router, "a", "loaded")
        assert await upstream.ping("a", ["a"], kind="llm", tier=Tier.LLAMA, timeout=5) is None
        assert await upstream.prime(own, "a", ["a"], tier=Tier.LLAMA, timeout=5) == 25


def test_a_row_that_cannot_be_read_costs_its_own_model_alone():
    good = {"id": "a", "status": {"value": "loaded"}}
    listed = {"data": [good, {"id": "B"}, {"status": {"value": "loaded"}}, 7]}
    told: list[Odd] = []

    assert llama.may_list({"data": [{**good, "owned_by": "llamacpp"}, {"id": "B"}]})
    assert llama.rows(listed, told.append) == [good]
    assert list(told[0].keys) == ["b"]
    assert llama.status(listed, "a") == ("loaded", good)
    assert llama.status(listed, "c") == ("absent", {})
    with pytest.raises(Unexpected, match="without `status`"):  # it is there, and nobody knows how
        llama.status(listed, "b")
