"""LM Studio's JSON, as recorded and as nobody should send it."""

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepalive.core.errors import Reason, Refused, Unexpected
from keepalive.core.facts import Entry, Instance, Odd, Tier
from keepalive.lmstudio import wire

V1 = {
    "models": [
        {
            "type": "llm",
            "publisher": "acme",
            "key": "acme/tiny-4b",
            "quantization": {"name": "Q4_K_M", "bits_per_weight": 4},
            "size_bytes": 2497280000,
            "loaded_instances": [
                {"id": "acme/tiny-4b", "config": {"context_length": 8192, "parallel": 4}},
                {"id": "acme/tiny-4b:2", "config": {"context_length": 4096}},
            ],
            "variants": ["acme/tiny-4b@q4_k_m"],
        },
        {
            "type": "embedding",
            "key": "text-embedding-nomic-embed-text-v1.5",
            "quantization": None,
            "size_bytes": 84106624,
            "params_string": None,
            "loaded_instances": [],
        },
    ]
}


def v0_row(ident: str, state: str = "not-loaded", **more: Any) -> dict[str, Any]:
    return {"id": ident, "object": "model", "type": "llm", "state": state, **more}


def test_a_v1_listing_is_read_with_kinds_sizes_instances_and_variants():
    assert wire.v1_entries(V1) == [
        Entry(
            "acme/tiny-4b",
            "llm",
            2497280000,
            (Instance("acme/tiny-4b", 8192), Instance("acme/tiny-4b:2", 4096)),
            None,
            ("acme/tiny-4b@q4_k_m",),
            "acme/tiny-4b@q4_k_m",
        ),
        Entry("text-embedding-nomic-embed-text-v1.5", "embedding", 84106624),
    ]


def test_a_listing_is_found_by_key_in_any_case_and_by_variant():
    index = wire.by_key(wire.v1_entries(V1))

    assert index["acme/tiny-4b"] is index["acme/tiny-4b@q4_k_m"]
    assert wire.by_key([Entry("Acme/BIG")])["acme/big"].key == "Acme/BIG"


def test_a_variant_never_hides_a_model_of_that_key():
    index = wire.by_key([Entry("a", variants=("b",)), Entry("b")])

    assert index["b"].key == "b"


def test_of_two_rows_for_one_model_none_hides_what_the_other_shows():
    newer = [
        {"key": "a", "loaded_instances": [{"id": "a"}, {"id": "a:2"}], "size_bytes": 7},
        {"key": "A", "loaded_instances": [{"id": "a:2"}, {"id": "a:3"}]},
        {"key": "a", "loaded_instances": []},
    ]
    ids = (Instance("a"), Instance("a:2"), Instance("a:3"))
    older = [v0_row("a", "loaded"), v0_row("a"), v0_row("b"), v0_row("b", "loading"), v0_row("B")]

    for order in (newer, newer[::-1]):
        (one,) = wire.v1_entries({"models": order})
        assert sorted(one.instances, key=lambda i: i.id) == list(ids)
        assert wire.by_key([one])["a"].size_bytes == 7
    for order in (older, older[::-1]):
        a, b = sorted(wire.v0_entries({"data": order}), key=lambda e: e.key.lower())
        assert (a.instances, a.loading, b.instances, b.loading) == ((Instance("a"),), False, (), True)
    assert wire.by_key([Entry("a", instances=ids), Entry("a")])["a"].instances == ids


def test_both_listings_say_how_much_context_a_model_was_made_for():
    row = {"key": "a", "loaded_instances": [], "max_context_length": 32768}
    rows = [v0_row("a", max_context_length=32768), v0_row("b", max_context_length="many")]

    assert [entry.context_max for entry in wire.v1_entries({"models": [row]})] == [32768]
    assert [entry.context_max for entry in wire.v0_entries({"data": rows})] == [32768, None]


