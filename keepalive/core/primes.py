"""Openings that are replayed to a loaded model, so that nobody waits for its empty prompt cache: when, and what came
of it.

In nobody's way: one at a time on an upstream, while nobody there waits, is answered or loads, and given up the moment
that somebody does. How its opening fares says little about a model: whatever goes wrong, it stays as warm as it was.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from math import inf

from keepalive.core.actions import Action, GiveUpPrime, Prime
from keepalive.core.changed import replace
from keepalive.core.errors import Reason
from keepalive.core.facts import (
    OpeningRead,
    OpeningsLearned,
    PingOutcome,
    PrimedAnswered,
    PrimeEnded,
    PrimeOutcome,
    PrimeStarted,
)
from keepalive.core.moves import proved
from keepalive.core.records import Model, Ping, Primed, Priming
from keepalive.core.states import IllegalMove, State

# Who has just had an answer mostly asks again: an opening that is begun and given up all the time helps nobody.
QUIET = 5.0
# Of a server without a prompt cache even the quickest of so many answers takes as long as to read its opening did; of
# one that has one the slowest that count take half of that. What is read sooner than in a second proves nothing.
JUDGED_BY = 5
AS_LONG = 0.8
WORTH = 1.0
USELESS = "priming has not made answers faster"
REPLAYED = "what was being replayed to it may have loaded it again"
# What is wrong here, the opening is not to blame for.
BLAMELESS = (Reason.UNAUTHORIZED, Reason.LOADING, Reason.UNLOADED, Reason.UNKNOWN_MODEL)
# What failed for a reason that nobody knows is tried once more, after this long. A model that dies of an opening
# would else die of it after each load.
AGAIN = 60.0


def next_primes(models: Sequence[Model], now: float, *, free: bool) -> list[tuple[Model, Action]]:
    """The one opening that is to be replayed now, on one upstream. `free`: nothing is loaded there."""
    ready = [(m, opening) for m in models if (opening := _due(m, now)) is not None]
    if not (ready and free and _is_quiet(models, now)) or any(m.priming.under_way for m in models):
        return []
    ready.sort(key=lambda found: found[0].rank)
    return [(m, Prime(m.id, m.instance_id or m.id.key, opening)) for m, opening in ready[:1]]


def by_opening(
    pings: list[tuple[Model, Action]], models: Sequence[Model], *, free: bool
) -> list[tuple[Model, Action]]:
    """The pings that are due; one of them is an opening that was read, where that is in nobody's way.

    It proves as much, and holds its place in the cache: another prompt may take that.
    """
    if not pings or not free or _is_used(models) or any(m.priming.under_way for m in models):
        return pings
    for number, (model, _) in enumerate(pings):
        done = model.priming.done if model.priming.useless is None else ()
        held = next((p.opening for p in done if p.ours and _is_fit(model, p.opening)), None)
        if held is not None:
            replayed = (model, Prime(model.id, model.instance_id or model.id.key, held))
            return [*pings[:number], replayed, *pings[number + 1 :]]
    return pings


def give_ups(models: Sequence[Model], *, free: bool) -> list[Action]:
    """Those under way that are in somebody's way now, or that nobody wants any more."""
    return [
        GiveUpPrime(m.id, opening)
        for m in models
        if (opening := m.priming.under_way) is not None
        and not (free and _is_fit(m, opening) and not _is_waited_for(m) and not _is_used(models))
    ]


def _is_waited_for(model: Model) -> bool:
    """A stranger is there beside our opening, where LM Studio's own socket shows it."""
    return any(instance.queued is not None and instance.queued > 1 for instance in model.instances)


def _due(model: Model, now: float) -> str | None:
    priming = model.priming
    opening = priming.next
    if opening is None or model.calling or priming.useless is not None or now < priming.again_at:
        return None
    return opening if _is_fit(model, opening) else None


def _is_fit(model: Model, opening: str | None) -> bool:
    fit = model.state is State.WARM and model.held and not model.draining
    return fit and opening in model.priming.wished


def _is_used(models: Iterable[Model]) -> bool:
    return any(m.callers or m.in_use or m.load_started is not None or m.pending for m in models)


def _is_quiet(models: Sequence[Model], now: float) -> bool:
    # Strangers are seen where LM Studio's own socket shows them.
    rests = all(not m.engaged and now >= m.active_at + QUIET for m in models)
    return rests and not _is_used(models)


# --- what came of it ----------------------------------------------------------------------------------


def chosen(priming: Priming, openings: Mapping[str, str | None], *, learns: bool = False) -> Priming:
    """From now on these are wished from files, each with why it is of no use, or None; and what was learnt, or not.

    Whoever reads the config anew may have mended what did not fit.
    """
    learned = priming.learned if learns else ()
    known = {*openings, *learned}
    return replace(
        _only(priming, known),
        openings=tuple(openings),
        learned=learned,
        unfit=tuple((opening, wrong) for opening, wrong in openings.items() if wrong is not None),
        failed=frozenset(),
        again_at=-inf,
        answers=(),
        useless=None,
    )


