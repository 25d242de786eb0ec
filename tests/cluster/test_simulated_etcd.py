"""What the simulation's etcd answers is what a real one does."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from keepalive.cluster.etcd import (
    Access,
    Answer,
    EngineError,
    Etcd,
    Transport,
    created,
    delete,
    put,
    unchanged,
)
from tests.kit import etcd as kit
from tests.kit.etcd import needs_etcd
from tests.kit.live import until
from tests.kit.simulated_etcd import SimulatedEtcd

PREFIX = "/keepalive/ward/"


class Straight:
    """To a simulated etcd, without anything on the way."""

    def __init__(self, etcd: SimulatedEtcd) -> None:
        self.etcd = etcd

    @asynccontextmanager
    async def post(
        self, url: str, body: Any, headers: Mapping[str, str], connect: float, /
    ) -> AsyncIterator[Answer]:
        path = url.removeprefix("http://x")
        if path == "/v3/watch":
            told: asyncio.Queue[bytes | None] = asyncio.Queue()
            self.etcd.watch("http://x", body, told.put_nowait)
            yield Answer(200, lines(told))
        else:
            status, said = self.etcd.answer(path, body)
            yield Answer(status, once(json.dumps(said).encode()))

    async def close(self) -> None: ...


async def once(content: bytes) -> AsyncIterator[bytes]:
    yield content


async def lines(told: "asyncio.Queue[bytes | None]") -> AsyncIterator[bytes]:
    while (line := await told.get()) is not None:
        yield line


async def asked(engine: Etcd) -> list[Any]:
    """What a member asks, and what it is told; revisions as how far they are from the first."""
    told: list[Any] = []
    heard = 0

    async def watch() -> None:
        nonlocal heard
        async for _ in engine.watch(PREFIX):
            heard += 1

    async def rows() -> None:
        found = [(r.key, r.value, r.created - first, r.modified - first) for r in await engine.rows(PREFIX)]
        told.append(found)

    async def commit(compare: list[Any], changes: list[Any]) -> None:
        try:
            told.append(await engine.commit(compare, changes))
        except EngineError as error:
            told.append(str(error).partition(" says: ")[2])

    key = PREFIX + "holders/local"
    await engine.commit([], [put(PREFIX + "a", b"\xff")])
    first = (await engine.rows(PREFIX))[0].created
    await rows()
    lease = await engine.grant(60)
    told.append(await engine.renew(lease))
    await commit([created(key, 0)], [put(key, b"x", lease)])
    await commit([created(key, 0)], [put(key, b"y", lease)])
    await rows()
    here = next(r for r in await engine.rows(PREFIX) if r.key == "holders/local")
    await commit([created(key, here.created)], [put(PREFIX + "b", b"1"), delete(PREFIX + "a")])
    await commit([unchanged(key, here.modified)], [put(key, b"z", lease)])
    await commit([unchanged(key, here.modified)], [delete(key)])
    await rows()
    watching = asyncio.create_task(watch())
    await until(lambda: heard == 1, "the watch stands")
    await commit([], [put("/keepalive/warden", b"another one's")])
    await engine.revoke(lease)
    await until(lambda: heard > 1, "what went with its lease is told")
    watching.cancel()
    await rows()
    told.append(await engine.renew(lease))
    await commit([], [put(PREFIX + "c", b"1"), put(key, b"x", lease)])
    await commit([unchanged(key, 0), created(PREFIX + "a", 0)], [delete(PREFIX + "b")])
    await rows()
    return told


def engine(url: str, transport: Transport | None = None) -> Etcd:
    return Etcd([url], Access(), 20.0, transport)


@needs_etcd
@pytest.mark.xdist_group("etcd")
async def test_the_simulated_one_answers_as_a_real_one(tmp_path: Path):
    simulated = SimulatedEtcd(["http://x"])
    with kit.etcd(tmp_path) as server:
        real = engine(server.url)
        told = await asked(real)
        await real.close()

    assert await asked(engine("http://x", Straight(simulated))) == told
    assert len(told) == 15
    simulated.stop()
