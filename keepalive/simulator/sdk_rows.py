"""Models and instances as LM Studio's own SDKs are shown them, and what they ask for, read."""

from typing import Any

from keepalive.simulator.machine import Machine
from keepalive.simulator.memory import Memory
from keepalive.simulator.models import Instance, SimModel
from keepalive.simulator.speech import EPOCH


class SdkRefusal(Exception):
    """An error as the SDKs are told it; some know its code."""

    def __init__(self, title: str, code: str | None = None, **more: Any) -> None:
        super().__init__(title)
        self.error: dict[str, Any] = {"title": title}
        if code is not None:
            self.error["displayData"] = {"code": code, **more}


def no_such_model() -> SdkRefusal:
    return SdkRefusal("No model found that fits the query", "generic.noModelMatchingQuery")


def field(value: Any, name: str) -> Any:
    """Of what a client sent, where it is an object; None where it is not, or has no such field."""
    return value.get(name) if isinstance(value, dict) else None


def configured(stack: Any, key: str) -> Any:
    """One setting of a config stack; the last layer that names it counts."""
    found = None
    for layer in field(stack, "layers") or ():
        for one in field(field(layer, "config"), "fields") or ():
            if field(one, "key") == key:
                found = field(one, "value")
    if isinstance(found, dict) and "checked" in found:
        return found.get("value") if found["checked"] else None
    return found


def find(memory: Memory, specifier: Any) -> Instance | None:
    reference = field(specifier, "instanceReference")
    query = field(specifier, "query")
    wanted = field(query, "identifier") or field(query, "path")
    for instance in memory.instances.values():
        if reference is not None and reference == reference_of(instance):
            return instance
        if reference is None and wanted is not None and wanted in (instance.id, path_of(instance.model)):
            return instance
    return None


def reference_of(instance: Instance) -> str:
    return f"ref-{instance.id}-{round(1000 * instance.loaded_at)}"


def path_of(model: SimModel) -> str:
    return f"{model.publisher}/{model.key}.gguf"


def model_row(memory: Memory, model: SimModel) -> dict[str, Any]:
    kind = memory.listed_kind(model)
    row: dict[str, Any] = {
        "type": kind,
        "modelKey": model.key,
        "format": "gguf",
        "displayName": model.display_name,
        "publisher": model.publisher,
        "path": path_of(model),
        "sizeBytes": model.size_bytes,
        "indexedModelIdentifier": path_of(model),
        "deviceIdentifier": None,
        "architecture": model.architecture,
        "quantization": {"name": model.quantization, "bits": 4},
        "maxContextLength": model.max_context_length,
    }
    if model.params is not None:
        row["paramsString"] = model.params  # a null is none of its shapes
    if kind == "llm":
        row |= {"vision": model.vision, "trainedForToolUse": True}
    return row


def instance_row(machine: Machine, instance: Instance) -> dict[str, Any]:
    """What `lms ps --json` and the SDK see, timers included."""
    now = machine.memory.now()
    used = 1000 * EPOCH + round(1000 * now) - round(1000 * instance.idle_seconds(now))
    return {
        **model_row(machine.memory, instance.model),
        "identifier": instance.id,
        "instanceReference": reference_of(instance),
        "ttlMs": None if instance.ttl_seconds is None else round(1000 * instance.ttl_seconds),
        "lastUsedTime": None if instance.last_used is None else used,
        "contextLength": instance.context_length,
    }


def estimate(memory: Memory, kind: str, parameter: Any) -> dict[str, Any]:
    """What a load would take: the file, and a context that costs an eighth of it for each 4,096 tokens."""
    asked = field(parameter, "modelKey")
    model = memory.find(asked) if isinstance(asked, str) else None
    if model is None or memory.listed_kind(model) != kind:
        raise SdkRefusal(f'Cannot find a model with path "{asked}"', "generic.pathNotFound", path=asked)
    context = configured(field(parameter, "loadConfigStack"), f"{kind}.load.contextLength")
    tokens = context if isinstance(context, int) else model.usual_context_length
    factor = memory.estimate_factor(model)
    size, taken = round(factor * model.size_bytes), round(factor * model.size_bytes * tokens / 4_096 / 8)
    return {
        "memory": {
            "confidence": "high",
            "modelVramBytes": size,
            "contextVramBytes": taken,
            "totalVramBytes": size + taken,
            "modelBytes": size,
            "contextBytes": taken,
            "totalBytes": size + taken,
        },
        "passesGuardrails": memory.has_room(model),
    }


def work(instance: Instance) -> dict[str, Any]:
    working = list(instance.working.values())
    status = "idle"
    if working:
        prompting = all(call.phase == "prompt" for call in working)
        status = "processingPrompt" if prompting else "generating"
        if instance.model.kind == "embedding":
            status = "computingEmbedding"
    return {"status": status, "queued": len(working) + len(instance.queue)}  # the running ones count too
