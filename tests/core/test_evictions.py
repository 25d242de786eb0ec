"""A model that went missing: why, and how soon it is loaded again."""

from dataclasses import replace
from math import inf

import pytest

from keepalive.core import moves
from keepalive.core.actions import Drain, Load
from keepalive.core.errors import Reason
from keepalive.core.evictions import count_eviction, why_missing
from keepalive.core.facts import (
    ClockJumped,
    DrainStarted,
    Entry,
    Fact,
    Instance,
    InstanceLost,
    Listed,
    LoadOutcome,
    LoadStarted,
    PingEnded,
    PingOutcome,
    PingStarted,
    ReleaseAsked,
    RequestEnded,
    RequestStarted,
    Sdk,
    Sight,
    Tier,
    Trouble,
    UnloadCause,
    UnloadEnded,
    UnloadStarted,
    WaitStarted,
)
from keepalive.core.records import Cause, Eviction, Model, Upstream
from keepalive.core.states import State
from tests.kit.models import (
    GEMMA,
    OLD,
    POLICY,
    QWEN,
    Box,
    a_model,
    after,
    box,
    changed,
    entry,
    failed,
    listed,
    load_ended,
    nothing,
    ours,
    refused,
    tried,
    warm,
)


def test_a_warm_model_that_goes_missing_is_an_eviction_and_is_loaded_again_at_once():
    state = box(
        listed(1, entry("gemma", "gemma")), PingStarted(2, GEMMA), PingEnded(3, GEMMA, PingOutcome.OK)
    )
    state.see(listed(20, entry("gemma")))

    assert state[GEMMA].state is State.COLD
    assert state[GEMMA].evictions == 1
    assert state[GEMMA].reason == "LM Studio no longer has it in memory"
    assert state.plan(20.1) == [Load(GEMMA)]


GONE = (PingOutcome.ERROR, 0.1, "it is gone")


@pytest.mark.parametrize("why", [Reason.CRASHED, Reason.UNLOADED])
def test_a_stable_model_is_loaded_again_at_once_when_a_ping_was_the_first_to_miss_it(why: Reason):
    state = Box(ours()).see(PingStarted(400, GEMMA), PingEnded(401, GEMMA, *GONE, why))
    state.see(listed(402, entry("gemma")))

    assert (state[GEMMA].evictions, state[GEMMA].failures) == (1, 0)
    assert state.plan(402.1) == [Load(GEMMA)]


def test_a_stable_model_is_loaded_again_at_once_when_a_user_was_the_first_to_miss_it():
    state = Box(ours(failures=3)).see(listed(400, entry("gemma", "gemma")), InstanceLost(401, GEMMA, "gone"))
    state.see(listed(402, entry("gemma")))

    assert state.plan(402.1) == [Load(GEMMA)]


def test_a_model_that_did_not_hold_waits_when_a_ping_was_the_first_to_miss_it():
    state = Box(ours()).see(PingStarted(20, GEMMA), PingEnded(21, GEMMA, *GONE, Reason.CRASHED))
    state.see(listed(400, entry("gemma")))

    assert (state[GEMMA].failures, state[GEMMA].retry_at) == (2, 405)


def test_a_model_that_is_lost_again_and_again_is_loaded_less_and_less_often():
    model, waits, at = warm(), [], 10.0
    for _ in range(9):
        model = after(model, listed(at, entry("gemma")))
        waits.append(None if model.retry_at is None else model.retry_at - at)
        model = after(
            model,
            listed(at + 400, entry("gemma", "gemma")),
            PingStarted(at + 401, GEMMA),
            PingEnded(at + 402, GEMMA, PingOutcome.OK),
        )
        at += 410

    assert waits == [None, 5, 10, 20, 40, 80, 160, 300, 300]


def test_a_model_that_held_five_minutes_is_a_new_story_when_it_is_lost():
    model = after(warm(failures=6), listed(400, entry("gemma")))

    assert (model.failures, model.retry_at) == (0, None)


