"""The engine, against a real one; and whatever else may listen there."""

import asyncio
import contextlib
import errno
import shutil
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import pytest
from aiohttp import web
from aiohttp.client_reqrep import ConnectionKey

from keepalive.cluster.etcd import Access, EngineError, Etcd, Http, _why, created, delete, put, unchanged
from keepalive.config import Cluster
from keepalive.service import membership
from tests.kit import etcd as kit
from tests.kit.etcd import needs_etcd
from tests.kit.live import reserved_port, until
from tests.kit.raw import Fault, Middleman, never_accepting

PREFIX = "/keepalive/ward/"

pytestmark = pytest.mark.xdist_group("etcd")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[kit.Etcd]:
    with kit.etcd(tmp_path_factory.mktemp("etcd")) as running:
        yield running


@pytest.fixture
async def engine(server: kit.Etcd) -> AsyncIterator[Etcd]:
    engine = Etcd([server.url], Access(), timeout=20)
    yield engine
    await engine.commit([], [delete(PREFIX + key) for key in ("a", "b")])
    await engine.close()


@needs_etcd
async def test_of_two_who_create_a_key_one_does(engine: Etcd):
    tried = [
        engine.commit([created(PREFIX + "a", 0)], [put(PREFIX + "a", f"{n}".encode())]) for n in range(9)
    ]

    assert sorted(await asyncio.gather(*tried)) == [False] * 8 + [True]
    [row] = await engine.rows(PREFIX)
    assert row.key == "a"
    assert await engine.commit([created(PREFIX + "a", row.created)], [delete(PREFIX + "a")])
    assert not await engine.commit([created(PREFIX + "a", row.created)], [put(PREFIX + "b", b"")])


@needs_etcd
async def test_what_was_written_again_since_it_was_seen_is_not_taken_away(engine: Etcd):
    await engine.commit([], [put(PREFIX + "a", b"x")])
    [seen] = await engine.rows(PREFIX)
    await engine.commit([], [put(PREFIX + "a", b"x")])
    [again] = await engine.rows(PREFIX)

    assert seen.created == again.created
    assert not await engine.commit([unchanged(PREFIX + "a", seen.modified)], [delete(PREFIX + "a")])
    assert await engine.commit([unchanged(PREFIX + "a", again.modified)], [delete(PREFIX + "a")])


@needs_etcd
async def test_what_is_written_with_a_lease_goes_with_it(engine: Etcd):
    lease = await engine.grant(60)
    await engine.commit([], [put(PREFIX + "a", b"x", lease), put(PREFIX + "b", b"\xff\x00")])

    assert await engine.renew(lease)
    await engine.revoke(lease)

    assert [(row.key, row.value) for row in await engine.rows(PREFIX)] == [("b", b"\xff\x00")]
    assert not await engine.renew(lease)


@needs_etcd
async def test_a_watch_says_at_once_that_it_stands_and_then_that_something_has_changed(engine: Etcd):
    told = 0

    async def watch() -> None:
        nonlocal told
        async for _ in engine.watch(PREFIX):
            told += 1

    watching = asyncio.create_task(watch())
    await until(lambda: told == 1, "the watch stands")
    await engine.commit([], [put("/keepalive/warden", b"another one's")])
    await engine.commit([], [put(PREFIX + "a", b"x" * 700_000)])

    await until(lambda: told > 1, "the change is told, however large")
    watching.cancel()


@needs_etcd
async def test_another_address_answers_for_one_that_does_not(server: kit.Etcd):
    with reserved_port() as port:
        engine = Etcd([f"http://127.0.0.1:{port}", server.url], Access(), timeout=20)

        assert await engine.rows(PREFIX) == []
        await engine.close()


@needs_etcd
async def test_an_etcd_that_hangs_is_told_within_the_time_that_a_call_may_take(server: kit.Etcd):
    engine = Etcd([server.url], Access(), timeout=0.2)
    server.signal(signal.SIGSTOP)
    try:
        with pytest.raises(EngineError, match=r"did not answer within 0\.2 s"):
            await engine.rows(PREFIX)
    finally:
        server.signal(signal.SIGCONT)
        await engine.close()


