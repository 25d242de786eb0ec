"""What is asked of an upstream on the keeper's behalf, and the fact that comes of it.

Each of these waits for an answer for as long as it may take, and returns what it came to: nothing that the world does
makes it raise.
"""

import re
from collections.abc import Callable, Mapping
from typing import Literal

from keepalive.core.errors import (
    Cut,
    Forgone,
    GivenUp,
    Reason,
    Refused,
    TimedOut,
    Unauthorized,
    Unexpected,
    Unreachable,
    UpstreamError,
)
from keepalive.core.facts import (
    Entry,
    Listed,
    ListingFailed,
    LoadEnded,
    LoadForgone,
    LoadOutcome,
    LoadProgressed,
    ModelId,
    PingEnded,
    PingOutcome,
    PrimeEnded,
    PrimeOutcome,
    Tier,
    Trouble,
    UnloadEnded,
)
from keepalive.core.records import Model
from keepalive.keeper.given import Client, Keep, Replay

# An unload is answered at once, or the server is in trouble.
UNLOAD_TIMEOUT = 60.0
# What stands in front of a server says these when that is too busy, or does not answer in time: no verdict on a model.
# nginx turns away with 503 who asks too often; whether anybody is behind it, the next listing tells.
_TOO_BUSY = (408, 409, 425, 429, 503, 504)
# llama.cpp says of a template with 500, in the words of two engines, what LM Studio says of it with 400, and its older
# versions with 200.
_TEMPLATE = re.compile(
    r"jinja|raise_exception|\btemplate|at row \d+, column \d+|roles must alternate|while executing \w+ at line|"
    # Nor is a request without the picture or the sound that it has to have a matter of one status alone.
    r"\b(?:requires?|needs?|expects?|missing|without)\b.{0,20}\b(?:image|audio)|"
    r"\b(?:image|audio)s?\b.{0,20}\b(?:required|needed|expected|missing)\b",
    re.IGNORECASE,
)
# It may be a filter or a variable of the template that is "not found", and no model.
_OF_TEMPLATES = (Reason.OTHER, Reason.UNKNOWN_MODEL)

Clock = Callable[[], float]


async def refresh(
    client: Client,
    upstream: str,
    asked: float,
    clock: Clock,
    *,
    loading: bool,
    misses: Callable[[Mapping[str, Entry]], bool],
    trusted: Callable[[], bool],
) -> Listed | ListingFailed:
    """What is there, loads that are under way included where `loading`, or something kept is not there any more.

    `misses` tells that of a listing, and `trusted` whether somebody else acts there, once it has come.
    """
    try:
        listing = await client.listing(loading=loading)
        if not loading and misses(listing.entries):
            # Somebody else's load may have pushed it out, which only this would show.
            asked = clock()
            loading, listing = True, await client.listing(loading=True)
    except UpstreamError as error:
        return ListingFailed(clock(), upstream, asked, _trouble(error), str(error))
    at, tier, entries, sight = clock(), listing.tier, listing.entries, listing.sight
    return Listed(
        at, upstream, asked, tier, entries, loading, sight, listing.places, trusted(), odd=listing.odd
    )


