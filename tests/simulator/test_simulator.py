"""The simulator in process, under a clock that costs nothing: LM Studio as it is, and as it goes wrong."""

import asyncio
import json
import random
from typing import Any

import pytest

from keepalive.simulator.exchange import Cut, Request
from keepalive.simulator.faults import FAULTS, FaultError, parse_fault
from keepalive.simulator.models import SimModel, parse_model
from keepalive.simulator.studio import Studio
from tests.kit.simulated import (
    CHAT,
    EMBED,
    SMALL,
    InstantLoop,
    chat,
    collect,
    data_lines,
    error,
    event_names,
    events,
    get,
    kinds,
    listed,
    load,
    now,
    post,
    simulated,
    v0_states,
    world,
)

# the explicit lifecycle


@simulated
async def test_a_load_is_answered_once_at_its_end() -> None:
    studio = world()

    reply = await load(studio, context_length=8192, echo_load_config=True)

    assert now() == 12.0
    assert reply.status == 200
    assert await reply.json() == {
        "type": "llm",
        "instance_id": "acme/chat-8b",
        "load_time_seconds": 12.0,
        "status": "loaded",
        "load_config": {
            "context_length": 8192,
            "eval_batch_size": 512,
            "flash_attention": True,
            "offload_kv_cache_to_gpu": True,
        },
    }


@simulated
async def test_a_second_load_makes_a_second_copy_and_a_bare_key_goes_to_the_oldest() -> None:
    studio = world()
    first = await (await load(studio)).json()
    second = await (await load(studio)).json()

    assert (first["instance_id"], second["instance_id"]) == ("acme/chat-8b", "acme/chat-8b:2")
    assert await listed(studio) == ["acme/chat-8b", "acme/chat-8b:2"]
    assert (await (await chat(studio)).json())["model"] == "acme/chat-8b"
    assert (await (await chat(studio, "acme/chat-8b:2")).json())["model"] == "acme/chat-8b:2"
    assert [event["copies"] for event in events(studio, "load.started")] == [0, 1]


@simulated
async def test_two_loads_of_a_model_at_once_make_two_copies() -> None:
    studio = world()

    replies = await asyncio.gather(load(studio), load(studio))

    assert now() == 12.0
    ids = [(await reply.json())["instance_id"] for reply in replies]
    assert ids == ["acme/chat-8b", "acme/chat-8b:2"]


@simulated
async def test_loads_of_different_models_run_at_once_or_one_after_another() -> None:
    studio = world()
    await asyncio.gather(load(studio), load(studio, SMALL.key))
    assert now() == 12.0

    studio = world(loads_in_parallel=False)
    await asyncio.gather(load(studio), load(studio, SMALL.key))
    assert now() == 12.0 + 12.0 + 3.0


@pytest.mark.parametrize("field", ["ttl", "stream", "identifier", "parallel", "gpu"])
@simulated
async def test_the_load_schema_is_closed(field: str) -> None:
    studio = world()

    reply = await load(studio, CHAT.key, **{field: 1})

    assert reply.status == 400
    assert await error(reply) == {
        "type": "invalid_request",
        "message": f"Unrecognized key(s) in object: '{field}'",
        "code": "unrecognized_keys",
    }
    assert events(studio, "load.started") == []


@simulated
async def test_a_load_without_a_model_or_with_an_unknown_one_is_refused() -> None:
    studio = world()

    missing = await post(studio, "/api/v1/models/load", {"context_length": 10})
    unknown = await load(studio, "nobody/nothing")

    assert missing.status == 400
    assert await error(missing) == {
        "type": "invalid_request",
        "message": '"model" is required',
        "code": "missing_required_parameter",
        "param": "model",
    }
    assert (unknown.status, (await error(unknown))["code"]) == (404, "model_not_found")


@simulated
async def test_unload_takes_an_instance_id_in_its_exact_case() -> None:
    studio = world()
    await load(studio)

    other_case = await post(studio, "/api/v1/models/unload", {"instance_id": "ACME/chat-8b"})
    wrong_field = await post(studio, "/api/v1/models/unload", {"model": CHAT.key})
    right = await post(studio, "/api/v1/models/unload", {"instance_id": CHAT.key})

    assert (other_case.status, wrong_field.status, right.status) == (404, 400, 200)
    assert await right.json() == {"instance_id": "acme/chat-8b"}
    assert await listed(studio) == []


@simulated
async def test_an_explicitly_loaded_model_never_expires_and_is_not_auto_evicted() -> None:
    studio = world()
    await load(studio)

    await asyncio.sleep(100_000)
    await chat(studio, SMALL.key)

    assert await listed(studio) == ["acme/chat-8b", "acme/small-1b"]


# what the listings show


@simulated
async def test_v1_shows_an_instance_only_when_it_is_loaded_and_v0_says_loading() -> None:
    studio = world()
    loading = asyncio.create_task(load(studio))
    await asyncio.sleep(6)

    assert await listed(studio) == []
    assert (await v0_states(studio))[CHAT.key] == "loading"
    one = await get(studio, "/api/v0/models/acme%2Fchat-8b")
    assert (await one.json())["state"] == "loading"
    await loading
    assert await listed(studio) == [CHAT.key]
    assert (await v0_states(studio))[CHAT.key] == "loaded"


@simulated
async def test_whether_loads_show_in_the_listings_can_be_switched() -> None:
    studio = world(v0_shows_loading=False, lists_while_loading=True)
    studio.load(CHAT.key)
    await asyncio.sleep(6)

    assert await listed(studio) == [CHAT.key]
    assert (await v0_states(studio))[CHAT.key] == "not-loaded"


@simulated
async def test_a_listing_can_lag_behind_the_end_of_a_load() -> None:
    studio = world(listing_lag_seconds=30)
    await load(studio)

    assert await listed(studio) == []
    assert (await chat(studio)).status == 200
    await asyncio.sleep(30)
    assert await listed(studio) == [CHAT.key]


@simulated
async def test_a_listing_has_the_documented_shape() -> None:
    studio = world()
    await load(studio, EMBED.key)

    models = (await (await get(studio, "/api/v1/models")).json())["models"]

    assert models[0]["type"] == "llm"
    assert models[0]["quantization"] == {"name": "Q4_K_M", "bits_per_weight": 4}
    assert models[0]["capabilities"] == {"vision": False, "trained_for_tool_use": True}
    assert "capabilities" not in models[2]
    assert models[2]["loaded_instances"] == [{"id": EMBED.key, "config": {"context_length": 2048}}]


@simulated
async def test_further_copies_are_entries_of_their_own_in_v0() -> None:
    studio = world()
    studio.load(CHAT.key, seconds=0)
    studio.load(CHAT.key, seconds=0)
    studio.load(SMALL.key, seconds=0, identifier="my-small")

    assert await v0_states(studio) == {
        "acme/chat-8b": "loaded",
        "acme/chat-8b:2": "loaded",
        "acme/small-1b": "not-loaded",
        "my-small": "loaded",
        "text-embedding-tiny": "not-loaded",
    }


@simulated
async def test_v1_models_lists_the_disk_with_jit_and_memory_without() -> None:
    studio = world()
    studio.load(SMALL.key, seconds=0)

    async def ids() -> list[str]:
        return [row["id"] for row in (await (await get(studio, "/v1/models")).json())["data"]]

    assert await ids() == [CHAT.key, SMALL.key, EMBED.key]
    studio.set_faults(jit=False)
    assert await ids() == [SMALL.key]


