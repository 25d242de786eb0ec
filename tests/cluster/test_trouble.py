"""An etcd in trouble: slow, full, compacted, emptied, closed to us, none at all. No second load, no watch that is lost,
nobody who spins, and what is warm is served.
"""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from aiohttp import web

from keepalive.cluster.etcd import Access, EngineError, Etcd, delete, put
from keepalive.core.facts import ModelId
from keepalive.service.daemon import Daemon
from keepalive.simulator.server import Server
from tests.cluster.test_etcd import needs_openssl
from tests.cluster.test_member import AUTO, GEMMA, SLOW, chat, holder, holds, member, members, warm
from tests.kit import etcd as kit
from tests.kit.etcd import needs_etcd
from tests.kit.live import ask, asked, daemon, let_it_load, loads, model, settings, simulator, until
from tests.kit.raw import PASS, Fault, Middleman

pytestmark = [needs_etcd, pytest.mark.xdist_group("etcd in trouble")]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[kit.Etcd]:
    with kit.etcd(tmp_path_factory.mktemp("etcd")) as running:
        yield running


@asynccontextmanager
async def engine(server: kit.Etcd) -> AsyncIterator[Etcd]:
    made = Etcd([server.url], Access(), timeout=30)
    try:
        yield made
    finally:
        await made.close()


def served(server: kit.Etcd, *methods: str) -> int:
    """How many calls of these kinds etcd has had."""
    text = ask(f"{server.url}/metrics")[2]
    found = re.findall(r'grpc_server_started_total\{grpc_method="(\w+)".*\} (\S+)', text)
    return int(sum(float(count) for method, count in found if method in methods))


async def somebody_loaded(studio: Server) -> None:
    assert (await asked(f"{studio.url}/api/v1/models/load", "POST", {"model": "gemma"}))[0] == 200


def trouble(running: Daemon) -> str:
    return str(running.status()["cluster"]["engine"]["error"])


async def test_an_emptied_etcd_is_told_of_loads_before_anybody_acts_there(tmp_path: Path):
    # Its listing shows no load under way, so that only the two of them know of this one.
    with kit.etcd(tmp_path) as server:
        async with (
            simulator(SLOW, v0_shows_loading=False) as studio,
            members(studio, server.url, "emptied", "a", "b", ttl="3s") as running,
        ):
            first, other = await holder(running)
            assert first.cluster is not None
            assert other.cluster is not None
            await until(lambda: other.cluster.picture.loads, "the other knows of the load")
            assert (await asked(f"{first.admin_url}/api/models/gemma/warm", "POST"))[0] == 202
            await until(lambda: other.cluster.picture.wishes, "and of a wish")
            first.cluster.leaving = True  # so that it is the other one who acts then

            await asyncio.to_thread(server.lose_everything)
            await until(lambda: holds(other), "the other acts")

            seen = other.cluster.picture
            assert [seen.loads.keys(), seen.wishes.keys()] == [{ModelId("local", "gemma")}] * 2
            assert [model(one, "gemma")["state"] for one in running] == ["loading"] * 2
            await let_it_load(studio.studio)
            await warm(*running)
            await until(lambda: not other.cluster.picture.loads, "the load is no longer there")
            assert loads(studio.studio) == 1


async def fill(engine: Etcd) -> None:
    for n in range(9):
        await engine.commit([], [put(f"/other/{n}", b"x" * 400_000)])


async def make_room(engine: Etcd) -> None:
    """As a person does in whose way it is, with etcdctl."""
    await engine.commit([], [delete(f"/other/{n}") for n in range(9)])
    await engine.rows("/other/")
    await engine._call("/v3/kv/compaction", {"revision": str(engine.standing.revision), "physical": True})
    await engine._call("/v3/maintenance/defragment", {})
    [alarm] = (await engine._call("/v3/maintenance/alarm", {"action": "GET"}))["alarms"]
    await engine._call("/v3/maintenance/alarm", {"action": "DEACTIVATE", **alarm})


