"""What a listing says of a model, or that there was none.

An observation counts from when it was *asked*. One asked before our last call for a model had ended says
nothing about that model.
"""

from difflib import get_close_matches
from itertools import islice
from math import inf

from keepalive.core.changed import replace
from keepalive.core.evictions import count_eviction, why_missing
from keepalive.core.facts import Entry, Listed, ListingFailed, Tier, Trouble, fold_key
from keepalive.core.moves import (
    absent,
    believed,
    crashes_beside,
    failed,
    forget_primed,
    move,
    proved,
    says_that_it_loads,
)
from keepalive.core.primes import REPLAYED
from keepalive.core.records import LISTING_LAG, UNSEEN, Cause, Model, Pending
from keepalive.core.states import Sign, State

# Comparing a key with each of a hundred thousand listed ones would hold up everything else for seconds.
SUGGESTED_FROM = 1000


def listed(model: Model, fact: Listed) -> Model:
    if fact.asked <= max(model.asked, model.touched_at):
        return model  # older than what we know, or asked while our own call was changing it
    if fact.odd is not None and (why := fact.odd.keys.get(fold_key(model.id.key))) is not None:
        if model.state in (State.COLD, State.BACKOFF):  # it may be there by now
            return move(model, Sign.UNREACHABLE, fact.at, why)
        failed_so = ListingFailed(fact.at, fact.upstream, fact.asked, Trouble.BAD_ANSWER, why)
        return listing_failed(model, failed_so)
    before, unsure = model, model.unsure_since
    model = replace(
        model,
        asked=fact.asked,
        blind=fact.tier is Tier.OPENAI,
        beside=fact.resident,
        seen_by=fact.sight,
        idle_since=None,
        unsure_since=unsure if unsure is not None and fact.asked <= unsure else None,
    )
    entry = fact.entries.get(fold_key(model.id.key))
    if entry is None or not entry.instances:
        # What was there is gone, and what comes next by the same name may be another's copy.
        model = replace(model, lost=frozenset(), vouched=frozenset(), disowned=frozenset())
        if fact.asked > model.told_at:
            model = replace(model, told=model.told - {instance.id for instance in before.instances})
        if fact.trusted:
            # Whoever acts here knows whether it was lost or let go.
            model = replace(model, instances=(), ours=frozenset(), busy=False)
    if model.recalled is not None:
        # The first listing of this life decides: what comes later may be anybody's.
        ids, until = model.recalled
        same = (
            ids & {i.id for i in entry.instances}
            if entry is not None and fact.at <= until
            else frozenset[str]()
        )
        model = replace(model, recalled=None, ours=model.ours | same)
    if model.blind:
        return _listed_blind(model, fact)
    if model.pending is not None and model.pending.doubted and _was_restarted(before, fact, entry):
        model = replace(model, pending=None)
    if entry is None:
        model = replace(model, listed=False, nearest=_nearest(model.id.key, fact))
        return _missing(model, fact.at, why_missing(before, fact, told=True), told=True)
    model = replace(
        model,
        listed=True,
        nearest=(),
        kind=entry.kind,
        # llama-server says it of what is loaded alone.
        size_bytes=entry.size_bytes or model.size_bytes,
        need=entry.need or model.need,
        tells_loading=model.tells_loading or entry.loading is True,
    )
    if entry.instances:
        if all(instance.busy is False for instance in entry.instances):
            model = replace(model, idle_since=fact.asked if before.idle_since is None else before.idle_since)
        return _present(model, fact.at, entry, trusted=fact.trusted)
    told = entry.loading is not None
    cause = why_missing(before, fact, told=told)
    if entry.loading:
        return _seen_loading(model, fact.at, cause)
    return _missing(model, fact.at, cause, told=told)


def _was_restarted(model: Model, fact: Listed, entry: Entry | None) -> bool:
    """Whether LM Studio itself had ended where nothing listened, and with it a load of this model.

    Of several that were there none is left. Of one alone that may be chance, and what is left shows that it had not.
    """
    if fact.tier is Tier.LLAMA:
        return entry is None or not entry.loading  # llama-server shows each load from its first moment
    return len(model.beside) > 1 and not model.beside & (fact.resident | fact.arriving)


def _nearest(key: str, fact: Listed) -> tuple[str, ...]:
    keys = {entry.key: None for entry in islice(fact.entries.values(), SUGGESTED_FROM)}
    return tuple(get_close_matches(key, keys, n=3, cutoff=0.4))