@simulated
async def test_a_slow_listing_shows_what_was_true_when_it_was_asked() -> None:
    studio = world(list_delay_seconds=20)
    asked = asyncio.create_task(get(studio, "/api/v1/models"))
    await load(studio)

    models = (await (await asked).json())["models"]

    assert now() == 20.0
    assert models[0]["loaded_instances"] == []


@pytest.mark.parametrize(
    ("how", "status", "start"),
    [
        ("error_200", 200, b'{"error":'),
        ("error_500", 500, b'{"error":'),
        ("html_500", 500, b"<!DOCTYPE html>"),
        ("empty_body", 200, b""),
        ("truncated_json", 200, b'{"models":[{'),
        ("other_shape", 200, b'[{"name":'),
        ("not_found", 404, b'{"detail":"Not Found"}'),
    ],
)
@simulated
async def test_a_listing_can_answer_something_else(how: str, status: int, start: bytes) -> None:
    studio = world(list_reply={"value": how, "times": 1})

    spoiled = await get(studio, "/api/v1/models")
    next_one = await get(studio, "/api/v1/models")

    body = await spoiled.read()
    assert spoiled.status == status
    assert body.startswith(start)
    if how == "truncated_json":
        with pytest.raises(ValueError):
            json.loads(body)
    assert len((await next_one.json())["models"]) == 3


@simulated
async def test_a_listing_can_be_huge_and_still_be_right() -> None:
    studio = world(list_reply="huge", huge_bytes=5_000_000)

    body = await (await get(studio, "/api/v1/models")).read()

    assert len(body) > 5_000_000
    assert len(json.loads(body)["models"]) == 3


@simulated
async def test_an_html_500_meets_the_first_look_after_a_load_began() -> None:
    studio = world(html_500_at_load_start="model_v0")
    studio.load(CHAT.key)

    first = await get(studio, "/api/v0/models/acme%2Fchat-8b")
    second = await get(studio, "/api/v0/models/acme%2Fchat-8b")

    assert (first.status, first.headers["Content-Type"]) == (500, "text/html; charset=utf-8")
    assert (second.status, (await second.json())["state"]) == (200, "loading")


# loads that go wrong


@simulated
async def test_a_load_can_fail_after_its_time() -> None:
    studio = world(load_result={"value": "fail", "times": 1}, load_fail_reason="unable to allocate")

    reply = await load(studio)

    assert now() == 12.0
    assert reply.status == 500
    assert await error(reply) == {
        "type": "model_load_failed",
        "message": 'Failed to load model "acme/chat-8b". Error: unable to allocate',
    }
    assert await listed(studio) == []
    assert (await load(studio)).status == 200


@simulated
async def test_the_guardrails_refuse_at_once_by_order_by_memory_and_by_context() -> None:
    studio = world(load_result={"value": "guardrail", "times": 1}, load_error_status=400)
    by_order = await load(studio)
    studio.set_faults(memory_bytes=4_000_000_000)
    by_context = await load(studio, context_length=40_000)
    fits = await load(studio)
    by_memory = await load(studio, SMALL.key)

    assert [r.status for r in (by_order, by_context, fits, by_memory)] == [400, 400, 200, 400]
    for reply in (by_order, by_context, by_memory):
        assert "insufficient system resources" in (await error(reply))["message"]
    assert now() == 12.0


@simulated
async def test_memory_in_pieces_is_of_no_use_until_nothing_is_loaded() -> None:
    studio = world(memory_bytes=CHAT.size_bytes + SMALL.size_bytes, fragmentation=0.1)
    for key in (CHAT.key, SMALL.key):
        await load(studio, key)
    studio.evict(CHAT.key)
    in_pieces = await load(studio, CHAT.key)
    studio.evict(SMALL.key)

    assert in_pieces.status == 500
    assert (await load(studio, CHAT.key)).status == 200


@simulated
async def test_a_copy_that_grows_while_it_answers_crashes_where_there_is_no_more() -> None:
    studio = world(memory_bytes=CHAT.size_bytes + 2_500, growth_bytes=1_000)
    await load(studio)
    answers = [(await chat(studio)).status for _ in range(3)]

    assert answers == [200, 200, 400]
    assert await listed(studio) == []


@simulated
async def test_a_load_that_ended_well_can_be_dropped_right_after_it() -> None:
    studio = world(drops_after_seconds={"value": 0.0, "times": 1})

    first = await load(studio)
    await asyncio.sleep(0.1)

    assert first.status == 200
    assert await listed(studio) == []
    assert "crashed" in kinds(studio)
    assert (await load(studio)).status == 200
    await asyncio.sleep(100)
    assert await listed(studio) != []


@simulated
async def test_a_load_can_stay_at_zero_for_ever_until_a_restart() -> None:
    studio = world(load_result="stuck")
    loading = asyncio.create_task(load(studio))
    await asyncio.sleep(100_000)

    assert not loading.done()
    assert studio.state()["models"][0]["loads"][0]["progress"] == 0.0
    studio.restart()
    with pytest.raises(Cut):
        await loading
    assert studio.state()["models"][0]["loads"] == []


@pytest.mark.parametrize("how", ["error_200", "error_500", "html_500", "empty_body"])
@simulated
async def test_a_load_can_succeed_and_be_reported_otherwise(how: str) -> None:
    studio = world(load_reply=how)

    reply = await load(studio)

    assert reply.status == (500 if "500" in how else 200)
    assert b"instance_id" not in await reply.read()
    assert await listed(studio) == [CHAT.key]


@simulated
async def test_a_load_can_be_cut_off_although_it_goes_on_and_succeeds() -> None:
    studio = world(load_reply="rst", load_reply_after_seconds=5)

    with pytest.raises(Cut) as cut:
        await load(studio)

    assert (cut.value.how, now()) == ("rst", 5.0)
    assert await listed(studio) == []
    await asyncio.sleep(7)
    assert await listed(studio) == [CHAT.key]


@simulated
async def test_a_load_can_be_answered_late_or_never() -> None:
    studio = world(
        load_reply_delay_seconds={"value": 100, "model": CHAT.key},
        load_reply={"value": "hang", "model": SMALL.key},
    )
    never = asyncio.create_task(load(studio, SMALL.key))
    late = asyncio.create_task(load(studio))
    await asyncio.sleep(20)

    assert await listed(studio) == [CHAT.key, SMALL.key]
    assert not late.done()
    await late
    await asyncio.sleep(100_000)
    assert not never.done()
    never.cancel()


@simulated
async def test_a_load_goes_on_when_its_client_leaves_unless_switched() -> None:
    for cancelled, expected in ((False, [CHAT.key]), (True, [])):
        studio = world(load_cancelled_by_disconnect=cancelled)
        loading = asyncio.create_task(load(studio))
        await asyncio.sleep(5)
        loading.cancel()
        await asyncio.sleep(10)

        assert await listed(studio) == expected
        assert events(studio, "client.gone")[0]["phase"] == "loading"
        assert len(events(studio, "load.cancelled")) == int(cancelled)


# loads on demand


@simulated
async def test_the_first_request_loads_the_model_with_an_idle_timer_of_an_hour() -> None:
    studio = world()

    reply = await chat(studio, max_tokens=1)

    assert reply.status == 200
    assert now() == 12.05
    instance = studio.state()["models"][0]["instances"][0]
    assert (instance["jit"], instance["ttl_seconds"]) == (True, 3600.0)
    await asyncio.sleep(3599)
    assert await listed(studio) == [CHAT.key]
    await asyncio.sleep(2)
    assert await listed(studio) == []
    assert events(studio, "expired")[0]["idle_seconds"] == 3600.0


