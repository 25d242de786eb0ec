"""The client of one server, over real sockets: against the simulator, and against servers that do what none should."""

import asyncio
import json
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest

from keepalive.core.errors import (
    Cut,
    Forgone,
    Reason,
    Refused,
    TimedOut,
    Unauthorized,
    Unexpected,
    Unreachable,
    UpstreamError,
)
from keepalive.core.facts import Instance, Tier
from keepalive.lmstudio.client import Client
from keepalive.lmstudio.line import trusting
from keepalive.simulator.models import SimModel
from keepalive.simulator.server import Server, serve
from keepalive.simulator.studio import Studio
from tests.kit import live

TOKEN = "sk-lm-canary01:canary0123456789abcd"
MODELS = [SimModel("acme/a", load_seconds=0.05), SimModel("acme/embed", kind="embedding", load_seconds=0.02)]


def client(url: str, **more: object) -> Client:
    return Client("local", url, **{"connect_timeout": 1.0, "list_timeout": 2.0, **more})  # type: ignore[arg-type]


@asynccontextmanager
async def studio(tier: str = "v1", **faults: object) -> AsyncIterator[Server]:
    made = Studio(MODELS, tier=tier, faults=faults)  # type: ignore[arg-type]
    async with await serve(made) as server:
        yield server
    made.close()


def paths(server: Server, route: str | None = None) -> list[str]:
    return [e["path"] for e in server.studio.log() if e["kind"] == "request" and route in (None, e["route"])]


# --- against the simulator ----------------------------------------------------------------------------


@pytest.mark.parametrize("tier", ["v1", "v0", "openai"])
async def test_a_tier_is_detected_once_and_its_models_are_listed(tier: str):
    async with studio(tier) as server, client(server.url) as upstream:
        first = await upstream.listing()
        probes = len(paths(server))
        second = await upstream.listing()

        assert first.tier == tier
        assert set(first.entries) >= {"acme/a", "acme/embed"}
        assert first == second
        assert len(paths(server)) == probes + 1


@pytest.mark.parametrize("as_404", [True, False])
async def test_an_unknown_route_leads_on_to_the_older_tier_with_either_status(as_404: bool):
    async with studio("v0", unknown_route_404=as_404) as server, client(server.url) as upstream:
        assert (await upstream.listing()).tier is Tier.V0


OPENING = "/v1/chat/completions", {"messages": [{"role": "user", "content": "one two"}], "max_tokens": 1}


async def test_an_opening_is_read_by_the_model_that_is_meant_and_its_tokens_are_told():
    async with studio() as server, client(server.url) as upstream:
        await upstream.load("acme/a", {}, timeout=5)

        assert await upstream.prime(OPENING, "acme/a", ["acme/a"], tier=Tier.V1, timeout=5) == 10

        server.studio.set_faults(answer_model="somebody else")
        with pytest.raises(Unexpected, match=r"^somebody else answered in its place$"):
            await upstream.prime(OPENING, "acme/a", ["acme/a"], tier=Tier.V1, timeout=5)


async def test_an_opening_that_is_given_up_frees_the_server_of_it_at_once():
    faults = {"prompt_seconds": 600.0, "prompt_finishes_after_disconnect": False}
    async with studio(**faults) as server, client(server.url) as upstream:
        await upstream.load("acme/a", {}, timeout=5)
        task = asyncio.create_task(upstream.prime(OPENING, "acme/a", ["acme/a"], tier=Tier.V1, timeout=900))

        def ended() -> list[str]:
            return [e["outcome"] for e in server.studio.log() if e["kind"] == "generation.ended"]

        instance = server.studio.memory.instances["acme/a"]
        await live.until(lambda: instance.working, "it is being read")
        task.cancel()
        await live.until(ended, "LM Studio has noticed")

        assert ended() == ["client_gone"]
        assert not instance.working


async def test_a_load_a_ping_and_an_unload_are_seen_by_the_server_as_meant():
    async with studio() as server, client(server.url) as upstream:
        loaded = await upstream.load("acme/a", {"context_length": 4096}, timeout=5)
        listing = await upstream.listing()
        other = await upstream.ping("acme/a", ["acme/a"], kind="llm", tier=Tier.V1, timeout=5)
        await upstream.unload("acme/a", timeout=5)
        after = await upstream.listing()

        assert loaded.instance_id == "acme/a"
        assert loaded.seconds is not None
        assert listing.entries["acme/a"].instances == (Instance("acme/a", 4096),)
        assert other is None
        assert after.entries["acme/a"].instances == ()


