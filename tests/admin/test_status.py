"""The document of `/api/status`, written out."""

import json
from dataclasses import replace
from math import inf

from keepalive import __version__
from keepalive.admin.status import document, is_ready, story_document, utc
from keepalive.core.facts import (
    Entry,
    Instance,
    Listed,
    LoadOutcome,
    ModelId,
    Need,
    PingOutcome,
    Sdk,
    Sight,
    Tier,
)
from keepalive.core.records import (
    Cause,
    Eviction,
    Model,
    Pending,
    Ping,
    Policy,
    Primed,
    Priming,
    Snapshot,
    Upstream,
    UpstreamState,
)
from keepalive.core.states import State
from keepalive.observers.history.story import Changed, Evicted, Loaded, Pinged, Story, Waited

GEMMA = ModelId("local", "gemma")
UP = Upstream("local", state=UpstreamState.UP, since=10.0, tier=Tier.V1)
WALL = 1_795_341_700.0  # 2026-11-22T10:01:40Z, which is 100 on the keeper's clock


def date(moment: float) -> float:
    return WALL - 100 + moment


def shown(*models: Model, upstream: Upstream = UP, now: float = 100.0) -> dict[str, object]:
    page = document(Snapshot(now, (upstream,), models), date, WALL - 100, {"local": "http://127.0.0.1:1234"})
    return {**page["models"][0]} if models else page


def test_the_document_of_a_daemon_with_one_warm_model() -> None:
    gemma = Model(
        id=GEMMA,
        state=State.WARM,
        since=60.0,
        reason=None,
        instances=(Instance("gemma", 8192),),
        ours=frozenset({"gemma"}),
        last_ping=Ping(95.0, PingOutcome.OK, 0.2104),
        ping_at=395.0,
        loads=3,
        evictions=2,
        last_eviction=Eviction(40.0, Cause.TIMER, 301.2345),
        recent_loads=(120.0, 124.2),
        in_flight=2,
        waiting=1,
    )

    page = document(
        Snapshot(100.0, (UP,), (gemma,)),
        date,
        WALL - 100,
        {"local": "http://127.0.0.1:1234"},
        silences={GEMMA: 12.7, None: 60.0},
    )

    assert page == {
        "version": __version__,
        "now": "2026-11-22T10:01:40.000Z",
        "ready": True,
        "started_at": "2026-11-22T10:00:00.000Z",
        "scraped_at": None,
        "config": {"ok": True, "mistakes": []},
        "upstreams": [
            {
                "name": "local",
                "url": "http://127.0.0.1:1234",
                "state": "up",
                "tier": "v1",
                "since": "2026-11-22T10:00:10.000Z",
                "error": None,
                "memory": None,
                "sdk": "off",
                "sdk_reason": None,
            }
        ],
        "models": [
            {
                "key": "gemma",
                "upstream": "local",
                "state": "warm",
                "since": "2026-11-22T10:01:00.000Z",
                "wanted": True,
                "keep": "always",
                "memory_bytes": None,
                "memory_source": None,
                "idle_at": None,
                "listed": True,
                "busy": False,
                "queued": None,
                "in_flight": 2,
                "waiting": 1,
                "eta_seconds": None,
                "silent_seconds": 12,
                "instance_id": "gemma",
                "instances": 1,
                "ours": True,
                "context_length": 8192,
                "ttl_seconds": None,
                "last_used_at": None,
                "goes_at": None,
                "passes_guardrails": None,
                "load": None,
                "last_load_seconds": 124.2,
                "loads": 3,
                "evictions": 2,
                "last_eviction": {
                    "at": "2026-11-22T10:00:40.000Z",
                    "cause": "timer",
                    "idle_seconds": 301.235,
                },
                "last_ping": {"at": "2026-11-22T10:01:35.000Z", "outcome": "ok", "seconds": 0.21},
                "primed": None,
                "next_ping_at": "2026-11-22T10:06:35.000Z",
                "retry_at": None,
                "reason": None,
            }
        ],
    }