MISSING = entry("gemma", loading=False)
LLAMA = entry("llama", "llama", loading=False)


def cause_of(model: Model, *facts: Fact) -> Cause | None:
    """Of the one eviction that these facts are."""
    model = after(model, *facts)
    assert model.evictions == 1
    return model.last_eviction.cause if model.last_eviction else None


def on_demand(**policy: float) -> Model:
    """Loaded by us on LM Studio 0.3.x, and listed: warm since 10."""
    return after(
        a_model(policy=replace(POLICY, **policy)),
        listed(1, MISSING, tier=Tier.V0),
        LoadStarted(2, GEMMA),
        load_ended(10, proved=True),
        listed(11, entry("gemma", "gemma"), tier=Tier.V0),
    )


def pinged(at: float, outcome: PingOutcome = PingOutcome.OK, why: Reason | None = None) -> list[Fact]:
    return [PingStarted(at, GEMMA), PingEnded(at + 1, GEMMA, outcome, 1.0, why=why)]


def quiet(*span: int) -> list[Fact]:
    """It is listed every 15 s, and nobody asks anything of it."""
    return [listed(at, entry("gemma", "gemma", loading=False)) for at in range(*span, 15)]


def test_a_model_that_we_loaded_by_a_call_has_no_timer_and_is_not_displaced_so_somebody_unloaded_it():
    assert cause_of(ours(), listed(20, entry("gemma"))) is Cause.BY_HAND
    assert cause_of(ours(), *quiet(15, 9000), listed(9000, entry("gemma"))) is Cause.BY_HAND
    assert cause_of(ours(), listed(20, entry("gemma"), LLAMA)) is Cause.BY_HAND
    assert cause_of(ours(), InstanceLost(19, GEMMA, "Model unloaded.", Reason.UNLOADED), listed(20)) is (
        Cause.BY_HAND
    )


def test_when_of_several_models_none_is_left_it_may_have_been_a_restart_that_nobody_saw():
    both = listed(15, entry("gemma", "gemma"), LLAMA)

    assert cause_of(ours(), both, listed(20, entry("gemma"), entry("llama"))) is Cause.UNKNOWN
    assert cause_of(ours(), both, listed(20, entry("gemma"), LLAMA)) is Cause.BY_HAND


def test_a_crash_is_what_a_ping_or_a_user_was_told_of():
    by_ping = pinged(20, PingOutcome.ERROR, Reason.CRASHED)
    by_user = InstanceLost(20, GEMMA, "the model has crashed", Reason.CRASHED)

    assert cause_of(ours(), *by_ping, listed(22, entry("gemma"))) is Cause.CRASH
    assert cause_of(warm(), by_user, listed(22, MISSING, LLAMA)) is Cause.CRASH
    assert cause_of(ours(), by_user, listed(22, entry("gemma", "gemma")), listed(40)) is Cause.CRASH
    assert cause_of(ours(), by_user, refused(21), listed(40, entry("gemma"))) is Cause.CRASH


def test_a_crash_that_was_followed_by_an_answer_explains_nothing_any_more():
    told = pinged(20, PingOutcome.ERROR, Reason.CRASHED)

    assert cause_of(ours(), *told, *pinged(30), listed(40, entry("gemma"))) is Cause.BY_HAND


@pytest.mark.parametrize("trouble", [Trouble.REFUSED, Trouble.UNREACHABLE])
def test_a_server_that_was_gone_meanwhile_has_been_restarted(trouble: Trouble):
    assert cause_of(ours(), failed(20, trouble), listed(40, entry("gemma"))) is Cause.RESTART
    assert cause_of(ours(), failed(20, trouble), listed(40, MISSING, LLAMA)) is Cause.RESTART


