"""The socket of LM Studio's SDKs: what it adds to a listing and to a load, and all that can be wrong with it.

Against the simulator, and against servers that do what none should, over real sockets on a clock that jumps.
"""

import asyncio
import contextlib
import json
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from math import inf
from typing import Any

import pytest
from aiohttp import ClientError, ClientSession, WSMsgType, web

from keepalive.core.errors import Cut, GivenUp, Reason, Refused, TimedOut, UpstreamError
from keepalive.core.facts import Instance, Need, Sdk, Sight
from keepalive.lmstudio.client import Client
from keepalive.lmstudio.line import MESSAGE_MAX, MESSAGES_A_SECOND
from keepalive.simulator.exchange import Request
from keepalive.simulator.models import SimModel
from keepalive.simulator.server import Server, serve
from keepalive.simulator.studio import Studio

pytestmark = pytest.mark.clock_jumps

CHAT = SimModel("acme/chat", load_seconds=60.0, size_bytes=8_000_000_000)
EMBED = SimModel("acme/embed", kind="embedding", load_seconds=1.0, max_context_length=2_048)
TOKEN = "sk-lm-canary01:canary0123456789abcd"


@asynccontextmanager
async def met(*, token: str | None = None, **faults: object) -> AsyncIterator[tuple[Server, Client]]:
    """A client that has seen its first listing."""
    async with (
        await serve(Studio([CHAT, EMBED], faults=faults)) as server,
        Client("local", server.url, token=token, sdk=True) as client,
    ):
        await client.listing()
        yield server, client


async def seen(client: Client, key: str = CHAT.key) -> Instance:
    return (await client.listing()).entries[key].instances[0]


def happened(server: Server, kind: str) -> int:
    return sum(event["kind"] == kind for event in server.studio.log(0))


async def chat(server: Server, key: str = CHAT.key) -> None:
    body = {"model": key, "messages": [{"role": "user", "content": "x"}]}
    async with (
        ClientSession() as session,
        session.post(f"{server.url}/v1/chat/completions", json=body) as answer,
    ):
        await answer.read()


# --- what is seen -----------------------------------------------------------------------------------


async def test_the_first_listing_sees_by_the_socket_already():
    async with met() as (server, client):
        server.studio.load(CHAT.key, seconds=0)
        server.studio.load(EMBED.key, seconds=0)
        listing = await client.listing()

        assert (listing.sight.sdk, listing.sight.session, listing.sight.late) == (Sdk.UP, 2, False)
        assert listing.entries[CHAT.key].instances == (
            Instance(CHAT.key, 4_096, busy=False, queued=0, ttl=inf, last_used=None),
        )
        assert listing.entries[EMBED.key].instances[0].busy is False


async def test_work_of_others_and_idle_timers_are_seen():
    async with met(token_seconds=1.0, answer_tokens=30, default_ttl_seconds=300) as (server, client):
        talking = asyncio.create_task(chat(server))
        await asyncio.sleep(70)
        working = await seen(client)
        await talking
        await asyncio.sleep(50)
        listing = await client.listing()
        rested = listing.entries[CHAT.key].instances[0]

        assert (working.busy, working.queued, working.ttl) == (True, 1, 300)
        assert (rested.busy, rested.queued) == (False, 0)
        assert listing.sight.clock is not None
        assert rested.last_used is not None
        assert listing.sight.clock - rested.last_used == pytest.approx(50, abs=1)


async def test_what_a_load_will_take_is_estimated_once_and_whether_it_fits_whenever_that_may_have_changed():
    async with met() as (server, client):
        client.expect({CHAT.key: {"context_length": 8_192}, "nobody": {}})
        first = await client.listing()
        await asyncio.sleep(1)
        second = await client.listing()
        server.studio.set_faults(memory_bytes=8_000_000_000)
        server.studio.load(EMBED.key, seconds=0)
        for _ in range(2):
            await client.listing()
            await asyncio.sleep(1)
        third = await client.listing()

        assert first.entries[CHAT.key].need is None
        assert second.entries[CHAT.key].need == Need(10_000_000_000, passes_guardrails=True, sure=True)
        assert third.entries[CHAT.key].need == Need(10_000_000_000, passes_guardrails=False, sure=True)
        assert third.entries[EMBED.key].need is None