def _listed_blind(model: Model, fact: Listed) -> Model:
    """Here a listing says no more than that somebody answers: only pings show what is loaded."""
    model = replace(model, listed=True, nearest=(), instances=(), ours=frozenset())
    if model.calling:
        return model
    if model.pending is not None:
        return _missing(model, fact.at, Cause.UNKNOWN, told=False)
    if fact.trusted and (model.proved_elsewhere or model.state is State.WARM):
        return believed(model, fact.at)  # whoever acts here pings it
    if model.needed and not model.policy.pinged:
        # No ping will ever show it; that the server answers has to do.
        return believed(model, fact.at)
    if model.state in (State.COLD, State.BACKOFF):
        return model
    if model.state is State.WARM and (model.in_flight or fact.at <= model.proof_expires):
        return model
    reason = "this server does not show what is loaded; only a request can tell"
    return absent(model, fact.at, reason)


def _present(model: Model, at: float, entry: Entry, *, trusted: bool) -> Model:
    known = {instance.id for instance in entry.instances}
    appeared, pending = not model.instances, model.pending
    model = _appeared(model, at) if appeared else _still_there(model)
    if model.priming.done and model.instance_id not in known:
        model = forget_primed(model)
    ours = ((model.ours - model.disowned) | model.told | model.vouched) & known
    told = model.told if trusted else frozenset[str]()  # what we see ourselves decides from now on
    lost = (model.lost & known) - ours
    model = replace(model, ours=ours, lost=lost, told=told, disowned=frozenset())
    model = replace(model, instances=entry.instances, pending=None, seen_at=at)
    if appeared:
        model = replace(model, ill=None)  # of another copy nothing was told
    model = replace(model, used_at=max(model.used_at, _used(model, at)))
    if model.engaged and not (model.calling and model.queued == 1):
        # One request during a call of our own is that call, which is no use.
        model = replace(model, use_at=at)
    begun = model.load_started is not None or (pending is not None and pending.loaded)
    if appeared and begun and known - model.ours:
        model = replace(model, doubled_at=at)
    if pending and pending.proved:
        return proved(model, at)
    if trusted and model.load_started is None and model.ill is None and not model.crashed:
        return believed(model, at)
    if model.load_started is not None:
        return model  # somebody else's copy came first; ours is still on its way
    if not model.held:
        reason = None if model.state is State.WARM else "loaded, but not wanted now"
        return move(model, Sign.UNASKED, at, reason)
    reason = "loaded; has not answered a ping yet" if appeared else model.reason
    if not model.policy.pinged and not (model.crashed and model.instance_id in model.ours):
        return believed(model, at)
    if model.engaged and not model.crashed and model.state in (State.UNKNOWN, State.COLD, State.LOADING):
        # It answers somebody: a ping could say no more, and would stand in his way.
        return replace(believed(model, at), ping_at=at + model.policy.ping_interval)
    if appeared and model.state is State.BACKOFF:
        return move(model, Sign.UNASKED, at, reason)
    return move(model, Sign.PRESENT, at, reason)


def _used(model: Model, at: float) -> float:
    """When it was last used, as far as the socket shows it."""
    if model.engaged:
        return at
    clock = model.seen_by.clock
    if clock is None or model.last_used is None:
        return -inf
    return at - max(0.0, clock - model.last_used)


def _appeared(model: Model, at: float) -> Model:
    # Whoever loaded it has mended what held us off; it has yet to answer.
    return replace(
        model,
        retry_at=None,
        crashed=False,
        busy=False,
        ping_at=at,
        used_at=at,
        there_since=at,
        survived=0.0,
        suspected=None,
    )


def _still_there(model: Model) -> Model:
    # What has crashed may stay listed; a server that was gone came back with its models.
    suspected = model.suspected if model.suspected is Cause.CRASH else None
    idle = 0.0 if model.in_flight or model.calling else model.asked - model.used_at
    return replace(model, suspected=suspected, survived=max(model.survived, idle))


def _seen_loading(model: Model, at: float, cause: Cause | None) -> Model:
    if model.load_started is not None:
        return model
    pending = model.pending or Pending(since=at, until=at, alive_at=at, ours=False)
    pending = replace(
        pending, seen=True, doubted=False, alive_at=at, until=max(pending.until, at + LISTING_LAG)
    )
    reason = "LM Studio is still loading it" if pending.ours else "somebody else is loading it"
    return move(replace(count_eviction(model, at, cause), pending=pending), Sign.SEEN_LOADING, at, reason)