def test_a_v0_listing_is_read_with_its_copies_and_what_is_loading():
    rows = [
        v0_row("a", "loaded", loaded_context_length=8192),
        v0_row("a:2", "loaded"),
        v0_row("a:2", "loaded"),  # twice, and no third copy
        v0_row("b", "loading"),
        v0_row("c:2", "loaded"),
        v0_row("c"),
        v0_row("d", "not-loaded", type="embeddings"),
        v0_row("odd:7", "loaded"),
    ]

    assert wire.v0_entries({"data": rows}) == [
        Entry("a", "llm", None, (Instance("a", 8192), Instance("a:2")), False),
        Entry("b", "llm", None, (), True),
        Entry("c", "llm", None, (Instance("c:2"),), False),
        Entry("d", "embedding", None, (), False),
        Entry("odd:7", "llm", None, (Instance("odd:7"),), False),
    ]


@pytest.mark.parametrize(
    ("row", "selected"),
    [
        ({"selected_variant": "a@q8_0", "quantization": {"name": "Q4_K_M"}}, "a@q8_0"),
        ({"quantization": {"name": "Q4_K_M"}}, "a@q4_k_m"),
        ({"quantization": "4bit"}, "a@4bit"),
        ({"quantization": None, "selected_variant": None}, None),
        ({"quantization": {"name": None}, "selected_variant": 7}, None),
        ({}, None),
    ],
)
def test_the_variant_that_a_key_means_is_told_by_name_or_by_quantization(row, selected):
    newer = {"models": [{"key": "a", "loaded_instances": [], **row}]}

    assert wire.v1_entries(newer)[0].selected == selected
    if "selected_variant" not in row:
        assert wire.v0_entries({"data": [v0_row("a", **row)]})[0].selected == selected


@pytest.mark.parametrize("state", ["unloading", "Loaded", "", "sleeping", "error"])
def test_anything_but_loaded_is_not_ready(state: str):
    if state == "":
        with pytest.raises(Unexpected):
            wire.v0_entries({"data": [v0_row("a", state)]})
    else:
        assert wire.v0_entries({"data": [v0_row("a", state)]})[0].instances == ()


def test_what_is_loading_is_added_to_a_listing_that_does_not_tell():
    newer = [Entry("A"), Entry("b"), Entry("c")]
    older = wire.v0_entries({"data": [v0_row("a", "loading"), v0_row("b")]})

    assert [e.loading for e in wire.with_loading(newer, older)] == [True, False, None]


MISSHAPEN: list[Any] = [
    None,
    [],
    "x",
    3,
    {},
    {"models": None},
    {"models": {}},
    {"models": [1]},
    {"models": [{}]},
    {"models": [{"key": "a"}]},
    {"models": [{"key": "", "loaded_instances": []}]},
    {"models": [{"key": 3, "loaded_instances": []}]},
    {"models": [{"key": "a", "loaded_instances": [{}]}]},
    {"models": [{"key": "a", "loaded_instances": ["a"]}]},
    {"data": None},
    {"data": [{"id": "a"}]},
    {"data": [{"id": None, "state": "loaded"}]},
    {"data": [{"id": "a", "state": 3}]},
]


@pytest.mark.parametrize("answer", MISSHAPEN)
def test_a_listing_of_another_shape_is_never_an_empty_listing(answer: Any):
    for read in (wire.v1_entries, wire.v0_entries):
        with pytest.raises(Unexpected):
            read(answer)


BROKEN = [
    None,
    "a",
    {},
    {"key": None, "loaded_instances": []},
    {"key": "b"},
    {"key": "B", "loaded_instances": 1},
]


@pytest.mark.parametrize("broken", [*BROKEN, {"key": "b", "loaded_instances": [{"id": None}]}])
def test_a_row_that_cannot_be_read_costs_its_own_model_alone_and_is_told(broken: Any):
    rows = [{"key": "a", "loaded_instances": []}, broken, {"key": "b", "loaded_instances": []}]
    told: list[Odd] = []

    keys = [entry.key for entry in wire.v1_entries({"models": rows}, told.append)]

    # Of what has a broken row, too, nobody knows whether it is loaded.
    assert keys == (["a"] if isinstance(broken, dict) and broken.get("key") else ["a", "b"])
    assert len(told) == 1
    assert told[0].why.startswith("1 of 3 rows are left out, as not to be read: ")
    assert "GET /api/v1/models" in told[0].why
    assert list(told[0].keys) == (["b"] if keys == ["a"] else [])


