"""What can be done."""

from typing import get_args

from keepalive.core import actions
from keepalive.core.actions import Action, Load, Refresh
from tests.kit.models import GEMMA


def test_an_action_is_any_of_what_can_be_done():
    kinds = {kind for kind in vars(actions).values() if getattr(kind, "__module__", "") == actions.__name__}

    assert set(get_args(Action)) == kinds


def test_a_refresh_does_not_ask_for_more_than_somebody_needs():
    assert Refresh("local") == Refresh(upstream="local", loading=False)


def test_a_load_is_asked_for_by_somebody_and_claims_what_is_not_known():
    assert Load(GEMMA) == Load(model=GEMMA, ahead=False, claim=None)
