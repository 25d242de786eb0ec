"""A request for a model that is not warm waits behind one load, and is told so.

Times here are those of a clock that jumps: they are exact, however busy the machine is.
"""

import asyncio
import contextlib
import gzip
import itertools
import json
import random
import zlib
from dataclasses import replace

import pytest

from keepalive.core.callers import Outcome
from keepalive.core.errors import NotWarm
from keepalive.core.facts import InstanceLost, ModelId, RequestEnded, RequestStarted
from keepalive.http1 import Limits
from keepalive.proxy import Address, Heartbeat
from tests.kit.fronted import (
    CHAT_BODY,
    CHAT_STREAM,
    Keep,
    Upstream,
    Watching,
    ask,
    chat,
    chunk,
    fronted,
    get,
    leave,
    post,
    raw,
    says,
    without_comments,
)

pytestmark = pytest.mark.clock_jumps

BEAT = 0.1


def cold(**how):
    keep = Keep()
    keep.add("m", state="cold", **how)
    return keep


def now():
    return asyncio.get_running_loop().time()


async def test_a_hundred_streams_meet_a_cold_model_and_share_one_load():
    loaded = asyncio.Event()
    keep = cold(loaded=loaded, eta=0.5)
    async with fronted(says(CHAT_STREAM), keep=keep, heartbeat=BEAT) as (front, upstream):
        callers = [Watching(front.port) for _ in range(100)]
        asking = asyncio.gather(*(caller.call(chat()) for caller in callers))
        for caller in callers:
            await caller.heard(b": keepalive model=m state=loading", 3)
        loaded.set()
        answers = await asking

        assert keep.models[ModelId("local", "m")].loads == 1
        assert len(upstream.requests) == 100
        for status, headers, body in answers:
            assert status == 200
            assert headers[b"content-type"] == b"text/event-stream"
            assert headers[b"x-keepalive-model-state"] in (b"cold", b"loading")
            assert b"eta=0.5" in body
            assert without_comments(body) == CHAT_BODY
        seen = await front.last()
        assert (seen.outcome, seen.start) == ("ok", "cold")
        assert seen.first_token_seconds >= seen.wait_seconds > 2 * BEAT


async def test_nothing_is_forwarded_before_the_model_is_warm():
    keep = cold(load_seconds=0.3)
    async with fronted(says(CHAT_STREAM), keep=keep, heartbeat=BEAT) as (front, upstream):
        call = asyncio.create_task(ask(front.port, chat()))
        await asyncio.sleep(0.2)
        before = len(upstream.requests)
        waiting = front.proxy.waiting
        await call

        assert (before, waiting) == (0, 1)
        facts = keep.models[ModelId("local", "m")].facts
        assert [type(fact) for fact in facts] == [RequestStarted, RequestEnded]
        assert facts[1].answered


async def test_the_first_comment_comes_at_once_and_the_others_every_heartbeat():
    keep = cold(load_seconds=1.05)
    async with fronted(says(CHAT_STREAM), keep=keep, heartbeat=0.2) as (front, _):
        caller = Watching(front.port)
        await caller.call(chat())

        times = [at for at, data in caller.arrivals if b": keepalive" in data]
        assert len(times) == 6
        assert times[0] < 0.02
        assert all(b - a == pytest.approx(0.2, abs=0.025) for a, b in itertools.pairwise(times))


async def test_reasoning_is_visible_text():
    keep = cold(load_seconds=0.3)
    async with fronted(says(CHAT_STREAM), keep=keep, heartbeat=BEAT, heartbeat_mode=Heartbeat.REASONING) as (
        front,
        _,
    ):
        _, _, body = await ask(front.port, chat())

        first = json.loads(body.split(b"\n\n")[0].removeprefix(b"data: "))
        assert "m is" in first["choices"][0]["delta"]["reasoning_content"]
        assert body.endswith(CHAT_BODY)


