"""The feed: what is told to those who watch, and that nothing is lost on the way."""

import asyncio
import json
from collections.abc import Mapping
from typing import Any

import pytest

from keepalive.observers import feed
from keepalive.observers.feed import Feed, difference


def status(**states: str) -> dict[str, Any]:
    """A status document with these models; the daemon's fields stand for all others at the top."""
    models = [{"upstream": "local", "key": key, "state": state} for key, state in states.items()]
    return {
        "now": "2026-11-22T10:00:00.000Z",
        "ready": True,
        "upstreams": [{"name": "local", "state": "up"}],
        "models": models,
    }


class World:
    """A daemon's status that a test writes; counts how often it is rendered."""

    def __init__(self, **states: str) -> None:
        self.document = status(**states)
        self.rendered = 0
        self.feed = Feed(self.status)

    def status(self) -> Mapping[str, Any]:
        self.rendered += 1
        return self.document

    def becomes(self, **states: str) -> None:
        self.document = status(**states)
        self.feed.changed()


def documents(events: bytes) -> list[dict[str, Any]]:
    found = []
    for event in events.decode().split("\n\n")[:-1]:
        number, data = event.split("\n")
        document = json.loads(data.removeprefix("data: "))
        assert number == f"id: {document['id']}"
        found.append(document)
    return found


def states(document: Mapping[str, Any]) -> dict[str, str]:
    return {model["key"]: model["state"] for model in document["models"]}


# --- what differs -----------------------------------------------------------------------------------


def test_what_differs_is_those_models_alone_and_all_that_stands_at_the_top() -> None:
    change = difference(status(a="warm", b="cold"), {**status(a="warm", b="loading"), "ready": False})

    assert change == {
        "partial": True,
        "now": "2026-11-22T10:00:00.000Z",
        "ready": False,
        "upstreams": [],
        "models": [{"upstream": "local", "key": "b", "state": "loading"}],
    }


def test_that_time_passes_is_no_difference() -> None:
    assert difference(status(a="warm"), {**status(a="warm"), "now": "2026-11-22T10:00:01.000Z"}) is None


@pytest.mark.parametrize("after", [status(a="warm"), status(a="warm", c="cold"), status(b="cold", a="warm")])
def test_other_models_than_before_or_in_another_order_are_a_whole_document(after: dict[str, Any]) -> None:
    change = difference(status(a="warm", b="cold"), after)

    assert change == after
    assert "partial" not in change


def test_a_field_or_an_upstream_that_changed_is_a_difference_without_models() -> None:
    reloaded = difference(status(a="warm"), {**status(a="warm"), "ready": False})
    down = difference(
        status(a="warm"), {**status(a="warm"), "upstreams": [{"name": "local", "state": "down"}]}
    )

    assert reloaded is not None
    assert down is not None
    assert (reloaded["models"], reloaded["ready"]) == ([], False)
    assert (down["models"], down["upstreams"]) == ([], [{"name": "local", "state": "down"}])


# --- whoever follows --------------------------------------------------------------------------------


async def test_whoever_has_the_newest_is_told_nothing_until_something_changes() -> None:
    world = World(a="cold")
    seen = world.feed.place(world.feed.look()["id"])
    assert seen is not None
    world.feed.watching = 1
    waiting = asyncio.create_task(world.feed.next(seen, partial=True))
    await asyncio.sleep(0.01)
    was_quiet = not waiting.done()
    world.becomes(a="warm")
    world.feed.push()
    number, event = await waiting

    assert was_quiet
    assert [states(d) for d in documents(event)] == [{"a": "warm"}]
    assert number == seen + 1


async def test_a_change_between_reading_and_following_is_not_lost() -> None:
    world = World(a="cold", b="cold")
    read = world.feed.look()["id"]
    world.becomes(a="warm", b="cold")
    seen = world.feed.place(read)
    assert seen is not None
    _, event = await world.feed.next(seen, partial=True)

    assert [states(d) for d in documents(event)] == [{"a": "warm"}]


async def test_a_change_that_somebody_else_saw_first_is_not_lost_either() -> None:
    """There and back again: only the change tells the one who had read in between."""
    world = World(a="cold")
    world.feed.look()
    world.becomes(a="warm")
    read = world.feed.look()["id"]
    world.becomes(a="cold")
    world.feed.look()
    seen = world.feed.place(read)
    assert seen is not None
    _, event = await world.feed.next(seen, partial=True)

    assert [states(d) for d in documents(event)] == [{"a": "cold"}]


async def test_whoever_fell_behind_gets_the_changes_in_their_order_or_all_of_it_anew() -> None:
    world = World(a="cold", b="cold")
    first = world.feed.look()["id"]
    world.becomes(a="loading", b="cold")
    world.feed.look()
    world.becomes(a="loading", b="warm")
    world.feed.look()
    seen = world.feed.place(first)
    assert seen is not None
    _, event = await world.feed.next(seen, partial=True)
    for number in range(feed.CHANGES_REMEMBERED):
        world.becomes(a="cold" if number % 2 else "warm", b="cold")
        world.feed.look()
    _, late = await world.feed.next(seen, partial=True)

    assert [states(d) for d in documents(event)] == [{"a": "loading"}, {"b": "warm"}]
    assert [states(d) for d in documents(late)] == [{"a": "cold", "b": "cold"}]
    assert world.feed.place(first) is None


@pytest.mark.parametrize(
    "after", ["", "1", "x-1", "{life}", "{life}-", "{life}--1", "{life}-²", "{life}-7", "{life}-1.0"]
)
def test_an_id_of_another_life_or_of_none_has_no_place(after: str) -> None:
    world = World(a="cold")
    life = world.feed.look()["id"].partition("-")[0]

    assert world.feed.place(after.format(life=life)) is None


def test_lives_differ() -> None:
    assert World().feed.look()["id"] != World().feed.look()["id"]


async def test_what_changes_is_rendered_once_for_all_who_watch() -> None:
    world = World(a="cold")
    feeding = asyncio.create_task(world.feed.run())
    seen = world.feed.place(world.feed.look()["id"])
    assert seen is not None
    world.feed.watching = 200
    watching = [asyncio.create_task(world.feed.next(seen, partial=number % 2 == 0)) for number in range(200)]
    await asyncio.sleep(0)
    rendered = world.rendered
    world.becomes(a="warm")
    events = [event for _, event in await asyncio.gather(*watching)]
    feeding.cancel()

    assert world.rendered == rendered + 1
    assert {len(documents(event)) for event in events} == {1}
    assert len({id(event) for event in events[1::2]}) == 1


async def test_nothing_is_rendered_while_nobody_watches() -> None:
    world = World(a="cold")
    feeding = asyncio.create_task(world.feed.run())
    for state in ("loading", "warm", "cold"):
        world.becomes(a=state)
        await asyncio.sleep(0.01)
    rendered = world.rendered
    feeding.cancel()

    assert rendered == 0


async def test_a_fact_that_shows_nowhere_wakes_nobody() -> None:
    world = World(a="cold")
    feeding = asyncio.create_task(world.feed.run())
    seen = world.feed.place(world.feed.look()["id"])
    assert seen is not None
    world.feed.watching = 1
    waiting = asyncio.create_task(world.feed.next(seen, partial=True))
    rendered = world.rendered
    world.feed.changed()
    while world.rendered == rendered:
        await asyncio.sleep(0.01)
    was_quiet = not waiting.done()
    waiting.cancel()
    feeding.cancel()

    assert was_quiet
    assert world.feed.number == seen
