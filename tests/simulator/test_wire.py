"""The simulator on real loopback sockets: what is a matter of bytes and connections."""

import asyncio
import gzip
import json
import re
import signal
import socket
import struct
import sys
from collections.abc import AsyncIterator
from itertools import pairwise
from typing import Any

import aiohttp
import httpx
import pytest

from keepalive.simulator.exchange import Request
from keepalive.simulator.models import SimModel
from keepalive.simulator.server import Server, serve
from keepalive.simulator.studio import Studio
from tests.kit.live import PATIENCE, until

CHAT = SimModel("acme/chat-8b", load_seconds=0.3)


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    studio = Studio([CHAT, SimModel("acme/small-1b", load_seconds=0.1)], faults={"prompt_seconds": 0.01})
    async with await serve(studio) as running:
        yield running


@pytest.fixture
async def client(server: Server) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=server.url, timeout=10) as made:
        yield made


def request(path: str, payload: dict[str, Any] | None = None, headers: str = "") -> bytes:
    if payload is None:
        return f"GET {path} HTTP/1.1\r\nHost: x\r\n{headers}\r\n".encode()
    body = json.dumps(payload)
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n{headers}\r\n"
    return head.encode() + body.encode()


def stream_request(**fields: Any) -> bytes:
    return request("/v1/chat/completions", {"model": CHAT.key, "stream": True, **fields})


async def connect(server: Server) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection(server.host, server.port)


async def everything(server: Server, sent: bytes) -> bytes:
    reader, writer = await connect(server)
    writer.write(sent)
    try:
        return await asyncio.wait_for(reader.read(), PATIENCE)
    finally:
        writer.close()


async def drain(reader: asyncio.StreamReader, got: list[bytes]) -> None:
    while piece := await reader.read(65_536):
        got.append(piece)


async def settle(server: Server) -> None:
    """Until the simulator has no request in hand."""
    await until(lambda: not server.studio.in_flight)


async def test_replies_carry_the_headers_of_express(client: httpx.AsyncClient) -> None:
    reply = await client.get("/api/v1/models")

    assert reply.headers["x-powered-by"] == "Express"
    assert reply.headers["content-type"] == "application/json; charset=utf-8"
    assert reply.headers["keep-alive"] == "timeout=5"
    assert reply.headers["connection"] == "keep-alive"


@pytest.mark.clock_jumps
async def test_an_idle_connection_is_closed_after_five_seconds(server: Server) -> None:
    reader, writer = await connect(server)
    writer.write(request("/lmstudio-greeting"))
    head = await reader.readuntil(b"\r\n\r\n")
    body = await reader.readexactly(17)
    began = asyncio.get_running_loop().time()
    rest = await asyncio.wait_for(reader.read(), 10)
    writer.close()

    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    assert (body, rest) == (b'{"lmstudio":true}', b"")
    assert asyncio.get_running_loop().time() - began == pytest.approx(5.0, abs=0.6)


async def test_one_connection_serves_many_requests(server: Server) -> None:
    reader, writer = await connect(server)
    for _ in range(20):
        writer.write(request("/nope"))
        head = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"Content-Length: (\d+)", head)
        assert length is not None
        assert json.loads(await reader.readexactly(int(length[1])))["error"].startswith("Unexpected endpoint")
    writer.close()


@pytest.mark.clock_jumps
async def test_the_events_of_a_stream_arrive_one_by_one(server: Server, client: httpx.AsyncClient) -> None:
    server.studio.load(CHAT.key, seconds=0)
    server.studio.set_faults(token_seconds=0.1)
    asked = {"model": CHAT.key, "stream": True, "max_tokens": 4}
    async with client.stream("POST", "/v1/chat/completions", json=asked) as reply:
        now = asyncio.get_running_loop().time
        times = [now() async for line in reply.aiter_lines() if line.startswith("data: ")]

    assert len(times) == 6
    assert [later - earlier for earlier, later in pairwise(times[:4])] == pytest.approx([0.1] * 3)


