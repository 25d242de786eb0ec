"""What follows from what the socket shows: work of others, idle timers, progress, and why a model went missing."""

from dataclasses import replace
from math import inf

import pytest

from keepalive.core.actions import Refresh, SendPing, SkipPing, Unload
from keepalive.core.explain import eta
from keepalive.core.facts import (
    NO_SIGHT,
    Entry,
    Instance,
    LoadOutcome,
    LoadProgressed,
    LoadRemembered,
    LoadStarted,
    PingEnded,
    PingOutcome,
    PingStarted,
    ReleaseAsked,
    RequestStarted,
    Sdk,
    Sight,
    Trouble,
    UnloadCause,
)
from keepalive.core.records import Cause, Upstream, UpstreamState
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
    failed,
    listed,
    load_ended,
    ours,
    warm,
)

CLOCK = 1_790_000_000.0
SEEN = Sight(Sdk.UP, session=2, clock=CLOCK)


def shown(*instances: Instance) -> Entry:
    return Entry("gemma", instances=instances)


def one(**more: object) -> Entry:
    return shown(Instance("gemma", **more))  # type: ignore[arg-type]


BUSY = one(busy=True, queued=1, ttl=inf)
IDLE = one(busy=False, queued=0, ttl=inf)


# --- work of others -----------------------------------------------------------------------------------


def test_a_model_that_works_for_a_stranger_is_not_pinged():
    state = Box(warm()).see(listed(303, BUSY, sight=SEEN))

    assert state.plan(303.1) == [SkipPing(GEMMA)]
    assert Box(warm()).see(listed(303, IDLE, sight=SEEN)).plan(303.1) == [SendPing(GEMMA, "gemma")]


def test_a_ping_that_timed_out_asks_for_a_look_unless_lm_studio_says_that_the_model_works():
    silent = PingEnded(363, GEMMA, PingOutcome.TIMEOUT, 60.0)
    working, idle, unseen = (
        Box(warm()).see(listed(303, IDLE, sight=SEEN), PingStarted(303.1, GEMMA), listed(350, look), silent)
        for look in (BUSY, IDLE, entry("gemma", "gemma"))
    )

    assert working.plan(363.1) == []
    assert idle.plan(363.1) == unseen.plan(363.1) == [Refresh("local")]
    assert idle.see(listed(364, IDLE)).plan(364.1) == []


def test_a_ping_that_was_skipped_for_a_stranger_is_due_an_interval_later():
    state = Box(warm()).see(listed(303, BUSY, sight=SEEN), PingEnded(304, GEMMA, PingOutcome.SKIPPED))

    assert state[GEMMA].ping_at == 604
    assert not [action for action in state.plan(304.1) if not isinstance(action, Refresh)]


def test_a_model_that_works_for_a_stranger_is_not_unloaded_before_it_is_idle():
    state = Box(ours()).see(ReleaseAsked(400, GEMMA), listed(401, BUSY, sight=SEEN))
    working = state.plan(401.1)
    state.see(listed(420, IDLE, sight=SEEN))

    assert not any(isinstance(action, Unload) for action in working)
    assert state.plan(420.1) == [Unload(GEMMA, "gemma", UnloadCause.RELEASED)]


def test_where_the_socket_is_late_to_say_so_an_unload_waits():
    late = replace(SEEN, late=True)
    state = Box(ours()).see(ReleaseAsked(400, GEMMA), listed(401, entry("gemma", "gemma"), sight=late))
    unsaid = state.plan(401.1)
    state.see(listed(420, entry("gemma", "gemma"), sight=replace(SEEN, sdk=Sdk.ABSENT, session=0)))

    assert unsaid == []
    assert state.plan(420.1) == [Unload(GEMMA, "gemma", UnloadCause.RELEASED)]


def test_a_model_that_is_found_at_work_is_warm_without_a_ping():
    state = box(listed(1, BUSY, sight=SEEN))

    assert (state[GEMMA].state, state[GEMMA].ping_at) == (State.WARM, 301)
    assert box(listed(1, IDLE, sight=SEEN))[GEMMA].state is State.UNKNOWN


def test_one_that_was_cold_and_is_found_at_work_is_warm_as_well():
    assert after(cold(), listed(5, BUSY, sight=SEEN)).state is State.WARM


def test_what_failed_has_to_prove_itself_though_it_seems_to_work():
    sick = after(warm(), PingStarted(10, GEMMA), PingEnded(11, GEMMA, PingOutcome.WRONG_MODEL))

    assert after(sick, listed(12, BUSY, sight=SEEN)).state is State.BACKOFF


def test_work_counts_as_use():
    busy = after(warm(), listed(200, BUSY, sight=SEEN))

    assert (busy.used_at, busy.use_at) == (200, 200)


