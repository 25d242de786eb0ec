"""Prometheus metrics, recorded from facts and from nothing else.

What *is* (states, instances, up) is read from the keeper's records when somebody scrapes; what *happened*
(loads, pings, evictions) is counted as the facts come. Label values come from the config: a model that is not
configured has no series.

The library counts and writes whatever exists once. The series of models are written here, because the
library needs 0.7 s of CPU for those of a thousand models, at every scrape, in the loop that carries users'
streams. Here a model's lines are written again only when one of its numbers has changed.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, Protocol

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from keepalive import __version__
from keepalive.core.callers import Seen
from keepalive.core.facts import (
    Fact,
    LoadEnded,
    LoadOutcome,
    ModelId,
    PingEnded,
    PingOutcome,
    PrimeEnded,
    PrimeOutcome,
    RequestsCounted,
    RequestStarted,
    Sdk,
    UnloadCause,
    UnloadEnded,
    WaitStarted,
)
from keepalive.core.plan import arranged
from keepalive.core.records import Cause, Model, Snapshot, Upstream, UpstreamState
from keepalive.core.room import limit, manages, takes, used
from keepalive.core.states import State

# A load takes 5 s to more than 120 s, and is given up on after 15 minutes.
LOAD_BUCKETS = (1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 45.0, 60.0, 90.0, 120.0, 180.0, 300.0, 600.0, 900.0)
# A warm model answers in 0.1 s to a few seconds, a very large one needed 4.7 s for its first token.
# An opening of 20,000 tokens takes half a minute where nothing is known of it, and a tenth of a second where all is.
PRIME_BUCKETS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 900.0)
PING_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)

# Name behind `keepalive_`, type and help of the families that have a series per model, in the order of
# `_Series.lines`. A counter's samples end in `_total`.
FAMILIES = (
    ("model_state", "gauge", "1 for the state that the model is in, 0 for the others."),
    ("model_wanted", "gauge", "1 when the model should be warm now."),
    ("model_instances", "gauge", "Copies of the model in memory, as last listed."),
    ("model_last_load_seconds", "gauge", "How long the last load took that succeeded."),
    (
        "model_last_ping_success_timestamp_seconds",
        "gauge",
        "When the model last answered a ping, in Unix seconds.",
    ),
    ("model_loads", "counter", "Loads by how they ended."),
    (
        "model_load_duration_seconds",
        "histogram",
        "How long loads took that succeeded: as LM Studio measured it, else by our clock.",
    ),
    ("model_evictions", "counter", "Times a loaded model went missing without us, by what took it."),
    (
        "model_pings",
        "counter",
        "Pings by how they ended; a skipped one was needless, because users' requests had been answered.",
    ),
    ("model_ping_duration_seconds", "histogram", "How long pings took that were answered."),
    ("model_primes", "counter", "Openings that were replayed to the model, by how that ended."),
    (
        "model_prime_duration_seconds",
        "histogram",
        "How long it took the model to read openings that were replayed.",
    ),
    (
        "model_memory_bytes",
        "gauge",
        "What the model takes in memory when it is loaded, as far as that is known.",
    ),
    ("model_unloads", "counter", "Copies of ours that were let go, by why."),
)


# Names of daemons are not of our config: another cluster's mistake must not cost us a series for each of its starts.
INSTANCES_COUNTED = 64


class Cluster(Protocol):
    """The daemons that are one with this, where there are any."""

    @property
    def engine_up(self) -> bool: ...
    @property
    def renewal(self) -> float:
        """Seconds that the last renewal of its lease took."""
        ...

    @property
    def held(self) -> Collection[str]:
        """The upstreams on which this one acts."""
        ...

    @property
    def instances(self) -> Mapping[str, bool]:
        """All that were seen lately, and whether they were when it last looked."""
        ...

    @property
    def handovers(self) -> Mapping[str, int]: ...


class Metrics:
    """The metrics of one daemon. `look` gives the current records, `date` turns their clock into Unix seconds."""

    def __init__(self, look: Callable[[], Snapshot], date: Callable[[float], float]) -> None:
        self._look = look
        self._date = date
        self._series: dict[ModelId, _Series] = {}
        # Or each counter gets a second series, with the time of its birth.
        disable_created_metrics()  # type: ignore[no-untyped-call]  # the library left it without types
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        Gauge("keepalive_build_info", "Always 1.", ["version"], registry=registry).labels(__version__).set(1)
        self._up = Gauge(
            "keepalive_upstream_up",
            "1 when the upstream answers as it should.",
            ["upstream"],
            registry=registry,
        )
        self._upstream_state = Gauge(
            "keepalive_upstream_state",
            "1 for the state that the upstream is in, 0 for the others.",
            ["upstream", "state"],
            registry=registry,
        )
        self._budget = Gauge(
            "keepalive_upstream_memory_budget_bytes",
            "What models may take there together, as far as that is known.",
            ["upstream"],
            registry=registry,
        )
        self._used = Gauge(
            "keepalive_upstream_memory_used_bytes",
            "What models take there now, whoever loaded them, as far as that is known.",
            ["upstream"],
            registry=registry,
        )
        self._lacking = Gauge(
            "keepalive_model_waiting_for_room",
            "Requests that wait because there is no room for the model in memory.",
            ["model", "upstream"],
            registry=registry,
        )
        self._ahead = Counter(
            "keepalive_loads_ahead",
            "Loads ahead of demand, by whether somebody then asked for the model before it went.",
            ["outcome"],
            registry=registry,
        )
        for outcome in ("used", "unused"):
            self._ahead.labels(outcome)
        self._upstream_sdk = Gauge(
            "keepalive_upstream_sdk",
            "1 for what became of the socket of LM Studio's SDKs there, 0 for the others.",
            ["upstream", "sdk"],
            registry=registry,
        )
        self.jobs_missed = Counter(
            "keepalive_scheduler_jobs_missed",
            "Runs of scheduled jobs that did not happen in time.",
            registry=registry,
        )
        self.reload_ok = Gauge(
            "keepalive_config_last_reload_successful",
            "1 when the config on disk is the one in use, 0 when it was rejected.",
            registry=registry,
        )
        self.reloaded_at = Gauge(
            "keepalive_config_last_reload_success_timestamp_seconds",
            "When a config was last accepted, in Unix seconds.",
            registry=registry,
        )

    def configure(self, models: Iterable[ModelId]) -> None:
        """Begin the series of these models at zero; those of models that are no longer kept end."""
        self._series = {model: self._series.get(model) or _Series(model) for model in models}

    def watch_cluster(self, cluster: Cluster) -> None:
        self.registry.register(_Cluster(cluster, self._look))

    def counts(self, model: ModelId) -> bool:
        """Whether it has series of its own."""
        return model in self._series

    def observe(self, fact: Fact, before: Model | Upstream, after: Model | Upstream) -> None:
        if isinstance(before, Model) and isinstance(after, Model):
            if before.ahead and not after.ahead:
                used = isinstance(fact, WaitStarted | RequestStarted | RequestsCounted)
                self._ahead.labels("used" if used else "unused").inc()
            if after.id in self._series:
                self._series[after.id].count(fact, before, after)

    def render(self, accept: str) -> tuple[bytes, str]:
        """The page that a scraper with this `Accept` wants, and its content type."""
        snapshot = self._look()
        self._up.clear()
        self._upstream_state.clear()
        self._budget.clear()
        self._used.clear()
        self._lacking.clear()
        self._upstream_sdk.clear()
        for upstream in snapshot.upstreams:
            self._up.labels(upstream.name).set(upstream.state is UpstreamState.UP)
            for state in UpstreamState:
                self._upstream_state.labels(upstream.name, state.value).set(state is upstream.state)
            self._render_memory(upstream, snapshot)
            for sdk in Sdk:
                self._upstream_sdk.labels(upstream.name, sdk.value).set(sdk is upstream.sight.sdk)
        try:
            encode, content_type = choose_encoder(accept)
        except (TypeError, ValueError):
            # It asks for a version that the library cannot read as one.
            encode, content_type = choose_encoder("")
        own = self._render_models(snapshot.models, openmetrics="openmetrics" in content_type)
        return own.encode() + encode(self.registry), content_type

    def _render_memory(self, upstream: Upstream, snapshot: Snapshot) -> None:
        models = snapshot.of(upstream.name)
        if not manages(upstream, models):
            return
        budget = limit(upstream, models, snapshot.now)
        if budget is not None:
            self._budget.labels(upstream.name).set(budget)
        self._used.labels(upstream.name).set(used(upstream, models))
        room = arranged(upstream, models, snapshot.now)
        waits = room.waits if room is not None else {}
        for model in models:
            if model.id in self._series:
                lacking = model.waiting if model.id in waits else 0
                self._lacking.labels(model.id.key, upstream.name).set(lacking)

    def _render_models(self, models: Sequence[Model], *, openmetrics: bool) -> str:
        rows = [self._series[m.id].lines(m, self._date) for m in models if m.id in self._series]
        page = []
        for i, (name, kind, text) in enumerate(FAMILIES):
            # Only the older format names a counter with its suffix.
            name = f"{name}_total" if kind == "counter" and not openmetrics else name
            page.append(f"# HELP keepalive_{name} {text}\n# TYPE keepalive_{name} {kind}\n")
            page += [row[i] for row in rows]
        return "".join(page)


class _Histogram:
    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def lines(self, name: str, labels: str) -> Iterator[str]:
        below = 0
        for bound, count in zip([*self.bounds, math.inf], self.counts, strict=True):
            below += count
            le = "+Inf" if bound == math.inf else repr(bound)
            yield f'keepalive_{name}_bucket{{{labels},le="{le}"}} {below}.0\n'
        yield f"keepalive_{name}_sum{{{labels}}} {self.total!r}\n"
        yield f"keepalive_{name}_count{{{labels}}} {below}.0\n"


class _Series:
    """The numbers of one model, and their lines as last written."""

    __slots__ = (
        "_gauges",
        "_labels",
        "_lines",
        "evictions",
        "load_seconds",
        "loads",
        "ping_seconds",
        "pings",
        "prime_seconds",
        "primes",
        "unloads",
    )

    def __init__(self, model: ModelId) -> None:
        self._labels = f'model="{_escaped(model.key)}",upstream="{_escaped(model.upstream)}"'
        self._gauges: object = None
        self._lines: tuple[str, ...] = ()
        self.loads = dict.fromkeys(LoadOutcome, 0)
        self.pings = dict.fromkeys(PingOutcome, 0)
        self.evictions = dict.fromkeys(Cause, 0)
        self.unloads = dict.fromkeys(UnloadCause, 0)
        self.load_seconds = _Histogram(LOAD_BUCKETS)
        self.ping_seconds = _Histogram(PING_BUCKETS)
        self.primes = dict.fromkeys(PrimeOutcome, 0)
        self.prime_seconds = _Histogram(PRIME_BUCKETS)

    def count(self, fact: Fact, before: Model, after: Model) -> None:
        if after.evictions > before.evictions and after.last_eviction is not None:
            self.evictions[after.last_eviction.cause] += 1
        elif after.made_way > before.made_way:
            self.unloads[UnloadCause.ROOM] += 1
        elif isinstance(fact, LoadEnded):
            self.loads[fact.outcome] += 1
            if fact.outcome is LoadOutcome.OK:
                self.load_seconds.observe(after.recent_loads[-1])
        elif isinstance(fact, PingEnded):
            self.pings[fact.outcome] += 1
            if fact.outcome is PingOutcome.OK:
                self.ping_seconds.observe(fact.seconds)
        elif isinstance(fact, PrimeEnded):
            self.primes[fact.outcome] += 1
            if fact.outcome is PrimeOutcome.OK:
                self.prime_seconds.observe(fact.seconds)
        elif isinstance(fact, UnloadEnded) and fact.message is None and before.letting_go is not None:
            self.unloads[before.letting_go] += 1
        else:
            return
        self._gauges = None

    def lines(self, model: Model, date: Callable[[float], float]) -> tuple[str, ...]:
        """The samples of each family, in the order of `FAMILIES`."""
        last_load = model.recent_loads[-1] if model.recent_loads else None
        copies, primes = len(model.instances), bool(model.priming.wished)
        gauges = (model.state, model.wanted, copies, last_load, model.pinged_at, primes, takes(model))
        if gauges != self._gauges:
            self._lines = tuple(map("".join, self._write(model, last_load, date)))
            self._gauges = gauges
        return self._lines

    def _write(
        self, model: Model, last_load: float | None, date: Callable[[float], float]
    ) -> Iterator[Iterable[str]]:
        labels = self._labels
        yield (f'keepalive_model_state{{{labels},state="{s}"}} {float(s is model.state)}\n' for s in State)
        yield (f"keepalive_model_wanted{{{labels}}} {float(model.wanted)}\n",)
        yield (f"keepalive_model_instances{{{labels}}} {len(model.instances)}.0\n",)
        yield () if last_load is None else (f"keepalive_model_last_load_seconds{{{labels}}} {last_load!r}\n",)
        name = "keepalive_model_last_ping_success_timestamp_seconds"
        at = date(model.pinged_at)
        yield (f"{name}{{{labels}}} {at!r}\n",) if math.isfinite(at) else ()
        yield _by("outcome", "model_loads_total", labels, self.loads)
        yield self.load_seconds.lines("model_load_duration_seconds", labels)
        yield _by("cause", "model_evictions_total", labels, self.evictions)
        yield _by("outcome", "model_pings_total", labels, self.pings)
        yield self.ping_seconds.lines("model_ping_duration_seconds", labels)
        # Most models have no openings: two dozen series of zeros for each would be read for nothing.
        primes = bool(model.priming.wished)
        yield _by("outcome", "model_primes_total", labels, self.primes) if primes else ()
        yield self.prime_seconds.lines("model_prime_duration_seconds", labels) if primes else ()
        memory = takes(model)
        yield () if memory is None else (f"keepalive_model_memory_bytes{{{labels}}} {float(memory)!r}\n",)
        yield _by("cause", "model_unloads_total", labels, self.unloads)


def _by(kind: str, name: str, labels: str, counts: Mapping[Any, int]) -> Iterator[str]:
    for value, count in counts.items():
        yield f'keepalive_{name}{{{labels},{kind}="{value}"}} {count}.0\n'


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


class ProxyMetrics:
    """What users' requests felt. `waiting`, `in_progress` and `silences` are read when somebody scrapes.

    `gap_bounds` are the upper bounds of the buckets in which the proxy counts gaps.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        in_progress: Callable[[], float],
        waiting: Callable[[], float],
        silences: Callable[[], Mapping[ModelId | None, float]],
        gap_bounds: Sequence[float],
        counts: Callable[[ModelId], bool] = lambda model: True,
    ) -> None:
        self._counts = counts
        # Of each request something is counted in these. The library needs ten calls and three locks for that.
        self._ends = _Ends()
        self._durations = _Spread(
            "keepalive_proxy_request_duration_seconds",
            "From the request to the end of its answer.",
            (0.1, 0.25, 0.5, *LOAD_BUCKETS, 3600.0),
        )
        self._gaps = _Spread(
            "keepalive_proxy_inter_token_latency_seconds",
            "Gaps between the events of a stream; an event may carry more than one token.",
            gap_bounds,
        )
        registry.register(self._ends)
        Gauge("keepalive_proxy_requests_in_progress", "Requests under way.", registry=registry).set_function(
            in_progress
        )
        Gauge(
            "keepalive_proxy_requests_waiting", "Requests that wait for a model.", registry=registry
        ).set_function(waiting)
        self._wait = Histogram(
            "keepalive_proxy_wait_seconds",
            "How long requests were held for a model that was not warm.",
            ["model"],
            buckets=(0.1, 0.5, *LOAD_BUCKETS),
            registry=registry,
        )
        self._first = Histogram(
            "keepalive_proxy_time_to_first_token_seconds",
            "From the request to the first delta that is not empty, waiting included.",
            ["model", "start"],
            buckets=(0.1, 0.25, 0.5, *LOAD_BUCKETS),
            registry=registry,
        )
        registry.register(self._durations)
        registry.register(self._gaps)
        registry.register(_Silences(silences, self._label))

    def count(self, seen: Seen) -> None:
        # A name that a caller made up must not become a series.
        model = self._label(seen.model)
        self._ends.add(model, seen.route, seen.outcome)
        self._durations.see(model, seen.seconds)
        if seen.start == "cold":
            self._wait.labels(model).observe(seen.wait_seconds)
        if seen.first_token_seconds is not None:
            self._first.labels(model, seen.start or "warm").observe(seen.first_token_seconds)
        if seen.gaps:
            self._gaps.add(model, seen.gaps, seen.gap_seconds)

    def _label(self, model: ModelId | None) -> str:
        return model.key if model is not None and self._counts(model) else "other"