@pytest.mark.clock_jumps
async def test_headers_come_with_the_first_token_or_at_once(server: Server) -> None:
    server.studio.load(CHAT.key, seconds=0)
    server.studio.set_faults(prompt_seconds=0.4)
    times = []
    for at_once in (False, True):
        server.studio.set_faults(headers_before_first_token=at_once)
        reader, writer = await connect(server)
        began = asyncio.get_running_loop().time()
        writer.write(stream_request())
        await reader.readuntil(b"\r\n\r\n")
        times.append(asyncio.get_running_loop().time() - began)
        writer.close()

    assert times[0] >= 0.4
    assert times[1] < 0.1


async def test_a_reader_that_does_not_read_stops_the_words(server: Server) -> None:
    server.studio.load(CHAT.key, seconds=0)
    server.studio.set_faults(answer_tokens=200_000, token_seconds=0)
    _, writer = await connect(server)
    writer.write(stream_request())
    instance = next(iter(server.studio.memory.instances.values()))
    said = [-1]
    async with asyncio.timeout(PATIENCE):
        while not said[-1] == said[-2:][0] > 0:
            await asyncio.sleep(0.4)
            said.append(sum(call.tokens for call in instance.working.values()))

    assert 0 < said[-1] < 200_000
    writer.transport.abort()
    await settle(server)


@pytest.mark.clock_jumps
async def test_a_cold_model_is_loaded_by_a_request_and_the_caller_waits(client: httpx.AsyncClient) -> None:
    began = asyncio.get_running_loop().time()
    reply = await client.post("/v1/chat/completions", json={"model": CHAT.key, "max_tokens": 1})

    assert reply.json()["choices"][0]["finish_reason"] == "length"
    assert 0.25 < asyncio.get_running_loop().time() - began < 1


@pytest.mark.parametrize("how", ["fin", "half_event_fin"])
async def test_a_stream_cut_by_fin_lacks_its_closing_chunk(server: Server, how: str) -> None:
    server.studio.load(CHAT.key, seconds=0)
    server.studio.set_faults(stream_breaks=how, stream_breaks_after=2)

    got = await everything(server, stream_request())

    assert got.count(b'"delta":{') >= 2
    assert not got.endswith(b"0\r\n\r\n")
    assert got.endswith(b"}\n\n\r\n") is (how == "fin")
    await settle(server)


async def test_a_stream_cut_by_rst_resets_the_connection_after_its_bytes(server: Server) -> None:
    server.studio.load(CHAT.key, seconds=0)
    server.studio.set_faults(stream_breaks="rst", stream_breaks_after=2)
    reader, writer = await connect(server)
    writer.write(stream_request())
    got: list[bytes] = []
    with pytest.raises(ConnectionResetError):
        await drain(reader, got)
    writer.close()

    assert b"".join(got).count(b'"content":') == 2


async def test_a_stream_that_ends_early_but_cleanly_has_its_closing_chunk(server: Server) -> None:
    server.studio.load(CHAT.key, seconds=0)
    server.studio.set_faults(stream_breaks="eof")

    got = await everything(server, stream_request().replace(b"Host: x", b"Host: x\r\nConnection: close"))

    assert got.endswith(b"0\r\n\r\n")
    assert b"[DONE]" not in got


@pytest.mark.parametrize("how", ["fin", "rst"])
async def test_a_request_can_be_cut_before_its_status_line(server: Server, how: str) -> None:
    server.studio.set_faults(list_reply=how)
    try:
        got = await everything(server, request("/api/v1/models"))
        ended = "fin"
    except ConnectionResetError:
        got, ended = b"", "rst"

    assert (got, ended) == (b"", how)


@pytest.mark.clock_jumps
async def test_a_connection_can_end_after_a_stream_without_a_word(server: Server) -> None:
    server.studio.load(CHAT.key, seconds=0)
    server.studio.set_faults(close_after_stream=True)
    began = asyncio.get_running_loop().time()

    got = await everything(server, stream_request(max_tokens=1))

    assert b"Connection: keep-alive" in got
    assert got.endswith(b"0\r\n\r\n")
    assert asyncio.get_running_loop().time() - began < 3


