"""What becomes of a question that was not answered as it should be."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from keepalive.core.errors import Reason, Unexpected
from keepalive.core.facts import LoadEnded, LoadForgone, LoadOutcome, ModelId, Tier
from keepalive.core.records import Policy
from keepalive.keeper import errands
from keepalive.keeper.errands import _what_came_of_it
from keepalive.keeper.given import Keep
from keepalive.lmstudio import wire
from keepalive.lmstudio.client import Client

GEMMA = ModelId("local", "gemma")

MINJA = "Value is not callable: null at row 1, column 60:\n{%- if messages[0].content is string %}"
EXECUTING = "\n------------\nWhile executing CallExpression at line 189, column 32 in source: no"


@pytest.mark.parametrize(
    ("status", "message", "outcome"),
    [
        (400, "anything that is wrong with the request", "refused"),
        (200, 'Error rendering prompt with jinja template: "Unknown test: sequence".', "refused"),
        (500, "Conversation roles must alternate user/assistant/user/assistant/...", "refused"),
        (500, MINJA, "refused"),
        (500, EXECUTING, "refused"),
        (500, "the engine said something odd", "error"),
        (200, "the engine said something odd", "error"),
        (400, "The model has crashed without additional information.", "error"),
        (429, "too many requests", "timeout"),
        (409, "another answer is under way", "timeout"),
        (503, "the queue is full", "timeout"),
        (500, "this model requires an image input", "refused"),
        (200, "an audio file is required", "refused"),
        (500, "the image encoder is lost", "error"),
        (400, "Failed to load image or audio file", "refused"),
        (400, "Failed to load model", "error"),
    ],
)
def test_a_ping_that_only_the_template_does_not_take_is_no_illness(status: int, message: str, outcome: str):
    error = wire.refusal(status, {"error": {"message": message}})

    assert error is not None
    assert _what_came_of_it(error, Tier.V1)[0] == outcome


@pytest.mark.parametrize(
    ("status", "tier", "outcome"),
    [
        (400, Tier.V1, "refused"),
        (400, Tier.OPENAI, "refused"),
        (404, Tier.V1, "refused"),
        (404, Tier.OPENAI, "error"),
        (413, Tier.V1, "refused"),
        (503, Tier.V1, "timeout"),
        (500, Tier.V1, "error"),
        (502, Tier.V1, "error"),
        (None, Tier.V1, "error"),
    ],
)
def test_a_page_says_by_its_status_what_an_answer_of_the_server_says(
    status: int | None, tier: Tier, outcome: str
):
    assert _what_came_of_it(Unexpected("a page", status=status), tier)[0] == outcome


def test_the_words_of_a_refusal_are_found_in_the_layouts_of_other_servers():
    answers: list[wire.Json] = [
        {"object": "error", "message": "it wants an image", "code": 400},
        {"detail": [{"loc": ["body"], "msg": "it wants an image"}, {"msg": 1}, 2]},
        {"detail": "it wants an image"},
    ]

    assert [str(wire.refusal(400, answer)) for answer in answers] == ["it wants an image"] * 3
    assert str(wire.refusal(422, {"detail": [{"loc": []}]})) == "HTTP 422"


# --- what is told of a load and of an unload ------------------------------------------------------


@asynccontextmanager
async def answering(status: int, message: str, *, acts: bool = True) -> AsyncIterator[Client]:
    """The client of a server that says the same to everything."""
    body = json.dumps({"error": {"message": message}}).encode()
    head = f"HTTP/1.1 {status} So\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(f"{head}Connection: close\r\n\r\n".encode() + body)
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        async with Client("local", f"http://127.0.0.1:{port}", acts=lambda: acts) as client:
            yield client


async def loaded(client: Client) -> LoadEnded | LoadForgone:
    return await errands.load(client, Keep(GEMMA, Policy()), None, Tier.V1, 5.0, lambda: 7.0, lambda _: None)


@pytest.mark.parametrize(
    ("status", "message", "outcome", "why"),
    [
        (500, "insufficient system resources", LoadOutcome.REFUSED, Reason.RESOURCES),
        (401, "no such token", LoadOutcome.REFUSED, Reason.UNAUTHORIZED),
        (503, "Loading model", LoadOutcome.UNKNOWN, Reason.LOADING),
        (500, "the engine said something odd", LoadOutcome.UNKNOWN, Reason.OTHER),
    ],
)
async def test_why_a_load_came_to_nothing_is_told_with_what_it_came_to(
    status: int, message: str, outcome: LoadOutcome, why: Reason
):
    async with answering(status, message) as client:
        ended = await loaded(client)

    assert isinstance(ended, LoadEnded)
    assert (ended.outcome, ended.why, ended.elapsed, ended.instance_id) == (outcome, why, 2.0, None)


async def test_a_load_that_is_no_longer_ours_to_do_was_never_begun():
    async with answering(200, "", acts=False) as client:
        forgone = await loaded(client)

    assert isinstance(forgone, LoadForgone)
    assert (forgone.at, forgone.model) == (7.0, GEMMA)


@pytest.mark.parametrize(("acts", "in_use"), [(True, False), (False, True)])
async def test_a_copy_that_is_no_longer_ours_to_unload_is_as_one_in_use(acts: bool, in_use: bool):
    async with answering(500, "something odd", acts=acts) as client:
        ended = await errands.unload(client, GEMMA, "gemma:2", Tier.V1, lambda: 7.0)

    assert (ended.at, ended.instance_id, ended.in_use) == (7.0, "gemma:2", in_use)
    assert ended.message is not None