@pytest.mark.parametrize(
    ("path", "ttl", "expected"),
    [
        ("/v1/chat/completions", 60, 60.0),
        ("/api/v0/chat/completions", 60, 60.0),
        ("/api/v0/completions", 60, 60.0),
        ("/v1/completions", 60, 3600.0),
        ("/v1/responses", 60, 3600.0),
        ("/v1/messages", 60, 3600.0),
        ("/v1/chat/completions", "abc", 3600.0),
        ("/v1/chat/completions", -5, 3600.0),
        ("/v1/chat/completions", True, 3600.0),
    ],
)
@simulated
async def test_a_ttl_counts_on_some_routes_and_only_when_it_is_valid(
    path: str, ttl: Any, expected: float
) -> None:
    studio = world()

    reply = await post(studio, path, {"model": CHAT.key, "ttl": ttl})

    assert reply.status == 200
    assert studio.state()["models"][0]["instances"][0]["ttl_seconds"] == expected


@simulated
async def test_a_ttl_is_refused_by_the_native_chat() -> None:
    reply = await post(world(), "/api/v1/chat", {"model": CHAT.key, "input": "x", "ttl": 60})

    assert (reply.status, (await error(reply))["code"]) == (400, "unrecognized_keys")


@simulated
async def test_a_ttl_on_a_loaded_instance_changes_nothing() -> None:
    studio = world()
    await chat(studio, ttl=600)
    await chat(studio, ttl=5)

    await asyncio.sleep(590)
    assert await listed(studio) == [CHAT.key]


@simulated
async def test_inference_renews_the_idle_timer_and_listing_does_not_unless_switched() -> None:
    studio = world()
    await chat(studio, ttl=60)
    await asyncio.sleep(50)
    await chat(studio)
    await asyncio.sleep(50)
    assert await listed(studio) == [CHAT.key]
    await asyncio.sleep(20)
    assert await listed(studio) == []

    studio.set_faults(gets_reset_ttl=True)
    await chat(studio, ttl=60)
    for _ in range(5):
        await asyncio.sleep(50)
        assert await listed(studio) == [CHAT.key]


@simulated
async def test_a_working_model_is_not_idle() -> None:
    studio = world(token_seconds=10)
    await chat(studio, ttl=60, max_tokens=20)  # 190 s of words

    assert events(studio, "expired") == []
    assert await listed(studio) == [CHAT.key]


@simulated
async def test_auto_evict_keeps_one_model_on_demand_and_embedding_models_share_its_place() -> None:
    studio = world()
    await post(studio, "/v1/embeddings", {"model": EMBED.key, "input": "."})
    await chat(studio, SMALL.key)

    assert await listed(studio) == [SMALL.key]
    evicted = events(studio, "evicted")[0]
    assert (evicted["instance_id"], evicted["by"], evicted["generating"]) == (EMBED.key, SMALL.key, 0)


@simulated
async def test_without_auto_evict_models_on_demand_stay_together() -> None:
    studio = world(auto_evict=False)
    await chat(studio)
    await chat(studio, SMALL.key)

    assert await listed(studio) == [CHAT.key, SMALL.key]


@simulated
async def test_auto_evict_ends_a_running_stream_and_a_queued_request() -> None:
    studio = world(parallel=1, token_seconds=1)
    await chat(studio, max_tokens=1)
    stream = await chat(studio, stream=True)
    queued = asyncio.create_task(chat(studio))
    waiting = asyncio.create_task(stream.read())
    await asyncio.sleep(3)
    await chat(studio, SMALL.key, max_tokens=1)

    last = data_lines(await waiting)[-1]
    assert json.loads(last)["error"]["message"] == "Model unloaded."
    refused = await queued
    assert refused.status == 400
    assert await refused.json() == {"error": "Model was unloaded while the request was still in queue.."}
    evicted = events(studio, "evicted")[0]
    assert (evicted["generating"], evicted["queued"]) == (1, 1)


@simulated
async def test_requests_of_an_evicted_model_may_hang() -> None:
    studio = world(unload_hangs_requests=True, token_seconds=10)
    studio.load(CHAT.key, seconds=0)
    asked = asyncio.create_task(chat(studio))
    await asyncio.sleep(5)
    studio.evict(CHAT.key)
    await asyncio.sleep(100_000)

    assert not asked.done()
    asked.cancel()


@simulated
async def test_simultaneous_requests_for_a_cold_model_load_a_copy_each() -> None:
    studio = world()
    await asyncio.gather(chat(studio), chat(studio), chat(studio))
    assert await listed(studio) == ["acme/chat-8b", "acme/chat-8b:2", "acme/chat-8b:3"]

    studio = world(jit_stampede=False)
    await asyncio.gather(chat(studio), chat(studio), chat(studio))
    assert await listed(studio) == ["acme/chat-8b"]


@simulated
async def test_a_request_during_an_explicit_load_makes_a_second_copy_with_a_timer() -> None:
    studio = world()
    loading = asyncio.create_task(load(studio))
    await asyncio.sleep(1)
    await chat(studio)
    await loading

    assert [(i["id"], i["owner"]) for i in studio.state()["models"][0]["instances"]] == [
        ("acme/chat-8b", "rest"),
        ("acme/chat-8b:2", "jit"),
    ]


@simulated
async def test_a_failed_load_on_demand_is_a_400_or_on_old_servers_a_404() -> None:
    studio = world(load_result="fail", load_fail_reason="Failed to load LLM engine")
    new = await chat(studio)
    studio.set_tier("v0")
    old = await chat(studio)

    assert (new.status, await error(new)) == (
        400,
        {
            "message": 'Failed to load model "acme/chat-8b". Error: Failed to load LLM engine',
            "type": "invalid_request_error",
            "param": "model",
            "code": None,
        },
    )
    assert (old.status, (await error(old))["code"]) == (404, "model_not_found")


# which model answers


@simulated
async def test_keys_match_in_any_case_and_identifiers_only_in_theirs() -> None:
    studio = world()
    studio.load(CHAT.key, seconds=0, identifier="My-Chat")

    by_key = await chat(studio, "ACME/Chat-8B")
    by_identifier = await chat(studio, "My-Chat")
    studio.load(SMALL.key, seconds=0)
    other_case = await chat(studio, "my-chat")

    assert (await by_key.json())["model"] == "My-Chat"
    assert (await by_identifier.json())["system_fingerprint"] == "My-Chat"
    assert (other_case.status, (await error(other_case))["code"]) == (400, "model_not_found")


@simulated
async def test_an_unknown_model_is_answered_by_the_only_chat_model_loaded() -> None:
    studio = world()
    studio.load(EMBED.key, seconds=0)
    studio.load(SMALL.key, seconds=0)
    answered = await chat(studio, "typo/model")
    studio.set_faults(wrong_model_fallback=False)
    strict = await chat(studio, "typo/model")
    studio.set_faults(wrong_model_fallback=None)
    studio.load(CHAT.key, seconds=0)
    ambiguous = await chat(studio, "typo/model")

    assert (answered.status, (await answered.json())["model"]) == (200, SMALL.key)
    assert strict.status == 400
    assert ambiguous.status == 400
    assert await error(ambiguous) == {
        "message": 'Invalid model identifier "typo/model". Please specify a valid downloaded model '
        "(e.g., acme/chat-8b, acme/small-1b).",
        "type": "invalid_request_error",
        "param": "model",
        "code": "model_not_found",
    }


