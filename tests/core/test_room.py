"""Who is let into memory, who goes for it, who waits, and what is said of it."""

from dataclasses import replace

import pytest

from keepalive.core.actions import Action, Drain, EndDrain, GiveUpLoad, Load, Refresh, SendPing, Unload
from keepalive.core.apply import apply
from keepalive.core.explain import explain, ready_in
from keepalive.core.facts import (
    Entry,
    Instance,
    Listed,
    LoadEnded,
    LoadGivenUp,
    LoadOutcome,
    LoadStarted,
    ModelId,
    Need,
    Occupant,
    Sight,
    Tier,
    UnloadCause,
    UnloadEnded,
    UnloadStarted,
)
from keepalive.core.plan import arranged, plan
from keepalive.core.records import Cause, Claim, Eviction, Model, Pending, Policy, Upstream, UpstreamState
from keepalive.core.room import (
    Arrangement,
    is_in_use,
    limit,
    limit_source,
    manages,
    next_to_go,
    source,
    strangers,
    takes,
    used,
)
from keepalive.core.states import State

GB = 10**9
NOW = 1000.0
SETTLE, REFUSAL_HOLDS, AHEAD_AFTER, CROWD_HOLDS = 3.0, 300.0, 300.0, 3600.0
ROOM = UnloadCause.ROOM


def up(gigabytes: float | None = 30, **changes: object) -> Upstream:
    memory = None if gigabytes is None else int(gigabytes * GB)
    known = {"state": UpstreamState.UP, "tier": Tier.V1, "asked": NOW, "answered_at": NOW, "due_at": NOW + 15}
    return Upstream("local", memory=memory, sees_loading=True, **{**known, **changes})  # type: ignore[arg-type]


def policy(gigabytes: float | None, **changes: object) -> Policy:
    memory = None if gigabytes is None else int(gigabytes * GB)
    return Policy(**{"auto": True, "memory": memory, "pinged": False, **changes})  # type: ignore[arg-type]


def ident(key: str) -> ModelId:
    return ModelId("local", key)


def absent(key: str, gigabytes: float | None = 10, **changes: object) -> Model:
    known = {"state": State.COLD, "policy": policy(gigabytes), "reason": None}
    return Model(ident(key), **{**known, **changes})  # type: ignore[arg-type]


def there(key: str, gigabytes: float | None = 10, **changes: object) -> Model:
    """Ours, warm, and last used long ago."""
    known = {
        "state": State.WARM,
        "policy": policy(gigabytes),
        "reason": None,
        "instances": (Instance(key),),
        "ours": frozenset({key}),
        "use_at": 100.0,
    }
    return Model(ident(key), **{**known, **changes})  # type: ignore[arg-type]


def asked(key: str, gigabytes: float | None = 10, *, since: float = NOW - 10, **changes: object) -> Model:
    return absent(key, gigabytes, **{"waiting": 1, "waiting_since": since, "use_at": since, **changes})


def always(model: Model) -> Model:
    return replace(model, policy=replace(model.policy, auto=False))


def planned(upstream: Upstream, *models: Model, now: float = NOW) -> list[Action]:
    return [a for a in plan(upstream, models, now) if not isinstance(a, SendPing)]


def why(upstream: Upstream, model: Model, *others: Model) -> str | None:
    return explain(upstream, [model, *others], model, NOW)


# --- what a model takes, and what there is --------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "bytes_", "told_by"),
    [
        (absent("a", 9, size_bytes=5 * GB), 9 * GB, "config"),
        (absent("a", None, size_bytes=5 * GB, need=Need(7 * GB)), 7 * GB, "estimate"),
        (absent("a", None, size_bytes=5 * GB, need=Need(1)), 1, "estimate"),
        (absent("a", None, size_bytes=5 * GB, need=Need(0)), 6 * GB, "size"),
        (absent("a", None, size_bytes=5 * GB), 6 * GB, "size"),
        (absent("a", None, size_bytes=0), None, None),
        (absent("a", None), None, None),
    ],
)
def test_what_a_model_takes_is_told_by_the_config_then_by_lm_studio_then_by_its_size(
    model: Model, bytes_: int | None, told_by: str | None
):
    assert (takes(model), source(model)) == (bytes_, told_by)


def listing(*entries: Entry) -> Listed:
    return Listed(NOW, "local", NOW - 0.1, Tier.V1, {e.key: e for e in entries})


def test_what_is_used_counts_every_copy_of_everybody_and_what_is_on_its_way():
    entries = (
        Entry("a", size_bytes=GB, instances=(Instance("a"),)),
        Entry("x", size_bytes=10 * GB, instances=(Instance("x"), Instance("x:2"))),
        Entry("y", instances=(Instance("y"),)),
        Entry("z", size_bytes=10 * GB),
    )
    upstream = up(occupants=listing(*entries).occupants)
    models = [
        there("a", 3, instances=(Instance("a"), Instance("a:2"))),
        absent("b", 5, load_started=NOW),
        absent("c", 7, pending=Pending(NOW, NOW + 9, NOW)),
        absent("d", 11),
        there("e", None),
    ]

    assert used(upstream, models) == (6 + 5 + 7 + 24) * GB


def test_memory_is_a_matter_where_there_is_a_budget_or_something_to_let_go_and_where_it_can_be_seen():
    keeps = [always(there("a")), always(absent("b"))]

    assert not manages(up(None), keeps)
    assert manages(up(), keeps)
    assert manages(up(None), [*keeps, absent("c")])
    assert not manages(up(tier=Tier.OPENAI), [absent("c")])


def test_a_refusal_tells_a_limit_until_a_load_shows_more_or_it_is_old():
    refused = absent("a", refused_claim=Claim(20 * GB, NOW))
    shown = there("b", granted_claim=Claim(20 * GB, NOW + 5))
    less = there("b", granted_claim=Claim(20 * GB - 1, NOW + 5))
    earlier = there("b", granted_claim=Claim(25 * GB, NOW - 5))
    at_once = there("b", granted_claim=Claim(25 * GB, NOW))

    assert limit(up(None), [refused], NOW) == 20 * GB - 1
    assert limit(up(15), [refused], NOW) == 15 * GB
    assert limit(up(30), [refused], NOW) == 20 * GB - 1
    assert limit(up(None), [refused], NOW + REFUSAL_HOLDS) is None
    assert limit(up(None), [refused, shown], NOW + 6) is None
    assert limit(up(None), [refused, less], NOW + 6) == 20 * GB - 1
    assert limit(up(None), [refused, at_once], NOW + 6) == 20 * GB - 1
    assert limit(up(None), [refused, earlier], NOW + 6) == 20 * GB - 1
    assert limit_source(up(30), [refused], NOW) == "refusal"
    assert limit_source(up(15), [refused], NOW) == "config"
    assert limit_source(up(None), [], NOW) is None


@pytest.mark.parametrize(
    ("changes", "now", "in_use"),
    [
        ({}, NOW, False),
        ({"in_flight": 1}, NOW, True),
        ({"waiting": 1}, NOW, True),
        ({"pinging": True}, NOW, True),
        ({"pending": Pending(NOW, NOW, NOW)}, NOW, True),
        ({"instances": (Instance("a", busy=True),)}, NOW, True),
        ({"instances": (Instance("a", queued=1),)}, NOW, True),
        ({"instances": (Instance("a", busy=False, queued=0),)}, NOW, False),
        ({"seen_by": Sight(late=True)}, NOW, True),
        ({"asked_for": True}, NOW, True),
        ({"use_at": NOW}, NOW + SETTLE - 0.1, True),
        ({"use_at": NOW}, NOW + SETTLE, False),
        ({"use_at": NOW, "draining": True, "waiting": 3}, NOW, False),
        ({"in_flight": 1, "draining": True}, NOW, True),
    ],
)
def test_who_works_with_a_model_or_is_about_to_is_known(changes: dict[str, object], now: float, in_use: bool):
    assert is_in_use(there("a", **changes), now) is in_use


def test_those_go_first_who_are_drained_then_the_least_recently_used_then_the_last_of_the_config():
    first, last = there("first", rank=0), there("last", rank=1)
    older, drained = (
        there("older", rank=2, use_at=99.0),
        there("drained", rank=3, use_at=900.0, draining=True),
    )

    assert next_to_go([first, last, older, drained], NOW) == [drained, older, last, first]


