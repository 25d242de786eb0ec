"""The explicit lifecycle over HTTP: load, unload, and what little there is of downloads."""

from typing import Any

from keepalive.simulator.bodies import LOAD_FIELDS, only_known_fields, required
from keepalive.simulator.call import Call
from keepalive.simulator.exchange import Reply, json_reply, native_error, spoiled
from keepalive.simulator.listing import load_config
from keepalive.simulator.models import Load
from keepalive.simulator.naming import unknown_model


async def load(call: Call) -> Reply:
    under_way = _begun(call)
    call.phase = "loading"
    call.load = under_way
    under_way.waiters.append(call)
    how = call.word("load_reply")
    after = call.number("load_reply_after_seconds")
    if how != "true" and after >= 0:
        await call.pause(after)
        return spoiled(how, json_reply(_load_reply(call, under_way)))
    await call.until(lambda: under_way.ended)
    if (delay := call.number("load_reply_delay_seconds")) > 0:
        await call.pause(delay)
    call.load = None
    reply = spoiled(how, json_reply(_load_reply(call, under_way)))
    if under_way.failure is not None and how == "true":
        message = f'Failed to load model "{under_way.model.key}". Error: {under_way.failure}'  # E9
        raise native_error(int(call.number("load_error_status")), "model_load_failed", message)
    return reply


def _begun(call: Call) -> Load:
    """The load as the body asks for it; its schema is closed."""
    fields = call.payload
    only_known_fields(fields, frozenset(LOAD_FIELDS))
    required(fields, "model")
    for field, value in fields.items():
        kind = LOAD_FIELDS[field]
        if not isinstance(value, kind) or (kind is int and value is True):
            message = f'"{field}" must be {kind.__name__}'
            raise native_error(400, "invalid_request", message, code="invalid_type", param=field)
    memory, asked = call.machine.memory, fields["model"]
    model = memory.find(asked)
    if model is None:
        raise unknown_model(call, asked)
    own = ("model", "context_length", "echo_load_config")
    config = {field: value for field, value in fields.items() if field not in own}
    context = fields.get("context_length")
    return memory.start_load(
        model, "rest", call.fault, context_length=context, config=config, variant=memory.variant(model, asked)
    )


def unload(call: Call) -> Reply:
    only_known_fields(call.payload, frozenset({"instance_id"}))
    required(call.payload, "instance_id")
    ident = call.payload["instance_id"]
    instance = call.machine.memory.instances.get(ident) if isinstance(ident, str) else None
    if instance is None:
        message = f'No loaded instance with id "{ident}" found.'
        raise native_error(404, "model_not_found", message, code="model_not_found", param="instance_id")
    call.machine.memory.unload(instance, by="rest")
    return json_reply({"instance_id": ident})


def download(call: Call) -> Reply:
    if call.request.method == "GET":
        raise native_error(404, "job_not_found", "Download job not found.", code="job_not_found")
    required(call.payload, "model")
    if isinstance(asked := call.payload["model"], str) and call.machine.memory.find(asked):
        return json_reply({"status": "already_downloaded"})
    raise unknown_model(call, str(asked))


def _load_reply(call: Call, load: Load) -> dict[str, Any]:
    reply: dict[str, Any] = {
        "type": call.machine.memory.listed_kind(load.model),
        "instance_id": load.instance_id,
        "load_time_seconds": round(load.instance.load_seconds, 3) if load.instance else 0.0,
        "status": "loaded",
    }
    if call.payload.get("echo_load_config") is True:
        reply["load_config"] = load_config(load.model, load.context_length, load.config)
    return reply