def test_a_load_says_how_long_it_has_been_and_nothing_that_is_not_known() -> None:
    gemma = Model(id=GEMMA, state=State.LOADING, load_started=68.8, reason=None, size_bytes=8_000_000_000)

    page = shown(gemma)

    assert page["load"] == {"elapsed_seconds": 31.2, "eta_seconds": None, "attempt": 1, "progress": None}


def test_a_load_is_estimated_from_the_median_of_those_before() -> None:
    gemma = Model(
        id=GEMMA, state=State.LOADING, load_started=68.8, recent_loads=(100.0, 124.2, 130.0), failures=2
    )

    page = shown(gemma)

    assert page["load"] == {"elapsed_seconds": 31.2, "eta_seconds": 93.0, "attempt": 3, "progress": None}


def test_a_first_load_is_estimated_from_its_size_and_how_fast_others_came() -> None:
    gemma = Model(id=GEMMA, state=State.LOADING, load_started=90.0, size_bytes=8_000_000_000)
    other = Model(id=ModelId("local", "b"), state=State.WARM, size_bytes=2_000_000_000, recent_loads=(10.0,))

    page = shown(gemma, other)

    assert page["load"] == {"elapsed_seconds": 10.0, "eta_seconds": 30.0, "attempt": 1, "progress": None}


def test_a_load_that_is_overdue_has_nothing_left_and_no_negative_time() -> None:
    gemma = Model(id=GEMMA, state=State.LOADING, load_started=50.0, recent_loads=(10.0,))

    page = shown(gemma)

    assert page["load"] == {"elapsed_seconds": 50.0, "eta_seconds": 0.0, "attempt": 1, "progress": None}


def test_an_earlier_lifes_load_counts_from_its_own_start() -> None:
    pending = Pending(since=40.0, until=900.0, alive_at=90.0)
    gemma = Model(id=GEMMA, state=State.LOADING, pending=pending, reason="LM Studio is still loading it")

    page = shown(gemma)

    assert page["load"] == {"elapsed_seconds": 60.0, "eta_seconds": None, "attempt": 1, "progress": None}
    assert page["reason"] == "LM Studio is still loading it"


def test_a_failed_load_says_when_it_is_tried_again_and_why() -> None:
    gemma = Model(id=GEMMA, state=State.BACKOFF, retry_at=110.0, failures=2, reason="no memory")

    page = shown(gemma)

    assert (page["state"], page["retry_at"], page["reason"]) == (
        "backoff",
        "2026-11-22T10:01:50.000Z",
        "no memory",
    )


def test_a_ping_that_is_due_is_due_now_and_times_without_a_value_are_null() -> None:
    gemma = Model(id=GEMMA, state=State.WARM, instances=(Instance("gemma"),), ping_at=-inf)

    page = shown(gemma)

    assert page["next_ping_at"] == "2026-11-22T10:01:40.000Z"
    assert page["last_ping"] is None
    assert page["last_load_seconds"] is None


def test_what_a_model_has_read_is_told_with_its_tokens_and_what_it_could_not_read_with_why() -> None:
    done = Primed("a.json 1f", 90.0, 6.0, 5900), Primed("b.txt 2e", 95.0, 0.5)
    wished = ("a.json 1f", "b.txt 2e", "c.txt 3d", "d.txt 4c")
    unfit = (("c.txt 3d", "the context is too small"),)
    priming = Priming(openings=wished, done=done, unfit=unfit, under_way="d.txt 4c")

    page = shown(Model(id=GEMMA, state=State.WARM, priming=priming))

    assert page["primed"] == {
        "openings": 2,
        "of": 4,
        "tokens": 5900,
        "at": "2026-11-22T10:01:35.000Z",
        "under_way": True,
        "reason": "c.txt: the context is too small",
    }
    before = shown(Model(id=GEMMA, state=State.COLD, priming=Priming(openings=wished)))["primed"]
    assert (before["openings"], before["tokens"], before["at"], before["reason"]) == (0, None, None, None)


