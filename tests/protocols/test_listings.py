"""Several listings as one: each row in its own shape, one row for each name."""

import json

import pytest

from keepalive.protocols.listings import Listing, merged

NEWER = {
    "key": "acme/tiny-4b",
    "type": "llm",
    "loaded_instances": [{"id": "acme/tiny-4b"}],
    "size_bytes": 2**53 + 1,
}


def listing(*rows, name="data", **more):
    return Listing(json.dumps({**more, name: list(rows)}).encode(), name)


def rows(found, name="data"):
    return json.loads(found)[name]


def test_rows_of_all_upstreams_stand_in_their_order_and_the_first_wins_for_an_equal_name():
    a, b = (
        listing({"id": "x", "at": "a"}, {"id": "y"}, object="list"),
        listing({"id": "z"}, {"id": "X", "at": "b"}),
    )

    found = merged([(a, {}), (b, {})], "data")

    assert json.loads(found) == {"object": "list", "data": [{"id": "x", "at": "a"}, {"id": "y"}, {"id": "z"}]}


def test_a_list_with_nothing_around_it_becomes_the_listing_that_clients_read():
    bare = Listing(b'[{"id":"x"}]', "data")

    found = merged([(bare, {"x": ["y"]}), (listing({"id": "z"}), {})], "data")

    assert json.loads(found) == {"object": "list", "data": [{"id": "x"}, {"id": "z"}, {"id": "y"}]}
    with pytest.raises(ValueError, match="no listing"):
        Listing(b"[]", "models")


def test_an_alias_is_a_copy_of_the_row_of_its_key_in_the_shape_that_was_asked_for():
    openai = listing({"id": "Acme/Tiny-4b", "object": "model", "owned_by": "ä"})
    native = listing(NEWER, name="models")

    assert rows(merged([(openai, {"acme/tiny-4b": ["gpt-4o", "it"]})], "data")) == [
        {"id": "Acme/Tiny-4b", "object": "model", "owned_by": "ä"},
        {"id": "gpt-4o", "object": "model", "owned_by": "ä"},
        {"id": "it", "object": "model", "owned_by": "ä"},
    ]
    assert rows(merged([(native, {"acme/tiny-4b": ["it"]})], "models"), "models") == [
        NEWER,
        {**NEWER, "key": "it"},
    ]


def test_an_alias_of_what_is_not_listed_is_not_listed():
    assert rows(merged([(listing({"id": "x"}), {"gone": ["it"]})], "data")) == [{"id": "x"}]


def test_an_alias_stands_in_for_a_model_that_is_called_like_it():
    found = merged(
        [(listing({"id": "x", "n": 1}), {"x": ["IT"]}), (listing({"id": "it", "n": 2}), {})], "data"
    )

    assert rows(found) == [{"id": "x", "n": 1}, {"id": "IT", "n": 1}]


def test_rows_without_a_name_pass():
    assert rows(merged([(listing({"n": 1}, {"id": 7}), {})], "data")) == [{"n": 1}, {"id": 7}]


@pytest.mark.parametrize(
    "body",
    [b"", b"{}", b"[]", b'{"data":7}', b'{"data":["x"]}', b'{"error":"no"}', b"[" * 100_000, b"<html>"],
)
def test_what_is_no_listing_is_told(body):
    with pytest.raises(ValueError, match=r".*"):
        Listing(body, "data")