def test_a_call_of_our_own_that_is_seen_at_work_is_no_use():
    two = one(busy=True, queued=2, ttl=inf)
    untold = one(busy=True, ttl=inf)
    during = {
        name: after(warm(), PingStarted(400, GEMMA), listed(401, look, sight=SEEN)).use_at
        for name, look in {"ours": BUSY, "another's too": two, "untold": untold}.items()
    }

    assert during == {"ours": -inf, "another's too": 401, "untold": 401}


def test_since_when_it_rests_is_known_while_every_look_says_so():
    resting = after(warm(), listed(100, IDLE, sight=SEEN), listed(115, IDLE, sight=SEEN))

    assert resting.idle_since == 99.99
    assert after(resting, listed(130, BUSY, sight=SEEN)).idle_since is None
    assert after(resting, listed(130, entry("gemma", "gemma"), sight=SEEN)).idle_since is None


# --- idle timers --------------------------------------------------------------------------------------


def timed(ttl: float, used: float) -> Entry:
    return one(busy=False, queued=0, ttl=ttl, last_used=CLOCK - used)


def test_an_idle_timer_says_when_the_model_will_go():
    model = after(warm(), listed(100, timed(120, used=10), sight=SEEN))

    assert (model.used_at, model.goes_at) == (90, 210)
    assert after(model, listed(110, IDLE, sight=SEEN)).goes_at is None
    assert after(model, RequestStarted(111, GEMMA)).goes_at is None
    assert after(model, listed(110, one(busy=True, ttl=120), sight=SEEN)).goes_at is None


def test_a_model_that_is_to_be_kept_is_pinged_before_its_timer_strikes():
    state = Box(warm()).see(listed(100, timed(120, used=10), sight=SEEN))

    assert state[GEMMA].ping_due_at == 170  # 210, less two looks and 10 s
    assert not [a for a in state.plan(100.1) if isinstance(a, SendPing)]
    state.see(listed(170, timed(120, used=80), sight=SEEN))
    assert state.plan(170.1) == [SendPing(GEMMA, "gemma")]


def test_a_short_timer_is_met_halfway_and_no_faster_than_anybody_can_bear():
    assert after(warm(), listed(100, timed(30, used=0), sight=SEEN)).ping_due_at == 115
    just = after(warm(), PingStarted(99, GEMMA), PingEnded(100, GEMMA, PingOutcome.OK))
    assert after(just, listed(100.1, timed(2, used=0), sight=SEEN)).ping_due_at == 105


def test_a_timer_that_is_longer_than_the_interval_changes_nothing():
    assert after(warm(), listed(100, timed(3600, used=10), sight=SEEN)).ping_due_at == 303


def test_a_clock_that_lies_in_the_future_does_not_make_it_younger_than_now():
    assert after(warm(), listed(100, timed(120, used=-50), sight=SEEN)).used_at == 100


# --- why it went missing ------------------------------------------------------------------------------


def gone(before: Entry, *came: Entry, at: float, sight: Sight = SEEN, mine: bool = False) -> Cause | None:
    model = after(ours() if mine else warm(), listed(100, before, sight=SEEN))
    lost = after(model, listed(at, entry("gemma"), *came, sight=sight)).last_eviction
    return lost.cause if lost else None


def test_what_outlived_its_timer_was_taken_by_it():
    assert gone(timed(60, used=10), at=152) is Cause.TIMER
    assert gone(timed(60, used=10), at=149) is Cause.TIMER  # to the second
    assert gone(timed(60, used=10), at=140) is Cause.BY_HAND


def test_what_had_time_left_was_pushed_out_where_another_came():
    assert gone(timed(600, used=10), entry("qwen", "qwen"), at=130) is Cause.DISPLACED


def test_what_has_no_timer_is_pushed_out_by_nothing():
    assert gone(IDLE, entry("qwen", "qwen"), at=130) is Cause.BY_HAND
    assert gone(IDLE, at=9000) is Cause.BY_HAND


@pytest.mark.parametrize("mine", [True, False])
def test_a_socket_that_lm_studio_ended_meanwhile_tells_of_its_restart(mine: bool):
    ended = Sight(Sdk.UP, session=3, hung_up=1, clock=CLOCK)

    assert gone(IDLE, at=130, sight=ended, mine=mine) is Cause.RESTART
    assert gone(timed(60, used=10), at=130, sight=ended, mine=mine) is Cause.RESTART
    assert gone(IDLE, entry("qwen", "qwen"), at=130, sight=ended) is Cause.RESTART


def test_what_was_beside_it_and_is_still_there_outlived_the_socket_so_there_was_no_restart():
    both = after(warm(), listed(100, IDLE, entry("qwen", "qwen"), sight=SEEN))
    ended = Sight(Sdk.UP, session=3, hung_up=1, clock=CLOCK)
    lost = after(both, listed(130, entry("gemma"), entry("qwen", "qwen"), sight=ended)).last_eviction

    assert lost is not None
    assert lost.cause is Cause.BY_HAND