def test_no_ping_is_announced_for_a_model_that_is_not_loaded_or_not_wanted() -> None:
    cold = Model(id=GEMMA, state=State.COLD, ping_at=200.0)
    released = Model(
        id=GEMMA, state=State.WARM, instances=(Instance("gemma"),), ping_at=200.0, asked_for=False
    )

    pages = [shown(cold), shown(released)]

    assert [page["next_ping_at"] for page in pages] == [None, None]


def test_anothers_instance_is_not_ours() -> None:
    gemma = Model(id=GEMMA, state=State.WARM, instances=(Instance("gemma"), Instance("gemma:2")))

    page = shown(gemma)

    assert (page["instance_id"], page["instances"], page["ours"]) == ("gemma", 2, False)
    assert page["reason"] == "2 copies are in memory"


def test_the_mistakes_of_a_rejected_config_are_shown() -> None:
    page = document(Snapshot(100.0, (), ()), date, WALL, {}, ("config.toml:3: x: is wrong",))

    assert page["config"] == {"ok": False, "mistakes": ["config.toml:3: x: is wrong"]}


def test_when_the_metrics_were_last_read_is_said() -> None:
    page = document(Snapshot(100.0, (), ()), date, WALL, {}, (), WALL - 12.5)

    assert page["scraped_at"] == "2026-11-22T10:01:27.500Z"


def test_an_upstream_that_is_down_says_why() -> None:
    down = Upstream("local", state=UpstreamState.DOWN, since=99.0, error="nothing listens")

    page = shown(upstream=down)

    assert page["upstreams"] == [
        {
            "name": "local",
            "url": "http://127.0.0.1:1234",
            "state": "down",
            "tier": None,
            "since": "2026-11-22T10:01:39.000Z",
            "error": "nothing listens",
            "memory": None,
            "sdk": "off",
            "sdk_reason": None,
        }
    ]


def test_ready_is_what_is_wanted_and_nothing_else() -> None:
    warm, cold = Model(id=GEMMA, state=State.WARM), Model(id=GEMMA, state=State.COLD)

    assert is_ready([])
    assert is_ready([warm])
    assert not is_ready([warm, cold])
    assert is_ready([warm, replace(cold, asked_for=False)])
    assert is_ready([warm, replace(cold, windowed=True, window_open=False)])
    assert not is_ready([replace(warm, state=State.UNKNOWN)])


def test_every_state_makes_a_document_that_is_json() -> None:
    for state in State:
        for moment in (-inf, 0.0, 100.0):
            model = Model(
                id=GEMMA, policy=Policy(), state=state, ping_at=moment, pinged_at=moment, active_at=moment
            )

            text = json.dumps(shown(model), allow_nan=False)

            assert json.loads(text)["state"] == state.value


def test_the_document_of_what_is_remembered_is_written_out() -> None:
    story = Story()
    for entry in (
        Changed(WALL - 100, State.UNKNOWN),
        Loaded(WALL - 90, LoadOutcome.FAILED, 0.5),
        Loaded(WALL - 60, LoadOutcome.OK, 12.34567),
        Changed(WALL - 60, State.WARM),
        Pinged(WALL - 59, PingOutcome.OK, 0.2),
        Pinged(WALL - 49, PingOutcome.OK, 0.2),
        Waited(WALL - 60, 12.5004, True),
        Waited(WALL - 60, 3.0, False),
        Evicted(WALL - 10, Cause.BY_HAND, 39.0),
        Changed(WALL - 10, State.COLD),
    ):
        story.add(entry)

    assert story_document(GEMMA, story, WALL) == {
        "key": "gemma",
        "upstream": "local",
        "loads": [
            {"at": "2026-11-22T10:00:10.000Z", "outcome": "failed", "seconds": 0.5},
            {"at": "2026-11-22T10:00:40.000Z", "outcome": "ok", "seconds": 12.346},
        ],
        "evictions": [{"at": "2026-11-22T10:01:30.000Z", "cause": "by_hand"}],
        "timeline": [
            {"at": "2026-11-22T10:00:00.000Z", "state": "unknown"},
            {"at": "2026-11-22T10:00:40.000Z", "state": "warm"},
            {"at": "2026-11-22T10:01:30.000Z", "state": "cold"},
        ],
        "waits": {"requests": 2, "seconds": 15.5},
        "pings": {"ok": 2, "error": 0, "timeout": 0, "wrong_model": 0, "refused": 0, "skipped": 0},
    }