async def test_what_does_not_fit_is_asked_about_again_since_another_program_may_give_memory_back():
    async with met(memory_bytes=7_000_000_000) as (server, client):
        client.expect({CHAT.key: {"context_length": 8_192}})
        await client.listing()
        await client.estimated()
        refuses = (await client.listing()).entries[CHAT.key].need
        server.studio.set_faults(memory_bytes=0)
        await asyncio.sleep(61)
        await client.listing()
        await client.estimated()
        passes = (await client.listing()).entries[CHAT.key].need

        assert refuses == Need(10_000_000_000, passes_guardrails=False, sure=True)
        assert passes == Need(10_000_000_000, passes_guardrails=True, sure=True)


async def test_the_token_opens_the_socket_and_another_one_is_refused_in_words_without_it():
    async with met(token=TOKEN, auth_token=TOKEN) as (_, client):
        assert (await client.listing()).sight.sdk is Sdk.UP
    async with met(token=TOKEN, sdk_answers="refused") as (_, client):
        sight = (await client.listing()).sight

        assert (sight.sdk, sight.why) == (Sdk.REFUSED, "the SDK socket /llm does not accept the API token")


async def test_a_socket_that_lm_studio_ends_is_opened_anew_at_once_and_told():
    async with met() as (server, client):
        server.studio.restart(0.0)
        await asyncio.sleep(1)
        sight = (await client.listing()).sight

        assert (sight.sdk, sight.session, sight.hung_up) == (Sdk.UP, 4, 2)


async def test_without_it_nothing_is_opened_and_nothing_known():
    async with await serve(Studio([CHAT])) as server, Client("local", server.url) as client:
        listing = await client.listing()

        assert listing.sight == Sight()
        assert happened(server, "sdk.opened") == 0


# --- loads ------------------------------------------------------------------------------------------


async def test_a_load_tells_its_progress_and_has_every_field_and_no_timer():
    fields = {"context_length": 8_192, "flash_attention": True, "num_parallel_sessions": 2}
    told: list[float] = []
    async with met() as (server, client):
        loaded = await client.load(CHAT.key, fields, timeout=900, told=told.append)
        instance = server.studio.memory.instances[CHAT.key]

        assert loaded.instance_id == CHAT.key
        assert told == sorted(set(told))
        assert 50 < len(told) <= 100
        assert (instance.context_length, instance.ttl_seconds) == (8_192, None)
        assert instance.config == {"flash_attention": True, "parallel": 2}


async def test_a_load_that_fails_says_why_as_over_http():
    async with met(load_result="guardrail") as (_, client):
        with pytest.raises(Refused) as refused:
            await client.load(CHAT.key, {}, timeout=900)
        assert refused.value.reason is Reason.RESOURCES
    async with met(load_result="fail") as (_, client):
        with pytest.raises(Refused) as refused:
            await client.load(CHAT.key, {}, timeout=900)
        assert refused.value.reason is Reason.LOAD_FAILED


@pytest.mark.parametrize("messages", [0, 1, 2, 50])
async def test_a_load_whose_socket_dies_has_an_unknown_end_and_the_next_one_goes_by_http(messages: int):
    async with met(load_cuts_socket=messages) as (server, client):
        with pytest.raises(Cut):
            await client.load(CHAT.key, {}, timeout=900)
        await asyncio.sleep(100)
        again = (await client.listing()).sight
        server.studio.set_faults(load_cuts_socket=None)
        await client.load(EMBED.key, {}, timeout=900, kind="embedding")
        for instance in server.studio.memory.copies(CHAT):
            server.studio.memory.unload(instance, by="hand")
        await client.load(CHAT.key, {}, timeout=900)

        assert again.sdk is Sdk.UP
        assert server.studio.memory.instances[EMBED.key].owner == "by hand"
        assert server.studio.memory.instances[CHAT.key].owner == "rest"