def test_behind_a_network_that_was_cut_an_idle_timer_may_have_run_out():
    cut = failed(20, Trouble.UNREACHABLE)

    assert cause_of(warm(), refused(20), listed(40, MISSING)) is Cause.RESTART
    assert cause_of(warm(), cut, listed(4000, MISSING)) is Cause.UNKNOWN


def test_a_server_that_came_back_with_its_models_was_not_restarted():
    model = after(ours(), failed(20, Trouble.UNREACHABLE), listed(40, entry("gemma", "gemma")))

    assert cause_of(model, listed(60, entry("gemma"))) is Cause.BY_HAND


@pytest.mark.parametrize("trouble", [Trouble.TIMEOUT, Trouble.BAD_ANSWER, Trouble.UNAUTHORIZED])
def test_a_listing_that_failed_otherwise_is_no_restart(trouble: Trouble):
    assert cause_of(ours(), failed(20, trouble), listed(40, entry("gemma"))) is Cause.BY_HAND


def test_on_demand_one_model_pushes_out_another_by_being_loaded():
    there = listed(20, MISSING, LLAMA, tier=Tier.V0)
    on_its_way = listed(20, MISSING, entry("llama", loading=True), tier=Tier.V0)

    assert cause_of(on_demand(), there) is Cause.DISPLACED
    assert cause_of(on_demand(), on_its_way) is Cause.DISPLACED
    assert cause_of(warm(), listed(20, entry("gemma"), LLAMA)) is Cause.DISPLACED


def test_what_was_there_before_has_pushed_out_nothing():
    model = after(on_demand(), listed(15, entry("gemma", "gemma"), LLAMA, tier=Tier.V0))

    assert cause_of(model, listed(20, MISSING, LLAMA, tier=Tier.V0)) is Cause.BY_HAND


def test_a_timer_took_what_idled_as_long_as_its_lease():
    model = after(on_demand(lease=600.0), listed(611, MISSING, tier=Tier.V0))

    assert model.last_eviction == Eviction(at=611, cause=Cause.TIMER, idle_seconds=600)


def test_a_lease_that_we_asked_for_may_have_been_cut_short():
    model = after(on_demand(), listed(90, MISSING, tier=Tier.V0))

    assert model.last_eviction == Eviction(at=90, cause=Cause.UNKNOWN, idle_seconds=79)


def test_what_somebody_else_loaded_may_have_any_lease_of_a_minute_or_more():
    model = after(warm(), *quiet(15, 120), listed(120, entry("gemma")))
    early = after(warm(), *quiet(15, 60), listed(62, entry("gemma")))

    assert model.last_eviction == Eviction(at=120, cause=Cause.TIMER, idle_seconds=117)
    assert early.last_eviction == Eviction(at=62, cause=Cause.UNKNOWN, idle_seconds=59)


def test_no_timer_takes_what_has_idled_longer_before():
    model = after(warm(), *quiet(15, 300), *pinged(300), *quiet(305, 400))

    assert cause_of(model, listed(400, MISSING)) is Cause.BY_HAND


def test_a_listing_that_does_not_show_loads_cannot_rule_out_that_one_displaced_it():
    model = after(warm(), *quiet(15, 300), *pinged(300), *quiet(305, 400))

    assert cause_of(model, listed(400, entry("gemma"))) is Cause.UNKNOWN


def test_a_model_at_work_is_not_idle():
    model = after(warm(), RequestStarted(10, GEMMA), *quiet(15, 300), RequestEnded(300, GEMMA, answered=True))
    working = after(warm(), RequestStarted(10, GEMMA), *quiet(15, 300))

    assert (model.survived, model.used_at) == (0.0, 300)
    assert after(working, listed(300, entry("gemma"))).last_eviction == Eviction(300, Cause.UNKNOWN, 0.0)