async def test_off_says_nothing_until_the_upstream_answers_and_keeps_its_status():
    keep = cold(load_seconds=0.3)
    refusal = b"HTTP/1.1 418 I'm a teapot\r\nContent-Length: 2\r\n\r\n{}"
    async with fronted(says(refusal), keep=keep, heartbeat=BEAT, heartbeat_mode=Heartbeat.OFF) as (front, _):
        caller = Watching(front.port)
        status, _, body = await caller.call(chat())

        assert (status, body) == (418, b"{}")
        assert caller.arrivals[0][0] == pytest.approx(0.3, abs=0.02)


async def test_a_request_chooses_its_own_heartbeat():
    keep = cold(load_seconds=0.3)
    async with fronted(says(CHAT_STREAM), keep=keep, heartbeat=BEAT) as (front, upstream):
        _, headers, body = await ask(front.port, chat("m", "X-Keepalive-Heartbeat: off"))

        assert body == CHAT_BODY
        assert b"x-keepalive-heartbeat" not in upstream.requests[0].headers
        waited = float(headers[b"server-timing"].split(b"wait;dur=")[1].split(b",")[0])
        assert waited == pytest.approx(300, abs=20)


@pytest.mark.parametrize(
    ("path", "headers", "told"),
    [
        ("/heartbeat/reasoning", [], b"reasoning_content"),
        ("/heartbeat/comment", [], b": keepalive model=m"),
        ("/heartbeat/off", [], b""),
        ("/heartbeat/off", ["X-Keepalive-Heartbeat: reasoning"], b"reasoning_content"),
        ("/heartbeat/reasoning", ["X-Keepalive-Heartbeat: off"], b""),
    ],
)
async def test_a_base_url_chooses_the_heartbeat_and_a_header_outranks_it(path, headers, told):
    keep = cold(load_seconds=12.0)
    async with fronted(says(CHAT_STREAM), keep=keep) as (front, upstream):
        asked = chat("m", *headers).replace(b"POST /v1/", b"POST %b/v1/" % path.encode())
        _, _, body = await ask(front.port, asked)

        assert body.endswith(CHAT_BODY)
        assert (body == CHAT_BODY) if not told else (told in body)
        assert upstream.requests[0].head.startswith(b"POST /v1/chat/completions HTTP/1.1\r\n")
        assert (await front.last()).route == "chat"


async def test_a_heartbeat_mode_that_does_not_exist_is_told_so_and_reaches_nobody():
    async with fronted(says(CHAT_STREAM), keep=cold()) as (front, upstream):
        asked = chat().replace(b"POST /v1/", b"POST /heartbeat/loud/v1/")
        status, _, body = await ask(front.port, asked)
        seen = await front.last()

        error = json.loads(body)["error"]
        assert (status, error["code"]) == (404, "unknown_heartbeat")
        assert "no heartbeat mode 'loud'" in error["message"]
        assert "/heartbeat/comment, /heartbeat/reasoning, /heartbeat/off" in error["message"]
        assert (seen.route, seen.outcome, upstream.requests) == ("chat", Outcome.REJECTED, [])


async def test_everything_else_passes_behind_a_heartbeat_mode_too():
    async with fronted() as (front, upstream):
        status, _, body = await ask(front.port, get("/heartbeat/off/v1/models?x=1"))

        assert (status, body) == (200, b"fine")
        assert upstream.requests[0].head.startswith(b"GET /v1/models?x=1 HTTP/1.1\r\n")


