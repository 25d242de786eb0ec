"""Pings of one's own: a path, and a body that is JSON in the end."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keepalive.config import ConfigError, Ping
from tests.kit.configs import MODEL, mistakes, parse

BODY = {"query": "q", "documents": ["a", "b"]}
KNOWN = '"auto" or "off", or { path = "/v1/rerank", body = { … } }'
EXAMPLE = '{ query = "ping", documents = ["ping"] }'
OWN = "KEEPALIVE_MODELS__0__PING"


@pytest.mark.parametrize(
    ("text", "environ"),
    [
        ('ping = { path = "/v1/rerank", body = { query = "q", documents = ["a", "b"] } }', {}),
        ('[models.ping]\npath = "/v1/rerank"\n[models.ping.body]\nquery = "q"\ndocuments = ["a", "b"]', {}),
        ("""ping = { path = "/v1/rerank", body = '{"query": "q", "documents": ["a", "b"]}' }""", {}),
        ("", {OWN: '{ path = "/v1/rerank", body = { query = "q", documents = ["a", "b"] } }'}),
        ("", {f"{OWN}__PATH": "/v1/rerank", f"{OWN}__BODY": '{"query": "q", "documents": ["a", "b"]}'}),
        (
            'ping = "off"',
            {
                f"{OWN}__PATH": "/v1/rerank",
                f"{OWN}__BODY__QUERY": "q",
                f"{OWN}__BODY__DOCUMENTS": '["a", "b"]',
            },
        ),
        (
            'ping = { path = "/x", body = { query = "q", documents = ["a", "b"] } }',
            {f"{OWN}__PATH": "/v1/rerank"},
        ),
    ],
)
def test_a_ping_can_be_written_in_every_way_that_toml_and_variables_have(
    text: str, environ: dict[str, str]
) -> None:
    (kept,) = parse(f"{MODEL}{text}\n", environ).kept

    assert kept.ping == Ping(path="/v1/rerank", body=BODY)


@pytest.mark.parametrize(
    ("text", "environ", "ping"),
    [
        ("", {}, "auto"),
        ('ping = "off"', {}, "off"),
        ('ping = "auto"', {OWN: "off"}, "off"),
        ('ping = { path = "/x", body = {} }', {OWN: "off"}, "off"),
    ],
)
def test_a_ping_is_one_word_otherwise(text: str, environ: dict[str, str], ping: str) -> None:
    (kept,) = parse(f"{MODEL}{text}\n", environ).kept

    assert kept.ping == ping


def test_what_is_kept_with_a_ping_can_be_compared_and_not_changed() -> None:
    text = f'{MODEL}ping = {{ path = "/x", body = {{ a = 1 }} }}\n'
    ((once,), (twice,)) = parse(text).kept, parse(text).kept

    assert (once, hash(once)) == (twice, hash(twice))
    assert isinstance(once.ping, Ping)
    with pytest.raises(TypeError):
        once.ping.body["a"] = 2  # type: ignore[index]  # what the test is about
    with pytest.raises(ValueError):
        setattr(once.ping, "path", "/y")  # noqa: B010  # mypy knows that it is frozen


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ('"of"', '"of" is not known; write "off"'),
        ('"OFF"', '"OFF" is not known; write "off"'),
        ("false", 'false is not known; write "off"'),
        ("true", 'true is not known; write "auto"'),
        ('"/v1/rerank"', f'"/v1/rerank" is not known; write {KNOWN}'),
        ("5", f"5 is not known; write {KNOWN}"),
        ("[]", f"a list is not known; write {KNOWN}"),
    ],
)
def test_a_ping_that_is_none(value: str, message: str) -> None:
    assert mistakes(f"{MODEL}ping = {value}\n") == [f"3: models[0].ping: {message}"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ('"v1/rerank"', '"v1/rerank" is no path from "/"; write "/v1/rerank"'),
        ('"http://box:1234/v1/x?y=1"', '"http://box:1234/v1/x?y=1" is no path from "/"; write "/v1/x"'),
        ('"/v1/x?y=1"', '"/v1/x?y=1" is no path from "/"; write "/v1/x"'),
        ('"/v1/x#y"', '"/v1/x#y" is no path from "/"; write "/v1/x"'),
        ('"//box/x"', '"//box/x" is no path from "/"; write "/box/x"'),
        ('"/v1/../x"', '"/v1/../x" is no path from "/"; write "/v1/rerank"'),
        ('"/v1/a b"', '"/v1/a b" is no path from "/"; write "/v1/rerank"'),
        ('"/a\\r\\nHost: x"', '"/a\\r\\nHost: x" is no path from "/"; write "/v1/rerank"'),
        ('"/"', '"/" is no path from "/"; write "/v1/rerank"'),
        ('""', '"" is no path from "/"; write "/v1/rerank"'),
        ("1", "1 is no text; write it in quotes"),
        (
            '"/api/v1/models/load"',
            '"/api/v1/models/load" changes what is loaded, and a ping only asks; write a route that '
            'answers, such as "/v1/rerank"',
        ),
        (
            '"/API/v1/models/unload"',
            '"/API/v1/models/unload" changes what is loaded, and a ping only asks; write a route that '
            'answers, such as "/v1/rerank"',
        ),
    ],
)
def test_a_path_with_a_mistake(path: str, message: str) -> None:
    report = mistakes(f"{MODEL}ping = {{ path = {path}, body = {{}} }}\n")

    assert report == [f"3: models[0].ping.path: {message}"]


@pytest.mark.parametrize(
    ("body", "report"),
    [
        (
            "{ model = 'gemma' }",
            ["body.model: is put in by keepalive, which knows the copy that it asks; leave it out"],
        ),
        (
            "{ stream = true }",
            ["body.stream: makes the answer a stream, and a ping reads a whole one; leave it out"],
        ),
        (
            "{ day = 2026-11-22 }",
            ["body.day: 2026-11-22 is a date or a time, which JSON does not have; write it in quotes"],
        ),
        (
            "{ a = { b = [1, 08:00:00] } }",
            ["body.a.b[1]: 08:00:00 is a date or a time, which JSON does not have; write it in quotes"],
        ),
        (
            "{ a = nan, b = [[-inf]], c = [{ d = inf }] }",
            [
                "body.a: nan is no number that JSON has; write another one",
                "body.b[0][0]: -inf is no number that JSON has; write another one",
                "body.c[0].d: inf is no number that JSON has; write another one",
            ],
        ),
        (
            f"{{ seed = 0x{'f' * 9000} }}",
            ["body.seed: is too large a number; write one of at most 63 bits"],
        ),
        (
            "{ a." + ".".join("a" * 40) + " = 1 }",
            [f"body{'.a' * 33}: lies in more than 32 tables and lists; write a flatter body"],
        ),
        ("[1]", [f"body: a list is no table; write {EXAMPLE}"]),
        ("1", [f"body: 1 is no table; write {EXAMPLE}"]),
        ("'[1]'", [f"body: a list is no table; write {EXAMPLE}"]),
        (
            "'hunter2'",
            [f"body: is no JSON: Expecting value at character 1; write {EXAMPLE}"],
        ),
        (
            """'{"query" "hunter2"}'""",
            [f"body: is no JSON: Expecting ':' delimiter at character 10; write {EXAMPLE}"],
        ),
        ("'{\"query\": NaN}'", [f"body: is no JSON that can be read; write {EXAMPLE}"]),
        (f"'{'[' * 100_000}'", [f"body: is no JSON that can be read; write {EXAMPLE}"]),
        (
            '\'{"query": ["\\ud800"]}\'',
            ["body.query[0]: holds half of a character, which cannot be sent; write it anew"],
        ),
        (
            """'{"\\ud800": 1}'""",
            ['body."\ufffd\ufffd\ufffd": holds half of a character, which cannot be sent; write it anew'],
        ),
        (
            '\'{"model": "gemma", "stream": "true"}\'',
            [
                "body.model: is put in by keepalive, which knows the copy that it asks; leave it out",
                "body.stream: makes the answer a stream, and a ping reads a whole one; leave it out",
            ],
        ),
    ],
)
def test_a_body_that_cannot_be_sent(body: str, report: list[str]) -> None:
    told = mistakes(f'{MODEL}ping = {{ path = "/x", body = {body} }}\n')

    assert told == [f"3: models[0].ping.{line}" for line in report]


def test_a_mistake_in_a_table_below_is_told_with_its_own_line() -> None:
    report = mistakes(
        f"""{MODEL}
        [models.ping]
        pth = "/x"

        [models.ping.body]
        stream = true
        after = 2026-11-22T10:00:00Z

        [[models]]
        key = "qwen"
        ping = {{ path = "/x" }}
        """
    )

    assert report == [
        '4: models[0].ping.path: is missing; write path = "/v1/rerank"',
        "5: models[0].ping.pth: is unknown; write path",
        "8: models[0].ping.body.stream: makes the answer a stream, and a ping reads a whole one; leave it out",
        "9: models[0].ping.body.after: 2026-11-22 10:00:00+00:00 is a date or a time, which JSON does not "
        "have; write it in quotes",
        f"13: models[1].ping.body: is missing; write body = {EXAMPLE}",
    ]


def test_a_mistake_in_a_variable_is_told_with_its_name() -> None:
    report = mistakes(MODEL, {f"{OWN}__PATH": "rerank", f"{OWN}__BODY": "{}}", f"{OWN}__BODY__QUERY": "q"})

    assert sorted(report) == [
        f"{OWN}__BODY: models[0].ping.body: is no JSON: Extra data at character 3; write {EXAMPLE}",
        f"{OWN}__BODY__QUERY: is no setting; write one such as KEEPALIVE_SERVER__LISTEN, or "
        "KEEPALIVE_MODELS__0__KEY and so on",
        f'{OWN}__PATH: models[0].ping.path: "rerank" is no path from "/"; write "/rerank"',
    ]


def test_a_variable_says_a_part_only_of_what_may_be_a_table() -> None:
    report = mistakes(MODEL, {"KEEPALIVE_MODELS__0__KEY__X": "1", OWN: "off", f"{OWN}__PATH": "/x"})

    assert [line.partition(":")[0] for line in report] == ["KEEPALIVE_MODELS__0__KEY__X", f"{OWN}__PATH"]


texts = st.text(st.characters(codec="utf-8"), max_size=8)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63) + 1, 2**63 - 1) | st.floats(allow_nan=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
).filter(lambda value: "Infinity" not in json.dumps(value))
bodies = st.dictionaries(texts.filter(lambda name: name not in ("model", "stream")), json_values, max_size=4)


@settings(deadline=None)
@given(bodies)
def test_any_json_object_is_a_body_and_is_sent_as_it_is(body: dict[str, Any]) -> None:
    (kept,) = parse(MODEL, {f"{OWN}__PATH": "/x", f"{OWN}__BODY": json.dumps(body, ensure_ascii=False)}).kept

    assert isinstance(kept.ping, Ping)
    assert json.loads(json.dumps({**kept.ping.body}, allow_nan=False)) == body


@settings(deadline=None)
@given(st.text(max_size=20) | st.text('{}[]",:0 aé\ud800\\', max_size=20))
def test_any_text_is_a_body_that_can_be_sent_or_a_report(text: str) -> None:
    try:
        (kept,) = parse(MODEL, {f"{OWN}__PATH": "/x", f"{OWN}__BODY": text or "{}"}).kept
    except ConfigError as refused:
        told, sent = str(refused), b"{}"
    else:
        assert isinstance(kept.ping, Ping)
        told, sent = "", json.dumps({**kept.ping.body}, allow_nan=False, ensure_ascii=False).encode()

    assert all(line.isprintable() for line in told.splitlines())
    assert sent.startswith(b"{")
