"""What LM Studio's own SDKs meet on their WebSockets, one for each namespace, frame by frame.

The first frame is the handshake; then calls and channels with a number that the client chose, answered under it. What
is not imitated is answered with an error, as LM Studio answers what it does not know.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

from keepalive.simulator.call import Call
from keepalive.simulator.exchange import Cut, Hang, Refusal, Request, compact
from keepalive.simulator.journal import Happened
from keepalive.simulator.machine import Machine
from keepalive.simulator.sdk_channels import Channel, embed_string
from keepalive.simulator.sdk_rows import (
    SdkRefusal,
    estimate,
    field,
    find,
    instance_row,
    model_row,
    no_such_model,
    work,
)

SDK_PATHS = ("/llm", "/embedding", "/system", "/files", "/repository")


class SdkSession:
    """One socket. `close` it when it is gone."""

    def __init__(
        self,
        machine: Machine,
        path: str,
        send: Callable[[str | bytes], Awaitable[None]],
        hang_up: Callable[[], None] = lambda: None,
    ) -> None:
        self._machine = machine
        self._path = path
        self._kind = "embedding" if path == "/embedding" else "llm"
        self._send = send
        self.hang_up = hang_up
        self._greeted = False
        self._boot = machine.boots
        self._echoes = machine.faults.take("websocket", route="sdk") == "echo"
        self._channels: dict[Any, Channel] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        machine.journal.write(Happened.SDK, path=path)

    async def hear(self, frame: str | bytes) -> None:
        """Answers a frame, if it gets an answer. In echo mode all but handshake and calls come back as they
        are. Raises `Cut` when the socket is to be ended."""
        if self._machine.vanished:
            return
        if self._boot != self._machine.boots:
            raise Cut("rst")
        try:
            said = json.loads(frame)
        except ValueError:
            said = None
        if not isinstance(said, dict):
            if self._echoes:
                await self._send(frame)
            return
        if not self._greeted:
            await self._say(self._handshake(said))
            return
        if said.get("type") in ("rpcCall", "channelCreate") and await self._goes_wrong(said):
            return
        match said.get("type"):
            case "rpcCall" if said.get("endpoint") == "embedString":
                self._begin(self._embed(said))
            case "rpcCall":
                await self._say(self._call(said))
            case _ if self._echoes:
                await self._send(frame)
            case "keepAlive":
                await self._say({"type": "keepAliveAck"})
            case "channelCreate":
                self._begin(self._open(said))
            case "channelSend" if field(said.get("message"), "type") == "cancel":
                if channel := self._channels.get(said.get("channelId")):
                    channel.cancel()

    async def close(self) -> None:
        """Whatever it still waits for is for nobody."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _goes_wrong(self, said: dict[str, Any]) -> bool:
        faults = self._machine.faults
        match faults.take("sdk_answers", route="sdk"):
            case "garbled":
                await self._send("{")
            case "silent":
                pass
            case "errors":
                error = {"title": f"No endpoint {said.get('endpoint')}"}
                if said["type"] == "rpcCall":
                    await self._say({"type": "rpcError", "callId": said.get("callId"), "error": error})
                else:
                    await self._say(
                        {"type": "channelError", "channelId": said.get("channelId"), "error": error}
                    )
            case "drops":
                raise Cut("fin")
            case _:
                return faults.flag("stalled")
        return True

    async def _say(self, message: dict[str, Any]) -> None:
        await self._send(compact(message))

    def _handshake(self, said: dict[str, Any]) -> dict[str, Any]:
        answers = self._machine.faults.look("sdk_answers", route="sdk")
        if answers == "garbled":
            return {"lmstudio": False}
        if answers == "refused":
            return {"success": False, "error": f"Not for {said.get('clientPasskey')}"}
        if said.get("authVersion") != 1 or not said.get("clientIdentifier"):
            return {"success": False, "error": "Invalid authentication packet"}
        token = str(self._machine.faults.look("auth_token"))
        halves = f"sk-lm-{said.get('clientIdentifier')}:{said.get('clientPasskey')}"
        if token and halves != token:
            return {"success": False, "error": "An LM Studio API token is required"}
        self._greeted = True
        return {"success": True}

    # calls that are answered at once

    def _call(self, said: dict[str, Any]) -> dict[str, Any]:
        ident = said.get("callId")
        try:
            result = self._result(said.get("endpoint"), said.get("parameter"))
        except SdkRefusal as refusal:
            return {"type": "rpcError", "callId": ident, "error": refusal.error}
        return {"type": "rpcResult", "callId": ident, **({} if result is None else {"result": result})}

    def _result(self, endpoint: Any, parameter: Any) -> Any:
        memory = self._machine.memory
        match endpoint:
            case "listLoaded":
                return [
                    instance_row(self._machine, instance)
                    for instance in memory.instances.values()
                    if memory.listed_kind(instance.model) == self._kind
                ]
            case "listDownloadedModels":
                return [model_row(memory, model) for model in memory.models.values()]
            case "version":
                return {"version": "0.4.25", "build": 1}
            case "getInstanceProcessingState":
                if instance := find(memory, field(parameter, "specifier")):
                    return work(instance)
                raise no_such_model()
            case "getModelInfo":
                if instance := find(memory, field(parameter, "specifier")):
                    return instance_row(self._machine, instance)
                raise no_such_model()
            case "getLoadConfig":
                if instance := find(memory, field(parameter, "specifier")):
                    length = {"key": f"{self._kind}.load.contextLength", "value": instance.context_length}
                    return {"fields": [length]}
                raise no_such_model()
            case "estimateModelUsage":
                return estimate(memory, self._kind, parameter)
            case "unloadModel":
                ident = field(parameter, "identifier")
                unwanted = memory.instances.get(ident) if isinstance(ident, str) else None
                if unwanted is None:
                    raise SdkRefusal(f'No model is loaded as "{ident}"', "generic.identifierNotFound")
                memory.unload(unwanted, by="sdk")
                return None
        raise SdkRefusal(f"No endpoint {endpoint}")

    # and those that take their time

    def _begin(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _open(self, said: dict[str, Any]) -> None:
        ident = said.get("channelId")

        told = 0

        async def send(message: dict[str, Any]) -> None:
            nonlocal told
            if said.get("endpoint") == "loadModel":
                cut = self._machine.faults.number("load_cuts_socket", route="sdk")
                if 0 <= cut <= told:
                    self.hang_up()
                    await asyncio.get_running_loop().create_future()
                told += 1
            await self._say({"type": "channelSend", "channelId": ident, "message": message})

        async def run(call: Call) -> dict[str, Any]:
            channel = self._channels[ident] = Channel(call, self._kind, send)
            try:
                await channel.run(str(said.get("endpoint")), said.get("creationParameter"))
            finally:
                del self._channels[ident]
            return {"type": "channelClose", "channelId": ident}

        await self._carry_out(run, {"type": "channelError", "channelId": ident})

    async def _embed(self, said: dict[str, Any]) -> None:
        ident = said.get("callId")

        async def run(call: Call) -> dict[str, Any]:
            result = await embed_string(call, said.get("parameter"))
            return {"type": "rpcResult", "callId": ident, "result": result}

        await self._carry_out(run, {"type": "rpcError", "callId": ident})

    async def _carry_out(
        self, run: Callable[[Call], Awaitable[dict[str, Any]]], refused: dict[str, Any]
    ) -> None:
        call = Call(self._machine, self._machine.next_number(), Request("GET", self._path), "sdk")
        try:
            try:
                last = await run(call)
            except Hang:
                await call.hang()
            except SdkRefusal as refusal:
                last = {**refused, "error": refusal.error}
            except Refusal as refusal:
                last = {**refused, "error": {"title": refusal.message}}
        except Cut as cut:
            call.ended(cut)  # a restart; it ends every connection itself
            return
        except (asyncio.CancelledError, ConnectionError):
            call.client_gone()
            raise
        call.ended()
        await self._say(last)