async def test_not_streaming_is_held_without_a_byte_and_then_served():
    keep = cold(load_seconds=0.3)
    answer = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
    async with fronted(says(answer), keep=keep, heartbeat=BEAT) as (front, _upstream):
        caller = Watching(front.port)
        status, headers, body = await caller.call(chat(stream=False))

        assert (status, body) == (200, b"{}")
        assert caller.arrivals[0][0] == pytest.approx(0.3, abs=0.02)
        assert headers[b"x-keepalive-model-state"] == b"cold"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/v1/chat/completions", ["error", "message"]),
        ("/v1/completions", ["error", "message"]),
        ("/v1/embeddings", ["error", "message"]),
        ("/v1/responses", ["error", "message"]),
        ("/v1/messages", ["error", "message"]),
        ("/api/v1/chat", ["error", "message"]),
    ],
)
async def test_not_ready_in_time_is_503_in_the_layout_of_the_route(path, message):
    keep = cold(load_seconds=60, eta=41.2, reason="it is large", max_wait=0.2)
    async with fronted(keep=keep) as (front, upstream):
        status, headers, body = await ask(front.port, post(path, b'{"model":"M"}'))

        assert status == 503
        assert headers[b"retry-after"] == b"42"
        text = json.loads(body)
        for key in message:
            text = text[key]
        assert text == "m is loading and did not get warm in time: it is large"
        assert upstream.requests == []
        seen = await front.last()
        assert (seen.outcome, seen.status) == ("timeout", 503)


async def test_prefer_wait_lowers_the_wait_and_never_raises_it():
    keep = cold(load_seconds=60, max_wait=0.5)
    async with fronted(keep=keep) as (front, _):
        began = now()
        status, _, _ = await ask(front.port, chat("m", "Prefer: respond-async, wait=0", stream=False))
        at_once = now() - began
        await ask(front.port, chat("m", "Prefer: wait=100", stream=False))
        in_the_end = now() - began - at_once

        assert status == 503
        assert at_once < 0.02
        assert in_the_end == pytest.approx(0.5, abs=0.02)


async def test_a_stream_that_waited_in_vain_ends_with_an_error_event():
    keep = cold(load_seconds=60, max_wait=0.3)
    async with fronted(keep=keep, heartbeat=BEAT) as (front, _):
        status, _, body = await ask(front.port, chat())

        assert status == 200
        error = json.loads(without_comments(body).removeprefix(b"data: "))["error"]
        assert error["code"] == "model_not_ready"
        assert (await front.last()).outcome == "timeout"


@pytest.mark.parametrize("streaming", [True, False])
async def test_a_load_that_failed_is_said_with_its_reason(streaming):
    keep = cold(load_seconds=0.1, fails=NotWarm("not enough memory", retry_after=33))
    async with fronted(keep=keep, heartbeat=BEAT) as (front, upstream):
        status, headers, body = await ask(front.port, chat(stream=streaming))

        assert b"not enough memory" in body
        assert upstream.requests == []
        if not streaming:
            assert (status, headers[b"retry-after"]) == (503, b"33")


async def test_the_load_goes_on_when_the_last_who_waited_has_left():
    keep = cold(load_seconds=0.4)
    async with fronted(says(CHAT_STREAM), keep=keep, heartbeat=BEAT) as (front, upstream):
        _, writer = await asyncio.open_connection("127.0.0.1", front.port)
        writer.write(chat())
        await asyncio.sleep(0.15)
        assert front.proxy.waiting == 1
        writer.close()
        left = now()
        while front.proxy.waiting:
            await asyncio.sleep(0.001)

        assert now() - left < 0.02
        await asyncio.sleep(0.4)
        assert keep.view(ModelId("local", "m")).state == "warm"
        assert keep.models[ModelId("local", "m")].loads == 1
        assert upstream.requests == []
        assert (await front.last()).outcome == "client_gone"


async def test_many_wait_some_leave_some_are_impatient_and_the_rest_is_served():
    keep = cold(load_seconds=1.8)
    async with fronted(says(CHAT_STREAM), keep=keep, heartbeat=BEAT) as (front, upstream):

        async def leaver():
            _, writer = await asyncio.open_connection("127.0.0.1", front.port)
            writer.write(chat())
            await asyncio.sleep(0.5)
            writer.close()

        impatient = [ask(front.port, chat("m", "Prefer: wait=1", stream=False)) for _ in range(20)]
        patient = [ask(front.port, chat()) for _ in range(80)]
        answers = await asyncio.gather(*impatient, *patient, *(leaver() for _ in range(100)))

        assert [answer[0] for answer in answers[:20]] == [503] * 20
        assert [without_comments(answer[2]) for answer in answers[20:100]] == [CHAT_BODY] * 80
        assert keep.models[ModelId("local", "m")].loads == 1
        assert len(upstream.requests) == 80


