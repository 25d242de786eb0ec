"""The streaming prompt API, in the real daemon before a simulated LM Studio, and before scripted ones."""

import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

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
