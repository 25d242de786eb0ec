"""The moves that more than one kind of fact leads to: to another state, and to what goes with it."""

from keepalive.core.changed import replace
from keepalive.core.facts import fold_key
from keepalive.core.records import Cause, Model, Pending
from keepalive.core.states import TABLE, IllegalMove, Sign, State

BACKOFF_FIRST = 5.0
BACKOFF_MAX = 300.0
# How soon one that says that it is loading is asked again.
LOOK_AGAIN = 2.0
# A token does not become right by asking again; but LM Studio has been seen to refuse one for a moment.
TOKEN_RETRY = 60.0
# A model that held this long is stable: losing it afterwards is a new story, not a repetition.
STABLE = 300.0


def move(model: Model, sign: Sign, at: float, reason: str | None) -> Model:
    state = TABLE[model.state][sign]
    if state is None:
        raise IllegalMove(f"{model.id}: {sign} in state {model.state}")
    if state is not State.WARM and model.priming.done:
        model = forget_primed(model)  # whatever comes next may be another copy, with nothing in its cache
    return replace(model, state=state, since=at if state != model.state else model.since, reason=reason)


def forget_primed(model: Model) -> Model:
    return replace(model, priming=replace(model.priming, done=()))


def backoff(failures: int) -> float:
    return min(BACKOFF_FIRST * 2.0 ** min(failures - 1, 16), BACKOFF_MAX)


def says_that_it_loads(model: Model, at: float, message: str) -> Model:
    """The server answers that it is loading. It is looked at again soon, and asked for nothing until then."""
    if model.load_started is not None:
        return model
    known = model.pending
    again = at + LOOK_AGAIN
    if known is None or not known.ours:
        known = Pending(known.since if known else at, again, alive_at=at, seen=True, ours=False)
    model = replace(
        model,
        pending=replace(known, alive_at=at),
        suspected=model.suspected or Cause.RESTART,
        busy=False,
        ping_at=again,
    )
    return move(model, Sign.SEEN_LOADING, at, f"the server says that it is loading: {message}")


def proved(model: Model, at: float) -> Model:
    """The model itself answered, to a ping or to a user."""
    if not model.instances and not model.blind:
        return model  # an answer of something no longer listed: the listing decides
    warm_since = model.warm_since if model.state is State.WARM else None
    stable = warm_since is not None and at - warm_since >= STABLE
    model = replace(
        model,
        # An answer of before another daemon began a load says nothing of that: the next look does.
        pending=None if model.unsure_since is None else model.pending,
        seen_at=at,
        used_at=at,
        suspected=None,
        warm_since=at if warm_since is None else warm_since,
        failures=0 if stable else model.failures,
        taken=0 if stable else model.taken,
        retry_at=None,
        ping_at=at + model.policy.ping_interval,
        crashed=False,
        busy=False,
        asked_for=None if model.policy.auto and model.asked_for else model.asked_for,
    )
    return move(model, Sign.PROVED, at, refusal(model))


def refusal(model: Model) -> str | None:
    """What to say of a model that is warm on the word of a listing alone, because its ping is of no use."""
    if model.refused is None:
        return None
    return f'its ping is refused: {model.refused}; set ping in [[models]] "{model.id.key}": one that it takes, or "off"'


def believed(model: Model, at: float) -> Model:
    """We are not to ping it: warm because it is listed, or because another daemon says so."""
    if model.state is not State.WARM:
        # What is cold has to come into memory first, where that can be seen.
        model = move(model, Sign.SEEN_LOADING, at, None) if model.state is State.COLD else model
        model = proved(model, at)
    return replace(model, seen_at=at, ping_at=None)


def fails_again(model: Model) -> Model:
    """One more failure of its own. That it was taken before says nothing of how often it fails."""
    return replace(model, failures=max(0, model.failures - model.taken) + 1, taken=0)


def crashes_beside(model: Model, at: float) -> Model:
    """It is gone soon after it had been loaded: there may have been too little memory, whatever was said before."""
    key = fold_key(model.id.key)
    others = model.beside - {key, key.rpartition("@")[0]}
    return replace(model, crowd=(others, at)) if others else model


def failed(model: Model, at: float, message: str) -> Model:
    model = fails_again(model)
    retry_at = at + backoff(model.failures)
    model = replace(model, failure=message, retry_at=retry_at, warm_since=None)
    return move(model, Sign.LOAD_FAILED, at, message)


def absent(model: Model, at: float, reason: str | None) -> Model:
    model = replace(
        model,
        instances=(),
        ours=frozenset(),
        lost=frozenset(),
        vouched=frozenset(),
        busy=False,
        crashed=False,
        ping_at=None,
        ahead=False,
        draining=False,
    )
    if not model.listed:
        near = f"; listed are {', '.join(model.nearest)}" if model.nearest else ""
        return move(model, Sign.ABSENT, at, f"LM Studio does not list this key{near}")
    if model.retry_at is not None and model.retry_at > at:
        if model.failure is not None:
            return move(model, Sign.HELD_OFF, at, model.failure)
        model = replace(model, retry_at=None)  # it was to be unloaded a little later
    return move(model, Sign.ABSENT, at, reason)