def test_what_is_always_kept_or_just_would_not_go_is_not_among_those_that_may():
    released = always(there("a", asked_for=False))
    refused = there("b", letting_go=ROOM, retry_at=NOW + 0.1)
    mended = there("c", letting_go=ROOM)
    failed = there("d", retry_at=NOW + 5)

    assert next_to_go([released, refused, mended, failed], NOW) == [mended, failed]
    assert next_to_go([refused], NOW + 0.1) == [refused]


def test_what_is_not_in_memory_is_not_among_those_that_go_next():
    assert next_to_go([absent("a"), there("b")], NOW) == [there("b")]


def test_a_variant_that_is_kept_is_no_stranger_in_the_row_of_its_key():
    upstream = up(occupants=(Occupant("acme/a", 1, GB), Occupant("acme/a@q8", 1, GB)))

    assert strangers(upstream, [absent("Acme/A@q4")]) == ["acme/a@q8"]


def test_strangers_are_what_nobody_keeps_and_what_we_keep_but_did_not_load():
    found, coming = there("b", ours=frozenset()), there("c", ours=frozenset(), load_started=NOW)
    upstream = up(occupants=(Occupant("theirs", 1, GB), Occupant("b", 1, GB)))

    assert strangers(upstream, [there("a"), found, coming, absent("d")]) == ["theirs", "b"]


# --- who is let in, and who goes ------------------------------------------------------------------


def test_what_fits_is_loaded_and_says_what_all_take_then():
    assert planned(up(), there("a"), asked("b")) == [Load(ident("b"), claim=20 * GB)]


def test_what_nobody_asked_for_is_not_loaded():
    assert planned(up(), there("a"), absent("b")) == []
    assert why(up(), absent("b")) == "loaded when somebody asks for it"


def test_the_least_recently_used_goes_and_no_more_than_is_needed():
    models = [there("a", use_at=300.0), there("b", use_at=200.0), there("c", use_at=400.0)]

    assert planned(up(), *models, asked("d")) == [Unload(ident("b"), "b", ROOM)]
    assert planned(up(), *models, asked("d", 11)) == [
        Unload(ident("b"), "b", ROOM),
        Unload(ident("a"), "a", ROOM),
    ]


def test_a_small_one_stays_where_a_large_one_that_goes_is_enough():
    models = [
        there("small", 2, use_at=200.0),
        there("large", 20, use_at=300.0),
        there("last", 8, use_at=900.0),
    ]

    assert planned(up(), *models, asked("d", 20)) == [Unload(ident("large"), "large", ROOM)]


def test_the_load_waits_until_the_room_is_there():
    going = there("a", 20, unloading=True)

    assert planned(up(), going, asked("b", 20)) == []
    assert why(up(), asked("b", 20), going) == "waits for room: a is being unloaded"


def test_several_that_are_being_unloaded_are_told_so():
    going = [there(key, 15, unloading=True) for key in "ac"]

    assert why(up(), asked("b", 20), *going) == "waits for room: a, c are being unloaded"


@pytest.mark.parametrize(
    "left_alone",
    [
        there("a", 25, in_flight=1),
        there("a", 25, use_at=NOW - SETTLE + 0.1),
        there("a", 25, instances=(Instance("a", busy=True),)),
        there("a", 25, ours=frozenset()),
        there("a", 25, instances=(Instance("a"), Instance("a:2"))),
        always(there("a", 25)),
    ],
    ids=["in use", "just used", "used by a stranger", "not ours", "partly not ours", "always"],
)
def test_what_is_in_use_or_not_ours_or_always_never_goes(left_alone: Model):
    for patience in (0.0, 1e9):
        waits = asked("b", policy=policy(10, patience=patience))

        assert [a for a in planned(up(), left_alone, waits) if isinstance(a, (Load, Unload))] == []


def test_superfluous_copies_of_our_own_go_first():
    twice = always(there("a", 10, instances=(Instance("a"), Instance("a:2")), ours=frozenset({"a", "a:2"})))

    assert planned(up(), twice, there("b", 5), asked("c")) == [Unload(ident("a"), "a:2", ROOM)]


def test_always_comes_first_and_makes_room_in_the_same_way():
    waits = asked("b", since=NOW - 500)

    assert planned(up(), always(absent("a", rank=5)), waits) == [Load(ident("a"), claim=10 * GB)]
    assert planned(up(), always(absent("a", 25)), there("c"), waits) == [Unload(ident("c"), "c", ROOM)]


def test_room_is_kept_for_what_is_always_loaded_also_while_it_cannot_be():
    held_off = always(absent("a", 25, state=State.BACKOFF, retry_at=NOW + 100))

    assert planned(up(40), held_off, asked("b", 20)) == []
    assert planned(up(40), held_off, asked("b", 15)) == [Load(ident("b"), claim=40 * GB)]


def test_of_always_models_that_exceed_the_budget_the_first_are_kept():
    models = [always(absent(key, 12, rank=n)) for n, key in enumerate("abc")]
    loaded = [always(there(key, 12, rank=n)) for n, key in enumerate("ab")]

    assert planned(up(max_loading=3), *models) == [
        Load(ident("a"), claim=24 * GB),
        Load(ident("b"), claim=24 * GB),
    ]
    assert planned(up(max_loading=3), *loaded, models[2]) == []
    assert why(up(), models[2], *loaded) == (
        "there is no room for it: it takes 12.0 GB, and the budget is 30.0 GB, of which 24.0 GB are for those that "
        "come first"
    )


def test_what_is_larger_than_the_budget_says_so_also_while_nobody_asks():
    assert (
        why(up(), always(absent("a", 31)))
        == "there is no room for it: it takes 31.0 GB, and the budget is 30.0 GB"
    )
    assert why(up(), absent("a", 31)) == "it never fits: it takes 31.0 GB, and the budget is 30.0 GB"
    assert (
        why(up(), absent("a", None)) == why(up(None), absent("a", 31)) == "loaded when somebody asks for it"
    )


def test_what_can_never_fit_is_said_at_once():
    room = arranged(up(), [asked("a", 31), always(there("b", 5))], NOW)

    assert room is not None
    assert room.never == {
        ident(
            "a"
        ): "there is no room for it: it takes 31.0 GB, and the budget is 30.0 GB beside what is always "
        "kept (5.0 GB)"
    }
    assert planned(up(), asked("a", 31)) == []


def test_who_has_waited_longest_comes_first():
    first, second = asked("a", 20, since=NOW - 20), asked("b", 20, since=NOW - 10)

    assert planned(up(), second, first) == [Load(ident("a"), claim=20 * GB)]


def test_what_fits_now_does_not_wait_behind_what_does_not():
    large, small, busy = asked("a", 25, since=NOW - 20), asked("b", 5), there("c", 20, in_flight=1)

    assert planned(up(), large, small, busy) == [Load(ident("b"), claim=25 * GB)]


def test_unless_that_has_waited_for_long_and_its_room_is_being_made():
    large, small, busy = asked("a", 25, since=NOW - 120), asked("b", 5), there("c", 20, in_flight=1)

    assert planned(up(), large, small, busy) == [Drain(ident("c"))]
    assert why(up(), small, large, busy) == "waits for room: others have waited longer"


def test_a_model_whose_size_nobody_knows_is_alone():
    assert planned(up(), asked("a", None)) == [Load(ident("a"))]
    assert planned(up(), asked("a", None), there("b", 1)) == [Unload(ident("b"), "b", ROOM)]
    assert planned(up(), asked("a", 1), there("b", None)) == [Unload(ident("b"), "b", ROOM)]


# --- where nothing is enough ----------------------------------------------------------------------


def test_callers_wait_and_are_told_for_whom():
    waits, busy = asked("a", 25), there("b", 20, in_flight=1)

    assert planned(up(), waits, busy) == []
    assert why(up(), waits, busy) == (
        "waits for room: it takes 25.0 GB, and 10.0 GB are free; b is in use; it makes room when its answers have ended"
    )