async def load(
    client: Client,
    keep: Keep,
    known: Model | None,
    tier: Tier,
    began: float,
    clock: Clock,
    told: Callable[[LoadProgressed], None],
) -> LoadEnded | LoadForgone:
    """Loads a model; `told` has how far it is, where LM Studio tells."""
    model, timeout = keep.model, keep.policy.load_timeout
    outcome, message, why, loaded = LoadOutcome.OK, None, None, None
    try:
        if tier.calls:
            loaded = await client.load(
                model.key,
                keep.load_fields or {},
                timeout=timeout,
                kind=known.kind if known else "llm",
                tier=tier,
                told=lambda done: told(LoadProgressed(clock(), model, done)),
            )
        else:
            # Without an explicit load, the first request is the load; its lease counts from now on.
            lease = keep.policy.lease if tier is Tier.V0 else None
            other = await client.ping(
                model.key,
                (model.key,),
                kind=kind_of(keep, known),
                tier=tier,
                timeout=timeout,
                lease=lease,
                own=keep.ping,
            )
            if other is not None:
                outcome, message = LoadOutcome.FAILED, f"{other} answered in its place"
    except Forgone as error:
        return LoadForgone(clock(), model, str(error))
    except GivenUp as error:
        outcome, message = LoadOutcome.GIVEN_UP, str(error)
    except (TimedOut, Cut) as error:
        outcome, message = LoadOutcome.UNKNOWN, str(error)
    except Unauthorized as error:
        outcome, message, why = LoadOutcome.REFUSED, str(error), Reason.UNAUTHORIZED
    except (Refused, Unexpected) as error:
        outcome, message = _load_outcome(error, tier), str(error)
        why = error.reason if isinstance(error, Refused) else None
        if not tier.calls and _refuses_the_request(error, tier):
            # The model was there to refuse it. Where residency shows, the listing has the last word.
            outcome, why = LoadOutcome.OK, None
    except UpstreamError as error:
        outcome, message = LoadOutcome.FAILED, str(error)
    now = clock()
    # On demand the instance carries the key as its id.
    instance_id = loaded.instance_id if loaded else model.key
    return LoadEnded(
        now,
        model,
        outcome,
        elapsed=now - began,
        seconds=loaded.seconds if loaded else None,
        instance_id=instance_id if outcome is LoadOutcome.OK else None,
        proved=not tier.calls and outcome is LoadOutcome.OK,
        message=message,
        why=why,
    )


async def ping(
    client: Client, keep: Keep, model: Model, kind: str, target: str, tier: Tier, began: float, clock: Clock
) -> PingEnded:
    """Has the instance `target` of a model say one word, of whichever `kind` it is now."""
    outcome, message, why = PingOutcome.OK, None, None
    try:
        other = await client.ping(
            target,
            _accepted(model),
            kind=kind,
            tier=tier,
            timeout=keep.policy.ping_timeout,
            own=keep.ping,
        )
        if other is not None:
            outcome, message = PingOutcome.WRONG_MODEL, f"{other} answered the ping in its place"
    except UpstreamError as error:
        (name, why), message = _what_came_of_it(error, tier), str(error)
        outcome = PingOutcome(name)
    now = clock()
    return PingEnded(now, model.id, outcome, now - began, message, why)


async def prime(
    client: Client,
    model: Model,
    target: str,
    opening: str,
    replay: Callable[[], Replay | None],
    tier: Tier,
    began: float,
    clock: Clock,
) -> PrimeEnded:
    """Has the instance `target` read an opening. `replay` gives what that says, while it is known."""
    outcome, tokens, message, why = PrimeOutcome.OK, None, None, None
    try:
        opened = replay()
        if opened is None:
            outcome, message = PrimeOutcome.REFUSED, "it is no longer known"
        else:
            # What it had in its cache it answers as soon as a ping.
            held = any(primed.opening == opening for primed in model.priming.done)
            timeout = model.policy.ping_timeout if held else model.policy.load_timeout
            tokens = await client.prime(opened, target, _accepted(model), tier=tier, timeout=timeout)
    except RecursionError:
        # It was read, on another stack; to write it takes a little more. Callers send what they like.
        outcome, message = PrimeOutcome.REFUSED, "its lists stand too deep in each other"
    except UpstreamError as error:
        (name, why), message = _what_came_of_it(error, tier), str(error)
        outcome = PrimeOutcome(name)
    now = clock()
    return PrimeEnded(now, model.id, opening, outcome, now - began, tokens, message, why)