async def test_a_warm_model_that_thinks_for_long_is_waited_for_with_comments():
    async def script(asking):
        await asyncio.sleep(0.5)
        await asking.send(CHAT_STREAM)

    keep = Keep()
    keep.add("m")
    async with fronted(script, keep=keep, heartbeat=BEAT) as (front, _):
        status, headers, body = await ask(front.port, chat())

        assert status == 200
        assert headers[b"x-keepalive-model-state"] == b"warm"
        assert body.count(b": keepalive model=m state=warm") >= 4
        assert without_comments(body) == CHAT_BODY


async def test_heartbeats_stand_between_events_only_even_when_the_upstream_stops_inside_one():
    async def script(asking):
        half = len(CHAT_STREAM) // 2 - 20
        await asking.send(CHAT_STREAM[:half])
        await asyncio.sleep(0.35)
        await asking.send(CHAT_STREAM[half:])

    keep = Keep()
    keep.add("m")
    async with fronted(script, keep=keep, heartbeat=BEAT) as (front, _):
        _, _, body = await ask(front.port, chat())

        assert body.count(b": keepalive") >= 2
        assert without_comments(body) == CHAT_BODY


async def test_models_that_nobody_keeps_pass_untouched_and_without_heartbeats():
    async def script(asking):
        await asyncio.sleep(0.3)
        await asking.send(CHAT_STREAM)

    async with fronted(script, keep=cold(load_seconds=60), heartbeat=BEAT) as (front, _):
        _, headers, body = await ask(front.port, chat("other"))

        assert body == CHAT_BODY
        assert b"x-keepalive-model-state" not in headers


async def test_looking_does_not_load():
    keep = cold(load_seconds=60)
    async with fronted(keep=keep) as (front, _):
        body = b'{"model":"m"}'
        for method in ("GET", "HEAD", "OPTIONS", "PUT", "DELETE"):
            await raw(front.port, post("/v1/chat/completions", body).replace(b"POST", method.encode(), 1))
        await ask(front.port, get("/v1/models"))

        assert keep.warm_asked == 0


async def test_a_large_body_with_its_model_at_the_end_is_understood_and_forwarded_unchanged():
    keep = cold(load_seconds=0.2)
    image = b"iVBOR" * 4_000_000
    body = b'{"messages":[{"role":"user","content":"%b"}],"stream":true,"model":"m"}' % image
    async with fronted(says(CHAT_STREAM), keep=keep, heartbeat=BEAT) as (front, upstream):
        _, _, answer = await ask(front.port, post("/v1/chat/completions", body))

        assert without_comments(answer) == CHAT_BODY
        assert upstream.bodies == [body]


async def test_the_last_of_two_model_keys_counts():
    keep = cold(load_seconds=60, max_wait=0.1)
    async with fronted(keep=keep) as (front, upstream):
        status, _, _ = await ask(front.port, post("/v1/embeddings", b'{"model":"x","input":"a","model":"m"}'))

        assert status == 503
        assert upstream.requests == []


@pytest.mark.parametrize("coding", ["gzip", "X-GZIP", "deflate", "gzip, deflate", "identity, gzip"])
async def test_a_compressed_body_cannot_hide_its_model(coding):
    keep = cold(load_seconds=60, max_wait=0.1)
    async with fronted(keep=keep) as (front, upstream):
        body = packed(b'{"model":"m"}', coding)
        status, _, _ = await ask(front.port, post("/v1/embeddings", body, f"Content-Encoding: {coding}"))

        assert status == 503
        assert upstream.requests == []


