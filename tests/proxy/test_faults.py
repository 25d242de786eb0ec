"""What an upstream can do to us, row by row; nobody is told that half an answer is a whole one."""

import asyncio
import gzip
import json
import re
import socket

import pytest

from keepalive.core.facts import InstanceLost, ModelId, RequestEnded
from keepalive.http1 import Limits
from keepalive.proxy import Address
from tests.kit import DATA, live
from tests.kit.fronted import (
    CHAT_BODY,
    CHAT_STREAM,
    DONE,
    QUICK,
    SSE_HEAD,
    STOP,
    Keep,
    Upstream,
    Watching,
    answer_ok,
    ask,
    chat,
    chunk,
    delta,
    fronted,
    get,
    post,
    raw,
    says,
    split_answer,
    stream,
    without_comments,
)

BOTH_LOOPS = True
# What inference servers that nobody here wrote have sent: each `recv` with its time and length.
TRANSCRIPTS = DATA / "transcripts"


def warm(**how):
    keep = Keep()
    keep.add("m", **how)
    return keep


def facts(keep, kind):
    return [fact for fact in keep.models[ModelId("local", "m")].facts if isinstance(fact, kind)]


def now():
    return asyncio.get_running_loop().time()


def ok(body, *headers):
    lines = b"".join(header + b"\r\n" for header in headers)
    return b"HTTP/1.1 200 OK\r\n%bContent-Length: %d\r\n\r\n%b" % (lines, len(body), body)


ERROR = b'data: {"error":{"message":"the upstream\'s answer was cut"'


# --- U1, U2: nobody there ---------------------------------------------------------------------------


@pytest.mark.clock_jumps
async def test_u1_refused_is_502_at_once_for_a_model_nobody_keeps_and_503_for_one_that_is_kept():
    async with fronted(keep=warm()) as (front, upstream):
        await upstream.stop()
        began = now()
        nobody, _, body = await ask(front.port, chat("other", stream=False))
        kept, headers, _ = await ask(front.port, chat("m", stream=False))

        assert nobody == 502
        assert "refused the connection" in json.loads(body)["error"]["message"]
        assert (kept, headers[b"retry-after"]) == (503, b"5")
        assert now() - began < 0.05
        assert facts(front.keep, InstanceLost)


@pytest.mark.clock_jumps
async def test_u1_the_upstream_died_and_the_keeper_knows_it_after_the_first_try():
    keep = warm(load_seconds=0.3)

    class Knows(Keep):
        def record(self, fact):
            super().record(fact)
            if isinstance(fact, InstanceLost):
                self.models[fact.model].state = "cold"

    knows = Knows()
    knows.models = keep.models
    async with fronted(says(CHAT_STREAM), keep=knows, heartbeat=0.1) as (front, upstream):
        await upstream.stop()
        asyncio.get_running_loop().call_later(0.15, lambda: asyncio.ensure_future(upstream.start()))
        status, _, body = await ask(front.port, chat())

        assert (status, without_comments(body)) == (200, CHAT_BODY)


@pytest.mark.clock_jumps
async def test_u2_a_connection_that_hangs_is_given_up_after_the_connect_bound():
    with socket.socket() as full, socket.socket() as first, socket.socket() as second:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for filler in (first, second):
            filler.setblocking(False)
            filler.connect_ex(full.getsockname())
        await asyncio.sleep(0.05)
        upstreams = {"local": Address(f"http://127.0.0.1:{full.getsockname()[1]}")}
        async with fronted(upstreams=upstreams, connect_timeout=0.3) as (front, _):
            began = now()
            status, _, body = await ask(front.port, chat(stream=False))

            assert status == 502
            assert b"did not accept a connection in 0.3 s" in body
            assert now() - began == pytest.approx(0.3, abs=0.05)


# --- U3, U4: connections that end -------------------------------------------------------------------


async def test_u3_a_reset_before_the_head_on_a_fresh_connection_is_502_and_asked_once():
    async with fronted(says(b"", then="reset"), keep=warm()) as (front, upstream):
        status, _, _ = await ask(front.port, chat(stream=False))

        assert status == 502
        assert len(upstream.requests) == 1
        assert (await front.last()).outcome == "cut"


