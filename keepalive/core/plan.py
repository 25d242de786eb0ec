"""What to do now, on one upstream, by what is known of it and its models.

A load, a ping or an unload needs knowledge no older than `FRESH`: each is preceded by a listing.
"""

from collections.abc import Callable, Sequence
from math import inf

from keepalive.core.actions import (
    Action,
    Drain,
    EndDrain,
    GiveUpLoad,
    Load,
    Prime,
    Refresh,
    SendPing,
    SkipPing,
    Unload,
)
from keepalive.core.facts import ModelId, Tier, UnloadCause, fold_key
from keepalive.core.primes import by_opening, give_ups, next_primes
from keepalive.core.records import Model, Upstream, UpstreamState, is_loading
from keepalive.core.room import Arrangement, arrange, is_in_use, manages
from keepalive.core.states import State
from keepalive.core.upstreams import TRIED_LEAST

# A listing this old may still lead to a load or a ping: it is the race with other clients that we accept,
# and in practice the plan runs in the same breath as the listing that it rests on.
FRESH = 1.0
# How often an unresolved load is looked at.
PENDING_POLL = 2.0
# A released model that served a user this recently is not unloaded under his feet.
LINGER = 60.0
# LM Studio answers four requests for a model at once by default; more pings than that would queue.
PINGS_AT_ONCE = 4


def plan(upstream: Upstream, models: Sequence[Model], now: float) -> list[Action]:
    """What to do now on one upstream, given all of its models.

    Carried out and reported as facts, a plan leaves nothing of itself in the next plan.
    Where another daemon acts, all that is left to do is to look.
    """
    if not upstream.acts:
        return _look(upstream, models, now)
    due = [m for m in models if _ping_is_due(m, now)]
    actions: list[Action] = [SkipPing(m.id) for m in due if _is_in_use(m)]
    room = arranged(upstream, models, now)
    unloads, loads = _unloads(upstream, models, now, room), _loads(upstream, models, now, room)
    drains = room.drains if room is not None else frozenset[ModelId]()
    drains |= _pushed_out(upstream, models, loads, certain=room is not None)
    actions += [Drain(m.id) for m in models if m.id in drains and not m.draining]
    actions += [EndDrain(m.id) for m in models if m.draining and m.id not in drains]
    actions += [GiveUpLoad(m) for m in (room.given_up if room is not None else ())]
    going = {model.id for model, _ in unloads}
    pings = _pings(models, [m for m in due if m.id not in going])
    if _may_push_out(upstream):
        # A ping that comes there behind the load which has pushed its model out would be a load, too.
        if any(m.pinging for m in models):
            loads = []
        elif loads or any(m.load_started is not None for m in models):
            pings = []
    free = not (loads or upstream.arriving)
    actions += give_ups(models, free=free)
    pings = by_opening(pings, models, free=free)
    primes = [] if pings else [p for p in next_primes(models, now, free=free) if p[0].id not in going]
    stale = False
    loading = False
    for model, action in unloads + loads + pings + primes:
        if fold_key(model.id.key) in upstream.unread:
            continue  # whether it is there is not known, and a ping might load it
        # What has just gone may be coming back already, by somebody else's request; and who primes is to be in the
        # way of no load.
        shows_loads = isinstance(action, Load | Prime)
        loading = loading or shows_loads
        if (upstream.sees_loading or not shows_loads) and _is_fresh(upstream, model, now):
            actions.append(action)
        else:
            stale = True
    if not upstream.listing and _refresh_is_due(upstream, models, now, stale=stale):
        loading = loading or any(_may_be_loading(m) for m in models)
        actions.append(Refresh(upstream.name, loading=loading))
    return actions


def _look(upstream: Upstream, models: Sequence[Model], now: float) -> list[Action]:
    alone = _ready(upstream, models, now, lambda m: m.alone and m.needed)[: _slots(upstream, models, now)]
    fresh = [m for m in alone if upstream.sees_loading and _is_fresh(upstream, m, now)]
    actions: list[Action] = [Load(m.id) for m in fresh]
    if not upstream.listing and _refresh_is_due(upstream, models, now, stale=len(fresh) < len(alone)):
        actions.append(Refresh(upstream.name, loading=any(map(_may_be_loading, models))))
    return actions


def _is_fresh(upstream: Upstream, model: Model, now: float) -> bool:
    return (
        upstream.state is UpstreamState.UP
        and now - upstream.answered_at <= FRESH
        and upstream.asked > model.touched_at
    )


def _refresh_is_due(upstream: Upstream, models: Sequence[Model], now: float, *, stale: bool) -> bool:
    if now >= upstream.due_at:
        return True
    if upstream.failures:
        # It is down or refuses us: its own pace. But whoever waits is not to wait longer than it is away: behind a
        # tunnel, a port forwarder or a gateway it never refuses a connection.
        return (
            upstream.state is not UpstreamState.UNAUTHORIZED
            and now >= upstream.tried_at + TRIED_LEAST
            and any(m.callers for m in models)
        )
    if stale:
        return True
    if any(_may_tell(upstream, m, now) or _is_silent(upstream, m) for m in models):
        return True
    pending = any(m.pending is not None and m.load_started is None for m in models)
    return pending and now >= upstream.answered_at + PENDING_POLL