@pytest.mark.parametrize("answer", ["closes", "errors"])
async def test_a_load_is_ended_when_it_is_given_up_and_the_next_one_goes_the_same_way(answer: str):
    async with met(sdk_cancel=answer) as (server, client):
        load = asyncio.create_task(client.load(CHAT.key, {}, timeout=900, told=(told := []).append))
        await asyncio.sleep(20)
        await client.give_up(EMBED.key)
        await asyncio.sleep(5)
        begun = load.done()
        await client.give_up(CHAT.key)
        with pytest.raises(GivenUp):
            await load
        await client.give_up(CHAT.key)

        assert not begun
        assert (happened(server, "load.cancelled"), happened(server, "load.ended")) == (1, 0)
        assert max(told) < 0.5
        again: list[float] = []
        assert (await client.load(CHAT.key, {}, timeout=900, told=again.append)).instance_id == CHAT.key
        assert again


async def test_a_load_that_goes_on_though_it_is_given_up_ends_well():
    async with met(sdk_cancel="ignored") as (_, client):
        load = asyncio.create_task(client.load(CHAT.key, {}, timeout=900))
        await asyncio.sleep(20)
        await client.give_up(CHAT.key)

        assert (await load).instance_id == CHAT.key


async def test_over_http_there_is_no_word_to_give_a_load_up():
    async with met(websocket="refuse") as (server, client):
        load = asyncio.create_task(client.load(CHAT.key, {}, timeout=900))
        await asyncio.sleep(20)
        await client.give_up(CHAT.key)
        await load

        assert happened(server, "load.ended") == 1


async def test_a_load_of_which_nothing_is_said_is_unknown_soon():
    async with met() as (server, client):
        server.studio.set_faults(sdk_answers="silent")
        began = asyncio.get_running_loop().time()
        with pytest.raises(TimedOut, match="nothing of the load within 30 s"):
            await client.load(CHAT.key, {}, timeout=900)

        assert asyncio.get_running_loop().time() - began == pytest.approx(30, abs=1)


async def test_where_loads_are_not_served_they_go_by_http_at_once_without_what_it_does_not_take():
    async with met() as (server, client):
        server.studio.set_faults(sdk_answers="errors")
        loaded = await client.load(CHAT.key, {"num_parallel_sessions": 2}, timeout=900)

        assert loaded.instance_id == CHAT.key
        assert server.studio.memory.instances[CHAT.key].owner == "rest"
        assert happened(server, "load.started") == 1


# --- bad input ----------------------------------------------------------------------------------------

Behaviour = Callable[[web.WebSocketResponse, dict[str, Any]], Awaitable[None]]
TRANSPORTS: dict[int, asyncio.Transport] = {}


async def written(tunnel: web.WebSocketResponse, data: bytes) -> None:
    """Bytes past the library, which would not write them."""
    TRANSPORTS[id(tunnel)].write(data)
    await asyncio.sleep(0)


def reply(message: dict[str, Any], **more: Any) -> str:
    return json.dumps({"type": "rpcResult", "callId": message.get("callId"), **more})


async def binary(tunnel: web.WebSocketResponse, message: dict[str, Any]) -> None:
    await tunnel.send_bytes(reply(message, result=[]).encode())


async def huge(tunnel: web.WebSocketResponse, message: dict[str, Any]) -> None:
    await tunnel.send_str(reply(message, result="x" * (MESSAGE_MAX + 1)))


async def strangers(tunnel: web.WebSocketResponse, message: dict[str, Any]) -> None:
    for number in (999, -1, "1", None, 1.5, [], {}):
        await tunnel.send_str(json.dumps({"type": "rpcResult", "callId": number, "result": []}))
        await tunnel.send_str(
            json.dumps({"type": "channelSend", "channelId": number, "ackId": 1, "message": 7})
        )
        await tunnel.send_str(json.dumps({"type": number}))


async def garbage(tunnel: web.WebSocketResponse, message: dict[str, Any]) -> None:
    for text in ("", "{", "[]", "null", "7", "[" * 100_000, '{"type":"rpcError"}', '{"type":"unheardOf"}'):
        await tunnel.send_str(text)


async def nonsense(tunnel: web.WebSocketResponse, message: dict[str, Any]) -> None:
    """An answer to each call, in no shape that fits."""
    rows = [
        {"identifier": CHAT.key, "ttlMs": -5, "lastUsedTime": "today"},
        {"identifier": 7},
        None,
        "x",
        {"status": [], "queued": -1},
    ]
    await tunnel.send_str(reply(message, result=rows))


