"""What those see who ask for a model."""

from keepalive.core.keeping import View


def test_of_what_was_not_said_of_a_model_nothing_is_known_and_it_is_wanted():
    assert View("cold") == View(
        state="cold",
        reason=None,
        elapsed=None,
        eta=None,
        progress=None,
        instance_id=None,
        retry_after=None,
        max_wait=600.0,
        wanted=True,
        kind="llm",
        context_length=None,
        load_fields={},
        stall_timeout=None,
        resting=None,
        questioned=False,
    )
