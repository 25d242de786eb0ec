"""Where another daemon acts: what it tells counts here, and nothing is done but to look."""

from dataclasses import replace as changed

import pytest

from keepalive.core.actions import Load, Refresh, SendPing
from keepalive.core.explain import eta
from keepalive.core.facts import (
    DrainEnded,
    DrainStarted,
    Fact,
    HandLost,
    HandTaken,
    HolderTold,
    Listed,
    LoadForgone,
    LoadGivenUp,
    LoadOutcome,
    LoadProgressed,
    LoadRemembered,
    LoadResolved,
    LoadStarted,
    OthersHeard,
    OursRecalled,
    Tier,
    UsedElsewhere,
    WaitEnded,
    WaitStarted,
    WarmAsked,
    WishSpent,
)
from keepalive.core.plan import plan
from keepalive.core.records import Model, Pending, Upstream
from keepalive.core.room import is_in_use
from keepalive.core.states import State
from keepalive.core.upstreams import apply_upstream
from tests.kit.models import (
    GEMMA,
    Box,
    a_model,
    after,
    box,
    cold,
    entry,
    listed,
    load_ended,
    ours,
    refused,
    warm,
)


def trusted(at: float, *ids: str, loading: bool | None = None) -> Listed:
    return changed(listed(at, entry("gemma", *ids, loading=loading)), trusted=True)


def elsewhere(*facts: Fact) -> Upstream:
    upstream = Upstream("local")
    for fact in (HandLost(0.5, "local"), *facts):
        upstream = apply_upstream(upstream, fact)
    return upstream


def remembered(at: float, **more: object) -> LoadRemembered:
    return LoadRemembered(at, GEMMA, at, 30.0, by="a", **more)  # type: ignore[arg-type]


def test_where_another_one_acts_nothing_is_loaded_or_pinged():
    look = listed(1, entry("gemma"))
    state = a_model(GEMMA)

    assert plan(elsewhere(look), [after(state, look)], 1.1) == []
    assert plan(elsewhere(look), [warm(ping_at=1.0)], 1.2) == []
    assert plan(elsewhere(look), [after(state, look)], 20.0) == [Refresh("local", loading=True)]


def test_whoever_meant_to_let_it_go_and_may_not_act_any_more_gives_it_to_callers_again():
    state = Box(warm()).see(DrainStarted(21, GEMMA))
    assert not state[GEMMA].given

    state.see(HandLost(22, "local"))

    assert state[GEMMA].given


def test_a_load_that_was_to_be_given_up_and_never_began_leaves_nothing_of_that_to_the_next():
    forgone = after(
        a_model(GEMMA),
        listed(1, entry("gemma")),
        LoadStarted(1.1, GEMMA, True),
        LoadGivenUp(1.2, GEMMA),
        LoadForgone(1.3, GEMMA, "etcd is away"),
    )

    assert not after(forgone, LoadStarted(9, GEMMA, True)).giving_up


def test_whoever_takes_over_looks_before_anything_else():
    state = box(listed(1, entry("gemma")))
    state.see(HandLost(1.1, "local"), HandTaken(1.2, "local"))

    assert state.plan(1.3) == [Refresh("local", loading=True)]
    assert state.see(listed(1.4, entry("gemma"), asked=1.1)).plan(1.5)[:1] != [Load(GEMMA)]
    assert state.see(listed(1.6, entry("gemma"), asked=1.55)).plan(1.7) == [Load(GEMMA)]


def test_what_is_listed_where_another_one_proves_it_is_warm():
    assert after(a_model(GEMMA), trusted(1, "gemma")).state is State.WARM
    assert after(a_model(GEMMA), listed(1, entry("gemma", "gemma"))).state is not State.WARM