def test_times_are_utc_to_the_millisecond() -> None:
    assert utc(0) == "1970-01-01T00:00:00.000Z"
    assert utc(WALL + 0.1234) == "2026-11-22T10:01:40.123Z"


def test_memory_says_what_there_is_who_has_it_and_until_when() -> None:
    entries = [
        Entry("gemma", size_bytes=10**9, instances=(Instance("gemma"),)),
        Entry("x", size_bytes=5 * 10**9, instances=(Instance("x"),)),
        Entry("y", instances=(Instance("y"),)),
    ]
    upstream = Upstream(
        "local",
        memory=40 * 10**9,
        occupants=Listed(1.0, "local", 0.5, Tier.V1, {e.key: e for e in entries}).occupants,
    )
    gemma = Model(
        GEMMA,
        policy=Policy(auto=True, idle=600.0, memory=9 * 10**9),
        state=State.WARM,
        instances=(Instance("gemma"),),
        ours=frozenset({"gemma"}),
        use_at=40.0,
        there_since=30.0,
    )

    page = document(Snapshot(100.0, (upstream,), (gemma,)), date, WALL - 100, {})
    in_use = shown(replace(gemma, in_flight=1), upstream=upstream)

    assert page["upstreams"][0]["memory"] == {
        "budget_bytes": 40 * 10**9,
        "places": None,
        "used_bytes": 15 * 10**9,
        "source": "config",
        "strangers": [{"key": "x", "bytes": 6 * 10**9}, {"key": "y", "bytes": None}],
        "next_to_go": ["gemma"],
        "waiting": [],
    }
    model = page["models"][0]
    assert (model["keep"], model["memory_bytes"], model["memory_source"]) == ("auto", 9 * 10**9, "config")
    assert model["idle_at"] == "2026-11-22T10:10:40.000Z"
    assert in_use["idle_at"] is None


def test_what_the_socket_shows_stands_with_its_model_and_its_upstream():
    one = Instance("gemma", busy=True, queued=2, ttl=3600.0, last_used=1_795_000_000.0)
    need = Need(9_000_000_000, passes_guardrails=False)
    gemma = Model(id=GEMMA, state=State.WARM, instances=(one,), need=need, used_at=50.0)
    why = "the SDK socket /llm wants an API token"
    server = replace(UP, sight=Sight(Sdk.REFUSED, why=why))
    upstream = document(Snapshot(100.0, (server,), (gemma,)), date, 0.0, {})["upstreams"][0]
    model = shown(gemma)
    idle = shown(replace(gemma, instances=(replace(one, busy=False, queued=0),)))

    assert (upstream["sdk"], upstream["sdk_reason"]) == ("refused", why)
    assert (model["busy"], model["queued"], model["ttl_seconds"]) == (True, 2, 3600.0)
    assert model["last_used_at"] == "2026-11-18T11:06:40.000Z"
    assert (model["memory_bytes"], model["passes_guardrails"]) == (9_000_000_000, False)
    assert (model["goes_at"], idle["goes_at"]) == (None, utc(date(3650.0)))


def test_a_load_that_tells_its_progress_is_estimated_by_it_even_the_first_time():
    loading = Model(id=GEMMA, state=State.LOADING, load_started=40.0, progress=0.25, progress_at=55.0)
    page = shown(loading, now=60.0)

    assert page["load"] == {"elapsed_seconds": 20.0, "eta_seconds": 40.0, "attempt": 1, "progress": 0.25}