async def test_a_full_etcd_loads_nothing_and_says_so_until_it_has_room(tmp_path: Path, capsys: Any):
    with kit.etcd(tmp_path, "--quota-backend-bytes", "2000000") as server:
        async with (
            engine(server) as filler,
            simulator(GEMMA) as studio,
            members(studio, server.url, "full", "a", "b", ttl="3s") as running,
        ):
            await warm(*running)
            with pytest.raises(EngineError, match="database space exceeded"):
                await fill(filler)
            studio.studio.evict("gemma")
            await until(lambda: all(model(one, "gemma")["state"] != "warm" for one in running), "it is lost")
            before, began = served(server, "Range", "Txn"), asyncio.get_running_loop().time()
            answers = await asyncio.gather(*map(chat, running))

            assert [status for status, _ in answers] == [503, 503]
            for _, text in answers:
                assert "nothing is loaded or unloaded, because etcd at" in text
                assert "database space exceeded" in text
            seconds = asyncio.get_running_loop().time() - began
            assert served(server, "Range", "Txn") - before < 30 * seconds
            assert loads(studio.studio) == 1
            # It is tried for one lifetime of a lease, and no longer.
            assert not any(map(holds, running))
            assert capsys.readouterr().out.count("cluster.load_put_off") <= 6

            await make_room(filler)
            await warm(*running)
            assert loads(studio.studio) == 2
            await until(lambda: [trouble(one) for one in running] == ["None"] * 2, "all is well for both")


@asynccontextmanager
async def through(middle: Middleman, studio: Server, cluster: str, ttl: str) -> AsyncIterator[list[Daemon]]:
    url = f"http://127.0.0.1:{middle.port}"
    async with members(studio, url, cluster, "a", "b", table=AUTO, ttl=ttl) as running:
        yield running


async def test_an_etcd_that_takes_ten_seconds_for_each_answer_costs_nobody_what_is_warm(server: kit.Etcd):
    async with (
        Middleman(urlsplit(server.url).port or 0) as middle,
        simulator(GEMMA) as studio,
        through(middle, studio, "slow", "3s") as running,
    ):
        await holder(running)
        assert (await chat(running[0]))[0] == 200
        middle.down = Fault(delay=10.0)
        middle.sever()
        await until(lambda: not any(map(holds, running)), "nobody may act by his own clock")
        connections, began = middle.connections, asyncio.get_running_loop().time()
        assert [status for status, _ in await asyncio.gather(*map(chat, running))] == [200] * 2
        studio.studio.evict("gemma")
        await until(lambda: all("not answer within 1 s" in trouble(one) for one in running), "it is told")

        assert loads(studio.studio) == 1
        # For each a renewal, a watch and a look in a second, more or less.
        seconds = asyncio.get_running_loop().time() - began
        assert middle.connections - connections < 30 * seconds + 10
        middle.down = PASS
        middle.sever()
        await holder(running)
        assert (await chat(running[1]))[0] == 200
        assert loads(studio.studio) == 2


async def test_a_load_that_was_written_down_and_never_sent_is_waited_for_by_nobody(server: kit.Etcd):
    async with Middleman(urlsplit(server.url).port or 0) as middle, simulator(GEMMA) as studio:
        texts = [
            settings(studio.url, AUTO) + member(url, "unsent", name, "9s")
            for name, url in (("a", f"http://127.0.0.1:{middle.port}"), ("b", server.url))
        ]
        async with daemon(texts[0]) as a:
            await until(lambda: holds(a), "the first acts")
            async with daemon(texts[1]) as b:
                assert b.cluster is not None
                await until(lambda: len(b.cluster.picture.members) == 2, "the other is there")
                # What it writes arrives, and what etcd says of it does not.
                middle.down = Fault(delay=600.0)
                middle.sever()
                caller = asyncio.create_task(chat(a))
                await until(lambda: b.cluster.picture.loads, "the load is written down")
                await until(lambda: holds(b), "the other acts")
                assert model(b, "gemma")["state"] == "loading"
                middle.down = PASS
                middle.sever()

                # It would be believed in for two minutes by whoever knows no better.
                assert (await caller)[0] == 200
                assert loads(studio.studio) == 1
                await until(lambda: not b.cluster.picture.loads, "nothing is left of it")


async def test_what_changed_and_was_compacted_away_while_a_watch_was_cut_is_seen(server: kit.Etcd):
    prefix = "/keepalive/compacted/"
    async with (
        engine(server) as writer,
        Middleman(urlsplit(server.url).port or 0) as middle,
        simulator(GEMMA) as studio,
        through(middle, studio, "compacted", "12s") as running,
    ):
        _, other = await holder(running)
        assert other.cluster is not None
        await until(lambda: watchers(server) == 2, "both watch")
        middle.refuses = True
        middle.sever()
        for n in range(9):
            await writer.commit([], [put(prefix + "members/x", f'{{"v":1,"life":"{n}"}}'.encode())])
        await writer.rows(prefix)
        await writer._call("/v3/kv/compaction", {"revision": str(writer.standing.revision), "physical": True})
        await until(lambda: watchers(server) == 0, "nobody watches")
        middle.refuses = False

        await until(lambda: "x" in other.cluster.picture.members, "the last of it is seen")
        await until(lambda: watchers(server) == 2, "both watch again")
        await writer.commit([], [delete(prefix + "members/x")])
        await until(lambda: "x" not in other.cluster.picture.members, "and what comes after it is seen")
        assert (await chat(other))[0] == 200
        assert loads(studio.studio) == 1