class _Silences(Collector):
    """How long answers have been silent; nothing is said of a model of which none is under way."""

    def __init__(
        self,
        silences: Callable[[], Mapping[ModelId | None, float]],
        label: Callable[[ModelId | None], str],
    ) -> None:
        self._silences = silences
        self._label = label

    def collect(self) -> Iterator[Metric]:
        family = GaugeMetricFamily(
            "keepalive_proxy_silent_seconds",
            "How long an answer that has begun has been silent; the longest of now.",
            labels=["model"],
        )
        longest: dict[str, float] = {}
        for model, seconds in self._silences().items():
            label = self._label(model)
            longest[label] = max(seconds, longest.get(label, 0.0))
        for label, seconds in longest.items():
            family.add_metric([label], seconds)
        yield family


class _Cluster(Collector):
    def __init__(self, cluster: Cluster, look: Callable[[], Snapshot]) -> None:
        self._cluster = cluster
        self._look = look

    def collect(self) -> Iterator[Metric]:
        cluster = self._cluster
        up = GaugeMetricFamily("keepalive_cluster_engine_up", "1 while etcd answers as it should.")
        up.add_metric([], cluster.engine_up)
        yield up
        renewal = GaugeMetricFamily(
            "keepalive_cluster_engine_renewal_seconds",
            "What etcd took to renew our lease the last time that it did; what takes a third of ttl counts as away.",
        )
        renewal.add_metric([], cluster.renewal)
        yield renewal
        members = GaugeMetricFamily(
            "keepalive_cluster_member_up",
            "1 for each daemon of the cluster that is there, 0 for those that were.",
            labels=["instance"],
        )
        for instance, there in list(cluster.instances.items())[:INSTANCES_COUNTED]:
            members.add_metric([instance], there)
        yield members
        holds = GaugeMetricFamily(
            "keepalive_cluster_holds_lease",
            "1 while it is this daemon that loads, pings and unloads there.",
            labels=["upstream"],
        )
        handovers = CounterMetricFamily(
            "keepalive_cluster_handovers", "Times another daemon began to act there.", labels=["upstream"]
        )
        held = cluster.held
        for upstream in self._look().upstreams:
            holds.add_metric([upstream.name], upstream.name in held)
            handovers.add_metric([upstream.name], cluster.handovers.get(upstream.name, 0))
        yield holds
        yield handovers