async def test_u3_on_a_reused_connection_it_is_tried_once_more():
    async def script(asking):
        if asking.upstream.connections == 1 and len(asking.upstream.requests) == 2:
            asking.reset()
        else:
            await answer_ok(asking)

    async with fronted(script) as (front, upstream):
        await ask(front.port, get("/a"))
        status, _, body = await ask(front.port, post("/b", b"body"))

        assert (status, body) == (200, b"fine")
        assert upstream.connections == 2
        assert [asking.body for asking in upstream.requests] == [b"", b"body", b"body"]


@pytest.mark.clock_jumps
async def test_u3_what_was_generated_for_a_while_is_not_asked_for_again():
    async def script(asking):
        if len(asking.upstream.requests) == 2:
            await asyncio.sleep(1.1)
            asking.reset()
        else:
            await answer_ok(asking)

    async with fronted(script, keep=warm()) as (front, upstream):
        await ask(front.port, get("/a"))
        status, _, _ = await ask(front.port, chat(stream=False))

        assert status == 502
        assert len(upstream.requests) == 2


async def test_u4_connections_closed_unannounced_after_a_stream_are_not_used_again():
    async def script(asking):
        await asking.send(CHAT_STREAM)
        asking.cut()

    async with fronted(script, keep=warm()) as (front, upstream):
        for _ in range(20):
            assert (await ask(front.port, chat()))[2] == CHAT_BODY

        assert len(upstream.requests) == 20


async def test_u4_after_a_stream_the_connection_is_used_again_while_it_stays_open():
    async with fronted(says(CHAT_STREAM), keep=warm()) as (front, upstream):
        for _ in range(3):
            await ask(front.port, chat())

        assert upstream.connections == 1


async def test_u4_once_a_connection_was_closed_after_a_stream_none_is_used_again_after_one():
    async def script(asking):
        first = len(asking.upstream.requests) == 1
        await asking.send(CHAT_STREAM)
        if first:
            asking.cut()

    async with fronted(script, keep=warm()) as (front, upstream):
        for _ in range(4):
            assert (await ask(front.port, chat()))[2] == CHAT_BODY

        assert (len(upstream.requests), upstream.connections) == (4, 4)


async def test_a_connection_that_a_slow_caller_had_paused_serves_the_next_one():
    body = b"x" * 150_000

    async with fronted(says(ok(body))) as (front, upstream):
        _reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
        while not front.listener.connections:
            await asyncio.sleep(0.01)
        sock = next(iter(front.listener.connections)).transport.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        writer.transport.pause_reading()
        writer.write(get("/").replace(b"Connection: close\r\n", b""))
        await front.last()  # all of it is with us, most of it not yet with the caller
        assert (await ask(front.port, get("/")))[2] == body
        writer.transport.abort()

        assert upstream.connections == 1


async def test_u4_idle_connections_that_are_closed_as_we_send_cost_no_caller_anything():
    async def script(asking):
        await answer_ok(asking)
        loop = asyncio.get_running_loop()
        loop.call_later(0.01 + 0.0001 * (len(asking.upstream.requests) % 20), asking.cut)

    async with fronted(script) as (front, _upstream):
        for _ in range(200):
            assert (await ask(front.port, post("/x", b"body")))[0] == 200
            await asyncio.sleep(0.008)


@pytest.mark.clock_jumps
async def test_u4_connections_are_reused_and_given_up_after_four_seconds(monkeypatch):
    monkeypatch.setattr("keepalive.http1.pool.IDLE_SECONDS", 0.2)
    async with fronted() as (front, upstream):
        for _ in range(5):
            await ask(front.port, get("/a"))
        reused = upstream.connections
        await asyncio.sleep(0.3)

        assert reused == 1
        assert upstream.open == 0


# --- U5, U6: silence --------------------------------------------------------------------------------


