"""The metrics page, read back with the parsers that scrapers use."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from keepalive.core.apply import apply
from keepalive.core.callers import Outcome, Seen
from keepalive.core.facts import (
    DrainStarted,
    Entry,
    Fact,
    Instance,
    Listed,
    ListingFailed,
    LoadEnded,
    LoadOutcome,
    LoadStarted,
    ModelId,
    OpeningsLearned,
    PingEnded,
    PingOutcome,
    PingStarted,
    PrimeEnded,
    PrimeOutcome,
    PrimeStarted,
    Tier,
    Trouble,
)
from keepalive.core.records import Model, Policy, Snapshot, Upstream
from keepalive.core.upstreams import apply_upstream
from keepalive.observers.metrics import LOAD_BUCKETS, PING_BUCKETS, Metrics, ProxyMetrics

GEMMA = ModelId("local", "gemma")
WALL = 1_000_000.0
OPENMETRICS = "application/openmetrics-text; version=1.0.0"


class World:
    """One upstream with models, whose facts the metrics observe. Its clock stands at 100."""

    def __init__(self, *models: ModelId) -> None:
        self.upstream = Upstream("local")
        self.models = {model: Model(id=model) for model in models or (GEMMA,)}
        self.metrics = Metrics(self.snapshot, lambda moment: WALL + moment)
        self.metrics.configure(self.models)

    def snapshot(self) -> Snapshot:
        return Snapshot(100.0, (self.upstream,), tuple(self.models.values()))

    def goes(self, *facts: Fact, model: ModelId = GEMMA) -> "World":
        for fact in facts:
            self.upstream = apply_upstream(self.upstream, fact)
            before, after = self.models[model], apply(self.models[model], fact)
            self.models[model] = after
            self.metrics.observe(fact, before, after)
        return self

    def text(self, accept: str = "") -> str:
        return self.metrics.render(accept)[0].decode()

    def samples(self) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
        return {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in parse_text(self.text())
            for sample in family.samples
        }

    def of(self, name: str, **labels: str) -> float | None:
        return self.samples().get((f"keepalive_{name}", tuple(sorted(labels.items()))))


def listed(at: float, *instances: str) -> Listed:
    entry = Entry("gemma", instances=tuple(Instance(i) for i in instances))
    return Listed(at, "local", at, Tier.V1, {"gemma": entry})


def loaded(at: float, seconds: float | None, elapsed: float = 1.0) -> list[Fact]:
    return [
        listed(at),
        LoadStarted(at + 0.1, GEMMA),
        LoadEnded(at + 0.2, GEMMA, LoadOutcome.OK, elapsed, seconds=seconds, instance_id="gemma"),
        listed(at + 0.3, "gemma"),
    ]


def pinged(at: float, outcome: PingOutcome, seconds: float = 0.0) -> list[Fact]:
    return [PingStarted(at, GEMMA), PingEnded(at + 0.1, GEMMA, outcome, seconds)]


def primed(at: float, outcome: PrimeOutcome, seconds: float = 0.0) -> list[Fact]:
    ended = PrimeEnded(at + 0.1, GEMMA, "agent", outcome, seconds)
    return [OpeningsLearned(at, GEMMA, ("agent",)), PrimeStarted(at, GEMMA, "agent"), ended]


def shape(families: Iterable[Any]) -> dict[str, tuple[str, list[str]]]:
    """Type and label names of each family that is ours."""
    return {
        family.name: (
            family.type,
            sorted({name for sample in family.samples for name in sample.labels}),
        )
        for family in families
        if family.name.startswith("keepalive_")
    }


def test_the_page_before_anything_is_known_is_written_out() -> None:
    page = World().text()

    own = [
        line for line in page.splitlines() if line.startswith("keepalive_model_") and "_bucket" not in line
    ]
    assert own == [
        'keepalive_model_state{model="gemma",upstream="local",state="unknown"} 1.0',
        'keepalive_model_state{model="gemma",upstream="local",state="cold"} 0.0',
        'keepalive_model_state{model="gemma",upstream="local",state="loading"} 0.0',
        'keepalive_model_state{model="gemma",upstream="local",state="warm"} 0.0',
        'keepalive_model_state{model="gemma",upstream="local",state="backoff"} 0.0',
        'keepalive_model_wanted{model="gemma",upstream="local"} 1.0',
        'keepalive_model_instances{model="gemma",upstream="local"} 0.0',
        'keepalive_model_loads_total{model="gemma",upstream="local",outcome="ok"} 0.0',
        'keepalive_model_loads_total{model="gemma",upstream="local",outcome="failed"} 0.0',
        'keepalive_model_loads_total{model="gemma",upstream="local",outcome="refused"} 0.0',
        'keepalive_model_loads_total{model="gemma",upstream="local",outcome="unknown"} 0.0',
        'keepalive_model_loads_total{model="gemma",upstream="local",outcome="given_up"} 0.0',
        'keepalive_model_load_duration_seconds_sum{model="gemma",upstream="local"} 0.0',
        'keepalive_model_load_duration_seconds_count{model="gemma",upstream="local"} 0.0',
        'keepalive_model_evictions_total{model="gemma",upstream="local",cause="timer"} 0.0',
        'keepalive_model_evictions_total{model="gemma",upstream="local",cause="displaced"} 0.0',
        'keepalive_model_evictions_total{model="gemma",upstream="local",cause="crash"} 0.0',
        'keepalive_model_evictions_total{model="gemma",upstream="local",cause="restart"} 0.0',
        'keepalive_model_evictions_total{model="gemma",upstream="local",cause="by_hand"} 0.0',
        'keepalive_model_evictions_total{model="gemma",upstream="local",cause="unknown"} 0.0',
        'keepalive_model_pings_total{model="gemma",upstream="local",outcome="ok"} 0.0',
        'keepalive_model_pings_total{model="gemma",upstream="local",outcome="error"} 0.0',
        'keepalive_model_pings_total{model="gemma",upstream="local",outcome="timeout"} 0.0',
        'keepalive_model_pings_total{model="gemma",upstream="local",outcome="wrong_model"} 0.0',
        'keepalive_model_pings_total{model="gemma",upstream="local",outcome="refused"} 0.0',
        'keepalive_model_pings_total{model="gemma",upstream="local",outcome="skipped"} 0.0',
        'keepalive_model_ping_duration_seconds_sum{model="gemma",upstream="local"} 0.0',
        'keepalive_model_ping_duration_seconds_count{model="gemma",upstream="local"} 0.0',
        'keepalive_model_unloads_total{model="gemma",upstream="local",cause="room"} 0.0',
        'keepalive_model_unloads_total{model="gemma",upstream="local",cause="idle"} 0.0',
        'keepalive_model_unloads_total{model="gemma",upstream="local",cause="window"} 0.0',
        'keepalive_model_unloads_total{model="gemma",upstream="local",cause="released"} 0.0',
    ]


NAMES = {
    "keepalive_build_info": ("gauge", ["version"]),
    "keepalive_upstream_up": ("gauge", ["upstream"]),
    "keepalive_upstream_state": ("gauge", ["state", "upstream"]),
    "keepalive_upstream_sdk": ("gauge", ["sdk", "upstream"]),
    "keepalive_model_state": ("gauge", ["model", "state", "upstream"]),
    "keepalive_model_wanted": ("gauge", ["model", "upstream"]),
    "keepalive_model_instances": ("gauge", ["model", "upstream"]),
    "keepalive_model_loads": ("counter", ["model", "outcome", "upstream"]),
    "keepalive_model_load_duration_seconds": ("histogram", ["le", "model", "upstream"]),
    "keepalive_model_last_load_seconds": ("gauge", ["model", "upstream"]),
    "keepalive_model_evictions": ("counter", ["cause", "model", "upstream"]),
    "keepalive_model_pings": ("counter", ["model", "outcome", "upstream"]),
    "keepalive_model_ping_duration_seconds": ("histogram", ["le", "model", "upstream"]),
    "keepalive_model_last_ping_success_timestamp_seconds": ("gauge", ["model", "upstream"]),
    "keepalive_model_primes": ("counter", ["model", "outcome", "upstream"]),
    "keepalive_model_prime_duration_seconds": ("histogram", ["le", "model", "upstream"]),
    "keepalive_model_memory_bytes": ("gauge", ["model", "upstream"]),
    "keepalive_model_unloads": ("counter", ["cause", "model", "upstream"]),
    "keepalive_upstream_memory_budget_bytes": ("gauge", ["upstream"]),
    "keepalive_upstream_memory_used_bytes": ("gauge", ["upstream"]),
    "keepalive_model_waiting_for_room": ("gauge", ["model", "upstream"]),
    "keepalive_loads_ahead": ("counter", ["outcome"]),
    "keepalive_scheduler_jobs_missed": ("counter", []),
    "keepalive_config_last_reload_successful": ("gauge", []),
    "keepalive_config_last_reload_success_timestamp_seconds": ("gauge", []),
}


def test_names_types_and_labels_are_those_of_the_contract_in_both_formats() -> None:
    world = World()
    world.upstream = replace(world.upstream, memory=40 * 10**9)
    world.models[GEMMA] = replace(world.models[GEMMA], policy=Policy(auto=True, memory=9 * 10**9))
    world.goes(*loaded(10.0, 6.0), *pinged(11.0, PingOutcome.OK, 0.2), *primed(12.0, PrimeOutcome.OK))

    text = shape(parse_text(world.text()))
    openmetrics = shape(parse_openmetrics(world.text(OPENMETRICS)))

    created = {name: kind for name, kind in text.items() if not name.endswith("_created")}
    assert created == NAMES
    assert openmetrics == NAMES


def test_openings_are_counted_by_how_they_ended_and_timed_where_they_were_read() -> None:
    world = World().goes(*loaded(10.0, 6.0), *pinged(11.0, PingOutcome.OK, 0.2))
    assert world.of("model_primes_total", model="gemma", upstream="local", outcome="ok") is None

    world.goes(*primed(20.0, PrimeOutcome.GIVEN_UP, 1.0), *primed(30.0, PrimeOutcome.OK, 6.0))

    counted = {
        o: world.of("model_primes_total", model="gemma", upstream="local", outcome=o) for o in PrimeOutcome
    }
    assert counted == {**dict.fromkeys(PrimeOutcome, 0.0), PrimeOutcome.OK: 1.0, PrimeOutcome.GIVEN_UP: 1.0}
    assert world.of("model_prime_duration_seconds_sum", model="gemma", upstream="local") == 6.0
    # it counts as a ping
    assert world.of("model_last_ping_success_timestamp_seconds", model="gemma", upstream="local") is not None


def test_both_formats_say_the_same_numbers() -> None:
    world = World().goes(*loaded(10.0, 6.0), *pinged(11.0, PingOutcome.OK, 0.2))

    def numbers(families: Iterable[Any]) -> dict[Any, float]:
        return {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in families
            for sample in family.samples
            if sample.name.startswith("keepalive_model_")
        }

    assert numbers(parse_openmetrics(world.text(OPENMETRICS))) == numbers(parse_text(world.text()))


@pytest.mark.parametrize(
    ("accept", "content_type"),
    [
        ("", "text/plain; version=0.0.4"),
        ("*/*", "text/plain; version=0.0.4"),
        ("text/html", "text/plain; version=0.0.4"),
        (OPENMETRICS, "application/openmetrics-text; version=1.0.0"),
        (
            f"{OPENMETRICS};q=0.5,text/plain;version=0.0.4;q=0.2",
            "application/openmetrics-text; version=1.0.0",
        ),
        ("application/openmetrics-text;version=abc", "text/plain; version=0.0.4"),
        ("application/openmetrics-text;version=1..0", "text/plain; version=0.0.4"),
        ("text/plain;version=x;escaping=zzz", "text/plain; version=0.0.4"),
        (";;;,,=\x7f\udce9", "text/plain; version=0.0.4"),
    ],
)
def test_a_scraper_gets_what_it_accepts_and_any_other_gets_text(accept: str, content_type: str) -> None:
    page, given = World().metrics.render(accept)

    assert given.startswith(content_type)
    assert page.endswith(b"# EOF\n") is given.startswith("application/openmetrics-text")


def test_metrics_of_the_process_are_there() -> None:
    names = {name for name, _ in World().samples()}

    assert {"process_cpu_seconds_total", "process_resident_memory_bytes", "process_open_fds"} <= names


def test_loads_are_counted_by_outcome_and_measured_as_lm_studio_measured_them() -> None:
    world = World().goes(*loaded(10.0, seconds=6.0, elapsed=7.5))

    assert world.of("model_loads_total", model="gemma", upstream="local", outcome="ok") == 1
    assert world.of("model_load_duration_seconds_sum", model="gemma", upstream="local") == 6.0
    assert world.of("model_load_duration_seconds_bucket", model="gemma", upstream="local", le="5.0") == 0
    assert world.of("model_load_duration_seconds_bucket", model="gemma", upstream="local", le="10.0") == 1
    assert world.of("model_load_duration_seconds_bucket", model="gemma", upstream="local", le="+Inf") == 1
    assert world.of("model_last_load_seconds", model="gemma", upstream="local") == 6.0


def test_without_its_measure_a_load_takes_what_our_clock_says() -> None:
    world = World().goes(*loaded(10.0, seconds=None, elapsed=7.5))

    assert world.of("model_last_load_seconds", model="gemma", upstream="local") == 7.5


@pytest.mark.parametrize("outcome", [LoadOutcome.FAILED, LoadOutcome.REFUSED, LoadOutcome.UNKNOWN])
def test_a_load_that_did_not_succeed_is_counted_and_not_measured(outcome: LoadOutcome) -> None:
    world = World().goes(
        listed(10.0), LoadStarted(11.0, GEMMA), LoadEnded(12.0, GEMMA, outcome, 900.0, message="no")
    )

    assert world.of("model_loads_total", model="gemma", upstream="local", outcome=outcome.value) == 1
    assert world.of("model_loads_total", model="gemma", upstream="local", outcome="ok") == 0
    assert world.of("model_load_duration_seconds_count", model="gemma", upstream="local") == 0
    assert world.of("model_last_load_seconds", model="gemma", upstream="local") is None


@pytest.mark.parametrize("outcome", list(PingOutcome))
def test_pings_are_counted_by_outcome_and_measured_when_answered(outcome: PingOutcome) -> None:
    world = World().goes(*loaded(10.0, 6.0), *pinged(11.0, outcome, 0.3))

    answered = outcome is PingOutcome.OK
    assert world.of("model_pings_total", model="gemma", upstream="local", outcome=outcome.value) == 1
    assert world.of("model_ping_duration_seconds_count", model="gemma", upstream="local") == answered
    assert world.of("model_ping_duration_seconds_sum", model="gemma", upstream="local") == 0.3 * answered
    at = world.of("model_last_ping_success_timestamp_seconds", model="gemma", upstream="local")
    assert at == (pytest.approx(WALL + 11.1) if answered else None)


def test_the_state_is_one_of_five() -> None:
    world = World().goes(*loaded(10.0, 6.0), *pinged(11.0, PingOutcome.OK))

    states = {
        state: world.of("model_state", model="gemma", upstream="local", state=state)
        for state in ("unknown", "cold", "loading", "warm", "backoff")
    }
    assert states == {"unknown": 0, "cold": 0, "loading": 0, "warm": 1, "backoff": 0}
    assert world.of("model_instances", model="gemma", upstream="local") == 1


def test_an_eviction_is_counted_once_and_seen_in_the_gauges() -> None:
    world = World().goes(*loaded(10.0, 6.0), *pinged(11.0, PingOutcome.OK), listed(12.0), listed(13.0))

    assert evictions(world) == {"by_hand": 1.0}
    assert world.of("model_instances", model="gemma", upstream="local") == 0
    assert world.of("model_state", model="gemma", upstream="local", state="cold") == 1


def evictions(world: World) -> dict[str, float]:
    """Those that were counted, by cause."""
    return {
        dict(labels)["cause"]: value
        for (name, labels), value in world.samples().items()
        if name == "keepalive_model_evictions_total" and value
    }


def test_what_a_load_of_ours_pushes_out_on_an_old_server_is_unloaded_to_make_room() -> None:
    old = replace(listed(12.0), tier=Tier.V0)
    world = World().goes(
        *loaded(10.0, 6.0), DrainStarted(11.0, GEMMA), old, replace(old, at=13.0, asked=13.0)
    )

    assert evictions(world) == {}
    assert world.of("model_unloads_total", model="gemma", upstream="local", cause="room") == 1


def test_evictions_are_told_apart_by_what_took_the_model() -> None:
    world = World().goes(*loaded(10.0, 6.0), listed(12.0))
    world.goes(*loaded(20.0, 6.0), ListingFailed(21.0, "local", 21.0, Trouble.REFUSED, "gone"), listed(22.0))
    world.goes(*loaded(30.0, 6.0), ListingFailed(31.0, "local", 31.0, Trouble.REFUSED, "gone"), listed(32.0))

    assert evictions(world) == {"by_hand": 1.0, "restart": 2.0}


def test_the_state_of_an_upstream_is_one_of_four() -> None:
    def states() -> dict[str, float | None]:
        return {
            state: world.of("upstream_state", upstream="local", state=state)
            for state in ("unknown", "up", "down", "unauthorized")
        }

    world = World()
    unknown = states()
    world.goes(ListingFailed(11.0, "local", 11.0, Trouble.UNAUTHORIZED, "it wants a token"))

    assert unknown == {"unknown": 1, "up": 0, "down": 0, "unauthorized": 0}
    assert states() == {"unknown": 0, "up": 0, "down": 0, "unauthorized": 1}


def test_an_upstream_is_up_when_it_answers_as_it_should() -> None:
    world = World()
    unknown = world.of("upstream_up", upstream="local")
    up = world.goes(listed(10.0)).of("upstream_up", upstream="local")
    down = world.goes(ListingFailed(11.0, "local", 11.0, Trouble.REFUSED, "gone")).of(
        "upstream_up", upstream="local"
    )

    assert [unknown, up, down] == [0, 1, 0]


def test_an_upstream_that_is_gone_from_the_config_has_no_series() -> None:
    world = World()
    world.text()

    world.upstream = Upstream("other")

    assert world.of("upstream_up", upstream="local") is None
    assert world.of("upstream_state", upstream="local", state="unknown") is None
    assert world.of("upstream_up", upstream="other") == 0


def test_a_model_that_is_not_configured_has_no_series_whatever_is_reported_of_it() -> None:
    world = World()
    before = len(world.samples())

    for number in range(1000):
        stranger = Model(id=ModelId("local", f"stranger-{number}"))
        world.models[stranger.id] = stranger
        world.goes(listed(10.0 + number), model=stranger.id)

    assert len(world.samples()) == before
    assert "stranger" not in world.text()


def test_a_model_that_leaves_the_config_ends_and_one_that_stays_keeps_its_counts() -> None:
    other = ModelId("local", "other")
    world = World(GEMMA, other).goes(*loaded(10.0, 6.0))

    world.metrics.configure([GEMMA])

    assert world.of("model_loads_total", model="gemma", upstream="local", outcome="ok") == 1
    assert world.of("model_wanted", model="other", upstream="local") is None


ODD_KEYS = [
    'quote"d',
    "back\\slash",
    "line\nfeed",
    '\\"\n',
    "org/model@q4_k_m",
    "müsli 🥣",
    'x",state="warm"} 1\nkeepalive_fake 1\n#',
    "",
]


@pytest.mark.parametrize("key", ODD_KEYS)
@pytest.mark.parametrize("accept", ["", OPENMETRICS])
def test_whatever_a_key_holds_is_one_label_value(key: str, accept: str) -> None:
    world = World(ModelId("local", key))
    parse = parse_openmetrics if accept else parse_text

    families = {family.name: family for family in parse(world.text(accept))}

    values = {sample.labels["model"] for sample in families["keepalive_model_wanted"].samples}
    assert values == {key}
    assert "keepalive_fake" not in families


def test_a_page_is_written_anew_only_for_the_models_that_changed() -> None:
    other = ModelId("local", "other")
    world = World(GEMMA, other)
    world.text()
    before = {model: series._lines for model, series in world.metrics._series.items()}

    world.goes(*loaded(10.0, 6.0))
    world.text()

    after = {model: series._lines for model, series in world.metrics._series.items()}
    assert after[other] is before[other]
    assert after[GEMMA] is not before[GEMMA]


def test_buckets_reach_to_fifteen_minutes_and_each_bound_counts_what_equals_it() -> None:
    assert LOAD_BUCKETS[-1] == 900.0
    assert PING_BUCKETS[-1] == 60.0
    world = World().goes(*loaded(10.0, seconds=900.0))

    assert world.of("model_load_duration_seconds_bucket", model="gemma", upstream="local", le="600.0") == 0
    assert world.of("model_load_duration_seconds_bucket", model="gemma", upstream="local", le="900.0") == 1


def test_how_long_requests_took_is_counted_as_the_library_would():
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    counted = ProxyMetrics(ours, lambda: 0, lambda: 0, dict, (1.0,))
    text, bounds = "From the request to the end of its answer.", (0.1, 0.25, 0.5, *LOAD_BUCKETS, 3600.0)
    name = "keepalive_proxy_request_duration_seconds"
    library = Histogram(name, text, ["model"], buckets=bounds, registry=theirs).labels("a")
    for seconds in (0.0, 0.1, 0.1000001, 1.0, 900.0, 3600.0, 3601.0):
        counted.count(Seen(ModelId("local", "a"), "chat", None, Outcome.OK, 200, seconds=seconds))
        library.observe(seconds)

    page = generate_latest(ours).decode()
    assert [line for line in page.splitlines() if name in line] == generate_latest(
        theirs
    ).decode().splitlines()
    assert ours.get_sample_value(
        "keepalive_proxy_requests_total", {"model": "a", "route": "chat", "outcome": "ok"}
    ) == 7  # fmt: skip
