"""An upstream that speaks TLS: one that is trusted serves as any other, one that is not is refused with a reason."""

import asyncio
import contextlib
import gc
import hashlib
import json
import shutil
import ssl
import subprocess

import pytest

from keepalive.core.errors import Unreachable
from keepalive.lmstudio.client import Client
from keepalive.proxy import Address
from keepalive.simulator.models import SimModel
from tests.kit import live
from tests.kit.fronted import (
    CHAT_BODY,
    CHAT_STREAM,
    Asking,
    Keep,
    ask,
    chat,
    fronted,
    get,
    raw,
    read_request,
    split_answer,
)

BOTH_LOOPS = True

pytestmark = pytest.mark.skipif(
    shutil.which("openssl") is None, reason="there is no openssl to make a certificate"
)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A self-signed certificate for `localhost`, and its key."""
    folder = tmp_path_factory.mktemp("tls")
    subprocess.run(
        [
            *(
                "openssl",
                "req",
                "-x509",
                "-newkey",
                "ec",
                "-pkeyopt",
                "ec_paramgen_curve:prime256v1",
                "-nodes",
            ),
            *("-keyout", "key.pem", "-out", "certificate.pem", "-days", "2", "-subj", "/CN=localhost"),
            *("-addext", "subjectAltName=DNS:localhost"),
        ],
        cwd=folder,
        check=True,
        capture_output=True,
        timeout=30,
    )
    return folder


@pytest.fixture
def trusted(certificate, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate / "certificate.pem"))
    return certificate


@contextlib.asynccontextmanager
async def tls(folder, connected):
    """A port of ours where `connected(reader, writer)` is called for each connection, behind TLS."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "certificate.pem", folder / "key.pem")
    tasks = set()

    async def run(reader, writer):
        task = asyncio.current_task()
        tasks.add(task)
        try:
            await connected(reader, writer)
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            tasks.discard(task)
            writer.close()

    server = await asyncio.start_server(run, "127.0.0.1", 0, ssl=context, limit=1 << 26)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@contextlib.asynccontextmanager
async def fronted_by_tls(folder, script, *, host="localhost", **more):
    connections = []

    async def connected(reader, writer):
        connections.append(writer)
        while True:
            head, body = await read_request(reader)
            await script(Asking(reader, writer, head, body, None))
            if writer.is_closing():
                return

    async with tls(folder, connected) as port:
        upstreams = {"local": Address(f"https://{host}:{port}")}
        async with fronted(upstreams=upstreams, **more) as (front, _):
            yield front, connections


async def answer_chat(asking):
    await asking.send(CHAT_STREAM)


