"""What a member writes for the others, to the simulation's etcd: what stands there afterwards is what counts."""

import json
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from math import inf
from typing import Any

import pytest

from keepalive.cluster import rows
from keepalive.cluster.etcd import Access, Answer, EngineError, Etcd, delete, put
from keepalive.cluster.member import Cluster
from keepalive.core.facts import LoadForgone, LoadStarted, ModelId, ReleaseAsked, WarmAsked
from keepalive.core.records import Model, Snapshot, Upstream
from tests.cluster.test_seeing import Records, a_member
from tests.cluster.test_simulated_etcd import Straight
from tests.kit.models import GEMMA, after, cold, warm
from tests.kit.simulated_etcd import SimulatedEtcd

PREFIX = "/keepalive/ward/"
QWEN, PHI = ModelId("local", "qwen"), ModelId("local", "phi")
LOADING = after(cold(), LoadStarted(10, GEMMA))


class Keeps(Records):
    def snapshot(self) -> Snapshot:
        return replace(super().snapshot(), upstreams=(Upstream("local"),))


class On(Straight):
    """The way there. `meanwhile` is called with what is asked, while nothing is answered yet."""

    def __init__(self, etcd: SimulatedEtcd) -> None:
        super().__init__(etcd)
        self.asked: list[Any] = []

    meanwhile: Callable[[str], None] = staticmethod(lambda _: None)
    full = False

    @asynccontextmanager
    async def post(
        self, url: str, body: Any, headers: Mapping[str, str], connect: float, /
    ) -> AsyncIterator[Answer]:
        self.asked.append(body)
        if self.full and any("request_put" in one for one in body.get("success", [])):
            said = {"error": "etcdserver: mvcc: database space exceeded", "code": 8}
            yield Answer(429, once(json.dumps(said).encode()))
            return
        async with super().post(url, body, headers, connect) as answer:
            self.meanwhile(url.removeprefix("http://x"))
            yield answer


async def once(content: bytes) -> AsyncIterator[bytes]:
    yield content


@pytest.fixture
def etcd() -> Iterator[SimulatedEtcd]:
    simulated = SimulatedEtcd(["http://x"])
    yield simulated
    simulated.stop()


async def there(etcd: SimulatedEtcd, *models: Model) -> tuple[Cluster, On]:
    """A member that has joined."""
    way = On(etcd)
    cluster = a_member(Keeps(*models))
    cluster._grounds.engine = Etcd(["http://x"], Access(), 5.0, way)
    cluster._grounds.lease, cluster._grounds.life = await cluster._grounds.engine.grant(60), "life"
    await look(cluster)
    return cluster, way


async def write(cluster: Cluster, written: Mapping[str, bytes]) -> None:
    await cluster._grounds.engine.commit([], [put(PREFIX + key, value) for key, value in written.items()])


async def look(cluster: Cluster) -> None:
    """As in each pass of its life."""
    cluster._seeing.see(rows.picture(await cluster._rows()))
    await cluster._place.stand()
    await cluster._writing.publish()


def standing(etcd: SimulatedEtcd, kind: str) -> list[str]:
    return [key.removeprefix(PREFIX) for key in etcd.kvs if key.startswith(PREFIX + kind)]


def intent(life: str = "life") -> bytes:
    return rows.load_row(rows.Intent("a", life, 0))


async def test_a_load_that_is_given_up_while_another_is_taken_away_ends_nothing(etcd: SimulatedEtcd):
    cluster, way = await there(etcd, *(replace(cold(), id=m) for m in (GEMMA, QWEN, PHI)))
    await write(cluster, {rows.load_key(m): intent() for m in (GEMMA, QWEN, PHI)})
    cluster._seeing.see(rows.picture(await cluster._rows()))
    cluster._writing.unsent, cluster._writing._begun = {GEMMA: "life", QWEN: "life"}, {PHI: "life"}
    phi = replace(cold(), id=PHI)
    way.meanwhile = lambda _: cluster.observe(LoadForgone(20, PHI, "no"), phi, phi)

    await cluster._writing.publish()
    await look(cluster)

    assert standing(etcd, "loads") == []