def test_a_stranger_in_the_way_is_named_and_left_alone():
    waits, stranger = asked("a", 25), there("b", 20, ours=frozenset())

    room = arranged(up(), [waits, stranger], NOW)

    assert room is not None
    assert room.never[ident("a")] == (
        "there is no room for it: it takes 25.0 GB, and 10.0 GB are free; b was loaded by somebody else"
    )


def test_no_more_than_three_strangers_in_the_way_are_named():
    theirs = [there(key, 7, ours=frozenset()) for key in "bcde"]
    end = "were loaded by somebody else"

    assert str(why(up(), asked("a", 25), *theirs)).endswith(f"2.0 GB are free; b, c, d {end}")
    assert str(why(up(), asked("a", 25), *theirs[:2])).endswith(f"16.0 GB are free; b, c {end}")


def test_after_patience_what_costs_least_to_load_again_is_drained():
    waits = asked("a", 15, since=NOW - 120)
    slow, quick = (
        there("b", 15, in_flight=1, recent_loads=(90.0,)),
        there("c", 15, in_flight=3, recent_loads=(9.0,)),
    )

    assert planned(up(), asked("a", 15, since=NOW - 119.9), slow, quick) == []
    assert planned(up(), waits, slow, quick) == [Drain(ident("c"))]
    assert planned(up(), waits, slow, replace(quick, draining=True)) == []


def test_what_is_drained_goes_once_its_answers_have_ended_whoever_waits_for_it():
    drained = there("c", 15, draining=True, waiting=2, waiting_since=NOW - 5, use_at=NOW)

    assert planned(up(), asked("a", 25, since=NOW - 130), drained) == [Unload(ident("c"), "c", ROOM)]


def test_a_drain_ends_when_nobody_waits_for_it_any_more():
    drained = there("c", 15, draining=True, in_flight=1)

    assert planned(up(), absent("a", 25), drained) == [EndDrain(ident("c"))]


def test_what_has_just_been_loaded_answers_those_who_waited_before_it_is_drained():
    fresh = there("b", 20, waiting=4, waiting_since=NOW - 60)

    assert planned(up(), asked("a", 25, since=NOW - 500), fresh) == []


# --- without a budget -----------------------------------------------------------------------------


def test_without_a_budget_and_without_a_word_of_lm_studio_there_is_one_at_a_time():
    keeps = always(there("k", 50))

    assert planned(up(None), keeps, asked("a")) == [Load(ident("a"), claim=60 * GB)]
    assert planned(up(None), keeps, there("b", 1), asked("a", 1)) == [Unload(ident("b"), "b", ROOM)]
    assert planned(up(None), there("b", 1, in_flight=1), asked("a", 1)) == []
    assert why(up(None), asked("a", 1), there("b", 1, in_flight=1)) == (
        "waits for room: one model at a time fits for all that is known; b is in use; it makes room when its answers "
        "have ended"
    )


def test_lm_studios_word_lets_more_than_one_in():
    fits = asked("a", None, need=Need(9 * GB, passes_guardrails=True))

    assert planned(up(None), there("b", 9), fits) == [Load(ident("a"), claim=18 * GB)]


def test_lm_studios_word_that_it_does_not_fit_makes_room_first_and_is_old_right_after_that():
    no = asked("a", None, need=Need(9 * GB, passes_guardrails=False))
    idle = there("b", 9, touched_at=NOW - 6), there("c", 9, touched_at=NOW - 6, use_at=50.0)

    assert planned(up(None), *idle, no) == [Unload(ident("c"), "c", ROOM)]
    assert planned(up(None), replace(idle[0], touched_at=NOW - 1), no) == [Load(ident("a"), claim=18 * GB)]


def test_a_refusal_is_knowledge_about_the_limit_and_room_is_made_at_once():
    loads = apply(asked("a", 9), LoadStarted(NOW, ident("a"), claim=27 * GB))
    refused = apply(loads, LoadEnded(NOW + 1, ident("a"), LoadOutcome.REFUSED, 1.0, message="too much"))
    others = there("b", 9), there("c", 9, use_at=50.0)
    later = NOW + 7
    upstream = up(asked=later, answered_at=later)

    assert refused.refused_claim == Claim(27 * GB, NOW + 1)
    assert planned(upstream, refused, *others, now=later) == [Unload(ident("c"), "c", ROOM)]
    assert planned(upstream, refused, others[0], now=later) == [Load(ident("a"), claim=18 * GB)]


def test_a_refusal_with_nothing_of_ours_to_go_is_no_loop_of_loads():
    refused = asked("a", 9, refused_claim=Claim(27 * GB, NOW))
    foreign = there("b", 18, ours=frozenset())

    assert planned(up(None), refused, foreign) == []
    assert "a" in str(arranged(up(None), [refused, foreign], NOW).never)  # type: ignore[union-attr]


def test_on_an_old_server_the_next_load_is_what_makes_room_and_only_from_what_is_idle():
    upstream = up(None, tier=Tier.V0, auto_evict=True, resident=frozenset({"b"}))

    assert planned(upstream, there("b"), asked("a")) == [Drain(ident("b")), Load(ident("a"), claim=10 * GB)]
    assert planned(upstream, there("b", in_flight=1), asked("a")) == []
    assert planned(upstream, there("b", in_flight=1), asked("a", since=NOW - 120)) == [Drain(ident("b"))]


def test_on_an_old_server_what_the_next_load_pushes_out_is_given_to_nobody_until_a_look_has_shown_it_gone():
    upstream = up(None, tier=Tier.V0, auto_evict=True, resident=frozenset({"b"}))
    going, since = there("b", draining=True, waiting=1), {"load_started": NOW - 5, "state": State.LOADING}
    told = Pending(since=NOW - 9, until=NOW + 30, alive_at=NOW - 1, loaded=True, proved=True)

    assert planned(upstream, going, absent("a", waiting=1, **since)) == []
    assert planned(upstream, going, absent("a", waiting=1, pending=told, state=State.LOADING)) == []
    assert planned(upstream, going, absent("a", touched_at=NOW)) == []
    assert planned(upstream, going, absent("a", touched_at=NOW - 9)) == [EndDrain(ident("b"))]
    assert planned(upstream, replace(going, ours=frozenset()), absent("a", **since)) == [EndDrain(ident("b"))]


# --- idle, windows and hands ----------------------------------------------------------------------


def test_what_nobody_uses_is_let_go_after_its_time_and_not_before():
    idle = there("a", policy=policy(9, idle=600.0), use_at=NOW - 600)

    assert planned(up(), idle) == [Unload(ident("a"), "a", UnloadCause.IDLE)]
    assert planned(up(), replace(idle, use_at=NOW - 599)) == []
    assert planned(up(), replace(idle, there_since=NOW - 599)) == []
    assert planned(up(), replace(idle, in_flight=1)) == []
    assert planned(up(), replace(idle, ours=frozenset())) == []
    assert planned(up(), replace(idle, asked_for=True)) == []
    assert planned(up(), always(idle)) == []
    assert planned(up(), there("a", use_at=0.0)) == []


def test_outside_its_window_it_is_let_go():
    closed = there("a", windowed=True, window_open=False)

    assert planned(up(), closed) == [Unload(ident("a"), "a", UnloadCause.WINDOW)]
    released = [Unload(ident("a"), "a", UnloadCause.RELEASED)]
    for changes in ({}, {"windowed": True, "window_open": False}):
        assert planned(up(), there("a", asked_for=False, **changes)) == released
        assert planned(up(), there("a", retired=True, **changes)) == released


# --- ahead of demand ------------------------------------------------------------------------------


def lately(key: str, gigabytes: float = 10, asks: float = 1.0, **changes: object) -> Model:
    return absent(key, gigabytes, **{"asks": asks, "asks_at": NOW - 60, "use_at": NOW - 60, **changes})


def test_free_room_is_filled_with_what_was_asked_for_most_of_late():
    assert planned(up(), lately("a", asks=2.0), lately("b", asks=5.0), lately("c", 31, asks=9.0)) == [
        Load(ident("b"), ahead=True, claim=10 * GB)
    ]


