"""What came of our own calls for a model: its loads, its pings, its unloads.

A load whose end we did not see is `pending`, not failed: until the listing resolves it, no other may begin.
A call that must not be made is a bug of ours, and raises.
"""

from keepalive.core.changed import replace
from keepalive.core.errors import Reason
from keepalive.core.facts import (
    HolderTold,
    LoadEnded,
    LoadForgone,
    LoadOutcome,
    LoadProgressed,
    LoadRemembered,
    LoadResolved,
    LoadStarted,
    PingEnded,
    PingOutcome,
    PingStarted,
    UnloadEnded,
    UnloadStarted,
)
from keepalive.core.moves import (
    BACKOFF_MAX,
    TOKEN_RETRY,
    absent,
    backoff,
    believed,
    crashes_beside,
    failed,
    fails_again,
    move,
    proved,
    says_that_it_loads,
)
from keepalive.core.records import (
    LISTING_LAG,
    LOADS_REMEMBERED,
    UNSEEN,
    Cause,
    Claim,
    Model,
    Pending,
    Ping,
)
from keepalive.core.states import IllegalMove, Sign, State

# How soon it is tried again to unload what was found to answer somebody.
IN_USE_POLL = 5.0


def load_started(model: Model, fact: LoadStarted) -> Model:
    if model.calling or model.pending or model.instances:
        raise IllegalMove(f"{model.id}: a load though one is under way, or an instance is there")
    model = move(model, Sign.LOAD_STARTED, fact.at, None)
    return replace(
        model,
        load_started=fact.at,
        # How far it is is told anew; of a load by another daemon it may be known to have been further.
        progress=None,
        retry_at=None,
        claim=fact.claim,
        ahead=fact.ahead,
        draining=False,
        letting_go=None,
    )


def load_progressed(model: Model, fact: LoadProgressed) -> Model:
    if model.loading_since is None or (model.progress is not None and fact.progress <= model.progress):
        return model
    model, pending = replace(model, progress=fact.progress, progress_at=fact.at), model.pending
    if pending is None or fact.progress <= 0:
        return model
    # It goes on, and slower than was known perhaps: it is believed in for twice the time that it takes now.
    takes = min((fact.at - pending.since) / fact.progress, model.policy.load_timeout)
    until = max(pending.until, pending.since + 2 * takes + LISTING_LAG)
    return replace(model, pending=replace(pending, alive_at=fact.at, until=until))


def load_forgone(model: Model, fact: LoadForgone) -> Model:
    model = replace(model, load_started=None, progress=None, giving_up=False, alone=False, touched_at=fact.at)
    return absent(model, fact.at, fact.message)


def load_remembered(model: Model, fact: LoadRemembered) -> Model:
    until = fact.started + model.longest_load(fact.expected)
    if fact.by is not None:
        return _load_elsewhere(model, fact, until)
    why = "it was begun before this daemon was started or its config read anew, and nobody saw it end"
    pending = Pending(fact.started, until, alive_at=fact.at, expected=fact.expected, why=why)
    reason = f"{UNSEEN}, because {why}"
    return replace(model, pending=pending, tells_loading=fact.tells_loading, reason=reason)


def _load_elsewhere(model: Model, fact: LoadRemembered, until: float) -> Model:
    if model.load_started is not None:
        return model  # what we have begun ourselves we know better
    # An earlier load that was waited for here is over: whoever begins another one has waited for that, too.
    why = f"{fact.by} began it"
    pending = Pending(fact.started, until, alive_at=fact.at, expected=fact.expected, why=why)
    tells = model.tells_loading or fact.tells_loading
    # Whoever began it has seen it missing: what we have seen so far is of before, and so is an answer under way.
    model = replace(model, pending=pending, tells_loading=tells, progress=None, touched_at=fact.at)
    if model.instances:
        return replace(model, unsure_since=fact.at)  # the next look takes it for gone, or for loaded
    return move(model, Sign.SEEN_LOADING, fact.at, f"{fact.by} loads it")