def _may_tell(upstream: Upstream, model: Model, now: float) -> bool:
    """Whether a look at our own load would say if this server shows loads: who comes after us may have to know."""
    began = model.load_started
    return began is not None and not model.tells_loading and upstream.asked < began + PENDING_POLL <= now


def _is_silent(upstream: Upstream, model: Model) -> bool:
    """Whether it left a ping unanswered, and nobody was asked why since. Where it is seen to work, that is why."""
    return model.busy and not model.engaged and upstream.asked <= model.touched_at


def _may_be_loading(model: Model) -> bool:
    return (
        model.pending is not None or model.load_started is not None or (model.needed and not model.instances)
    )


def holds_a_slot(model: Model, now: float) -> bool:
    """Whether others wait for its load: not behind one of which nothing shows that it is alive.

    That is begun and not seen to end, and takes longer than it is known to, or nobody knows how long it takes.
    """
    if model.load_started is not None:
        return True
    pending = model.pending
    if pending is None or not pending.ours or pending.doubted:
        return False
    if pending.seen or pending.loaded:
        return True
    return pending.expected is not None and now < pending.since + pending.expected


def arranged(upstream: Upstream, models: Sequence[Model], now: float) -> Arrangement | None:
    """What is to become of the memory there; None where memory is no matter."""
    if not manages(upstream, models):
        return None
    return arrange(upstream, models, _line(upstream, models, now), _slots(upstream, models, now), now)


def coming(upstream: Upstream, models: Sequence[Model], now: float) -> Sequence[Model]:
    """Who will be loaded as soon as it has its turn, in that order: nobody has to end an answer for it."""
    if not manages(upstream, models):
        return _asked(upstream, models, now)
    return arrange(upstream, models, _line(upstream, models, now), len(models), now).coming


def _line(upstream: Upstream, models: Sequence[Model], now: float) -> list[Model]:
    return sorted(_ready(upstream, models, now, lambda m: m.held), key=_place_in_line)


def _place_in_line(model: Model) -> tuple[bool, float, int]:
    """Of what is always kept whoever is waited for comes first; then, of `auto` models, who has waited longest."""
    if model.policy.auto:
        return True, model.in_line_since, model.rank
    return False, model.callers == 0, model.rank


def _ready(
    upstream: Upstream, models: Sequence[Model], now: float, meant: Callable[[Model], bool]
) -> list[Model]:
    could = [m for m in models if meant(m) and _is_loadable(m, now)]
    return [m for m in could if blocked_by(upstream, models, m) is None]


def _slots(upstream: Upstream, models: Sequence[Model], now: float) -> int:
    slots = upstream.max_loading - sum(holds_a_slot(m, now) for m in models)
    if _may_push_out(upstream):
        # Each load on demand may push out the one before: see what it does.
        slots = min(slots, 1 - sum(map(is_loading, models)))
    return max(slots, 0)


def _loads(
    upstream: Upstream, models: Sequence[Model], now: float, room: Arrangement | None
) -> list[tuple[Model, Action]]:
    if room is not None:
        loads: list[tuple[Model, Action]] = [(m, Load(m.id, claim=room.claims.get(m.id))) for m in room.loads]
        if room.ahead is not None:
            loads.append((room.ahead, Load(room.ahead.id, True, room.claims.get(room.ahead.id))))
        return loads
    return [(m, Load(m.id)) for m in _asked(upstream, models, now)[: _slots(upstream, models, now)]]


def _asked(upstream: Upstream, models: Sequence[Model], now: float) -> list[Model]:
    ready = _ready(upstream, models, now, lambda m: m.needed)
    # Somebody waits for the first of these; then the order of the config.
    ready.sort(key=lambda m: (m.callers == 0, m.rank))
    return ready


def _is_loadable(model: Model, now: float) -> bool:
    return (
        model.listed
        and model.state in (State.COLD, State.BACKOFF)
        and not model.instances
        and not model.calling
        and model.pending is None
        # Nobody fights over memory for nothing. But whoever waits gets the model, however often it was taken.
        and (model.retry_at is None or now >= model.retry_at or (model.callers > 0 and model.contested))
    )


