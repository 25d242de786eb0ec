"""The prompt cache: what a slot has read, which slot a request gets, and what is left of whoever leaves."""

import asyncio
from typing import Any

from keepalive.simulator.bodies import prompt_words
from keepalive.simulator.models import Instance
from keepalive.simulator.studio import Studio
from tests.kit.simulated import CHAT, chat, events, now, simulated, world

RULES = {"role": "system", "content": " ".join(f"rule{n}" for n in range(100))}


def asks(*messages: str, system: dict[str, str] = RULES, **more: Any) -> dict[str, Any]:
    said = [{"role": "user", "content": text} for text in messages]
    return {"messages": [system, *said], "max_tokens": 1, **more}


async def loaded(**faults: Any) -> tuple[Studio, Instance]:
    studio = world(prompt_token_seconds=0.01, prompt_seconds=0.0, **faults)
    load = studio.load(CHAT.key, seconds=0)
    assert load.instance is not None
    return studio, load.instance


def read(studio: Studio) -> list[tuple[int, int]]:
    """Of each prompt its words, and how many of them were remembered."""
    return [(e["prompt"], e["cached"]) for e in events(studio, "generation.ended")]


@simulated
async def test_what_begins_as_a_prompt_before_it_is_read_from_where_it_differs() -> None:
    studio, _ = await loaded()

    await chat(studio, **asks("one"))
    first = now()
    await chat(studio, **asks("another question"))

    assert read(studio) == [(105, 0), (106, 103)]
    assert (first, now()) == (1.05, 1.08)


@simulated
async def test_a_prompt_that_begins_otherwise_has_a_slot_of_its_own_while_there_is_one() -> None:
    studio, instance = await loaded(parallel=2)
    other = {"role": "system", "content": " ".join(f"law{n}" for n in range(100))}
    third = {"role": "system", "content": " ".join(f"habit{n}" for n in range(100))}

    await chat(studio, **asks("one"))
    await chat(studio, **asks("two", system=other))
    await chat(studio, **asks("three"))
    assert [cached for _, cached in read(studio)] == [0, 0, 103]
    assert len(instance.slots) == 2
    await chat(studio, **asks("four", system=third))

    # the one that rested longest gave way
    await chat(studio, **asks("five"))
    await chat(studio, **asks("six", system=other))
    assert [cached for _, cached in read(studio)][-2:] == [103, 2]


@simulated
async def test_two_at_once_read_it_in_two_slots() -> None:
    studio, instance = await loaded()

    await asyncio.gather(chat(studio, **asks("one")), chat(studio, **asks("two")))

    assert [cached for _, cached in read(studio)] == [0, 0]
    assert now() == 1.05
    assert [slot.taken for slot in instance.slots] == [False, False]


@simulated
async def test_tools_are_read_before_everything_else() -> None:
    studio, _ = await loaded()
    tools = [{"function": {"name": "look", "description": "looks at the patient"}}]

    await chat(studio, **asks("one", tools=tools))
    await chat(studio, **asks("two"))

    assert read(studio)[1][1] == 0
    assert prompt_words({"tools": tools, **asks("one")})[:3] == ["<begin>", "<tools>", '[{"function":']


@simulated
async def test_it_is_gone_with_the_instance() -> None:
    studio, _ = await loaded()
    await chat(studio, **asks("one"))

    studio.evict(CHAT.key)
    studio.load(CHAT.key, seconds=0)
    await chat(studio, **asks("two"))

    assert read(studio) == [(105, 0), (105, 0)]


@simulated
async def test_a_server_without_one_reads_everything_each_time() -> None:
    studio, _ = await loaded(prompt_cache=False)
    for text in ("one", "one"):
        await chat(studio, **asks(text))

    assert read(studio) == [(105, 0), (105, 0)]
    assert now() == 2.1


@simulated
async def test_who_leaves_leaves_what_was_read_and_his_slot_when_that_is_noticed() -> None:
    studio, instance = await loaded(prompt_finishes_after_disconnect=False, disconnect_noticed_seconds=0.2)
    task = asyncio.create_task(chat(studio, **asks("one")))
    await asyncio.sleep(0.5)

    task.cancel()
    await asyncio.sleep(0.1)
    still = [slot.taken for slot in instance.slots]
    await asyncio.sleep(0.2)

    assert (still, [slot.taken for slot in instance.slots]) == ([True], [False])
    await chat(studio, **asks("one"))
    assert read(studio)[-1] == (105, 50)


@simulated
async def test_a_prompt_that_is_finished_though_its_client_left_is_remembered_whole() -> None:
    studio, instance = await loaded()
    task = asyncio.create_task(chat(studio, **asks("one")))
    await asyncio.sleep(0.5)

    task.cancel()
    await asyncio.sleep(0.1)
    assert instance.slots[0].taken
    await asyncio.sleep(0.5)

    assert not instance.slots[0].taken
    await chat(studio, **asks("one"))
    assert read(studio)[-1] == (105, 105)