@pytest.mark.parametrize("sdk", [False, True], ids=["over HTTP", "by the socket"])
async def test_who_may_no_longer_act_sends_nothing_though_the_connection_is_open_already(sdk: bool):
    # Once when it is about to connect, and once more when it is about to speak.
    words = iter([True, False] if not sdk else [False])
    async with studio() as server, client(server.url, sdk=sdk, acts=lambda: next(words, False)) as lm:
        await lm.listing()
        for act in (
            lm.load("gemma", {}, timeout=30),
            lm.ping("gemma", ["gemma"], kind="llm", tier=Tier.V1, timeout=30),
            lm.unload("gemma", tier=Tier.V1, timeout=30),
        ):
            with pytest.raises(Forgone):
                await act
        await lm.listing()

        assert {e["method"] for e in server.studio.log(0) if e["kind"] == "request"} == {"GET"}
        assert live.loads(server.studio) == 0


async def test_an_embedding_model_is_pinged_by_its_own_route():
    async with studio() as server, client(server.url) as upstream:
        server.studio.load("acme/embed", seconds=0)
        other = await upstream.ping("acme/embed", ["acme/embed"], kind="embedding", tier=Tier.V1, timeout=5)

        assert other is None
        assert paths(server) == ["/v1/embeddings"]


async def test_an_answer_of_another_model_is_told_by_its_name():
    async with studio(answer_model="somebody\nelse") as server, client(server.url) as upstream:
        server.studio.load("acme/a", seconds=0)

        assert (
            await upstream.ping("acme/a", ["acme/a"], kind="llm", tier=Tier.V1, timeout=5) == "somebody else"
        )


@pytest.mark.parametrize(
    ("signed", "other"),
    [
        ("weights-q4_k_m.gguf", None),
        ("acme/embed", "acme/embed"),
        ("/models/acme/EMBED", "/models/acme/EMBED"),
    ],
)
async def test_another_server_may_sign_with_a_name_of_its_own_but_not_with_one_that_it_lists(
    signed: str, other: str | None
):
    async with studio("openai", answer_model=signed) as server, client(server.url) as upstream:
        await upstream.listing()
        server.studio.load("acme/a", seconds=0)

        assert await upstream.ping("acme/a", ["acme/a"], kind="llm", tier=Tier.OPENAI, timeout=5) == other


async def test_a_lease_reaches_the_server_when_a_request_is_the_load():
    async with studio("v0") as server, client(server.url) as upstream:
        await upstream.ping("acme/a", ["acme/a"], kind="llm", tier=Tier.V0, timeout=5, lease=86400.0)

        [instance] = server.studio.memory.instances.values()
        assert instance.ttl_seconds == 86400


async def test_a_load_in_progress_shows_where_the_server_tells():
    async with studio() as server, client(server.url) as upstream:
        server.studio.load("acme/a", seconds=30)

        assert (await upstream.listing()).entries["acme/a"].loading is None
        assert (await upstream.listing(loading=True)).entries["acme/a"].loading is True
        assert (await upstream.listing(loading=True)).entries["acme/embed"].loading is False


async def test_what_is_loading_is_asked_before_what_is_loaded():
    async with studio() as server, client(server.url) as upstream:
        await upstream.listing()
        before = len(paths(server))
        await upstream.listing(loading=True)

        assert paths(server)[before:] == ["/api/v0/models", "/api/v1/models"]


async def test_trouble_with_the_older_listing_is_not_taken_for_its_absence():
    async with studio() as server, client(server.url) as upstream:
        server.studio.load("acme/a", seconds=30)
        await upstream.listing()
        for how in ("html_500", "error_500", "error_200"):
            server.studio.set_faults(list_reply={"value": how, "route": "list_v0"})
            assert (await upstream.listing(loading=True)).entries["acme/a"].loading is None
        server.studio.set_faults(list_reply=None)

        assert (await upstream.listing(loading=True)).entries["acme/a"].loading is True


