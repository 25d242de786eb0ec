"""What becomes of a question that was not answered as it should be."""

import pytest

from keepalive.core.facts import Tier
from keepalive.keeper.errands import _what_came_of_it
from keepalive.lmstudio import wire

MINJA = "Value is not callable: null at row 1, column 60:\n{%- if messages[0].content is string %}"
EXECUTING = "\n------------\nWhile executing CallExpression at line 189, column 32 in source: no"


@pytest.mark.parametrize(
    ("status", "message", "outcome"),
    [
        (400, "anything that is wrong with the request", "refused"),
        (200, 'Error rendering prompt with jinja template: "Unknown test: sequence".', "refused"),
        (500, "Conversation roles must alternate user/assistant/user/assistant/...", "refused"),
        (500, MINJA, "refused"),
        (500, EXECUTING, "refused"),
        (500, "the engine said something odd", "error"),
        (200, "the engine said something odd", "error"),
        (400, "The model has crashed without additional information.", "error"),
        (429, "too many requests", "timeout"),
    ],
)
def test_a_ping_that_only_the_template_does_not_take_is_no_illness(status: int, message: str, outcome: str):
    error = wire.refusal(status, {"error": {"message": message}})

    assert error is not None
    assert _what_came_of_it(error, Tier.V1)[0] == outcome