def test_what_the_holder_finds_ill_is_warm_for_nobody_until_another_copy_is_there():
    ill = after(
        a_model(GEMMA),
        trusted(1, "gemma"),
        HolderTold(2, GEMMA, ill="it does not answer"),
        trusted(3, "gemma"),
    )

    assert (ill.state, ill.reason) == (State.BACKOFF, "it does not answer")
    assert after(ill, HolderTold(4, GEMMA), trusted(5, "gemma")).state is State.WARM
    assert after(ill, trusted(6), trusted(7, "gemma:2")).state is State.WARM


def test_whoever_takes_over_pings_what_it_believed():
    state = box(trusted(1, "gemma"))
    state.see(HandLost(1.1, "local"), HandTaken(2, "local"), listed(2.2, entry("gemma", "gemma"), asked=2.1))

    assert state.plan(2.3) == [SendPing(GEMMA, "gemma")]


def test_a_load_that_another_one_began_is_under_way_here_too_and_waited_for_by_whoever_takes_over():
    state = box(trusted(1))
    state.see(HandLost(1.1, "local"), remembered(2))
    loading = state[GEMMA]
    state.see(HandTaken(5, "local"), listed(6, entry("gemma"), asked=5.5))

    assert (loading.state, loading.reason, loading.loading_since) == (State.LOADING, "a loads it", 2)
    assert eta(loading, [], 12) is None or eta(loading, [], 12) >= 0
    assert Load(GEMMA) not in state.plan(6.1)
    # Twice what it is known to take and the lag of a listing later it is given up, as after a restart.
    state.see(listed(2 + 105 - 1, entry("gemma")))
    assert Load(GEMMA) not in state.plan(106.1)
    state.see(listed(2 + 105 + 1, entry("gemma")))
    assert Load(GEMMA) in state.plan(108.1)


def test_how_far_that_load_is_tells_when_it_is_done():
    loading = after(cold(), remembered(2), LoadProgressed(12, GEMMA, 0.5))

    assert eta(loading, [], 12) == 10


def test_a_load_of_another_that_is_slower_than_was_known_is_believed_in_for_longer():
    def heard(*facts: Fact) -> Pending | None:
        return after(cold(), remembered(2), *facts).pending

    known = Pending(2, 2 + 105, alive_at=2, expected=30.0, why="a began it")
    assert heard() == known
    assert heard(LoadProgressed(12, GEMMA, 0.5)) == changed(known, alive_at=12)
    # 10 s for a twentieth of it: 200 s for all of it, twice, and the lag of a listing.
    assert heard(LoadProgressed(12, GEMMA, 0.05)) == changed(known, alive_at=12, until=2 + 400 + 45.0)
    # No longer than any load may take.
    assert heard(LoadProgressed(102, GEMMA, 0.01)) == changed(known, alive_at=102, until=2 + 1800 + 45.0)
    assert heard(LoadProgressed(12, GEMMA, 0.0)) == known
    # What stands still is not alive.
    assert heard(LoadProgressed(12, GEMMA, 0.5), LoadProgressed(90, GEMMA, 0.5)) == changed(
        known, alive_at=12
    )


def test_what_we_do_ourselves_we_know_better():
    begun = after(cold(), LoadStarted(2, GEMMA))

    assert after(begun, remembered(3)) == begun


def test_a_load_of_another_is_known_of_though_its_model_was_seen_to_be_there_before():
    # It was lost meanwhile, which the other one has seen and we have not.
    state = box(trusted(20, "gemma")).see(HandLost(21, "local"), trusted(22, "gemma"))
    assert state.upstream.due_at > 25
    state.see(remembered(25))
    assert state.upstream.due_at == 25

    state.see(changed(listed(26, entry("gemma", "gemma"), asked=24), trusted=True))
    assert not state[GEMMA].given  # until it was looked for: a request would be another load
    state.see(HandTaken(27, "local"), listed(28, entry("gemma"), asked=27.5))

    assert state[GEMMA].state is State.LOADING
    assert Load(GEMMA) not in state.plan(28.1)
    assert state.see(trusted(29, "gemma"))[GEMMA].pending is None


