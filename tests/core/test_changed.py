"""The same record but for some fields, whether its fields lie in slots or not."""

import dataclasses

import pytest

from keepalive.core.changed import replace
from keepalive.core.records import Model, Priming
from tests.kit.models import warm


def test_a_changed_record_differs_in_what_was_said_and_in_nothing_else():
    before = warm()
    after = replace(before, waiting=3, reason="it is busy")

    assert after == dataclasses.replace(before, waiting=3, reason="it is busy")
    assert type(after) is Model
    assert (before, before.waiting) == (warm(), 0)


def test_a_record_with_slots_is_changed_as_well():
    assert replace(Priming(openings=("a",)), useless="no") == Priming(openings=("a",), useless="no")
    with pytest.raises(TypeError):
        replace(Priming(), nothing=1)