async def unload(client: Client, model: ModelId, target: str, tier: Tier, clock: Clock) -> UnloadEnded:
    """Unloads the instance `target` of a model."""
    message, in_use = None, False
    try:
        await client.unload(target, tier=tier, timeout=UNLOAD_TIMEOUT)
    except UpstreamError as error:
        message = str(error)
        in_use = isinstance(error, Forgone) or (isinstance(error, Refused) and error.reason is Reason.IN_USE)
    return UnloadEnded(clock(), model, target, message, in_use)


def kind_of(keep: Keep, known: Model | None) -> str:
    """What the config says, else what the listing said."""
    if keep.kind is not None:
        return keep.kind
    return known.kind if known else "llm"


def _accepted(model: Model) -> list[str]:
    """The names by which an answer may call it."""
    return [model.id.key, *(instance.id for instance in model.instances)]


def _load_outcome(error: Refused | Unexpected, tier: Tier) -> LoadOutcome:
    if isinstance(error, Refused) and error.reason is Reason.RESOURCES:
        return LoadOutcome.REFUSED
    if isinstance(error, Refused) and error.reason is Reason.LOADING:
        return LoadOutcome.UNKNOWN
    if isinstance(error, Refused) and error.reason is Reason.OTHER and error.status in (408, 409):
        return LoadOutcome.UNKNOWN  # somebody on the way lost patience, or it stands in the way of itself
    if tier is Tier.OPENAI and error.status is not None and 400 <= error.status <= 500:
        # There the load is part of the request, and a whole answer of the server's own ends both. (502 to 504
        # may be a gateway's, and say nothing about what goes on behind it.)
        return LoadOutcome.FAILED
    if isinstance(error, Unexpected):
        return LoadOutcome.UNKNOWN  # whatever garbled the answer need not have stopped the load
    if error.reason is Reason.OTHER and not 400 <= error.status < 500:
        return LoadOutcome.UNKNOWN  # an error that does not say that the load is over
    return LoadOutcome.FAILED


def _what_came_of_it(
    error: UpstreamError, tier: Tier
) -> tuple[Literal["timeout", "refused", "error"], Reason | None]:
    """The outcome of a ping, or of an opening, that was not answered as it should be, and what kind of error it is."""
    match error:
        case TimedOut():
            return "timeout", None
        case Refused(reason=Reason.OTHER) | Unexpected() if error.status in _TOO_BUSY:
            return "timeout", None
        case Refused() | Unexpected():
            return ("refused", None) if _refuses_the_request(error, tier) else ("error", _reason(error))
        case Unauthorized():
            return "error", Reason.UNAUTHORIZED
        case _:
            return "error", None


def _reason(error: Refused | Unexpected) -> Reason:
    """A page says the same by its status alone as an answer of the server's own."""
    if isinstance(error, Refused):
        return error.reason
    return Reason.UNKNOWN_ROUTE if error.status in (404, 405) else Reason.OTHER


def _refuses_the_request(error: Refused | Unexpected, tier: Tier) -> bool:
    """Whether the model answered, and only does not take this request: a template, an image that is missing."""
    reason = _reason(error)
    if reason is Reason.UNKNOWN_ROUTE:
        # Elsewhere a 404 may as well mean that there is no such model.
        return tier is not Tier.OPENAI or error.status == 405
    if reason in _OF_TEMPLATES and error.status in (200, 400, 422, 500) and _TEMPLATE.search(str(error)):
        return True
    return reason is Reason.OTHER and error.status in (400, 405, 413, 415, 422, 501)


def _trouble(error: UpstreamError) -> Trouble:
    match error:
        case Unauthorized():
            return Trouble.UNAUTHORIZED
        case Unreachable(refused=True):
            return Trouble.REFUSED
        case Unreachable():
            return Trouble.UNREACHABLE
        case TimedOut():
            return Trouble.TIMEOUT
        case Refused(reason=Reason.LOADING):
            return Trouble.LOADING
        case _:
            return Trouble.BAD_ANSWER