async def test_the_next_load_in_the_place_of_one_that_came_to_nothing_is_news(etcd: SimulatedEtcd):
    """Nobody waits to take away the first one: of both there may have been one row all the time."""
    cluster, _ = await there(etcd, cold())
    told = []
    for at in (10, 20):
        loading = after(cold(), begun := LoadStarted(at, GEMMA))
        cluster.observe(begun, cold(), loading)
        await write(cluster, {rows.load_key(GEMMA): cluster._writing.begins(loading)})
        told.append(rows.picture(await cluster._rows()))
    others = Records(cold())
    other = a_member(others, name="b")

    other._seeing.see(told[0])
    first = others.models[GEMMA].pending
    other._seeing.see(told[0])
    again = others.models[GEMMA].pending
    other._seeing.see(told[1])

    assert first is not None
    assert again is first
    assert others.models[GEMMA].pending != first


async def test_who_has_its_name_back_stands_there_once(etcd: SimulatedEtcd):
    cluster, _ = await there(etcd, warm(in_flight=1))
    await write(cluster, {rows.member_key("a"): rows.member_row(rows.Member("a", "another"))})
    for _ in range(3):
        await look(cluster)
    [stand_in] = standing(etcd, "uses")
    assert stand_in != rows.uses_key("a")
    await cluster._grounds.engine.commit(
        [], [{"request_delete_range": put(PREFIX + "members/a", b"")["request_put"]}]
    )
    cluster.addresses = ("http://new", "")  # so that its row is another one, as of one that was doubled
    for _ in range(3):
        await look(cluster)

    assert standing(etcd, "members") == [rows.member_key("a")]
    assert standing(etcd, "uses") == [rows.uses_key("a")]

    # By a write that was long on its way.
    await write(cluster, {"members/" + stand_in.partition("/")[2]: b"{}", stand_in: b"{}"})
    await look(cluster)
    assert len(standing(etcd, "members") + standing(etcd, "uses")) == 2


async def test_what_is_loaded_by_a_persons_word_is_not_taken_for_a_load_of_earlier_that_never_went_out(
    etcd: SimulatedEtcd,
):
    alone = replace(LOADING, alone=True)
    cluster, _ = await there(etcd, alone)
    await look(cluster)
    cluster._writing.unsent = {GEMMA: "life"}
    cluster.observe(LoadStarted(10, GEMMA), cold(), alone)
    assert not cluster._writing.unsent

    cluster._writing.unsent = {GEMMA: "life"}
    await cluster._writing.tell_loads()
    await look(cluster)
    assert standing(etcd, "loads") == [rows.load_key(GEMMA)]

    etcd.kvs.clear()
    cluster._writing.unsent = {GEMMA: "life"}
    cluster._seeing.see(rows.picture([]))
    await cluster._writing.remind()
    await look(cluster)
    await look(cluster)
    assert standing(etcd, "loads") == [rows.load_key(GEMMA)]


async def test_a_load_that_a_person_has_begun_while_others_were_told_is_told_too(etcd: SimulatedEtcd):
    loading = {m: replace(LOADING, id=m, alone=True) for m in (QWEN, GEMMA)}
    cluster, way = await there(etcd, *loading.values())
    cluster._writing._alone = {GEMMA}

    def begin(_: str) -> None:
        way.meanwhile = lambda _: None
        cluster.observe(LoadStarted(10, QWEN), replace(cold(), id=QWEN), loading[QWEN])

    way.meanwhile = begin
    await cluster._writing.tell_loads()

    assert standing(etcd, "loads") == [rows.load_key(m) for m in (GEMMA, QWEN)]