@pytest.mark.clock_jumps
@pytest.mark.parametrize("how", ["fin", "rst", "half-close"])
@pytest.mark.parametrize("phase", ["loading", "queued", "generating"])
async def test_a_client_that_leaves_is_noticed_at_once_in_every_phase(
    server: Server, how: str, phase: str
) -> None:
    studio = server.studio
    if phase != "loading":
        studio.load(CHAT.key, seconds=0)
    studio.set_faults(token_seconds=5, load_seconds=60, parallel=1)
    if phase == "queued":
        _, other = await connect(server)
        other.write(stream_request())
        await asyncio.sleep(0.1)
    _, writer = await connect(server)
    writer.write(stream_request())
    await asyncio.sleep(0.1)
    before = studio.in_flight
    if how == "rst":
        sock = writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()
    elif how == "fin":
        writer.close()
    else:
        writer.write_eof()

    async with asyncio.timeout(0.5):  # of a clock that does not count the work
        while studio.in_flight == before:
            await asyncio.sleep(0.005)
    gone = [event["phase"] for event in studio.log() if event["kind"] == "client.gone"]
    assert gone == [phase]
    writer.close()
    if phase == "queued":
        other.close()


@pytest.mark.clock_jumps
async def test_a_restart_closes_the_port_and_opens_the_same_one_with_nothing_loaded(
    server: Server, client: httpx.AsyncClient
) -> None:
    server.studio.load(CHAT.key, seconds=0)
    server.studio.set_faults(token_seconds=1)
    reader, writer = await connect(server)
    writer.write(stream_request())
    await reader.readuntil(b"\n\n\r\n")

    reply = await client.post("/simulator/restart", json={"down_seconds": 0.4})
    assert reply.json() == {"status": "restarting", "down_seconds": 0.4}
    assert not (await asyncio.wait_for(reader.read(), PATIENCE)).endswith(b"0\r\n\r\n")
    writer.close()
    with pytest.raises(ConnectionRefusedError):
        await connect(server)

    async with asyncio.timeout(PATIENCE):
        while True:
            try:
                models = (await client.get("/api/v1/models")).json()["models"]
                break
            except httpx.TransportError:
                await asyncio.sleep(0.05)
    assert [model["loaded_instances"] for model in models] == [[], []]


@pytest.mark.clock_jumps
async def test_a_restart_drops_idle_connections_and_tunnels(server: Server) -> None:
    reader, writer = await connect(server)
    writer.write(request("/lmstudio-greeting"))
    await reader.readuntil(b'{"lmstudio":true}')
    async with aiohttp.ClientSession() as session, session.ws_connect(f"{server.url}/llm") as socket_:
        server.studio.restart(down_seconds=60)
        async with asyncio.timeout(1):
            assert await reader.read() == b""
            assert (await socket_.receive()).type in (aiohttp.WSMsgType.CLOSED, aiohttp.WSMsgType.ERROR)
    writer.close()


async def test_an_http_1_0_client_gets_a_stream_that_ends_with_the_connection(server: Server) -> None:
    server.studio.load(CHAT.key, seconds=0)

    got = await everything(server, stream_request(max_tokens=2).replace(b"HTTP/1.1", b"HTTP/1.0"))

    assert b"chunked" not in got
    assert got.endswith(b"\n\ndata: [DONE]\n\n")


@pytest.mark.clock_jumps
async def test_a_restart_without_a_pause_is_up_again_at_once(server: Server) -> None:
    server.studio.restart()
    await asyncio.sleep(0.3)

    assert b'{"lmstudio":true}' in await everything(
        server, request("/lmstudio-greeting", headers="Connection: close\r\n")
    )


async def test_model_ids_with_slashes_come_percent_encoded(client: httpx.AsyncClient) -> None:
    reply = await client.get("/api/v0/models/acme%2Fchat-8b")

    assert reply.json()["id"] == "acme/chat-8b"


