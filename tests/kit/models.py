"""Models as the facts left them: in each state, fed one by one or as the keeper feeds them."""

from dataclasses import fields, replace
from functools import cache

from keepalive.core.actions import Action
from keepalive.core.apply import apply
from keepalive.core.errors import Reason
from keepalive.core.facts import (
    NO_SIGHT,
    ClockJumped,
    Entry,
    Fact,
    Instance,
    InstanceLost,
    Listed,
    ListingFailed,
    ListingStarted,
    LoadEnded,
    LoadOutcome,
    LoadRemembered,
    LoadStarted,
    ModelFact,
    ModelId,
    OpeningRead,
    OpeningsLearned,
    PingEnded,
    PingOutcome,
    PingStarted,
    PrimedAnswered,
    PrimeEnded,
    PrimeOutcome,
    PrimeStarted,
    ReleaseAsked,
    RequestEnded,
    RequestsCounted,
    RequestStarted,
    Sight,
    Tier,
    Trouble,
    UnloadEnded,
    UnloadStarted,
    WaitEnded,
    WaitStarted,
    WarmAsked,
    WindowClosed,
    WindowOpened,
    WishSpent,
    fold_key,
)
from keepalive.core.plan import plan
from keepalive.core.records import Cause, Model, Pending, Policy, Upstream
from keepalive.core.states import State
from keepalive.core.upstreams import apply_upstream

GEMMA = ModelId("local", "gemma")
QWEN = ModelId("local", "qwen")
POLICY = Policy(refresh_interval=15, ping_interval=300, ping_timeout=60, load_timeout=900)


def entry(key: str, *ids: str, loading: bool | None = None, size: int | None = None) -> Entry:
    return Entry(key, size_bytes=size, instances=tuple(Instance(i) for i in ids), loading=loading)


def listed(
    at: float,
    *entries: Entry,
    asked: float | None = None,
    tier: Tier = Tier.V1,
    sight: Sight = NO_SIGHT,
) -> Listed:
    index = {fold_key(e.key): e for e in entries}
    return Listed(at, "local", at - 0.01 if asked is None else asked, tier, index, sight=sight)


def failed(
    at: float, trouble: Trouble, message: str = "it failed", asked: float | None = None
) -> ListingFailed:
    return ListingFailed(at, "local", at - 0.01 if asked is None else asked, trouble, message)


def refused(at: float) -> ListingFailed:
    return failed(at, Trouble.REFUSED, "nothing listens at http://x")


def load_ended(at: float, outcome: LoadOutcome = LoadOutcome.OK, **more: object) -> LoadEnded:
    told: dict[str, object] = {"elapsed": 10.0, "instance_id": "gemma" if outcome is LoadOutcome.OK else None}
    return LoadEnded(at, GEMMA, outcome, **{**told, **more})  # type: ignore[arg-type]


def after(model: Model, *facts: Fact) -> Model:
    for fact in facts:
        model = apply(model, fact)
    return model


def a_model(identity: ModelId = GEMMA, **changes: object) -> Model:
    return replace(Model(id=identity, policy=POLICY), **changes)  # type: ignore[arg-type]


def cold(**changes: object) -> Model:
    return after(a_model(**changes), listed(1, entry("gemma")))


def found(**changes: object) -> Model:
    return after(a_model(**changes), listed(1, entry("gemma", "gemma")))


def warm(**changes: object) -> Model:
    return after(found(**changes), PingStarted(2, GEMMA), PingEnded(3, GEMMA, PingOutcome.OK, 0.2))


def ours(**changes: object) -> Model:
    """Loaded by us, listed and proved: warm since 13."""
    return after(
        cold(**changes),
        LoadStarted(2, GEMMA),
        load_ended(10),
        listed(11, entry("gemma", "gemma")),
        PingStarted(12, GEMMA),
        PingEnded(13, GEMMA, PingOutcome.OK, 0.2),
    )