def test_before_a_load_ahead_it_is_asked_what_is_loading_though_a_ping_is_due_as_well():
    pinged = there("b", 1, policy=policy(1, pinged=True), ping_at=NOW)
    stale = up(asked=NOW - 2, answered_at=NOW - 2)

    assert [type(action) for action in plan(up(), [lately("a"), pinged], NOW)] == [Load, SendPing]
    assert plan(stale, [lately("a"), pinged], NOW) == [Refresh("local", loading=True)]


@pytest.mark.parametrize(
    "others",
    [
        [there("b", 25)],
        [asked("b", 25), there("c", 20, in_flight=1)],
        [absent("b", load_started=NOW, waiting=1)],
        [there("b", 1, unloading=True)],
    ],
    ids=["no room", "somebody waits", "somebody loads", "something is going"],
)
def test_nothing_is_loaded_ahead_in_the_way_of_anybody(others: list[Model]):
    assert [a for a in planned(up(), lately("a"), *others) if isinstance(a, (Load, Unload))] == []


@pytest.mark.parametrize(
    "model",
    [
        lately("a", failures=1),
        lately("a", last_eviction=Eviction(NOW - AHEAD_AFTER + 1, Cause.UNKNOWN, 0.0)),
        lately("a", policy=policy(10, idle=60.0)),
        lately("a", asks=0.01),
        lately("a", asked_for=False),
        lately("a", window_open=False),
        lately("a", policy=policy(None)),
    ],
    ids=[
        "failed",
        "just lost",
        "idle for its time",
        "long ago",
        "released",
        "outside its window",
        "size unknown",
    ],
)
def test_what_is_not_worth_it_is_not_loaded_ahead(model: Model):
    assert planned(up(), model) == []


def coming(key: str, gigabytes: float = 10, **changes: object) -> Model:
    """It is being loaded ahead, and LM Studio tells how far it is."""
    known = {"state": State.LOADING, "load_started": NOW - 5, "ahead": True, "progress": 0.1}
    return absent(key, gigabytes, **{**known, **changes})


@pytest.mark.parametrize("gigabytes", [10, 25], ids=["there is room for both", "there is not"])
def test_a_load_ahead_is_given_up_for_whoever_waits_behind_it(gigabytes: float):
    assert planned(up(), coming("a"), asked("b", gigabytes)) == [GiveUpLoad(ident("a"))]
    asked_for = "waits for its turn: a is loading, which nobody waits for, and LM Studio is asked to end that"
    assert why(up(), asked("b"), coming("a", giving_up=True)) == asked_for


@pytest.mark.parametrize(
    ("load", "other"),
    [
        (coming("a", giving_up=True), asked("b")),
        (coming("a", progress=None), asked("b")),
        (coming("a", ahead=False), asked("b")),
        (coming("a"), always(absent("b"))),
        (coming("a"), always(absent("b", 25))),
        (coming("a"), asked("b", 31)),
        (coming("a"), lately("b")),
    ],
    ids=[
        "asked already",
        "by HTTP",
        "somebody waits for it",
        "nobody waits for a turn",
        "nobody waits for room",
        "never",
        "ahead, too",
    ],
)
@pytest.mark.parametrize("places", [1, 2])
def test_no_other_load_is_given_up_and_none_twice(load: Model, other: Model, places: int):
    given_up = [a for a in planned(up(max_loading=places), load, other) if isinstance(a, GiveUpLoad)]

    assert given_up == []


def test_where_there_is_a_place_for_both_a_load_goes_on_that_does_not_take_the_room():
    two = up(max_loading=2)

    assert planned(two, coming("a"), asked("b")) == [Load(ident("b"), claim=20 * GB)]
    assert planned(two, coming("a"), asked("b", 25)) == [GiveUpLoad(ident("a"))]
    # What goes for it is enough, or what it waits for is another one's.
    assert planned(two, coming("a"), there("c", 15), asked("b", 12)) == [Unload(ident("c"), "c", ROOM)]
    assert planned(two, coming("a", 5), there("c", 25, in_flight=1), asked("b", 25)) == []


def test_what_was_given_up_is_as_if_it_had_not_been_begun_and_who_waited_is_let_in():
    given_up = apply(coming("a", asks=1.0, asks_at=NOW), LoadGivenUp(NOW, ident("a")))
    model = apply(given_up, LoadEnded(NOW + 1, ident("a"), LoadOutcome.GIVEN_UP, elapsed=6.0))

    assert given_up.giving_up
    assert (model.state, model.ahead, model.failures, model.retry_at, model.giving_up) == (
        State.COLD,
        False,
        0,
        None,
        False,
    )
    later = up(asked=NOW + 2, answered_at=NOW + 2, due_at=NOW + 15)
    assert planned(later, model, asked("b"), now=NOW + 2) == [Load(ident("b"), claim=10 * GB)]


def test_who_waits_knows_when_it_is_there_as_far_as_anybody_can():
    def when(model: Model, *others: Model, upstream: Upstream | None = None) -> float | None:
        return ready_in(upstream or up(), [model, *others], model, NOW)

    took = {"recent_loads": (40.0,)}
    b, first = asked("b", **took), asked("a", since=NOW - 20, recent_loads=(30.0,))
    loading = absent("c", load_started=NOW - 5, state=State.LOADING, waiting=1, recent_loads=(20.0,))

    assert when(b) == 40.0
    assert when(asked("b")) is None
    assert when(b, first) == 30.0 + 40.0
    assert when(b, first, loading) == 15.0 + 30.0 + 40.0
    assert when(b, first, loading, upstream=up(max_loading=2)) == 15.0 + 40.0
    assert when(b, replace(loading, recent_loads=())) is None
    assert when(b, coming("c", **took, giving_up=True)) == 40.0
    # What nobody uses goes at once; when an answer ends nobody knows.
    assert when(asked("b", 25, **took), there("c")) == 40.0
    assert when(asked("b", 25, **took), there("c", in_flight=1)) is None
    assert when(asked("b", 31, **took)) is None
    assert when(loading) == 15.0
    # Where memory is no matter they come in the order of the config.
    assert when(always(b), always(replace(first, rank=1)), upstream=up(None)) == 40.0
    assert when(always(replace(b, rank=1)), always(first), upstream=up(None)) == 70.0


def test_who_waits_behind_a_load_that_cannot_be_ended_is_told():
    assert why(up(), asked("b"), coming("a", progress=None)) == (
        "waits for its turn: a is loading, which nobody waits for, but LM Studio takes no word to end that"
    )


def test_an_unload_counts_why_and_clears_what_held_the_model():
    model = apply(there("a", draining=True), UnloadStarted(NOW, ident("a"), "a", ROOM))
    gone = apply(model, UnloadEnded(NOW + 1, ident("a"), "a"))

    assert (model.letting_go, gone.draining, gone.state) == (ROOM, False, State.COLD)


# --- nobody waits for what cannot come, and nothing is done twice -----------------------------------


def occupied(gigabytes: float, stranger: float, **changes: object) -> Upstream:
    size = int(stranger * GB / 1.2)
    return up(gigabytes, occupants=(Occupant("theirs", 1, size),), **changes)


def test_an_always_model_outside_its_window_that_is_asked_for_has_no_room_of_its_own():
    released = always(asked("x", 20, asked_for=False))

    assert planned(up(25), always(there("b", 10)), released) == []
    assert planned(up(30), always(there("b", 10)), released) == [Load(ident("x"), claim=30 * GB)]


@pytest.mark.parametrize(
    "hopeless", [asked("a", 20, since=NOW - 500), absent("a", 20, asked_for=True, since=0.0)]
)
def test_for_what_a_stranger_leaves_no_room_nobody_else_is_held_up(hopeless: Model):
    hot = absent("hot", 5, use_at=NOW - 900, asks=5.0, asks_at=NOW - 900)

    assert planned(occupied(40, 25), hopeless, asked("b", 5)) == [Load(ident("b"), claim=30 * GB)]
    assert planned(occupied(40, 25), hopeless, hot) == [Load(ident("hot"), True, 30 * GB)]


def test_a_drain_ends_with_the_last_matter_of_memory():
    assert planned(up(None), always(there("a", draining=True))) == [EndDrain(ident("a"))]