GARBLED = [
    "error_200",
    "error_500",
    "html_500",
    "empty_body",
    "truncated_json",
    "other_shape",
    "fin",
    "rst",
    "huge",
]


@pytest.mark.parametrize("how", GARBLED)
@pytest.mark.parametrize("route", ["list", "listing"])
@pytest.mark.parametrize("known", [True, False])
async def test_a_server_in_trouble_is_never_taken_for_an_older_one(how: str, route: str, known: bool):
    async with studio(huge_bytes=9_000_000) as server, client(server.url) as upstream:
        if known:
            await upstream.listing()
        server.studio.set_faults(list_reply={"value": how, "route": route})
        for _ in range(2):
            with pytest.raises(UpstreamError):
                await upstream.listing()
        server.studio.set_faults(list_reply=None)

        assert (await upstream.listing()).tier is Tier.V1


async def test_another_version_behind_the_same_port_is_detected_after_a_failure():
    async with studio("v1") as server, client(server.url) as upstream:
        await upstream.listing()
        server.studio.set_tier("v0")
        with pytest.raises(Refused):
            await upstream.listing()

        assert (await upstream.listing()).tier is Tier.V0


@pytest.mark.parametrize("token", [TOKEN, None])
@pytest.mark.parametrize("status", [401, 403, 400])
async def test_a_refused_token_is_said_without_a_letter_of_it(token: str | None, status: int):
    async with (
        studio(auth_token="another", auth_status=status) as server,
        client(server.url, token=token) as upstream,
    ):
        calls: list[Callable[[], Awaitable[object]]] = [
            upstream.listing,
            lambda: upstream.load("acme/a", {}, timeout=5),
            lambda: upstream.ping("acme/a", ["acme/a"], kind="llm", tier=Tier.V1, timeout=5),
            lambda: upstream.unload("acme/a", timeout=5),
        ]
        for call in calls:
            with pytest.raises(Unauthorized) as caught:
                await call()
            assert "sk-l" not in str(caught.value)
            assert "canary" not in str(caught.value)
        assert ("does not accept" in str(caught.value)) is (token is not None)


async def test_a_server_upgraded_behind_a_refused_token_is_not_taken_for_the_old_one():
    async with studio("v0") as server, client(server.url) as upstream:
        await upstream.listing()
        server.studio.set_faults(auth_token="another")
        with pytest.raises(Unauthorized):
            await upstream.listing()
        server.studio.set_tier("v1")
        server.studio.set_faults(auth_token=None)

        assert (await upstream.listing()).tier is Tier.V1


async def test_the_right_token_is_accepted_and_another_can_be_given_later():
    async with studio(auth_token=TOKEN) as server, client(server.url, token="wrong") as upstream:
        with pytest.raises(Unauthorized):
            await upstream.listing()
        upstream.configure(token=TOKEN, connect_timeout=1.0, list_timeout=2.0)

        assert (await upstream.listing()).tier is Tier.V1


@pytest.mark.parametrize(
    ("faults", "reason"),
    [
        ({"load_result": "guardrail"}, Reason.RESOURCES),
        ({"load_result": "fail"}, Reason.LOAD_FAILED),
        ({"load_reply": "error_200"}, Reason.OTHER),
    ],
)
async def test_a_refused_load_says_why(faults: dict[str, object], reason: Reason):
    async with studio(**faults) as server, client(server.url) as upstream:
        with pytest.raises(Refused) as caught:
            await upstream.load("acme/a", {}, timeout=5)

        assert caught.value.reason is reason


async def test_a_field_that_lm_studio_does_not_take_is_refused_as_our_mistake():
    async with studio() as server, client(server.url) as upstream:
        with pytest.raises(Refused, match="Unrecognized key") as caught:
            await upstream.load("acme/a", {"ttl": 60}, timeout=5)

        assert (caught.value.reason, caught.value.status) == (Reason.OTHER, 400)


async def test_a_load_without_an_answer_times_out_and_is_sent_once():
    async with studio(load_reply="hang") as server, client(server.url) as upstream:
        with pytest.raises(TimedOut):
            await upstream.load("acme/a", {}, timeout=0.3)

        assert paths(server, "load") == ["/api/v1/models/load"]


