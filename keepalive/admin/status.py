"""What is known, as the JSON that `/api/status` and `/api/history` promise.

Pure: records in, plain values out. Times inside are of the keeper's clock; outside they are UTC.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any

from keepalive import __version__
from keepalive.core import room
from keepalive.core.explain import eta, explain, next_try, ready_in
from keepalive.core.facts import ModelId
from keepalive.core.plan import arranged
from keepalive.core.primes import label
from keepalive.core.records import Model, Snapshot, Upstream
from keepalive.core.states import State
from keepalive.observers.history import Story

Json = dict[str, Any]


def is_ready(models: Sequence[Model]) -> bool:
    return all(model.state is State.WARM for model in models if model.wanted)


def document(
    snapshot: Snapshot,
    date: Callable[[float], float],
    started: float,
    urls: Mapping[str, str],
    mistakes: Sequence[str] = (),
    scraped: float | None = None,
    silences: Mapping[ModelId | None, float] = MappingProxyType({}),
    opens: Mapping[ModelId, float] = MappingProxyType({}),
) -> Json:
    """`date` turns the keeper's clock into Unix seconds; `mistakes` are those of a rejected config.

    `silences`: seconds since something came of an answer that has begun, by model. `opens`: when the windows that are
    closed open next, in Unix seconds.
    `started` is the daemon's birth and `scraped` when its metrics were last read, in Unix seconds.
    """
    return {
        "version": __version__,
        "now": utc(date(snapshot.now)),
        "ready": is_ready(snapshot.models),
        "started_at": utc(started),
        "scraped_at": None if scraped is None else utc(scraped),
        "config": {"ok": not mistakes, "mistakes": list(mistakes)},
        "upstreams": [
            {
                "name": upstream.name,
                "url": urls.get(upstream.name),
                "state": upstream.state.value,
                "tier": upstream.tier.value if upstream.tier else None,
                "since": utc(date(upstream.since)),
                "error": upstream.error,
                "memory": memory_document(upstream, snapshot.of(upstream.name), snapshot.now),
                "sdk": upstream.sight.sdk.value,
                "sdk_reason": upstream.sight.why,
            }
            for upstream in snapshot.upstreams
        ],
        "models": [
            model_document(
                upstream, siblings, model, snapshot.now, date, silences.get(model.id), opens.get(model.id)
            )
            for upstream in snapshot.upstreams
            for siblings in [snapshot.of(upstream.name)]
            for model in siblings
        ],
    }


def memory_document(upstream: Upstream, models: Sequence[Model], now: float) -> Json | None:
    """Whose memory it is; None where that is no matter."""
    if not room.manages(upstream, models):
        return None
    budget = room.limit(upstream, models, now)
    arrangement = arranged(upstream, models, now)
    return {
        "budget_bytes": budget,
        "places": upstream.places,
        "used_bytes": room.used(upstream, models),
        "source": room.limit_source(upstream, models, now),
        "strangers": [
            {"key": one.key, "bytes": None if one.size_bytes is None else round(one.size_bytes * room.MARGIN)}
            for one in room.others(upstream, models)
        ],
        "next_to_go": [model.id.key for model in room.next_to_go(models, now)],
        "waiting": [model.id.key for model in models if arrangement and model.id in arrangement.waits],
    }


def state(model: Model) -> Json:
    """Of one model no more than what a probe asks for."""
    return {
        "key": model.id.key,
        "upstream": model.id.upstream,
        "state": model.state.value,
        "wanted": model.wanted,
    }


def model_document(
    upstream: Upstream,
    siblings: Sequence[Model],
    model: Model,
    now: float,
    date: Callable[[float], float],
    silent: float | None,
    opens: float | None = None,
) -> Json:
    """One model. `opens`: when its window does next, in Unix seconds."""

    def at(moment: float | None) -> str | None:
        return None if moment is None or math.isinf(moment) else utc(date(moment))

    def tell(moment: float) -> str:
        return clock_time(date(moment), date(now))

    since, left = model.loading_since, eta(model, siblings, now)
    last, lost = model.last_ping, model.last_eviction
    awaited = ready_in(upstream, siblings, model, now) if model.waiting else left
    return {
        **state(model),
        "since": at(model.since),
        "keep": "auto" if model.policy.auto else "always",
        "memory_bytes": room.takes(model),
        "memory_source": room.source(model),
        "idle_at": at(_idle_at(model)),
        "listed": model.listed,
        "busy": model.busy or model.engaged,
        "queued": model.queued,
        "in_flight": model.in_flight,
        "waiting": model.waiting,
        # Until it is there for who waits for it, also before its load has begun.
        "eta_seconds": None if awaited is None else round(awaited, 3),
        "silent_seconds": None
        if silent is None
        else math.floor(silent),  # or it were news ten times a second
        "instance_id": model.instance_id,
        "instances": len(model.instances),
        "ours": model.instance_id in model.ours,
        "context_length": model.instances[0].context_length if model.instances else None,
        # LM Studio's own words: null where it says nothing, or where nothing runs out.
        "ttl_seconds": None if model.ttl is None or math.isinf(model.ttl) else round(model.ttl, 3),
        "last_used_at": None if model.last_used is None else utc(model.last_used),
        "goes_at": at(model.goes_at),
        "passes_guardrails": None if model.need is None else model.need.passes_guardrails,
        "load": None
        if since is None
        else {
            "elapsed_seconds": round(max(0.0, now - since), 3),
            "eta_seconds": None if left is None else round(left, 3),
            "attempt": model.failures + 1,
            "progress": None if model.progress is None else round(model.progress, 3),
        },
        "last_load_seconds": model.recent_loads[-1] if model.recent_loads else None,
        "loads": model.loads,
        "evictions": model.evictions,
        "last_eviction": None
        if lost is None
        else {"at": at(lost.at), "cause": lost.cause.value, "idle_seconds": round(lost.idle_seconds, 3)},
        "last_ping": None
        if last is None
        else {"at": at(last.at), "outcome": last.outcome.value, "seconds": round(last.seconds, 3)},
        "primed": _primed(model, at),
        "next_ping_at": at(_next_ping(model, now)),
        "retry_at": at(next_try(upstream, model, now)),
        "reason": explain(
            upstream, siblings, model, now, tell, None if opens is None else clock_time(opens, date(now))
        ),
    }


def _primed(model: Model, at: Callable[[float | None], str | None]) -> Json | None:
    """None where nothing is to be primed."""
    priming = model.priming
    if not priming.wished:
        return None
    whys = [f"{label(opening)}: {why}" for opening, why in priming.unfit]
    if priming.useless is not None:
        whys.insert(0, priming.useless)
    tokens = [primed.tokens for primed in priming.done if primed.tokens is not None]
    return {
        "openings": len(priming.done),
        "of": len(priming.wished),
        "tokens": sum(tokens) if tokens else None,
        "at": at(priming.done[-1].at if priming.done else None),
        "under_way": priming.under_way is not None,
        "reason": "; ".join(whys) or None,
    }


def _next_ping(model: Model, now: float) -> float | None:
    due = model.ping_due_at
    if due is None or not model.held or not (model.instances or model.blind):
        return None
    return max(due, now)


def _idle_at(model: Model) -> float | None:
    """When it is let go for want of use."""
    if model.policy.idle is None or not model.ours or model.in_flight or model.waiting:
        return None
    return model.unused_since + model.policy.idle


def story_document(model: ModelId, story: Story, wall: float) -> Json:
    """What is remembered of one model."""
    requests, seconds = story.waits_lately(wall)
    return {
        "key": model.key,
        "upstream": model.upstream,
        "loads": [
            {"at": utc(load.at), "outcome": load.outcome.value, "seconds": round(load.seconds, 3)}
            for load in story.loads
        ],
        "evictions": [{"at": utc(lost.at), "cause": lost.cause.value} for lost in story.evictions],
        "timeline": [{"at": utc(at), "state": str(state)} for at, state in story.timeline(wall)],
        "waits": {"requests": requests, "seconds": round(seconds, 3)},
        "pings": {outcome.value: count for outcome, count in story.pings_lately(wall).items()},
    }


def requests_document(requests: Sequence[Json], unnamed: Sequence[Json]) -> Json:
    """The last requests, the newest first, and what was asked for that no config names."""
    return {"requests": [{**one, "at": utc(one["at"])} for one in requests], "unnamed": list(unnamed)}


def clock_time(moment: float, now: float) -> str:
    """A time in Unix seconds, by the clock on the wall here; what is not today with its day."""
    local, today = datetime.fromtimestamp(moment).astimezone(), datetime.fromtimestamp(now).astimezone()
    return f"{local:%H:%M:%S}" if local.date() == today.date() else f"{local:%a %d %b %H:%M}"


def utc(moment: float) -> str:
    """A time in Unix seconds as people and programs both read it."""
    text = datetime.fromtimestamp(moment, UTC).isoformat(timespec="milliseconds")
    return text.replace("+00:00", "Z")
