"""What is said on the socket of LM Studio's own SDKs, to our types and back.

Pure. Evidence: the schemas of LM Studio's SDKs (2026-08), which check every message by them. Whatever is missing or
makes no sense is None, never an error: a listing over HTTP knows enough without it.
"""

import json
import math
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from keepalive.core.errors import Refused, Unexpected
from keepalive.core.facts import Instance, Need
from keepalive.lmstudio import wire

Json = Any

#: What a namespace is for, and the only two that show instances.
NAMESPACES: Final = ("llm", "embedding")
_TOKEN: Final = re.compile(r"sk-lm-([^:]+):(.+)")
# More than this is no size of a model, no time and no queue, but a mistake.
_BYTES_MAX, _SECONDS_MAX, _QUEUE_MAX = 2**50, 1e11, 2**31

_FIELDS: Final = {
    "llm": {
        "context_length": "llm.load.contextLength",
        "eval_batch_size": "llm.load.llama.evalBatchSize",
        "flash_attention": "llm.load.llama.flashAttention",
        "num_experts": "llm.load.numExperts",
        "num_parallel_sessions": "llm.load.numParallelSessions",
        "offload_kv_cache_to_gpu": "llm.load.offloadKVCacheToGpu",
    },
    "embedding": {"context_length": "embedding.load.contextLength"},
}


def text(message: Mapping[str, Json]) -> str:
    return json.dumps(message, separators=(",", ":"))


def read(said: str) -> Mapping[str, Json]:
    """A message; an empty one where it is none."""
    try:
        message = wire.parsed(said.encode())
    except (ValueError, RecursionError):
        return {}
    return message if isinstance(message, dict) else {}


# --- greeting ---------------------------------------------------------------------------------------


def secrets(token: str | None) -> tuple[str, ...]:
    """What must not be repeated of what LM Studio says: the longest first."""
    match = _TOKEN.fullmatch(token or "")
    parts = (token, match[2]) if match else (token,)
    return tuple(part for part in parts if part)


def handshake(token: str | None) -> Mapping[str, Json]:
    """The first message of a connection."""
    match = _TOKEN.fullmatch(token or "")
    name, secret = (match[1], match[2]) if match else (f"guest:keepalive-{uuid.uuid4()}", str(uuid.uuid4()))
    return {"authVersion": 1, "clientIdentifier": name, "clientPasskey": secret}


# --- what is there ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Work:
    """What an instance has to do just now."""

    busy: bool
    queued: int | None


def listed(answer: Json) -> dict[str, Instance]:
    """`listLoaded`, by identifier."""
    found = {}
    for row in answer if isinstance(answer, list) else ():
        name = row.get("identifier") if isinstance(row, Mapping) else None
        if not isinstance(name, str) or not name:
            continue
        ttl = row.get("ttlMs", "") if "ttlMs" in row else ""
        used = _number(row.get("lastUsedTime"), 1000 * _SECONDS_MAX)
        seconds = math.inf if ttl is None else _number(ttl, 1000 * _SECONDS_MAX)
        found[name] = Instance(
            name,
            ttl=None if seconds is None else seconds / 1000,
            last_used=None if used is None else used / 1000,
        )
    return found


def work(answer: Json) -> Work | None:
    """`getInstanceProcessingState`."""
    status = answer.get("status") if isinstance(answer, Mapping) else None
    if not isinstance(status, str):
        return None
    queued = _number(answer.get("queued"), _QUEUE_MAX)
    # A status that is not known is one of work: there is but one of rest.
    return Work(status != "idle" or bool(queued), None if queued is None else int(queued))


def seen(instance: Instance, shown: Mapping[str, Instance], works: Mapping[str, Work]) -> Instance:
    """An instance of the listing over HTTP, with what the socket adds."""
    more, doing = shown.get(instance.id), works.get(instance.id)
    if more is not None:
        instance = replace(instance, ttl=more.ttl, last_used=more.last_used)
    return instance if doing is None else replace(instance, busy=doing.busy, queued=doing.queued)


def instance_asked(identifier: str) -> Mapping[str, Json]:
    """The parameter of `getInstanceProcessingState`."""
    query = {"type": "query", "query": {"identifier": identifier}}
    return {"specifier": query, "throwIfNotFound": False}


# --- loads ------------------------------------------------------------------------------------------


def takes(namespace: str, fields: Mapping[str, Json]) -> bool:
    """Whether a load with these fields can be asked for here."""
    return fields.keys() <= _FIELDS[namespace].keys()


def load_asked(namespace: str, key: str, fields: Mapping[str, Json]) -> Mapping[str, Json]:
    """The parameter of `loadModel` and of `estimateModelUsage`. Without a `ttlMs` it never expires."""
    names = _FIELDS[namespace]
    settings = [{"key": names[name], "value": value} for name, value in fields.items() if name in names]
    layer = {"layerName": "apiOverride", "config": {"fields": settings}}
    return {"modelKey": key, "loadConfigStack": {"layers": [layer]}}


def progress(message: Mapping[str, Json]) -> float | None:
    return _number(message.get("progress"), 1.0)


def loaded(message: Mapping[str, Json]) -> wire.Loaded:
    """What `loadModel` says in the end."""
    info = message.get("info")
    name = info.get("identifier") if isinstance(info, Mapping) else None
    if not isinstance(name, str) or not name:
        raise Unexpected("loadModel succeeded without an `identifier`")
    return wire.Loaded(name, None)


def need(answer: Json) -> Need | None:
    """`estimateModelUsage`."""
    memory = answer.get("memory") if isinstance(answer, Mapping) else None
    if not isinstance(memory, Mapping):
        return None
    total = _number(memory.get("totalBytes"), _BYTES_MAX)
    if not total:
        return None
    passes = answer.get("passesGuardrails")
    return Need(int(total), passes if isinstance(passes, bool) else None, memory.get("confidence") == "high")


# --- errors -----------------------------------------------------------------------------------------


def refused(error: Json, secrets: tuple[str, ...] = ()) -> Refused:
    """An `rpcError` or a `channelError`: its title, and the cause of it."""
    parts = [error] if isinstance(error, str) else []
    code = ""
    if isinstance(error, Mapping):
        parts = [part for name in ("title", "cause") if isinstance(part := error.get(name), str) and part]
        shown = error.get("displayData")
        code = str(shown.get("code") or "") if isinstance(shown, Mapping) else ""
    said = ": ".join(dict.fromkeys(parts))
    for secret in secrets:
        said = said.replace(secret, "(token)")
    reason = wire.reason(f"{said} {_CODES.get(code, '')}")
    return Refused(wire.clean(said) or "an error without words", reason=reason, status=400)


_CODES: Final = {
    "generic.specificModelUnloaded": "model unloaded",
    "generic.noModelMatchingQuery": "model_not_found",
    "generic.identifierNotFound": "model_not_found",
    "generic.pathNotFound": "model_not_found",
    "generic.domainMismatch": "model_not_found",
}


def _number(value: Json, most: float) -> float | None:
    """A number from 0 to `most`; None where it is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if 0 <= value <= most else None
