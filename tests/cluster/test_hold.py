"""When may I act? By our own clock, on the safe side of what the engine believes."""

from hypothesis import given
from hypothesis import strategies as st

from keepalive.cluster.hold import Hold

seconds = st.floats(0, 1e6)


def test_without_a_lease_nothing_may_be_begun():
    assert not Hold(10.0).good(0.0)


def test_it_counts_from_when_the_renewal_was_asked_for_and_leaves_a_margin():
    hold = Hold(10.0).renewed(100.0)

    assert hold.good(108.4)
    assert not hold.good(108.5)


def test_an_answer_that_comes_late_does_not_undo_a_later_one():
    assert Hold(10.0).renewed(105.0).renewed(102.0).until == 113.5


@given(ttl=st.floats(3, 300), asked=seconds, travelled=seconds, now=seconds, drift=st.floats(0.9, 1.1))
def test_whoever_may_still_act_holds_a_lease_that_the_engine_has_not_let_run_out(
    ttl: float, asked: float, travelled: float, now: float, drift: float
):
    hold = Hold(ttl).renewed(asked)
    ours = now - asked
    theirs = ours * drift - travelled  # since it came there, by a clock that runs at another pace

    assert not hold.good(now) or theirs < ttl


def test_two_renewals_may_be_lost():
    hold = Hold(9.0).renewed(0.0)

    assert hold.good(2 * hold.interval)