async def depths(tunnel: web.WebSocketResponse, message: dict[str, Any]) -> None:
    """JSON that is deep, has a name twice, halves of characters, or numbers of any size."""
    ident = message.get("callId")
    deep = "[" * 900 + "]" * 900
    for result in (
        deep,
        f'[{{"identifier":{deep}}}]',
        '[{"identifier":"\\ud800","ttlMs":1e400,"lastUsedTime":-1e400}]',
        f'[{{"identifier":"{CHAT.key}","ttlMs":{"9" * 400},"lastUsedTime":{"9" * 5000}}}]',
        f'[{{"identifier":"{CHAT.key}","identifier":7,"ttlMs":60000}}]',
        '{"status":"\\udfff","queued":NaN,"memory":{"totalBytes":-Infinity}}',
    ):
        await tunnel.send_str(f'{{"type":"rpcResult","type":"rpcResult","callId":{ident},"result":{result}}}')
        await tunnel.send_str(
            f'{{"type":"rpcError","callId":{ident},"error":{{"title":{deep},"displayData":{{"code":{deep}}}}}}}'
        )


async def numbers(tunnel: web.WebSocketResponse, message: dict[str, Any]) -> None:
    """In the right shape, with numbers that cannot be."""
    if message["endpoint"] == "listLoaded":
        text = reply(message, result=[{"identifier": CHAT.key, "ttlMs": 1e308, "lastUsedTime": -1}])
    elif message["endpoint"] == "estimateModelUsage":
        text = reply(message, result={"memory": {"totalBytes": -9}, "passesGuardrails": "yes"})
    else:
        text = reply(message, result={"status": "generating", "queued": -3}).replace("-3", "NaN")
    await tunnel.send_str(text)


async def flood(tunnel: web.WebSocketResponse, message: dict[str, Any]) -> None:
    with contextlib.suppress(ConnectionError):
        for _ in range(5 * MESSAGES_A_SECOND):
            await tunnel.send_str('{"type":"signalUpdate"}')


async def errors(tunnel: web.WebSocketResponse, message: dict[str, Any]) -> None:
    ids = {name: message[name] for name in ("callId", "channelId") if name in message}
    await tunnel.send_str(json.dumps({"type": "rpcError", **ids, "error": {"title": [], "displayData": 5}}))


async def hang_up(tunnel: web.WebSocketResponse, message: dict[str, Any]) -> None:
    await tunnel.close()


async def pings(tunnel: web.WebSocketResponse, message: dict[str, Any]) -> None:
    await written(tunnel, b"\x89\x01?" * (5 * MESSAGES_A_SECOND))
    await tunnel.send_str(reply(message, result=[]))


async def bomb(tunnel: web.WebSocketResponse, message: dict[str, Any]) -> None:
    """A gigabyte of nothing, packed, though nobody has offered to unpack."""
    packed = zlib.compress(bytes(2**20), 9)[2:-4] * 1024
    await written(tunnel, b"\xc1\x7f" + len(packed).to_bytes(8, "big") + packed)


ENDS = [
    b"\x88\x02" + code.to_bytes(2, "big") for code in (999, 1000, 1001, 1005, 1006, 1009, 1011, 4000, 65_535)
]
ENDS += [
    b"\x88\x00",
    b"\x88\x01?",
    b"\x88\x04\x03\xe8\xff\xfe",
    b"\xf1\x00",
    b"\x80\x00",
    b"\x09\x01?",
    b"\x81\x02\xff\xfe",
]
ends = iter([])


async def odd_ends(tunnel: web.WebSocketResponse, message: dict[str, Any]) -> None:
    """Close frames and no frames at all, another one with each call."""
    global ends
    one = next(ends, None)
    if one is None:
        ends = iter(ENDS)
        one = next(ends)
    await written(tunnel, one)


async def silence(tunnel: web.WebSocketResponse, message: dict[str, Any]) -> None:
    pass


