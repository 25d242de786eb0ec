"""What LM Studio's own SDKs meet on the WebSockets `/llm`, `/embedding` and `/system`, frame by frame.

The first frame is the handshake; then calls with an id, answered with the same id. Enough to prove that a
proxy carries the tunnel, and to read what HTTP does not show (idle timers, work in progress). Loads are not
imitated.
"""

import json
from typing import TYPE_CHECKING, Any

from keepalive.simulator.exchange import compact
from keepalive.simulator.journal import Happened
from keepalive.simulator.listing import sdk_loaded, sdk_row
from keepalive.simulator.models import Instance
from keepalive.simulator.speech import EPOCH

if TYPE_CHECKING:
    from keepalive.simulator.studio import Studio

SDK_PATHS = ("/llm", "/embedding", "/system")


class SdkSession:
    def __init__(self, studio: "Studio", path: str) -> None:
        self._studio = studio
        self._kind = "embedding" if path == "/embedding" else "llm"
        self._greeted = False
        self._echoes = studio.faults.take("websocket", route="sdk") == "echo"
        studio.journal.write(Happened.SDK, path=path)

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
        token = str(self._studio.faults.look("auth_token"))
        halves = f"sk-lm-{said.get('clientIdentifier')}:{said.get('clientPasskey')}"
        if token and halves != token:
            return {"success": False, "error": "An LM Studio API token is required"}
        self._greeted = True
        return {"success": True}

    def _call(self, said: dict[str, Any]) -> dict[str, Any]:
        ident = said.get("callId")
        memory = self._studio.memory
        match said.get("endpoint"):
            case "listLoaded":
                now_ms = 1000 * EPOCH + round(1000 * memory.now())
                return {
                    "type": "rpcResult",
                    "callId": ident,
                    "result": sdk_loaded(memory, self._kind, now_ms),
                }
            case "listDownloadedModels":
                rows = [
                    {"type": m.kind, "modelKey": m.key, "sizeBytes": m.size_bytes}
                    for m in memory.models.values()
                ]
                return {"type": "rpcResult", "callId": ident, "result": rows}
            case "version":
                return {"type": "rpcResult", "callId": ident, "result": {"version": "0.4.25", "build": 1}}
            case "getInstanceProcessingState":
                instance = self._find(said.get("parameter"))
                if instance is not None:
                    return {"type": "rpcResult", "callId": ident, "result": _work(instance)}
                code = "generic.noModelMatchingQuery"
                error = {"title": "No model found that fits the query", "displayData": {"code": code}}
                return {"type": "rpcError", "callId": ident, "error": error}
        return {
            "type": "rpcError",
            "callId": ident,
            "error": {"title": f"No endpoint {said.get('endpoint')}"},
        }

    def _find(self, parameter: Any) -> Instance | None:
        specifier = parameter.get("specifier") if isinstance(parameter, dict) else None
        if not isinstance(specifier, dict):
            return None
        for instance in self._studio.memory.instances.values():
            row = sdk_row(self._studio.memory, instance, 0)
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