async def test_a_load_that_could_not_be_told_is_told_later(etcd: SimulatedEtcd):
    cluster, way = await there(etcd, replace(LOADING, alone=True))
    cluster._writing._alone, way.full = {GEMMA}, True
    with pytest.raises(EngineError):
        await cluster._writing.tell_loads()

    way.full = False
    await cluster._writing.tell_loads()

    assert standing(etcd, "loads") == [rows.load_key(GEMMA)]


async def test_without_a_lease_nothing_is_written_that_would_never_go(etcd: SimulatedEtcd):
    cluster, _ = await there(etcd, cold())
    await look(cluster)
    lease, cluster._grounds.lease = cluster._grounds.lease, None

    assert not await cluster._grounds.commit([], {rows.holder_key("another"): b"{}"})
    assert standing(etcd, "holders/another") == []
    cluster._grounds.lease = lease
    assert await cluster._grounds.commit([], {rows.holder_key("another"): b"{}"})


async def test_a_full_etcd_is_rid_of_what_is_spent_and_is_of_no_use_for_anything_else(etcd: SimulatedEtcd):
    cluster, way = await there(etcd, LOADING)
    holder = rows.holder_row("a", "life")
    await write(cluster, {rows.holder_key("local"): holder, rows.load_key(GEMMA): intent()})
    await look(cluster)
    assert standing(etcd, "loads")

    way.full = True
    keeping: Any = cluster._grounds.keeping()
    keeping.models[GEMMA] = warm()
    with pytest.raises(EngineError):  # its end, and what came of it
        await cluster._writing.publish()
    assert "writes" in cluster._grounds.refused
    with pytest.raises(EngineError):
        await cluster._writing.publish()

    assert standing(etcd, "loads") == []
    assert "writes" in cluster._grounds.refused


async def test_what_stands_there_and_not_what_was_said_is_what_is_written_anew(etcd: SimulatedEtcd):
    cluster, _ = await there(etcd, warm(in_flight=1))
    for _ in range(3):
        await look(cluster)
    keys = (rows.uses_key("a"), rows.states_key("local"))
    written = {key: etcd.kvs[PREFIX + key].value for key in keys}
    assert cluster._grounds.seen.uses["a"][GEMMA].used
    writes = etcd.writes
    await look(cluster)
    assert etcd.writes == writes

    # A write that was long on its way, or an older copy of etcd.
    old = {keys[0]: rows.uses_row({}), keys[1]: rows.states_row({GEMMA: rows.Told(failures=7)})}
    await write(cluster, old)
    cluster._writing._uses_at = -inf
    await look(cluster)
    await look(cluster)

    assert {key: etcd.kvs[PREFIX + key].value for key in keys} == written


async def test_who_comes_is_told_anew_once_whose_copies_there_are(etcd: SimulatedEtcd):
    cluster, _ = await there(etcd, warm(ours=frozenset({"gemma"})))
    for _ in range(3):
        await look(cluster)
    key = rows.states_key("local")
    before = etcd.kvs[PREFIX + key]
    await write(cluster, {rows.member_key("b"): rows.member_row(rows.Member("b", "another"))})
    came, writes = etcd.revision, etcd.writes
    for _ in range(3):
        await look(cluster)
        await cluster._writing.publish()

    assert etcd.kvs[PREFIX + key].value == before.value
    assert etcd.kvs[PREFIX + key].modified > came
    assert etcd.writes == writes + 1


async def test_a_wish_that_arrives_once_more_when_it_is_spent_is_nobodys_wish(etcd: SimulatedEtcd):
    asked_for = warm(asked_for=True)
    cluster, way = await there(etcd, asked_for)
    await look(cluster)
    cluster.observe(WarmAsked(60, GEMMA), warm(), asked_for)
    await look(cluster)
    key = put(PREFIX + rows.wish_key(GEMMA), b"")["request_put"]["key"]
    [late] = [one for one in way.asked if any(key in str(change) for change in one.get("success", []))]
    assert standing(etcd, "wishes") == [rows.wish_key(GEMMA)]
    assert not cluster._writing.wishes
    keeping: Any = cluster._grounds.keeping()
    keeping.models[GEMMA] = warm()
    await look(cluster)
    assert standing(etcd, "wishes") == []

    assert etcd.answer("/v3/kv/txn", late) == (200, {})
    assert standing(etcd, "wishes") == []