@needs_etcd
async def test_whoever_must_say_who_he_is_does_and_again_when_that_is_forgotten(tmp_path: Path):
    with kit.etcd(tmp_path) as server:
        root = Etcd([server.url], Access(), timeout=20)
        for path, body in (
            ("user/add", {"name": "root", "password": "s3cret"}),
            ("role/add", {"name": "root"}),
            ("user/grant", {"user": "root", "role": "root"}),
            ("enable", {}),
        ):
            await root._call(f"/v3/auth/{path}", body)
        with pytest.raises(EngineError, match=r"user name is empty \(it wants to know who asks"):
            await root.rows(PREFIX)
        await root.close()

        wrong = Etcd([server.url], Access("root", "guess"), timeout=20)
        with pytest.raises(EngineError, match="invalid user ID or password") as raised:
            await wrong.rows(PREFIX)
        assert "guess" not in str(raised.value)
        await wrong.close()

        right = Etcd([server.url], Access("root", "s3cret"), timeout=20)
        assert await right.rows(PREFIX) == []
        right._token = "forgotten.7"
        assert await right.rows(PREFIX) == []
        await right.close()


needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")


def access(ca: Path | None = None, own: tuple[Path, Path] | None = None) -> Access:
    table = {"etcd": ["https://127.0.0.1:1"]} | ({"ca": str(ca)} if ca else {})
    if own is not None:
        table |= {"cert": str(own[0]), "key": str(own[1])}
    return Access(tls=membership.tls(Cluster.model_validate(table)))


async def said(url: str, how: Access) -> str:
    """What comes of asking it for its rows."""
    engine = Etcd([url], how, timeout=20)
    try:
        return "well" if await engine.rows(PREFIX) == [] else "rows"
    except EngineError as error:
        return str(error).removeprefix(f"etcd at {url}: ")
    finally:
        await engine.close()


@needs_etcd
@needs_openssl
async def test_what_is_wrong_with_a_certificate_is_said_in_a_sentence(tmp_path: Path, server: kit.Etcd):
    ours, others = kit.Authority(tmp_path), kit.Authority(tmp_path, "others")
    good, client = ours.signs("good"), ours.signs("client")
    (tmp_path / "expired").mkdir()
    wants = ("--client-cert-auth", "--trusted-ca-file", ours.ca)
    with (
        kit.secured(tmp_path, good, *wants) as strict,
        kit.secured(tmp_path / "expired", ours.signs("expired", days=-1)) as expired,
    ):
        by_name = strict.url.replace("127.0.0.1", "localhost")
        plain, secret = strict.url.replace("https", "http"), server.url.replace("http", "https")

        assert await said(strict.url, access(ours.ca, client)) == "well"
        refused = "its certificate is not accepted: "
        for wrong in (access(others.ca, client), access()):
            assert (await said(strict.url, wrong)).startswith(
                refused + "unable to get local issuer certificate"
            )
        assert (await said(expired.url, access(ours.ca))).startswith(refused + "certificate has expired")
        assert "certificate is not valid for 'localhost'" in await said(by_name, access(ours.ca, client))
        assert (await said(strict.url, access(ours.ca))).startswith(
            "it wants a certificate of ours that it accepts ("
        )
        assert await said(plain, Access()) == (
            "it hung up without an answer; that may be because it wants https://"
        )
        assert (
            await said(secret, access(ours.ca))
            == "it hung up before TLS was spoken; that may be because it wants http://"
        )


@needs_etcd
async def test_addresses_that_are_cut_off_cost_no_more_than_their_share_of_the_time(server: kit.Etcd):
    with never_accepting() as silent, never_accepting() as another:
        cut_off = [f"http://127.0.0.1:{port}" for port in (silent, another)]
        engine = Etcd([*cut_off, server.url], Access(), timeout=3)
        async with asyncio.timeout(3.5):  # each of them alone could have cost as much
            assert await engine.rows(PREFIX) == []
        async with asyncio.timeout(1.0):  # and now it is known who answers
            assert await engine.rows(PREFIX) == []
        await engine.close()

        hopeless = Etcd(cut_off, Access(), timeout=0.5)
        with pytest.raises(EngineError, match="did not answer within"):
            await hopeless.rows(PREFIX)
        await hopeless.close()


