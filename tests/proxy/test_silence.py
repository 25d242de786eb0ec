"""An answer that has begun and falls silent ends; every other silence is somebody's good right.

Times here are those of a clock that jumps.
"""

import asyncio
import json

import pytest

from keepalive.core.facts import InstanceLost, RequestEnded
from keepalive.http1 import Limits
from tests.kit.fronted import (
    DONE,
    SSE_HEAD,
    STOP,
    Keep,
    Watching,
    ask,
    chat,
    chunk,
    delta,
    fronted,
    get,
    post,
    raw,
    split_answer,
    without_comments,
)

pytestmark = pytest.mark.clock_jumps

LONG = 300.0  # beside a bound of a minute
COARSE = Limits(tick=0.5)
JSON = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"


def warm(stall_timeout=60.0, **how):
    keep = Keep()
    keep.add("m", stall_timeout=stall_timeout, **how)
    return keep


def facts(keep, kind):
    return [fact for model in keep.models.values() for fact in model.facts if isinstance(fact, kind)]


def now():
    return asyncio.get_running_loop().time()


def falls_silent(*said, left=None):
    """Sends that and then nothing, until the other side is gone."""

    async def script(asking):
        await asking.send(b"".join(said))
        gone = await asking.left()
        if left is not None:
            left.append(gone)

    return script


async def test_a_stream_that_falls_silent_ends_with_an_error_and_the_upstream_is_told():
    left = []
    script = falls_silent(SSE_HEAD, chunk(delta("Hel")), left=left)
    async with fronted(script, keep=warm(), heartbeat=5.0) as (front, _):
        began = now()
        status, _, body = await ask(front.port, chat())
        took = now() - began
        seen = await front.last()

        assert status == 200
        said, error = without_comments(body).split(b"\n\n")[:2]
        assert said + b"\n\n" == delta("Hel")
        assert json.loads(error.removeprefix(b"data: "))["error"] == {
            "message": "the answer had begun, and then nothing came for 60 s",
            "type": "server_error",
            "param": None,
            "code": "stalled",
        }
        assert took == pytest.approx(60.0, abs=2.0)
        assert left == [pytest.approx(began + took, abs=1.0)]
        assert (seen.outcome, seen.status) == ("stalled", 200)


async def test_the_keeper_is_told_so_that_the_model_has_to_prove_itself():
    keep = warm()
    async with fronted(falls_silent(SSE_HEAD, chunk(delta("Hel"))), keep=keep) as (front, _):
        await ask(front.port, chat())

        assert [ended.answered for ended in facts(keep, RequestEnded)] == [False]
        assert [lost.message for lost in facts(keep, InstanceLost)] == [
            "the answer had begun, and then nothing came for 60 s"
        ]


@pytest.mark.parametrize(
    ("path", "word"),
    [
        ("/v1/chat/completions", b'"code":"stalled"'),
        ("/v1/responses", b'event: error\ndata: {"type":"error","code":"stalled"'),
        ("/v1/messages", b'event: error\ndata: {"type":"error","error":{"type":"timeout_error"'),
        ("/api/v1/chat", b'event: error\ndata: {"type":"error","error":{'),
    ],
)
async def test_each_route_says_so_in_its_own_words(path, word):
    async with fronted(falls_silent(SSE_HEAD, chunk(b"data: {}\n\n")), keep=warm()) as (front, _):
        body = b'{"model":"m","stream":true,"input":"hi","messages":[]}'
        status, _, got = await ask(front.port, post(path, body, "Content-Type: application/json"))

        assert status == 200
        assert word in got
        assert b"nothing came for 60 s" in got


async def test_half_an_event_is_never_completed_by_the_error():
    script = falls_silent(SSE_HEAD, chunk(delta("Hel")), chunk(b'data: {"half'))
    async with fronted(script, keep=warm()) as (front, _):
        _, _, body = await ask(front.port, chat())

        assert b"half" not in body
        assert b'"code":"stalled"' in body


async def test_a_whole_answer_that_stops_half_way_is_broken_off():
    keep = warm()
    async with fronted(falls_silent(JSON, b'{"choices":'), keep=keep) as (front, _):
        got = await raw(front.port, chat(stream=False))

        assert got.endswith(b'\r\n\r\n{"choices":')
        assert (await front.last()).outcome == "stalled"
        assert facts(keep, InstanceLost)