def test_once_the_holder_knows_what_came_of_it_the_next_listing_tells():
    over = after(cold(), remembered(2), LoadResolved(9, GEMMA))

    assert after(over, trusted(10, "gemma")).state is State.WARM
    assert after(over, trusted(10)).state is State.COLD
    assert apply_upstream(elsewhere(), LoadResolved(9, GEMMA)).due_at <= 9


def test_a_load_that_was_not_begun_after_all_leaves_nothing_but_a_look():
    state = box(listed(1, entry("gemma")), LoadStarted(2, GEMMA))
    state.see(LoadForgone(3, GEMMA, "another one acts"))
    model = state[GEMMA]

    assert (model.state, model.load_started, model.failures, model.retry_at) == (State.COLD, None, 0, None)
    assert model.reason == "another one acts"
    assert state.plan(3.1) == [Refresh("local", loading=True)]


def test_what_one_of_us_loaded_is_ours_whichever_comes_first_its_word_or_the_listing():
    told = HolderTold(2, GEMMA, frozenset({"gemma"}))

    assert after(a_model(GEMMA), trusted(1, "gemma"), told).ours == {"gemma"}
    assert after(a_model(GEMMA), told, trusted(3, "gemma")).ours == {"gemma"}
    assert after(a_model(GEMMA), told, trusted(3, "another")).ours == frozenset()
    # Whoever has taken over goes by what it sees itself.
    later = after(a_model(GEMMA), told, listed(3, entry("gemma")), listed(4, entry("gemma", "gemma")))
    assert later.ours == {"gemma"}
    assert later.told == frozenset()


@pytest.mark.parametrize("first", ["its word", "the listing"])
def test_where_nothing_is_listed_what_the_holder_has_warm_is_warm_here_whenever_that_is_heard(first: str):
    look = changed(listed(1, entry("gemma"), tier=Tier.OPENAI), trusted=True)
    told = HolderTold(1, GEMMA, warm=True)
    facts = (told, look) if first == "its word" else (look, told)
    state = box(*facts)

    assert state[GEMMA].given
    later = changed(look, at=5000.0, asked=4999.0)
    assert state.see(later)[GEMMA].given
    assert not state.see(HolderTold(5001, GEMMA), changed(look, at=5002.0, asked=5001.5))[GEMMA].given
    # Whoever takes over goes by what it hears itself.
    state = box(*facts).see(HandLost(2, "local"), HandTaken(3, "local"))
    state.see(changed(look, at=4.0, asked=3.5, trusted=False))
    assert state.plan(4.1) == [SendPing(GEMMA, "gemma")]


def test_what_the_holder_let_go_is_no_eviction_here():
    gone = after(a_model(GEMMA), trusted(1, "gemma"), trusted(2))

    assert (gone.state, gone.evictions, gone.failures) == (State.COLD, 0, 0)


def test_how_long_the_holder_holds_off_is_known_here():
    held_off = after(cold(), HolderTold(2, GEMMA, failure="no memory", failures=3, retry_at=50.0))

    assert (held_off.state, held_off.reason, held_off.retry_at) == (State.BACKOFF, "no memory", 50.0)


def test_what_was_taken_from_the_holder_is_waited_for_here_and_loaded_for_whoever_waits_by_its_successor():
    told = HolderTold(2, GEMMA, failure="it went missing 3 times", failures=3, retry_at=50.0, contested=True)
    state = box(trusted(1))
    state.see(HandLost(1.1, "local"), told, WaitStarted(3, GEMMA))
    held_off = state[GEMMA]
    state.see(HandTaken(4, "local"), listed(5, entry("gemma"), asked=4.5))

    assert (held_off.state, held_off.contested) == (State.BACKOFF, True)
    assert Load(GEMMA) in state.plan(5.1)
    state.see(WaitEnded(5.2, GEMMA, 2.0, False), listed(5.3, entry("gemma")))
    assert Load(GEMMA) not in state.plan(5.4)