def test_an_unload_that_is_refused_is_tried_again_later_and_not_at_once():
    went = there("old", asked=0.0)
    went = apply(went, UnloadStarted(NOW - 2, went.id, "old", ROOM))
    went = apply(went, UnloadEnded(NOW - 1, went.id, "old", "HTTP 500"))
    assert went.retry_at == NOW + 4

    assert planned(up(10), went, asked("new")) == []
    later = up(10, asked=NOW + 4, answered_at=NOW + 4)
    assert planned(later, went, asked("new"), now=NOW + 4) == [Unload(went.id, "old", ROOM)]


def test_a_superfluous_copy_that_a_stranger_uses_stays():
    two = {"ours": frozenset({"d", "d:2"})}
    rests = there("d", instances=(Instance("d"), Instance("d:2", busy=False)), **two)
    works = there("d", instances=(Instance("d"), Instance("d:2", busy=True, queued=1)), **two)

    assert planned(up(30), rests, asked("new", 15)) == [Unload(ident("d"), "d:2", ROOM)]
    assert planned(up(30), works, asked("new", 15)) == []


def test_what_lm_studio_says_does_not_fit_though_nothing_could_go_is_said_at_once():
    model = asked("a", None, need=Need(20 * GB, passes_guardrails=False))
    upstream = up(None)
    arrangement = arranged(upstream, [model], NOW)

    assert arrangement is not None
    assert arrangement.never == {
        model.id: "there is no room for it: it takes 20.0 GB, and LM Studio says that it does not fit"
    }
    beside = arranged(upstream, [model, there("b", in_flight=1)], NOW)
    assert beside is not None
    assert beside.never == {}


@pytest.mark.parametrize("gigabytes", [20, None])
def test_an_old_server_that_lets_nothing_go_has_no_more_room_to_wait_for(gigabytes: float | None):
    upstream = up(gigabytes, tier=Tier.V0, auto_evict=False)
    arrangement = arranged(upstream, [there("full", 15), asked("b", 10)], NOW)

    assert arrangement is not None
    assert list(arrangement.never) == [ident("b")]


def test_a_variant_that_is_kept_is_counted_once():
    upstream = up(30, occupants=(Occupant("acme/a", 1, 8 * GB),))
    variant = there("acme/a@q4", 10, instances=(Instance("acme/a"),), ours=frozenset({"acme/a"}))

    assert used(upstream, iter([variant])) == 10 * GB


def test_what_goes_is_not_pinged_on_its_way_out():
    unproved = there("a", 25, state=State.LOADING, policy=replace(policy(25), pinged=True), ping_at=NOW)

    assert plan(up(), [unproved, asked("b")], NOW) == [Unload(ident("a"), "a", ROOM)]


@pytest.mark.parametrize(
    ("changes", "given"),
    [
        ({}, True),
        ({"unloading": True}, False),
        ({"draining": True}, False),
        ({"state": State.LOADING}, False),
    ],
)
def test_nobody_is_given_what_is_about_to_go(changes: dict[str, object], given: bool):
    assert there("a", **changes).given is given


# --- nothing is asked of anybody for nothing -------------------------------------------------------


def test_no_more_is_drained_than_is_needed_beside_what_is_already_going():
    going = there("a", unloading=True)
    quick, slow = (there(key, in_flight=1, recent_loads=(took,)) for key, took in (("b", 9.0), ("c", 90.0)))

    assert planned(up(), going, quick, slow, asked("d", 20, since=NOW - 120)) == [Drain(ident("b"))]


def test_a_superfluous_copy_is_not_counted_twice_so_that_nothing_goes_in_vain():
    twice = there("a", 5, instances=(Instance("a"), Instance("a:2")), ours=frozenset({"a", "a:2"}))

    assert planned(occupied(30, 10), twice, asked("b", 25)) == []


def test_a_superfluous_copy_makes_room_for_one_caller_and_another_copy_for_the_next():
    twice = always(there("a", 10, instances=(Instance("a"), Instance("a:2")), ours=frozenset({"a", "a:2"})))
    first, second = asked("c", since=NOW - 20), asked("d", since=NOW - 10)

    assert planned(up(max_loading=2), twice, there("b"), first, second) == [
        Unload(ident("a"), "a:2", ROOM),
        Unload(ident("b"), "b", ROOM),
    ]


def test_a_superfluous_copy_goes_where_lm_studio_says_that_a_model_does_not_fit():
    twice = always(there("a", None, instances=(Instance("a"), Instance("a:2")), ours=frozenset({"a", "a:2"})))
    no = asked("b", None, need=Need(9 * GB, passes_guardrails=False))

    assert planned(up(None), twice, no) == [Unload(ident("a"), "a:2", ROOM)]


def test_what_is_gone_before_its_unload_has_ended_makes_no_room_a_second_time():
    gone = absent("a", 20, unloading=True)

    assert planned(up(), gone, there("b", 20), asked("c", 20)) == [Unload(ident("b"), "b", ROOM)]


# --- line by line ----------------------------------------------------------------------------------


def arrangement(upstream: Upstream, *models: Model, now: float = NOW) -> Arrangement:
    room = arranged(upstream, models, now)
    assert room is not None
    return room


def copied(key: str, gigabytes: float, *others: str, **changes: object) -> Model:
    """Ours, and further copies of it that are ours, too."""
    ids = (key, *others)
    return there(
        key, gigabytes, **{"instances": tuple(map(Instance, ids)), "ours": frozenset(ids), **changes}
    )


def test_where_nothing_is_kept_nothing_is_arranged():
    assert arrangement(up()) == Arrangement()


def test_as_many_are_let_in_as_may_be_loaded_at_once():
    two = asked("a", since=NOW - 20), asked("b")

    assert planned(up(), *two) == [Load(ident("a"), claim=10 * GB)]
    assert planned(up(max_loading=2), *two) == [
        Load(ident("a"), claim=10 * GB),
        Load(ident("b"), claim=20 * GB),
    ]


def test_whose_room_is_being_made_is_the_next_to_be_loaded():
    models = there("i", 20), asked("a", 25, since=NOW - 20), asked("b", 5)

    assert planned(up(), *models) == [Unload(ident("i"), "i", ROOM)]
    assert planned(up(max_loading=2), *models) == [
        Unload(ident("i"), "i", ROOM),
        Load(ident("b"), claim=30 * GB),
    ]


def test_room_that_is_being_made_for_one_is_not_promised_to_another():
    going, idle, busy = there("g", 20, unloading=True), there("i", 20), there("b", 10, in_flight=1)
    first, second = asked("c", 20, since=NOW - 140), asked("d", since=NOW - 130)

    assert planned(up(max_loading=2), going, busy, first, second) == [Drain(ident("b"))]
    assert planned(up(max_loading=2), idle, busy, first, second) == [
        Drain(ident("b")),
        Unload(ident("i"), "i", ROOM),
    ]
    assert planned(up(max_loading=2), idle, there("j"), first, second) == [
        Unload(ident("i"), "i", ROOM),
        Unload(ident("j"), "j", ROOM),
    ]


def test_what_goes_for_one_beside_what_goes_already_makes_no_room_for_another():
    going, idle, busy = there("g", unloading=True), there("i"), there("b", in_flight=1)
    first, second = asked("c", 20, since=NOW - 140), asked("d", since=NOW - 130)

    assert planned(up(max_loading=2), going, idle, busy, first, second) == [
        Drain(ident("b")),
        Unload(ident("i"), "i", ROOM),
    ]


def test_who_waits_for_what_is_being_unloaded_has_the_room_before_what_would_fit_now():
    going, large, small = there("g", 20, unloading=True), asked("c", 30, since=NOW - 20), asked("d", 5)

    assert planned(up(max_loading=2), going, large, small) == []


def test_an_always_model_that_nobody_wants_now_or_that_is_not_there_keeps_no_room():
    for changes in ({"asked_for": False}, {"listed": False}):
        assert planned(up(), always(absent("k", 25, **changes)), asked("a")) == [
            Load(ident("a"), claim=10 * GB)
        ]


def test_always_models_fill_the_budget_to_the_last_byte():
    models = always(absent("a", 15)), always(absent("b", 15, rank=1))

    assert planned(up(max_loading=2), *models) == [Load(m.id, claim=30 * GB) for m in models]


