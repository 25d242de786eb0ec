"""Openings in memory: those of files, and what is learned from requests."""

import json
from typing import Any

import pytest

from keepalive.config import Opening
from keepalive.core.facts import ModelId
from keepalive.protocols.routes import Protocol
from keepalive.service.openings import DAY, LEARNED, LEARNED_BYTES, LOOKED_INTO, MARKS, Openings
from tests.kit.configs import parse

GEMMA = ModelId("local", "gemma")
CHAT = Protocol.CHAT


class World:
    def __init__(self, *prime: str, files: tuple[Opening, ...] = ()) -> None:
        self.now = 0.0
        self.told: list[tuple[str, ...]] = []
        self.openings = Openings(lambda: self.now, lambda _, names: self.told.append(names))
        self.files = files
        self.configure(*prime)

    def configure(self, *prime: str) -> None:
        config = parse(f'[[models]]\nkey = "gemma"\nprime = {json.dumps(prime)}\n')
        self.openings.configure({("local", "gemma"): self.files}, config.kept)

    def asks(self, system: str, said: str = "hi", **more: Any) -> str | None:
        body = {"messages": [system_of(system), {"role": "user", "content": said}], **more}
        begun = self.openings.note(GEMMA, CHAT, json.dumps(body).encode())
        return None if begun is None else begun.opening

    def replayed(self) -> list[str]:
        """What would be replayed now, by what its system message says first."""
        found = []
        for name in self.told[-1]:
            replay = self.openings.look_up(GEMMA, name)
            assert replay is not None
            found.append(replay[1]["messages"][0]["content"].split()[0])
        return found


def system_of(text: str, size: int = 2000) -> dict[str, str]:
    return {"role": "system", "content": f"{text} {'x' * size}"}


def test_what_two_requests_begin_with_is_learned_and_what_one_does_is_not() -> None:
    world = World("learn")

    world.asks("one")
    assert world.told == []
    world.asks("two")
    world.asks("one", "another question")

    assert world.replayed() == ["one"]


def test_what_is_learned_is_replayed_as_it_was_sent_numbers_and_order_and_all() -> None:
    world = World("learn")
    tools = [{"function": {"parameters": {"z": 10, "a": 1.5, "big": 2**63}}}]
    for said in "ab":
        world.asks("agent", said, tools=tools, chat_template_kwargs={"thinking": False}, temperature=0.3)

    (name,) = world.told[0]

    path, body = world.openings.look_up(GEMMA, name) or ("", {})
    assert path == "/v1/chat/completions"
    assert json.dumps(body["tools"]) == json.dumps(tools)
    assert body["messages"] == [system_of("agent"), {"role": "user", "content": "."}]
    assert (body["chat_template_kwargs"], body["max_tokens"]) == ({"thinking": False}, 1)
    assert "temperature" not in body


def test_the_most_shared_ones_stay_and_no_more_than_a_few() -> None:
    world = World("learn")
    for n in range(LEARNED + 2):
        for _ in range(2 + n):
            world.asks(f"agent{n}")

    assert sorted(world.replayed()) == [f"agent{n}" for n in range(2, LEARNED + 2)]


def test_what_is_out_of_use_gives_way_to_what_is_in_use() -> None:
    world = World("learn")
    for n in range(LEARNED):
        for _ in range(20):
            world.asks(f"old{n}")
    for _ in range(4):
        world.now += DAY / 2
        for _ in range(6):
            world.asks("new")
    assert "new" in world.replayed()

    world.now += 4 * DAY
    world.asks("new")

    assert world.replayed() == ["new"]


def test_what_nobody_has_begun_with_for_days_is_not_replayed() -> None:
    world = World("learn")
    world.asks("agent")
    world.asks("agent")

    world.now += 4 * DAY

    assert world.openings.look_up(GEMMA, world.told[-1][0]) is None


def test_memory_is_bounded_however_many_and_large_they_are() -> None:
    world = World("learn")
    for n in range(MARKS + 500):
        world.asks(f"with the date {n}")
    assert len(world.openings._learns[GEMMA]) == MARKS
    assert not any(seen.body for seen in world.openings._learns[GEMMA].values())

    for n in range(6):
        for _ in range(2):
            text = json.dumps({"messages": [system_of(str(n), LOOKED_INTO - 2000), {"role": "user"}]})
            world.openings.note(GEMMA, CHAT, text.encode())

    held = sum(len(seen.body) for seen in world.openings._learns[GEMMA].values())
    assert 0 < held <= LEARNED_BYTES


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{" * 3000,
        b"[" * 200_000,
        b"\xff" * 3000,
        b'{"messages": "' + b"x" * 3000 + b'"}',
        json.dumps({"messages": [system_of("\ud83d"), {"role": "user"}]}).encode(),
        json.dumps({"messages": [system_of("large", LOOKED_INTO), {"role": "user"}]}).encode(),
        json.dumps({"messages": [system_of("short", 10), {"role": "user"}], "pad": "x" * 3000}).encode(),
        b'{"messages": [{"role": "system", "content": ' + b"9" * 5000 + b"}]}",
    ],
)
def test_what_is_too_large_too_small_or_no_request_is_passed_over(body: bytes) -> None:
    world = World("learn")

    assert [world.openings.note(GEMMA, CHAT, body) for _ in range(3)] == [None] * 3
    assert world.told == []


def test_a_model_that_is_not_to_learn_learns_nothing() -> None:
    world = World("agent.json")
    world.asks("one")
    world.asks("one")
    assert (world.told, world.openings.wants(GEMMA)) == ([], False)

    world.configure("learn")
    assert world.openings.wants(GEMMA)
    world.asks("one")
    world.asks("one")
    (name,) = world.told[-1]
    world.configure("learn")
    assert world.openings.look_up(GEMMA, name) is not None
    world.configure()

    assert world.openings.look_up(GEMMA, name) is None


def test_a_request_that_begins_as_a_file_does_is_known_by_it_and_not_learned_beside_it() -> None:
    body = {"messages": [system_of("agent"), {"role": "user", "content": "as recorded"}], "model": "gemma"}
    world = World("learn", files=(Opening("agent.json", body), Opening("gone.json", wrong="cannot be read")))

    (name, broken) = world.openings.of(GEMMA)

    assert name.startswith("agent.json ")
    assert world.openings.of(GEMMA) == {name: None, broken: "cannot be read"}
    assert [world.asks("agent", said) for said in "ab"] == [name, name]
    assert world.told == []


def test_a_file_with_other_words_is_another_opening() -> None:
    names = {
        next(iter(World(files=(Opening("a", {"messages": [system_of(t)]}),)).openings.of(GEMMA)))
        for t in "xyx"
    }

    assert len(names) == 2


def test_a_request_says_whether_it_is_mostly_its_opening() -> None:
    world = World("learn")
    mostly = []
    for size in (10, 500, 3000):
        body = {"messages": [system_of("agent"), {"role": "user", "content": "x" * size}]}
        begun = world.openings.note(GEMMA, CHAT, json.dumps(body).encode())
        assert begun is not None
        mostly.append(begun.mostly)

    assert mostly == [True, True, False]


def test_no_name_tells_what_is_behind_it() -> None:
    """With a key of each process: whoever guesses an opening cannot see by its name whether he is right."""
    names = set()
    for _ in range(2):
        world = World("learn")
        world.asks("CANARY")
        names.add(world.asks("CANARY"))
        assert "CANARY" not in repr(vars(world.openings))

    assert len(names) == 2