def test_a_machine_that_slept_was_idle_all_the_while():
    model = after(warm(), ClockJumped(20, "local", 7200.0), listed(21, entry("gemma")))
    set_back = after(warm(), ClockJumped(20, "local", -7200.0), listed(21, entry("gemma")))

    assert model.last_eviction == Eviction(at=21, cause=Cause.TIMER, idle_seconds=7218)
    assert set_back.last_eviction == Eviction(at=21, cause=Cause.UNKNOWN, idle_seconds=18)


def test_a_copy_that_comes_later_has_its_own_story():
    model = after(warm(), *quiet(15, 300), listed(300, entry("gemma")), *quiet(310, 400))

    assert (model.survived, model.used_at, model.suspected) == (pytest.approx(74.99), 310, None)


def test_what_we_unload_is_no_eviction():
    model = after(
        ours(),
        ReleaseAsked(20, GEMMA),
        UnloadStarted(21, GEMMA, "gemma"),
        UnloadEnded(22, GEMMA, "gemma"),
        listed(23, entry("gemma")),
    )

    assert (model.evictions, model.last_eviction) == (0, None)


# --- the rule by itself ---------------------------------------------------------------------------


def foreign(**changes: object) -> Model:
    """Somebody else's, last used at 100; beside it is a llama."""
    there = {"instances": (Instance("gemma"),), "beside": frozenset({"gemma", "llama"}), "used_at": 100.0}
    return a_model(**{**there, **changes})


def own(**changes: object) -> Model:
    return foreign(ours=frozenset({"gemma"}), policy=replace(POLICY, lease=600.0), **changes)


def test_what_was_not_there_is_not_missing():
    assert why_missing(foreign(instances=(), suspected=Cause.CRASH), listed(200), told=True) is Cause.UNKNOWN


def test_what_was_suspected_before_explains_it():
    for cause in (Cause.CRASH, Cause.RESTART):
        assert why_missing(foreign(suspected=cause), listed(200, LLAMA), told=True) is cause


def cut_off(**changes: object) -> Model:
    """Nobody could reach the server for a while."""
    return foreign(suspected=Cause.UNKNOWN, **changes)


def test_behind_a_broken_way_what_else_is_left_there_rules_out_a_restart():
    mine = {"ours": frozenset({"gemma"})}

    assert why_missing(cut_off(**mine), listed(200), told=False) is Cause.RESTART
    assert why_missing(cut_off(**mine), listed(200, LLAMA), told=False) is Cause.BY_HAND
    assert why_missing(cut_off(), listed(150), told=False) is Cause.RESTART
    assert why_missing(cut_off(survived=100.0), listed(200), told=False) is Cause.RESTART
    assert why_missing(cut_off(survived=100.0), listed(200, LLAMA), told=True) is Cause.BY_HAND
    assert why_missing(cut_off(), listed(200, LLAMA), told=True) is Cause.TIMER
    # Everybody's timer may have run out by then, and so may the power.
    assert why_missing(cut_off(), listed(200), told=True) is Cause.UNKNOWN
    assert why_missing(cut_off(), listed(200, entry("phi", "phi")), told=True) is Cause.DISPLACED


def test_where_the_timer_is_told_a_broken_way_hides_no_more_than_a_restart():
    stays = {"instances": (Instance("gemma", ttl=inf),)}
    timed = {"instances": (Instance("gemma", ttl=300.0),)}

    assert why_missing(cut_off(**stays), listed(200), told=False) is Cause.RESTART
    assert why_missing(cut_off(**stays), listed(200, LLAMA), told=False) is Cause.BY_HAND
    assert why_missing(cut_off(**timed), listed(399), told=False) is Cause.TIMER
    assert why_missing(cut_off(**timed), listed(300), told=False) is Cause.RESTART


