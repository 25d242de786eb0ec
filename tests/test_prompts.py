"""The streaming prompt API, in the real daemon before a simulated LM Studio, and before scripted ones."""

import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from keepalive.daemon import Daemon
from keepalive.simulator.models import SimModel
from keepalive.simulator.studio import Studio
from tests.live import asked, daemon, loads, settings, simulator

KEY = "acme/x"
EXECUTE = "/api/prompts/execute/stream"
PROMPTS = f"""
[[prompts]]
id = 28
title = "Teste Simples"
model = "{KEY}"
content = "Explain {{{{topic}}}} to a {{{{ who }}}}."
"""
ASKED = {"promptId": 28, "variables": {"topic": "SSE", "who": "nurse"}}


@contextlib.asynccontextmanager
async def front(
    *models: SimModel, server: str = "", prompts: str = PROMPTS, **faults: Any
) -> AsyncIterator[tuple[Daemon, Studio]]:
    """A daemon before a simulator. Whatever the test does: nothing is loaded on demand, nor twice."""
    async with simulator(*(models or (SimModel(KEY, load_seconds=0.2),)), **faults) as upstream:
        async with daemon(settings(upstream.url, KEY, server=server) + prompts) as running:
            yield running, upstream.studio
        begun = [e for e in upstream.studio.log(0) if e["kind"] == "load.started"]
        assert [e for e in begun if e["owner"] == "jit" or e["copies"] > 0] == []
    assert running.status()["models"][0]["in_flight"] == 0
    assert running.status()["models"][0]["waiting"] == 0


async def post(url: str, body: Any, path: str = EXECUTE, **headers: str) -> tuple[int, Any, str]:
    return await asked(url + path, "POST", body, **{"Content-Type": "application/json", **headers})


def events(text: str) -> list[dict[str, Any]]:
    """The events of a whole stream, each of which is one line of data."""
    blocks = [block for block in text.split("\n\n") if block and not block.startswith(":")]
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks), blocks
    return [json.loads(block.removeprefix("data: ")) for block in blocks]


async def test_a_prompt_for_a_cold_model_is_told_of_the_load_and_then_streams() -> None:
    async with front(SimModel(KEY, load_seconds=2.5)) as (running, studio):
        status, headers, text = await post(running.url, {**ASKED, "maxTokens": 4})
        told = events(text)

        assert status == 200
        assert headers["Content-Type"] == "text/event-stream"
        assert headers["Cache-Control"] == "no-cache"
        assert headers["X-Accel-Buffering"] == "no"
        assert told[0] == {
            "type": "start",
            "promptId": 28,
            "promptTitle": "Teste Simples",
            "modelId": KEY,
            "modelName": KEY,
            "lmStudioModelId": KEY,
        }
        loading = [event for event in told if event["type"] == "model_loading"]
        assert len(loading) >= 2
        assert loading[-1]["message"] == "Loading acme/x"
        assert loading[-1]["elapsed"] > loading[-2]["elapsed"]
        assert told[-5:-1] == [
            {"type": "chunk", "content": "This", "chunkNumber": 1},
            {"type": "chunk", "content": " answer", "chunkNumber": 2},
            {"type": "chunk", "content": " comes", "chunkNumber": 3},
            {"type": "chunk", "content": " from", "chunkNumber": 4},
        ]
        assert told[-1]["type"] == "done"
        assert (told[-1]["totalChunks"], told[-1]["outputLength"]) == (4, 22)
        assert told[-1]["duration"] >= 2000
        assert loads(studio) == 1


async def test_the_configured_prompts_are_listed_with_their_variables() -> None:
    async with front() as (running, _):
        status, _, text = await asked(running.url + "/api/prompts")

        assert status == 200
        assert json.loads(text) == {
            "success": True,
            "data": [
                {
                    "id": 28,
                    "title": "Teste Simples",
                    "model": KEY,
                    "variables": ["topic", "who"],
                    "maxTokens": None,
                }
            ],
        }


