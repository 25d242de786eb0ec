"""The simulator in process, under a clock that costs nothing: what its tests ask it with."""

import asyncio
import functools
import json
import selectors
from collections.abc import Awaitable, Callable
from typing import Any

from keepalive.simulator.exchange import Reply, Request
from keepalive.simulator.models import SimModel
from keepalive.simulator.studio import Studio

CHAT = SimModel("acme/chat-8b", load_seconds=12.0, max_context_length=32_768)
SMALL = SimModel("acme/small-1b", load_seconds=3.0)
EMBED = SimModel("text-embedding-tiny", kind="embedding", load_seconds=1.0, max_context_length=2_048)


class _Selector(selectors.SelectSelector):
    """Instead of waiting, time passes."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        assert timeout is not None, "deadlock: nothing will ever happen"
        self.now += max(0.0, timeout)
        return super().select(0)


class InstantLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._virtual = _Selector()
        super().__init__(self._virtual)

    def time(self) -> float:
        return self._virtual.now


def simulated(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    @functools.wraps(test)
    def run(**fixtures: Any) -> None:
        with asyncio.Runner(loop_factory=InstantLoop) as runner:
            runner.run(test(**fixtures))  # type: ignore[arg-type]

    return run


def world(**faults: Any) -> Studio:
    return Studio([CHAT, SMALL, EMBED], faults=faults)


def now() -> float:
    return round(asyncio.get_running_loop().time(), 3)


async def get(studio: Studio, path: str, **headers: str) -> Reply:
    return await studio.handle(Request("GET", path, "", headers))


async def post(studio: Studio, path: str, payload: Any = None, **headers: str) -> Reply:
    body = payload if isinstance(payload, bytes) else json.dumps(payload or {}).encode()
    return await studio.handle(Request("POST", path, "", headers, body))


async def chat(studio: Studio, model: str | None = CHAT.key, **fields: Any) -> Reply:
    named = {} if model is None else {"model": model}
    messages = [{"role": "user", "content": "CANARY prompt"}]
    return await post(studio, "/v1/chat/completions", {**named, "messages": messages, **fields})


async def load(studio: Studio, model: str = CHAT.key, /, **fields: Any) -> Reply:
    return await post(studio, "/api/v1/models/load", {"model": model, **fields})


async def listed(studio: Studio) -> list[str]:
    models = (await (await get(studio, "/api/v1/models")).json())["models"]
    return [instance["id"] for model in models for instance in model["loaded_instances"]]


async def v0_states(studio: Studio) -> dict[str, str]:
    rows = (await (await get(studio, "/api/v0/models")).json())["data"]
    return {row["id"]: row["state"] for row in rows}


def kinds(studio: Studio) -> list[str]:
    return [event["kind"] for event in studio.log()]


def events(studio: Studio, kind: str) -> list[dict[str, Any]]:
    return [event for event in studio.log() if event["kind"] == kind]


async def error(reply: Reply) -> Any:
    return (await reply.json())["error"]


async def collect(reply: Reply, got: list[bytes]) -> None:
    assert not isinstance(reply.body, bytes)
    async for piece in reply.body:
        got.append(piece)  # noqa: PERF401 - what came before a cut is what is asked for


def data_lines(body: bytes) -> list[str]:
    return [line[6:] for line in body.decode().split("\n") if line.startswith("data: ")]


def event_names(body: bytes) -> list[str]:
    return [line[7:] for line in body.decode().split("\n") if line.startswith("event: ")]
