"""What to say about a model: why it is not warm, and when it should be."""

from collections.abc import Callable, Iterable, Sequence
from math import inf
from statistics import median

from keepalive.core.plan import arranged, blocked_by, coming, holds_a_slot
from keepalive.core.records import UNSEEN, Model, Upstream, UpstreamState
from keepalive.core.room import gigabytes, takes
from keepalive.core.states import State

# Two daemons that start at once in front of one server each see nothing there, and each load it.
RIVAL = "one came while keepalive was loading it: does another keepalive keep the same models?"
# Before this much of it is done, progress tells little: the file is being opened.
PROGRESS_LEAST = 0.02


def eta(model: Model, siblings: Iterable[Model], now: float) -> float | None:
    """Seconds until the load under way should be done; 0 when it is overdue, None when nothing is known.

    From this model's own past loads; before the first, from its size and how fast its siblings on the same
    upstream came into memory; and from its progress, where LM Studio tells it.
    """
    since = model.loading_since
    if since is None:
        return None
    expected = _takes_to_load(model, siblings)
    known = None if expected is None else max(0.0, expected - (now - since))
    if model.progress is None or model.progress < PROGRESS_LEAST:
        return known
    whole = (model.progress_at - since) / model.progress
    left = max(0.0, whole - (now - since))
    # The further it is, the more its own progress tells than the loads before it; of which it may be none.
    return known + (left - known) * model.progress if known else left


def _takes_to_load(model: Model, siblings: Iterable[Model]) -> float | None:
    expected = model.expected_load
    if expected is None and model.size_bytes:
        rates = [s.size_bytes / took for s in siblings if s.size_bytes and (took := s.expected_load)]
        expected = model.size_bytes / median(rates) if rates else None
    return expected


def ready_in(upstream: Upstream, models: Sequence[Model], model: Model, now: float) -> float | None:
    """Seconds until it should be there, the loads that come before its own included; None when nobody can tell.

    When somebody's answer has to end for it, nobody can.
    """
    if model.loading_since is not None:
        return eta(model, models, now)
    under_way = [0.0 if m.giving_up else eta(m, models, now) for m in models if holds_a_slot(m, now)]
    free = [left for left in under_way if left is not None]
    if len(free) < len(under_way):
        return None
    free += [0.0] * (upstream.max_loading - len(free))
    for other in coming(upstream, models, now):
        seconds = _takes_to_load(other, models)
        if seconds is None:
            break
        free.sort()
        free.append(free.pop(0) + seconds)
        if other.id == model.id:
            return free[-1]
    return None


def _for_nobody(load: Model) -> str:
    """What is to be said of a load that somebody waits behind."""
    if not load.ahead:
        return ""
    if load.giving_up:
        return ", which nobody waits for, and LM Studio is asked to end that"
    return ", which nobody waits for, but LM Studio takes no word to end that"


def _why_unwanted(upstream: Upstream, model: Model, opens: str | None) -> str:
    if model.asked_for is False:
        return "released by hand"
    if not model.window_open:
        return f"outside its window until {opens}" if opens else "outside its window"
    needs = takes(model)
    if upstream.memory is not None and needs is not None and needs > upstream.memory:
        return f"it never fits: it takes {gigabytes(needs)}, and the budget is {gigabytes(upstream.memory)}"
    return "loaded when somebody asks for it"


def next_try(upstream: Upstream, model: Model, now: float) -> float | None:
    """When what went wrong is tried again; None where nothing went wrong, and where it is due already."""
    again = -inf if model.retry_at is None else model.retry_at
    if upstream.state is UpstreamState.UNAUTHORIZED and model.state is not State.WARM:
        again = max(again, upstream.due_at)
    return again if again > now else None


def explain(
    upstream: Upstream,
    models: Sequence[Model],
    model: Model,
    now: float,
    tell: Callable[[float], str] | None = None,
    opens: str | None = None,
) -> str | None:
    """Why this model is not warm, in a sentence; for a warm one what is odd about it, or None.

    `tell` says a moment as people read it; `opens` is when its window does next, in such words.
    """
    if model.state is State.WARM and len(model.instances) > 1:
        copies = f"{len(model.instances)} copies are in memory"
        return copies if model.doubled_at is None else f"{copies}: {RIVAL}"
    if model.draining:
        return "makes room: it is given to nobody until another one has been there"
    if model.state is State.COLD and not model.needed:
        return _why_unwanted(upstream, model, opens)
    if model.state is State.COLD and model.listed:
        blocked = blocked_by(upstream, models, model)
        if blocked:
            return blocked
        room = arranged(upstream, models, now)
        if room is not None and (lack := room.never.get(model.id) or room.waits.get(model.id)):
            return lack
        other = next((m for m in models if holds_a_slot(m, now)), None)
        if other and other is not model:
            return f"waits for its turn: {other.id.key} is loading{_for_nobody(other)}"
    if tell and model.pending and model.reason and model.reason.startswith(UNSEEN):
        return f"{UNSEEN} until {tell(model.pending.until)}{model.reason.removeprefix(UNSEEN)}"
    return model.reason