@simulated
async def test_the_native_chat_does_not_fall_back_to_another_model() -> None:
    studio = world()
    studio.load(SMALL.key, seconds=0)

    reply = await post(studio, "/api/v1/chat", {"model": "typo", "input": "x"})

    assert (reply.status, (await error(reply))["code"]) == (404, "model_not_found")


@simulated
async def test_without_jit_a_cold_model_is_no_models_loaded() -> None:
    studio = world(jit=False)

    reply = await chat(studio)

    assert reply.status == 400
    assert (await error(reply))["message"].startswith("No models loaded. Please load a model")
    assert events(studio, "load.started") == []


@simulated
async def test_a_missing_model_name_is_served_when_there_is_one_and_refused_when_several() -> None:
    studio = world()
    studio.load(CHAT.key, seconds=0)
    one = await chat(studio, None)
    studio.load(SMALL.key, seconds=0)
    several = await chat(studio, None)
    empty = await chat(studio, "")

    assert (await one.json())["model"] == CHAT.key
    assert (several.status, (await error(several))["message"][:28]) == (400, "Multiple models are loaded. ")
    assert (await error(empty))["message"] == 'Invalid model identifier ""'


@simulated
async def test_the_wrong_kind_of_model_is_refused_and_not_loaded() -> None:
    studio = world()
    no_embedding = await post(studio, "/v1/embeddings", {"model": CHAT.key, "input": "."})
    no_chat = await chat(studio, EMBED.key)

    assert (no_embedding.status, no_chat.status) == (400, 400)
    assert events(studio, "load.started") == []


@simulated
async def test_an_answer_may_name_another_model() -> None:
    studio = world(answer_model={"value": "somebody/else", "times": 1})
    studio.load(CHAT.key, seconds=0)

    assert (await (await chat(studio)).json())["model"] == "somebody/else"
    assert (await (await chat(studio)).json())["model"] == CHAT.key


# answers


@simulated
async def test_a_chat_answer_has_the_recorded_shape() -> None:
    studio = world()
    studio.load(CHAT.key, seconds=0)

    reply = await (await chat(studio, max_tokens=4)).json()

    assert reply["id"] == "chatcmpl-sim000001"
    assert reply["choices"] == [
        {
            "index": 0,
            "message": {
                "role": "assistant",
                "content": "This answer comes from",
                "reasoning_content": "",
                "tool_calls": [],
            },
            "logprobs": None,
            "finish_reason": "length",
        }
    ]
    assert reply["usage"] == {
        "prompt_tokens": 10,
        "completion_tokens": 4,
        "total_tokens": 14,
        "completion_tokens_details": {"reasoning_tokens": 0},
    }
    assert now() == 0.11


@simulated
async def test_a_chat_stream_has_its_words_a_finish_usage_on_demand_and_done() -> None:
    studio = world()
    studio.load(CHAT.key, seconds=0)

    plain = data_lines(await (await chat(studio, stream=True, max_tokens=2)).read())
    reply = await chat(studio, stream=True, max_tokens=2, stream_options={"include_usage": True})
    counted = data_lines(await reply.read())

    assert [line if line == "[DONE]" else json.loads(line)["choices"] for line in plain] == [
        [
            {
                "index": 0,
                "delta": {"role": "assistant", "content": "This"},
                "logprobs": None,
                "finish_reason": None,
            }
        ],
        [{"index": 0, "delta": {"content": " answer"}, "logprobs": None, "finish_reason": None}],
        [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "length"}],
        "[DONE]",
    ]
    assert reply.headers["Content-Type"].startswith("text/event-stream")
    assert len(counted) == 5
    usage = json.loads(counted[3])
    assert (usage["choices"], usage["usage"]["completion_tokens"]) == ([], 2)


@simulated
async def test_a_stream_is_silent_until_its_first_token_unless_switched() -> None:
    studio = world(prompt_seconds=30)
    studio.load(CHAT.key, seconds=0)

    await chat(studio, stream=True, max_tokens=1)
    assert now() == 30.0

    studio.set_faults(headers_before_first_token=True)
    reply = await chat(studio, stream=True, max_tokens=1)
    assert now() == 30.0
    await reply.read()
    assert now() == 60.0


@simulated
async def test_words_can_be_counted_paced_chosen_and_of_several_bytes() -> None:
    studio = world(answer_tokens=3, token_seconds=2, prompt_seconds=1, multibyte_words=True)
    studio.load(CHAT.key, seconds=0)

    reply = await (await chat(studio)).json()
    assert reply["choices"][0]["message"]["content"] == "Olá, ação não"
    assert reply["choices"][0]["finish_reason"] == "stop"
    assert now() == 5.0

    studio.set_faults(answer_text="🙂 ok")
    reply = await (await chat(studio)).json()
    assert reply["choices"][0]["message"]["content"] == "🙂 ok 🙂"


@simulated
async def test_completions_and_v0_have_their_own_fields() -> None:
    studio = world()
    studio.load(CHAT.key, seconds=0)

    asked = {"model": CHAT.key, "prompt": "x", "max_tokens": 2}
    completion = await (await post(studio, "/v1/completions", asked)).json()
    v0 = await (await post(studio, "/api/v0/chat/completions", asked)).json()
    streamed = data_lines(await (await post(studio, "/v1/completions", {**asked, "stream": True})).read())

    assert (completion["object"], completion["choices"][0]["text"]) == ("text_completion", "This answer")
    assert v0["stats"]["stop_reason"] == "maxPredictedTokensReached"
    assert v0["model_info"] == {"arch": "llama", "quant": "Q4_K_M", "format": "gguf", "context_length": 4096}
    assert [json.loads(line)["choices"][0]["text"] for line in streamed[:-1]] == ["This", " answer", ""]
    assert streamed[-1] == "[DONE]"


@simulated
async def test_a_responses_stream_ends_with_completed_and_without_done() -> None:
    studio = world()
    studio.load(CHAT.key, seconds=0)

    asked = {"model": CHAT.key, "input": "x", "stream": True, "max_output_tokens": 2}
    body = await (await post(studio, "/v1/responses", asked)).read()

    assert event_names(body) == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert json.loads(data_lines(body)[-1])["response"]["usage"]["output_tokens"] == 2


