"""Whoever wants to know what requests begin with is told beside their answers, and can change nothing of them."""

import gzip

import pytest

from keepalive.core.callers import Begun
from keepalive.core.facts import ModelId
from keepalive.protocols.routes import Route
from tests.kit.fronted import CHAT_BODY, CHAT_STREAM, Keep, ask, chat, fronted, post, says

M = ModelId("local", "m")
REFUSED = b'HTTP/1.1 400 Bad Request\r\nContent-Length: 13\r\n\r\n{"error":"x"}'


class Notes:
    def __init__(self, name: Begun | None = None, wants: bool = True) -> None:
        self.name = name
        self.wanted = wants
        self.noted: list[tuple[ModelId, str, bytes]] = []

    def wants(self, model: ModelId) -> bool:
        return self.wanted

    def note(self, model: ModelId, route: Route, body: bytes) -> Begun | None:
        self.noted.append((model, route.name, body))
        return self.name


class Raises(Notes):
    def note(self, model: ModelId, route: Route, body: bytes) -> Begun | None:
        super().note(model, route, body)
        raise RuntimeError("no memory")


def kept() -> Keep:
    keep = Keep()
    keep.add("m")
    return keep


@pytest.mark.parametrize(("name", "start"), [(Begun("agent", True), "primed"), (None, "warm")])
async def test_a_request_whose_opening_was_read_before_is_told_apart(name: Begun | None, start: str) -> None:
    async with fronted(says(CHAT_STREAM), keep=kept()) as (front, _):
        front.proxy.notes = notes = Notes(name)
        request = chat("m")

        _, _, body = await ask(front.port, request)
        seen = await front.last()

        assert body == CHAT_BODY
        assert notes.noted == [(M, "chat", request.partition(b"\r\n\r\n")[2])]
        assert (seen.start, seen.begun) == (start, name)


async def test_one_that_raises_changes_no_byte_and_no_count() -> None:
    async with fronted(says(CHAT_STREAM), keep=kept()) as (front, _):
        front.proxy.notes = notes = Raises()

        _, _, body = await ask(front.port, chat("m"))
        seen = await front.last()

        assert len(notes.noted) == 1
        assert body == CHAT_BODY
        assert (seen.start, seen.outcome, seen.begun) == ("warm", "ok", None)


async def test_what_nobody_wants_is_refused_or_is_packed_is_not_looked_into() -> None:
    async with fronted(says(CHAT_STREAM), keep=kept()) as (front, upstream):
        front.proxy.notes = notes = Notes(wants=False)
        await ask(front.port, chat("m"))
        notes.wanted = True
        packed = gzip.compress(b'{"model":"m","stream":true,"messages":[{"role":"user","content":"hi"}]}')
        await ask(front.port, post("/v1/chat/completions", packed, "Content-Encoding: gzip"))
        await ask(front.port, chat("somebody else's"))
        upstream.script = says(REFUSED)
        await ask(front.port, chat("m"))

        assert notes.noted == []


async def test_a_model_that_was_cold_is_cold_whatever_the_request_begins_with() -> None:
    keep = Keep()
    keep.add("m", state="cold")
    async with fronted(says(CHAT_STREAM), keep=keep) as (front, _):
        front.proxy.notes = Notes(Begun("agent"))

        await ask(front.port, chat("m"))

        assert (await front.last()).start == "cold"
