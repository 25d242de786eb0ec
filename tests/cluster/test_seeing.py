"""What a member makes of what it is told, no real etcd asked."""

import asyncio
import time
from dataclasses import replace
from typing import Any

from aiohttp import web

from keepalive.cluster import rows
from keepalive.cluster.etcd import Access, Etcd
from keepalive.cluster.member import Cluster, Self
from keepalive.core.apply import apply
from keepalive.core.facts import ModelId
from keepalive.core.records import Model, Snapshot
from tests.kit.live import until
from tests.kit.models import GEMMA, a_model, warm

HELD = rows.Row(rows.holder_key("local"), rows.holder_row("b", "life"), 1)
YIELD = rows.Row(rows.yield_key(GEMMA), rows.holder_row("b", "life"), 2)


class Records:
    """As much of a keeper as a picture is told to."""

    def __init__(self, *models: Model) -> None:
        self.models = {model.id: model for model in models}

    def record(self, fact: Any, /) -> None:
        self.models[fact.model] = apply(self.models[fact.model], fact)

    def snapshot(self) -> Snapshot:
        return Snapshot(50.0, (), tuple(self.models.values()))

    def tick(self) -> None: ...

    def reconsider(self) -> None: ...


def a_member(keeping: Records, url: str = "", *, told: list[str] | None = None, ttl: float = 10.0) -> Cluster:
    told = [] if told is None else told
    return Cluster(
        Etcd([url], Access(), 5.0),
        Self("ward", "a", "host", "1"),
        ttl,
        lambda: keeping,
        time.monotonic,
        time.monotonic,
        lambda event, *, well, **fields: told.append(event),
    )


def test_what_is_let_go_no_more_is_given_again_though_the_config_was_read_anew_just_then():
    keeping = Records(warm())
    cluster = a_member(keeping)
    cluster._see(rows.picture([HELD, YIELD]))
    assert not keeping.models[GEMMA].given

    qwen = ModelId("local", "qwen")
    keeping.models[qwen] = replace(a_model(), id=qwen)
    cluster._see(rows.picture([HELD]))

    assert keeping.models[GEMMA].given


async def test_an_etcd_that_renews_a_lease_and_shows_nothing_counts_as_away_and_is_not_told_again_and_again():
    async def answer(request: web.BaseRequest) -> web.Response:
        if request.path == "/v3/lease/grant":
            return web.json_response({"ID": "7"})
        if request.path == "/v3/lease/keepalive":
            return web.json_response({"result": {"TTL": "5"}})
        return web.json_response({"error": "etcdserver: permission denied", "code": 7}, status=403)

    runner = web.ServerRunner(web.Server(answer))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0][:2]
    told: list[str] = []
    cluster = a_member(Records(warm()), f"http://{host}:{port}", told=told, ttl=0.3)
    running = asyncio.create_task(cluster.run())
    try:
        why, _ = await until(lambda: cluster.hopeless("local"), "callers are told that there is no hope")
        assert why.endswith("says: permission denied")
        assert not cluster.engine_up
        assert sorted(told) == ["cluster.engine_down", "cluster.row_failed"]
    finally:
        running.cancel()
        await asyncio.wait([running])
        await cluster.close()
        await runner.cleanup()