async def test_big_requests_and_huge_listings_pass(server: Server, client: httpx.AsyncClient) -> None:
    server.studio.set_faults(list_reply="huge", huge_bytes=20_000_000)
    listing = await client.get("/api/v1/models")
    image = {"model": CHAT.key, "max_tokens": 1, "image": "x" * 10_000_000}
    reply = await client.post("/v1/chat/completions", json=image)

    assert len(listing.content) > 20_000_000
    assert reply.status_code == 200


async def test_a_caller_may_ask_before_sending_its_body(server: Server) -> None:
    reader, writer = await connect(server)
    writer.write(
        b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n"
    )
    go_on = await reader.readuntil(b"\r\n\r\n")
    writer.write(b"{}")
    head = await reader.readuntil(b"\r\n\r\n")
    writer.close()

    assert go_on == b"HTTP/1.1 100 Continue\r\n\r\n"
    assert head.startswith(b"HTTP/1.1 400 ")


async def test_many_streams_run_at_once(server: Server, client: httpx.AsyncClient) -> None:
    server.studio.load(CHAT.key, seconds=0)
    server.studio.set_faults(parallel=64)
    asked = {"model": CHAT.key, "stream": True, "max_tokens": 20}

    replies = await asyncio.gather(*(client.post("/v1/chat/completions", json=asked) for _ in range(50)))

    assert [reply.content.count(b"data: ") for reply in replies] == [22] * 50
    await settle(server)


async def test_the_sdk_shakes_hands_and_lists_what_is_loaded(server: Server) -> None:
    server.studio.load(CHAT.key, seconds=0)
    await server.studio.handle(_chat("acme/small-1b"))
    async with aiohttp.ClientSession() as session, session.ws_connect(f"{server.url}/llm") as socket_:
        await socket_.send_json({"authVersion": 1, "clientIdentifier": "guest:x", "clientPasskey": "y"})
        assert await socket_.receive_json() == {"success": True}
        await socket_.send_json({"type": "rpcCall", "endpoint": "listLoaded", "callId": 1})
        result = (await socket_.receive_json())["result"]
        specifier = {"type": "query", "query": {"identifier": CHAT.key}}
        await socket_.send_json(
            {
                "type": "rpcCall",
                "endpoint": "getInstanceProcessingState",
                "callId": 2,
                "parameter": {"specifier": specifier, "throwIfNotFound": True},
            }
        )
        state = await socket_.receive_json()
        await socket_.send_json({"type": "keepAlive"})
        alive = await socket_.receive_json()
        await socket_.send_json({"type": "rpcCall", "endpoint": "unheardOf", "callId": 3})
        unknown = await socket_.receive_json()

    assert [(row["identifier"], row["ttlMs"]) for row in result] == [
        ("acme/chat-8b", None),
        ("acme/small-1b", 3_600_000),
    ]
    assert result[0]["lastUsedTime"] is None
    assert state == {"type": "rpcResult", "callId": 2, "result": {"status": "idle", "queued": 0}}
    assert alive == {"type": "keepAliveAck"}
    assert (unknown["type"], unknown["callId"]) == ("rpcError", 3)


def _chat(model: str) -> Request:
    body = json.dumps({"model": model, "max_tokens": 1}).encode()
    return Request("POST", "/v1/chat/completions", body=body)


async def test_the_sdk_needs_the_token_in_two_halves(server: Server) -> None:
    server.studio.set_faults(auth_token="sk-lm-abcdefgh:passkey")
    answers = []
    for passkey in ("wrong", "passkey"):
        async with aiohttp.ClientSession() as session, session.ws_connect(f"{server.url}/system") as socket_:
            await socket_.send_json(
                {"authVersion": 1, "clientIdentifier": "abcdefgh", "clientPasskey": passkey}
            )
            answers.append((await socket_.receive_json())["success"])

    assert answers == [False, True]


