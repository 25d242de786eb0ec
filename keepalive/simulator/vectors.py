"""What is answered in numbers: embeddings, and the order of documents."""

from keepalive.simulator.call import Call
from keepalive.simulator.exchange import Reply, json_reply, openai_error
from keepalive.simulator.models import Instance, SimModel
from keepalive.simulator.naming import resolve
from keepalive.simulator.turn import load_on_demand, loaded, misanswer, process_prompt, work_on


async def embed(call: Call) -> Reply:
    instance = await _turn(call, "embedding")
    asked = call.payload.get("input", "")
    count = len(asked) if isinstance(asked, list) and asked and not isinstance(asked[0], int) else 1
    rows = [
        {
            "object": "embedding",
            "embedding": [round(0.01 * (n + 1) * (i + 1), 4) for i in range(8)],
            "index": n,
        }
        for n in range(count)
    ]
    reply = json_reply(
        {
            "object": "list",
            "data": rows,
            "model": call.word("answer_model") or instance.id,
            "usage": {"prompt_tokens": 0, "total_tokens": 0},  # always 0, in every version measured
        }
    )
    await misanswer(call, instance, reply)
    call.generation_ended("ok")
    return reply


async def rerank(call: Call) -> Reply:
    """As llama-server and others serve it; LM Studio has no such route."""
    query, documents = call.payload.get("query"), call.payload.get("documents")
    if not isinstance(query, str):
        raise openai_error(400, '"query" must be provided', code=None)
    if not isinstance(documents, list) or not documents:
        raise openai_error(400, '"documents" must be a non-empty string array', code=None)
    instance = await _turn(call, "reranker")
    asked = set(query.lower().split())
    texts = [str(text.get("text", "")) if isinstance(text, dict) else str(text) for text in documents]
    scores = [round(len(asked & set(text.lower().split())) / (len(asked) or 1), 4) for text in texts]
    order = sorted(range(len(texts)), key=lambda n: (-scores[n], n))
    top = call.payload.get("top_n")
    tokens = sum(len(text.split()) for text in (query, *texts))
    reply = json_reply(
        {
            "model": call.word("answer_model") or instance.id,
            "object": "list",
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
            "results": [
                {"index": n, "relevance_score": scores[n]}
                for n in order[: top if isinstance(top, int) and top > 0 else None]
            ],
        }
    )
    await misanswer(call, instance, reply)
    call.generation_ended("ok")
    return reply


async def _turn(call: Call, kind: str) -> Instance:
    target = resolve(call, kind)
    if isinstance(target, SimModel):
        load = load_on_demand(call, target)
        await call.until(lambda: load.ended)
        target = loaded(call, load)
    await work_on(call, target)
    await process_prompt(call, target, call.number("prompt_seconds"))
    return target
