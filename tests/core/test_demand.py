"""What was asked for of late."""

from math import inf

import pytest

from keepalive.core.apply import apply
from keepalive.core.demand import FORGOTTEN, HALF_LIFE, demand
from keepalive.core.facts import DemandRecalled
from tests.kit.models import a_model

HOUR = 3600.0
NOW = 1e6
A = a_model().id


def test_nobody_has_ever_asked():
    assert demand(a_model(), 1e9) == 0.0
    assert demand(a_model(asks=5.0), -inf) == 0.0


def test_each_request_counts_one_and_half_of_that_later():
    asked = a_model(asks=3.0, asks_at=100.0)

    assert demand(asked, 100.0) == 3.0
    assert demand(asked, 100.0 + 4 * HOUR) == pytest.approx(1.5)
    assert demand(asked, 100.0 + 8 * HOUR) == pytest.approx(0.75)


def test_a_single_request_is_forgotten_in_the_course_of_a_day():
    asked = a_model(asks=1.0, asks_at=0.0)

    assert demand(asked, 17 * HOUR) > FORGOTTEN > demand(asked, 18 * HOUR)


def test_what_was_asked_for_in_an_earlier_life_counts_as_much_as_it_would_have():
    lived = a_model(asks=1.0, asks_at=NOW - HALF_LIFE)
    again = apply(a_model(), DemandRecalled(NOW, A, ((HALF_LIFE, 1),)))
    both = apply(a_model(asks=2.0, asks_at=NOW, use_at=NOW), DemandRecalled(NOW, A, ((HALF_LIFE, 2),)))

    assert demand(again, NOW) == demand(lived, NOW) == 0.5
    assert again.use_at == NOW - HALF_LIFE
    assert (demand(both, NOW), both.use_at) == (3.0, NOW)


def test_a_clock_that_goes_back_makes_nobody_more_wanted():
    assert demand(a_model(asks=3.0, asks_at=100.0), 50.0) == 3.0