@simulated
async def test_an_anthropic_stream_has_its_six_kinds_of_event() -> None:
    studio = world()
    studio.load(CHAT.key, seconds=0)

    asked = {"model": CHAT.key, "messages": [], "stream": True, "max_tokens": 1}
    body = await (await post(studio, "/v1/messages", asked)).read()

    assert event_names(body) == [
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert json.loads(data_lines(body)[4])["delta"]["stop_reason"] == "max_tokens"


@simulated
async def test_the_native_stream_tells_of_the_load_and_ends_with_chat_end() -> None:
    studio = world()

    asked = {"model": SMALL.key, "input": "x", "stream": True, "max_output_tokens": 2, "store": False}
    reply = await post(studio, "/api/v1/chat", asked)
    assert now() == 0.0
    body = await reply.read()

    names = list(dict.fromkeys(event_names(body)))
    assert names == [
        "chat.start",
        "model_load.start",
        "model_load.progress",
        "model_load.end",
        "prompt_processing.start",
        "prompt_processing.progress",
        "prompt_processing.end",
        "message.start",
        "message.delta",
        "message.end",
        "chat.end",
    ]
    said = [json.loads(line) for line in data_lines(body)]
    progress = [event["progress"] for event in said if event["type"] == "model_load.progress"]
    assert len(progress) > 30
    assert progress == sorted(progress)
    result = said[-1]["result"]
    assert result["output"] == [{"type": "message", "content": "This answer"}]
    assert result["stats"]["model_load_time_seconds"] == 3.0
    assert "response_id" not in result


@simulated
async def test_the_native_stream_says_error_and_then_chat_end() -> None:
    studio = world(stream_breaks="error", stream_breaks_after=1)
    studio.load(CHAT.key, seconds=0)

    body = await (
        await post(studio, "/api/v1/chat", {"model": CHAT.key, "input": "x", "stream": True})
    ).read()

    assert event_names(body)[-2:] == ["error", "chat.end"]


@simulated
async def test_a_reasoning_model_thinks_first_and_one_token_is_reasoning() -> None:
    studio = Studio([SimModel("thinker", load_seconds=0, reasoning=("off", "on"))])

    one = await (await chat(studio, "thinker", max_tokens=1)).json()
    off = await post(studio, "/api/v1/chat", {"model": "thinker", "input": "x", "reasoning": "off"})
    wrong = await post(studio, "/api/v1/chat", {"model": "thinker", "input": "x", "reasoning": "high"})
    streamed = await post(studio, "/api/v1/chat", {"model": "thinker", "input": "x", "stream": True})

    assert one["choices"][0]["message"]["content"] == ""
    assert one["choices"][0]["message"]["reasoning_content"] == "This"
    assert [item["type"] for item in (await off.json())["output"]] == ["message"]
    assert (wrong.status, (await error(wrong))["code"]) == (400, "invalid_value")
    names = event_names(await streamed.read())
    assert names.index("reasoning.start") < names.index("reasoning.end") < names.index("message.start")


@simulated
async def test_embeddings_count_no_tokens() -> None:
    studio = world()

    reply = await (await post(studio, "/v1/embeddings", {"model": EMBED.key, "input": ["a", "b"]})).json()

    assert len(reply["data"]) == 2
    assert reply["usage"] == {"prompt_tokens": 0, "total_tokens": 0}


@simulated
async def test_a_prompt_beyond_the_context_is_refused() -> None:
    studio = world()
    studio.load(CHAT.key, seconds=0, context_length=16)

    reply = await post(studio, "/v1/completions", {"model": CHAT.key, "prompt": "word " * 20})

    assert reply.status == 400
    assert "context length" in (await error(reply))["message"]


@simulated
async def test_an_instance_works_on_four_requests_and_queues_the_rest() -> None:
    studio = world(prompt_seconds=10)
    studio.load(CHAT.key, seconds=0)
    asked = [asyncio.create_task(chat(studio, max_tokens=1)) for _ in range(6)]
    await asyncio.sleep(5)

    instance = studio.state()["models"][0]["instances"][0]
    assert (instance["generating"], instance["queued"]) == (4, 2)
    await asyncio.gather(*asked)
    assert now() == 20.0


@simulated
async def test_a_stalled_server_answers_nothing_until_it_goes_on() -> None:
    studio = world(stalled=True)
    asked = asyncio.create_task(get(studio, "/api/v1/models"))
    await asyncio.sleep(1000)
    assert not asked.done()

    studio.set_faults(stalled=None)
    assert (await asked).status == 200


# answers that go wrong


@pytest.mark.parametrize(
    ("how", "status", "body"),
    [
        ("unloaded_in_queue", 400, {"error": "Model was unloaded while the request was still in queue.."}),
        ("unloaded", 400, {"error": "Model unloaded."}),
        ("reloaded", 400, {"error": "Model reloaded."}),
        (
            "crash",
            400,
            {"error": "The model has crashed without additional information. (Exit code: null)"},
        ),
        (
            "error_200",
            200,
            {"error": "Something went wrong inside, and the status does not say so."},
        ),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
@simulated
async def test_an_error_before_the_first_byte_is_json_also_for_a_stream(
    how: str, status: int, body: Any, stream: bool
) -> None:
    studio = world(answer=how)
    studio.load(CHAT.key, seconds=0)

    reply = await chat(studio, stream=stream)

    assert (reply.status, await reply.json()) == (status, body)


@simulated
async def test_errors_of_the_engine_come_in_three_layouts() -> None:
    studio = world(answer="reloaded", flat_errors=False)
    studio.load(CHAT.key, seconds=0)

    nested = await error(await chat(studio))
    native = await error(await post(studio, "/api/v1/chat", {"model": CHAT.key, "input": "x"}))
    studio.set_faults(flat_errors=True)
    flat = await error(await chat(studio))

    assert nested == {
        "message": "Model reloaded.",
        "type": "invalid_request_error",
        "param": None,
        "code": None,
    }
    assert native == {"type": "internal_error", "message": "Model reloaded."}
    assert flat == "Model reloaded."


@pytest.mark.parametrize(
    ("how", "ends"),
    [
        (
            "error",
            b'data: {"error":{"message":"Generation failed.","type":"server_error",'
            b'"param":null,"code":null}}\n\n',
        ),
        ("unload", b'"message":"Model unloaded.","type":"server_error","param":null,"code":null}}\n\n'),
        ("eof", b'"finish_reason":null}]}\n\n'),
    ],
)
@simulated
async def test_a_stream_can_end_badly_after_some_tokens(how: str, ends: bytes) -> None:
    studio = world(stream_breaks=how, stream_breaks_after=2)
    studio.load(CHAT.key, seconds=0)

    body = await (await chat(studio, stream=True)).read()

    assert body.count(b'"delta":') == 2
    assert body.endswith(ends)
    assert b"[DONE]" not in body
    assert b'"finish_reason":"' not in body
    assert studio.in_flight == 0


@simulated
async def test_done_can_follow_an_error() -> None:
    studio = world(stream_breaks="error", done_after_error=True)
    studio.load(CHAT.key, seconds=0)

    assert (await (await chat(studio, stream=True)).read()).endswith(b"}}\n\ndata: [DONE]\n\n")


@pytest.mark.parametrize(
    ("how", "expected"),
    [("fin", "fin"), ("rst", "rst"), ("half_event_fin", "fin"), ("half_event_rst", "rst")],
)
@simulated
async def test_a_stream_can_be_cut_at_or_inside_an_event(how: str, expected: str) -> None:
    studio = world(stream_breaks=how, stream_breaks_after=1)
    studio.load(CHAT.key, seconds=0)
    stream = await chat(studio, stream=True)
    got: list[bytes] = []
    with pytest.raises(Cut) as cut:
        await collect(stream, got)

    assert cut.value.how == expected
    assert got[-1].endswith(b"\n\n") is not how.startswith("half_event")
    assert studio.in_flight == 0


@simulated
async def test_half_an_event_can_be_followed_by_a_clean_end() -> None:
    studio = world(stream_breaks="half_event_eof")
    studio.load(CHAT.key, seconds=0)

    assert not (await (await chat(studio, stream=True)).read()).endswith(b"\n\n")


@simulated
async def test_a_stream_can_stall_for_a_while_or_for_ever() -> None:
    studio = world(stream_breaks="stall", stall_seconds=600)
    studio.load(CHAT.key, seconds=0)
    assert (await (await chat(studio, stream=True)).read()).endswith(b"[DONE]\n\n")
    assert now() > 600

    studio.set_faults(stall_seconds=0)
    stream = await chat(studio, stream=True)
    reading = asyncio.create_task(stream.read())
    await asyncio.sleep(100_000)
    assert not reading.done()
    reading.cancel()
    await asyncio.sleep(0)
    assert studio.in_flight == 0


@simulated
async def test_a_crash_takes_the_instance_away_or_leaves_it_listed() -> None:
    studio = world(answer={"value": "crash", "times": 1})
    studio.load(CHAT.key, seconds=0)
    assert (await chat(studio)).status == 400
    assert await listed(studio) == []

    studio.set_faults(answer={"value": "crash", "times": 1}, crash_stays_listed=True)
    studio.load(CHAT.key, seconds=0)
    assert (await chat(studio)).status == 400
    assert await listed(studio) == [CHAT.key]
    again = await chat(studio)
    assert await error(again) == "The model has crashed without additional information. (Exit code: null)"


@simulated
async def test_a_crash_loop_reloads_and_crashes_while_the_listing_stays_green() -> None:
    studio = world(answer="crash", crash_stays_listed=True, crash_reloads=True)
    studio.load(SMALL.key, seconds=3)
    await asyncio.sleep(3)

    for _ in range(5):
        assert (await chat(studio, SMALL.key)).status == 400
        assert await listed(studio) == [SMALL.key]

    assert kinds(studio).count("crashed") == 5
    assert kinds(studio).count("reloaded") == 4
    studio.set_faults(answer=None)
    assert (await chat(studio, SMALL.key)).status == 200


@simulated
async def test_a_crash_from_outside_breaks_what_runs() -> None:
    studio = world(token_seconds=1)
    studio.load(CHAT.key, seconds=0)
    stream = await chat(studio, stream=True)
    reading = asyncio.create_task(stream.read())
    await asyncio.sleep(2)
    studio.crash(CHAT.key)

    assert "crashed without additional information" in data_lines(await reading)[-1]


# a client that leaves


@simulated
async def test_a_client_that_leaves_frees_its_slot_at_once_in_queue_and_in_mid_stream() -> None:
    studio = world(parallel=1, token_seconds=1)
    studio.load(CHAT.key, seconds=0)
    stream = await chat(studio, stream=True)
    queued = asyncio.create_task(chat(studio))
    await asyncio.sleep(1)
    queued.cancel()
    await asyncio.sleep(0)
    await stream.body.aclose()  # type: ignore[union-attr]

    instance = studio.state()["models"][0]["instances"][0]
    assert (instance["generating"], instance["queued"], studio.in_flight) == (0, 0, 0)
    assert [event["phase"] for event in events(studio, "client.gone")] == ["queued", "generating"]
    assert events(studio, "generation.ended")[0]["outcome"] == "client_gone"


@simulated
async def test_a_body_closed_before_it_is_read_frees_its_slot() -> None:
    studio = world(headers_before_first_token=True)
    studio.load(CHAT.key, seconds=0)
    reply = await chat(studio, stream=True)
    await reply.body.aclose()  # type: ignore[union-attr]

    assert studio.in_flight == 0
    assert kinds(studio)[-1] == "client.gone"


@simulated
async def test_prompt_processing_goes_on_after_its_client_left() -> None:
    studio = world(prompt_seconds=10)
    studio.load(CHAT.key, seconds=0)
    asked = asyncio.create_task(chat(studio))
    await asyncio.sleep(2)
    asked.cancel()
    await asyncio.sleep(2)

    assert studio.state()["models"][0]["instances"][0]["generating"] == 1
    await asyncio.sleep(6.1)
    assert studio.state()["models"][0]["instances"][0]["generating"] == 0


# the server itself


@pytest.mark.parametrize(
    "path", ["/nope", "/health", "/v1/tokenize", "/slots", "/metrics", "/v1/models/unload"]
)
@simulated
async def test_an_unknown_route_is_a_200_with_an_error_or_a_404(path: str) -> None:
    studio = world()
    as_usual = await get(studio, path)
    studio.set_faults(unknown_route_404=True)
    reported = await get(studio, path)

    assert as_usual.status == 200
    assert await as_usual.json() == {"error": f"Unexpected endpoint or method. (GET {path})"}
    assert reported.status == 404


@simulated
async def test_a_preflight_and_a_wrong_method_are_unknown_routes() -> None:
    studio = world()
    reply = await studio.handle(Request("OPTIONS", "/v1/chat/completions"))

    assert (await reply.json())["error"] == "Unexpected endpoint or method. (OPTIONS /v1/chat/completions)"


@simulated
async def test_the_greeting_says_lm_studio() -> None:
    assert await (await get(world(), "/lmstudio-greeting")).json() == {"lmstudio": True}


@simulated
async def test_a_token_is_demanded_and_a_wrong_one_echoed_in_part() -> None:
    studio = world(auth_token="sk-lm-abcd1234:secretsecretsecret12")
    none = await get(studio, "/api/v1/models")
    wrong = await get(studio, "/api/v1/models", authorization="Bearer 22aa99887766")
    right = await get(studio, "/api/v1/models", authorization="Bearer sk-lm-abcd1234:secretsecretsecret12")
    anthropic = await post(
        studio,
        "/v1/messages",
        {"model": CHAT.key},
        **{"x-api-key": "sk-lm-abcd1234:secretsecretsecret12"},
    )

    assert (none.status, (await error(none))["code"]) == (401, "invalid_api_key")
    assert await error(wrong) == {
        "type": "invalid_request",
        "message": "Malformed LM Studio API token provided: 22aa...",
        "code": "invalid_api_key",
    }
    assert (right.status, anthropic.status) == (200, 200)
    assert (await get(studio, "/lmstudio-greeting")).status == 200
    assert "secret" not in json.dumps([studio.state(), studio.log()])


@simulated
async def test_a_token_can_be_demanded_for_inference_alone() -> None:
    studio = world(auth_token="t", auth_on_chat_only=True)

    assert (await get(studio, "/api/v1/models")).status == 200
    assert (await chat(studio)).status == 401


@simulated
async def test_bodies_that_are_not_json_are_refused() -> None:
    studio = world()

    native = await post(studio, "/api/v1/chat", b"{oops")
    openai = await post(studio, "/v1/chat/completions", b"[1]")
    multipart = await post(studio, "/v1/chat/completions", b"--x", **{"content-type": "multipart/form-data"})

    assert (native.status, openai.status, multipart.status) == (400, 400, 415)


@simulated
async def test_downloads_know_only_their_errors() -> None:
    studio = world()

    job = await get(studio, "/api/v1/models/download/status/job_1")
    here = await post(studio, "/api/v1/models/download", {"model": CHAT.key})
    nowhere = await post(studio, "/api/v1/models/download", {"model": "x"})

    assert (job.status, (await error(job))["type"]) == (404, "job_not_found")
    assert await here.json() == {"status": "already_downloaded"}
    assert (nowhere.status, (await error(nowhere))["type"]) == (404, "model_not_found")


@pytest.mark.parametrize(
    ("tier", "works"),
    [
        ("v1", {"/lmstudio-greeting", "/api/v1/models", "/api/v0/models", "/v1/models"}),
        ("v0", {"/lmstudio-greeting", "/api/v0/models", "/v1/models"}),
        ("openai", {"/v1/models"}),
    ],
)
@simulated
async def test_each_tier_serves_its_routes(tier: Any, works: set[str]) -> None:
    studio = world()
    studio.set_tier(tier)
    answered = set()
    for path in ("/lmstudio-greeting", "/api/v1/models", "/api/v0/models", "/v1/models"):
        reply = await get(studio, path)
        if reply.status == 200 and "error" not in await reply.json():
            answered.add(path)

    assert answered == works


@simulated
async def test_the_openai_tier_loads_on_the_first_request_and_once() -> None:
    studio = Studio([CHAT], tier="openai")

    replies = await asyncio.gather(chat(studio), chat(studio), chat(studio, "unknown"))

    assert [reply.status for reply in replies] == [200, 200, 404]
    assert len(events(studio, "load.started")) == 1


@simulated
async def test_a_restart_refuses_connections_breaks_answers_and_forgets_models() -> None:
    studio = world(token_seconds=1)
    await load(studio)
    stream = await chat(studio, stream=True)
    reading = asyncio.create_task(stream.read())
    await asyncio.sleep(2)
    studio.restart(down_seconds=20)

    with pytest.raises(Cut, match="fin"):
        await reading
    with pytest.raises(Cut, match="refused"):
        await get(studio, "/lmstudio-greeting")
    await asyncio.sleep(20)
    assert await listed(studio) == []
    assert studio.in_flight == 0


# the simulator's own controls


@simulated
async def test_time_can_be_skipped_and_all_that_was_due_happens_in_order() -> None:
    studio = world()
    await chat(studio, ttl=60)
    loading = asyncio.create_task(load(studio, SMALL.key))
    await asyncio.sleep(0)
    began = now()

    studio.advance(100)
    await loading

    assert now() == began
    assert [
        (e["kind"], round(e["t"] - began, 3)) for e in studio.log() if e["kind"] in ("load.ended", "expired")
    ][1:] == [("load.ended", 3.0), ("expired", 60.0)]


@simulated
async def test_somebody_else_can_load_by_hand() -> None:
    studio = world()
    studio.load(CHAT.key)
    await asyncio.sleep(6)

    assert studio.state()["models"][0]["loads"] == [
        {
            "instance_id": "acme/chat-8b",
            "owner": "by hand",
            "started": True,
            "elapsed_seconds": 6.0,
            "seconds": 12.0,
            "progress": 0.5,
        }
    ]
    with pytest.raises(ValueError, match="there is no model"):
        studio.load("nothing")
    studio.load(SMALL.key, seconds=0, identifier="taken")
    with pytest.raises(ValueError, match="already exists"):
        studio.load(SMALL.key, identifier="taken")


@simulated
async def test_the_journal_names_what_happened_and_never_what_was_said() -> None:
    studio = world()
    await chat(studio, SMALL.key, max_tokens=1)

    assert kinds(studio) == [
        "request",
        "load.started",
        "load.ended",
        "generation.started",
        "generation.ended",
        "reply",
    ]
    request = studio.log()[0]
    assert request == {
        "n": 1,
        "t": 0.0,
        "kind": "request",
        "request": 1,
        "method": "POST",
        "path": "/v1/chat/completions",
        "route": "chat",
        "model": "acme/small-1b",
        "stream": False,
        "max_tokens": 1,
    }
    assert "CANARY" not in json.dumps(studio.log())
    assert [event["n"] for event in studio.log(since=4)] == [5, 6]


@simulated
async def test_every_control_route_answers_and_explains_mistakes() -> None:
    studio = world()

    help_text = (await (await get(studio, "/simulator/")).read()).decode()
    assert all(name in help_text for name in FAULTS)
    loaded = await post(studio, "/simulator/load", {"model": CHAT.key, "seconds": 0})
    assert await loaded.json() == {"instance_id": CHAT.key, "status": "loaded"}
    crashed = await post(studio, "/simulator/crash", {"model": CHAT.key, "stays_listed": True})
    assert (crashed.status, await listed(studio)) == (200, [CHAT.key])
    evicted = await post(studio, "/simulator/evict", {"model": CHAT.key})
    assert (evicted.status, await listed(studio)) == (200, [])
    assert (await post(studio, "/simulator/advance", {"seconds": 5})).status == 200
    assert (await post(studio, "/simulator/tier", {"tier": "v0"})).status == 200
    assert (await (await get(studio, "/simulator/state")).json())["tier"] == "v0"
    patched = await studio.handle(
        Request("PATCH", "/simulator/faults", body=b'{"jit": false, "answer": {"value": "hang", "times": 2}}')
    )
    assert await patched.json() == {"faults": {"answer": {"value": "hang", "times": 2}, "jit": False}}
    for reply, message in (
        (
            await post(studio, "/simulator/tier", {"tier": "v2"}),
            'there is no tier "v2"; write one of v1, v0, openai',
        ),
        (await post(studio, "/simulator/evict", {}), '"model" is missing'),
        (await post(studio, "/simulator/advance", {"seconds": "5"}), "seconds is '5'; it must be a float"),
        (await post(studio, "/simulator/load", {"key": 1}), '"key" is not known here; write model'),
    ):
        assert reply.status == 400
        assert (await error(reply)).startswith(message)
    assert (await get(studio, "/simulator/nothing")).status == 404
    log = await studio.handle(Request("GET", "/simulator/log", "since=2"))
    assert (await log.json())["events"][0]["n"] == 3


@simulated
async def test_a_fault_can_be_limited_to_a_model_a_route_and_a_number_of_times() -> None:
    studio = world(
        answer=[
            {"value": "error_500", "model": SMALL.key, "route": "chat", "times": 1},
            {"value": "reloaded", "route": "/v1/completions"},
        ]
    )
    studio.load(CHAT.key, seconds=0)
    studio.load(SMALL.key, seconds=0)

    async def completion() -> int:
        return (await post(studio, "/v1/completions", {"model": SMALL.key, "prompt": "x"})).status

    assert (await chat(studio)).status == 200
    assert await completion() == 400
    assert (await chat(studio, SMALL.key)).status == 500
    assert (await chat(studio, SMALL.key)).status == 200
    assert studio.state()["fired"]["answer"] == 2


def test_a_fault_that_does_not_exist_or_fit_is_refused_with_the_nearest_name() -> None:
    for changes, message in (
        ({"auto_evit": True}, 'there is no fault "auto_evit"; did you mean "auto_evict"?'),
        ({"jit": 1}, "jit: 1 is not true or false"),
        ({"parallel": 1.5}, "parallel: 1.5 is not a whole number"),
        ({"load_seconds": "5"}, 'load_seconds: "5" is not a number'),
        ({"answer": "crush"}, 'did you mean "crash"?'),
        ({"answer": {"value": "crash", "time": 1}}, 'answer: "time" limits nothing'),
        ({"answer": {"value": "crash", "route": "chatt"}}, 'there is no route "chatt"; did you mean "chat"?'),
        ({"answer": {"times": 1}}, 'answer: the object has no "value"'),
        ({"answer": {"value": "crash", "times": 0}}, "answer: times is 0"),
    ):
        studio = world()
        with pytest.raises(FaultError) as refused:
            studio.set_faults({"stalled": True, **changes})

        assert message in str(refused.value)
        assert studio.faults.shown() == {}


def test_every_fault_has_a_default_that_it_accepts_and_a_line_that_explains_it() -> None:
    studio = world()
    for fault in FAULTS.values():
        studio.set_faults({fault.name: fault.default})
        assert len(fault.text) > 15

    assert len(studio.faults.shown()) == len(FAULTS)
    studio.faults.reset()
    assert studio.faults.shown() == {}


def test_faults_and_models_are_read_from_a_command_line() -> None:
    assert parse_fault("load_seconds=30") == ("load_seconds", 30)
    assert parse_fault("answer=crash") == ("answer", "crash")
    assert parse_fault("answer_text=12") == ("answer_text", "12")
    assert parse_fault('answer={"value": "crash", "times": 2}') == ("answer", {"value": "crash", "times": 2})
    with pytest.raises(FaultError, match="has no value; write jit=VALUE"):
        parse_fault("jit")

    model = parse_model("acme/big:2m:40GB")
    assert (model.key, model.load_seconds, model.size_bytes, model.kind) == (
        "acme/big",
        120.0,
        40 * 10**9,
        "llm",
    )
    assert parse_model("nomic-embed:500ms").kind == "embedding"
    assert parse_model("x:1.5").load_seconds == 1.5
    for text, message in (
        ("", "has no key"),
        ("x:soon", '"soon" is no load time; write 12, 12s, 500ms or 2m'),
        ("x:1s:big", '"big" is no size; write 4GB or 400MB'),
    ):
        with pytest.raises(ValueError, match=message):
            parse_model(text)


def test_the_same_seed_and_requests_give_the_same_world() -> None:
    async def scenario() -> Any:
        rng = random.Random(7)
        studio = Studio([CHAT, SMALL], faults={"answer": {"value": "crash", "chance": 0.3}}, rng=rng)
        bodies = []
        for n in range(30):
            reply = await chat(studio, (CHAT.key, SMALL.key)[n % 2], stream=n % 3 == 0, max_tokens=3)
            bodies.append((reply.status, await reply.read()))
        return bodies, studio.log()

    with asyncio.Runner(loop_factory=InstantLoop) as one, asyncio.Runner(loop_factory=InstantLoop) as two:
        first, second = one.run(scenario()), two.run(scenario())

    assert first == second
    assert {status for status, _ in first[0]} == {200, 400}


# switches that stand for what nobody has measured


@simulated
async def test_idle_time_can_be_counted_from_a_requests_start() -> None:
    for counted, expected in (("end", [CHAT.key]), ("start", [])):
        studio = world(idle_starts=counted, prompt_seconds=40)
        await chat(studio, ttl=60, max_tokens=1)
        await asyncio.sleep(30)

        assert await listed(studio) == expected


@simulated
async def test_idle_timers_have_a_default_a_cap_and_an_off_switch() -> None:
    studio = world(default_ttl_seconds=300, ttl_cap_seconds=500, auto_evict=False)
    await chat(studio)
    await chat(studio, SMALL.key, ttl=86_400)
    studio.set_faults(jit_expires=False)
    await post(studio, "/v1/embeddings", {"model": EMBED.key, "input": "."})

    shown = [model["instances"][0]["ttl_seconds"] for model in studio.state()["models"]]
    assert shown == [300.0, 500.0, None]


@simulated
async def test_without_jit_v0_may_list_only_what_is_loaded() -> None:
    studio = world(jit=False)
    studio.load(CHAT.key, seconds=0)
    assert len(await v0_states(studio)) == 3

    studio.set_faults(v0_lists_loaded_only=True)
    assert await v0_states(studio) == {CHAT.key: "loaded"}


@simulated
async def test_the_html_500_can_meet_any_listing_once() -> None:
    studio = world(html_500_at_load_start="listing")
    studio.load(CHAT.key)

    replies = [(await get(studio, "/api/v1/models")).status for _ in range(3)]
    assert replies == [500, 200, 200]


@simulated
async def test_a_stream_can_be_answered_in_one_piece_of_json() -> None:
    studio = world(answer="json_despite_stream")
    studio.load(CHAT.key, seconds=0)

    reply = await chat(studio, stream=True, max_tokens=1)
    assert (await reply.json())["object"] == "chat.completion"


@pytest.mark.parametrize(
    ("how", "status", "start"),
    [
        ("error_500", 500, b'{"error":'),
        ("html_500", 500, b"<!DOCTYPE"),
        ("empty_body", 200, b""),
        ("truncated_json", 200, b'{"id":"chatcmpl'),
    ],
)
@simulated
async def test_an_answer_can_be_something_else(how: str, status: int, start: bytes) -> None:
    studio = world(answer=how)
    studio.load(CHAT.key, seconds=0)

    reply = await chat(studio)
    body = await reply.read()

    assert reply.status == status
    assert body.startswith(start)
    assert how != "truncated_json" or not body.endswith(b"}")


@simulated
async def test_an_answer_can_never_come_or_be_cut_off() -> None:
    studio = world(answer="hang")
    studio.load(CHAT.key, seconds=0)
    hanging = asyncio.create_task(chat(studio, stream=True))
    await asyncio.sleep(100_000)
    assert not hanging.done()
    hanging.cancel()
    await asyncio.sleep(0)
    assert studio.in_flight == 0

    for how in ("fin", "rst"):
        studio.set_faults(answer=how)
        with pytest.raises(Cut, match=how):
            await chat(studio, stream=True)
    assert studio.in_flight == 0


@simulated
async def test_a_listing_can_never_come() -> None:
    studio = world(list_reply="hang")
    hanging = asyncio.create_task(get(studio, "/api/v1/models"))
    await asyncio.sleep(100_000)

    assert not hanging.done()
    hanging.cancel()


@simulated
async def test_an_engine_can_crash_in_mid_stream() -> None:
    studio = world(stream_breaks="crash", stream_breaks_after=2)
    studio.load(CHAT.key, seconds=0)

    said = data_lines(await (await chat(studio, stream=True)).read())

    assert len(said) == 3
    assert "crashed without additional information" in said[-1]
    assert await listed(studio) == []


@simulated
async def test_a_refusal_of_a_token_can_have_another_status() -> None:
    assert (await get(world(auth_token="t", auth_status=403), "/api/v1/models")).status == 403


@simulated
async def test_a_json_object_format_is_refused() -> None:
    studio = world()
    studio.load(CHAT.key, seconds=0)

    assert (await chat(studio, response_format={"type": "json_object"})).status == 400
    assert (await chat(studio, response_format={"type": "text"})).status == 200


@simulated
async def test_a_model_can_vanish_at_the_very_request_that_was_sent_to_it() -> None:
    studio = world(jit=False)
    studio.load(CHAT.key, seconds=0)

    def vanish(event: dict[str, Any]) -> None:
        if event["kind"] == "request":
            studio.evict(CHAT.key)

    studio.journal.watchers.append(vanish)

    assert (await error(await chat(studio)))["message"].startswith("No models loaded.")


@simulated
async def test_a_restart_during_a_restart_counts_from_its_own_beginning() -> None:
    studio = world()
    studio.restart(down_seconds=10)
    await asyncio.sleep(5)
    studio.restart(down_seconds=10)
    await asyncio.sleep(8)
    assert studio.state()["up"] is False
    await asyncio.sleep(2)
    assert studio.state()["up"] is True
    assert kinds(studio).count("restart.up") == 1


@simulated
async def test_of_two_models_loading_on_demand_at_once_the_later_to_end_stays() -> None:
    studio = world()
    await asyncio.gather(chat(studio), chat(studio, SMALL.key))

    assert await listed(studio) == [CHAT.key]
    assert events(studio, "evicted")[0]["by"] == CHAT.key


@simulated
async def test_a_model_can_vanish_between_the_end_of_its_load_and_the_request_that_wanted_it() -> None:
    studio = world()

    def vanish(event: dict[str, Any]) -> None:
        if event["kind"] == "load.ended":
            asyncio.get_running_loop().call_soon(studio.evict, CHAT.key)

    studio.journal.watchers.append(vanish)
    reply = await chat(studio)

    assert reply.status == 400
    assert await error(reply) == "Model was unloaded while the request was still in queue.."


@simulated
async def test_a_fault_limited_to_two_times_happens_twice() -> None:
    studio = world(list_reply={"value": "error_500", "times": 2})

    assert [(await get(studio, "/api/v1/models")).status for _ in range(4)] == [500, 500, 200, 200]
    assert studio.state()["faults"] == {}
