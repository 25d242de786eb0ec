"""What the listing routes show of the memory: `/api/v1/models`, `/api/v0/models` and `/v1/models`."""

from typing import Any
from urllib.parse import unquote

from keepalive.simulator.call import Call
from keepalive.simulator.exchange import Reply, html_500, json_reply, openai_error, spoiled
from keepalive.simulator.faults import Faults
from keepalive.simulator.memory import Memory
from keepalive.simulator.models import Instance, SimModel


def load_config(model: SimModel, context_length: int, config: Any) -> dict[str, Any]:
    if model.kind != "llm":
        return {"context_length": context_length}
    base = {
        "context_length": context_length,
        "eval_batch_size": 512,
        "flash_attention": True,
        "offload_kv_cache_to_gpu": True,
    }
    return {**base, **config}


def v1_models(memory: Memory, faults: Faults) -> dict[str, Any]:
    return {"models": [_v1_row(model, memory, faults) for model in memory.models.values()]}


def _v1_row(model: SimModel, memory: Memory, faults: Faults) -> dict[str, Any]:
    parallel = int(faults.number("parallel", model.key))

    def config(context_length: int, given: Any) -> dict[str, Any]:
        shown = load_config(model, context_length, given)
        return shown if model.kind != "llm" else {"parallel": parallel, **shown}

    instances = [
        {"id": instance.id, "config": config(instance.context_length, instance.config)}
        for instance in memory.copies(model)
        if memory.listed(instance)
    ]
    if faults.flag("lists_while_loading", model.key):
        instances += [
            {"id": load.instance_id, "config": config(load.context_length, load.config)}
            for load in memory.loads_of(model)
        ]
    row: dict[str, Any] = {
        "type": memory.listed_kind(model),
        "publisher": model.publisher,
        "key": model.key,
        "display_name": model.display_name,
        "architecture": model.architecture,
        "quantization": {"name": model.quantization, "bits_per_weight": 4},
        "size_bytes": model.size_bytes,
        "params_string": model.params,
        "loaded_instances": instances,
        "max_context_length": model.max_context_length,
        "format": "gguf",
    }
    if row["type"] == "embedding":
        del row["architecture"]
        return row
    capabilities: dict[str, Any] = {"vision": model.vision, "trained_for_tool_use": True}
    if model.reasoning:
        capabilities["reasoning"] = {
            "allowed_options": list(model.reasoning),
            "default": model.reasoning[-1],
        }
    return {
        **row,
        "capabilities": capabilities,
        "description": None,
        "variants": model.variants,
        "selected_variant": model.variant,
    }


def v0_models(memory: Memory, faults: Faults) -> dict[str, Any]:
    rows = [row for model in memory.models.values() for row in v0_rows(model, memory, faults)]
    if not faults.flag("jit") and faults.flag("v0_lists_loaded_only"):
        rows = [row for row in rows if row["state"] != "not-loaded"]
    return {"object": "list", "data": rows}


def v0_rows(model: SimModel, memory: Memory, faults: Faults) -> list[dict[str, Any]]:
    """The bare key first, whatever its state; further copies and custom identifiers are entries of their
    own."""
    listed = {instance.id: instance for instance in memory.copies(model) if memory.listed(instance)}
    loading = [load.instance_id for load in memory.loads_of(model)]
    if not faults.flag("v0_shows_loading", model.key):
        loading = []
    ids = dict.fromkeys([model.key, *listed, *loading])
    return [
        _v0_row(model, ident, listed.get(ident), ident in loading, memory.listed_kind(model)) for ident in ids
    ]


def _v0_row(
    model: SimModel, ident: str, instance: Instance | None, loading: bool, kind: str
) -> dict[str, Any]:
    row: dict[str, Any] = {
        "id": ident,
        "object": "model",
        "type": "embeddings" if kind == "embedding" else "vlm" if model.vision else "llm",
        "publisher": model.publisher,
        "arch": model.architecture,
        "compatibility_type": "gguf",
        "quantization": model.quantization,
        "state": "loaded" if instance else "loading" if loading else "not-loaded",
        "max_context_length": model.max_context_length,
    }
    if instance:
        row["loaded_context_length"] = instance.context_length
    if model.kind == "llm":
        row["capabilities"] = ["tool_use"]
    return row


def openai_models(memory: Memory, jit: bool) -> dict[str, Any]:
    """With JIT on, every model on disk: no proof of anything being loaded. With JIT off, what is loaded."""
    loaded = [instance for instance in memory.instances.values() if memory.listed(instance)]
    on_disk = memory.models if jit else {}
    ids = {**on_disk, **{instance.id: instance.model for instance in loaded}}
    rows = [{"id": ident, "object": "model", "owned_by": model.publisher} for ident, model in ids.items()]
    return {"object": "list", "data": rows}


# the routes


async def answer_listing(call: Call) -> Reply:
    if call.machine.faults.flag("gets_reset_ttl"):
        call.machine.memory.touch_all()
    reply = _listing(call)
    if (delay := call.number("list_delay_seconds")) > 0:
        await call.pause(delay)
    return reply


def _listing(call: Call) -> Reply:
    ident = unquote(call.request.path.removeprefix("/api/v0/models/")) if call.route == "model_v0" else ""
    if early := _first_look(call, ident):
        return early
    reply = json_reply(_shown(call, ident))
    match call.word("list_reply"):
        case "huge":
            body = reply.body
            assert isinstance(body, bytes)
            filling = b" " * int(call.number("huge_bytes"))
            return Reply(200, reply.headers, body[:-1] + filling + b"}")
        case "other_shape":
            return json_reply([{"name": key} for key in call.machine.memory.models])
        case "not_found":
            return json_reply({"detail": "Not Found"}, 404)
        case how:
            return spoiled(how, reply)


def _shown(call: Call, ident: str) -> dict[str, Any]:
    memory, faults = call.machine.memory, call.machine.faults
    match call.route:
        case "list":
            return v1_models(memory, faults)
        case "list_v0":
            return v0_models(memory, faults)
        case "list_openai":
            return openai_models(memory, call.machine.tier == "openai" or faults.flag("jit"))
    for model in memory.models.values():
        for row in v0_rows(model, memory, faults):
            if row["id"] == ident:
                return row
    raise openai_error(404, f'Model "{ident}" not found', param="model", code="model_not_found")


def _first_look(call: Call, ident: str) -> Reply | None:
    """E21: one probe in 79 met an HTML 500, exactly when a load began."""
    memory = call.machine.memory
    mode = call.word("html_500_at_load_start")
    model = memory.find(ident) if ident else None
    fresh = [model.key] if model else [] if ident else list(memory.first_looks)
    seen = [memory.first_looks.pop(key, False) for key in fresh]
    if mode == "listing" or (mode == "model_v0" and call.route == "model_v0"):
        return html_500() if any(seen) else None
    return None