@pytest.mark.parametrize("streams", [True, False])
async def test_an_error_that_stops_half_way_is_told_in_our_words(streams):
    script = falls_silent(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 100\r\n\r\n")
    async with fronted(script, keep=warm()) as (front, _):
        status, _, body = await ask(front.port, chat(stream=streams))

        assert b'"code":"stalled"' in body
        assert (await front.last()).outcome == "stalled"
        assert status in (200, 504)


async def test_a_model_that_nobody_keeps_has_the_bound_of_the_defaults():
    script = falls_silent(SSE_HEAD, chunk(delta("Hel")))
    async with fronted(script, keep=warm(), stall_timeout=30.0) as (front, _):
        began = now()
        _, _, body = await ask(front.port, chat("other"))

        assert now() - began == pytest.approx(30.0, abs=2.0)
        assert b'"code":"stalled"' in body


@pytest.mark.parametrize("early", [b"", SSE_HEAD], ids=["no head", "a head"])
async def test_the_wait_for_the_first_event_has_no_bound(early):
    async def thinks(asking):
        await asking.send(early)
        await asyncio.sleep(LONG)
        await asking.send(
            (b"" if early else SSE_HEAD) + chunk(delta("Hello")) + chunk(STOP) + chunk(DONE) + chunk(b"")
        )

    async with fronted(thinks, keep=warm(), limits=COARSE) as (front, _):
        _, _, body = await Watching(front.port).call(chat())

        assert without_comments(body) == delta("Hello") + STOP + DONE
        assert b"silent=" not in body


async def test_off_is_for_ever_and_each_byte_begins_the_silence_anew():
    async def drips(asking):
        await asking.send(SSE_HEAD)
        for text in "Hello":
            await asking.send(chunk(delta(text)))
            await asyncio.sleep(50.0)
        await asking.send(chunk(STOP) + chunk(b""))

    for bound in (60.0, None):
        async with fronted(drips, keep=warm(bound), limits=COARSE) as (front, _):
            await Watching(front.port).call(chat())

            assert (await front.last()).outcome == "ok"

    async def pauses(asking):
        await asking.send(SSE_HEAD + chunk(delta("Hel")))
        await asyncio.sleep(LONG)
        await asking.send(chunk(STOP) + chunk(b""))

    async with fronted(pauses, keep=warm(None), limits=COARSE) as (front, _):
        await Watching(front.port).call(chat())

        assert (await front.last()).outcome == "ok"


async def test_a_caller_that_does_not_read_makes_no_silence_of_the_upstream():
    text = delta("x" * 60_000)

    async def pours(asking):
        await asking.send(SSE_HEAD + chunk(text) * 400 + chunk(STOP) + chunk(b""))

    async with fronted(pours, keep=warm(), limits=COARSE) as (front, _):
        reader, writer = await asyncio.open_connection("127.0.0.1", front.port, limit=1 << 26)
        writer.transport.pause_reading()
        writer.write(chat())
        await asyncio.sleep(LONG)
        writer.transport.resume_reading()
        _, _, body = split_answer(await reader.read())
        writer.close()

        assert without_comments(body) == text * 400 + STOP
        assert (await front.last()).outcome == "ok"


async def test_a_clock_that_leaps_is_no_silence():
    going_on = asyncio.Event()

    async def script(asking):
        await asking.send(SSE_HEAD + chunk(delta("Hel")))
        await going_on.wait()
        await asking.send(chunk(STOP) + chunk(b""))

    async with fronted(script, keep=warm()) as (front, _):
        caller = Watching(front.port)
        asking = asyncio.create_task(caller.call(chat()))
        await caller.heard(b"Hel", 1)
        await asyncio.get_running_loop().leap(LONG)
        going_on.set()
        await asking

        assert (await front.last()).outcome == "ok"


async def test_a_heartbeat_says_how_long_an_answer_has_been_silent_once_it_has_begun():
    async def script(asking):
        await asking.send(SSE_HEAD)
        await asyncio.sleep(10.0)
        await asking.send(chunk(delta("Hel")))
        await asyncio.sleep(11.0)
        await asking.send(chunk(STOP) + chunk(b""))

    async with fronted(script, keep=warm(), heartbeat=5.0) as (front, _):
        caller = Watching(front.port)
        asking = asyncio.create_task(caller.call(chat()))
        await caller.heard(b"Hel", 1)
        await caller.heard(b"silent=", 1)
        silences = front.proxy.silences()
        _, _, body = await asking

        beats = [line for line in body.split(b"\n") if line.startswith(b": keepalive")]
        silent = [float(beat.partition(b" silent=")[2] or "nan") for beat in beats]
        assert silent == pytest.approx([float("nan")] * (len(silent) - 2) + [5.0, 10.0], abs=1.1, nan_ok=True)
        assert [(model.key, pytest.approx(5.0, abs=1.0)) for model in silences] == [
            (model.key, seconds) for model, seconds in silences.items()
        ]
        assert front.proxy.silences() == {}


def looked_at(every, since):
    """LM Studio is asked every so many seconds, and says since then that the model rests."""

    def resting():
        looked = now() // every * every
        return (looked - since, now() - looked) if looked >= since else None

    return resting


@pytest.mark.parametrize(("since", "ends"), [(-600.0, 45.0), (0.0, 45.0), (100.0, 135.0), (600.0, 300.0)])
async def test_where_lm_studio_is_seen_to_do_nothing_half_a_minute_of_silence_is_enough(since, ends):
    keep = warm(LONG, resting=looked_at(15.0, since))
    async with fronted(falls_silent(SSE_HEAD, chunk(delta("Hel"))), keep=keep, limits=COARSE) as (front, _):
        _, _, body = await Watching(front.port).call(chat())
        seen = await front.last()

        assert now() == pytest.approx(ends, abs=2)
        assert seen.outcome == "stalled"
        assert (b"was seen to do nothing for 30 s" in body) is (ends < LONG)


async def test_off_is_for_ever_whatever_lm_studio_is_seen_to_do():
    async def pauses(asking):
        await asking.send(SSE_HEAD + chunk(delta("Hel")))
        await asyncio.sleep(LONG)
        await asking.send(chunk(STOP) + chunk(b""))

    keep = warm(None, resting=looked_at(15.0, 0.0))
    async with fronted(pauses, keep=keep, limits=COARSE) as (front, _):
        await Watching(front.port).call(chat())

        assert (await front.last()).outcome == "ok"


async def test_a_tunnel_may_be_silent_for_ever():
    async def upgrades(asking):
        await asking.send(
            b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\nhello"
        )
        await asyncio.sleep(LONG)
        await asking.send(b"still here")
        asking.cut()

    async with fronted(upgrades, keep=warm(), limits=COARSE, stall_timeout=60.0) as (front, _):
        reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
        head = get("/llm", "Upgrade: websocket").replace(b"Connection: close", b"Connection: Upgrade")
        writer.write(head)
        got = await reader.read()
        writer.close()

        assert got.endswith(b"hellostill here")


@pytest.mark.parametrize("streams", [True, False])
@pytest.mark.parametrize("said", [b"", SSE_HEAD])
async def test_a_first_word_is_not_waited_for_where_nothing_else_is_answered_either(said, streams):
    left, keep = [], warm()
    async with fronted(falls_silent(said, left=left), keep=keep, heartbeat=5.0) as (front, _):
        asking = asyncio.create_task(ask(front.port, chat(stream=streams)))
        await asyncio.sleep(61)
        for upstream, silent in (("other", LONG), ("local", 59.9)):
            front.proxy.give_up(upstream, silent)
        await asyncio.sleep(5)
        assert not asking.done()
        front.proxy.give_up("local", 60.0)
        front.proxy.give_up("local", 61.0)
        status, _, body = await asking
        seen = await front.last()

        assert b"LM Studio has answered nothing at all for 60 s" in body
        assert b'"code":"stalled"' in body
        assert (status, seen.outcome) == (200 if streams or said else 504, "stalled")
        assert left
        assert [ended.answered for ended in facts(keep, RequestEnded)] == [False]


async def drips(asking):
    await asking.send(SSE_HEAD)
    for _ in range(5):
        await asking.send(chunk(delta("Hel")))
        await asyncio.sleep(20)
    await asking.send(chunk(STOP) + chunk(DONE) + b"0\r\n\r\n")


@pytest.mark.parametrize(
    ("bound", "script", "waits"),
    [(60.0, falls_silent(b""), 30), (None, falls_silent(b""), 90), (60.0, drips, 90)],
)
async def test_who_has_just_come_who_may_wait_for_ever_and_who_is_answered_are_not_given_up(
    bound, script, waits
):
    async with fronted(script, keep=warm(bound), heartbeat=5.0) as (front, _):
        _, writer = await asyncio.open_connection("127.0.0.1", front.port)
        writer.write(chat())
        await asyncio.sleep(waits)
        front.proxy.give_up("local", LONG)
        await asyncio.sleep(1)

        assert front.proxy.in_progress == 1
        writer.close()
        await writer.wait_closed()


SAID = b'{"choices":[{"message":{"content":"Hi"}}]}'
WHOLE = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (
    len(SAID),
    SAID,
)


@pytest.mark.parametrize("ended", [False, True])
async def test_nobody_is_given_up_by_a_server_that_lists_nothing_and_answers_others(ended):
    asked = []

    async def script(asking):
        asked.append(asking)
        if len(asked) == 1:
            await asking.left()
        elif ended:
            await asking.send(WHOLE)
        else:
            await drips(asking)

    async with fronted(script, keep=warm(), heartbeat=5.0) as (front, _):
        first = asyncio.create_task(Watching(front.port).call(chat("m", "Connection: close")))
        await asyncio.sleep(70)
        other = asyncio.create_task(
            Watching(front.port).call(chat("m", "Connection: close", stream=not ended))
        )
        await asyncio.sleep(30)
        front.proxy.give_up("local", LONG)
        await asyncio.sleep(1)
        assert other.done() is ended
        assert not first.done()

        await other
        await asyncio.sleep(61)
        front.proxy.give_up("local", LONG)
        assert b"stalled" in (await first)[2]