def load_resolved(model: Model, fact: LoadResolved) -> Model:
    if model.load_started is not None or model.pending is None or not model.pending.ours:
        return model
    # What came of it the next listing shows. We are not the one who would load it again.
    return replace(model, pending=None, progress=None)


def holder_told(model: Model, fact: HolderTold) -> Model:
    known = {instance.id for instance in model.instances}
    if model.alone:
        return model  # what it says is of before
    disowned = (model.disowned | model.told) - fact.instance_ids - fact.lost
    ours = model.ours | (fact.instance_ids & known)
    recalled = model.recalled
    if recalled is not None and fact.heard:
        # By the same name there may be another's copy by now: that came while we were gone, and not it.
        recalled = recalled[0] & (fact.instance_ids | fact.lost), recalled[1]
    model = replace(
        model,
        recalled=recalled,
        told=fact.instance_ids,
        told_at=fact.at,
        proved_elsewhere=fact.warm,
        disowned=disowned,
        ours=ours,
        lost=(model.lost | fact.lost) - ours,  # when we act the others are to know that it may be one of ours
        recent_loads=fact.loads or model.recent_loads,
        failures=fact.failures,
        failure=fact.failure,
        retry_at=fact.retry_at,
        contested=fact.contested,
        ill=fact.ill,
    )
    if model.blind and fact.warm is not (model.state is State.WARM) and model.load_started is None:
        return believed(model, fact.at) if fact.warm else absent(model, fact.at, fact.failure)
    if model.instances and fact.ill is not None:
        return move(model, Sign.DISPROVED, fact.at, fact.ill)
    if model.state is State.COLD and fact.retry_at is not None and fact.retry_at > fact.at:
        return move(model, Sign.HELD_OFF, fact.at, fact.failure)
    return model


def load_ended(model: Model, fact: LoadEnded) -> Model:
    started = model.load_started if model.load_started is not None else fact.at
    model = replace(model, load_started=None, progress=None, giving_up=False, alone=False)
    model = replace(model, touched_at=fact.at, contested=False)
    if fact.outcome is LoadOutcome.OK:
        return _loaded(model, fact, started)
    if fact.outcome is LoadOutcome.GIVEN_UP:
        return absent(model, fact.at, None)
    if fact.why is Reason.LOADING and model.blind:
        return says_that_it_loads(model, fact.at, fact.message or "no more words")
    if fact.outcome is LoadOutcome.UNKNOWN or fact.why is Reason.LOADING:
        # It had listed its models a moment before: what loads there is this one, as likely as not.
        return _unanswered(model, fact, started)
    model = failed(model, fact.at, fact.message or "the load failed")
    if fact.outcome is LoadOutcome.REFUSED:
        # Memory does not come back by asking: bug reports show guardrails refusing in a tight loop.
        wait = TOKEN_RETRY if fact.why is Reason.UNAUTHORIZED else BACKOFF_MAX
        if fact.why is not Reason.UNAUTHORIZED and model.claim is not None:
            # Where room can be made it has told us how much: `room` holds it off until there is more.
            model = replace(model, refused_claim=Claim(model.claim, fact.at))
            wait = min(wait, backoff(model.failures))
        model = replace(model, retry_at=fact.at + wait)
    return model


def _loaded(model: Model, fact: LoadEnded, started: float) -> Model:
    took = fact.seconds if fact.seconds is not None else fact.elapsed
    model = replace(
        model,
        loads=model.loads + 1,
        recent_loads=(*model.recent_loads, took)[-LOADS_REMEMBERED:],
        ours=model.ours | {fact.instance_id} if fact.instance_id else model.ours,
        granted_claim=None if model.claim is None else Claim(model.claim, fact.at),
    )
    model = replace(model, refused=fact.message)
    if model.blind:
        return proved(model, fact.at)
    until = fact.at + LISTING_LAG
    pending = Pending(started, until, alive_at=fact.at, loaded=True, proved=fact.proved)
    reason = f"loaded in {took:.1f} s; waiting for LM Studio to list it"
    return move(replace(model, pending=pending), Sign.SEEN_LOADING, fact.at, reason)


