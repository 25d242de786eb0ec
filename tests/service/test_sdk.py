"""What a daemon makes of the socket of LM Studio's SDKs, as people and callers see it."""

import asyncio
import contextlib
import json

import aiohttp

from keepalive.simulator.models import SimModel
from tests.kit import live
from tests.kit.live import asked, daemon, let_it_load, model, settings, simulator, until

GEMMA = SimModel("gemma", load_seconds=600.0, size_bytes=8_000_000_000)
CHAT = {"model": "gemma", "messages": [{"role": "user", "content": "x"}], "stream": True}
PROMPT = '\n[[prompts]]\nid = 28\ntitle = "Test"\nmodel = "gemma"\ncontent = "x"\n'


async def heard(url: str, body: object, words: bytes) -> bytes:
    """A stream, up to these words."""
    said = b""
    async with aiohttp.ClientSession() as session, session.post(url, json=body) as answer:
        async for piece in answer.content.iter_any():
            said += piece
            if words in said:
                break
    return said


def listings(server):
    return sum((e["kind"], e.get("route")) == ("request", "list") for e in server.studio.log(0))


async def test_the_first_load_of_all_shows_how_far_it_is_and_how_long_it_will_take_wherever_somebody_looks():
    async with simulator(GEMMA) as server:
        # On demand: a load that begins before the socket is there shows nothing.
        text = settings(server.url, 'key = "gemma"\nkeep = "auto"', server='heartbeat = "50ms"')
        async with daemon(text + PROMPT) as running:
            await until(lambda: running.status()["upstreams"][0]["sdk"] == "up", "the socket is there")
            await asked(f"{running.admin_url}/api/models/gemma/warm", "POST")
            await until(lambda: server.studio.memory.loads, "a load has begun")
            server.studio.advance(300)
            await until(lambda: (model(running, "gemma")["load"] or {}).get("progress"), "its progress shows")
            upstream = running.status()["upstreams"][0]
            load = model(running, "gemma")["load"]
            heartbeat = await heard(f"{running.url}/v1/chat/completions", CHAT, b" progress=0.5")
            prompt = await heard(f"{running.url}/api/prompts/execute/stream", {"promptId": 28}, b'"progress"')
            await let_it_load(server.studio)
            await until(lambda: model(running, "gemma")["state"] == "warm")
            warm = model(running, "gemma")

    assert (upstream["sdk"], upstream["sdk_reason"]) == ("up", None)
    assert 0.5 <= load["progress"] < 0.6
    assert load["eta_seconds"] is not None
    assert b"state=loading" in heartbeat
    told = [
        json.loads(line[6:]) for line in prompt.splitlines() if b'"progress"' in line and line.endswith(b"}")
    ]
    assert 0.5 <= told[0]["progress"] < 0.6
    assert told[0]["estimatedTime"] is not None
    assert (warm["load"], warm["ours"], warm["ttl_seconds"], warm["memory_bytes"]) == (
        None,
        True,
        None,
        9 * 10**9,
    )


async def test_a_model_is_not_unloaded_under_somebody_who_does_not_ask_through_us():
    async with (
        simulator(SimModel("gemma", load_seconds=0.05), answer_tokens=10_000, token_seconds=0.05) as server,
        daemon(settings(server.url, "gemma")) as running,
    ):
        await until(lambda: model(running, "gemma")["state"] == "warm")
        stranger = asyncio.create_task(heard(f"{server.url}/v1/chat/completions", CHAT, b"[DONE]"))
        await until(lambda: model(running, "gemma")["queued"] == 1, "he is seen")
        busy = model(running, "gemma")
        running.release(running.find("gemma")[0])
        listed = listings(server)
        await until(lambda: listings(server) > listed + 3, "it could have been unloaded")
        held = list(server.studio.memory.instances)
        stranger.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await stranger
        await until(lambda: not server.studio.memory.instances, "it is unloaded when he has gone")
        unloads = [e for e in server.studio.log(0) if e["kind"] == "unloaded"]

    assert (busy["busy"], busy["in_flight"]) == (True, 0)
    assert held == ["gemma"]
    assert [(event["generating"], event["queued"]) for event in unloads] == [(0, 0)]
    assert live.loads(server.studio) == 1


async def test_an_sdk_that_asks_nothing_just_now_does_not_hold_up_the_end_of_the_daemon():
    greeting = {"authVersion": 1, "clientIdentifier": "guest:x", "clientPasskey": "x"}
    async with simulator(SimModel("gemma", load_seconds=0.05)) as server, aiohttp.ClientSession() as session:
        async with daemon(settings(server.url, "gemma", server='drain_timeout = "10m"')) as running:
            tunnel = await session.ws_connect(f"{running.url}/llm")
            await tunnel.send_json(greeting)
            greeted = await tunnel.receive_json()
        last = await tunnel.receive()

    assert greeted == {"success": True}
    assert (last.type, last.data) == (aiohttp.WSMsgType.CLOSE, 1001)