def test_what_is_in_memory_beyond_the_budget_is_never_said_to_have_no_room():
    kept = always(there("a", 20)), always(there("b", 20, rank=1))

    assert arrangement(up(10), there("c", 20)).never == {}
    assert list(arrangement(up(), *kept, asked("d", 5)).never) == [ident("d")]


def test_what_never_fits_says_of_what():
    assert why(up(), asked("a", 31)) == "there is no room for it: it takes 31.0 GB, and the budget is 30.0 GB"


def test_room_for_an_always_model_that_lacks_it_stays_kept():
    waits, busy = always(absent("a", 25, since=NOW - 10)), there("b", 20, in_flight=1)

    assert planned(up(40), waits, busy, asked("d", 5)) == []


def test_of_always_models_none_waits_behind_another():
    waits, behind = always(absent("a", 25)), always(absent("c", 5, rank=1, since=NOW - 10))
    room = arrangement(up(40, max_loading=2), waits, behind, there("b", 20, in_flight=1))

    assert room.waits[ident("c")] == (
        "waits for room: it takes 5.0 GB, and 0.0 GB are free; b makes room when its answers have ended"
    )


def test_room_that_is_kept_for_one_who_has_waited_long_stays_kept_behind_one_who_has_not():
    no = {"need": Need(9 * GB, passes_guardrails=False)}
    first, second = always(absent("a", None, **no)), always(absent("b", None, rank=1, since=NOW - 10, **no))
    third = asked("d", None, need=Need(GB, passes_guardrails=True))

    assert planned(up(None, max_loading=3), first, second, third, there("c", 9, in_flight=1)) == [
        Drain(ident("c"))
    ]


# --- copies ----------------------------------------------------------------------------------------


def test_of_a_copy_of_ours_beside_a_strangers_ours_is_the_superfluous_one():
    both = always(there("a", instances=(Instance("a"), Instance("a:2"))))

    assert planned(up(), both, asked("c", 20)) == [Unload(ident("a"), "a", ROOM)]


def test_two_copies_of_a_stranger_are_his():
    both = always(there("a", instances=(Instance("a"), Instance("a:2")), ours=frozenset()))

    assert planned(up(), both, asked("c", 20)) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"in_flight": 1},
        {"pinging": True},
        {"seen_by": Sight(late=True)},
        {"letting_go": ROOM, "retry_at": NOW + 5},
    ],
    ids=["in use", "being pinged", "perhaps in use by a stranger", "just refused to be unloaded"],
)
def test_a_superfluous_copy_stays_while_it_is(changes: dict[str, object]):
    assert planned(up(), always(copied("a", 10, "a:2", **changes)), asked("c", 20)) == []


def test_on_an_old_server_no_superfluous_copy_can_go():
    room = arrangement(up(20, tier=Tier.V0, auto_evict=False), always(copied("a", 5, "a:2")), asked("b", 15))

    assert list(room.never) == [ident("b")]


def test_all_copies_of_a_model_go_where_all_are_needed_the_youngest_first():
    assert planned(up(), copied("a", 10, "a:2", "a:3"), asked("b", 30)) == [Unload(ident("a"), "a:3", ROOM)]


def test_all_copies_of_a_model_count_when_it_is_weighed_whether_it_may_stay():
    first, second = copied("a", 5, "a:2", "a:3", use_at=50.0), there("b", 20)

    assert planned(up(35), first, second, asked("c", 20)) == [
        Unload(ident("b"), "b", ROOM),
        Unload(ident("a"), "a:3", ROOM),
    ]
    assert (
        arrangement(up(35), first, second, asked("c", 20)).waits[ident("c")]
        == "waits for room: b, a make room"
    )
    assert (
        arrangement(up(35), first, second, asked("c", 28)).waits[ident("c")]
        == "waits for room: a, b make room"
    )


# --- who is drained --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "left_alone",
    [
        there("b", 20, in_flight=1, ours=frozenset()),
        always(there("b", 20, in_flight=1)),
        there("b", 20, in_flight=1, state=State.LOADING),
        there("b", 20, in_flight=1, pinging=True),
        there("b", 20, in_flight=1, asked_for=True),
        there("b", 20, letting_go=ROOM, retry_at=NOW + 5),
    ],
    ids=["not ours", "always", "not proved", "in a call", "wanted by hand", "just refused to be unloaded"],
)
def test_is_never_drained_what_is(left_alone: Model):
    assert planned(up(), asked("a", 25, since=NOW - 500), left_alone) == []


def test_what_is_drained_stays_drained_though_others_wait_for_it():
    drained = there("b", 20, in_flight=1, draining=True, waiting=2, waiting_since=NOW - 5)

    assert planned(up(), asked("a", 25, since=NOW - 500), drained) == []


def test_of_equals_the_last_of_the_config_is_drained_and_what_never_was_loaded_costs_nothing():
    waits = asked("a", 15, since=NOW - 120)
    busy = [there(key, 15, in_flight=1, rank=n) for n, key in enumerate("bc")]
    cheap = replace(busy[0], recent_loads=(0.5,))

    assert planned(up(), waits, *busy) == [Drain(ident("c"))]
    assert planned(up(), waits, replace(busy[0], rank=9), replace(busy[1], recent_loads=(0.5,))) == [
        Drain(ident("b"))
    ]
    assert planned(up(), waits, cheap, busy[1]) == [Drain(ident("c"))]


# --- one at a time ---------------------------------------------------------------------------------


def test_where_one_fits_for_all_that_is_known_the_next_waits_for_the_load_of_the_first():
    loads = absent("a", 1, load_started=NOW, waiting=1)

    assert planned(up(None, max_loading=2), loads, asked("b", 1)) == []
    assert planned(up(None, max_loading=2), asked("a", 1, since=NOW - 20), asked("b", 1)) == [
        Load(ident("a"), claim=GB)
    ]


def test_what_is_always_kept_comes_in_beside_the_one():
    assert planned(up(None), there("a"), always(absent("k"))) == [Load(ident("k"), claim=20 * GB)]


def test_an_estimate_alone_is_no_word_that_more_than_one_fits():
    need = {"need": Need(9 * GB)}

    assert planned(up(None), there("b", 9), asked("a", None, **need)) == [Unload(ident("b"), "b", ROOM)]


def test_what_nobody_can_tell_the_size_of_counts_for_nothing_where_no_limit_is_known():
    assert planned(up(None), always(there("k", None)), asked("a")) == [Load(ident("a"), claim=10 * GB)]


def test_on_an_old_server_that_displaces_there_is_one_at_a_time_whatever_the_budget():
    upstream = up(30, tier=Tier.V0, auto_evict=True, resident=frozenset({"b"}))

    assert planned(upstream, there("b"), asked("a")) == [Drain(ident("b")), Load(ident("a"), claim=10 * GB)]


def test_on_an_old_server_that_may_displace_nothing_is_loaded_beside_what_is_always_kept():
    upstream = up(None, tier=Tier.V0, resident=frozenset({"k"}))

    assert planned(upstream, always(there("k")), asked("a")) == []


def test_the_word_of_lm_studio_is_old_until_some_time_after_the_last_change_of_any_model():
    no = asked("a", None, need=Need(9 * GB, passes_guardrails=False))

    for touched in ((-5, -9), (-9, -5)):
        models = [there(key, 9, touched_at=NOW + at) for key, at in zip("bc", touched, strict=True)]
        assert planned(up(None), *models, no) == [Load(ident("a"), claim=27 * GB)]


# --- whether there is hope, and what is said -------------------------------------------------------


def test_whose_limit_is_known_by_a_refusal_has_no_hope_by_what_is_always_kept():
    refused = asked("a", 9, refused_claim=Claim(27 * GB, NOW))

    assert list(arrangement(up(None), refused, always(there("k", 20))).never) == [ident("a")]


@pytest.mark.parametrize(
    "in_the_way",
    [
        absent("b", 20, load_started=NOW, waiting=1),
        there("b", 20, in_flight=1),
        copied("b", 10, "b:2", in_flight=1),
    ],
    ids=["is on its way", "fits to the last byte", "has two copies"],
)
def test_there_is_hope_while_what_is_in_the_way_is_ours_and(in_the_way: Model):
    room = arrangement(occupied(30, 10, max_loading=2), asked("a", 20), in_the_way)

    assert room.never == {}
    assert list(room.waits) == [ident("a")]