def watchers(server: kit.Etcd) -> int:
    found = re.search(r"etcd_debugging_mvcc_watcher_total (\d+)", ask(f"{server.url}/metrics")[2])
    assert found is not None
    return int(found[1])


@pytest.mark.filterwarnings("ignore:Sending a large body")
async def test_garbage_in_every_place_and_a_megabyte_of_it_is_named_and_makes_nobody_spin(
    server: kit.Etcd, capsys: Any
):
    prefix, heap = "/keepalive/heaps/", b"x" * 1_000_000
    async with engine(server) as writer, simulator(GEMMA) as studio:
        await somebody_loaded(studio)
        keys = ("members/a", "uses/a", "states/local", "yields/local/gemma", "holders/local")
        for key in keys:
            await writer.commit([], [put(prefix + key, heap if key.startswith("states") else b"\xff")])
        async with members(studio, server.url, "heaps", "a", "b", ttl="3s") as running:
            a, b = running
            await warm(a, b)
            before, began = served(server, "Range", "Txn"), asyncio.get_running_loop().time()
            await until(lambda: a.cluster and a.cluster.doubled, "it is told that its name is taken")

            assert [status for status, _ in await asyncio.gather(*map(chat, running))] == [200] * 2
            seconds = asyncio.get_running_loop().time() - began
            assert served(server, "Range", "Txn") - before < 20 * seconds
            assert not any(map(holds, running))
            said = capsys.readouterr().out
            assert said.count("cluster.row_unreadable") == 2 * len(keys), said[:3000]
            assert said.count("nobody acts there while it stands: delete it") == 2
            assert said.count("goes by that name, too") == 1
            await writer.commit([], [delete(prefix + "holders/local")])
            await until(lambda: any(map(holds, running)), "one of them acts")


async def test_a_web_server_in_its_place_costs_nobody_what_is_warm():
    async def answer(_: web.BaseRequest) -> web.Response:
        return web.Response(text="<html>It works!</html>", content_type="text/html")

    async with kit.in_place_of_etcd(answer) as url, simulator(GEMMA) as studio:
        await somebody_loaded(studio)
        async with members(studio, url, "web", "a", ttl="3s") as [running]:
            await warm(running)
            await until(lambda: "been asked" not in trouble(running), "it has been asked")

            assert (await chat(running))[0] == 200
            assert trouble(running) == f"what listens at {url} does not answer as etcd 3.4 or newer does"
            assert loads(studio.studio) == 1


@needs_openssl
async def test_by_tls_and_a_password_all_goes_on_and_a_wrong_one_is_told_and_shown_nowhere(
    tmp_path: Path, capsys: Any
):
    ours = kit.Authority(tmp_path)
    with kit.secured(tmp_path, ours.signs("good")) as server:
        tls = kit.trusting(ours.ca)
        root = Etcd([server.url], Access(tls=tls), timeout=30)
        for path, body in (
            ("user/add", {"name": "root", "password": "s3cret-right"}),
            ("role/add", {"name": "root"}),
            ("user/grant", {"user": "root", "role": "root"}),
            ("enable", {}),
        ):
            await root._call(f"/v3/auth/{path}", body)
        await root.close()
        async with simulator(GEMMA) as studio, AsyncExitStack() as stack:
            running = []
            for name in ("right", "wrong"):
                (tmp_path / name).write_text(f"s3cret-{name}\n")
                text = settings(studio.url, "gemma") + member(server.url, "secured", name, "60s")
                text += f'user = "root"\npassword_file = "{tmp_path / name}"\nca = "{ours.ca}"\n'
                running.append(await stack.enter_async_context(daemon(text)))
            right, wrong = running
            await warm(right, wrong)
            await until(lambda: "been asked" not in trouble(wrong), "it has been asked")

            assert loads(studio.studio) == 1
            assert [status for status, _ in await asyncio.gather(*map(chat, running))] == [200] * 2
            assert holds(right)
            said = "authentication failed, invalid user ID or password"
            assert trouble(wrong) == f"etcd at {server.url} says: {said}"
            shown = [json.dumps(one.status()) + one.metrics("")[0].decode() for one in running]
            log = capsys.readouterr()
            assert said in log.out
            assert "s3cret" not in "".join(shown) + log.out + log.err