async def answer_short(asking):
    await asking.send(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nfine")


def warm():
    keep = Keep()
    keep.add("m")
    return keep


async def test_a_trusted_certificate_serves_streams_and_connections_are_reused(trusted):
    async with fronted_by_tls(trusted, answer_chat, keep=warm()) as (front, _):
        assert (await ask(front.port, chat()))[::2] == (200, CHAT_BODY)
    async with fronted_by_tls(trusted, answer_short) as (front, connections):
        for _ in range(3):
            assert (await ask(front.port, get("/x")))[::2] == (200, b"fine")

        assert len(connections) == 1


async def test_a_self_signed_certificate_is_refused_and_the_message_says_what_to_do(certificate):
    async with fronted_by_tls(certificate, answer_short) as (front, connections):
        status, _, body = await ask(front.port, get("/v1/models"))
        message = json.loads(body)["error"]["message"]

        assert status == 502
        assert "a certificate that is not trusted (self-signed certificate)" in message
        assert "SSL_CERT_FILE" in message
        assert connections == []
        assert (await front.last()).outcome == "upstream_error"


async def test_a_listing_says_the_same_of_it(certificate):
    async def connected(reader, writer):
        pass

    async with tls(certificate, connected) as port, Client("local", f"https://localhost:{port}") as upstream:
        with pytest.raises(
            Unreachable, match=r"not trusted \(self-signed certificate\).*SSL_CERT_FILE"
        ) as caught:
            await upstream.listing()

    assert caught.value.tls


async def test_a_certificate_of_another_name_is_refused(trusted):
    async with fronted_by_tls(trusted, answer_short, host="127.0.0.1") as (front, connections):
        status, _, body = await ask(front.port, get("/v1/models"))

        assert status == 502
        assert "not trusted (IP address mismatch, certificate is not valid for '127.0.0.1')" in body.decode()
        assert connections == []


async def test_an_upstream_that_speaks_no_tls_is_said(trusted):
    async def plain(reader, writer):
        await reader.read(100)
        writer.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(plain, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with fronted(upstreams={"local": Address(f"https://localhost:{port}")}) as (front, _):
        status, _, body = await ask(front.port, get("/v1/models"))

        assert status == 502
        assert b"does not speak TLS as expected: WRONG_VERSION_NUMBER" in body
    server.close()


async def test_large_bodies_pass_both_ways_and_a_cut_is_a_cut(trusted):
    block = bytes(range(256)) * 4096
    whole = hashlib.sha256(block * 16).digest()
    uploaded = []

    async def script(asking):
        uploaded.append(hashlib.sha256(asking.body).digest())
        await asking.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (16 * len(block)))
        await asking.send(block * 16 if b" /whole " in asking.head else block * 3)
        asking.cut()

    def upload(path):
        head = "POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\nConnection: close\r\n\r\n"
        return (head % (path, 16 * len(block))).encode() + block * 16

    async with fronted_by_tls(trusted, script) as (front, _):
        status, _, body = split_answer(await raw(front.port, upload("/whole")))
        half = (await raw(front.port, upload("/half"))).partition(b"\r\n\r\n")[2]

        assert (status, hashlib.sha256(body).digest()) == (200, whole)
        assert uploaded == [whole, whole]
        assert half == (block * 3)[: len(half)]
        assert (await front.last()).outcome == "cut"


async def test_a_tunnel_through_tls_is_a_tunnel(trusted):
    async def script(asking):
        await asking.send(
            b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
        )
        while data := await asking.reader.read(65536):
            await asking.send(data)
        asking.cut()

    data = bytes(range(256)) * 8192
    async with fronted_by_tls(trusted, script) as (front, _):
        reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
        writer.write(get("/llm", "Upgrade: websocket").replace(b"Connection: close", b"Connection: Upgrade"))
        head = await reader.readuntil(b"\r\n\r\n")
        writer.write(data)
        async with asyncio.timeout(live.PATIENCE):
            back = await reader.readexactly(len(data))
        writer.close()

        assert head.startswith(b"HTTP/1.1 101 ")
        assert back == data


# httpcore leaves the socket of a handshake that is cancelled, as at the daemon's end, to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
async def test_the_daemon_keeps_a_model_and_serves_it_behind_tls(trusted):
    async with live.simulator(SimModel("acme/x", load_seconds=0.1)) as simulator:
        host, _, port = simulator.url.removeprefix("http://").rpartition(":")

        async def copy(reader, writer):
            with contextlib.suppress(OSError):
                while data := await reader.read(65536):
                    writer.write(data)
                    await writer.drain()
            writer.close()

        async def connected(reader, writer):
            other_reader, other_writer = await asyncio.open_connection(host, int(port))
            try:
                await asyncio.gather(copy(reader, other_writer), copy(other_reader, writer))
            finally:
                other_writer.close()

        async with tls(trusted, connected) as secure:
            text = live.settings(f"https://localhost:{secure}", "acme/x")
            async with live.daemon(text) as running:
                await live.until(lambda: live.model(running, "acme/x")["state"] == "warm", "it is loaded")
                status, _, body = await live.asked(
                    f"{running.url}/v1/chat/completions",
                    "POST",
                    {"model": "acme/x", "stream": True, "messages": [{"role": "user", "content": "hi"}]},
                )

                assert status == 200
                assert body.endswith("data: [DONE]\n\n")
                assert live.loads(simulator.studio) == 1
    gc.collect()  # here, where its warning is expected
