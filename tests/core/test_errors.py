"""What can go wrong, and what each error says."""

import pytest

from keepalive.core.errors import (
    Cut,
    KeepaliveError,
    NotWarm,
    Reason,
    Refused,
    TimedOut,
    Unauthorized,
    Unexpected,
    Unreachable,
    UpstreamError,
    says_loading,
)

OF_UPSTREAM = [
    Unreachable("why"),
    TimedOut("why"),
    Cut("why"),
    Unauthorized("why"),
    Unexpected("why"),
    Refused("why", reason=Reason.OTHER, status=500),
]


@pytest.mark.parametrize("error", OF_UPSTREAM, ids=lambda error: type(error).__name__)
def test_what_lm_studio_did_not_do_is_caught_as_one_kind_and_says_why(error: Exception):
    assert isinstance(error, UpstreamError)
    assert isinstance(error, KeepaliveError)
    assert str(error) == "why"


def test_a_model_that_does_not_get_warm_says_why_and_when_it_is_tried_again():
    error = NotWarm("no memory", 5.0)

    assert (str(error), error.retry_after, NotWarm("no memory").retry_after) == ("no memory", 5.0, None)
    assert not isinstance(error, UpstreamError)


def test_a_closed_port_is_told_from_a_broken_way():
    assert Unreachable("why", refused=True).refused is True
    assert Unreachable("why", tls=True).tls is True
    assert Unreachable("why").refused is Unreachable("why").tls is False


def test_an_answer_has_a_status_when_it_came_whole():
    assert Unexpected("why", status=404).status == 404
    assert Unexpected("why").status is None


def test_a_refusal_says_its_reason_and_what_was_sent():
    error = Refused("why", reason=Reason.CRASHED, status=200)

    assert (error.reason, error.status) == (Reason.CRASHED, 200)


def test_reasons_go_by_the_words_that_logs_and_metrics_know():
    assert list(Reason) == [
        "resources",
        "crashed",
        "unloaded",
        "unknown_model",
        "unknown_route",
        "unauthorized",
        "load_failed",
        "in_use",
        "loading",
        "other",
    ]


@pytest.mark.parametrize(
    ("text", "is_loading"),
    [
        ("Loading model", True),
        ("the model is still LOADING", True),
        ("<h1>Not<br>ready</h1>", True),
        ("not yet ready", True),
        ("initialising", True),
        ("warming up the cache", True),
        ("the endpoint is waking up", True),
        ("Model is being loaded, try again", True),
        ("the engine is still being initialised", True),
        ("model not loaded yet", True),
        ("the model has not been initialized yet", True),
        ("model is not yet loaded", True),
        ("model is not loaded", False),
        ("has been loaded", False),
        ("error loading model", False),
        ("failed loading", False),
        ("downloading", False),
        ("busy loading", False),
        ("loading failed", False),
        ("too many requests while starting", False),
        ("no upstream", False),
        ("x" * 4088 + " loading", True),  # a page of any length is read no further
        ("x" * 4089 + " loading", False),
    ],
    ids=range(23),
)
def test_a_server_that_is_still_on_its_way_is_told_from_one_that_fails(text: str, is_loading: bool):
    assert says_loading(text) is is_loading