def packed(body, coding):
    for name in coding.lower().split(", "):
        body = {"gzip": gzip.compress, "x-gzip": gzip.compress, "deflate": zlib.compress}.get(name, bytes)(
            body
        )
    return body


async def test_a_compressed_body_that_has_to_change_goes_on_unpacked():
    keep = cold(load_seconds=1, aliases=("gpt-4o",))
    async with fronted(keep=keep) as (front, upstream):
        body = gzip.compress(b'{"model":"gpt-4o","input":"a"}')
        data = post("/v1/embeddings", body, "Content-Encoding: gzip")
        assert (await ask(front.port, data))[0] == 200

        assert upstream.bodies == [b'{"model":"m","input":"a"}']
        assert b"content-encoding" not in upstream.requests[0].headers


async def test_a_body_that_has_to_change_changes_nothing_for_those_with_the_same_head():
    keep = Keep()
    keep.add("m", aliases=("gpt-4o",))
    async with fronted(keep=keep) as (front, upstream):
        for name in (b"m", b"gpt-4o", b"m", b"gpt-4o"):
            body = gzip.compress(b'{"model":"%b","input":"a"}' % name)
            assert (await ask(front.port, post("/v1/embeddings", body, "Content-Encoding: gzip")))[0] == 200

        packed = [request.headers.get(b"content-encoding") for request in upstream.requests]
        assert packed == [b"gzip", None, b"gzip", None]


async def test_a_compressed_body_in_chunks_that_ends_too_soon_is_refused():
    body = gzip.compress(b'{"model":"m"}')[:-3]
    head = post("/v1/embeddings", b"", "Content-Encoding: gzip")
    data = head.replace(b"Content-Length: 0", b"Transfer-Encoding: chunked") + chunk(body) + b"0\r\n\r\n"
    async with fronted(keep=cold()) as (front, upstream):
        assert (await ask(front.port, data, drip=20))[0] == 400
        assert upstream.requests == []


@pytest.mark.parametrize("coding", ["identity", "gzip", "deflate"])
async def test_a_compressed_body_is_passed_on_as_it_came(coding):
    body = packed(b'{"model":"m","input":"%b"}' % random.randbytes(50_000).hex().encode(), coding)
    async with fronted(keep=cold(load_seconds=1)) as (front, upstream):
        data = post("/v1/embeddings", body, f"Content-Encoding: {coding}")
        assert (await ask(front.port, data))[0] == 200

        assert upstream.bodies == [body]
        assert upstream.requests[0].headers[b"content-encoding"] == coding.encode()
        assert (await front.last()).model == ModelId("local", "m")


@pytest.mark.parametrize(
    ("coding", "body", "status", "words"),
    [
        ("br", b"x", 415, b"gzip or deflate"),
        ("gzip, zstd", b"x", 415, b"gzip or deflate"),
        ("gzip", b"no gzip at all", 400, b"the body is not gzip"),
        ("gzip", gzip.compress(b'{"model":"m"}')[:-9], 400, b"in the middle of its gzip data"),
        ("deflate", zlib.compress(b'{"model":"m"}')[:-5], 400, b"in the middle of its deflate data"),
        ("gzip", gzip.compress(b'{"model":"m"}' + b" " * 5_000_000), 413, b"larger than 1000000 bytes"),
        ("gzip, gzip", gzip.compress(gzip.compress(b" " * 5_000_000)), 413, b"larger than 1000000 bytes"),
    ],
)
async def test_a_compressed_body_that_cannot_be_read_is_refused_and_reaches_nobody(
    coding, body, status, words
):
    async with fronted(keep=cold(load_seconds=60), limits=Limits(tick=0.02, body_bytes=1_000_000)) as (
        front,
        upstream,
    ):
        data = post("/v1/messages", body, f"Content-Encoding: {coding}")
        got, _, told = await ask(front.port, data)

        assert got == status
        assert words in told
        assert json.loads(told)["type"] == "error"
        assert upstream.requests == []
        assert (await front.last()).outcome == "rejected"