@pytest.mark.parametrize("how", ["fin", "rst"])
async def test_a_load_that_is_cut_off_is_not_sent_again(how: str):
    async with studio(load_reply=how) as server, client(server.url) as upstream:
        with pytest.raises(Cut):
            await upstream.load("acme/a", {}, timeout=5)

        assert paths(server, "load") == ["/api/v1/models/load"]


async def test_idle_sockets_are_given_up_before_the_server_closes_them():
    async with studio() as server, client(server.url) as upstream:
        await upstream.listing()
        await asyncio.sleep(5.2)

        assert (await upstream.listing()).tier is Tier.V1


# --- against raw sockets -------------------------------------------------------------------------------


@dataclass
class Raw:
    """A server that plays a script on each connection, and keeps what it was sent."""

    play: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
    heads: list[bytes] = field(default_factory=list)
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@asynccontextmanager
async def raw(*answers: bytes, play: object = None) -> AsyncIterator[Raw]:
    """Answers each connection's requests with `answers` in turn, the last one again and again."""
    left = list(answers)

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        server.heads.append(head)
        writer.write(left.pop(0) if len(left) > 1 else left[0])
        await writer.drain()

    server = Raw(play or script)  # type: ignore[arg-type]
    writers: list[asyncio.StreamWriter] = []

    async def serve_one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        try:
            await server.play(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    listener = await asyncio.start_server(serve_one, "127.0.0.1", 0)
    server.port = listener.sockets[0].getsockname()[1]
    try:
        yield server
    finally:
        listener.close()
        for writer in writers:
            writer.transport.abort()
        await asyncio.sleep(0)


def http(body: bytes, status: str = "200 OK", *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", "Connection: close", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


async def fails(server: Raw, kind: type[UpstreamError], **more: object) -> str:
    async with client(server.url, **more) as upstream:
        with pytest.raises(kind) as caught:
            await upstream.listing()
        return str(caught.value)


async def test_a_closed_port_is_refused_and_named():
    async with raw(b"") as server:
        url = server.url
    async with client(url) as upstream:
        with pytest.raises(Unreachable) as caught:
            await upstream.listing()

    assert caught.value.refused
    assert str(caught.value) == f"nothing listens at {url}"


async def test_a_host_that_does_not_exist_is_named():
    async with client("http://nowhere.invalid:1234") as upstream:
        with pytest.raises(Unreachable, match=r"nowhere\.invalid.*cannot be resolved") as caught:
            await upstream.listing()

    assert not caught.value.refused


async def test_a_reset_is_said_in_the_words_of_an_end():
    async def resets(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.get_extra_info("socket").setsockopt(
            socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
        )
        writer.close()

    server = await asyncio.start_server(resets, "127.0.0.1", 0)
    async with server, client(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}") as upstream:
        with pytest.raises(Cut, match=r"broke off GET /lmstudio-greeting: Server disconnected"):
            await upstream.listing()


async def test_a_connection_that_hangs_is_given_up_at_its_own_bound():
    """A full backlog, of which nobody takes: the kernel drops what comes after."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(0)
    port = listener.getsockname()[1]
    full = []
    for _ in range(4):
        waiting = socket.socket()
        waiting.setblocking(False)
        waiting.connect_ex(("127.0.0.1", port))
        full.append(waiting)
    try:
        async with client(f"http://127.0.0.1:{port}", connect_timeout=0.3, list_timeout=3600.0) as upstream:
            with pytest.raises(Unreachable, match=r"no connection to .* within 0\.3 s") as caught:
                await upstream.listing()
    finally:
        for s in [listener, *full]:
            s.close()

    assert not caught.value.refused


async def test_a_server_that_accepts_and_never_answers_times_out():
    async def never(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(30)

    async with raw(play=never) as server:
        assert "did not answer the listing" in await fails(server, TimedOut, list_timeout=0.3)


async def test_a_server_that_drips_is_bounded_as_a_whole():
    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for byte in http(b'{"lmstudio":true}'):
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(0.05)

    async with raw(play=drip) as server:
        await fails(server, TimedOut, list_timeout=0.5)


async def test_a_reset_after_the_request_is_a_cut():
    async def reset(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        sock = writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()

    async with raw(play=reset) as server:
        await fails(server, Cut)


GREETING = http(b'{"lmstudio":true}')
WHOLE = http(json.dumps({"models": []}).encode(), "200 OK", "Content-Type: application/json")


@pytest.mark.parametrize("at", range(0, len(WHOLE), 7))
async def test_an_answer_that_is_cut_anywhere_is_no_answer(at: int):
    async with raw(GREETING, WHOLE[:at]) as server:
        await fails(server, Cut)


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (http(b""), Unexpected),
        (http(b'{"mod'), Unexpected),
        (http(b"\x00\x01\x02binary\xff"), Unexpected),
        (http(b"<html>Internal Server Error</html>", "500 Internal Server Error"), Unexpected),
        (http(b'{"error":"x"}', "200 OK"), Refused),
        (http(b'{"models":[]}', "302 Found", "Location: http://169.254.169.254/"), Unexpected),
        (http(b'{"models":[]}', "302 Found"), Unexpected),
        (http(b'{"models":[]}', "204 No Content"), UpstreamError),
        (b"SSH-2.0-OpenSSH_9.6\r\n\r\n", Cut),
        (b"\x15\x03\x01\x00\x02\x02\x16", Cut),
        (b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n", Cut),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", Cut),
        (b"HTTP/1.1 200 OK\r\nX: " + b"y" * 200_000 + b"\r\n\r\n", UpstreamError),
        (http(b"{}", "200 OK", "Content-Encoding: gzip"), Unexpected),
    ],
)
async def test_what_is_no_listing_is_an_error_of_its_kind(answer: bytes, kind: type[UpstreamError]):
    async with raw(GREETING, answer) as server:
        message = await fails(server, kind)

    assert len(message) < 500
    assert message.isprintable()


PAGES = [
    http(b"<html>Too Many Requests</html>", "429 Too Many Requests"),
    http(b"<html>Request Time-out</html>", "408 Request Timeout"),
    http(b"null"),
]


@pytest.mark.parametrize("page", PAGES)
async def test_what_stands_in_front_says_nothing_of_the_version_behind_it(page: bytes):
    async with raw(GREETING, page, http(b'{"data":[]}')) as server:
        await fails(server, Unexpected)

        assert len(server.heads) == 2


@pytest.mark.parametrize(
    ("page", "kind"),
    [
        (b"The model is loading. Please wait.", Refused),
        (b"<html><body>The model is <b>loading</b>. Please wait.</body></html>", Refused),
        (b'<html><img loading="lazy">Down for maintenance</html>', Unexpected),
    ],
)
async def test_a_page_that_says_that_something_loads_is_believed(page: bytes, kind: type[UpstreamError]):
    async with raw(http(page, "503 Service Unavailable")) as server, client(server.url) as upstream:
        with pytest.raises(kind) as caught:
            await upstream.listing()

    if kind is Refused:
        assert caught.value.reason is Reason.LOADING


async def test_who_writes_http_where_tls_is_spoken_is_told_so():
    said = b"Client sent an HTTP request to an HTTPS server.\n"
    async with raw(http(said, "400 Bad Request")) as server:
        message = await fails(server, Unexpected)

    https = server.url.replace("http", "https")
    assert message == f'{server.url} takes TLS alone; if LM Studio is there, write "{https}" as url'


async def test_who_writes_https_where_no_tls_is_spoken_is_told_so():
    async with studio() as server, client(server.url.replace("http", "https")) as upstream:
        with pytest.raises(Unreachable) as caught:
            await upstream.listing()

    assert caught.value.tls
    assert str(caught.value).endswith(f'where it speaks none, write "{server.url}" as url')


async def test_a_redirect_is_not_followed():
    async with raw(WHOLE) as target:
        to = http(b"", "302 Found", f"Location: {target.url}/lmstudio-greeting")
        async with raw(to) as server:
            await fails(server, Unexpected)

        assert target.heads == []


@pytest.mark.parametrize(
    ("location", "url"),
    [
        ("https://studio.example.org/lmstudio-greeting", "https://studio.example.org"),
        ("http://user:secret@[::1]:8443/lm/lmstudio-greeting?token=secret", "http://[::1]:8443/lm"),
        ("https://login.example.org/secret?next=/lmstudio-greeting", "https://login.example.org"),
        ("//studio.example.org/lmstudio-greeting", "http://studio.example.org"),
        ("http://[", "another place"),
    ],
)
async def test_who_is_sent_on_is_told_what_to_write_as_url(location: str, url: str):
    async with raw(http(b"", "308 Permanent Redirect", f"Location: {location}")) as server:
        message = await fails(server, Unexpected)

    assert message == f"GET /lmstudio-greeting is sent on to {url}; if LM Studio is there, write that as url"


async def test_an_answer_without_end_is_given_up_at_its_size():
    async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            writer.write(b" " * 65536)
            await writer.drain()

    async with raw(play=flood) as server:
        assert "more than 8 MiB" in await fails(server, Unexpected, list_timeout=20.0)


async def test_no_compression_is_asked_for():
    async with raw(GREETING, WHOLE) as server, client(server.url) as upstream:
        await upstream.listing()

        assert all(b"accept-encoding: identity\r\n" in head.lower() for head in server.heads)


async def test_what_was_refused_with_the_token_of_before_is_asked_again_with_the_new_one():
    refused = http(b"{}", "401 Unauthorized")
    heads: list[bytes] = []

    async def play(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append(await reader.readuntil(b"\r\n\r\n"))
        if len(heads) == 1:
            # Under way while the token changes, and refused only then.
            upstream.configure(token="new", connect_timeout=1.0, list_timeout=2.0)
        good = GREETING if b"greeting" in heads[-1] else WHOLE
        writer.write(good if b"Bearer new" in heads[-1] else refused)
        await writer.drain()

    async with raw(play=play) as server, client(server.url, token="old") as upstream:
        assert (await upstream.listing()).tier is Tier.V1

    assert [b"Bearer old" in head for head in heads[:2]] == [True, False]


async def test_an_error_that_quotes_the_token_is_not_passed_on():
    body = json.dumps({"error": f"you said {TOKEN}"}).encode()
    async with raw(GREETING, http(body, "500 Oops")) as server:
        message = await fails(server, Refused, token=TOKEN)

    assert message == "you said (token)"


async def test_a_token_that_cannot_be_sent_is_not_quoted():
    async with raw(GREETING, WHOLE) as server:
        message = await fails(server, UpstreamError, token="canary\nX: y")

    assert "canary" not in message


async def test_a_web_page_at_the_address_is_said_to_be_no_model_server():
    page = http(b"<html>hello</html>", "404 Not Found")
    async with raw(page) as server:
        assert "no model server that we know" in await fails(server, Unexpected)


async def test_leaving_in_the_middle_frees_the_socket():
    async with studio(list_delay_seconds=30) as server, client(server.url) as upstream:
        task = asyncio.create_task(upstream.listing())
        await live.until(lambda: paths(server), "it was asked")
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

        await live.until(lambda: server.studio.in_flight == 0, "the server saw it leave")


async def test_a_refusal_in_words_of_the_opening_is_told_without_them():
    said = b'{"error":"cannot parse: You are the nurse of bed seven"}'
    answer = b"HTTP/1.1 400 Bad Request\r\nContent-Length: %d\r\n\r\n" % len(said) + said
    opening = OPENING[0], {"messages": [{"role": "system", "content": "You are the nurse of bed seven."}]}
    async with raw(answer) as server, client(server.url) as upstream:
        with pytest.raises(Refused) as caught:
            await upstream.prime(opening, "acme/a", ["acme/a"], tier=Tier.V1, timeout=5)

        assert (str(caught.value), caught.value.status) == ("HTTP 400, in words of the opening", 400)


@pytest.mark.parametrize("scheme", ["http", "ws"])
def test_who_is_asked_without_tls_costs_no_reading_of_all_issuers_and_none_is_trusted(scheme: str):
    trust = trusting(f"{scheme}://127.0.0.1:1234")

    assert trust.cert_store_stats()["x509"] == 0
    assert trust.verify_mode is ssl.CERT_REQUIRED


@pytest.mark.parametrize("scheme", ["https", "wss"])
def test_with_tls_whom_this_system_trusts_is_trusted(scheme: str, monkeypatch: pytest.MonkeyPatch):
    taken = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    monkeypatch.setattr(ssl, "create_default_context", lambda: taken)

    assert trusting(f"{scheme}://llm.example.org") is taken
