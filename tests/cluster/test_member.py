"""Several daemons as one, with a real etcd and LM Studio's own log as judge."""

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from keepalive.cluster import rows
from keepalive.cluster.etcd import Access, Etcd, delete, put
from keepalive.core.facts import DrainStarted, LoadProgressed, LoadStarted, ModelId
from keepalive.service import platform
from keepalive.service.daemon import Daemon
from keepalive.simulator.models import SimModel
from keepalive.simulator.server import Server
from tests.cluster.test_seeing import Records, a_member
from tests.kit import etcd as kit
from tests.kit.etcd import needs_etcd
from tests.kit.live import asked, daemon, let_it_load, loads, model, reserved_port, settings, simulator, until
from tests.kit.models import after, cold

GEMMA = SimModel("gemma", size_bytes=2_000_000_000, load_seconds=0.3)
SLOW = SimModel("gemma", size_bytes=2_000_000_000, load_seconds=600.0)
GEMMA_THERE = ModelId("local", "gemma")
AUTO = 'key = "gemma"\nkeep = "auto"'

pytestmark = [needs_etcd, pytest.mark.xdist_group("etcd")]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[kit.Etcd]:
    with kit.etcd(tmp_path_factory.mktemp("etcd")) as running:
        yield running


def member(engine: str, cluster: str, instance: str, ttl: str = "60s") -> str:
    return f'\n[cluster]\netcd = "{engine}"\nname = "{cluster}"\ninstance = "{instance}"\nttl = "{ttl}"\n'


@contextlib.asynccontextmanager
async def members(
    studio: Server, engine: str, cluster: str, *names: str, table: str = "gemma", ttl: str = "60s"
) -> AsyncIterator[list[Daemon]]:
    """They start at once."""
    async with contextlib.AsyncExitStack() as stack:
        contexts = [
            daemon(settings(studio.url, table) + member(engine, cluster, name, ttl)) for name in names
        ]
        yield list(await asyncio.gather(*map(stack.enter_async_context, contexts)))


def holds(running: Daemon) -> bool:
    assert running.cluster is not None
    return running.cluster.acts("local")


async def holder(running: list[Daemon]) -> tuple[Daemon, Daemon]:
    """Who acts, and another one, once they agree."""
    await until(lambda: sum(map(holds, running)) == 1, "one of them acts")
    first = next(one for one in running if holds(one))
    return first, next(one for one in running if one is not first)


async def warm(*running: Daemon) -> None:
    await until(lambda: all(model(one, "gemma")["state"] == "warm" for one in running), "it is warm for all")


async def chat(running: Daemon, key: str = "gemma") -> tuple[int, str]:
    body = {"model": key, "messages": [{"role": "user", "content": "hello"}]}
    status, _, text = await asked(f"{running.url}/v1/chat/completions", "POST", body)
    return status, text


def happened(studio: Server, *kinds: str) -> list[str]:
    return [event["kind"] for event in studio.studio.log(0) if event["kind"] in kinds]


async def test_three_that_start_at_once_load_it_once_and_all_serve_it(server: kit.Etcd):
    async with simulator(GEMMA) as studio, members(studio, server.url, "once", "a", "b", "c") as running:
        await warm(*running)

        assert [status for status, _ in await asyncio.gather(*map(chat, running))] == [200] * 3
        assert sum(map(holds, running)) == 1
        assert loads(studio.studio) == 1


async def test_where_nobody_sees_what_is_loaded_all_serve_what_the_holder_has_proved_also_who_comes_later(
    server: kit.Etcd,
):
    async with simulator(GEMMA) as studio:
        studio.studio.set_tier("openai")
        async with members(studio, server.url, "unseen", "a") as first:
            await warm(*first)
            async with members(studio, server.url, "unseen", "b") as later:
                await warm(*later)

                assert (await chat(later[0]))[0] == 200
                assert (holds(first[0]), holds(later[0])) == (True, False)
                assert loads(studio.studio) == 1


async def test_who_does_not_hold_it_has_it_loaded_by_who_does_and_its_caller_notices_nothing(
    server: kit.Etcd,
):
    async with (
        simulator(GEMMA) as studio,
        members(studio, server.url, "asks", "a", "b", table=AUTO) as running,
    ):
        first, other = await holder(running)
        assert loads(studio.studio) == 0

        status, text = await chat(other)

        assert (status, loads(studio.studio)) == (200, 1), text
        assert model(first, "gemma")["loads"] == 1
        assert model(other, "gemma")["loads"] == 0