def _unanswered(model: Model, fact: LoadEnded, started: float) -> Model:
    message = fact.message or "no answer to the load"
    why = f"its end was not seen: {message}"
    expected = max(model.recent_loads, default=None)
    span = model.longest_load(expected)
    if fact.at - started >= span:
        expected = fact.at - started
        span = 2 * expected
    model = fails_again(model)
    model = replace(
        model,
        pending=Pending(started, started + span, alive_at=fact.at, expected=expected, why=why),
        failure=message,
        retry_at=fact.at + backoff(model.failures),
    )
    return move(model, Sign.SEEN_LOADING, fact.at, f"{UNSEEN}, because {why}")


def ping_started(model: Model, fact: PingStarted) -> Model:
    if model.calling or not model.present:
        raise IllegalMove(f"{model.id}: a ping though nothing is loaded, or a call is under way")
    return replace(model, pinging=True)


def ping_ended(model: Model, fact: PingEnded) -> Model:
    policy, at = model.policy, fact.at
    if fact.outcome is PingOutcome.SKIPPED:
        last = at if model.in_use or model.engaged else model.active_at
        return replace(model, ping_at=last + policy.ping_interval, vouched_at=model.active_at)
    ping = Ping(at, fact.outcome, fact.seconds)
    model = replace(
        model, pinging=False, touched_at=at, used_at=at, last_ping=ping, busy=False, contested=False
    )
    if fact.outcome is PingOutcome.OK:
        return proved(replace(model, pinged_at=at, refused=None), at)
    if fact.outcome is PingOutcome.REFUSED:
        # It answers, only not this: what the listing shows is as good a proof as there is.
        return proved(replace(model, refused=fact.message or "no words"), at)
    message = fact.message or "it did not answer the ping as it should"
    if fact.outcome is PingOutcome.TIMEOUT:
        # A question for the listing, not a verdict: it may be generating for somebody else.
        again = at + min(policy.ping_interval, max(policy.ping_timeout, policy.refresh_interval))
        return replace(model, ping_at=again, busy=True, reason=message)
    if fact.outcome is PingOutcome.ERROR and fact.why is None:
        # The connection failed, not the model: the listing tells more.
        return replace(model, ping_at=at + policy.refresh_interval, reason=message)
    if fact.why is Reason.LOADING:
        return says_that_it_loads(model, at, message)
    return _disproved(model, at, message, fact.why)


def _disproved(model: Model, at: float, message: str, why: Reason | None) -> Model:
    model = fails_again(model)
    if why is Reason.CRASHED and model.warm_since is None:
        model = crashes_beside(model, at)
    retry_at = at + (TOKEN_RETRY if why is Reason.UNAUTHORIZED else backoff(model.failures))
    model = replace(
        model,
        failure=message,
        retry_at=retry_at,
        ping_at=retry_at,
        crashed=why is Reason.CRASHED,
        suspected=Cause.CRASH if why is Reason.CRASHED else model.suspected,
    )
    return move(model, Sign.DISPROVED, at, message)


def unload_started(model: Model, fact: UnloadStarted) -> Model:
    if model.calling or fact.instance_id not in model.ours:
        raise IllegalMove(f"{model.id}: unloading {fact.instance_id}, which is not ours")
    return replace(model, unloading=True, letting_go=fact.cause)


def unload_ended(model: Model, fact: UnloadEnded) -> Model:
    model = replace(model, unloading=False, touched_at=fact.at, contested=False)
    if fact.in_use:
        # By whom is not seen: others go before it, and it is asked again soon.
        again = fact.at + IN_USE_POLL
        return replace(model, use_at=fact.at, used_at=fact.at, retry_at=again, reason=fact.message)
    if fact.message is not None:
        model = fails_again(model)
        retry_at = fact.at + backoff(model.failures)
        failure = f"could not unload it: {fact.message}"
        return replace(model, failure=failure, retry_at=retry_at, reason=failure)
    left = tuple(i for i in model.instances if i.id != fact.instance_id)
    model = replace(
        model, instances=left, ours=model.ours - {fact.instance_id}, warm_since=None, draining=False
    )
    return model if left else absent(model, fact.at, None)
