"""What becomes of a question that was not answered as it should be."""

import pytest

from keepalive.core.errors import Unexpected
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
        (409, "another answer is under way", "timeout"),
        (503, "the queue is full", "timeout"),
        (500, "this model requires an image input", "refused"),
        (200, "an audio file is required", "refused"),
        (500, "the image encoder is lost", "error"),
        (400, "Failed to load image or audio file", "refused"),
        (400, "Failed to load model", "error"),
    ],
)
def test_a_ping_that_only_the_template_does_not_take_is_no_illness(status: int, message: str, outcome: str):
    error = wire.refusal(status, {"error": {"message": message}})

    assert error is not None
    assert _what_came_of_it(error, Tier.V1)[0] == outcome


@pytest.mark.parametrize(
    ("status", "tier", "outcome"),
    [
        (400, Tier.V1, "refused"),
        (400, Tier.OPENAI, "refused"),
        (404, Tier.V1, "refused"),
        (404, Tier.OPENAI, "error"),
        (413, Tier.V1, "refused"),
        (503, Tier.V1, "timeout"),
        (500, Tier.V1, "error"),
        (502, Tier.V1, "error"),
        (None, Tier.V1, "error"),
    ],
)
def test_a_page_says_by_its_status_what_an_answer_of_the_server_says(
    status: int | None, tier: Tier, outcome: str
):
    assert _what_came_of_it(Unexpected("a page", status=status), tier)[0] == outcome


def test_the_words_of_a_refusal_are_found_in_the_layouts_of_other_servers():
    answers: list[wire.Json] = [
        {"object": "error", "message": "it wants an image", "code": 400},
        {"detail": [{"loc": ["body"], "msg": "it wants an image"}, {"msg": 1}, 2]},
        {"detail": "it wants an image"},
    ]

    assert [str(wire.refusal(400, answer)) for answer in answers] == ["it wants an image"] * 3
    assert str(wire.refusal(422, {"detail": [{"loc": []}]})) == "HTTP 422"