def test_a_socket_that_outlived_a_broken_way_knows_of_no_restart_unless_it_is_silent():
    known = cut_off(instances=(Instance("gemma", ttl=inf),), seen_by=Sight(Sdk.UP, session=1))

    for sight, cause in (
        (Sight(Sdk.UP, session=1), Cause.BY_HAND),
        (Sight(Sdk.UP, session=2), Cause.RESTART),
        (Sight(Sdk.ABSENT), Cause.RESTART),
        (Sight(Sdk.UP, session=1, late=True), Cause.RESTART),
    ):
        assert why_missing(known, listed(200, sight=sight), told=False) is cause


def test_a_socket_that_is_silent_does_not_say_that_nothing_was_restarted():
    known = own(seen_by=Sight(Sdk.UP, session=1))

    assert why_missing(known, listed(200, sight=Sight(Sdk.UP, session=1)), told=False) is Cause.BY_HAND
    silent = Sight(Sdk.UP, session=1, late=True)
    assert why_missing(known, listed(200, sight=silent), told=False) is Cause.UNKNOWN


def test_what_our_own_load_on_demand_was_to_push_out_is_no_loss():
    going = own(draining=True)

    assert why_missing(going, listed(200, entry("phi", "phi"), tier=Tier.V0), told=True) is None
    assert why_missing(going, listed(200, LLAMA, tier=Tier.V0), told=True) is None
    assert why_missing(going, listed(200, LLAMA), told=True) is Cause.BY_HAND  # there a call unloads it
    crashed = own(draining=True, suspected=Cause.CRASH)
    assert why_missing(crashed, listed(200, tier=Tier.V0), told=True) is Cause.CRASH


def test_only_where_every_copy_is_ours_and_was_loaded_by_a_call_nothing_else_can_have_taken_it():
    copies = {"instances": (Instance("gemma"), Instance("gemma:2")), "survived": 900.0}
    newcomer = entry("phi", "phi")

    assert why_missing(own(), listed(200, LLAMA, newcomer), told=False) is Cause.BY_HAND
    assert why_missing(own(**copies), listed(200, LLAMA, newcomer), told=False) is Cause.DISPLACED
    assert why_missing(own(), listed(200, LLAMA, newcomer, tier=Tier.V0), told=True) is Cause.DISPLACED


def test_a_server_that_holds_nothing_any_more_may_have_been_restarted_unless_it_held_only_this():
    alone = own(beside=frozenset({"gemma"}))

    assert why_missing(own(), listed(200), told=False) is Cause.UNKNOWN
    assert why_missing(own(), listed(200, LLAMA), told=False) is Cause.BY_HAND
    assert why_missing(alone, listed(200), told=False) is Cause.BY_HAND


def test_what_came_with_the_loss_displaced_it():
    coming = entry("phi", loading=True)

    assert why_missing(foreign(), listed(200, LLAMA, entry("phi", "phi")), told=True) is Cause.DISPLACED
    assert why_missing(foreign(), listed(200, LLAMA, coming), told=True) is Cause.DISPLACED
    assert why_missing(foreign(survived=100.0), listed(200, LLAMA), told=True) is Cause.BY_HAND


@pytest.mark.parametrize(
    ("at", "survived", "told", "cause"),
    [
        (160.0, 0.0, True, Cause.TIMER),
        (160.0, 59.5, True, Cause.TIMER),
        (160.0, 60.0, True, Cause.BY_HAND),
        (159.5, 0.0, True, Cause.UNKNOWN),  # no timer is so short, and what it had survived is shorter
        (159.5, 59.5, True, Cause.BY_HAND),
        (159.5, 59.5, False, Cause.UNKNOWN),
        (100.0, 0.0, True, Cause.BY_HAND),
        (100.5, 0.0, True, Cause.UNKNOWN),
    ],
)
def test_anothers_timer_is_of_a_minute_or_more_and_longer_than_what_it_survived(
    at: float, survived: float, told: bool, cause: Cause
):
    assert why_missing(foreign(survived=survived), listed(at, LLAMA), told=told) is cause