async def test_the_sum_of_all_held_bodies_is_capped():
    keep = cold(load_seconds=60)
    async with fronted(keep=keep, kept_bytes=100_000) as (front, _):
        body = b'{"model":"m","input":"%b"}' % (b"x" * 60_000)
        _, writer = await asyncio.open_connection("127.0.0.1", front.port)
        writer.write(post("/v1/embeddings", body))
        while not front.proxy.waiting:
            await asyncio.sleep(0.01)
        status, headers, _ = await ask(front.port, post("/v1/embeddings", body))
        writer.close()

        assert (status, headers[b"retry-after"]) == (503, b"1")


@pytest.mark.parametrize("how", ["close", "half-close", "reset"])
async def test_a_caller_that_sent_too_much_ahead_is_still_seen_to_leave(how):
    # Its socket is not being read any more when it leaves.
    keep = cold(load_seconds=60)
    async with fronted(keep=keep, limits=Limits(tick=0.02, ahead_bytes=1000)) as (front, _):
        _, writer = await asyncio.open_connection("127.0.0.1", front.port)
        writer.write(chat(stream=False) + b"x" * 30_000)
        while not front.proxy.waiting:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        leave(writer, how)
        left = now()
        while front.proxy.waiting and now() < left + 2:
            await asyncio.sleep(0.001)

        assert now() - left < 0.1
        writer.close()


async def test_a_model_on_two_upstreams_is_asked_where_it_is_warm_and_conversations_stay():
    keep = Keep()
    keep.add("m", upstream="local", state="cold", load_seconds=60)
    keep.add("m", upstream="other", state="warm")
    async with fronted(says(CHAT_STREAM), keep=keep) as (front, upstream):
        other = Upstream(says(CHAT_STREAM))
        await other.start()
        front.proxy.configure(
            front.proxy.settings.__class__(
                upstreams={
                    "local": Address(f"http://127.0.0.1:{upstream.port}"),
                    "other": Address(f"http://127.0.0.1:{other.port}"),
                },
                limits=front.proxy.settings.limits,
            )
        )
        await ask(front.port, chat())
        keep.models[ModelId("local", "m")].state = "warm"
        await ask(front.port, chat())
        stayed = (len(upstream.requests), len(other.requests))
        keep.models[ModelId("other", "m")].state = "loading"
        await ask(front.port, chat())
        moved = (len(upstream.requests), len(other.requests))
        await other.end()

        assert stayed == (0, 2)
        assert moved == (1, 2)


async def test_before_the_first_byte_a_dead_upstream_is_left_for_the_next():
    keep = Keep()
    keep.add("m", upstream="dead")
    keep.add("m", upstream="local")
    async with fronted(says(CHAT_STREAM), keep=keep) as (front, upstream):
        front.proxy.configure(
            front.proxy.settings.__class__(
                upstreams={
                    "dead": Address("http://127.0.0.1:9"),
                    "local": Address(f"http://127.0.0.1:{upstream.port}"),
                },
                limits=front.proxy.settings.limits,
            )
        )
        status, _, body = await ask(front.port, chat())

        assert (status, body) == (200, CHAT_BODY)
        facts = keep.models[ModelId("dead", "m")].facts
        assert [type(fact) for fact in facts] == [RequestStarted, RequestEnded, InstanceLost]
        assert not facts[1].answered


async def test_what_measures_may_fail_and_the_stream_does_not_notice(monkeypatch):
    class Broken:
        def __init__(self, *args):
            self.first_token_seconds = None

        def feed(self, now, data):
            raise RuntimeError("a bug")

    monkeypatch.setattr("keepalive.proxy.call.Meter", Broken)
    keep = Keep()
    keep.add("m")
    async with fronted(says(CHAT_STREAM), keep=keep) as (front, _):

        def broken(record):
            raise RuntimeError("a bug")

        front.proxy.seen = broken
        with contextlib.suppress(TimeoutError):
            status, _, body = await ask(front.port, chat())

        assert (status, body) == (200, CHAT_BODY)


