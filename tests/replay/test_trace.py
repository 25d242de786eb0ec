"""Traces and models from files, and what is said of files that are none."""

import json
from datetime import UTC, datetime

import pytest

from keepalive.replay import Card, Request, TraceError, read_cards, read_requests


def test_requests_are_read_in_any_order_of_lines_and_columns():
    text = "# made up\nmodel,second,answer_seconds,more\nb,20.5,3,x\n# in between\na,10,0,y\n"

    assert read_requests(text.splitlines(keepends=True), "t.csv") == [
        Request(10.0, "a", 0.0),
        Request(20.5, "b", 3.0),
    ]


def test_models_are_read():
    text = "model,gigabytes,load_seconds,answer_seconds\nqwen/a,4.5,15,5\n"

    assert read_cards(text.splitlines(keepends=True), "m.csv") == [Card("qwen/a", 4_500_000_000, 15.0)]


HEAD = "second,model,answer_seconds\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "t: its first line names no second; write second,model,answer_seconds"),
        ("second,answer_seconds\n", "t: its first line names no model; write second,model,answer_seconds"),
        (HEAD, "t: there is no request in it; write lines with second,model,answer_seconds"),
        (HEAD + "1,a,2\nsoon,a,3\n", 't:3: second "soon" is no number from -1e+10 to 1e+10'),
        (HEAD + "1,a,-1\n", 't:2: answer_seconds "-1" is no number from 0 to 1e+10'),
        (HEAD + "# x\n1,a,nan\n", 't:3: answer_seconds "nan" is no number from 0 to 1e+10'),
        (HEAD + "1,,2\n", "t:2: model is no name of a model; write its key"),
        (HEAD + "1,a\n", 't:2: answer_seconds "" is no number from 0 to 1e+10'),
        (HEAD + "1,\x1b[2J,2\n", "t:2: model is no name of a model; write its key"),
    ],
)
def test_what_is_no_trace_is_said_with_its_line(text: str, message: str):
    with pytest.raises(TraceError) as raised:
        read_requests(text.splitlines(keepends=True), "t")

    assert str(raised.value) == message


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("a,0,1", "m:2: a takes no memory; write gigabytes above 0"),
        ("a,much,1", 'm:2: gigabytes "much" is no number from 0 to 1e+06'),
        ("a,1,1e9", 'm:2: load_seconds "1e9" is no number from 0 to 86400'),
        ("a,1,1\na,2,2", "m:3: a stands there a second time; leave one of them out"),
    ],
)
def test_what_is_no_table_of_models_is_said_with_its_line(row: str, message: str):
    with pytest.raises(TraceError) as raised:
        read_cards(f"model,gigabytes,load_seconds\n{row}\n".splitlines(keepends=True), "m")

    assert str(raised.value) == message


LINE = {"event": "proxy.request", "model": "a", "seconds": 20.0, "waited": 12.5, "outcome": "ok"}


def test_the_daemons_own_log_is_a_trace():
    lines = [
        json.dumps({"event": "daemon.started", "timestamp": "2026-11-22T10:00:00Z"}),
        json.dumps({**LINE, "timestamp": "2026-11-22T10:01:00.500000Z"}),
        json.dumps({**LINE, "model": None, "timestamp": "2026-11-22T10:02:00Z"}),
        "torn",
        json.dumps({**LINE, "seconds": "long", "timestamp": "2026-11-22T10:02:00Z"}),
    ]
    began = datetime(2026, 11, 22, 10, 0, 40, 500_000, tzinfo=UTC).timestamp()

    assert read_requests(lines, "log") == [Request(began, "a", 7.5)]


def test_so_is_its_journal():
    entry = {"__REALTIME_TIMESTAMP": "1795341700000000", "MESSAGE": json.dumps(LINE)}
    other = {"__REALTIME_TIMESTAMP": "1795341700000000", "MESSAGE": "Started keepalive."}

    assert read_requests([json.dumps(other), json.dumps(entry)], "j") == [Request(1795341680.0, "a", 7.5)]


def test_a_log_without_a_request_is_said():
    with pytest.raises(TraceError, match="no line of this log tells of a request"):
        read_requests(['{"event": "daemon.started"}'], "log")