@pytest.mark.parametrize(
    ("at", "survived", "cause"),
    [
        (700.0, 0.0, Cause.TIMER),
        (699.9, 0.0, Cause.UNKNOWN),  # its lease may have been cut short
        (160.0, 0.0, Cause.BY_HAND),
        (160.1, 0.0, Cause.UNKNOWN),
        (300.0, 200.0, Cause.BY_HAND),
        (300.1, 200.0, Cause.UNKNOWN),
        (900.0, 800.0, Cause.BY_HAND),
    ],
)
def test_our_own_timer_is_our_lease(at: float, survived: float, cause: Cause):
    assert why_missing(own(survived=survived), listed(at, LLAMA, tier=Tier.V0), told=True) is cause


# --- the rule by itself, where LM Studio's socket shows more --------------------------------------

ALONE = frozenset({"gemma"})


def line(session: int, hung_up: int = 0) -> Sight:
    return Sight(Sdk.UP, session=session, hung_up=hung_up)


@pytest.mark.parametrize(
    ("before", "now", "changes", "cause"),
    [
        (line(1), line(1), {}, Cause.BY_HAND),  # it outlived them
        (line(1), line(2), {}, Cause.RESTART),
        (line(1), line(2), {"beside": ALONE}, Cause.BY_HAND),  # a connection breaks, and a person unloads one
        (line(1, 3), line(2, 4), {"beside": ALONE}, Cause.RESTART),  # LM Studio ended it
        (line(1), Sight(Sdk.ABSENT), {}, Cause.RESTART),
        (line(1), Sight(Sdk.OFF), {}, Cause.UNKNOWN),
        (Sight(Sdk.ABSENT), line(1), {}, Cause.UNKNOWN),
        (Sight(Sdk.ABSENT), Sight(Sdk.ABSENT), {}, Cause.UNKNOWN),
    ],
)
def test_where_nothing_is_left_the_socket_tells_whether_lm_studio_was_restarted(
    before: Sight, now: Sight, changes: dict[str, object], cause: Cause
):
    model = own(seen_by=before, **changes)

    assert why_missing(model, listed(200, sight=now), told=True) is cause
    assert why_missing(model, listed(200, entry("gemma", "x"), sight=now), told=True) is Cause.BY_HAND


def timed(ttl: float) -> Model:
    return foreign(instances=(Instance("gemma", ttl=ttl),))


@pytest.mark.parametrize(
    ("ttl", "at", "came", "cause"),
    [
        (60.0, 158.0, (), Cause.TIMER),
        (60.0, 157.9, (), Cause.BY_HAND),
        (60.0, 157.9, (entry("phi", "phi"),), Cause.DISPLACED),
        (60.0, 157.9, (entry("phi", loading=True),), Cause.DISPLACED),
        (inf, 1e6, (entry("phi", "phi"),), Cause.BY_HAND),
        (inf, 1e6, (), Cause.BY_HAND),
    ],
)
def test_where_its_timer_is_told_that_is_what_took_it_or_did_not(
    ttl: float, at: float, came: tuple[Entry, ...], cause: Cause
):
    assert why_missing(timed(ttl), listed(at, LLAMA, *came), told=False) is cause


# --- what it costs --------------------------------------------------------------------------------


def test_an_eviction_is_counted_and_the_first_is_mended_at_once():
    before = tried(State.WARM, failures=0, contested=False, warm_since=48.0, evictions=4, used_at=40.0)

    assert changed(before, count_eviction(before, 50.0, Cause.BY_HAND)) == {
        "evictions": 5,
        "last_eviction": Eviction(50.0, Cause.BY_HAND, 10.0),
        "instances": (),
        "ours": frozenset(),
        "busy": False,
        "suspected": None,
        "failures": 1,
        "taken": 1,
        "failure": "it went missing 1 times in a row without holding 300 s",
        "retry_at": None,
        "warm_since": None,
        "contested": True,
    }


