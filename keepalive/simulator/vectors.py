"""What is answered in numbers: embeddings."""

from keepalive.simulator.call import Call
from keepalive.simulator.exchange import Reply, json_reply
from keepalive.simulator.models import SimModel
from keepalive.simulator.naming import resolve
from keepalive.simulator.turn import load_on_demand, loaded, misanswer, process_prompt, work_on


async def embed(call: Call) -> Reply:
    target = resolve(call, "embedding")
    if isinstance(target, SimModel):
        load = load_on_demand(call, target)
        await call.until(lambda: load.ended)
        target = loaded(call, load)
    await work_on(call, target)
    await process_prompt(call, call.number("prompt_seconds"))
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
            "model": call.word("answer_model") or target.id,
            "usage": {"prompt_tokens": 0, "total_tokens": 0},  # always 0, in every version measured
        }
    )
    await misanswer(call, target, reply)
    call.generation_ended("ok")
    return reply