async def test_a_model_is_warmed_up_on_demand() -> None:
    async with front() as (running, studio):
        status, _, text = await post(running.url, {"modelId": KEY}, "/api/models/warmup")
        answer = json.loads(text)

        assert status == 200
        assert answer["success"] is True
        assert answer["data"]["modelId"] == KEY
        assert answer["data"]["warmupDuration"] >= 0
        assert loads(studio) == 1


# --- from the status page -------------------------------------------------------------------------


async def test_the_admin_address_leads_on_to_the_client_address() -> None:
    async with front() as (running, _):
        status, headers, text = await post(running.admin_url, {**ASKED, "maxTokens": 3})
        listed = await asked(running.admin_url + "/api/prompts")
        warmed = await post(running.admin_url, {"modelId": KEY}, "/api/models/warmup")
        wrong = await post(running.admin_url, {"promptId": 29})

        assert status == 200
        assert headers["Content-Type"] == "text/event-stream"
        assert headers["X-Accel-Buffering"] == "no"
        assert headers["Content-Security-Policy"].startswith("default-src 'self'")
        assert [e["content"] for e in events(text) if e["type"] == "chunk"] == ["This", " answer", " comes"]
        assert events(text)[-1]["type"] == "done"
        assert json.loads(listed[2])["data"][0]["variables"] == ["topic", "who"]
        assert json.loads(warmed[2])["data"]["modelId"] == KEY
        assert wrong[0] == 404
        assert json.loads(wrong[2])["error"]["code"] == "prompt_not_found"


@pytest.mark.parametrize("listen", ["0.0.0.0:0", "[::]:0", "localhost:0"])
async def test_the_admin_address_finds_the_client_address_wherever_it_listens(listen: str) -> None:
    async with simulator(SimModel(KEY)) as upstream:
        text = settings(upstream.url, KEY).replace('listen = "127.0.0.1:0"', f'listen = "{listen}"', 1)
        async with daemon(text + PROMPTS) as running:
            status, _, text = await post(running.admin_url, {**ASKED, "maxTokens": 1})

    assert status == 200
    assert events(text)[-1]["type"] == "done"


async def test_the_status_page_needs_no_key_of_the_client_address() -> None:
    auth = '[auth]\nclient_keys = [{ name = "page", env = "WARD" }]\n'
    async with simulator(SimModel(KEY)) as upstream:
        text = settings(upstream.url, KEY) + PROMPTS + auth
        async with daemon(text, environ={"WARD": "s3cret-of-the-ward"}) as running:
            status, _, answer = await post(running.admin_url, {**ASKED, "maxTokens": 1})
            without = await post(running.url, ASKED)
            own = await post(
                running.url, {**ASKED, "maxTokens": 1}, Authorization="Bearer s3cret-of-the-ward"
            )

    assert status == 200
    assert events(answer)[-1]["type"] == "done"
    assert without[0] == 401
    assert without[1]["WWW-Authenticate"] == "Bearer"
    assert json.loads(without[2])["error"]["code"] == "invalid_api_key"
    assert own[0] == 200


@pytest.mark.parametrize("path", [EXECUTE, "/api/models/warmup"])
@pytest.mark.parametrize(
    "headers",
    [{"Origin": "https://evil.example"}, {"Sec-Fetch-Site": "cross-site"}, {"Host": "evil.example"}],
    ids=lambda headers: next(iter(headers)),
)
async def test_a_foreign_page_gets_nowhere_through_the_admin_address(
    path: str, headers: dict[str, str]
) -> None:
    async with front() as (running, studio):
        before = len(studio.log(0))
        status, _, text = await post(running.admin_url, {**ASKED, "modelId": KEY}, path, **headers)

        assert status == 403
        assert json.loads(text)["error"]["code"] == "forbidden"
        asked_for = [e for e in studio.log(before) if e["kind"] == "request" and e["route"] == "chat"]
        assert [e for e in asked_for if e["max_tokens"] != 1] == []


async def test_the_admin_address_bounds_what_is_sent_through_it() -> None:
    async with front() as (running, _):
        body = {"prompt": "x" * 2**21, "model": KEY}
        status, _, text = await post(running.admin_url, body)

        assert status == 413
        assert json.loads(text)["error"]["code"] == "request_entity_too_large"