async def test_a_wish_is_written_whatever_was_written_since_the_last_look(etcd: SimulatedEtcd):
    cluster, _ = await there(etcd, warm())
    await look(cluster)
    cluster.addresses = ("http://new", "")
    await cluster._writing.publish()
    cluster.observe(WarmAsked(60, GEMMA), warm(), warm(asked_for=True))
    keeping: Any = cluster._grounds.keeping()
    keeping.models[GEMMA] = warm(asked_for=True)
    await cluster._writing.publish()
    await look(cluster)

    assert standing(etcd, "wishes") == [rows.wish_key(GEMMA)]


async def test_a_wish_that_was_spent_before_its_writer_looked_again_is_spent_for_him_too(
    etcd: SimulatedEtcd,
):
    cluster, _ = await there(etcd, warm())
    await write(cluster, {rows.holder_key("local"): rows.holder_row("b", "another life")})
    await look(cluster)
    keeping: Any = cluster._grounds.keeping()
    keeping.models[GEMMA] = warm(asked_for=False)
    cluster.observe(ReleaseAsked(60, GEMMA), warm(), warm(asked_for=False))
    await cluster._writing.publish()
    assert standing(etcd, "wishes") == [rows.wish_key(GEMMA)]
    assert keeping.models[GEMMA].asked_for is False

    await cluster._grounds.engine.commit([], [delete(PREFIX + rows.wish_key(GEMMA))])
    await look(cluster)

    assert keeping.models[GEMMA].asked_for is None


def emptied(etcd: SimulatedEtcd) -> None:
    etcd.revision = 1


def restored(etcd: SimulatedEtcd) -> None:
    etcd.revision, etcd.term = 10**12, 1


def another(etcd: SimulatedEtcd) -> None:
    etcd.revision, etcd.cluster = 10**12, 7


@pytest.mark.parametrize("replace_it", [emptied, restored, another])
async def test_another_etcd_in_its_place_is_told_once_and_nobody_acts_for_a_while(
    etcd: SimulatedEtcd, replace_it: Callable[[SimulatedEtcd], None]
):
    cluster, way = await there(etcd, LOADING)
    told: list[str] = []
    cluster._grounds.tell = lambda event, *, well, **fields: told.append(event)
    await look(cluster)
    assert told == []
    etcd.kvs.clear()
    replace_it(etcd)
    way.full = True
    for _ in range(2):
        with pytest.raises(EngineError):
            await look(cluster)
    way.full = False
    await look(cluster)
    await look(cluster)

    assert told == ["cluster.engine_replaced"]
    assert cluster._grounds.quiet_until > cluster._grounds.awake()
    assert standing(etcd, "loads") == [rows.load_key(GEMMA)]


async def test_what_was_to_be_reminded_of_is_dropped_once_somebody_has_asked_since(etcd: SimulatedEtcd):
    """Also of a model that is kept here no longer, of which no picture tells: it would be refused again and again."""
    cluster, way = await there(etcd, replace(warm(), asked_for=True))
    await cluster._writing.remind()
    await write(cluster, {rows.wish_key(GEMMA): rows.wish_row("another", "1", warm=False)})
    del cluster._grounds.keeping().models[GEMMA]  # type: ignore[attr-defined]  # the config was read anew
    for _ in range(2):
        await look(cluster)
    way.asked.clear()
    await look(cluster)

    assert [body for body in way.asked if "success" in body] == []
    wish = rows.picture(await cluster._rows()).wishes[GEMMA]
    assert (wish.warm, wish.life) == (False, "another")