async def test_how_far_a_load_is_and_when_it_should_be_done_is_seen_at_whoever_does_not_load_it(
    server: kit.Etcd,
):
    async with simulator(SLOW) as studio, members(studio, server.url, "far", "a", "b") as running:
        _, other = await holder(running)

        loading = await until(lambda: model(other, "gemma")["load"], "the other sees the load")
        studio.studio.advance(300)
        await until(lambda: (model(other, "gemma")["load"] or {}).get("progress"), "and how far it is")

        assert loading["attempt"] == 1
        assert model(other, "gemma")["state"] == "loading"
        studio.studio.advance(600)
        await warm(*running)


async def test_warm_and_release_count_for_all_whoever_was_told(server: kit.Etcd):
    async with (
        simulator(GEMMA) as studio,
        members(
            studio, server.url, "wishes", "a", "b", table='key = "gemma"\nwindow = "Mon 00:00-00:01"'
        ) as running,
    ):
        first, other = await holder(running)
        assert (await asked(f"{other.admin_url}/api/models/gemma/warm", "POST"))[0] == 202
        await warm(*running)
        assert (await asked(f"{other.admin_url}/api/models/gemma/release", "POST"))[0] == 202

        await until(lambda: not model(first, "gemma")["wanted"], "the holder knows that it is released")
        assert loads(studio.studio) == 1


async def test_what_is_used_through_one_is_not_let_go_by_another(server: kit.Etcd):
    idle = AUTO + '\nidle = "1s"'
    async with (
        simulator(GEMMA, token_seconds=0.03) as studio,
        members(studio, server.url, "used", "a", "b", table=idle, ttl="3s") as running,
    ):
        first, other = await holder(running)
        # Its answer takes longer than it may lie idle.
        assert (await chat(other))[0] == 200
        ids = [
            e["kind"] for e in studio.studio.log(0) if e["kind"] in ("load.started", "unloaded", "evicted")
        ]

        assert ids == ["load.started"]
        # Nobody uses it any more: then it goes, by the hand of the holder.
        await until(lambda: model(first, "gemma")["instances"] == 0, "it is let go")
        await until(lambda: model(other, "gemma")["state"] == "cold", "which the other sees")
        assert model(other, "gemma")["evictions"] == 0


async def test_before_room_is_made_all_others_have_said_that_they_give_it_to_nobody(server: kit.Etcd):
    rival = SimModel("rival", size_bytes=2_000_000_000, load_seconds=0.3)
    tables = (AUTO, AUTO.replace("gemma", "rival"))
    async with simulator(GEMMA, rival, token_seconds=0.01) as studio, contextlib.AsyncExitStack() as stack:
        texts = [
            settings(studio.url, *tables, upstream='memory = "3GB"') + member(server.url, "room", name, "3s")
            for name in ("a", "b")
        ]
        running = [await stack.enter_async_context(daemon(text)) for text in texts]
        first, other = await holder(running)
        yielded = Yielded()
        other.keeper._observers = (*other.keeper._observers, yielded)
        assert (await chat(other))[0] == 200
        # One takes it from the other, who comes for it again and again at whichever daemon.
        answers = await asyncio.gather(chat(first, "rival"), again(other, "gemma"), again(other, "rival"))

        statuses = [answers[0][0], *(status for some in answers[1:] for status, _ in some)]
        unloaded = [event for event in studio.studio.log(0) if event["kind"] == "unloaded"]
        assert set(statuses) == {200}
        assert unloaded
        assert all(not event["generating"] for event in unloaded)
        assert yielded.seen


@pytest.mark.parametrize(
    ("use", "may_go"),
    [
        (rows.Use(yielded=True), True),
        (rows.Use(used=True, yielded=True), False),
        (rows.Use(waiting=1, yielded=True), False),
    ],
)
async def test_what_another_gives_to_nobody_stays_while_somebody_there_has_it_still(
    server: kit.Etcd, use: rows.Use, may_go: bool
):
    cluster = f"clear-{use.used:d}{use.waiting:d}"
    engine = Etcd([server.url], Access(), timeout=20)
    async with simulator(GEMMA) as studio, members(studio, server.url, cluster, "a") as (running,):
        assert running.cluster is not None
        await warm(running)
        model_there = running.keeper.snapshot().models[0]
        prefix = f"/keepalive/{cluster}/"
        other = {
            rows.member_key("b"): rows.member_row(rows.Member("b", "life")),
            rows.uses_key("b"): rows.uses_row({model_there.id: use}),
        }
        await engine.commit([], [put(prefix + key, value) for key, value in other.items()])

        assert await running.cluster.clear(model_there) is may_go
    await engine.close()