def learned(model: Model, fact: OpeningsLearned) -> Model:
    known = {*model.priming.openings, *fact.openings}
    return replace(model, priming=replace(_only(model.priming, known), learned=fact.openings))


def _only(priming: Priming, known: Collection[str]) -> Priming:
    """What came of these, and of no others."""
    return replace(
        priming,
        done=tuple(primed for primed in priming.done if primed.opening in known),
        unfit=tuple((opening, wrong) for opening, wrong in priming.unfit if opening in known),
        longest=tuple((opening, seconds) for opening, seconds in priming.longest if opening in known),
    )


def read(model: Model, fact: OpeningRead) -> Model:
    """Who replayed it now would take away what its user has said behind it."""
    priming = model.priming
    known = any(primed.opening == fact.opening for primed in priming.done)
    if known or fact.opening not in priming.wished or model.state is not State.WARM:
        return model
    done = (*priming.done, Primed(fact.opening, fact.at, 0.0, ours=False))
    return replace(model, priming=replace(priming, done=done))


def started(model: Model, fact: PrimeStarted) -> Model:
    if model.calling or not model.present:
        raise IllegalMove(f"{model.id}: an opening though nothing is loaded, or a call is under way")
    return replace(model, priming=replace(model.priming, under_way=fact.opening))


def ended(model: Model, fact: PrimeEnded) -> Model:
    was_read = any(primed.opening == fact.opening for primed in model.priming.done)
    priming = replace(model.priming, under_way=None)
    model = replace(model, touched_at=fact.at, used_at=fact.at, priming=priming, contested=False)
    if fact.outcome is PrimeOutcome.GIVEN_UP:
        return model
    pending = model.pending
    if pending is not None and pending.why == REPLAYED and fact.outcome is not PrimeOutcome.TIMEOUT:
        # It was answered: the next look tells.
        model = replace(model, pending=replace(pending, until=fact.at))
    match fact.outcome:
        case PrimeOutcome.OK:
            return _done(model, fact)
        case PrimeOutcome.REFUSED:
            # It answers, only not this.
            return _unfit(_proved(model, fact.at), fact)
        case PrimeOutcome.TIMEOUT if not was_read:
            return _unfit(model, fact)
    again = fact.why is Reason.CRASHED or fact.opening in priming.failed
    # One that it knew is answered late by a busy model, as any ping is.
    blameless = fact.why in BLAMELESS or fact.outcome is PrimeOutcome.TIMEOUT
    if not blameless:
        priming = replace(priming, failed=priming.failed | {fact.opening})
    # Nothing is sure any more: the next ping is a plain one.
    model = replace(model, priming=replace(priming, again_at=fact.at + AGAIN, done=()))
    if model.ping_at is not None:
        model = replace(model, ping_at=min(model.ping_at, fact.at))  # the verdict on the model is a ping's
    return _unfit(model, fact) if again and not blameless else model


def _done(model: Model, fact: PrimeEnded) -> Model:
    ping = Ping(fact.at, PingOutcome.OK, fact.seconds)
    model = _proved(replace(model, pinged_at=fact.at, last_ping=ping), fact.at)
    if model.state is not State.WARM:
        return model  # it went away meanwhile, and its cache with it
    priming, opening = model.priming, fact.opening
    before = (primed for primed in priming.done if primed.opening != opening)
    longest = dict(priming.longest)
    longest[opening] = max(fact.seconds, longest.get(opening, 0.0))
    priming = replace(
        priming,
        done=(*before, Primed(opening, fact.at, fact.seconds, fact.tokens)),
        failed=priming.failed - {opening},
        longest=tuple(longest.items()),
    )
    return replace(model, priming=priming)


def answered(model: Model, fact: PrimedAnswered) -> Model:
    priming = model.priming
    took = dict(priming.longest).get(fact.opening, 0.0)
    if took < WORTH or priming.useless is not None:
        return model
    answers = (*priming.answers, fact.seconds / took)[-JUDGED_BY:]
    useless = None
    if len(answers) == JUDGED_BY and min(answers) >= AS_LONG:
        useless = (
            f"{USELESS}: the first tokens of the last {JUDGED_BY} that began with what had been read took "
            f"{min(answers):.0%} of the time of reading it, or more"
        )
    return replace(model, priming=replace(priming, answers=answers, useless=useless))


def _proved(model: Model, at: float) -> Model:
    """As by a ping, and so it counts as the one of this interval; only a warm one is that."""
    return proved(model, at) if model.state is State.WARM and model.policy.pinged else model


def _unfit(model: Model, fact: PrimeEnded) -> Model:
    others = ((opening, wrong) for opening, wrong in model.priming.unfit if opening != fact.opening)
    unfit = (*others, (fact.opening, fact.message or "no words"))
    done = tuple(primed for primed in model.priming.done if primed.opening != fact.opening)
    return replace(model, priming=replace(model.priming, unfit=unfit, done=done))


def label(opening: str) -> str:
    """What people call it: the file without the mark of what it holds."""
    return opening.rpartition(" ")[0] or opening