async def test_a_request_that_offers_a_websocket_waits_for_its_model_like_any_other():
    loaded = asyncio.Event()
    keep = cold(loaded=loaded)
    asked = chat("m", "Upgrade: websocket", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", stream=False)
    asked = asked.replace(b"Connection: close", b"Connection: close, Upgrade")
    async with fronted(keep=keep) as (front, upstream):
        call = asyncio.create_task(ask(front.port, asked))
        await asyncio.sleep(1.0)
        before = len(upstream.requests)
        loaded.set()
        status, _, _ = await call

        assert (before, status) == (0, 200)
        assert b"upgrade" not in upstream.requests[0].headers


async def test_an_unload_goes_behind_a_ping_that_is_on_its_way_and_is_no_use_of_the_model():
    keep = Keep()
    model = keep.add("m", questioned=True)
    async with fronted(keep=keep) as (front, upstream):
        call = asyncio.create_task(ask(front.port, post("/api/v1/models/unload", b'{"instance_id":"m"}')))
        await asyncio.sleep(0.5)
        before = len(upstream.requests)
        model.questioned = False
        status, _, _ = await call

        assert (before, status) == (0, 200)
        assert [type(fact) for fact in model.facts] == [InstanceLost]


async def test_an_unload_does_not_wait_for_a_ping_that_nobody_answers():
    keep = Keep()
    keep.add("m", questioned=True)
    async with fronted(keep=keep) as (front, _):
        began = now()
        status, _, _ = await ask(front.port, post("/api/v1/models/unload", b'{"instance_id":"m"}'))

        assert status == 200
        assert now() - began < 1.5


@pytest.mark.parametrize("lm_studio", [True, False])
async def test_a_route_that_lm_studio_does_not_have_waits_for_a_model_where_another_server_may_be(lm_studio):
    loaded = asyncio.Event()
    keep = cold(loaded=loaded, aliases=("alias",))
    keep.lm_studio = lm_studio
    asked = post("/chat/completions", b'{"model":"alias","messages":[]}')
    async with fronted(keep=keep) as (front, upstream):
        call = asyncio.create_task(ask(front.port, asked))
        await asyncio.sleep(1.0)
        waiting = not call.done()
        loaded.set()
        assert (await call)[0] == 200

        assert waiting == (not lm_studio)
        assert (b'"alias"' in upstream.bodies[0]) == lm_studio


async def test_what_counts_tokens_is_no_answer_without_words():
    keep = Keep()
    keep.add("m")
    keep.lm_studio = False
    reply = (
        b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 18\r\n\r\n{"input_tokens":7}'
    )
    async with fronted(says(reply), keep=keep) as (front, _):
        await ask(front.port, post("/v1/messages/count_tokens", b'{"model":"m","messages":[]}'))

        assert (await front.last()).outcome == "ok"


async def test_a_form_that_names_a_model_waits_for_it_where_that_is_and_asks_for_it_by_its_key():
    form = b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nwhisper-1\r\n--b--\r\n'
    request = post("/v1/audio/transcriptions", form, "Content-Type: multipart/form-data; boundary=b")
    keep = Keep()
    keep.lm_studio = False
    keep.add("ear", "b", state="cold", load_seconds=0.3, aliases=("whisper-1",))
    async with fronted(upstreams={"a": Address("http://127.0.0.1:1")}, keep=keep, epilogue=False) as (
        front,
        upstream,
    ):
        keep.upstreams = ("a", "b")
        b = Address(f"http://127.0.0.1:{upstream.port}")
        both = {**front.proxy.settings.upstreams, "b": b}
        front.proxy.configure(replace(front.proxy.settings, upstreams=both))
        status, _, _ = await ask(front.port, request)

        assert status == 200
        assert upstream.requests[0].body == form.replace(b"whisper-1", b"ear")
        assert keep.models[ModelId("b", "ear")].loads == 1
        assert int(upstream.requests[0].headers[b"content-length"]) == len(form) - 6
