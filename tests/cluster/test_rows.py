"""What members write for each other: what is written is read, and whatever else stands there hurts nobody."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keepalive.cluster import rows
from keepalive.cluster.rows import Holder, Intent, Member, Picture, Row, Told, Use, Wish
from keepalive.config import ConfigError, parse
from keepalive.core.facts import ModelId

GEMMA = ModelId("local", "Google/Gemma")
FOLDED = ModelId("local", "google/gemma")
QWEN = ModelId("local", "qwen")
# What a cluster of the release before this one has written, by its key; made by running one. Never to be changed.
PREVIOUS = json.loads((Path(__file__).parents[1] / "data" / "cluster" / "previous.json").read_text())


def seen(key: str, value: bytes, created: int = 7) -> Picture:
    return rows.picture([Row(key, value, created)])


def test_a_member_is_read_as_it_was_written():
    member = Member(
        "a",
        "5f",
        "vm",
        "1.1",
        "http://a:9235",
        "http://a:1235",
        frozenset({"local"}),
        True,
        {"local/x": "0"},
        {"local": "http://x"},
        created=7,
    )

    assert seen(rows.member_key("a"), rows.member_row(member)).members == {"a": member}


def test_a_holder_is_known_by_the_revision_at_which_it_became_one():
    assert seen("holders/local", rows.holder_row("a", "5f")).holders == {"local": Holder("a", "5f", 7)}


def test_a_load_is_found_in_whatever_case_the_key_is_written():
    intent = Intent("a", "5f", 7, expected=12.5, tells_loading=True, progress=0.25, number=3)

    assert seen(rows.load_key(GEMMA), rows.load_row(intent)).loads == {FOLDED: intent}


def test_uses_and_states_and_wishes_are_read_as_they_were_written():
    told = Told(
        True,
        frozenset({"gemma:2"}),
        "it is ill",
        "no",
        3,
        4.5,
        (1.0, 2.0),
        contested=True,
        lost=frozenset({"gemma"}),
    )
    use = Use(2, True, True, 9, frozenset({"gemma:2"}))

    assert seen("uses/b", rows.uses_row({GEMMA: use})).uses == {"b": {FOLDED: use}}
    assert seen("yields/local/google/gemma", rows.holder_row("a", "5f")).yields == {FOLDED: 0}
    assert seen("states/local", rows.states_row({GEMMA: told})).states == {"local": {FOLDED: told}}
    assert seen(rows.wish_key(GEMMA), rows.wish_row("5f", "1", warm=True)).wishes == {
        FOLDED: Wish(True, "5f", 7)
    }


def test_what_all_others_do_is_taken_together():
    uses = {"a": {FOLDED: Use(5, True)}, "b": {FOLDED: Use(1, False)}, "c": {FOLDED: Use(2, True)}}

    assert Picture(uses=uses).uses_elsewhere("a") == {FOLDED: Use(3, True)}


def test_each_others_copies_are_taken_together_too():
    uses = {"b": {FOLDED: Use(ours=frozenset({"x"}))}, "c": {FOLDED: Use(ours=frozenset({"y"}))}}

    assert Picture(uses=uses).uses_elsewhere("a") == {FOLDED: Use(ours=frozenset({"x", "y"}))}


def test_a_newer_member_may_say_more():
    value = json.dumps({"v": 2, "instance": "a", "life": "5f", "mood": {"good": True}}).encode()

    found = seen("holders/local", value)
    assert (found.holders, found.unreadable, found.newer) == (
        {"local": Holder("a", "5f", 7)},
        (),
        ("holders/local",),
    )


def previous(**more: Any) -> Picture:
    return rows.picture(
        Row(key, json.dumps({**said, **more}).encode(), 7, 9) for key, said in PREVIOUS.items()
    )


def test_what_the_release_before_this_one_writes_is_read():
    found = previous()

    a, b = "cb4c813e9333f6d9", "8ce377c4af92dfc4"
    config = {
        "google/gemma on local": 'keep "always", context_length 4096',
        "qwen on local": 'keep "auto"',
    }
    assert found.members == {
        name: Member(
            name,
            life,
            f"ward-{name}",
            "1.0.0",
            f"http://10.0.0.{n}:9235",
            f"http://10.0.0.{n}:1235",
            frozenset({"local"}),
            ready=False,
            config=config,
            places={"local": "http://10.0.0.9:1234"},
            created=7,
        )
        for n, name, life in ((1, "a", a), (2, "b", b))
    }
    assert found.holders == {"local": Holder("b", b, 7)}
    assert found.loads == {FOLDED: Intent("b", b, 7, None, tells_loading=False, progress=0.167)}
    assert found.uses == {"a": {FOLDED: Use(1, used=True), QWEN: Use(1, used=True)}}
    assert found.yields == {QWEN: 9}
    assert found.wishes == {QWEN: Wish(warm=False, life=a, created=7)}
    failure = "LM Studio says: insufficient memory"
    assert found.states == {
        "local": {
            FOLDED: Told(failure=failure, failures=1, retry_in=4.5),
            QWEN: Told(warm=True, ours=frozenset({"qwen"}), loads=(0.301, 0.3)),
        }
    }
    assert (found.unreadable, found.newer) == ((), ())


def test_whatever_a_newer_release_adds_to_that_is_passed_over_and_it_is_known_that_it_is_newer():
    one = previous(v=2, mood={"good": [True]}, warmth=3)

    assert {name: member.format for name, member in one.members.items()} == {"a": 2, "b": 2}
    assert sorted(one.newer) == sorted(PREVIOUS)
    assert (one.holders, one.loads, one.uses) == (previous().holders, previous().loads, previous().uses)
    assert (one.states, one.wishes, one.yields) == (previous().states, previous().wishes, previous().yields)
    assert one.unreadable == ()


def test_what_the_release_before_this_one_would_look_for_is_still_written():
    # Under the same key, with the same fields of the same kinds: it reads what is written here.
    member, intent = previous().members["a"], previous().loads[FOLDED]
    now = {
        "members/a": rows.member_row(member),
        "holders/local": rows.holder_row("b", "8ce377c4af92dfc4"),
        "loads/local/google/gemma": rows.load_row(intent),
        "states/local": rows.states_row(previous().states["local"]),
        "uses/a": rows.uses_row(previous().uses["a"]),
        "wishes/local/qwen": rows.wish_row("cb4c813e9333f6d9", "731d4597", warm=False),
    }

    for key, value in now.items():
        said = json.loads(value)
        assert {name: said[name] for name in PREVIOUS[key]} == PREVIOUS[key]
        assert said.keys() - PREVIOUS[key].keys() <= {"doubled"}


def test_a_wish_of_which_it_is_not_clear_what_is_wished_is_none():
    assert seen(rows.wish_key(GEMMA), b'{"v":2,"warm":"hot","life":"5f"}').wishes == {}


def test_no_config_can_call_a_member_what_stands_in_for_its_name():
    name = rows.stand_in("ward-a", "cb4c813e9333f6d9")

    assert (name, rows.named(name), rows.named("ward-a")) == ("ward-a~cb4c813e", "ward-a", "ward-a")
    with pytest.raises(ConfigError, match="instance"):
        parse(f'[cluster]\netcd = "http://x:1"\ninstance = "{name}"\n', "test", {})


def test_the_rows_of_the_first_release_are_read_for_ever():
    # As it writes them; whoever changes these lines breaks an upgrade one by one.
    load = b'{"expected":3.0,"instance":"a","life":"5f","progress":null,"tells_loading":true,"v":1}'
    state = (
        b'{"models":{"gemma":{"failure":null,"failures":0,"ill":null,"loads":[3.006],"ours":["gemma"],'
        b'"retry_in":null,"warm":true}},"v":1}'
    )

    assert seen("loads/local/gemma", load).loads == {
        ModelId("local", "gemma"): Intent("a", "5f", 7, 3.0, True)
    }
    assert seen("states/local", state).states["local"] == {
        ModelId("local", "gemma"): Told(True, frozenset({"gemma"}), loads=(3.006,))
    }


def test_a_load_that_cannot_be_read_is_still_a_load_and_a_holder_a_holder():
    assert seen("loads/local/gemma", b"\xff").loads == {ModelId("local", "gemma"): Intent("somebody", "", 7)}
    assert seen("holders/local", b"x" * 2**20).holders == {"local": Holder("somebody", "", 7)}
    assert seen("holders/local", b"[]").unreadable == ("holders/local",)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=8,
)
names = st.sampled_from(
    [
        "v",
        "instance",
        "life",
        "sees",
        "config",
        "uses",
        "models",
        "expected",
        "progress",
        "ours",
        "loads",
        "local",
    ]
)
keys = st.sampled_from(["members/", "holders/", "uses/", "loads/local/", "states/", "wishes/local/", ""])


@settings(max_examples=50)
@given(
    kind=keys, rest=st.text(max_size=9), said=st.dictionaries(names, values, max_size=4), v=st.integers(0, 3)
)
def test_no_garbage_under_our_prefix_raises(kind: str, rest: str, said: dict[str, Any], v: int):
    rows.picture([Row(kind + rest, json.dumps({"v": v, **said}).encode(errors="replace"), 1)])


@given(st.binary(max_size=200))
def test_no_bytes_under_our_prefix_raise(value: bytes):
    rows.picture([Row("uses/a", value, 1), Row("loads/a/b", value, 1)])


def test_what_could_move_a_cursor_is_not_passed_on():
    value = json.dumps({"v": 1, "life": "5f", "host": "\x1b[2J", "config": {"x": "\x1b[2J"}}).encode()
    member = seen("members/a", value).members["a"]

    assert (member.host, member.config) == ("", {"x": ""})