def test_what_was_taken_is_contested_until_a_call_of_ours_has_ended_and_what_crashed_is_not():
    gone = listed(50, entry("gemma"))
    lost = after(warm(), gone)

    assert (warm().contested, lost.contested) == (False, True)
    assert after(lost, LoadStarted(51, GEMMA)).contested
    assert not after(lost, LoadStarted(51, GEMMA), load_ended(52, LoadOutcome.FAILED)).contested
    assert not after(warm(), PingStarted(49, GEMMA), gone, PingEnded(51, GEMMA, PingOutcome.ERROR)).contested
    assert not after(replace(warm(), suspected=Cause.CRASH), gone).contested


def test_what_made_room_on_demand_is_unloaded_and_held_off_by_nothing():
    before = tried(State.WARM, failures=0, retry_at=None, draining=True)

    assert changed(before, count_eviction(before, 50.0, None)) == {
        "made_way": 1,
        "letting_go": UnloadCause.ROOM,
        "instances": (),
        "ours": frozenset(),
        "busy": False,
        "draining": False,
        "warm_since": None,
    }


def test_two_models_that_take_turns_on_an_old_server_fight_nobody():
    models = (
        a_model(rank=0, policy=replace(POLICY, auto=True)),
        a_model(QWEN, policy=replace(POLICY, auto=True)),
    )
    state = Box(*models, upstream=Upstream("local", auto_evict=True)).see(nothing(1))
    state.see(LoadStarted(2, GEMMA), load_ended(7, proved=True))
    state.see(listed(8, entry("gemma", "gemma", loading=False), entry("qwen", loading=False), tier=OLD))
    state.see(
        WaitStarted(50, QWEN), listed(60, entry("gemma", "gemma", loading=False), entry("qwen"), tier=OLD)
    )

    assert state.plan(60.1) == [Drain(GEMMA), Load(QWEN)]
    state.see(DrainStarted(60.1, GEMMA), LoadStarted(60.2, QWEN))
    gone = entry("gemma", loading=False), entry("qwen", loading=True)
    state.see(listed(61, *gone, tier=OLD))

    gemma = state[GEMMA]
    assert (gemma.evictions, gemma.made_way, gemma.failures, gemma.retry_at) == (0, 1, 0, None)
    assert (gemma.state, gemma.reason) == (State.COLD, "it made room for another")


def test_what_was_not_there_is_no_eviction():
    assert count_eviction(tried(State.WARM, instances=()), 50.0, Cause.BY_HAND) == tried(
        State.WARM, instances=()
    )


@pytest.mark.parametrize(
    ("state", "warm_since", "at", "failures"),
    [
        (State.WARM, 3.0, 302.9, 3),
        (State.WARM, 3.0, 303.0, 0),
        (State.WARM, None, 900.0, 3),
        (State.BACKOFF, 3.0, 900.0, 3),  # it held from 3 to 20
        (State.BACKOFF, -280.0, 900.0, 0),
        (State.BACKOFF, -279.9, 900.0, 3),
    ],
)
def test_what_held_five_minutes_while_it_was_warm_is_a_new_story(
    state: State, warm_since: float | None, at: float, failures: int
):
    model = count_eviction(tried(state, warm_since=warm_since), at, Cause.UNKNOWN)

    assert model.failures == failures
    assert model.retry_at == (None if failures == 0 else at + 10)


def test_how_often_it_was_taken_does_not_count_when_it_fails_by_itself():
    taken = tried(State.WARM, failures=1)
    for n in range(8):
        taken = replace(count_eviction(taken, 50.0 + n, Cause.DISPLACED), instances=taken.instances)
    crashed = count_eviction(taken, 60.0, Cause.CRASH)
    again = count_eviction(replace(crashed, instances=taken.instances), 70.0, Cause.CRASH)

    assert (taken.failures, taken.taken, taken.retry_at) == (9, 8, 57.0 + 300.0)
    assert (crashed.failures, crashed.taken, crashed.retry_at) == (2, 0, 65.0)
    assert (again.failures, again.retry_at) == (3, 80.0)
    assert moves.failed(taken, 60.0, "no").failures == 2


