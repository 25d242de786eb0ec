"""LM Studio's own Python SDK is the judge: it meets the simulator as it would LM Studio, alone and through us."""

import asyncio
import contextlib
from urllib.parse import urlsplit

import pytest

from keepalive.simulator.models import SimModel
from tests.kit import live
from tests.kit.official import Official, no_issuers, on_one_worker

pytestmark = [on_one_worker, no_issuers]
lmstudio = Official("lmstudio")

KEPT = SimModel("acme/chat-8b", load_seconds=600.0, max_context_length=32_768)
SMALL = SimModel("acme/small-1b", load_seconds=0.3)
EMBED = SimModel("text-embedding-tiny", kind="embedding", load_seconds=0.3, max_context_length=2_048)


def port(running):
    return urlsplit(running.url).port


@contextlib.asynccontextmanager
async def sdk(place):
    async with lmstudio.AsyncClient(f"127.0.0.1:{place}") as client:
        yield client


@contextlib.asynccontextmanager
async def met(way, **faults):
    """The SDK in front of a simulator, directly or through a keepalive that keeps none of its models."""
    async with live.simulator(KEPT, SMALL, EMBED, **faults) as server:
        if way == "alone":
            async with sdk(server.port) as client:
                yield client, server.studio
            return
        async with (
            live.daemon(live.settings(server.url, "acme/absent")) as running,
            sdk(port(running)) as client,
        ):
            yield client, server.studio


ways = pytest.mark.parametrize("way", ["alone", "through"])


@ways
async def test_what_is_on_disk_and_what_is_loaded_is_listed(way):
    async with met(way) as (client, studio):
        on_disk = await client.list_downloaded_models()
        before = await client.llm.list_loaded()
        studio.load(SMALL.key, seconds=0)
        studio.load(EMBED.key, seconds=0)
        llms = await client.llm.list_loaded()
        embeddings = await client.embedding.list_loaded()

    assert [(model.type, model.model_key) for model in on_disk] == [
        ("llm", KEPT.key),
        ("llm", SMALL.key),
        ("embedding", EMBED.key),
    ]
    assert before == []
    assert [model.identifier for model in llms] == [SMALL.key]
    assert [model.identifier for model in embeddings] == [EMBED.key]


@ways
async def test_a_model_is_loaded_with_progress_and_unloaded(way):
    progress = []
    async with met(way) as (client, studio):
        model = await client.llm.load_new_instance(
            SMALL.key, "mine", ttl=60, config={"contextLength": 2_048}, on_load_progress=progress.append
        )
        info = await model.get_info()
        loaded = studio.memory.instances["mine"]
        await model.unload()
        left = await client.llm.list_loaded()

    assert (info.identifier, info.model_key, info.context_length) == ("mine", SMALL.key, 2_048)
    assert loaded.ttl_seconds == 60
    assert len(progress) > 2
    assert progress == sorted(progress)
    assert progress[-1] == 1.0
    assert left == []


@ways
async def test_a_model_is_had_loaded_where_it_is_not(way):
    progress = []
    async with met(way) as (client, studio):
        first = await client.llm.model(SMALL.key, ttl=60, on_load_progress=progress.append)
        second = await client.llm.model(SMALL.key)
        instance = studio.memory.instances[SMALL.key]

        assert first.identifier == second.identifier == SMALL.key
        assert (instance.owner, instance.ttl_seconds) == ("jit", 60)
        assert progress[0] == 0.0
        assert progress[-1] == 1.0
        assert live.loads(studio) == 1


@ways
async def test_a_model_answers_word_by_word(way):
    async with met(way, answer_tokens=5) as (client, studio):
        studio.load(SMALL.key, seconds=0)
        model = await client.llm.model(SMALL.key)
        stream = await model.respond_stream("hello")
        heard = [fragment.content async for fragment in stream]
        result = stream.result()
        short = await model.respond("hello", config={"maxTokens": 2})
        completed = await model.complete("hello")

    assert heard == ["This", " answer", " comes", " from", " a"]
    assert result.content == "This answer comes from a"
    assert (result.stats.stop_reason, result.model_info.model_key) == ("eosFound", SMALL.key)
    assert (short.content, short.stats.stop_reason) == ("This answer", "maxPredictedTokensReached")
    assert completed.content == result.content


@ways
async def test_a_prediction_can_be_cancelled(way):
    async with met(way, answer_tokens=1_000, token_seconds=0.01) as (client, studio):
        studio.load(SMALL.key, seconds=0)
        model = await client.llm.model(SMALL.key)
        stream = await model.respond_stream("hello")
        async for _ in stream:
            await stream.cancel()
        ended = await live.until(lambda: [e for e in studio.log() if e["kind"] == "generation.ended"])

    assert stream.result().stats.stop_reason == "userStopped"
    assert 0 < ended[0]["tokens"] < 1_000