class Odd:
    """LM Studio's listings by a simulator; the socket by `behaviour`, after a greeting that is `greeting`."""

    def __init__(self, behaviour: Behaviour, greeting: str | None = '{"success":true}') -> None:
        self.studio = Studio([CHAT, EMBED])
        self.behaviour = behaviour
        self.greeting = greeting
        self.upgrade: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]] | None = None
        self.upgrades = 0
        self.calls = 0

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        if request.headers.get("Upgrade", "").lower() != "websocket":
            body = await request.read()
            said = await self.studio.handle(Request(request.method, request.path, "", {}, body))
            return web.Response(status=said.status, body=await said.read(), content_type="application/json")
        self.upgrades += 1
        if self.upgrade is not None:
            return await self.upgrade(request)
        tunnel = web.WebSocketResponse(max_msg_size=0)
        await tunnel.prepare(request)
        assert request.transport is not None
        TRANSPORTS[id(tunnel)] = request.transport
        async for message in tunnel:
            if message.type is not WSMsgType.TEXT:
                continue
            said = json.loads(message.data)
            if "authVersion" in said:
                if self.greeting is not None:
                    await tunnel.send_str(self.greeting)
                continue
            self.calls += 1
            await self.behaviour(tunnel, said)
        return tunnel


@asynccontextmanager
async def odd(server: Odd) -> AsyncIterator[Client]:
    runner = web.ServerRunner(web.Server(server.answer), shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        async with Client("local", f"http://127.0.0.1:{runner.addresses[0][1]}", sdk=True) as client:
            client.expect({CHAT.key: {}})
            yield client
    finally:
        await runner.cleanup()
        server.studio.close()


@pytest.mark.parametrize(
    "behaviour",
    [
        binary,
        huge,
        bomb,
        strangers,
        garbage,
        nonsense,
        depths,
        numbers,
        flood,
        errors,
        hang_up,
        odd_ends,
        silence,
    ],
)
async def test_whatever_the_socket_says_http_goes_on(behaviour: Behaviour):
    server, loop = Odd(behaviour), asyncio.get_running_loop()
    async with odd(server) as client:
        server.studio.load(CHAT.key, seconds=0)
        for _ in range(20):
            began = loop.time()
            listing = await client.listing()
            took = loop.time() - began
            instance = listing.entries[CHAT.key].instances[0]

            assert took <= 1.1
            assert instance.ttl is None
            assert instance.last_used is None
            assert listing.entries[CHAT.key].need is None
            await asyncio.sleep(15)
        await client.unload(CHAT.key, timeout=5)

    # Five minutes of it: tried more and more rarely, and with no more questions than there were listings.
    assert server.upgrades <= 20
    assert server.calls <= 20 * 3 + 10


async def test_pings_count_among_the_messages_of_a_second():
    async with odd(Odd(pings)) as client:
        sight = (await client.listing()).sight

        assert (sight.sdk, sight.late) == (Sdk.UP, True)


class Raising:
    """A socket that greets, and whose library fails from then on at what it says or at what it hears."""

    def __init__(self, error: Exception, at: str) -> None:
        self.error = error
        self.at = at
        self.greeted = False

    async def dial(self, path: str) -> "Raising":
        if self.at == "dial":
            raise self.error
        return Raising(self.error, self.at)

    async def send(self, text: str) -> None:
        if self.greeted and self.at == "send":
            raise self.error

    async def receive(self) -> str:
        if not self.greeted:
            self.greeted = True
            return '{"success":true}'
        if self.at == "receive":
            raise self.error
        await asyncio.sleep(3_600)
        return ""

    async def close(self) -> None:
        if self.at == "close":
            raise self.error


@pytest.mark.parametrize("at", ["dial", "send", "receive", "close"])
@pytest.mark.parametrize(
    "error",
    [
        ClientError("gone"),
        ValueError("odd"),
        RuntimeError("closing"),
        TimeoutError(),
        RecursionError(),
        OverflowError(),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"),
        MemoryError(),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_whatever_a_library_raises_listings_and_loads_go_on(error: Exception, at: str):
    async with (
        await serve(Studio([CHAT, EMBED])) as server,
        Client("local", server.url, sdk=True, dial=Raising(error, at).dial) as client,
    ):
        client.expect({CHAT.key: {}})
        for _ in range(4):
            assert (await client.listing()).sight.sdk in (Sdk.UP, Sdk.ABSENT)
            await asyncio.sleep(15)
        with contextlib.suppress(UpstreamError):
            await client.load(CHAT.key, {}, timeout=120)
        await client.load(CHAT.key, {}, timeout=120)

        assert (await client.listing()).entries[CHAT.key].instances


async def test_an_upgrade_that_leads_elsewhere_is_not_followed():
    async def away(request: web.BaseRequest) -> web.StreamResponse:
        raise web.HTTPFound(f"{server.url}/llm")

    async with await serve(Studio([CHAT])) as server:
        front = Odd(silence)
        front.upgrade = away
        async with odd(front) as client:
            sight = (await client.listing()).sight

        assert (sight.sdk, happened(server, "sdk.opened")) == (Sdk.ABSENT, 0)


async def test_half_a_character_in_a_name_is_none():
    async def loads(tunnel: web.WebSocketResponse, message: dict[str, Any]) -> None:
        done = {"type": "success", "info": {"identifier": "a\ud800"}}
        sent = {"type": "channelSend", "channelId": message.get("channelId"), "message": done}
        await tunnel.send_str(reply(message, result=[]) if "callId" in message else json.dumps(sent))

    async with odd(Odd(loads)) as client:
        await client.listing()

        assert (await client.load(CHAT.key, {}, timeout=900)).instance_id == "a?"


@pytest.mark.parametrize(
    "greeting",
    [None, "", "[]", '{"success":1}', '{"lmstudio":true}', "x" * (MESSAGE_MAX + 1)],
    ids=["nothing", "empty", "a list", "a number", "another word", "huge"],
)
async def test_what_does_not_greet_as_lm_studio_does_is_no_socket(greeting: str | None):
    server = Odd(silence, greeting)
    async with odd(server) as client:
        for _ in range(20):
            await client.listing()
            await asyncio.sleep(15)
        sight = (await client.listing()).sight

    assert sight.sdk is Sdk.ABSENT
    assert sight.why
    assert server.upgrades <= 20
    assert server.calls == 0


async def test_an_upgrade_that_is_refused_is_no_socket():
    async with met(websocket="refuse") as (_, client):
        sight = (await client.listing()).sight

        assert (sight.sdk, sight.why) == (Sdk.ABSENT, "there is no SDK socket at /llm: HTTP 426")


async def test_a_socket_that_leaves_a_question_unanswered_is_late_and_then_given_up():
    async with met() as (server, client):
        server.studio.load(CHAT.key, seconds=0)
        server.studio.set_faults(sdk_answers="silent")
        sights = []
        for _ in range(4):
            sights.append((await client.listing()).sight)
            await asyncio.sleep(14)

        assert [(sight.sdk, sight.late) for sight in sights] == [
            (Sdk.UP, True),
            (Sdk.UP, True),
            (Sdk.UP, True),
            (Sdk.ABSENT, False),
        ]
        assert sights[-1].why == "it has left a question unanswered for 30 s"


async def test_progress_that_goes_back_or_makes_no_sense_is_not_told():
    steps = [0.5, 0.2, -1, 2, "x", None, 0.505, 0.6, True, 1.0]

    async def loads(tunnel: web.WebSocketResponse, message: dict[str, Any]) -> None:
        if message.get("endpoint") != "loadModel":
            await tunnel.send_str(reply(message, result=[]))
            return
        ident = message["channelId"]
        for step in steps:
            told = {"type": "progress", "progress": step}
            await tunnel.send_str(json.dumps({"type": "channelSend", "channelId": ident, "message": told}))
        done = {"type": "success", "info": {"identifier": "a"}}
        await tunnel.send_str(json.dumps({"type": "channelSend", "channelId": ident, "message": done}))

    told: list[float] = []
    async with odd(Odd(loads)) as client:
        await client.listing()
        loaded = await client.load(CHAT.key, {}, timeout=900, told=told.append)

    assert loaded.instance_id == "a"
    assert told == [0.5, 0.6, 1.0]


async def test_a_reload_of_the_config_opens_and_closes_it():
    async with met() as (server, client):
        client.configure(token=None, connect_timeout=5, list_timeout=10, sdk=False)
        off = (await client.listing()).sight
        client.configure(token=None, connect_timeout=5, list_timeout=10, sdk=True)
        await asyncio.sleep(400)
        on = (await client.listing()).sight

        assert off == Sight()
        assert on.sdk is Sdk.UP
        assert happened(server, "sdk.opened") == 4
