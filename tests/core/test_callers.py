"""Those who ask: what is known of a request that says nothing more, and what is never told of them."""

from keepalive.core.callers import Begun, Key, Outcome, Seen


def test_outcomes_go_by_the_words_that_metrics_and_logs_know():
    assert list(Outcome) == [
        "ok",
        "empty",
        "client_gone",
        "upstream_error",
        "timeout",
        "cut",
        "stalled",
        "rejected",
    ]


def test_a_key_is_told_without_its_secret():
    assert repr(Key("agent", "s3cr3t")) == "Key(name='agent')"


def test_of_what_was_not_said_of_a_request_nothing_is_known():
    assert Begun("agent") == Begun(opening="agent", mostly=False)
    assert Seen(None, "/v1/models", None, Outcome.OK, 200) == Seen(
        model=None,
        route="/v1/models",
        key=None,
        outcome=Outcome.OK,
        status=200,
        start=None,
        begun=None,
        wait_seconds=0.0,
        first_token_seconds=None,
        seconds=0.0,
        bytes=0,
        events=0,
        gaps=(),
        gap_seconds=0.0,
    )