@ways
async def test_text_is_embedded(way):
    async with met(way) as (client, _):
        model = await client.embedding.model(EMBED.key)
        vector = await model.embed("hello")

    assert len(vector) == 8


@ways
async def test_what_is_not_there_is_an_error_of_the_sdk(way):
    async with met(way, load_result="fail", load_fail_reason="no luck") as (client, _):
        with pytest.raises(lmstudio.LMStudioServerError, match="nobody"):
            await client.llm.model("nobody")
        with pytest.raises(lmstudio.LMStudioServerError, match="no luck"):
            await client.llm.load_new_instance(SMALL.key)
        with pytest.raises(lmstudio.LMStudioServerError, match="nobody"):
            await client.llm.unload("nobody")
        unloaded = client.llm._create_handle("nobody")
        with pytest.raises(lmstudio.LMStudioModelNotFoundError):
            await unloaded.respond("hello")
        with pytest.raises(lmstudio.LMStudioServerError, match="No endpoint tokenize"):
            await unloaded.tokenize("hello")


# --- what we keep -----------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def kept(**faults):
    async with live.simulator(KEPT, SMALL, EMBED, **faults) as server:
        text = live.settings(server.url, KEPT.key, server='heartbeat = "100ms"')
        async with live.daemon(text) as running, sdk(port(running)) as client:
            yield client, server.studio, running


async def test_who_asks_for_a_cold_model_waits_for_the_one_load():
    async with kept(answer_tokens=3) as (client, studio, running):
        progress = []
        asking = asyncio.create_task(client.llm.model(KEPT.key.upper(), on_load_progress=progress.append))
        await live.until(lambda: live.model(running, KEPT.key)["waiting"], "it waits")
        await live.until(lambda: studio.memory.loads, "it is being loaded")
        studio.advance(300)
        await live.until(lambda: progress and 0.5 <= progress[-1] < 0.6, "he hears how far it is")
        await live.let_it_load(studio)
        model = await asking
        result = await model.respond("hello")

        assert result.content == "This answer comes"
        assert progress == sorted(progress)
        assert live.loads(studio) == 1
        assert list(studio.memory.instances) == [KEPT.key]
        assert studio.memory.instances[KEPT.key].ttl_seconds is None


async def test_another_copy_is_loaded_after_the_one_that_is_kept():
    async with kept() as (client, studio, running):
        asking = asyncio.create_task(client.llm.load_new_instance(KEPT.key, "mine"))
        await live.until(lambda: live.model(running, KEPT.key)["waiting"], "it waits")
        assert live.loads(studio) == 1
        await live.let_it_load(studio)
        await live.until(lambda: live.loads(studio) == 2, "it goes on")
        await live.let_it_load(studio)

        assert (await asking).identifier == "mine"


async def test_a_prediction_is_in_flight_until_it_ends():
    async with kept(answer_tokens=1_000, token_seconds=0.01) as (client, studio, running):
        await live.let_it_load(studio)
        await live.until(lambda: live.model(running, KEPT.key)["state"] == "warm")
        model = await client.llm.model(KEPT.key)
        stream = await model.respond_stream("hello")
        seen = []
        async for _ in stream:
            seen.append(live.model(running, KEPT.key)["in_flight"])
            await stream.cancel()
        await live.until(lambda: live.model(running, KEPT.key)["in_flight"] == 0)

        assert seen[0] == 1
        assert live.loads(studio) == 1


async def test_who_leaves_while_it_waits_is_waited_for_no_longer():
    async with kept() as (client, studio, running):
        async with sdk(port(running)) as leaving:
            asking = asyncio.create_task(leaving.llm.model(KEPT.key))
            await live.until(lambda: live.model(running, KEPT.key)["waiting"], "it waits")
            asking.cancel()
            await asyncio.wait([asking])
        await live.until(lambda: not live.model(running, KEPT.key)["waiting"], "it has left")

        await live.let_it_load(studio)
        await live.until(lambda: live.model(running, KEPT.key)["state"] == "warm")
        assert [one.identifier for one in await client.llm.list_loaded()] == [KEPT.key]
        assert live.loads(studio) == 1


async def test_where_all_is_kept_that_is_asked_for_two_who_ask_at_once_share_one_load():
    async with (
        live.simulator(SMALL) as server,
        live.daemon(live.settings(server.url, server='unlisted = "auto"')) as running,
        sdk(port(running)) as one,
        sdk(port(running)) as other,
    ):
        await live.until(lambda: running.status()["upstreams"][0]["state"] == "up", "it is listed")
        await asyncio.gather(one.llm.model(SMALL.key), other.llm.model(SMALL.key))
        kept = live.model(running, SMALL.key)

    assert live.loads(server.studio) == 1
    assert (kept["ours"], kept["state"]) == (True, "warm")