@needs_etcd
async def test_an_etcd_that_is_slow_answers_though_another_address_was_asked_meanwhile(server: kit.Etcd):
    with never_accepting() as silent:
        async with Middleman(urlsplit(server.url).port or 0, down=Fault(delay=0.5)) as slow:
            engine = Etcd(
                [f"http://127.0.0.1:{slow.port}", f"http://127.0.0.1:{silent}"], Access(), timeout=0.8
            )

            assert await engine.rows(PREFIX) == []
            await engine.close()


@pytest.mark.parametrize(
    ("cause", "words"),
    [
        (
            socket.gaierror(8, "nodename nor servname provided"),
            "Cannot connect: nodename nor servname provided",
        ),
        (ConnectionRefusedError(111, "refused"), "Cannot connect: Connection refused"),
    ],
)
def test_names_that_are_not_found_are_said_in_their_own_words(cause: OSError, words: str):
    key = ConnectionKey("nowhere", 2379, False, True, None, None, None)

    assert _why(aiohttp.ClientConnectorError(key, cause), "http://nowhere") == words


def test_a_connection_that_broke_is_not_one_that_could_not_be_made():
    error = aiohttp.ClientOSError(104, "reset")
    error.__cause__ = ConnectionResetError(104, "reset")

    assert _why(error, "http://x") == "the connection broke: Connection reset by peer"


@needs_etcd
async def test_an_etcd_whose_gateway_is_off_as_with_a_config_file_of_its_own_is_told_to_have_it_on(
    tmp_path: Path,
):
    with kit.etcd(tmp_path, "--enable-grpc-gateway=false") as server:
        assert await said(server.url, Access()) == (
            f"what listens at {server.url} does not answer as etcd 3.4 or newer does; "
            "if it is etcd, set enable-grpc-gateway: true in its config file"
        )


@pytest.mark.parametrize("number", [None, errno.ECONNRESET])
def test_whoever_hangs_up_before_tls_is_spoken_may_speak_none(number: int | None):
    key = ConnectionKey("x", 2379, True, True, None, None, None)
    cause = ConnectionResetError(number, "reset") if number else ConnectionResetError()

    assert (
        _why(aiohttp.ClientConnectorError(key, cause), "https://x")
        == "it hung up before TLS was spoken; that may be because it wants http://"
    )


def test_whoever_hangs_up_once_tls_is_spoken_may_want_a_certificate_and_is_not_said_to_speak_no_tls():
    error = aiohttp.ClientOSError(None, "Can not write request body")
    error.__cause__ = aiohttp.ClientConnectionResetError("Cannot write to closing transport")

    assert _why(error, "https://x") == (
        "it hung up once TLS was spoken; that may be because it wants a certificate of ours that it accepts: "
        "see cluster.cert and cluster.key"
    )


@needs_openssl
def test_what_is_wrong_with_a_file_of_ours_is_said_of_that_file(tmp_path: Path):
    ours = kit.Authority(tmp_path)
    (cert, key), (_, other) = ours.signs("a"), ours.signs("b")
    (junk := tmp_path / "junk.pem").write_text("hello\n")
    locked, missing = tmp_path / "locked.key", tmp_path / "missing.pem"
    words = ("openssl", "ec", "-aes128", "-passout", "pass:s3cret", "-in", str(key), "-out", str(locked))
    subprocess.run(words, check=True, capture_output=True)

    def trouble(ca: Path, own: tuple[Path, Path]) -> str:
        with pytest.raises(membership.MembershipError) as raised:
            access(ca, own)
        return str(raised.value).replace(str(tmp_path), "")

    assert [
        trouble(missing, (cert, key)),
        trouble(junk, (cert, key)),
        trouble(ours.ca, (cert, missing)),
        trouble(ours.ca, (junk, key)),
        trouble(ours.ca, (cert, other)),
        trouble(ours.ca, (cert, locked)),
    ] == [
        "cluster.ca: /missing.pem cannot be used: No such file or directory",
        "cluster.ca: /junk.pem cannot be used: no certificate or crl found",
        "cluster.key: /missing.pem cannot be used: No such file or directory",
        "cluster.cert: /junk.pem cannot be used: there is none in it",
        "cluster.cert: /a.pem cannot be used: cluster.key is the key to another one",
        "cluster.key: /locked.key is encrypted; write it anew without a password",
    ]