@pytest.mark.parametrize(
    ("sight", "cause"),
    [(SEEN, Cause.BY_HAND), (replace(SEEN, session=4), Cause.RESTART), (NO_SIGHT, Cause.UNKNOWN)],
)
def test_of_several_that_are_all_gone_only_a_socket_that_lived_on_tells_that_there_was_no_restart(
    sight: Sight, cause: Cause
):
    both = after(warm(), listed(100, IDLE, entry("qwen", "qwen"), sight=SEEN))
    lost = after(both, listed(130, entry("gemma"), entry("qwen"), sight=sight)).last_eviction

    assert lost is not None
    assert lost.cause is cause


# --- progress -----------------------------------------------------------------------------------------


def test_progress_is_that_of_the_load_under_way_and_never_goes_back():
    loading = after(cold(), LoadStarted(10, GEMMA))
    half = after(loading, LoadProgressed(20, GEMMA, 0.5), LoadProgressed(21, GEMMA, 0.4))

    assert loading.progress is None
    assert (half.progress, half.progress_at) == (0.5, 20)
    assert after(half, load_ended(30)).progress is None
    assert after(half, load_ended(30, LoadOutcome.UNKNOWN)).progress is None
    assert after(cold(), LoadProgressed(20, GEMMA, 0.5)).progress is None


def test_how_far_another_daemons_load_was_says_nothing_of_ours():
    theirs = after(cold(), LoadRemembered(10, GEMMA, 10, 30.0, by="b"), LoadProgressed(20, GEMMA, 0.8))
    lost = after(theirs, listed(30, entry("gemma", "gemma")), listed(40, entry("gemma")))
    loading = after(lost, LoadStarted(50, GEMMA))

    assert (theirs.progress, loading.progress) == (0.8, None)
    assert after(loading, LoadProgressed(60, GEMMA, 0.1)).progress == 0.1


def test_the_first_load_of_all_is_estimated_by_its_progress():
    loading = after(cold(), LoadStarted(10, GEMMA), LoadProgressed(30, GEMMA, 0.25))

    assert eta(loading, (), 30) == 60
    assert eta(loading, (), 50) == 40
    assert eta(loading, (), 500) == 0


def test_progress_that_has_hardly_begun_tells_nothing():
    assert eta(after(cold(), LoadStarted(10, GEMMA), LoadProgressed(30, GEMMA, 0.01)), (), 30) is None
    assert eta(after(cold(), LoadStarted(10, GEMMA), LoadProgressed(30, GEMMA, 0.02)), (), 30) == 980


def test_the_further_a_load_is_the_less_those_before_it_tell():
    known = after(cold(recent_loads=(100.0,)), LoadStarted(0, GEMMA), LoadProgressed(20, GEMMA, 0.5))

    assert eta(known, (), 20) == 50  # 80 by the last load, 20 by its progress
    assert eta(known, (), 30) == 40


def test_a_load_that_takes_longer_than_those_before_it_is_estimated_by_its_progress():
    known = after(cold(recent_loads=(10.0,)), LoadStarted(0, GEMMA), LoadProgressed(20, GEMMA, 0.25))

    assert eta(known, (), 20) == 60


def test_a_load_whose_end_was_not_seen_is_estimated_by_those_before_it_alone():
    lost = after(
        cold(recent_loads=(100.0,)),
        LoadStarted(2, GEMMA),
        LoadProgressed(5, GEMMA, 0.9),
        load_ended(10, LoadOutcome.UNKNOWN),
    )

    assert eta(lost, (), 20) == 82


# --- an upstream --------------------------------------------------------------------------------------


def test_the_socket_of_an_upstream_is_as_the_newest_listing_had_it_and_gone_with_the_server():
    up = apply_upstream(Upstream("local"), listed(1, sight=SEEN))

    assert up.sight == SEEN
    assert apply_upstream(up, failed(2, Trouble.TIMEOUT)).sight.sdk is Sdk.UP
    assert apply_upstream(up, failed(2, Trouble.REFUSED)).sight.sdk is Sdk.ABSENT
    assert apply_upstream(up, failed(2, Trouble.UNREACHABLE)).sight.sdk is Sdk.ABSENT
    off = apply_upstream(Upstream("local"), failed(2, Trouble.REFUSED))
    assert (off.sight.sdk, off.state) == (Sdk.OFF, UpstreamState.DOWN)


def test_what_its_copies_show_is_told_of_the_model():
    copies = shown(
        Instance("gemma", busy=False, queued=0, ttl=inf, last_used=50.0),
        Instance("gemma:2", busy=True, queued=3, ttl=60.0, last_used=70.0),
        Instance("gemma:3"),
    )
    model = after(warm(), listed(100, copies, sight=SEEN))

    assert (model.engaged, model.queued, model.ttl, model.last_used) == (True, 3, 60.0, 70.0)
    assert (a_model().engaged, a_model().queued, a_model().ttl, a_model().last_used) == (
        False,
        None,
        None,
        None,
    )