def unanswered(**changes: object) -> Model:
    """Our load was cut off at 10, nine seconds after it began."""
    return after(
        cold(**changes), LoadStarted(2, GEMMA), load_ended(10, LoadOutcome.UNKNOWN, message="it was cut")
    )


def tried(state: State, **changes: object) -> Model:
    """An instance of ours is there, and there is a trace of everything that can have gone wrong before."""
    went_wrong: dict[str, object] = {
        "failures": 2,
        "failure": "it went wrong before",
        "retry_at": 90.0,
        "ping_at": 80.0,
        "crashed": True,
        "busy": True,
        "suspected": Cause.CRASH,
        "pending": Pending(since=1.0, until=99.0, alive_at=2.0),
        "warm_since": 3.0,
        "contested": True,
        "reason": "it went wrong",
    }
    there = {"instances": (Instance("gemma"),), "ours": frozenset({"gemma"}), "state": state, "since": 20.0}
    return a_model(**{**went_wrong, **there, **changes})


def changed(before: Model | Upstream, after: Model | Upstream) -> dict[str, object]:
    """What differs in the record, and nothing else does."""
    pairs = {f.name: (getattr(before, f.name), getattr(after, f.name)) for f in fields(before)}
    return {name: new for name, (old, new) in pairs.items() if new != old}


class Box:
    """One upstream and its models, fed with facts as the keeper feeds them."""

    def __init__(self, *models: Model, upstream: Upstream | None = None) -> None:
        self.upstream = upstream or Upstream("local")
        self.models = {m.id: m for m in models}

    def see(self, *facts: Fact) -> "Box":
        for fact in facts:
            self.upstream = apply_upstream(self.upstream, fact)
            for identity, model in self.models.items():
                if not isinstance(fact, ModelFact) or fact.model == identity:
                    self.models[identity] = apply(model, fact)
        return self

    def plan(self, now: float) -> list[Action]:
        return plan(self.upstream, list(self.models.values()), now)

    def __getitem__(self, identity: ModelId) -> Model:
        return self.models[identity]


def box(*facts: Fact, **changes: object) -> Box:
    return Box(a_model(**changes)).see(*facts)


@cache
def every_model() -> dict[str, Model]:
    base = {
        "unknown": a_model(),
        "cold": cold(),
        "unlisted": after(a_model(), listed(1)),
        "loading": after(cold(), LoadStarted(2, GEMMA)),
        "loading beside another's": after(cold(), LoadStarted(2, GEMMA), listed(3, entry("gemma", "gemma"))),
        "unanswered": unanswered(),
        "loaded, not listed": after(cold(), LoadStarted(2, GEMMA), load_ended(10)),
        "remembered": after(a_model(), LoadRemembered(1, GEMMA, -20.0, 30.0)),
        "another's load": after(a_model(), listed(1, entry("gemma", loading=True))),
        "found": found(),
        "pinging": after(found(), PingStarted(2, GEMMA)),
        "warm": warm(),
        "ours": ours(),
        "busy": after(found(), PingStarted(2, GEMMA), PingEnded(3, GEMMA, PingOutcome.TIMEOUT)),
        "backoff": after(cold(), LoadStarted(2, GEMMA), load_ended(10, LoadOutcome.FAILED, message="no")),
        "crashed": after(
            ours(), PingStarted(20, GEMMA), PingEnded(21, GEMMA, PingOutcome.ERROR, why=Reason.CRASHED)
        ),
        "unloading": after(ours(), ReleaseAsked(20, GEMMA), UnloadStarted(21, GEMMA, "gemma")),
        "unreachable": after(warm(), refused(20)),
        "blind": after(a_model(), listed(1, entry("gemma"), tier=Tier.OPENAI)),
        "blind and warm": after(
            a_model(),
            listed(1, entry("gemma"), tier=Tier.OPENAI),
            LoadStarted(2, GEMMA),
            load_ended(3, proved=True),
        ),
        "released": after(ours(), ReleaseAsked(20, GEMMA)),
    }
    return base | {f"{name}, retired": replace(m, retired=True) for name, m in base.items()}