def test_whoever_held_it_when_it_was_taken_still_knows_that_when_it_holds_it_again():
    state = box(listed(0.1, entry("gemma")))
    for at in (1.0, 2.0, 3.0):
        state.see(listed(at, entry("gemma", "gemma")), listed(at + 0.5, entry("gemma")))
    state.see(HandLost(4, "local"), HandTaken(5, "local"), WaitStarted(5.1, GEMMA))
    state.see(listed(5.3, entry("gemma"), asked=5.2))

    assert state[GEMMA].retry_at == 13.5
    assert Load(GEMMA) in state.plan(5.4)


def test_callers_elsewhere_are_reason_to_load_and_no_longer_when_they_have_gone():
    idle = cold(policy=changed(a_model(GEMMA).policy, auto=True))
    asked = after(idle, UsedElsewhere(5, GEMMA, 2, False))

    assert (idle.needed, asked.needed, asked.callers, asked.waiting_since) == (False, True, 2, 5)
    assert not after(asked, UsedElsewhere(9, GEMMA, 0, False)).needed


def test_who_has_waited_longest_has_whether_here_or_there():
    model = after(
        cold(), UsedElsewhere(5, GEMMA, 1, False), WaitStarted(6, GEMMA), WaitEnded(7, GEMMA, 1.0, True)
    )

    assert model.waiting_since == 5
    assert after(model, UsedElsewhere(8, GEMMA, 0, True)).waiting_since is None


def test_what_is_used_elsewhere_is_neither_let_go_nor_pinged():
    model = ours()
    used = after(model, UsedElsewhere(1000, GEMMA, 0, True))

    assert is_in_use(changed(used, asked_for=False), 1001)
    assert after(used, UsedElsewhere(1500, GEMMA, 0, False)).last_use == 1500
    assert used.goes_at is None


def test_an_end_of_our_own_load_outlives_what_is_told_meanwhile():
    model = after(cold(), LoadStarted(2, GEMMA), LoadResolved(3, GEMMA), remembered(4), load_ended(5))

    assert (model.state, model.ours) == (State.LOADING, {"gemma"})


def test_what_a_person_takes_upon_him_is_loaded_once_whoever_acts():
    look = listed(1, entry("gemma"))
    asked = after(cold(), WarmAsked(1.2, GEMMA, alone=True))
    upstream = elsewhere(look)
    fresh = changed(listed(3, entry("gemma"), asked=2.5))

    assert plan(upstream, [asked], 1.5)[:1] == [Load(GEMMA)]
    assert plan(upstream, [after(cold(), WarmAsked(1.2, GEMMA))], 1.5) == []
    failed = after(asked, LoadStarted(2, GEMMA), load_ended(2.4, LoadOutcome.FAILED), fresh)
    assert plan(apply_upstream(upstream, fresh), [failed], 100) == [Refresh("local", loading=True)]


def test_what_a_person_takes_upon_him_rests_on_a_fresh_look_at_what_is_being_loaded():
    upstream = elsewhere(listed(1, entry("gemma")))
    asked = after(cold(), WarmAsked(1.2, GEMMA, alone=True))
    look = [Refresh("local", loading=True)]

    assert plan(upstream, [changed(asked, asked_for=False)], 1.5) == []
    assert plan(upstream, [asked], 2.5) == look
    assert plan(changed(upstream, sees_loading=False), [asked], 1.5) == look
    assert plan(upstream, [cold(), warm(ping_at=1e9)], 20.0) == look
    assert plan(changed(upstream, listing=True), [cold()], 20.0) == []


# --- whose copies they are ------------------------------------------------------------------------


MINE = frozenset({"gemma"})