def test_a_broken_row_of_an_older_listing_or_of_another_server_costs_no_other_either():
    older = [v0_row("a"), {"id": "b:2", "state": 3}, v0_row("b"), {"state": "loaded"}]

    assert [entry.key for entry in wire.v0_entries({"data": older})] == ["a"]
    assert wire.openai_entries({"data": [{"id": "a"}, {"name": "b"}]}) == [Entry("a")]


def test_a_listing_may_be_a_list_with_nothing_around_it():
    assert wire.openai_entries([{"id": "a", "object": "model"}, {"id": "b"}]) == [Entry("a"), Entry("b")]
    for anything in ([], [1], ["a"], [{"name": "a"}]):
        with pytest.raises(Unexpected):
            wire.openai_entries(anything)


def test_a_server_that_has_no_models_may_say_so_with_null():
    assert wire.openai_entries({"object": "list", "data": None}) == []
    with pytest.raises(Unexpected, match="without a list"):
        wire.openai_entries({"data": None})


def test_what_is_in_memory_under_a_row_without_its_key_is_not_overlooked():
    rows = [{"key": "a", "loaded_instances": []}, {"key": "", "loaded_instances": [{"id": "a:2"}]}]

    assert wire.v1_entries({"models": rows}) == [Entry("a", instances=(Instance("a:2"),))]


@pytest.mark.parametrize("size", [True, -5, 0, "big", 1.5, None, [], {}])
def test_an_odd_size_is_no_size(size: Any):
    row = {
        "key": "a",
        "loaded_instances": [{"id": "a", "config": {"context_length": size}}],
        "size_bytes": size,
    }

    assert wire.v1_entries({"models": [row]}) == [Entry("a", instances=(Instance("a"),))]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
ROWS = st.lists(
    st.fixed_dictionaries(
        {}, optional=dict.fromkeys(("key", "id", "state", "loaded_instances", "variants"), JSON)
    ),
    max_size=3,
)


@given(answer=JSON | st.fixed_dictionaries({"models": ROWS, "data": ROWS}))
def test_any_json_is_read_or_refused(answer: Any):
    for read in (wire.v1_entries, wire.v0_entries, wire.openai_entries, wire.loaded):
        with suppress(Unexpected):
            read(answer)
    for status in (200, 400, 500):
        error = wire.refusal(status, answer)
        assert error is None or (str(error) and "\n" not in str(error))
    wire.answered_by(answer)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "answered with nothing"),
        (b'{"models":[{"key":"a"', "something that is not whole JSON (21 bytes)"),
        (b"<!DOCTYPE html><html>", "HTML"),
        (b"  <HTML>", "HTML"),
        (b"\x00\xff\xfe", "not whole JSON"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "not whole JSON"),
        (b"[" * 100_000, "not whole JSON"),
        (b"9" * 10_000, "not whole JSON"),
    ],
)
def test_what_is_no_json_is_said_without_being_quoted(body: bytes, said: str):
    with pytest.raises(Unexpected, match="GET /x") as caught:
        wire.decode(body, "GET /x was asked; it")

    assert said in str(caught.value)
    assert "OpenSSH" not in str(caught.value)