def blocked_by(upstream: Upstream, models: Sequence[Model], model: Model) -> str | None:
    """Why loading this model on demand would push out what must stay; None when nothing does.

    LM Studio 0.3.x loads over HTTP only on demand, and by default keeps one such model: loading another
    evicts it, even while it generates. Newer versions load explicitly and leave the others alone.
    """
    if not _may_push_out(upstream):
        return None
    ours = {
        fold_key(m.id.key)
        for m in models
        if (m.ours or is_loading(m)) and all(i.id in m.ours for i in m.instances)
    }
    foreign = sorted((upstream.resident | upstream.arriving) - ours - {fold_key(model.id.key)})
    if foreign:
        return f"loading it on LM Studio 0.3.x could push out {foreign[0]}, which we did not load"
    if upstream.displaces is None:
        return None
    # Among those that are let go for each other there is no first: they take turns (`room`).
    needed = (m for m in models if m.needed and m.listed and not m.policy.auto)
    first = min(needed, key=lambda m: m.rank, default=model)
    if first is model:
        return None
    return f"LM Studio 0.3.x keeps one model at a time here, and {first.id.key} comes first in the config"


def _may_push_out(upstream: Upstream) -> bool:
    """Whether a load of ours, on demand, may take the place of what is there."""
    return upstream.tier is Tier.V0 and upstream.displaces is not False


def _pushed_out(
    upstream: Upstream, models: Sequence[Model], loads: Sequence[tuple[Model, Action]], *, certain: bool
) -> frozenset[ModelId]:
    """Which of ours a load of ours on demand pushes out, from before it begins until a listing has shown it.

    A request that goes to one of them meanwhile would load it again, and push out the other.
    """
    if not _may_push_out(upstream) or (upstream.displaces is None and not certain):
        return frozenset()
    coming = {m.id for m, _ in loads}
    # After a load that failed, too, the next look decides.
    coming |= {m.id for m in models if is_loading(m) or (not m.instances and m.touched_at >= upstream.asked)}
    return frozenset(m.id for m in models if coming and m.ours and m.instances and m.id not in coming)


def _pings(models: Sequence[Model], due: Sequence[Model]) -> list[tuple[Model, Action]]:
    free = PINGS_AT_ONCE - sum(m.pinging for m in models)
    due = [m for m in due if not _is_in_use(m)]
    due.sort(key=lambda m: (m.callers == 0, m.state is State.WARM, m.rank))
    return [(m, SendPing(m.id, m.instance_id or m.id.key)) for m in due[: max(free, 0)]]


def _ping_is_due(model: Model, now: float) -> bool:
    # Most models of most plans are warm and not due: that is found out first, and once.
    due_at = model.ping_due_at
    return (
        (due_at is None or now >= due_at)
        and model.held
        and model.policy.pinged
        and model.present
        and not model.calling
        and not _must_unload_crashed(model)
    )


def _is_in_use(model: Model) -> bool:
    """Users' requests prove a warm model better than a ping, and a ping would get in their way."""
    if model.state is not State.WARM:
        return False
    last_ping = model.last_ping.at if model.last_ping else -inf
    return model.in_use or model.engaged or model.active_at > max(last_ping, model.vouched_at)


def _must_unload_crashed(model: Model) -> bool:
    return model.crashed and model.instance_id in model.ours


def _unloads(
    upstream: Upstream, models: Sequence[Model], now: float, room: Arrangement | None
) -> list[tuple[Model, Action]]:
    if upstream.tier is None or not upstream.tier.calls:
        return []  # nothing before 0.4 can unload over HTTP: the lease runs out by itself
    gone: dict[ModelId, tuple[Model, Action]] = {
        m.id: (m, Unload(m.id, instance.id, _why_unloaded(m)))
        for m in models
        for instance in [i for i in m.instances if i.id in m.ours][:1]
        if _is_unloadable(m, now)
    }
    if any(m.retired for m, _ in gone.values()):
        # A config that writes a key in other letters means what is loaded already.
        kept = {fold_key(m.id.key) for m in models if m.held}
        gone = {i: pair for i, pair in gone.items() if not (pair[0].retired and fold_key(i.key) in kept)}
    for model, instance_id in room.unloads if room is not None else ():
        gone.setdefault(model.id, (model, Unload(model.id, instance_id, UnloadCause.ROOM)))
    return list(gone.values())


def _is_unloadable(model: Model, now: float) -> bool:
    if model.calling or model.in_use or (model.retry_at is not None and now < model.retry_at):
        return False
    held = model.held
    if held and _must_unload_crashed(model):
        return True
    over = _is_idle(model, now) if held else now >= max(model.active_at, model.elsewhere_at) + LINGER
    # Else somebody who does not ask through us is at it, or may be.
    return over and not (model.engaged or model.seen_by.late)


def _is_idle(model: Model, now: float) -> bool:
    """Whether nobody has used it for as long as it may lie idle."""
    idle = model.policy.idle
    return (
        model.policy.auto
        and idle is not None
        and now >= model.unused_since + idle
        and not is_in_use(model, now)
    )


def _why_unloaded(model: Model) -> UnloadCause | None:
    if model.held:
        return None if _must_unload_crashed(model) else UnloadCause.IDLE
    by_window = model.windowed and model.asked_for is None and not model.retired
    return UnloadCause.WINDOW if by_window else UnloadCause.RELEASED