def test_what_it_waits_for_names_those_who_answer_and_not_what_lies_idle():
    idle, busy = there("i", 5), [there(key, 12, in_flight=1) for key in "bc"]
    end = "b, c are in use; they make room when their answers have ended"
    many = [there(key, 6, in_flight=1) for key in "bcde"]
    fresh = there("b", 20, waiting=4, waiting_since=NOW - 60)
    waits = asked("a", 25)

    assert why(up(), waits, idle, *busy) == f"waits for room: it takes 25.0 GB, and 1.0 GB are free; {end}"
    assert why(up(), waits, idle, fresh) == "waits for room: it takes 25.0 GB, and 5.0 GB are free"
    assert why(occupied(25, 5), asked("a", 15), *busy) == (
        f"waits for room: it takes 15.0 GB, and 0.0 GB are free; {end}"
    )
    assert why(up(), waits, *many) == (
        f"waits for room: it takes 25.0 GB, and 6.0 GB are free; {end.replace('b, c', 'b, c, d')}"
    )


def test_what_it_waits_for_tells_once_room_is_being_made():
    busy = [there(key, 15, in_flight=1, recent_loads=(took,)) for key, took in (("b", 90.0), ("c", 9.0))]

    assert why(up(), asked("a", 15, since=NOW - 120), *busy) == (
        "waits for room: it takes 15.0 GB, and 0.0 GB are free; c, b make room when their answers have ended"
    )


# --- ahead of demand, at the edges -----------------------------------------------------------------


@pytest.mark.parametrize(
    "model",
    [
        lately("a", last_eviction=Eviction(NOW - AHEAD_AFTER, Cause.UNKNOWN, 0.0)),
        lately("a", policy=policy(10, idle=61.0)),
        lately("a", asks=0.05, asks_at=NOW),
    ],
    ids=["lost long enough ago", "not yet idle for its time", "just worth it"],
)
def test_what_is_just_worth_it_is_loaded_ahead(model: Model):
    assert planned(up(), model) == [Load(ident("a"), ahead=True, claim=10 * GB)]


def test_of_two_that_were_asked_for_as_much_the_first_of_the_config_is_loaded_ahead():
    assert planned(up(), lately("b", rank=1), lately("a", rank=0)) == [
        Load(ident("a"), ahead=True, claim=10 * GB)
    ]


# --- a server that keeps so many models at a time -------------------------------------------------


def router(places: int | None = 2, gigabytes: float | None = None, **changes: object) -> Upstream:
    return up(gigabytes, **{"tier": Tier.LLAMA, "places": places, **changes})


def test_where_a_server_keeps_so_many_models_their_places_are_what_is_shared():
    keeps = [always(there("a")), always(absent("b"))]

    assert manages(router(), keeps)
    assert not manages(router(None), keeps)


def test_a_place_is_made_before_a_load_so_that_the_server_pushes_out_nobody():
    old, new = there("old", None, use_at=1.0), there("new", None, use_at=500.0)
    wished = asked("wished", None)

    assert planned(router(), old, new, wished) == [Unload(ident("old"), "old", ROOM)]
    assert planned(router(3), old, new, wished) == [Load(ident("wished"))]
    assert why(router(), wished, old, new) == "waits for room: old makes room"


def test_a_place_that_a_stranger_has_is_not_taken():
    theirs = listing(Entry("theirs", instances=(Instance("theirs"),)))
    upstream = router(occupants=theirs.occupants)
    kept, wished = always(there("kept", None)), asked("wished", None)

    assert planned(upstream, kept, wished) == []
    assert why(upstream, wished, kept) == (
        "there is no room for it: llama-server keeps 2 models at a time (--models-max); "
        "theirs was loaded by somebody else"
    )


def test_what_is_arriving_has_a_place_whoever_loads_it():
    upstream = router(1, arriving=frozenset({"theirs"}))

    assert planned(upstream, asked("wished", None)) == []
    assert planned(replace(upstream, arriving=frozenset()), asked("wished", None)) == [Load(ident("wished"))]


def test_of_more_models_that_are_always_kept_than_there_are_places_the_first_are():
    models = [always(absent(key, None, rank=rank)) for rank, key in enumerate("abc")]

    assert planned(router(max_loading=3), *models) == [Load(ident("a")), Load(ident("b"))]
    assert why(router(), models[2], *models[:2]) == (
        "there is no room for it: llama-server keeps 2 models at a time (--models-max), which come first"
    )
    assert why(router(1), asked("wished", None), models[0]) == (
        "there is no room for it: llama-server keeps 1 model at a time (--models-max), which are always kept"
    )


def test_places_and_memory_hold_together():
    small = there("small", 1, use_at=1.0), there("other", 1, use_at=2.0)

    assert planned(router(3, 10), *small, asked("large", 9)) == [Unload(ident("small"), "small", ROOM)]
    assert planned(router(2, 10), *small, asked("tiny", 1)) == [Unload(ident("small"), "small", ROOM)]
    assert planned(router(3, 10), *small, asked("tiny", 1)) == [Load(ident("tiny"), claim=3 * GB)]


def test_each_that_is_let_in_takes_a_place_and_one_that_is_always_kept_has_its_own():
    busy = there("busy", None, in_flight=1)
    theirs = listing(Entry("x", instances=(Instance("x"), Instance("x:2"))))

    assert planned(router(max_loading=2), busy, asked("a", None, since=NOW - 20), asked("b", None)) == [
        Load(ident("a"))
    ]
    assert planned(router(occupants=theirs.occupants), always(absent("k", None))) == []


def test_what_is_kept_by_an_alias_has_one_place():
    row = listing(Entry("its-name", instances=(Instance("its-name"),)))
    kept = there("alias", None, instances=(Instance("its-name"),), ours=frozenset({"its-name"}))

    assert planned(router(occupants=row.occupants), kept, asked("wished", None)) == [Load(ident("wished"))]


def test_what_nobody_knows_the_size_of_is_said_to_need_a_word():
    models = always(there("a", 5)), absent("b", None)

    assert "nothing tells what it takes (memory in [[models]] would)" in str(
        why(router(4, 10), asked("b", None), models[0])
    )


# --- who comes first -------------------------------------------------------------------------------


def first(*models: Model) -> list[ModelId]:
    return [a.model for a in planned(up(100), *models) if isinstance(a, Load)]


def test_of_what_is_always_kept_who_is_waited_for_comes_first_and_then_the_order_of_the_config():
    one, two, third = (always(absent(key, rank=n, since=9.0 - n)) for n, key in enumerate("abc"))

    assert first(two, one, third) == [one.id]
    assert first(two, one, replace(third, waiting=2, waiting_since=NOW)) == [third.id]
    assert first(asked("d", rank=9, since=-5.0), two, one) == [one.id]


def test_of_what_is_loaded_on_demand_the_first_that_came_is_first_whether_he_waits_or_wants_it_by_hand():
    by_hand, waits = absent("a", asked_for=True, since=NOW - 50), asked("b", since=NOW - 40)

    assert first(waits, by_hand) == [by_hand.id]
    assert first(replace(waits, waiting_since=NOW - 60), by_hand) == [waits.id]
    assert first(replace(waits, waiting_since=NOW - 50, rank=-1), by_hand) == [waits.id]


def test_before_a_load_that_nobody_waits_for_it_is_asked_what_is_being_loaded():
    assert plan(up(asked=0.0, answered_at=0.0), [lately("a")], NOW) == [Refresh("local", loading=True)]


def test_who_waits_for_what_its_window_has_just_closed_for_has_hope():
    answers = always(there("k", 25, windowed=True, window_open=False, in_flight=1))
    lingers = always(there("k", 25, windowed=True, window_open=False, active_at=NOW - 10))

    for model in (answers, lingers):
        room = arrangement(up(), asked("a"), model)
        assert room.never == {}
        assert room.waits == {ident("a"): "waits for room: it takes 10.0 GB, and 5.0 GB are free"}


# --- what an old server pushes out -----------------------------------------------------------------