def test_a_copy_of_which_whoever_acts_has_lost_sight_is_vouched_for_by_whoever_has_not_once_it_was_seen_again():
    model = after(
        a_model(GEMMA),
        HolderTold(1, GEMMA, MINE),
        trusted(2, "gemma"),
        HolderTold(5, GEMMA, lost=MINE),
    )
    again, another = after(model, trusted(6, "gemma")), after(model, trusted(6), trusted(7, "gemma"))

    assert (model.ours, model.unknown_there) == (MINE, frozenset())
    assert (again.ours, again.unknown_there) == (MINE, MINE)
    assert (another.ours, another.unknown_there) == (frozenset(), frozenset())


def test_a_copy_that_whoever_acts_no_longer_calls_ours_is_not_ours_either_as_of_the_next_look():
    model = after(
        a_model(GEMMA),
        HolderTold(1, GEMMA, MINE),
        trusted(2, "gemma"),
        HolderTold(5, GEMMA),
        HolderTold(5.1, GEMMA),
    )
    again = after(model, trusted(6, "gemma"))

    assert model.ours == MINE  # until then it is in no listing of ours that it has gone
    assert (again.ours, again.unknown_there) == (frozenset(), frozenset())


def test_whoever_acted_goes_on_knowing_what_it_has_loaded_though_its_successor_does_not():
    model = after(ours(), HandLost(20, "local"), HolderTold(21, GEMMA), trusted(22, "gemma"))

    assert model.unknown_there == MINE


def test_who_acts_and_has_lost_sight_of_a_copy_has_it_back_by_the_word_of_another():
    away = after(ours(), refused(20))
    alone = after(away, listed(40, entry("gemma", "gemma")))
    told = after(away, UsedElsewhere(30, GEMMA, 0, False, MINE), listed(40, entry("gemma", "gemma")))
    late = after(alone, UsedElsewhere(41, GEMMA, 0, False, MINE), listed(42, entry("gemma", "gemma")))
    gone = after(told, listed(50, entry("gemma")), listed(60, entry("gemma", "gemma")))

    assert (away.ours, away.lost) == (frozenset(), MINE)
    assert (alone.ours, alone.lost) == (frozenset(), MINE)
    assert (told.ours, told.lost) == (late.ours, late.lost) == (MINE, frozenset())
    assert (gone.ours, gone.lost) == (frozenset(), frozenset())


def test_whoever_comes_back_takes_the_word_of_who_acts_for_whose_copy_it_is():
    """By that name another one may have come since, which who acts has seen come."""
    back = after(a_model(GEMMA), OursRecalled(1, GEMMA, MINE, until=100.0))

    def seen(**told: object) -> Model:
        return after(back, HolderTold(2, GEMMA, warm=True, **told), trusted(3, "gemma"))  # type: ignore[arg-type]

    assert seen(heard=True).unknown_there == frozenset()
    assert seen(heard=True).ours == frozenset()
    # Where nobody who acts has said anything yet, or he does not know himself, it is as it was.
    assert seen().ours == MINE
    assert seen(heard=True, lost=MINE).ours == MINE
    assert seen(heard=True, instance_ids=MINE).ours == MINE
    assert after(a_model(GEMMA), HolderTold(2, GEMMA, heard=True)).recalled is None


def test_who_is_told_of_a_copy_of_ours_looks_for_it_soon():
    up = elsewhere(listed(10, entry("gemma")))

    assert apply_upstream(up, UsedElsewhere(11, GEMMA, 0, False, MINE)).due_at == 11
    assert apply_upstream(up, UsedElsewhere(11, GEMMA, 1, True)).due_at == up.due_at


def test_a_copy_that_another_has_loaded_where_ours_was_seen_to_be_gone_is_not_ours_whatever_was_told_before():
    state = box(HandLost(1, "local"), HolderTold(2, GEMMA, MINE), trusted(3, "gemma"), HandTaken(4, "local"))
    state.see(listed(5, entry("gemma", loading=True)), listed(9, entry("gemma", "gemma")))

    assert state[GEMMA].ours == frozenset()