@pytest.mark.clock_jumps
async def test_u5_headers_and_then_silence_is_filled_and_never_cut():
    patient = asyncio.Event()

    async def script(asking):
        await asking.send(SSE_HEAD)
        await patient.wait()
        await asking.send(CHAT_STREAM[len(SSE_HEAD) :])

    async with fronted(script, keep=warm(), heartbeat=0.1) as (front, _):
        caller = Watching(front.port)
        asking = asyncio.create_task(caller.call(chat()))
        await caller.heard(b": keepalive", 4)
        patient.set()
        _, _, body = await asking

        assert without_comments(body) == CHAT_BODY


async def test_u6_a_head_cut_at_every_byte_is_never_an_answer():
    head = ok(b"{}", b"Content-Type: application/json")
    end = len(head) - 2
    at = 0

    async def script(asking):
        await asking.send(head[:at])
        asking.cut()

    async with fronted(script, keep=warm()) as (front, _upstream):
        for at in range(end):
            status, _, _ = await ask(front.port, chat(stream=False))
            assert status == 502, at
            assert (await front.last()).outcome in ("cut", "upstream_error")


async def test_u6_half_a_head_and_then_silence_is_504():
    async def script(asking):
        await asking.send(b"HTTP/1.1 200 OK\r\nContent-")
        await asking.left()

    async with fronted(script, limits=Limits(tick=0.02, header_timeout=0.3)) as (front, _):
        status, _, _ = await ask(front.port, chat(stream=False))

        assert status == 504
        assert (await front.last()).outcome == "timeout"


# --- U7, U8: cut in the body ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bad",
    [b"zz\r\n", b"0x10\r\n", b"-1\r\n", b"fffffffffffffffff\r\n", b"3\r\nabcd\r\n", b"10 \r\n"],
)
async def test_u7_bad_chunks_end_as_a_cut_stream_does(bad):
    script = says(SSE_HEAD + chunk(delta("a")) + bad + b"more")
    async with fronted(script, keep=warm()) as (front, upstream):
        _, _, body = await ask(front.port, chat())

        assert body.startswith(delta("a") + ERROR)
        assert (await front.last()).outcome == "cut"
        assert upstream.open == 0


