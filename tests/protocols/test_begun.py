import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepalive.protocols import sse
from keepalive.protocols.begun import Begun

RESPONSE = {"id": "resp_1", "object": "response", "created_at": 7, "model": "m", "status": "in_progress"}


def event(kind, **fields):
    return sse.encode(json.dumps({"type": kind, **fields}), event=kind)


CREATED = event("response.created", sequence_number=0, response=RESPONSE | {"instructions": "secret"})


def begun(*pieces):
    told = Begun()
    for piece in pieces:
        told.feed(piece)
    return told


def test_nothing_has_begun_yet():
    assert (begun().next_number, begun().response(), begun().failed) == (0, {}, False)


def test_its_count_goes_on_and_its_names_stay_but_what_was_asked_is_not_repeated():
    text = event("response.output_text.delta", sequence_number=1, delta='"sequence_number":99')
    told = begun(b": keepalive\n\n", CREATED, text, b": keepalive\n\n")

    assert told.next_number == 2
    assert told.response() == {"id": "resp_1", "object": "response", "created_at": 7, "model": "m"}


def test_several_events_in_one_piece_count_to_the_last():
    assert begun(CREATED + event("x", sequence_number=1) + event("x", sequence_number=2)).next_number == 3


def test_a_first_event_that_is_too_long_to_be_kept_still_gives_its_id():
    told = begun(event("response.created", response=RESPONSE | {"instructions": "x" * 100_000}))

    assert told.response() == {"id": "resp_1"}


@pytest.mark.parametrize(
    ("data", "failed"),
    [
        (event("response.failed", response=RESPONSE), True),
        (event("response.output_text.delta", delta='"type":"response.failed"'), False),
        (event("response.mcp_call.failed"), False),
    ],
)
def test_whether_it_has_failed_in_its_own_words_is_seen(data, failed):
    assert begun(CREATED, data).failed is failed


@given(st.lists(st.binary() | st.sampled_from([CREATED, b'"sequence_number":', b"data: [[[\n\n"])))
def test_no_bytes_make_it_raise(pieces):
    told = begun(*pieces)

    assert told.next_number >= 0
    assert isinstance(told.response(), dict)