def _missing(model: Model, at: float, cause: Cause | None, *, told: bool) -> Model:
    """The listing shows no instance. `told`: it would have shown a load in progress as such."""
    if model.load_started is not None or model.pending is not None:
        # What is gone now is another's copy, which was there beside our load.
        model = replace(model, instances=())
    if model.load_started is not None:
        return model
    if model.pending is not None:
        pending = model.pending
        if pending.expected is None and not pending.loaded:
            # Its size, which bounds the guess, may not have been known before.
            guess = pending.since + model.longest_load(None)
            pending = replace(pending, until=min(pending.until, guess))
            model = replace(model, pending=pending)
        resolved = _resolve(model, pending, at, told=told)
        reason = model.reason if model.state is State.LOADING else _unseen(pending)
        return resolved or move(model, Sign.SEEN_LOADING, at, reason)
    gone = bool(model.instances)
    model = count_eviction(model, at, cause)
    how = "it made room for another" if cause is None else "LM Studio no longer has it in memory"
    shown = told and model.tells_loading
    replayed = gone and model.priming.under_way is not None and not shown
    model = absent(model, at, how if gone else None)
    if not replayed:
        return model
    # It may have come there behind what it was meant for, and is a load like any other then.
    until = at + model.longest_load(model.expected_load)
    pending = Pending(at, until, alive_at=at, expected=model.expected_load, why=REPLAYED)
    return move(replace(model, pending=pending), Sign.SEEN_LOADING, at, _unseen(pending))


def _unseen(pending: Pending) -> str:
    return f"{UNSEEN}, because {pending.why}" if pending.why else UNSEEN


def _resolve(model: Model, pending: Pending, at: float, *, told: bool) -> Model | None:
    """What became of a load that is not listed; None while it is too early to say."""
    if pending.loaded:
        if at < pending.until:
            return None
        if pending.doubted:
            return absent(replace(model, pending=None), at, "it was loaded, and went with LM Studio")
        return failed(
            replace(crashes_beside(model, at), pending=None),
            at,
            f"LM Studio said that it had loaded it, but did not list it for {LISTING_LAG:.0f} s",
        )
    # It is no longer seen loading, and not yet listed: failed, or loaded a moment ago.
    over = told and (pending.seen or model.tells_loading) and at >= pending.alive_at + LISTING_LAG
    if not over and at < pending.until:
        return None
    model = replace(model, pending=None)
    if not pending.ours:
        return absent(model, at, None)
    return absent(model, at, "its last load came to nothing")


def listing_failed(model: Model, fact: ListingFailed) -> Model:
    if fact.asked <= model.asked:
        return model
    if fact.trouble in (Trouble.TIMEOUT, Trouble.BAD_ANSWER):
        # It may be busy, or lie: no verdict, until a claim would be older than we allow.
        if model.state is State.UNKNOWN:
            return replace(model, reason=fact.message)
        if model.state is not State.WARM or model.in_flight or fact.at <= model.proof_expires:
            return model
    if fact.trouble is Trouble.LOADING:
        # What is answering a user is not loading, whatever stands in front of it says.
        busy = model.state is State.WARM and model.in_flight > 0
        return model if busy else says_that_it_loads(model, fact.at, fact.message)
    if fact.trouble in (Trouble.REFUSED, Trouble.UNREACHABLE):
        # Behind a broken network anything may happen; what is left there will tell.
        known = None if model.suspected is Cause.UNKNOWN else model.suspected
        gone = Cause.RESTART if fact.trouble is Trouble.REFUSED else Cause.UNKNOWN
        model = replace(model, suspected=known or gone)
    if fact.trouble is Trouble.REFUSED:
        # The program is gone; what is found later is not ours, though named alike. What it said of its memory is to
        # be asked anew. Or nothing has ended but its server (`lms server stop`), or a tunnel to it, and it goes on
        # loading: that shows when it can be asked again.
        pending = model.pending
        model = replace(
            model,
            pending=replace(pending, seen=False, doubted=True)
            if pending is not None and pending.ours
            else None,
            ours=frozenset(),
            lost=model.lost | model.ours,
            recalled=None,
            refused_claim=None,
            granted_claim=None,
            crowd=None,
        )
    model = replace(model, busy=False, ping_at=-inf)  # to be proved again as soon as it is seen
    return move(model, Sign.UNREACHABLE, fact.at, fact.message)
