"""What a member makes of what it is told, no real etcd asked."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

from aiohttp import web

from keepalive.cluster import rows
from keepalive.cluster.etcd import Access, Etcd
from keepalive.cluster.given import Self
from keepalive.cluster.hold import Hold
from keepalive.cluster.member import Cluster
from keepalive.core.apply import apply
from keepalive.core.facts import (
    LoadForgone,
    ModelId,
    RequestEnded,
    RequestsCounted,
    RequestStarted,
    WaitStarted,
    WarmAsked,
)
from keepalive.core.records import Model, Pending, Snapshot, Upstream
from tests.kit.etcd import in_place_of_etcd
from tests.kit.live import until
from tests.kit.models import GEMMA, a_model, entry, listed, warm

QWEN = ModelId("local", "qwen")
HELD = rows.Row(rows.holder_key("local"), rows.holder_row("b", "life"), 1)
YIELD = rows.Row(rows.yield_key(GEMMA), rows.holder_row("b", "life"), 2)


class Records:
    """As much of a keeper as a picture is told to."""

    def __init__(self, *models: Model) -> None:
        self.models = {model.id: model for model in models}
        self.upstreams: tuple[Upstream, ...] = ()

    def record(self, fact: Any, /) -> None:
        self.models[fact.model] = apply(self.models[fact.model], fact)

    def look(self) -> None:
        self.models[GEMMA] = apply(self.models[GEMMA], listed(time.monotonic() + 1, entry("gemma", "gemma")))

    def snapshot(self) -> Snapshot:
        return Snapshot(50.0, self.upstreams, tuple(self.models.values()))

    def tick(self) -> None: ...

    def reconsider(self) -> None: ...


def a_member(
    keeping: Records,
    url: str = "",
    *,
    told: list[str] | None = None,
    ttl: float = 10.0,
    awake: Callable[[], float] = time.monotonic,
    cluster: str = "ward",
    name: str = "a",
) -> Cluster:
    told = [] if told is None else told
    return Cluster(
        Etcd([url], Access(), 5.0),
        Self(cluster, name, "host", "1"),
        ttl,
        lambda: keeping,
        time.monotonic,
        awake,
        lambda event, *, well, **fields: told.append(event),
    )


def test_what_is_let_go_no_more_is_given_again_though_the_config_was_read_anew_just_then():
    keeping = Records(warm())
    cluster = a_member(keeping)
    cluster._seeing.see(rows.picture([HELD, YIELD]))
    assert not keeping.models[GEMMA].given

    keeping.models[QWEN] = replace(a_model(), id=QWEN)
    cluster._seeing.see(rows.picture([HELD]))
    keeping.look()

    assert keeping.models[GEMMA].given


def test_what_whoever_acts_has_said_is_known_again_of_a_server_that_is_asked_through_another_client_since():
    """Where nothing shows what is loaded, its word is all there is; it need not say another one for days."""
    said = rows.states_row({GEMMA: rows.Told(warm=True)})
    standing = rows.picture([HELD, rows.Row(rows.states_key("local"), said, 3)])
    keeping = Records(a_model())
    cluster = a_member(keeping)
    cluster._seeing.see(standing)
    assert keeping.models[GEMMA].proved_elsewhere

    keeping.models[GEMMA] = a_model()
    cluster.kept([GEMMA])
    cluster._seeing.see(standing)

    assert keeping.models[GEMMA].proved_elsewhere


RELEASED = rows.Row(rows.wish_key(GEMMA), rows.wish_row("life", "1", warm=False), 3)
QWEN_RELEASED = rows.Row(rows.wish_key(QWEN), rows.wish_row("life", "2", warm=False), 4)


def test_a_wish_that_is_known_is_not_wished_again_because_the_config_was_read_anew():
    keeping = Records(warm())
    cluster = a_member(keeping)
    standing = rows.picture([HELD, RELEASED, QWEN_RELEASED])
    cluster._seeing.see(standing)
    assert keeping.models[GEMMA].asked_for is False
    # It is spent here: that the holder has yet to take it away is no reason to begin anew.
    keeping.models[GEMMA] = replace(keeping.models[GEMMA], asked_for=None)

    keeping.models[QWEN] = replace(a_model(), id=QWEN)
    cluster.kept([GEMMA, QWEN])
    cluster._seeing.see(standing)

    assert keeping.models[GEMMA].asked_for is None
    assert keeping.models[QWEN].asked_for is False


def test_a_wish_is_spent_here_when_it_is_where_another_one_acts_though_only_an_older_one_was_seen():
    keeping = Records(warm())
    cluster = a_member(keeping)
    cluster._seeing.see(rows.picture([HELD, RELEASED]))
    assert keeping.models[GEMMA].asked_for is False

    cluster._seeing.see(rows.picture([HELD]))

    assert keeping.models[GEMMA].asked_for is None


def test_what_a_person_has_asked_for_here_is_not_undone_by_an_older_wish_that_is_seen_before_it_is_written():
    keeping = Records(warm(asked_for=True))
    cluster = a_member(keeping)
    cluster.observe(WarmAsked(60.0, GEMMA), warm(), warm(asked_for=True))
    cluster._seeing.see(rows.picture([HELD, RELEASED]))
    cluster._seeing.see(rows.picture([HELD]))

    assert keeping.models[GEMMA].asked_for is True


async def test_what_was_known_before_etcd_was_emptied_yields_to_what_stands_there_now():
    keeping = Records(warm(asked_for=True))
    cluster = a_member(keeping)
    await cluster._writing.remind()
    cluster._seeing.see(rows.picture([HELD, RELEASED]))

    assert keeping.models[GEMMA].asked_for is False
    assert not cluster._writing.wishes


def test_what_others_load_is_known_again_of_a_model_that_the_config_names_again():
    loading = rows.picture(
        [HELD, rows.Row(rows.load_key(QWEN), rows.load_row(rows.Intent("b", "life", 0)), 5)]
    )
    new = replace(a_model(), id=QWEN)
    keeping = Records(new)
    cluster = a_member(keeping)
    cluster._seeing.see(loading)
    assert keeping.models[QWEN].pending

    # Twice within an instant: no picture is seen in between.
    cluster.kept([])
    keeping.models[QWEN] = new
    cluster.kept([QWEN])
    cluster._seeing.see(loading)

    assert keeping.models[QWEN].pending


def test_a_load_that_another_begins_is_waited_for_by_whoever_still_waits_for_an_earlier_one():
    """What its own last life began it has recalled, with when that was; what came in its place it has not."""
    recalled = Pending(since=-20.0, until=40.0, alive_at=-20.0)
    keeping = Records(replace(a_model(), pending=recalled))
    cluster = a_member(keeping)

    def sees(*loads: rows.Row) -> Pending | None:
        cluster._seeing.see(rows.picture([HELD, *loads]))
        return keeping.models[GEMMA].pending

    def begun(by: str, life: str) -> rows.Row:
        return rows.Row(rows.load_key(GEMMA), rows.load_row(rows.Intent(by, life, 0, 30.0)), 2)

    assert sees(begun("a", "our last life")) == recalled
    another = sees(begun("b", "life"))
    assert another is not None
    assert (another.why, another.expected) == ("b began it", 30.0)
    anew = sees(begun("c", "its life"))
    assert anew is not None
    assert anew.why == "c began it"


def test_a_load_that_another_begins_while_one_of_ours_is_under_way_is_known_when_ours_is_over():
    keeping = Records(replace(a_model(), load_started=40.0))
    cluster = a_member(keeping)
    row = rows.Row(rows.load_key(GEMMA), rows.load_row(rows.Intent("b", "life", 0, 30.0)), 2)
    for _ in range(2):
        cluster._seeing.see(rows.picture([HELD, row]))

    keeping.record(LoadForgone(51.0, GEMMA, "another one holds it"))
    cluster._seeing.see(rows.picture([HELD, row]))
    told = keeping.models[GEMMA].pending
    cluster._seeing.see(rows.picture([HELD, row]))

    assert told is not None
    assert keeping.models[GEMMA].pending is told  # once


def test_an_answer_of_before_another_began_a_load_ends_no_wait_for_that():
    keeping = Records(warm(in_flight=1))
    cluster = a_member(keeping)
    row = rows.Row(rows.load_key(GEMMA), rows.load_row(rows.Intent("b", "life", 0, 30.0)), 2)
    cluster._seeing.see(rows.picture([HELD, row]))

    keeping.record(RequestEnded(time.monotonic(), GEMMA, answered=True))
    keeping.models[GEMMA] = apply(keeping.models[GEMMA], listed(time.monotonic() + 1, entry("gemma")))

    assert keeping.models[GEMMA].pending
    assert not keeping.models[GEMMA].given


def test_a_request_for_what_is_warm_is_no_write_of_its_own():
    now = 100.0
    cluster = a_member(Records(), ttl=9.0, awake=lambda: now)
    cluster._writing._uses_at = now
    used = {GEMMA: rows.Use(used=True)}
    now = 102.0

    assert not cluster._writing._is_news(used)
    assert cluster._writing._is_news({GEMMA: rows.Use(waiting=1, used=True)})
    assert cluster._writing._is_news({GEMMA: rows.Use(used=True, yielded=True)})
    now = 102.9
    assert cluster._writing._is_news(used)
    assert not cluster._writing._is_news({})


def test_only_its_own_callers_are_a_use_that_a_member_tells_and_neither_a_ping_of_another_nor_a_persons_wish():
    seen = replace(warm(), use_at=50.0)  # LM Studio works for somebody just now, or a person has asked for it
    keeping = Records(seen, replace(seen, id=QWEN))
    cluster = a_member(keeping)
    assert cluster._writing._uses(keeping.snapshot()) == {}

    used = {GEMMA: rows.Use(used=True)}
    for at in (44.0, 43.0):
        for fact in (
            WaitStarted(at, GEMMA),
            RequestStarted(at, GEMMA),
            RequestEnded(at, GEMMA, answered=True),
            RequestsCounted(at, GEMMA, 1, 1),
        ):
            cluster = a_member(keeping)
            cluster.observe(fact, seen, seen)
            assert cluster._writing._uses(keeping.snapshot()) == (used if at == 44.0 else {})


def test_the_word_that_a_model_is_given_to_nobody_is_taken_back_at_once():
    now = 100.0
    cluster = a_member(Records(), ttl=9.0, awake=lambda: now)
    cluster._seeing.see(rows.picture([rows.Row(rows.uses_key("a"), b'{"v":1}', 1)]))
    cluster._writing._uses_at = now
    cluster._writing._uses_said = {GEMMA: rows.Use(yielded=True)}

    assert not cluster._writing._is_news(cluster._writing._uses_said)
    assert cluster._writing._is_news({})
    assert cluster._writing._is_news({GEMMA: rows.Use(used=True)})
    assert cluster._writing._is_news({GEMMA: rows.Use(used=True, yielded=True)})
    cluster._writing._uses_said = {GEMMA: rows.Use(used=True, yielded=True)}
    assert not cluster._writing._is_news({GEMMA: rows.Use(yielded=True)})


def member_row(name: str, **more: Any) -> rows.Row:
    return rows.Row(rows.member_key(name), rows.member_row(rows.Member(name, f"life of {name}", **more)), 1)


def test_who_has_left_is_shown_for_an_hour_and_then_forgotten():
    now = 0.0
    cluster = a_member(Records(), awake=lambda: now)
    for n in range(100):
        now = 60.0 * n
        cluster._seeing.see(rows.picture([member_row("b"), member_row(f"pod-{n}")]))

    assert list(cluster.instances.items())[:3] == [("b", True), ("pod-99", True), ("pod-40", False)]
    assert len(cluster.instances) == 61

    now = 3600.0 * 3
    cluster._seeing.see(rows.picture([member_row("b")]))
    assert cluster.instances == {"b": True}


def test_whoever_waits_for_its_last_life_to_be_forgotten_is_not_shown_as_another_one():
    cluster = a_member(Records())
    waits = rows.stand_in("b", "5f5f5f5f")
    cluster._seeing.see(rows.picture([member_row("b"), member_row(waits)]))
    assert cluster.instances == {"b": True}
    assert cluster.differences == []

    cluster._seeing.see(
        rows.picture([member_row("b", host="h1"), member_row(waits, host="h2", doubled=True)])
    )
    assert cluster.instances == {"b": True, waits: True}
    assert cluster.differences == ["two daemons go by the name 'b', on h2 and on h1"]


def test_whoever_writes_a_newer_format_is_named_once():
    told: list[str] = []
    cluster = a_member(Records(), told=told)
    newer = json.dumps({"v": 2, "instance": "b", "life": "5f", "version": "3.0"}).encode()
    for value in (newer, newer + b" "):
        cluster._seeing.see(rows.picture([rows.Row(rows.member_key("b"), value, 1)]))

    assert told == ["cluster.member_newer"]
    assert cluster.differences == [
        "b (3.0) writes format 2 of what daemons tell each other, a (1) knows 1: upgrade a, too"
    ]


def test_whoever_has_slept_longer_than_its_lease_does_not_say_that_it_acts_and_who_watches_is_told():
    now, told = 100.0, []
    cluster = a_member(Records(warm()), ttl=9.0, awake=lambda: now)
    cluster.changed = lambda: told.append(cluster.holders)
    cluster._grounds.lease, cluster._grounds.life, cluster._grounds.hold = 7, "life of a", Hold(9.0, now)
    there = [member_row("a"), member_row("b"), rows.Row("holders/far", rows.holder_row("b", "life of b"), 1)]
    cluster._seeing.see(
        rows.picture([*there, rows.Row("holders/local", rows.holder_row("a", "life of a"), 1)])
    )
    now = 108.0

    assert told == [{"far": "b", "local": "a"}]
    assert cluster.holders == {"far": "b"}
    for change in (
        cluster._grounds.is_up,
        lambda: cluster._grounds.is_down("etcd does not answer"),
        cluster._grounds.is_up,
    ):
        change()
    assert len(told) == 4
    cluster._grounds.is_up()
    assert len(told) == 4


def test_time_in_which_it_was_stopped_is_no_absence_of_etcd():
    now = 100.0
    cluster = a_member(Records(warm()), ttl=3.0, awake=lambda: now)
    cluster._grounds.is_up()
    cluster._grounds.is_away("it does not answer")
    now += 60  # stopped; the answer that was waited for is late now
    cluster._grounds.is_away("it does not answer")

    assert cluster.hopeless("local") is None
    for _ in range(4):
        now += 2
        cluster._grounds.is_away("it does not answer")
    assert cluster.hopeless("local") is not None


def test_what_was_to_be_let_go_is_given_again_where_etcd_is_away_and_nobody_can_have_our_word():
    now = 100.0
    keeping = Records(warm())
    cluster = a_member(keeping, awake=lambda: now)
    cluster._seeing.see(rows.picture([HELD, YIELD]))

    now = 120.0
    cluster._grounds.is_down("etcd does not answer")
    assert not keeping.models[GEMMA].given
    now = 120.1
    cluster._grounds.is_down("etcd does not answer")
    keeping.look()

    assert keeping.models[GEMMA].given


def test_it_is_given_again_too_where_etcd_renews_a_lease_now_and_then_and_shows_nothing():
    now = 100.0
    keeping = Records(warm())
    cluster = a_member(keeping, awake=lambda: now)
    cluster._seeing.see(rows.picture([HELD, YIELD]))

    now = 120.1
    cluster._grounds.is_answered()
    keeping.look()

    assert keeping.models[GEMMA].given


@contextlib.asynccontextmanager
async def going_on(cluster: Cluster) -> AsyncIterator[None]:
    running = asyncio.create_task(cluster.run())
    try:
        yield
    finally:
        running.cancel()
        await asyncio.wait([running])
        await cluster.close()


RENEWS = {"/v3/lease/grant": {"ID": "7"}, "/v3/lease/keepalive": {"result": {"TTL": "5"}}}


async def test_an_etcd_that_renews_a_lease_and_shows_nothing_counts_as_away_and_is_not_told_again_and_again():
    async def answer(request: web.BaseRequest) -> web.Response:
        if request.path in RENEWS:
            return web.json_response(RENEWS[request.path])
        return web.json_response({"error": "etcdserver: permission denied", "code": 7}, status=403)

    told: list[str] = []
    async with in_place_of_etcd(answer) as url:
        cluster = a_member(Records(warm()), url, told=told, ttl=0.3)
        async with going_on(cluster):
            why, _ = await until(lambda: cluster.hopeless("local"), "callers are told that there is no hope")
            assert why.endswith(
                "says: permission denied (cluster.user is to read and write all keys below /keepalive/)"
            )
            assert not cluster.engine_up
            assert sorted(told) == ["cluster.engine_down", "cluster.row_failed"]


async def test_an_etcd_that_goes_away_is_told_in_one_line_whatever_was_asked_of_it_first():
    async def answer(request: web.BaseRequest) -> web.Response:
        return web.json_response({**RENEWS, "/v3/kv/txn": {"succeeded": True}}.get(request.path, {}))

    told: list[str] = []
    async with contextlib.AsyncExitStack() as stack, contextlib.AsyncExitStack() as etcd:
        url = await etcd.enter_async_context(in_place_of_etcd(answer))
        cluster = a_member(Records(warm()), url, told=told, ttl=1.0)
        await stack.enter_async_context(going_on(cluster))
        await until(lambda: cluster.engine_up and cluster._grounds.saw, "etcd is there")
        await etcd.aclose()
        cluster.look_again()
        await until(lambda: not cluster.engine_up, "it is missed")

        assert told == ["cluster.engine_down"]


# --- whose copies they are, and who has yielded ---------------------------------------------------------


def holds(cluster: Cluster) -> rows.Row:
    cluster._grounds.lease, cluster._grounds.life = 1, "mine"
    return rows.Row(rows.holder_key("local"), rows.holder_row("a", "mine"), 1)


def told(warm: bool, modified: int = 3) -> rows.Row:
    state = rows.Told(warm=warm, ours=frozenset({"gemma"}))
    return rows.Row(rows.states_key("local"), rows.states_row({GEMMA: state}), 1, modified)


def looks(keeping: Records, *ids: str) -> None:
    """A look while another one acts."""
    look = replace(listed(time.monotonic() + 1, entry("gemma", *ids)), trusted=True)
    keeping.models[GEMMA] = apply(keeping.models[GEMMA], look)


def came(created: int) -> rows.Row:
    return rows.Row(rows.member_key("a"), rows.member_row(rows.Member("a", "mine")), created)


def test_who_does_not_act_any_more_takes_the_word_of_whoever_does_though_it_is_its_own_of_before():
    keeping = Records(warm())
    cluster = a_member(keeping)
    cluster._seeing.see(rows.picture([holds(cluster), came(2), told(warm=True)]))
    before = keeping.models[GEMMA]
    cluster._seeing.see(rows.picture([HELD, came(2), told(warm=True)]))

    assert (before.told, before.proved_elsewhere) == (frozenset(), False)
    assert (keeping.models[GEMMA].told, keeping.models[GEMMA].proved_elsewhere) == ({"gemma"}, True)


KNOWN, UNKNOWN = (frozenset({"gemma"}), frozenset()), (frozenset(), frozenset({"gemma"}))


def seen(cluster: Cluster, keeping: Records, *shown: rows.Row) -> tuple[frozenset[str], frozenset[str]]:
    """Whose copies there are then: ours, and perhaps ours."""
    cluster._seeing.see(rows.picture(shown))
    looks(keeping, "gemma")
    return keeping.models[GEMMA].ours, keeping.models[GEMMA].lost


def test_whose_copy_it_is_only_he_can_say_who_acts_now():
    keeping = Records(warm())
    cluster = a_member(keeping)
    mine = holds(cluster)

    assert seen(cluster, keeping, told(warm=True)) == UNKNOWN
    assert seen(cluster, keeping, mine, told(warm=True)) == UNKNOWN
    follows = rows.Row(HELD.key, HELD.value, 4)
    assert seen(cluster, keeping, follows, told(warm=True)) == UNKNOWN
    assert seen(cluster, keeping, follows, told(warm=True, modified=5)) == KNOWN
    # What was seen for ourselves is known, whatever becomes of him.
    assert seen(cluster, keeping, told(warm=False, modified=5)) == KNOWN


def test_who_comes_while_etcd_is_away_goes_by_no_word_of_before():
    """Whoever said it is still there for as long as nobody counts the time of his lease."""
    keeping = Records(warm())
    cluster = a_member(keeping)
    cluster._grounds.is_away("refused")
    cluster._grounds.begin_life(1)
    cluster._grounds.life = "mine"

    assert seen(cluster, keeping, HELD, told(warm=True)) == UNKNOWN  # not there yet
    assert seen(cluster, keeping, HELD, came(4), told(warm=True)) == UNKNOWN
    assert not cluster.knows("local")  # so that no caller is sent away for it
    assert seen(cluster, keeping, HELD, came(4), told(warm=True, modified=5)) == KNOWN
    assert cluster.knows("local")

    keeping = Records(warm())
    cluster = a_member(keeping)
    cluster._grounds.begin_life(1)
    assert seen(cluster, keeping, HELD, told(warm=True)) == KNOWN


def test_a_word_of_before_is_told_once_more_when_it_may_be_believed():
    """Whoever wakes may be in a life, for a moment, in which it may not: nothing is written anew for that."""
    keeping = Records(warm())
    cluster = a_member(keeping)
    cluster._grounds.is_away("refused")
    cluster._grounds.begin_life(1)
    assert seen(cluster, keeping, HELD, told(warm=True)) == UNKNOWN

    cluster._grounds.is_answered()
    cluster._grounds.begin_life(2)

    assert cluster._grounds.late is False
    assert seen(cluster, keeping, HELD, told(warm=True)) == KNOWN


def test_a_copy_that_was_seen_to_go_is_ours_again_by_a_newer_word_though_that_says_nothing_else():
    keeping = Records(warm())
    cluster = a_member(keeping)
    holds(cluster)
    cluster._seeing.see(rows.picture([HELD, came(2), told(warm=True)]))
    for ids in (["gemma"], [], ["gemma"]):
        looks(keeping, *ids)
    cluster._seeing.see(rows.picture([HELD, came(2), told(warm=True)]))
    by_an_old_word = keeping.models[GEMMA].ours
    cluster._seeing.see(rows.picture([HELD, came(2), told(warm=True, modified=4)]))

    assert by_an_old_word == frozenset()
    assert keeping.models[GEMMA].ours == {"gemma"}


def test_who_acts_alone_is_told_which_copies_others_know_for_ours():
    keeping = Records(warm())
    cluster = a_member(keeping)
    use = rows.Row(rows.uses_key("b"), rows.uses_row({GEMMA: rows.Use(ours=frozenset({"gemma"}))}), 4)
    cluster._seeing.see(rows.picture([HELD, use]))
    elsewhere = keeping.models[GEMMA].vouched
    mine = holds(cluster)
    cluster._seeing.see(rows.picture([mine, use]))
    acting = keeping.models[GEMMA].vouched
    cluster._seeing.see(rows.picture([mine]))

    assert (elsewhere, acting, keeping.models[GEMMA].vouched) == (frozenset(), {"gemma"}, frozenset())


def test_a_word_that_a_model_is_given_to_nobody_holds_for_the_one_time_that_it_was_asked_for():
    cluster = a_member(Records(warm()))
    member = rows.Row(rows.member_key("b"), rows.member_row(rows.Member("b", "other")), 2)
    asked = rows.Row(rows.yield_key(GEMMA), rows.holder_row("a", "mine"), 5, 9)

    def yielded(said: int | None) -> bool:
        use = rows.uses_row({GEMMA: rows.Use(yielded=True, asked=said)})
        cluster._seeing.see(
            rows.picture([holds(cluster), member, asked, rows.Row(rows.uses_key("b"), use, 4)])
        )
        return cluster._seeing.is_yielded(GEMMA)

    assert not yielded(8)
    assert yielded(9)
    assert yielded(None)  # as the release before this one writes it


def test_who_has_not_heard_from_the_others_since_etcd_was_away_does_not_know_what_is_ours():
    cluster = a_member(Records(warm()))
    at_first = cluster.knows("local")
    cluster._seeing.see(rows.picture([HELD]), 49.0)
    assert not cluster.knows("local")  # nobody has said anything
    cluster._seeing.see(rows.picture([HELD, told(warm=True)]), 50.0)
    seen = cluster.knows("local")
    cluster._grounds.is_down("refused")

    assert (at_first, seen, cluster.knows("local")) == (False, True, False)


def test_whose_copy_came_into_a_listing_since_the_others_were_heard_nobody_knows_who_does_not_act():
    keeping = Records(warm())
    keeping.upstreams = (Upstream("local", answered_at=60.0),)
    cluster = a_member(keeping)
    loading = rows.Row(rows.load_key(QWEN), rows.load_row(rows.Intent("b", "life", 0)), 5)

    def knows(asked: float, *more: rows.Row) -> bool:
        cluster._seeing.see(rows.picture([HELD, told(warm=True), *more]), asked)
        return cluster.knows("local")

    assert not knows(59.9)
    assert knows(60.1)
    assert not knows(60.2, loading)  # it may be loaded, and its end not be told yet
