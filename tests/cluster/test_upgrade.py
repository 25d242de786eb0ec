"""Daemons are upgraded one by one, and back: two releases in one cluster, LM Studio's own log as judge.

The other release is the present one behind a wire that knows only what the release before has written
(`tests/data/cluster/previous.json`), or that says more than this one knows.
"""

import asyncio
import base64
import contextlib
import json
import re
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Any

import pytest

from keepalive.cluster import etcd as engine
from keepalive.cluster.etcd import Answer, Http, Json
from keepalive.service.daemon import Daemon
from keepalive.simulator.models import SimModel
from tests.cluster.test_member import AUTO, SLOW, chat, holds, member
from tests.cluster.test_rows import PREVIOUS
from tests.kit import etcd as kit
from tests.kit.etcd import needs_etcd
from tests.kit.live import asked, daemon, let_it_load, loads, model, settings, simulator, until

pytestmark = [needs_etcd, pytest.mark.xdist_group("etcd")]

Said = dict[str, Any]
Words = Callable[[str, Said], Said]
FIELDS = {key.partition("/")[0]: frozenset(said) for key, said in PREVIOUS.items()}
USE = frozenset(PREVIOUS["uses/a"]["uses"]["local"]["qwen"])
TOLD = frozenset(PREVIOUS["states/local"]["models"]["qwen"])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[kit.Etcd]:
    with kit.etcd(tmp_path_factory.mktemp("etcd")) as running:
        yield running


def this(kind: str, said: Said) -> Said:
    return said


def previous(kind: str, said: Said) -> Said:
    said = {name: value for name, value in said.items() if name in FIELDS[kind]}
    match kind:
        case "uses":
            said["uses"] = {name: known(models, USE) for name, models in said["uses"].items()}
        case "states":
            said["models"] = known(said["models"], TOLD)
    return said


def known(models: Said, fields: frozenset[str]) -> Said:
    return {key: {name: v for name, v in one.items() if name in fields} for key, one in models.items()}


def following(kind: str, said: Said) -> Said:
    return {**said, "v": 2, "mood": {"good": [True]}, "since": "12:00"}


class Wire:
    """To etcd, in the words of a release. What this life has written there it reads as it has said it."""

    def __init__(self, words: Words, timeout: float) -> None:
        self._words, self._http = words, Http(None, timeout)
        self._said: dict[str, str] = {}

    @contextlib.asynccontextmanager
    async def post(
        self, url: str, body: Json, headers: Mapping[str, str], connect: float, /
    ) -> AsyncIterator[Answer]:
        for change in body.get("success", ()):
            if put := change.get("request_put"):
                said, put["value"] = put["value"], worded(self._words, put)
                self._said[put["value"]] = said
        async with self._http.post(url, body, headers, connect) as answer:
            if url.endswith("/range"):
                found = json.loads(b"".join([chunk async for chunk in answer.chunks]))
                for kv in found.get("kvs", ()):
                    # What a release does not know it passes over.
                    known = self._words if self._words is previous else this
                    kv["value"] = self._said.get(kv["value"]) or worded(known, kv)
                answer = Answer(answer.status, chunks(json.dumps(found).encode()))
            yield answer

    async def close(self) -> None:
        await self._http.close()


def worded(words: Words, kv: Mapping[str, str]) -> str:
    """The value of that key in these words."""
    kind = base64.b64decode(kv["key"]).decode().split("/")[3]
    said = words(kind, json.loads(base64.b64decode(kv["value"])))
    return base64.b64encode(json.dumps(said).encode()).decode()


async def chunks(content: bytes) -> AsyncIterator[bytes]:
    yield content


@pytest.mark.parametrize(("before", "after"), [(previous, this), (this, following)])
async def test_while_one_after_the_other_is_upgraded_nothing_is_loaded_twice_and_callers_notice_nothing(
    server: kit.Etcd,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    before: Words,
    after: Words,
):
    rival = SimModel("rival", size_bytes=2_000_000_000, load_seconds=0.3)
    tables = ("rival", AUTO)
    async with simulator(SLOW, rival) as studio, contextlib.AsyncExitStack() as stack:

        async def starts(name: str, words: Words) -> tuple[Daemon, contextlib.AsyncExitStack]:
            monkeypatch.setattr(engine, "Http", lambda tls, timeout: Wire(words, timeout))
            text = settings(studio.url, *tables)
            ends = await stack.enter_async_context(contextlib.AsyncExitStack())
            cluster = f"from-{before.__name__}"
            return await ends.enter_async_context(daemon(text + member(server.url, cluster, name))), ends

        a, a_ends = await starts("a", before)
        await until(lambda: model(a, "rival")["state"] == "warm", "the first one acts")
        b, b_ends = await starts("b", before)
        assert (await asked(f"{b.admin_url}/api/models/gemma/warm", "POST"))[0] == 202
        await until(lambda: loads(studio.studio, "gemma") == 1, "it is being loaded")
        # One is new. It finds the load of the other under way, and waits for it.
        await b_ends.aclose()
        b, b_ends = await starts("b", after)
        await until(lambda: model(b, "gemma")["state"] == "loading", "the load is seen")
        # Whose copies there are only who acts can say, and nobody could if he left before that was heard.
        await until(lambda: b.cluster and b.cluster.holders, "it sees who acts")
        held = [asyncio.create_task(chat(b))]
        await until(lambda: model(a, "gemma")["waiting"] or model(b, "gemma")["waiting"], "somebody waits")
        # So is the other. Who acts now takes over the load of whom it follows.
        await a_ends.aclose()
        await until(lambda: holds(b), "the other one acts")
        a, a_ends = await starts("a", after)
        held.append(asyncio.create_task(chat(a)))
        await until(lambda: model(a, "gemma")["waiting"], "somebody waits there, too")
        await let_it_load(studio.studio)

        assert [status for status, _ in await asyncio.gather(*held)] == [200, 200]
        # One goes back. What is asked of it the other one does: it unloads what the first one had loaded, and both give
        # to nobody.
        await a_ends.aclose()
        a, a_ends = await starts("a", before)
        assert (await chat(a))[0] == 200
        assert (await asked(f"{a.admin_url}/api/models/rival/release", "POST"))[0] == 202
        await until(lambda: all(model(one, "rival")["state"] == "cold" for one in (a, b)), "it is let go")
        assert (holds(a), holds(b)) == (False, True)
        assert (loads(studio.studio, "gemma"), loads(studio.studio, "rival")) == (1, 1)
        assert [e["model"] for e in studio.studio.log(0) if e["kind"] == "unloaded"] == ["rival"]
        assert model(b, "rival")["evictions"] == model(a, "rival")["evictions"] == 0

    told = set(re.findall(r"cluster\.\w+", capsys.readouterr().out))
    newer = {"cluster.member_newer"} if after is following else set()
    assert told - {"cluster.took_over", "cluster.gave_up"} == newer