@pytest.mark.parametrize(
    ("changes", "idle"),
    [({}, 10.0), ({"in_flight": 1}, 0.0), ({"pinging": True}, 0.0), ({"used_at": 60.0}, 0.0)],
)
def test_what_was_at_work_when_it_was_lost_had_not_idled(changes: dict[str, object], idle: float):
    model = count_eviction(tried(State.WARM, **{"used_at": 40.0, **changes}), 50.0, Cause.UNKNOWN)

    assert model.last_eviction == Eviction(50.0, Cause.UNKNOWN, idle)


# --- on llama-server's router ----------------------------------------------------------------------


def routed(*entries: Entry, places: int | None = 4) -> Listed:
    return Listed(20, "local", 20, Tier.LLAMA, {e.key: e for e in entries}, places=places)


QWEN_IS_THERE = Entry("qwen", instances=(Instance("qwen"),), loading=False)


@pytest.mark.parametrize(
    ("fact", "cause"),
    [
        (routed(Entry("gemma", loading=False, asleep=True)), Cause.TIMER),
        (routed(Entry("gemma", loading=False, exit_code=1)), Cause.CRASH),
        (routed(Entry("gemma", loading=False), QWEN_IS_THERE, places=1), Cause.DISPLACED),
        (routed(Entry("gemma", loading=False), Entry("qwen", loading=True), places=1), Cause.DISPLACED),
        (routed(Entry("gemma", loading=False), QWEN_IS_THERE, places=2), Cause.BY_HAND),
        (routed(Entry("gemma", loading=False), QWEN_IS_THERE, places=None), Cause.BY_HAND),
        (routed(Entry("gemma", loading=False), places=1), Cause.BY_HAND),
    ],
)
def test_on_a_router_what_is_listed_says_why_a_model_is_missing(fact: Listed, cause: Cause):
    model = ours(beside=frozenset({"gemma"}))

    assert why_missing(model, fact, told=True) is cause


def test_a_model_that_fell_asleep_is_missing_and_loaded_again():
    state = Box(ours(size_bytes=7)).see(routed(Entry("gemma", loading=False, asleep=True)))

    assert (state[GEMMA].state, state[GEMMA].evictions) == (State.COLD, 1)
    assert state[GEMMA].last_eviction == Eviction(20, Cause.TIMER, state[GEMMA].last_eviction.idle_seconds)  # type: ignore[union-attr]
    assert state[GEMMA].size_bytes == 7  # llama-server says it of loaded models alone


def test_a_socket_that_lm_studio_ended_tells_of_a_restart_whatever_else_would_explain_the_loss():
    ended = {"sight": line(2, 1)}

    for came in ((), (entry("phi", "phi"),)):
        assert why_missing(foreign(seen_by=line(1)), listed(200, *came, **ended), told=True) is Cause.RESTART


def test_a_lease_of_ours_may_have_been_cut_short_while_nobody_could_look():
    assert why_missing(own(suspected=Cause.UNKNOWN), listed(300, tier=Tier.V0), told=True) is Cause.UNKNOWN


def test_a_router_that_does_not_list_it_or_had_all_its_places_taken_before_has_pushed_out_nothing():
    both = replace(ours(), beside=frozenset({"gemma", "qwen"}))

    assert why_missing(both, routed(QWEN_IS_THERE), told=True) is Cause.BY_HAND
    assert why_missing(both, routed(Entry("gemma"), QWEN_IS_THERE, places=1), told=True) is Cause.BY_HAND


def test_what_held_five_minutes_was_not_taken_again_and_again():
    assert count_eviction(tried(State.WARM, warm_since=3.0, taken=2), 303.0, Cause.DISPLACED).taken == 0
