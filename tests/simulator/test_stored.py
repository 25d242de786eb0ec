"""Answers that the server keeps: who may go on from them, and for how long."""

from typing import Any

import pytest

from keepalive.simulator.exchange import Reply, Request
from keepalive.simulator.studio import Studio
from tests.kit.simulated import CHAT, data_lines, error, get, post, simulated, world


def warm(**faults: Any) -> Studio:
    studio = world(answer_tokens=5, **faults)
    studio.load(CHAT.key, seconds=0)
    return studio


async def respond(studio: Studio, **fields: Any) -> Reply:
    return await post(studio, "/v1/responses", {"model": CHAT.key, "input": "one two", **fields})


async def talk(studio: Studio, **fields: Any) -> Reply:
    return await post(studio, "/api/v1/chat", {"model": CHAT.key, "input": "one two", **fields})


async def delete(studio: Studio, ident: str) -> Reply:
    return await studio.handle(Request("DELETE", f"/v1/responses/{ident}"))


@simulated
async def test_a_response_is_kept_and_gone_on_from() -> None:
    studio = warm()
    first = await (await respond(studio)).json()
    second = await (await respond(studio, previous_response_id=first["id"])).json()

    assert first["id"] != second["id"]
    assert second["previous_response_id"] == first["id"]
    assert (first["usage"]["input_tokens"], second["usage"]["input_tokens"]) == (10, 10 + 15)


@simulated
async def test_a_stored_response_can_be_read_and_deleted() -> None:
    studio = warm()
    stream = data_lines(await (await respond(studio, stream=True)).read())
    made = await (await respond(studio)).json()
    ident = made["id"]
    read = await (await get(studio, f"/v1/responses/{ident}")).json()
    deleted = await (await delete(studio, ident)).json()

    assert read == made
    assert deleted == {"id": ident, "object": "response", "deleted": True}
    assert (await get(studio, f"/v1/responses/{ident}")).status == 404
    assert (await delete(studio, ident)).status == 404
    assert (await respond(studio, previous_response_id=ident)).status == 404
    streamed = next(line for line in stream if "response.completed" in line).split('"id":"')[1].split('"')[0]
    assert (await get(studio, f"/v1/responses/{streamed}")).status == 200


@pytest.mark.parametrize("status", [404, 400])
@simulated
async def test_what_is_not_stored_is_refused_before_anything_is_loaded(status: int) -> None:
    studio = world(stored_error_status=status)

    reply = await respond(studio, previous_response_id="resp_of_another", stream=True)

    assert reply.status == status
    assert await error(reply) == {
        "message": "Previous response with id 'resp_of_another' not found.",
        "type": "invalid_request_error",
        "param": "previous_response_id",
        "code": "previous_response_not_found",
    }
    assert studio.log()[-1]["kind"] == "reply"
    assert not studio.memory.loads


@simulated
async def test_what_was_not_to_be_stored_or_broke_off_is_not() -> None:
    studio = warm(stream_breaks={"value": "error", "times": 1})
    broken = data_lines(await (await respond(studio, stream=True)).read())[0]
    unstored = await (await respond(studio, store=False)).json()

    assert studio.stored == {}
    assert "resp_" in broken
    assert (await respond(studio, previous_response_id=unstored["id"])).status == 404


@simulated
async def test_lm_studios_own_chat_goes_on_from_its_own_answers() -> None:
    studio = warm()
    first = await (await talk(studio)).json()
    second = await (await talk(studio, previous_response_id=first["response_id"])).json()
    lost = await talk(studio, previous_response_id="resp_lost")

    assert second["stats"]["input_tokens"] == 10 + 15
    assert (lost.status, (await error(lost))["type"]) == (404, "invalid_request")
    assert "response_id" not in await (await talk(studio, store=False)).json()
    assert (await get(studio, f"/v1/responses/{first['response_id']}")).status == 404


@pytest.mark.parametrize(("forgets", "status"), [(False, 200), (True, 404)])
@simulated
async def test_a_restart_keeps_what_is_stored_or_not(forgets: bool, status: int) -> None:
    studio = warm(restart_forgets_responses=forgets)
    ident = (await (await respond(studio)).json())["id"]

    studio.restart()

    assert (await respond(studio, previous_response_id=ident)).status == status


@simulated
async def test_two_servers_give_different_ids() -> None:
    one, other = warm(), warm()
    other.mark = "other"
    ident = (await (await respond(one)).json())["id"]

    assert (await (await respond(other)).json())["id"] != ident
    assert (await respond(other, previous_response_id=ident)).status == 404