def test_a_copy_that_was_seen_to_go_is_not_ours_when_one_named_alike_is_there_though_nobody_could_say_so():
    """As while etcd is away: what it says of whose copy that is is of before."""
    saw_it_go = after(a_model(GEMMA), HolderTold(1, GEMMA, MINE), trusted(2, "gemma"), trusted(3))
    again = after(saw_it_go, trusted(4, "gemma"))
    acts = after(again, HandTaken(5, "local"), listed(6, entry("gemma", "gemma")))
    loaded_anew = after(saw_it_go, HolderTold(4, GEMMA, MINE))

    assert (again.ours, acts.ours, acts.lost) == (frozenset(), frozenset(), frozenset())
    assert after(loaded_anew, trusted(5, "gemma")).ours == MINE
    # A look that was asked for before that word says nothing against it.
    late = changed(trusted(5), asked=4.2)
    assert after(again, HolderTold(4.5, GEMMA, MINE), late, trusted(6, "gemma")).ours == MINE


def test_who_comes_to_act_on_a_word_that_says_not_for_sure_whose_copy_it_is_asks_the_others():
    told = after(a_model(GEMMA), HolderTold(1, GEMMA, lost=MINE), trusted(2, "gemma"))
    acts = after(told, HandTaken(3, "local"), listed(4, entry("gemma", "gemma")))
    vouched = after(acts, UsedElsewhere(5, GEMMA, 0, False, MINE), listed(6, entry("gemma", "gemma")))
    gone = after(told, trusted(3), trusted(4, "gemma"))
    # Who knows better keeps what it knows.
    knows = after(a_model(GEMMA), HolderTold(1, GEMMA, MINE), trusted(2, "gemma"))

    assert (acts.ours, acts.lost) == (frozenset(), MINE)
    assert (vouched.ours, vouched.lost) == (MINE, frozenset())
    assert (gone.ours, gone.lost) == (frozenset(), frozenset())
    told = after(knows, HolderTold(3, GEMMA, lost=MINE))
    assert (told.ours, told.lost) == (MINE, frozenset())


def test_what_another_one_may_just_have_let_go_is_given_to_nobody_before_it_was_looked_for():
    model = after(
        a_model(GEMMA), trusted(1, "gemma"), DrainStarted(2, GEMMA), DrainEnded(5, GEMMA, unsure=True)
    )
    early = after(model, changed(listed(6, entry("gemma", "gemma"), asked=4.9), trusted=True))
    stayed, gone = after(early, trusted(7, "gemma")), after(early, trusted(7))

    assert (model.given, early.given, stayed.given, gone.given) == (False, False, True, False)
    assert not model.draining
    up = elsewhere(listed(1, entry("gemma")))
    assert apply_upstream(up, DrainEnded(5, GEMMA, unsure=True)).due_at == 5
    assert apply_upstream(up, DrainEnded(5, GEMMA)).due_at == up.due_at


def test_a_persons_word_stands_in_the_place_of_the_other_daemons_until_they_are_heard_again():
    state = Box(warm()).see(HandLost(20, "local"), WarmAsked(21, GEMMA, alone=True))
    state.see(OthersHeard(30, "local"), trusted(40))
    under_way = after(a_model(GEMMA), trusted(1), WarmAsked(2, GEMMA, alone=True), LoadStarted(3, GEMMA))

    assert (state[GEMMA].state, state.plan(40.1)) == (State.COLD, [])
    assert after(under_way, OthersHeard(4, "local")).alone
    for_all = after(
        a_model(GEMMA), trusted(1), WarmAsked(2, GEMMA), LoadStarted(3, GEMMA), OthersHeard(4, "local")
    )
    assert not for_all.alone


def test_a_wish_that_was_taken_back_elsewhere_is_none_here():
    assert after(cold(), WarmAsked(2, GEMMA), WishSpent(3, GEMMA)).asked_for is None