async def test_frames_come_back_in_echo_mode_also_big_ones(server: Server) -> None:
    server.studio.set_faults(websocket="echo")
    big = bytes(range(256)) * 20_480  # 5 MiB
    async with (
        aiohttp.ClientSession() as session,
        session.ws_connect(f"{server.url}/llm", max_msg_size=0) as socket_,
    ):
        await socket_.send_json({"authVersion": 1, "clientIdentifier": "guest:x", "clientPasskey": "y"})
        assert await socket_.receive_json() == {"success": True}
        await socket_.send_bytes(big)
        assert await socket_.receive_bytes() == big
        await socket_.send_str("olá 🙂")
        assert await socket_.receive_str() == "olá 🙂"


async def test_an_upgrade_can_be_refused(server: Server) -> None:
    server.studio.set_faults(websocket="refuse")
    async with aiohttp.ClientSession() as session:
        with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
            await session.ws_connect(f"{server.url}/llm")

    assert refused.value.status == 426


async def test_faults_change_over_http_while_it_runs(client: httpx.AsyncClient) -> None:
    await client.patch("/simulator/faults", json={"unknown_route_404": True})
    switched = await client.get("/nope")
    mistaken = await client.patch("/simulator/faults", json={"unknown_rute": True})
    await client.patch("/simulator/faults", json={"unknown_route_404": None})
    back = await client.get("/nope")

    assert (switched.status_code, back.status_code) == (404, 200)
    assert mistaken.status_code == 400
    assert mistaken.json() == {"error": 'there is no fault "unknown_rute"; did you mean "unknown_route_404"?'}


async def test_another_server_on_the_port_does_not_look_like_lm_studio(
    server: Server, client: httpx.AsyncClient
) -> None:
    server.studio.set_tier("openai")

    reply = await client.get("/lmstudio-greeting")

    assert (reply.status_code, reply.json()) == (404, {"detail": "Not Found"})
    assert "x-powered-by" not in reply.headers


async def test_a_malformed_request_is_refused_and_not_printed(
    server: Server, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    got = await everything(server, b"GET / HTTP/1.1\r\nHost: x\r\nAuthorization: CANARY\x00\r\n\r\n")

    assert got.startswith(b"HTTP/1.1 400 ") or got.startswith(b"HTTP/1.0 400 ")
    assert "CANARY" not in caplog.text + "".join(capfd.readouterr())


@pytest.mark.parametrize(
    ("program", "prefix"),
    [(["keepalive.simulator"], ""), (["keepalive", "simulate", "--prefix", "/lm"], "/lm")],
)
async def test_it_runs_as_a_program_and_ends_well_on_sigterm(program: list[str], prefix: str) -> None:
    running = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", *program, "--port", "0", "--model", "a/b:2s:4GB"),
        *("--fault", "load_seconds=0"),
        stdout=asyncio.subprocess.PIPE,
    )
    assert running.stdout is not None
    first = (await asyncio.wait_for(running.stdout.readline(), PATIENCE)).decode()
    url = first.rsplit(" ", 1)[-1].strip()
    async with httpx.AsyncClient(base_url=url) as client:
        reply = await client.post("/api/v1/models/load", json={"model": "a/b"})
    running.send_signal(signal.SIGTERM)

    assert first.startswith("LM Studio simulator (v1) on http://127.0.0.1:")
    assert url.endswith(prefix)
    assert reply.json()["status"] == "loaded"
    assert b"a/b  (llm, 4.0 GB, loads in 2 s)" in await running.stdout.read()
    assert await asyncio.wait_for(running.wait(), PATIENCE) == 0


async def test_a_mistake_on_the_command_line_is_said_and_ends_it() -> None:
    program = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "keepalive.simulator", "--fault", "jitt=false"),
        stderr=asyncio.subprocess.PIPE,
    )
    _, said = await asyncio.wait_for(program.communicate(), PATIENCE)

    assert (program.returncode, said) == (3, b'there is no fault "jitt"; did you mean "jit"?\n')


# under a path, compressed, gone without a word