class _Ends(Collector):
    """Requests by how they ended."""

    def __init__(self) -> None:
        self._counts: dict[tuple[str, str, str], int] = {}

    def add(self, model: str, route: str, outcome: str) -> None:
        ends = model, route, outcome
        self._counts[ends] = self._counts.get(ends, 0) + 1

    def collect(self) -> Iterator[Metric]:
        family = CounterMetricFamily(
            "keepalive_proxy_requests",
            "Requests by how they ended.",
            labels=["model", "route", "outcome"],
        )
        for ends, count in self._counts.items():
            family.add_metric(ends, count)
        yield family


class _Spread(Collector):
    """Times of each model, by upper bounds that rise."""

    def __init__(self, name: str, text: str, bounds: Sequence[float]) -> None:
        self._name, self._text = name, text
        self._bounds = bounds
        self._counts: dict[str, list[int]] = {}
        self._seconds: dict[str, float] = {}

    def see(self, model: str, seconds: float) -> None:
        """One of them."""
        counts = self._counts.get(model) or self._begin(model)
        counts[bisect_left(self._bounds, seconds)] += 1
        self._seconds[model] += seconds

    def add(self, model: str, counts: Sequence[int], seconds: float) -> None:
        """Many of them, counted by the same bounds."""
        known = self._counts.get(model) or self._begin(model)
        for at, count in enumerate(counts):
            known[at] += count
        self._seconds[model] += seconds

    def _begin(self, model: str) -> list[int]:
        counts = self._counts[model] = [0] * (len(self._bounds) + 1)
        self._seconds[model] = 0.0
        return counts

    def collect(self) -> Iterator[Metric]:
        family = HistogramMetricFamily(self._name, self._text, labels=["model"])
        bounds = [*map(repr, self._bounds), "+Inf"]
        for model, counts in self._counts.items():
            buckets = zip(bounds, map(float, accumulate(counts)), strict=True)
            family.add_metric([model], list(buckets), self._seconds[model])
        yield family