@needs_etcd
async def test_what_is_not_received_within_a_call_is_sent_again_by_nobody(
    server: kit.Etcd, monkeypatch: pytest.MonkeyPatch
):
    made: list[socket.socket] = []
    dial = Http._socket
    monkeypatch.setattr(Http, "_socket", lambda http, address: made.append(dial(http, address)) or made[-1])
    engine = Etcd([server.url], Access(), timeout=20)
    await engine.rows(PREFIX)

    assert [one.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) for one in made] == [20_000]
    await engine.close()


async def test_nobody_there_is_said_in_a_sentence():
    with reserved_port() as port:
        engine = Etcd([f"http://127.0.0.1:{port}"], Access(), timeout=20)

        with pytest.raises(EngineError, match=f"etcd at http://127.0.0.1:{port}: Cannot connect"):
            await engine.grant(5)
        await engine.close()


@contextlib.asynccontextmanager
async def told_by(answer: Any, access: Access) -> AsyncIterator[Etcd]:
    async with kit.in_place_of_etcd(answer) as url:
        engine = Etcd([url], access, timeout=20)
        try:
            yield engine
        finally:
            await engine.close()


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (200, b"<html>hello</html>"),
        (404, b"Not Found\n"),
        (200, b"[]"),
        (200, b"\xff\xfe"),
        (200, b'{"ID": []}'),
        (200, b'{"ID": "seven"}'),
        (200, b'{"kvs": "none"}'),
        (200, b'{"kvs": [{}]}'),
        (200, b'{"kvs": [{"key": "AA==", "value": 7}]}'),
        (200, b'{"kvs": [{"key": "AA==", "create_revision": "first"}]}'),
    ],
)
async def test_what_is_no_etcd_is_said_in_a_sentence(status: int, body: bytes):
    async def answer(_: web.BaseRequest) -> web.Response:
        return web.Response(status=status, body=body)

    async with told_by(answer, Access()) as engine:
        with pytest.raises(EngineError):
            await (engine.rows(PREFIX) if b"kvs" in body else engine.grant(5))


@pytest.mark.parametrize(
    "said", ["etcdserver: revision of auth store is old", "auth: revision in header is old"]
)
async def test_whoever_has_said_who_he_is_says_so_again_when_rights_were_changed(said: str):
    heard: list[str] = []

    async def answer(request: web.BaseRequest) -> web.Response:
        heard.append(request.path)
        if request.path.endswith("authenticate"):
            return web.json_response({"token": f"{len(heard)}"})
        if request.headers["Authorization"] == "1":
            return web.json_response({"error": said, "code": 3}, status=400)
        return web.json_response({})

    async with told_by(answer, Access("keepalive", "secret")) as engine:
        assert await engine.rows(PREFIX) == []
        assert heard == ["/v3/auth/authenticate", "/v3/kv/range"] * 2


async def test_a_password_goes_nowhere_else_though_etcd_should_say_that_it_is_elsewhere():
    heard: list[str] = []

    async def answer(request: web.BaseRequest) -> web.Response:
        heard.append(request.path)
        return web.Response(status=307, headers={"Location": "/elsewhere"})

    async with told_by(answer, Access("keepalive", "secret")) as engine:
        with pytest.raises(EngineError):
            await engine.grant(5)

    assert heard == ["/v3/auth/authenticate"]