async def test_what_was_written_since_the_last_look_keeps_nothing_else_from_being_written(server: kit.Etcd):
    now = 100.0
    half = after(cold(), LoadStarted(10, GEMMA_THERE), LoadProgressed(20, GEMMA_THERE, 0.2))
    keeping = Records(half)
    engine = Etcd([server.url], Access(), timeout=20)
    holding = a_member(keeping, server.url, cluster="since", awake=lambda: now)
    holding._grounds.lease, holding._grounds.life = await engine.grant(60), "life"
    prefix = "/keepalive/since/"
    begun = {
        rows.holder_key("local"): rows.holder_row("a", "life"),
        rows.load_key(GEMMA_THERE): rows.load_row(rows.Intent("a", "life", 0)),
    }
    await engine.commit([], [put(prefix + key, value) for key, value in begun.items()])
    holding._seeing.see(rows.picture(await engine.rows(prefix)))
    since = holding.picture.holders["local"].created
    await holding._writing._publish_state("local", since, keeping.snapshot())
    # It is further before it was looked at again; and something has failed meanwhile.
    now = 110.0
    keeping.models[GEMMA_THERE] = replace(half, progress=0.4, failures=7)
    await holding._writing._publish_state("local", since, keeping.snapshot())

    found = rows.picture(await engine.rows(prefix))
    assert found.states["local"][GEMMA_THERE].failures == 7
    assert found.loads[GEMMA_THERE].progress == 0.2
    await engine.close()
    await holding.close()


class Yielded:
    """Sees that a model is given to nobody any more."""

    seen = False

    def observe(self, fact: Any, before: Any, after: Any) -> None:
        self.seen = self.seen or isinstance(fact, DrainStarted)


async def again(running: Daemon, key: str) -> list[tuple[int, str]]:
    return [await chat(running, key) for _ in range(2)]


async def test_without_etcd_what_is_warm_is_served_and_nothing_is_loaded_and_with_it_all_goes_on(
    tmp_path: Path,
):
    with kit.etcd(tmp_path) as server:
        async with (
            simulator(SLOW) as studio,
            members(studio, server.url, "away", "a", "b", ttl="3s") as running,
        ):
            first, other = await holder(running)
            await let_it_load(studio.studio)
            await warm(*running)
            server.kill()
            await until(lambda: not any(map(holds, running)), "nobody may act by his own clock")

            assert [status for status, _ in await asyncio.gather(*map(chat, running))] == [200] * 2
            assert [(await asked(f"{one.admin_url}/readyz"))[0] for one in running] == [200] * 2
            studio.studio.evict("gemma")
            await until(lambda: all(model(one, "gemma")["state"] == "cold" for one in running), "it is lost")
            status, text = await chat(running[0])

            answers = [await asked(f"{one.admin_url}/readyz") for one in running]
            assert [answer[0] for answer in answers] == [503] * 2
            said = [json.loads(answer[2])["not_ready"][0]["reason"] for answer in answers]
            assert all(one.startswith("nothing is loaded or unloaded, because etcd at ") for one in said)
            assert status == 503
            assert "nothing is loaded or unloaded, because etcd at " in text
            assert loads(studio.studio) == 1
            assert running[0].status()["cluster"]["engine"]["up"] is False
            # A person knows that no other loads it; whoever acts when etcd is back hears of that before it does.
            warmed = f"{other.admin_url}/api/models/gemma/warm?without_engine=1"
            assert (await asked(warmed, "POST"))[0] == 202
            await until(lambda: loads(studio.studio) == 2, "it is loaded, whoever acts")
            server.start()
            await until(lambda: any(map(holds, running)), "somebody acts again")
            assert first.cluster is not None
            assert other.cluster is not None
            known = first.cluster.picture.loads.values()
            assert [intent.instance for intent in known] == [other.cluster.instance]
            assert [model(one, "gemma")["state"] for one in running] == ["loading", "loading"]
            await let_it_load(studio.studio)
            await warm(*running)
            assert loads(studio.studio) == 2
            studio.studio.evict("gemma")
            await until(lambda: loads(studio.studio) == 3, "it is lost again, and loaded")
            await let_it_load(studio.studio)
            await warm(*running)
            await until(lambda: not first.cluster.picture.loads, "no load is left")