@pytest.mark.parametrize(
    ("status", "answer", "reason", "message"),
    [
        (200, {"error": "Unexpected endpoint or method. (GET /x)"}, Reason.UNKNOWN_ROUTE, None),
        (404, {"detail": "Not Found"}, Reason.UNKNOWN_ROUTE, "Not Found"),
        (405, {}, Reason.UNKNOWN_ROUTE, "HTTP 405"),
        (400, {"error": "The model has crashed without additional information."}, Reason.CRASHED, None),
        (400, {"error": "Model was unloaded while the request was still in queue.."}, Reason.UNLOADED, None),
        (400, {"error": {"message": "Model unloaded."}}, Reason.UNLOADED, "Model unloaded."),
        (400, {"error": {"message": "Model reloaded."}}, Reason.UNLOADED, None),
        (
            500,
            {"error": {"type": "model_load_failed", "message": "Error: insufficient system resources"}},
            Reason.RESOURCES,
            None,
        ),
        (500, {"error": "Failed to load model: Insufficient Memory"}, Reason.RESOURCES, None),
        (400, {"error": {"message": "error loading model: failed to allocate buffer"}}, Reason.RESOURCES, None),
        (500, {"error": {"type": "model_load_failed", "message": "it broke"}}, Reason.LOAD_FAILED, "it broke"),
        (404, {"error": {"message": "Failed to load", "code": "model_not_found"}}, Reason.LOAD_FAILED, None),
        (400, {"error": {"message": "Which?", "code": "model_not_found"}}, Reason.UNKNOWN_MODEL, "Which?"),
        (400, {"error": {"code": "invalid_api_key", "message": "Malformed"}}, Reason.UNAUTHORIZED, "Malformed"),
        (400, {"error": {"code": "unrecognized_keys", "message": "Unrecognized key(s): 'ttl'"}}, Reason.OTHER, None),
        (200, {"error": {"message": "", "type": "internal_error"}}, Reason.OTHER, "HTTP 200 internal_error"),
        (500, {"error": None}, Reason.OTHER, "HTTP 500"),
        (500, [1, 2], Reason.OTHER, "HTTP 500"),
        (503, "text", Reason.OTHER, "HTTP 503"),
    ],
)  # fmt: skip
def test_errors_are_read_in_every_layout_and_classified_by_their_text(
    status: int, answer: Any, reason: Reason, message: str | None
):
    error = wire.refusal(status, answer)

    assert isinstance(error, Refused)
    assert (error.reason, error.status) == (reason, status)
    assert message is None or str(error) == message


@pytest.mark.parametrize("answer", [{"data": []}, {"error": None}, {"error": ""}, {"error": {}}, [], None])
def test_an_answer_without_an_error_is_no_refusal(answer: Any):
    assert wire.refusal(200, answer) is None


def test_foreign_text_becomes_one_line_of_bounded_length():
    cleaned = wire.clean("a\r\nb\x00\x1b[31m\u2028\ud800" + "x" * 10_000)

    assert cleaned.startswith("a b [31m x")
    assert len(cleaned) == wire.MESSAGE_MAX
    cleaned.encode()


@pytest.mark.parametrize("seconds", [None, True, "7", -1, float("nan"), 1e9, []])
def test_an_odd_load_time_is_none(seconds: Any):
    assert wire.loaded({"instance_id": "a", "load_time_seconds": seconds}) == wire.Loaded("a", None)


def test_a_load_answer_needs_its_instance():
    assert wire.loaded({"instance_id": "a:2", "load_time_seconds": 7.916}) == wire.Loaded("a:2", 7.916)
    for answer in ({}, None, [], {"instance_id": 3}, {"instance_id": ""}, {"status": "loaded"}):
        with pytest.raises(Unexpected):
            wire.loaded(answer)


def test_a_ping_is_the_smallest_request_of_its_kind():
    chat = {"model": "a:2", "messages": [{"role": "user", "content": "."}], "max_tokens": 1, "stream": False}

    assert wire.ping("llm", "a:2", Tier.V1) == ("/v1/chat/completions", {**chat, "temperature": 0})
    assert wire.ping("llm", "a:2", Tier.OPENAI) == ("/v1/chat/completions", chat)
    assert wire.ping("embedding", "e", Tier.V0, 86400.0) == (
        "/v1/embeddings",
        {"model": "e", "input": ".", "ttl": 86400},
    )


@pytest.mark.parametrize(
    ("name", "tier", "own"),
    [
        ("acme/tiny", Tier.V1, True),
        ("ACME/tiny", Tier.V1, True),
        ("acme/tiny:2", Tier.V1, False),
        ("acme/tiny-4b", Tier.V1, False),
        (None, Tier.V1, False),
        (None, Tier.OPENAI, True),
        ("/models/acme/tiny@main", Tier.OPENAI, True),
        ("qwen", Tier.OPENAI, False),
        ("/models/Qwen.gguf", Tier.OPENAI, False),
        ("/models/qwen@main", Tier.OPENAI, False),
        ("gemma-3-4b-it-Q4_K_M.gguf", Tier.OPENAI, True),
        ("gemma-3-4b-it-Q4_K_M.gguf", Tier.LLAMA, False),
        ("gemma-3-4b-it-Q4_K_M.gguf", Tier.V1, False),
    ],
)
def test_an_answer_counts_only_from_the_model_that_was_asked(name: str | None, tier: Tier, own: bool):
    assert wire.is_answer_of(name, ["acme/tiny"], tier, {"acme/tiny", "qwen"}) is own