def old(auto_evict: bool | None = True, **changes: object) -> Upstream:
    known = {"tier": Tier.V0, "auto_evict": auto_evict, "resident": frozenset({"a"}), "max_loading": 2}
    return up(None, **{**known, **changes})


def drained(upstream: Upstream, *models: Model) -> list[Action]:
    return [a for a in planned(upstream, *models) if isinstance(a, (Drain, EndDrain))]


def test_what_the_next_load_on_demand_pushes_out_is_given_to_nobody_from_before_it_begins():
    keeps = [always(there("a", rank=1)), always(absent("b"))]

    assert drained(old(), there("a"), asked("b")) == [Drain(ident("a"))]
    assert drained(old(None), there("a"), asked("b")) == [Drain(ident("a"))]
    assert drained(old(), *keeps) == [Drain(ident("a"))]
    # Whether it pushes out anything is about to be seen; or it is known not to.
    assert drained(old(None), *keeps) == []
    assert drained(old(False), *keeps) == []
    assert drained(up(30, tier=Tier.V1), there("a"), asked("b")) == []


def test_it_is_so_until_a_listing_has_shown_what_became_of_it():
    going, loads = there("a", draining=True), absent("b", load_started=NOW - 5, waiting=1)
    cut_off = absent("b", pending=Pending(NOW - 9, NOW + 9, NOW), waiting=1)
    ended = absent("b", touched_at=NOW)

    for model in (loads, cut_off, ended):
        assert drained(old(), going, model) == []
        assert drained(old(), there("a"), model) == [Drain(ident("a"))]
    assert drained(old(), going, replace(ended, touched_at=NOW - 1)) == [EndDrain(ident("a"))]
    assert drained(old(), going, there("b", touched_at=NOW)) == [EndDrain(ident("a"))]


def test_nothing_is_pushed_out_that_is_not_there_or_not_ours_or_on_its_way_itself():
    loads = absent("b", load_started=NOW - 5, waiting=1)

    assert drained(old(), loads, absent("a", touched_at=0.0, ours=frozenset({"a"}))) == []
    assert drained(old(), loads, there("a", ours=frozenset())) == []
    assert drained(old(), there("b", load_started=NOW - 5)) == []
    assert drained(old(), there("a")) == []


# --- memory that runs out late --------------------------------------------------------------------


def crashed(key: str, *beside: str, at: float = NOW - 60, **changes: object) -> Model:
    return asked(key, 5, crowd=(frozenset(beside), at), **changes)


def test_what_crashed_beside_others_is_loaded_when_one_of_them_has_gone():
    a, b = there("A", 5, use_at=200.0), there("b", 5, use_at=300.0)

    assert planned(up(), crashed("c", "a", "b"), a, b) == [Unload(ident("A"), "A", ROOM)]
    assert planned(up(), crashed("c", "a", "b"), a) == [Load(ident("c"), claim=10 * GB)]
    assert planned(up(), crashed("c", "a", "b"), a, absent("b")) == [Load(ident("c"), claim=10 * GB)]
    busy = replace(a, in_flight=1)
    assert planned(up(), crashed("c", "a"), busy) == []
    assert why(up(), crashed("c", "a"), busy) == (
        "waits for room: it crashed when it was loaded beside A; A is in use; it makes room when its answers have "
        "ended"
    )
    assert planned(up(), crashed("c", "a", since=NOW - 300), busy) == [Drain(ident("A"))]
    # It is not loaded ahead, either; after an hour it is tried beside them again.
    assert planned(up(), crashed("c", "a", waiting=0, asks=5.0, asks_at=NOW), a) == []
    assert planned(up(), crashed("c", "a", at=NOW - CROWD_HOLDS), a) == [Load(ident("c"), claim=10 * GB)]


def test_where_nothing_may_go_that_it_crashed_beside_it_is_tried_all_the_same():
    assert planned(up(), crashed("c", "a"), always(there("a", 5))) == [Load(ident("c"), claim=10 * GB)]
    assert planned(up(), crashed("c", "a"), there("a", 5, ours=frozenset())) == [
        Load(ident("c"), claim=10 * GB)
    ]


def test_a_crash_soon_after_a_load_tells_what_it_was_beside():
    was = there("a", warm_since=NOW - 20, beside=frozenset({"a", "b"}), suspected=Cause.CRASH)
    gone = apply(was, listing(Entry("a", loading=False), Entry("b", instances=(Instance("b"),))))
    alone = apply(was, listing(Entry("a", loading=False)))
    stable = apply(replace(was, warm_since=NOW - 900), listing(Entry("b", instances=(Instance("b"),))))

    assert gone.crowd == (frozenset({"b"}), NOW)
    assert alone.crowd is stable.crowd is None
    never_listed = absent(
        "a", state=State.LOADING, pending=Pending(NOW - 60, NOW - 1, alive_at=NOW - 50, loaded=True)
    )
    dropped = apply(never_listed, listing(Entry("a", loading=False), Entry("b", instances=(Instance("b"),))))
    assert (dropped.state, dropped.crowd) == (State.BACKOFF, (frozenset({"b"}), NOW))


# --- what is weighed, and put back -----------------------------------------------------------------


def test_what_is_there_is_not_said_to_have_no_place_though_there_are_too_many():
    assert arrangement(router(1), always(there("a", None)), always(there("b", None, rank=1))).never == {}


def test_what_lies_idle_is_not_counted_out_twice_when_others_are_drained():
    busy = [there(key, 10, in_flight=1) for key in "bc"]

    assert planned(occupied(30, 5), there("i", 5), *busy, asked("d", 20, since=NOW - 120)) == [
        Drain(ident("b")),
        Drain(ident("c")),
    ]


def test_loads_ahead_are_given_up_once_and_no_more_than_are_in_the_way():
    two = asked("b", 25, since=NOW - 20), asked("c", 25)

    assert planned(up(max_loading=3), coming("a"), *two) == [GiveUpLoad(ident("a"))]
    assert planned(up(max_loading=3), coming("a"), coming("e"), asked("b", 20)) == [GiveUpLoad(ident("a"))]
    assert planned(up(None, max_loading=3), coming("a"), *two) == [GiveUpLoad(ident("a"))]
    assert planned(up(max_loading=2), coming("a"), there("i"), asked("b", 30)) == [GiveUpLoad(ident("a"))]


def test_a_superfluous_copy_has_one_place():
    twice = always(copied("a", None, "a:2"))
    theirs = listing(Entry("x", instances=(Instance("x"),)))

    assert planned(router(2), twice, asked("b", None)) == [Unload(ident("a"), "a:2", ROOM)]
    assert planned(router(2, occupants=theirs.occupants), twice, asked("b", None)) == []


def test_what_never_comes_waits_by_the_same_words():
    room = arrangement(occupied(30, 25), asked("a"))

    assert room.waits == room.never
    assert list(room.never) == [ident("a")]


def test_there_is_hope_by_what_is_wanted_by_hand_and_by_a_place_that_is_ours():
    assert arrangement(up(), asked("a", 20), there("b", 20, asked_for=True)).never == {}
    assert arrangement(router(1), asked("a", None), there("b", None, in_flight=1)).never == {}


def test_on_an_old_server_what_nobody_wants_any_more_stays_and_gives_no_hope():
    kept = always(there("a", asked_for=False))

    assert list(arrangement(old(), asked("b"), kept).never) == [ident("b")]


def test_what_it_crashed_beside_is_there_as_long_as_all_of_it_is_and_goes_one_by_one():
    a, b, other = there("a", 5, use_at=200.0), there("b", 5, use_at=300.0), there("d", 5, use_at=50.0)
    rows = listing(*(Entry(key, instances=(Instance(key),)) for key in "abd")).occupants
    theirs = (Occupant("x", 1, None),)

    assert planned(up(occupants=rows), crashed("c", "a", "b"), a, b, other) == [Unload(a.id, "a", ROOM)]
    assert planned(up(occupants=theirs), crashed("c", "a", "x"), a) == [Unload(a.id, "a", ROOM)]
    assert planned(up(), crashed("c", "a"), absent("a", 5)) == [Load(ident("c"), claim=5 * GB)]
    assert planned(up(), crashed("c", "a"), always(a), other) == [Load(ident("c"), claim=15 * GB)]