async def test_of_three_members_of_etcd_the_leader_may_be_killed(tmp_path: Path):
    with kit.three(tmp_path) as engines:
        urls = ", ".join(one.url for one in engines)
        async with simulator(GEMMA) as studio, members(studio, urls, "three", "a", "b", ttl="20s") as running:
            await warm(*running)
            first, _ = await holder(running)
            next(one for one in engines if one.leads()).kill()
            studio.studio.evict("gemma")
            await until(lambda: loads(studio.studio) == 2, "it is loaded anew")
            await warm(*running)

            assert holds(first)
            assert all(one.status()["cluster"]["engine"]["up"] for one in running)


def metrics(running: Daemon) -> list[str]:
    lines = running.metrics("")[0].decode().splitlines()
    seconds = "keepalive_cluster_engine_renewal_seconds"
    return [line for line in lines if line.startswith("keepalive_cluster") and not line.startswith(seconds)]


async def test_each_of_them_shows_all_of_them(server: kit.Etcd):
    async with simulator(GEMMA) as studio:
        texts = [
            settings(studio.url.replace("127.0.0.1", host), f'key = "gemma"\ncontext_length = {length}')
            + member(server.url, "shows", name)
            for name, length, host in (("a", 4096, "127.0.0.1"), ("b", 8192, "localhost"))
        ]
        async with daemon(texts[0]) as a, daemon(texts[1]) as b:
            await warm(a, b)
            await until(
                lambda: all(len(one.status()["cluster"]["members"]) == 2 for one in (a, b)), "all are seen"
            )
            shown = b.status()["cluster"]
            first, other = await holder([a, b])
            found = json.loads((await asked(f"{a.admin_url}/api/targets"))[2])

            assert shown["holders"] == {"local": first.status()["cluster"]["instance"]}
            here = f"{studio.url.rpartition(':')[2]} of {socket.gethostname()}"
            assert shown["differences"] == [
                f"a reaches local at http://127.0.0.1:{here}, b at http://localhost:{here}",
                'a loads gemma on local with keep "always", context_length 4096, '
                'b with keep "always", context_length 8192',
            ]
            assert [(one["targets"], one["labels"]["__meta_keepalive_instance"]) for one in found] == [
                ([a.admin_url.removeprefix("http://")], "a"),
                ([b.admin_url.removeprefix("http://")], "b"),
            ]
            assert metrics(first) == [
                "keepalive_cluster_engine_up 1.0",
                'keepalive_cluster_member_up{instance="a"} 1.0',
                'keepalive_cluster_member_up{instance="b"} 1.0',
                'keepalive_cluster_holds_lease{upstream="local"} 1.0',
                'keepalive_cluster_handovers_total{upstream="local"} 0.0',
            ]
            assert 'keepalive_cluster_holds_lease{upstream="local"} 0.0' in metrics(other)


async def test_a_lone_daemon_shows_nothing_of_a_cluster_and_is_a_target_of_its_own():
    async with simulator(GEMMA) as studio, daemon(settings(studio.url, "gemma")) as running:
        found = json.loads((await asked(f"{running.admin_url}/api/targets"))[2])

        assert found == [{"targets": [running.admin_url.removeprefix("http://")], "labels": {}}]
        assert "cluster" not in running.status()
        assert metrics(running) == []