def every_fact(at: float) -> list[Fact]:
    entries = [
        (),
        (entry("gemma"),),
        (entry("gemma", loading=True),),
        (entry("gemma", loading=False),),
        (entry("gemma", "gemma"),),
        (entry("GEMMA", "gemma:2", "gemma:3"),),
        (entry("gemma", "gemma", loading=True),),
    ]
    return [
        ListingStarted(at, "local"),
        ClockJumped(at, "local", -3600.0),
        *(listed(at, *e, tier=tier, asked=a) for e in entries for tier in Tier for a in (at - 0.01, -5.0)),
        *(failed(at, trouble, asked=a) for trouble in Trouble for a in (at - 0.01, -5.0)),
        LoadStarted(at, GEMMA),
        *(load_ended(at, outcome, proved=proved) for outcome in LoadOutcome for proved in (True, False)),
        *(load_ended(at, seconds=s, instance_id=i) for s in (None, 0.0) for i in (None, "gemma:2")),
        LoadRemembered(at, GEMMA, at - 1e6, None),
        LoadRemembered(at, GEMMA, at - 1, 20.0, True),
        PingStarted(at, GEMMA),
        *(PingEnded(at, GEMMA, outcome) for outcome in PingOutcome),
        *(PingEnded(at, GEMMA, PingOutcome.ERROR, why=why) for why in Reason),
        OpeningsLearned(at, GEMMA, ("agent",)),
        OpeningRead(at, GEMMA, "agent"),
        PrimeStarted(at, GEMMA, "agent"),
        *(PrimeEnded(at, GEMMA, "agent", outcome, 5.0) for outcome in PrimeOutcome),
        *(PrimeEnded(at, GEMMA, "agent", PrimeOutcome.ERROR, why=why) for why in Reason),
        PrimedAnswered(at, GEMMA, "agent", 9.0),
        UnloadStarted(at, GEMMA, "gemma"),
        UnloadEnded(at, GEMMA, "gemma"),
        UnloadEnded(at, GEMMA, "gemma:9", "no such instance"),
        WindowOpened(at, GEMMA),
        WindowClosed(at, GEMMA),
        WarmAsked(at, GEMMA),
        ReleaseAsked(at, GEMMA),
        WishSpent(at, GEMMA),
        WaitStarted(at, GEMMA),
        WaitEnded(at, GEMMA, 3.0, True),
        RequestStarted(at, GEMMA),
        RequestEnded(at, GEMMA, True),
        RequestEnded(at, GEMMA, False),
        RequestsCounted(at, GEMMA, 2, 5, at - 0.01, at - 0.02),
        RequestsCounted(at, GEMMA, 1, 0),
        InstanceLost(at, GEMMA, "Model unloaded."),
    ]


OUR_MOVES = (LoadStarted, PingStarted, PrimeStarted, UnloadStarted)
OLD = Tier.V0


def old(*facts: Fact, auto_evict: bool | None = None) -> Box:
    models = a_model(rank=0), a_model(QWEN, rank=1)
    return Box(*models, upstream=Upstream("local", max_loading=2, auto_evict=auto_evict)).see(*facts)


def loaded_on_demand(state: Box, model: ModelId, at: float, *there: str) -> Box:
    """A load by ping; at its end `there` is in memory."""
    rows = [entry(key, *([key] if key in there else []), loading=False) for key in ("gemma", "qwen")]
    return state.see(
        LoadStarted(at, model),
        LoadEnded(at + 5, model, LoadOutcome.OK, 5.0, None, model.key, proved=True),
        listed(at + 6, *rows, tier=OLD),
    )


def nothing(at: float) -> Listed:
    return listed(at, entry("gemma", loading=False), entry("qwen", loading=False), tier=OLD)
