"""The protocol of LM Studio's SDKs, frame by frame, where the official one does not look."""

import asyncio
import json
from typing import Any

from keepalive.simulator.sdk import SdkSession
from keepalive.simulator.studio import Studio
from tests.kit.simulated import CHAT, EMBED, SMALL, events, simulated, world

Message = dict[str, Any]


class Socket:
    """One that has shaken hands."""

    def __init__(self, studio: Studio, path: str = "/llm") -> None:
        self.said: list[Message] = []
        self.session = SdkSession(studio, path, self._send)

    async def _send(self, frame: str | bytes) -> None:
        self.said.append(json.loads(frame))

    async def hear(self, **message: Any) -> None:
        if not self.said:
            await self.session.hear('{"authVersion":1,"clientIdentifier":"guest:x","clientPasskey":"y"}')
        await self.session.hear(json.dumps(message))

    async def open(self, endpoint: str, parameter: Any, number: int = 1) -> None:
        await self.hear(
            type="channelCreate", endpoint=endpoint, channelId=number, creationParameter=parameter
        )
        await asyncio.sleep(0.001)

    async def cancel(self) -> None:
        await self.hear(type="channelSend", channelId=1, message={"type": "cancel"})

    def messages(self, number: int = 1) -> list[Message]:
        return [one["message"] for one in self.said if one.get("channelId") == number and "message" in one]

    def kinds(self, number: int = 1) -> list[str]:
        """What came on a channel, with neighbours of one kind made one."""
        found: list[str] = []
        for one in self.said:
            if one.get("channelId") == number:
                kind = one["message"]["type"] if one["type"] == "channelSend" else one["type"]
                found += [kind] if found[-1:] != [kind] else []
        return found


def loads(studio: Studio) -> int:
    return len(events(studio, "load.started"))


@simulated
async def test_every_load_is_a_new_copy_and_tells_its_progress() -> None:
    studio = world()
    socket = Socket(studio)
    for number in (1, 2):
        await socket.open("loadModel", {"modelKey": CHAT.key}, number)
    await asyncio.sleep(20)

    assert [instance.id for instance in studio.memory.instances.values()] == [CHAT.key, f"{CHAT.key}:2"]
    assert socket.kinds(1) == socket.kinds(2) == ["resolved", "progress", "success", "channelClose"]
    assert socket.messages()[-1]["info"]["identifier"] == CHAT.key
    progress = [message["progress"] for message in socket.messages() if message["type"] == "progress"]
    assert progress == sorted(progress)
    assert 0 < progress[0] < progress[-1] < 1
    await socket.session.close()


@simulated
async def test_get_or_load_loads_on_demand_beside_another_load_and_throws_out_others_of_its_kind() -> None:
    studio = world()
    socket = Socket(studio)
    await socket.open("getOrLoad", {"identifier": SMALL.key, "loadTtlMs": 90_000})
    await asyncio.sleep(5)
    studio.load(CHAT.key)
    await socket.open("getOrLoad", {"identifier": CHAT.key}, 2)
    await asyncio.sleep(20)
    await socket.open("getOrLoad", {"identifier": CHAT.key}, 3)

    assert socket.kinds(1) == ["startLoading", "loadProgress", "loadSuccess", "channelClose"]
    assert socket.messages(1)[-1]["info"]["ttlMs"] == 90_000
    assert socket.kinds(2) == [
        "startLoading",
        "unloadingOtherJITModel",
        "loadProgress",
        "loadSuccess",
        "channelClose",
    ]
    assert socket.messages(2)[1]["info"]["modelKey"] == SMALL.key
    assert socket.kinds(3) == ["alreadyLoaded", "channelClose"]
    assert sorted(studio.memory.instances) == [CHAT.key, f"{CHAT.key}:2"]
    await socket.session.close()


@simulated
async def test_a_load_that_is_cancelled_ends_and_says_no_more() -> None:
    studio = world()
    socket = Socket(studio)
    await socket.open("loadModel", {"modelKey": CHAT.key})
    await asyncio.sleep(1)
    await socket.cancel()
    await asyncio.sleep(20)

    assert socket.kinds() == ["resolved", "progress", "channelClose"]
    assert len(events(studio, "load.cancelled")) == 1
    assert not studio.memory.instances
    await socket.session.close()


@simulated
async def test_a_load_goes_on_when_its_socket_is_gone_and_a_prediction_does_not() -> None:
    studio = world(token_seconds=1.0)
    studio.load(SMALL.key, seconds=0)
    socket = Socket(studio)
    await socket.open("loadModel", {"modelKey": CHAT.key})
    query = {"type": "query", "query": {"identifier": SMALL.key}}
    await socket.open("predict", {"modelSpecifier": query}, 2)
    await asyncio.sleep(1)
    await socket.session.close()
    await asyncio.sleep(20)

    assert CHAT.key in studio.memory.instances
    assert [event["outcome"] for event in events(studio, "generation.ended")] == ["client_gone"]
    assert studio.in_flight == 0


@simulated
async def test_a_prediction_loses_its_model_as_any_other_does() -> None:
    studio = world(token_seconds=1.0)
    studio.load(SMALL.key, seconds=0)
    socket = Socket(studio)
    query = {"type": "query", "query": {"identifier": SMALL.key}}
    await socket.open("predict", {"modelSpecifier": query})
    await asyncio.sleep(1)
    state = {"specifier": query, "throwIfNotFound": True}
    await socket.hear(type="rpcCall", endpoint="getInstanceProcessingState", callId=5, parameter=state)
    studio.evict(SMALL.key)
    await asyncio.sleep(1)

    assert socket.said[-2]["result"] == {"status": "generating", "queued": 1}
    assert socket.said[-1] == {"type": "channelError", "channelId": 1, "error": {"title": "Model unloaded."}}
    await socket.session.close()


@simulated
async def test_what_is_not_meant_for_a_namespace_or_makes_no_sense_is_an_error() -> None:
    studio = world()
    socket = Socket(studio)
    await socket.open("loadModel", {"modelKey": EMBED.key}, 1)
    await socket.open("getOrLoad", {"identifier": 7}, 2)
    await socket.open("predict", None, 3)
    await socket.open("unheardOf", {}, 4)
    studio.load(CHAT.key, seconds=0)
    await socket.open("loadModel", {"modelKey": CHAT.key, "identifier": CHAT.key}, 5)

    errors = {one["channelId"]: one["error"] for one in socket.said if one.get("type") == "channelError"}
    codes = {number: error.get("displayData", {}).get("code") for number, error in errors.items()}
    assert codes == {
        1: "generic.domainMismatch",
        2: "generic.pathNotFound",
        3: "generic.noModelMatchingQuery",
        4: None,
        5: None,
    }
    assert loads(studio) == 1
    await socket.session.close()