@pytest.mark.parametrize("ahead", [pytest.param(3600.0, id="ahead"), pytest.param(-3600.0, id="behind")])
async def test_clocks_that_differ_by_an_hour_change_nothing(
    server: kit.Etcd, monkeypatch: pytest.MonkeyPatch, ahead: float
):
    awake = platform.awake
    async with simulator(GEMMA) as studio, contextlib.AsyncExitStack() as stays:
        cluster = "ahead" if ahead > 0 else "behind"
        a, b = (settings(studio.url, AUTO) + member(server.url, cluster, name) for name in ("a", "b"))
        async with daemon(a) as first:
            await until(lambda: holds(first), "the first one acts")
            # That of the day, and the one by which it counts its lease.
            monkeypatch.setattr(platform, "awake", lambda: awake() + ahead)
            other = await stays.enter_async_context(daemon(b, wall=lambda: time.time() + ahead))
            assert (await chat(other))[0] == 200
            await warm(first, other)
            assert (holds(first), holds(other), loads(studio.studio)) == (True, False, 1)
        await until(lambda: holds(other), "the other one acts")
        assert (await chat(other))[0] == 200
        studio.studio.evict("gemma")
        await until(lambda: model(other, "gemma")["state"] == "cold", "it is missed")
        assert (await chat(other))[0] == 200

        assert happened(studio, "load.started", "unloaded", "evicted") == [
            "load.started",
            "evicted",
            "load.started",
        ]


async def test_two_of_one_name_are_told_so_and_what_the_callers_of_both_use_is_known(server: kit.Etcd):
    async with (
        simulator(GEMMA) as studio,
        members(studio, server.url, "twins", "a", "a", ttl="3s") as running,
    ):
        await warm(*running)
        first, other = await holder(running)
        assert first.cluster is not None
        assert other.cluster is not None
        await until(lambda: any(one.cluster and one.cluster.doubled for one in running), "one is told")
        await until(lambda: all(one.status()["cluster"]["differences"] for one in running), "all say so")
        here = socket.gethostname()

        said = f"two daemons go by the name 'a', on {here} and on {here}"
        assert [one.status()["cluster"]["differences"] for one in running] == [[said]] * 2
        assert len(first.status()["cluster"]["members"]) == 2
        assert len(json.loads((await asked(f"{first.admin_url}/api/targets"))[2])) == 2
        # Whoever acts is to know what the other one's callers use.
        seen = first.cluster
        while not seen.picture.uses_elsewhere(seen._grounds.name).get(GEMMA_THERE, rows.Use()).used:
            assert (await chat(other))[0] == 200
        assert loads(studio.studio) == 1


async def test_whoever_starts_again_while_its_last_life_is_not_forgotten_takes_part_at_once(server: kit.Etcd):
    engine = Etcd([server.url], Access(), timeout=20)
    last = "/keepalive/again/" + rows.member_key("a")
    await engine.commit([], [put(last, rows.member_row(rows.Member("a", "last life", "vm")))])
    async with (
        simulator(SLOW) as studio,
        members(studio, server.url, "again", "a", "b") as (running, other),
    ):
        assert running.cluster is not None
        assert other.cluster is not None
        held = asyncio.create_task(chat(running))
        seen = other.cluster
        await until(
            lambda: seen.picture.uses_elsewhere("b").get(GEMMA_THERE, rows.Use()).waiting,
            "its caller is seen",
        )
        names = [member["instance"] for member in other.status()["cluster"]["members"]]
        await engine.commit([], [delete(last)])
        await until(lambda: sorted(seen.picture.members) == ["a", "b"], "it has its name")

        await let_it_load(studio.studio)
        assert (await held)[0] == 200
        assert names == ["a", "b"]
        assert not running.cluster.doubled
        assert seen.picture.members["a"].life == running.cluster._grounds.life
    await engine.close()


async def test_garbage_under_our_prefix_hurts_nobody(server: kit.Etcd):
    engine = Etcd([server.url], Access(), timeout=30)
    prefix = "/keepalive/garbage/"
    rows = {
        "members/x": b"\xff",
        "uses/x": b"[]",
        "states/local": b"x" * 700_000,
        "wishes/local/gemma": b"{}",
    }
    await engine.commit([], [put(prefix + key, value) for key, value in rows.items()])
    await engine.close()
    async with simulator(GEMMA) as studio, members(studio, server.url, "garbage", "a", "b") as running:
        await warm(*running)

        assert loads(studio.studio) == 1


async def test_an_etcd_that_is_none_costs_nobody_what_is_warm():
    with reserved_port() as port:
        async with simulator(GEMMA) as studio:
            await asked(f"{studio.url}/api/v1/models/load", "POST", {"model": "gemma"})
            async with members(studio, f"http://127.0.0.1:{port}", "none", "a", ttl="3s") as [running]:
                await warm(running)

                assert (await chat(running))[0] == 200
                assert not holds(running)
                assert loads(studio.studio) == 1
