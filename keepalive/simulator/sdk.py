"""What LM Studio's own SDKs meet on the WebSockets `/llm`, `/embedding` and `/system`, frame by frame.

The first frame is the handshake; then calls with an id, answered with the same id. Enough to prove that a
proxy carries the tunnel, and to read what HTTP does not show (idle timers, work in progress). Loads are not
imitated.
"""

import json
from typing import Any

from keepalive.simulator.exchange import compact
from keepalive.simulator.journal import Happened
from keepalive.simulator.machine import Machine
from keepalive.simulator.memory import Memory
from keepalive.simulator.models import Instance
from keepalive.simulator.speech import EPOCH

SDK_PATHS = ("/llm", "/embedding", "/system")


class SdkSession:
    def __init__(self, machine: Machine, path: str) -> None:
        self._machine = machine
        self._kind = "embedding" if path == "/embedding" else "llm"
        self._greeted = False
        self._echoes = machine.faults.take("websocket", route="sdk") == "echo"
        machine.journal.write(Happened.SDK, path=path)

    def answer(self, frame: str | bytes) -> str | bytes | None:
        """The reply to a frame, if it gets one. In echo mode all but handshake and calls come back as they
        are."""
        try:
            said = json.loads(frame)
        except ValueError:
            said = None
        if not isinstance(said, dict):
            return frame if self._echoes else None
        if not self._greeted:
            return compact(self._handshake(said))
        match said.get("type"):
            case "rpcCall":
                return compact(self._call(said))
            case _ if self._echoes:
                return frame
            case "keepAlive":
                return compact({"type": "keepAliveAck"})
            case "channelCreate":
                error = {"title": "The simulator has no channels", "cause": "not imitated"}
                return compact({"type": "channelError", "channelId": said.get("channelId"), "error": error})
        return None

    def _handshake(self, said: dict[str, Any]) -> dict[str, Any]:
        if said.get("authVersion") != 1 or not said.get("clientIdentifier"):
            return {"success": False, "error": "Invalid authentication packet"}
        token = str(self._machine.faults.look("auth_token"))
        halves = f"sk-lm-{said.get('clientIdentifier')}:{said.get('clientPasskey')}"
        if token and halves != token:
            return {"success": False, "error": "An LM Studio API token is required"}
        self._greeted = True
        return {"success": True}

    def _call(self, said: dict[str, Any]) -> dict[str, Any]:
        found = self._result(said.get("endpoint"), said.get("parameter"))
        return {
            "type": "rpcError" if "error" in found else "rpcResult",
            "callId": said.get("callId"),
            **found,
        }

    def _result(self, endpoint: Any, parameter: Any) -> dict[str, Any]:
        memory = self._machine.memory
        match endpoint:
            case "listLoaded":
                return {"result": _loaded(memory, self._kind, 1000 * EPOCH + round(1000 * memory.now()))}
            case "listDownloadedModels":
                models = memory.models.values()
                rows = [
                    {"type": memory.listed_kind(m), "modelKey": m.key, "sizeBytes": m.size_bytes}
                    for m in models
                ]
                return {"result": rows}
            case "version":
                return {"result": {"version": "0.4.25", "build": 1}}
            case "getInstanceProcessingState":
                if instance := self._find(parameter):
                    return {"result": _work(instance)}
                code = "generic.noModelMatchingQuery"
                title = "No model found that fits the query"
                return {"error": {"title": title, "displayData": {"code": code}}}
        return {"error": {"title": f"No endpoint {endpoint}"}}

    def _find(self, parameter: Any) -> Instance | None:
        specifier = parameter.get("specifier") if isinstance(parameter, dict) else None
        if not isinstance(specifier, dict):
            return None
        for instance in self._machine.memory.instances.values():
            row = _row(self._machine.memory, instance, 0)
            if specifier.get("type") == "instanceReference":
                if specifier.get("instanceReference") == row["instanceReference"]:
                    return instance
            elif specifier.get("query", {}).get("identifier") == instance.id:
                return instance
        return None


def _work(instance: Instance) -> dict[str, Any]:
    working = list(instance.working.values())
    status = "idle"
    if working:
        prompting = all(call.phase == "prompt" for call in working)
        status = "processingPrompt" if prompting else "generating"
        if instance.model.kind == "embedding":
            status = "computingEmbedding"
    return {"status": status, "queued": len(working) + len(instance.queue)}  # the running ones count too


def _loaded(memory: Memory, kind: str, now_ms: int) -> list[dict[str, Any]]:
    """What `lms ps --json` and the SDK see, timers and work included."""
    return [
        _row(memory, instance, now_ms)
        for instance in memory.instances.values()
        if memory.listed_kind(instance.model) == kind
    ]


def _row(memory: Memory, instance: Instance, now_ms: int) -> dict[str, Any]:
    model = instance.model
    used = None if instance.last_used is None else now_ms - round(1000 * instance.idle_seconds(memory.now()))
    return {
        "type": memory.listed_kind(model),
        "modelKey": model.key,
        "format": "gguf",
        "displayName": model.display_name,
        "publisher": model.publisher,
        "path": f"{model.publisher}/{model.key}.gguf",
        "sizeBytes": model.size_bytes,
        "indexedModelIdentifier": f"{model.publisher}/{model.key}.gguf",
        "deviceIdentifier": None,
        "paramsString": model.params,
        "architecture": model.architecture,
        "quantization": {"name": model.quantization, "bits": 4},
        "identifier": instance.id,
        "instanceReference": f"ref-{instance.id}",
        "ttlMs": None if instance.ttl_seconds is None else round(1000 * instance.ttl_seconds),
        "lastUsedTime": used,
        "vision": model.vision,
        "trainedForToolUse": model.kind == "llm",
        "maxContextLength": model.max_context_length,
        "contextLength": instance.context_length,
    }