async def test_u7_garbage_behind_the_end_is_nobodys_answer():
    script = says(CHAT_STREAM + b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil")
    async with fronted(script, keep=warm()) as (front, _upstream):
        assert (await ask(front.port, chat()))[2] == CHAT_BODY
        assert (await ask(front.port, chat()))[2] == CHAT_BODY


async def test_u8_a_stream_cut_at_every_byte_ends_with_whole_events_and_an_error():
    events = [delta(f"token {number} ü") for number in range(3)] + [STOP, DONE]
    whole = stream(*events)
    at = 0

    async def script(asking):
        await asking.send(whole[:at])
        asking.cut()

    async with fronted(script, keep=warm()) as (front, _):
        for at in range(len(SSE_HEAD), len(whole)):
            status, _, body = await ask(front.port, chat())
            assert status == 200
            passed, found, _ = body.partition(ERROR)
            assert found, at
            assert b"".join(events).startswith(passed)
            assert passed == b"" or passed.endswith(b"\n\n")
            assert (await front.last()).outcome == "cut"


async def test_u8_a_reset_in_the_middle_of_an_event_is_the_same():
    async def script(asking):
        await asking.send(SSE_HEAD + chunk(delta("a") + b"data: {half"))
        await asyncio.sleep(0.1)
        asking.reset()

    async with fronted(script, keep=warm()) as (front, _):
        _, _, body = await ask(front.port, chat())

        assert body.startswith(delta("a") + ERROR)
        assert b"half" not in body


async def test_u8_an_event_too_large_to_be_held_back_is_cut_off_with_the_connection():
    big = b"data: " + b"x" * 600_000

    async def script(asking):
        await asking.send(SSE_HEAD + chunk(big))
        await asyncio.sleep(0.1)
        asking.cut()

    async with fronted(script, keep=warm(), heartbeat=0.02) as (front, _):
        answer = await raw(front.port, chat())

        assert b": keepalive" not in answer[answer.index(b"xxx") :]
        assert b"0\r\n\r\n" not in answer[-20:]


@pytest.mark.parametrize(
    "reply",
    [
        ok(b"{}" * 50)[:-10],
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk(b"{}" * 50),
    ],
)
async def test_u8_json_that_was_cut_arrives_cut(reply):
    async with fronted(says(reply, then="cut"), keep=warm()) as (front, _):
        answer = await raw(front.port, chat(stream=False))

        with pytest.raises((AssertionError, ValueError)):
            split_answer(answer)
        assert answer.count(b"HTTP/1.1") <= 1
        assert (await front.last()).outcome == "cut"


async def test_u8_to_http_1_0_a_cut_is_a_reset():
    reply = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk(b"{}" * 50)

    async def script(asking):
        await asking.send(reply)
        await asyncio.sleep(0.1)
        asking.cut()

    async with fronted(script) as (front, _):
        reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
        writer.write(b"GET / HTTP/1.0\r\n\r\n")

        with pytest.raises(ConnectionResetError):
            await reader.read()
        writer.close()


async def test_the_bare_proxy_error_passes_as_it_came_and_counts_as_cut():
    words = b"proxy error: Failed to read connection"
    async with fronted(says(stream(delta("a"), words)), keep=warm()) as (front, _):
        _, _, body = await ask(front.port, chat())

        assert body == delta("a") + words
        assert (await front.last()).outcome == "cut"


async def test_an_error_inside_a_stream_passes_and_a_crash_is_reported():
    words = b'event: error\ndata: {"error":{"message":"The model has crashed without more."}}\n\n'
    async with fronted(says(stream(delta("a"), words)), keep=warm()) as (front, _):
        _, _, body = await ask(front.port, chat())

        assert body == delta("a") + words
        assert (await front.last()).outcome == "upstream_error"
        assert facts(front.keep, InstanceLost)[0].message == "the model has crashed"


# --- U10, U15: it says no ---------------------------------------------------------------------------


async def test_u10_200_with_an_error_passes_unchanged_and_counts_as_error():
    body = b'{"error":"Unexpected endpoint or method. (POST /v1/x)"}'
    async with fronted(says(ok(body)), keep=warm()) as (front, _):
        status, _, got = await ask(front.port, chat(stream=False))

        assert (status, got) == (200, body)
        assert (await front.last()).outcome == "upstream_error"
        assert not facts(front.keep, RequestEnded)[0].answered


def refusal(text, status=b"400 Bad Request", packed=False):
    body = json.dumps({"error": text}).encode()
    coding = b"Content-Encoding: gzip\r\n" if packed else b""
    body = gzip.compress(body) if packed else body
    head = b"HTTP/1.1 %b\r\n%bContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    return head % (status, coding, len(body)) + body


LOST = [
    refusal("Model was unloaded while the request was still in queue.."),
    refusal("Model reloaded."),
    refusal("Model is unloaded."),
    refusal({"message": "Model unloaded.", "code": None}, b"500 Internal Server Error"),
    refusal("Failed to load model. Error: Operation canceled", b"404 Not Found"),
    refusal("Model is unloaded.", b"200 OK"),
    refusal("Model is unloaded.", packed=True),  # nginx with `gzip on`
    refusal({"message": "Loading model", "type": "unavailable_error"}, b"503 Service Unavailable"),
    b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 17\r\n\r\n<html>502</html>\n",
    b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n",
    stream(b'event: error\ndata: {"error":{"message":"Model is unloaded."}}\n\n', DONE),
    stream(b'data: {"type":"error",', b'"message":"Model unloaded."}\r\n\r\n'),
]


@pytest.mark.parametrize("reply", LOST)
@pytest.mark.parametrize("streaming", [True, False])
async def test_u15_a_model_that_went_away_before_the_first_byte_is_asked_again_once(reply, streaming):
    async def script(asking):
        await asking.send(reply if len(asking.upstream.requests) == 1 else CHAT_STREAM)

    async with fronted(script, keep=warm()) as (front, upstream):
        status, _, body = await ask(front.port, chat(stream=streaming))

        assert (status, body) == (200, CHAT_BODY)
        assert len(upstream.requests) == 2
        assert len(facts(front.keep, InstanceLost)) == 1
        assert front.keep.warm_asked == 2


async def test_u15_the_second_time_a_stream_of_one_error_is_passed_on_and_told_once():
    words = b'data: {"error":{"message":"Model is unloaded."}}\n\n'
    async with fronted(says(stream(words)), keep=warm()) as (front, upstream):
        status, _, body = await ask(front.port, chat())

        assert (status, body) == (200, words)
        assert len(upstream.requests) == 2
        assert len(facts(front.keep, InstanceLost)) == 2  # of either answer once


async def test_u15_what_was_promised_with_events_ends_with_one_when_the_second_answer_is_none():
    async def script(asking):
        first = len(asking.upstream.requests) == 1
        await asking.send(LOST[-2] if first else refusal({"message": "no", "code": "c", "n": 1}))

    async with fronted(script, keep=warm()) as (front, _):
        status, _, body = await ask(front.port, chat())

        assert (status, body) == (200, b'data: {"error":{"message":"no","code":"c","n":1}}\n\n')


async def test_u15_an_event_that_passed_is_the_end_of_trying_again():
    words = b'data: {"error":{"message":"Model is unloaded."}}\n\n'
    async with fronted(says(stream(delta("a"), words)), keep=warm()) as (front, upstream):
        _, _, body = await ask(front.port, chat())

        assert body == delta("a") + words
        assert len(upstream.requests) == 1


async def test_u15_the_second_time_it_is_passed_on():
    reply = refusal("Model was unloaded while the request was still in queue..")
    async with fronted(says(reply), keep=warm()) as (front, upstream):
        status, _, body = await ask(front.port, chat(stream=False))

        assert (status, body) == (400, reply.partition(b"\r\n\r\n")[2])
        assert len(upstream.requests) == 2


async def test_what_a_model_crashed_under_is_not_asked_for_again():
    reply = refusal("The model has crashed without additional information. (Exit code: null)")
    async with fronted(says(reply), keep=warm()) as (front, upstream):
        status, _, body = await ask(front.port, chat(stream=False))

        assert (status, body) == (400, reply.partition(b"\r\n\r\n")[2])
        assert len(upstream.requests) == 1
        assert len(facts(front.keep, InstanceLost)) == 1


async def test_other_refusals_pass_unchanged_whatever_their_size():
    body = b"x" * 200_000
    reply = b"HTTP/1.1 404 Nope\r\nContent-Length: 200000\r\nX-Their: 1\r\n\r\n" + body
    async with fronted(says(reply), keep=warm()) as (front, _):
        status, headers, got = await ask(front.port, chat(stream=False))

        assert (status, headers[b"x-their"], got) == (404, b"1", body)
        assert not facts(front.keep, InstanceLost)


# --- U20 to U23: what is no answer ------------------------------------------------------------------


@pytest.mark.parametrize(
    "reply",
    {
        "ssh": b"SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n",
        "tls": b"\x15\x03\x01\x00\x02\x02\x46",
        "099": b"HTTP/1.1 099 Odd\r\nContent-Length: 0\r\n\r\n",
        "999": b"HTTP/1.1 999 Odd\r\nContent-Length: 0\r\n\r\n",
        "101 unasked": b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n",
        "NUL": b"HTTP/1.1 200 OK\r\nA: b\x00c\r\nContent-Length: 0\r\n\r\n",
        "CR": b"HTTP/1.1 200 OK\r\nA: b\rc\r\nContent-Length: 0\r\n\r\n",
        "LF only": b"HTTP/1.1 200 OK\nContent-Length: 0\n\n",
        "obs-fold": b"HTTP/1.1 200 OK\r\nA: b\r\n c\r\nContent-Length: 0\r\n\r\n",
        "TE and CL": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
        "two CL": b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\nContent-Length: 5\r\n\r\nabcde",
        "gzip, chunked": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        "65 KiB": b"HTTP/1.1 200 OK\r\nA: " + b"a" * 66_000 + b"\r\nContent-Length: 0\r\n\r\n",
    }.items(),
    ids=lambda item: item[0],
)
async def test_u21_malformed_heads_are_502_and_nothing_of_them_arrives(reply):
    async with fronted(says(reply[1]), keep=warm()) as (front, upstream):
        status, headers, _ = await ask(front.port, chat(stream=False))

        assert status == 502
        assert b"a" not in headers
        assert upstream.open == 0
        assert (await front.last()).outcome == "upstream_error"


async def test_u21_large_heads_within_the_limit_pass():
    many = b"".join(b"X-%d: %d\r\n" % (number, number) for number in range(1000))
    reply = b"HTTP/1.1 200\r\nBig: %b\r\n%bContent-Length: 2\r\n\r\n{}" % (b"b" * 20_000, many)
    async with fronted(says(reply)) as (front, _):
        status, headers, body = await ask(front.port, get("/"))

        assert (status, body) == (200, b"{}")
        assert headers[b"big"] == b"b" * 20_000
        assert headers[b"x-999"] == b"999"


async def test_u21_two_headers_of_one_name_stay_two():
    reply = b"HTTP/1.1 200 OK\r\nSet-Cookie: a=1\r\nSet-Cookie: b=2\r\nContent-Length: 0\r\n\r\n"
    async with fronted(says(reply)) as (front, upstream):
        answer = await raw(front.port, get("/"))
        await ask(front.port, get("/"))

        assert answer.count(b"Set-Cookie: ") == 2
        assert b"cookie" not in upstream.requests[1].headers


async def test_u22_informational_answers_are_swallowed():
    reply = (
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 102 Processing\r\n\r\n"
        b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + ok(b"{}")
    )
    async with fronted(says(reply, drip=1)) as (front, _):
        answer = await raw(front.port, get("/"))

        assert answer.count(b"HTTP/1.1 ") == 1
        assert split_answer(answer)[2] == b"{}"


@pytest.mark.parametrize("status", [204, 304])
async def test_u22_bodies_where_none_may_be_do_not_become_answers(status):
    reply = b"HTTP/1.1 %d X\r\nContent-Length: 4\r\nETag: x\r\n\r\nevil" % status
    async with fronted(says(reply)) as (front, _):
        for _ in range(3):
            answer = await raw(front.port, get("/"))
            assert answer.startswith(b"HTTP/1.1 %d X\r\n" % status)
            assert b"evil" not in answer


async def test_u22_head_is_answered_without_a_body_and_with_its_length():
    async with fronted(says(ok(b"evil"))) as (front, _):
        answer = await raw(front.port, get("/").replace(b"GET", b"HEAD"))

        assert answer.endswith(b"\r\n\r\n")
        assert b"Content-Length: 4\r\n" in answer


async def test_u22_redirects_are_passed_and_not_followed():
    reply = b"HTTP/1.1 302 Found\r\nLocation: http://169.254.169.254/\r\nContent-Length: 0\r\n\r\n"
    async with fronted(says(reply)) as (front, upstream):
        status, headers, _ = await ask(front.port, get("/"))

        assert (status, headers[b"location"]) == (302, b"http://169.254.169.254/")
        assert len(upstream.requests) == 1


async def test_u23_more_than_content_length_never_leaks_into_another_answer():
    async with fronted(says(ok(b"abc") + b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil")) as (front, _):
        for _ in range(3):
            assert (await ask(front.port, get("/")))[2] == b"abc"


async def test_u23_without_a_length_the_end_of_the_connection_is_the_end():
    async with fronted(says(b"HTTP/1.0 200 OK\r\n\r\nall of it", then="cut")) as (front, _):
        status, headers, body = await ask(front.port, get("/"))

        assert (status, body) == (200, b"all of it")
        assert headers[b"transfer-encoding"] == b"chunked"


async def test_u23_without_a_length_a_reset_is_a_cut():
    async def script(asking):
        await asking.send(b"HTTP/1.0 200 OK\r\n\r\nhalf of it")
        await asyncio.sleep(0.1)
        asking.reset()

    async with fronted(script) as (front, _):
        await raw(front.port, get("/"))

        assert (await front.last()).outcome == "cut"


# --- U25: events were promised ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "says_what"),
    [
        (refusal("prompt is longer than the context length"), "prompt is longer than the context length"),
        (refusal("prompt is too long", packed=True), "prompt is too long"),
        (
            ok(
                b'event: error\ndata: {"error":"no such field"}\n\n', b"Content-Type: text/event-stream"
            ).replace(b"200 OK", b"400 Bad Request"),
            "no such field",
        ),
        (ok(b'{"error":{"message":"no such thing"}}'), "no such thing"),
        (
            ok(b'{"choices":[]}', b"Content-Type: application/json"),
            "the upstream answered 200 without events",
        ),
        (
            b"HTTP/1.1 500 Oops\r\nContent-Type: text/html\r\nContent-Length: 6\r\n\r\n<html>",
            "the upstream answered 500 without events",
        ),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", "the upstream answered 200 without events"),
        (
            ok(b"<html>\r\n<head><title>502 Bad\tGateway</title></head>", b"Content-Type: text/html"),
            "the upstream answered 200: 502 Bad Gateway",
        ),
        (
            ok(b"\nPayload too \x1b[1mlarge\nsecond line", b"Content-Type: text/plain"),
            "the upstream answered 200: Payload too [1mlarge",
        ),
        (ok(b'{"detail":{"msg":"busy","type":"x"}}'), "the upstream answered 200: busy"),
        (ok(b'{"title":"Bad Gateway","status":502}'), "the upstream answered 200: Bad Gateway"),
        (ok(b'[{"error":{"code":400,"message":"no key"}}]'), "no key"),
        (ok(b'[{"error":{"message":"no key"}},{}]'), "the upstream answered 200: no key"),
        (ok(b'{"errors":[{"code":7,"message":"No route"}]}'), "the upstream answered 200: No route"),
        (b"", "closed the connection before it answered"),
    ],
)
async def test_u25_after_200_any_other_answer_is_an_error_event(reply, says_what):
    keep = warm(state="cold", load_seconds=0.15)
    async with fronted(says(reply, then="cut"), keep=keep, heartbeat=0.1) as (front, _):
        status, _, body = await ask(front.port, chat())

        assert status == 200
        events = without_comments(body)
        assert events.count(b"data: ") == 1
        assert says_what in json.loads(events.removeprefix(b"data: "))["error"]["message"]


async def test_a_refusal_with_nothing_around_it_is_told_with_its_code():
    bare = {"message": "too much", "code": "quota", "type": "limit", "tokens": 7}
    reply = ok(json.dumps(bare).encode()).replace(b"200 OK", b"400 Bad Request")
    keep = warm(state="cold", load_seconds=0.15)
    async with fronted(says(reply, then="cut"), keep=keep, heartbeat=0.1) as (front, _):
        _, _, body = await ask(front.port, chat())

    assert json.loads(without_comments(body).removeprefix(b"data: "))["error"] == bare


@pytest.mark.parametrize(
    "body",
    [
        b"<html><title>400 the prompt exceeds the context window</title>",
        b'{"status":400,"title":"Prompt is too long"}',
    ],
)
@pytest.mark.parametrize("path", ["/v1/responses", "/v1/chat/completions"])
async def test_u25_a_prompt_that_is_too_long_is_known_for_one_in_every_layout(path, body):
    reply = ok(body).replace(b"200 OK", b"400 Bad Request")
    keep = warm(state="cold", load_seconds=0.15)
    async with fronted(says(reply), keep=keep, heartbeat=0.1) as (front, _):
        _, _, said = await ask(front.port, chat().replace(b"/v1/chat/completions", path.encode()))

        assert b'"code":"context_length_exceeded"' in said


# --- U27: drips, line ends, real bytes --------------------------------------------------------------


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
async def test_u27_every_line_end_passes_byte_for_byte_in_single_bytes(end):
    body = b"\xef\xbb\xbf" + (delta("Grüße 模型") * 3 + STOP + DONE).replace(b"\n", end)
    async with fronted(says(stream(body), drip=1), keep=warm()) as (front, _):
        assert (await ask(front.port, chat()))[2] == body


async def test_u27_multi_byte_text_split_at_every_offset_passes_byte_for_byte():
    body = delta("Grüße 模型 🙂") + STOP + DONE
    at = 0

    async def script(asking):
        await asking.send(SSE_HEAD + chunk(body[:at]))
        await asyncio.sleep(0.001)
        await asking.send(chunk(body[at:]) + b"0\r\n\r\n")

    async with fronted(script, keep=warm()) as (front, _):
        while (at := at + 1) < len(body):
            assert (await ask(front.port, chat()))[2] == body


def received(name):
    recording = (TRANSCRIPTS / name).read_bytes()
    return b"".join(
        recording[mark.end() : mark.end() + int(mark[1])]
        for mark in re.finditer(rb"^--- recv \S+ ([0-9]+) bytes\n", recording, re.MULTILINE)
    )


def is_one_answer(sent):
    return sent.startswith(b"HTTP/1.1 200") and sent.count(b"HTTP/1.1 ") == 1


def transcripts():
    names = sorted(path.name for path in TRANSCRIPTS.glob("*.txt"))
    return [name for name in names if is_one_answer(received(name))]


@pytest.mark.parametrize("name", transcripts())
async def test_recordings_of_real_servers_pass_byte_for_byte(name):
    sent = received(name)
    async with fronted(says(sent, then="cut"), keep=warm()) as (front, _):
        body = (await ask(front.port, chat()))[2]

        try:
            assert body == split_answer(sent)[2]
        except ValueError:  # the recording itself was cut
            assert body.partition(ERROR)[1] == ERROR
            assert (await front.last()).outcome == "cut"


# --- U29: names -------------------------------------------------------------------------------------


async def test_u29_a_name_nobody_knows_is_said():
    upstreams = {"local": Address("http://no-such-host.invalid:1234")}
    async with fronted(upstreams=upstreams) as (front, _):
        status, _, body = await ask(front.port, get("/"))

        assert status == 502
        assert b"no-such-host.invalid" in body


async def test_u29_the_second_address_of_a_name_is_tried():
    upstream = Upstream(answer_ok)
    await upstream.start()
    upstreams = {"local": Address(f"http://localhost:{upstream.port}")}
    async with fronted(upstreams=upstreams) as (front, _):
        loop = asyncio.get_running_loop()
        pool = front.proxy.upstreams.pools["local"]

        async def two_addresses(*args, **kwargs):
            return [
                (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("::1", 1, 0, 0)),
                (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", upstream.port)),
            ]

        class Loop:
            getaddrinfo = staticmethod(two_addresses)

            def __getattr__(self, name):
                return getattr(loop, name)

        pool.loop = Loop()
        assert (await ask(front.port, get("/")))[0] == 200
    await upstream.end()


async def test_a_silent_upstream_does_not_slow_the_others():
    silent = Upstream(lambda asking: asyncio.sleep(60))
    await silent.start()
    keep = Keep()
    keep.add("m")
    keep.add("n", upstream="silent")
    async with fronted(says(CHAT_STREAM), keep=keep, limits=QUICK) as (front, upstream):
        front.proxy.configure(
            front.proxy.settings.__class__(
                upstreams={
                    "local": Address(f"http://127.0.0.1:{upstream.port}"),
                    "silent": Address(f"http://127.0.0.1:{silent.port}"),
                },
                limits=QUICK,
            )
        )
        stuck = [asyncio.create_task(raw(front.port, chat("n"))) for _ in range(50)]
        await live.until(lambda: len(silent.requests) == 50, "all have been passed on")
        for _ in range(20):
            assert (await ask(front.port, chat()))[2] == CHAT_BODY
        answered = [task for task in stuck if task.done()]
        for task in stuck:
            task.cancel()
        await asyncio.gather(*stuck, return_exceptions=True)
        await silent.end()

        assert answered == []


@pytest.mark.parametrize("closes", ["when it was heard", "at once"])
async def test_an_upstream_that_answers_without_reading_is_heard(closes):
    # llama-server, while it loads: 503 and close, with megabytes of the request unread.
    heard = asyncio.Event()

    async def serve(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 7\r\n\r\nloading")
        await writer.drain()
        if closes == "when it was heard":
            await heard.wait()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    upstreams = {"local": Address(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")}
    async with fronted(upstreams=upstreams) as (front, _):
        for _ in range(20):
            heard.clear()
            status, _, body = await ask(front.port, post("/v1/other", b"x" * 8_000_000))
            heard.set()

            # Closing with bytes unread is a reset. It may reach us before we have read what came ahead of it.
            assert (status, body) == (503, b"loading") or (closes == "at once" and status == 502)
    server.close()
