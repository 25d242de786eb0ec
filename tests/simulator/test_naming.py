"""Who is meant: variants, custom identifiers, no name at all."""

from typing import Any

import pytest

from keepalive.simulator.models import SimModel, parse_model
from keepalive.simulator.studio import Studio
from tests.kit.simulated import CHAT, EMBED, SMALL, chat, error, events, get, listed, load, simulated, world

TINY = SimModel("acme/tiny-4b", load_seconds=3.0, quantization="Q4_K_M", further=("Q8_0",))
Q4, Q8 = "acme/tiny-4b@q4_k_m", "acme/tiny-4b@q8_0"


async def answered_by(studio: Studio, asked: str | None) -> Any:
    reply = await chat(studio, asked, max_tokens=1)
    return (await reply.json())["model"] if reply.status == 200 else (reply.status, await error(reply))


@simulated
async def test_the_listing_names_all_variants_and_the_one_selected() -> None:
    studio = Studio([TINY, SMALL])

    tiny, small = (await (await get(studio, "/api/v1/models")).json())["models"]

    assert (tiny["variants"], tiny["selected_variant"]) == ([Q4, Q8], Q4)
    assert (small["variants"], small["selected_variant"]) == (
        ["acme/small-1b@q4_k_m"],
        "acme/small-1b@q4_k_m",
    )


@pytest.mark.parametrize("asked", ["acme/tiny-4b", Q4, "ACME/Tiny-4B@Q4_K_M"])
@simulated
async def test_the_selected_variant_is_the_same_model_by_any_of_its_names(asked: str) -> None:
    studio = Studio([TINY])
    await load(studio, TINY.key)

    assert await answered_by(studio, asked) == TINY.key
    assert await listed(studio) == [TINY.key]


@simulated
async def test_a_cold_variant_that_is_asked_for_is_loaded_beside_a_load_of_the_key_under_way() -> None:
    studio = Studio([TINY])
    studio.load(TINY.key, seconds=30)

    await chat(studio, Q4)

    assert await listed(studio) == ["acme/tiny-4b:2"]
    assert [event["owner"] for event in events(studio, "load.started")] == ["by hand", "jit"]


@simulated
async def test_another_variant_is_another_copy_and_answers_to_its_own_name() -> None:
    studio = Studio([TINY])
    await load(studio, TINY.key)

    assert await answered_by(studio, Q8) == "acme/tiny-4b:2"
    assert await answered_by(studio, Q8) == "acme/tiny-4b:2"
    assert await answered_by(studio, TINY.key) == TINY.key
    variants = [row["variant"] for row in studio.state()["models"][0]["instances"]]
    assert variants == [Q4, Q8]


@simulated
async def test_a_variant_is_loaded_explicitly_by_its_name() -> None:
    studio = Studio([TINY], faults={"variant_ids": "variant"})

    reply = await load(studio, Q8)

    assert (await reply.json())["instance_id"] == Q8
    assert (await answered_by(studio, Q8), await answered_by(studio, TINY.key)) == (Q8, Q8)


@simulated
async def test_the_bare_key_can_mean_the_selected_variant_alone() -> None:
    studio = Studio([TINY], faults={"key_means_selected": True, "variant_ids": "variant"})
    studio.load(Q8, seconds=0)

    assert await answered_by(studio, TINY.key) == TINY.key
    assert await listed(studio) == [Q8, TINY.key]


@simulated
async def test_a_variant_that_is_not_on_the_disk_is_an_unknown_name() -> None:
    studio = Studio([TINY, SMALL])
    studio.load(TINY.key, seconds=0)
    studio.load(SMALL.key, seconds=0)

    status, told = await answered_by(studio, "acme/tiny-4b@q2_k")

    assert (status, told["code"]) == (400, "model_not_found")


@simulated
async def test_a_model_with_a_custom_identifier_answers_to_key_and_identifier_and_names_the_identifier() -> (
    None
):
    studio = world()
    studio.load(SMALL.key, seconds=0)
    studio.load(CHAT.key, seconds=0, identifier="My-Chat")

    assert await answered_by(studio, "My-Chat") == "My-Chat"
    assert await answered_by(studio, "ACME/chat-8B") == "My-Chat"
    status, told = await answered_by(studio, "my-chat")
    assert (status, told["code"]) == (400, "model_not_found")


@simulated
async def test_no_name_means_the_one_chat_model_that_is_loaded() -> None:
    studio = world()
    studio.load(EMBED.key, seconds=0)
    status, told = await answered_by(studio, None)
    studio.load(CHAT.key, seconds=0, identifier="mine")
    alone = await answered_by(studio, None)
    guessed = await answered_by(studio, "local-model")
    studio.load(SMALL.key, seconds=0)

    assert (status, told["message"][:17]) == (400, "No models loaded.")
    assert (alone, guessed) == ("mine", "mine")
    assert (await answered_by(studio, None))[0] == 400
    assert (await answered_by(studio, "local-model"))[0] == 400


def test_variants_can_be_told_on_the_command_line() -> None:
    model = parse_model("acme/tiny-4b@q4_k_m,q8_0:3s:2GB")

    assert (model.key, model.variants, model.load_seconds) == ("acme/tiny-4b", [Q4, Q8], 3.0)
    assert parse_model("acme/rerank-1b").kind == "reranker"
