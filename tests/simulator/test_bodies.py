"""What a body may hold, and what is refused although it is well-formed."""

import gzip
import json
import zlib
from typing import Any

import pytest

from keepalive.simulator.models import SimModel
from keepalive.simulator.studio import Studio
from tests.kit.simulated import CHAT, EMBED, chat, error, event_names, events, get, post, simulated, world

RERANK = SimModel("acme/rerank-1b", kind="reranker", load_seconds=1.0)
ASKED = {"model": CHAT.key, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 1}
PLAIN = json.dumps(ASKED).encode()
TEXT_PART = [{"type": "text", "text": "hello"}]
IMAGE_PART = [*TEXT_PART, {"type": "image_url", "image_url": {"url": "data:image/png;base64,eA=="}}]


def warm(**faults: Any) -> Studio:
    studio = world(**faults)
    studio.load(CHAT.key, seconds=0)
    return studio


@pytest.mark.parametrize(
    ("encoding", "body"),
    [
        ("gzip", gzip.compress(PLAIN)),
        ("GZIP", gzip.compress(PLAIN)),
        ("deflate", zlib.compress(PLAIN)),
        ("identity", PLAIN),
    ],
)
@simulated
async def test_a_compressed_body_is_taken(encoding: str, body: bytes) -> None:
    studio = warm()

    reply = await post(studio, "/v1/chat/completions", body, **{"content-encoding": encoding})

    assert reply.status == 200
    assert events(studio, "request")[0]["model"] == CHAT.key


@pytest.mark.parametrize(
    ("encoding", "body", "status", "message"),
    [
        ("gzip", gzip.compress(PLAIN)[:-9], 400, "unexpected end of file"),
        ("gzip", PLAIN, 400, "incorrect header check"),
        ("deflate", zlib.compress(PLAIN)[:10], 400, "unexpected end of file"),
        ("deflate", gzip.compress(PLAIN), 400, "incorrect header check"),
        ("br", PLAIN, 415, 'unsupported content encoding "br"'),
        ("gzip, gzip", PLAIN, 415, 'unsupported content encoding "gzip, gzip"'),
    ],
)
@simulated
async def test_a_body_that_cannot_be_inflated_is_refused(
    encoding: str, body: bytes, status: int, message: str
) -> None:
    studio = warm()

    reply = await post(studio, "/v1/chat/completions", body, **{"content-encoding": encoding})

    assert (reply.status, await error(reply)) == (status, message)


@pytest.mark.parametrize(("refused", "taken"), [("plain", "list"), ("list", "plain")])
@pytest.mark.parametrize(
    ("path", "field"),
    [
        ("/v1/chat/completions", "messages"),
        ("/v1/messages", "messages"),
        ("/v1/responses", "input"),
        ("/api/v0/chat/completions", "messages"),
    ],
)
@simulated
async def test_a_template_can_fail_on_one_kind_of_content(
    path: str, field: str, refused: str, taken: str
) -> None:
    studio = warm(content_refused=refused)
    bodies = {
        kind: {"model": CHAT.key, "max_tokens": 1, field: [{"role": "user", "content": content}]}
        for kind, content in (("plain", "hello"), ("list", TEXT_PART))
    }

    no, yes = await post(studio, path, bodies[refused]), await post(studio, path, bodies[taken])

    assert (no.status, yes.status) == (400, 200)
    assert (await error(no)).startswith("Error rendering prompt with jinja template: ")
    assert "`content` as" in await error(no)
    assert [event["outcome"] for event in events(studio, "generation.ended")] == ["refused", "ok"]


@simulated
async def test_a_template_that_fails_is_told_inside_a_native_stream() -> None:
    studio = warm(content_refused="plain")

    reply = await post(studio, "/api/v1/chat", {"model": CHAT.key, "input": "hello", "stream": True})

    assert event_names(await reply.read()) == ["chat.start", "error", "chat.end"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": IMAGE_PART}]}),
        (
            "/v1/responses",
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "data:,x"}]}]},
        ),
        ("/v1/messages", {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}),
        ("/api/v1/chat", {"input": [{"type": "image", "data_url": "data:,x"}]}),
    ],
)
@simulated
async def test_a_model_can_demand_an_image(path: str, body: dict[str, Any]) -> None:
    studio = warm(needs_image={"value": True, "model": CHAT.key})

    without, with_one = await chat(studio), await post(studio, path, {"model": CHAT.key, **body})

    assert (without.status, with_one.status) == (400, 200)
    assert await error(without) == 'Model "acme/chat-8b" needs an image in the request.'


@simulated
async def test_a_reranker_puts_documents_in_order() -> None:
    studio = Studio([RERANK])
    documents = ["of cats", {"text": "a dog that barks"}, "cats and a dog"]

    reply = await post(
        studio,
        "/v1/rerank",
        {"model": RERANK.key, "query": "cats dog", "documents": documents, "top_n": 2},
    )

    assert await reply.json() == {
        "model": RERANK.key,
        "object": "list",
        "usage": {"prompt_tokens": 12, "total_tokens": 12},
        "results": [{"index": 2, "relevance_score": 1.0}, {"index": 0, "relevance_score": 0.5}],
    }
    assert events(studio, "load.started")[0]["owner"] == "jit"


@simulated
async def test_a_reranker_refuses_every_other_request_and_others_refuse_its() -> None:
    studio = Studio([RERANK, CHAT, EMBED])
    for model in (RERANK, CHAT, EMBED):
        studio.load(model.key, seconds=0)
    asked = {"query": "x", "documents": ["x"]}

    said = [
        await error(await chat(studio, RERANK.key)),
        await error(await post(studio, "/v1/embeddings", {"model": RERANK.key, "input": "x"})),
        await error(await post(studio, "/v1/rerank", {"model": CHAT.key, **asked})),
        await error(await post(studio, "/v1/rerank", {"model": RERANK.key, "query": "x"})),
    ]

    assert [told["message"] for told in said] == [
        'Model "acme/rerank-1b" is a reranker.',
        'Model "acme/rerank-1b" is not an embedding model.',
        'Model "acme/chat-8b" is not a reranker.',
        '"documents" must be a non-empty string array',
    ]


@pytest.mark.parametrize(("shown", "v0"), [("embedding", "embeddings"), ("llm", "llm")])
@simulated
async def test_the_listings_show_a_reranker_as_one_of_the_types_that_they_know(shown: str, v0: str) -> None:
    studio = Studio([RERANK], faults={"reranker_listed_as": shown})
    loaded = await post(studio, "/api/v1/models/load", {"model": RERANK.key})
    listings = [await (await get(studio, path)).json() for path in ("/api/v1/models", "/api/v0/models")]

    assert (await loaded.json())["type"] == shown
    assert (listings[0]["models"][0]["type"], listings[1]["data"][0]["type"]) == (shown, v0)


@simulated
async def test_lm_studio_without_a_reranker_has_no_such_route() -> None:
    reply = await post(world(), "/v1/rerank", {"query": "x", "documents": ["x"]})

    assert (reply.status, await error(reply)) == (200, "Unexpected endpoint or method. (POST /v1/rerank)")