async def test_everything_stands_under_the_prefix_and_nothing_outside_of_it() -> None:
    studio = Studio([CHAT], faults={"websocket": "echo"})
    async with await serve(studio, prefix="/lm") as server, aiohttp.ClientSession() as session:
        root = server.url.removesuffix("/lm")
        async with session.get(f"{server.url}/lmstudio-greeting") as greeting:
            greeted = await greeting.json()
        async with session.get(f"{server.url}/simulator/state") as state:
            shown = await state.json()
        outside = []
        for path in ("/lmstudio-greeting", "/simulator/state", "/lmx/v1/models", "/llm"):
            async with session.get(f"{root}{path}") as reply:
                outside.append(reply.status)
        async with session.ws_connect(f"{server.url}/llm") as tunnel:
            await tunnel.send_bytes(b"\x00there")
            echoed = await tunnel.receive_bytes()

    assert server.url == f"{root}/lm"
    assert greeted == {"lmstudio": True}
    assert shown["models"][0]["key"] == CHAT.key
    assert outside == [404] * 4
    assert echoed == b"\x00there"
    assert [event["path"] for event in studio.log() if event["kind"] == "request"] == ["/lmstudio-greeting"]


@pytest.mark.parametrize("prefix", ["lm", "/lm/", "/"])
def test_a_prefix_is_written_in_one_way(prefix: str) -> None:
    with pytest.raises(ValueError, match="write it as /lm"):
        Server(Studio(), "127.0.0.1", prefix)


async def test_a_compressed_body_arrives_as_it_was_sent(client: httpx.AsyncClient) -> None:
    body = gzip.compress(json.dumps({"model": CHAT.key, "input": "x"}).encode())
    sent = {"content-encoding": "gzip", "content-type": "application/json"}

    whole = await client.post("/v1/responses", content=body, headers=sent)
    cut = await client.post("/v1/responses", content=body[:-5], headers=sent)

    assert (whole.status_code, cut.status_code) == (200, 400)


async def test_two_servers_give_different_response_ids(server: Server, client: httpx.AsyncClient) -> None:
    asked = {"model": CHAT.key, "input": "x"}
    async with await serve(Studio([CHAT])) as other, httpx.AsyncClient(base_url=other.url) as there:
        ids = [(await each.post("/v1/responses", json=asked)).json()["id"] for each in (client, there)]
        lost = await there.post("/v1/responses", json={**asked, "previous_response_id": ids[0]})

    assert len(set(ids)) == 2
    assert lost.status_code == 404


async def test_what_vanishes_ends_no_connection_and_answers_nobody_until_it_is_back(
    server: Server, client: httpx.AsyncClient
) -> None:
    server.studio.load(CHAT.key, seconds=0)
    server.studio.set_faults(token_seconds=0.02, answer_tokens=100_000)
    reader, writer = await connect(server)
    writer.write(stream_request())
    await reader.readuntil(b"data: ")
    vanishing = await client.post("/simulator/vanish", json={"seconds": 3600})
    gone = asyncio.Event()
    server.studio.journal.watchers.append(lambda event: event["kind"] == "vanished" and gone.set())
    await asyncio.wait_for(gone.wait(), PATIENCE)
    newcomer = asyncio.create_task(client.get("/api/v1/models", timeout=60))
    while not reader.at_eof():
        try:
            await asyncio.wait_for(reader.read(65_536), 1)
        except TimeoutError:
            break  # silent, and not ended
    waiting = not newcomer.done()
    newcomer.cancel()
    server.studio.advance(3600)
    back = await client.get("/api/v1/models")

    assert vanishing.json() == {"status": "vanishing", "seconds": 3600}
    assert waiting
    assert not reader.at_eof()
    assert back.json()["models"][0]["loaded_instances"] == []
    writer.close()


async def test_half_of_an_answer_arrives_and_then_nothing(server: Server) -> None:
    server.studio.set_faults(answer="half_hang")
    reader, writer = await connect(server)
    writer.write(request("/v1/chat/completions", {"model": CHAT.key}))
    head = await reader.readuntil(b"\r\n\r\n")
    half = await reader.readuntil(b'{"id":')
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(reader.readuntil(b"0\r\n\r\n"), 0.5)
    writer.close()
    await settle(server)

    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    assert half.endswith(b'{"id":')