def test_what_we_send_is_json():
    for kind in ("llm", "embedding"):
        for tier in Tier:
            body = wire.ping(kind, "a", tier)[1]

            assert json.loads(json.dumps(body)) == body
            assert body["model"] == "a"


LOADING = {"error": {"message": "Loading model", "type": "unavailable_error", "code": 503}}


@pytest.mark.parametrize(
    ("status", "answer", "retry_after", "reason"),
    [
        (503, LOADING, False, Reason.LOADING),
        (503, {"error": {"message": "loading model"}}, False, Reason.LOADING),
        (503, {"error": "busy"}, True, Reason.LOADING),
        (503, {"error": "busy"}, False, Reason.OTHER),
        (
            503,
            {"error": "Model acme/tiny is currently loading", "estimated_time": 20.0},
            False,
            Reason.LOADING,
        ),
        (503, {"detail": "Model is loading"}, False, Reason.LOADING),
        (503, {"detail": {"msg": "The engine is starting"}}, False, Reason.LOADING),
        (503, {"status": "loading model"}, False, Reason.LOADING),
        (503, {"message": "not ready yet: warming up"}, False, Reason.LOADING),
        (503, {"error": "downloading is overloaded"}, False, Reason.OTHER),
        (500, LOADING, True, Reason.OTHER),
        (503, {"error": "Error loading model. (Exit code: 1)"}, True, Reason.LOAD_FAILED),
        (503, {"error": "insufficient system resources"}, True, Reason.RESOURCES),
    ],
)
def test_a_server_that_says_that_it_loads_is_told_from_one_in_trouble(
    status: int, answer: object, retry_after: bool, reason: Reason
):
    refused = wire.refusal(status, answer, retry_after=retry_after)

    assert refused is not None
    assert refused.reason is reason


def test_a_reranker_is_asked_with_a_query_and_one_document():
    assert wire.ping("reranker", "r:2", Tier.V1) == (
        "/v1/rerank",
        {"model": "r:2", "query": ".", "documents": ["."]},
    )


def test_an_own_ping_is_sent_as_it_is_with_the_copy_that_is_asked():
    assert wire.own_ping(("/v1/audio", {"input": "a"}), "tts:2") == (
        "/v1/audio",
        {"input": "a", "model": "tts:2"},
    )


@pytest.mark.parametrize(
    ("answer", "count"),
    [
        ({"usage": {"prompt_tokens": 5900, "completion_tokens": 1}}, 5900),
        ({"usage": {"input_tokens": 12, "output_tokens": 1}}, 12),
        ({"usage": {"prompt_tokens": "many"}}, None),
        ({"usage": None}, None),
        ({}, None),
        ([], None),
    ],
)
def test_how_long_a_prompt_was_is_read_from_the_usage(answer: object, count: int | None):
    assert wire.tokens(answer) == count


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("Error rendering prompt with jinja template: no user query found", False),
        ("request (9000 tokens) exceeds the available context size (8192 tokens)", False),
        ("cannot parse 'the patient of bed 7 has'", True),
        ("unexpected tool look_into_the_ward_files", True),
        ("the patient", False),  # as short as that it may be by chance
        ("", False),
    ],
)
def test_an_error_that_repeats_what_was_sent_is_known(message: str, told: bool):
    body = {
        "messages": [{"role": "system", "content": "Say that\nthe patient   of bed 7 has no fever."}],
        "tools": [{"function": {"name": "look_into_the_ward_files"}}],
        "max_tokens": 1,
    }

    assert wire.quotes(message, body) is told


@pytest.mark.parametrize(
    "words",
    [
        "vk::Device::allocateMemory: ErrorOutOfDeviceMemory",
        "hipErrorOutOfMemory",
        "CUDA_ERROR_OUT_OF_MEMORY",
        "Insufficient VRAM to load the model",
        "model requires more system memory (8.0 GiB) than is available (4.1 GiB)",
        "Failed to load model: std::bad_alloc",
    ],
)
def test_memory_that_is_full_is_understood_in_the_words_of_every_engine(words: str):
    assert wire.reason(words) is Reason.RESOURCES
