"""LM Studio's SDKs through the tunnel: loads of what we keep wait for ours, and predictions count as use."""

import asyncio
import contextlib
import json

import pytest

from keepalive.core.errors import NotWarm
from keepalive.core.facts import InstanceLost, ModelsChanged, RequestEnded, RequestStarted, WarmAsked
from keepalive.protocols.sdk import Said, Shown, Wish
from keepalive.proxy import Address
from keepalive.proxy.sdk import INSTANCES, Instances
from tests.kit import live
from tests.kit.fronted import Keep, fronted
from tests.protocols.test_frames import CONTINUED, PING, TEXT, frame

websockets = pytest.importorskip("websockets")
from websockets.asyncio.client import connect  # noqa: E402
from websockets.asyncio.server import serve  # noqa: E402

BOTH_LOOPS = True


def channel(endpoint, parameter, number=1):
    return json.dumps(
        {"type": "channelCreate", "endpoint": endpoint, "channelId": number, "creationParameter": parameter}
    )


def call(endpoint, parameter=None, number=1):
    return json.dumps({"type": "rpcCall", "endpoint": endpoint, "callId": number, "parameter": parameter})


def named(name):
    return {"modelSpecifier": {"type": "query", "query": {"identifier": name}}}


def referred(reference):
    return {"modelSpecifier": {"type": "instanceReference", "instanceReference": reference}}


GET = channel("getOrLoad", {"identifier": "m"})
LOAD = channel("loadModel", {"modelKey": "M"})
LIST = call("listLoaded")
ALIVE = json.dumps({"type": "keepAlive"})
CANCEL = json.dumps({"type": "channelSend", "channelId": 1, "message": {"type": "cancel"}})


class LMStudio:
    """Notes what comes, and says what the test wants."""

    def __init__(self):
        self.heard = []
        self.socket = None

    async def _serve(self, socket):
        self.socket = socket
        async for message in socket:
            self.heard.append(message)

    async def hears(self, *messages):
        await live.until(lambda: len(self.heard) >= len(messages), f"{len(messages)} messages: {self.heard}")
        assert self.heard == list(messages)

    async def says(self, caller, **message):
        """And the caller has it, so the proxy has seen it."""
        await self.socket.send(json.dumps(message))
        assert json.loads(await caller.recv()) == message


@contextlib.asynccontextmanager
async def tunnelled(keep, path="/llm", *, compression=None, **settings):
    studio = LMStudio()
    server = await serve(studio._serve, "127.0.0.1", 0, compression=compression, max_size=None)
    upstreams = {"local": Address(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")}
    try:
        async with fronted(keep=keep, upstreams=upstreams, **settings) as (front, _):
            url = f"ws://127.0.0.1:{front.port}{path}"
            async with connect(url, proxy=None, compression=compression, max_size=None) as caller:
                yield caller, studio, front
    finally:
        server.close()
        await server.wait_closed()


def cold(**how):
    keep = Keep()
    return keep, keep.add("m", state="cold", loaded=asyncio.Event(), **how)


async def waits(keep):
    await live.until(lambda: keep.waiting, "it waits")


@pytest.mark.parametrize("wish", [GET, LOAD])
async def test_a_load_of_a_cold_model_waits_for_the_one_load_and_what_follows_waits_behind_it(wish):
    keep, model = cold()
    async with tunnelled(keep) as (caller, studio, front):
        await caller.send(wish)
        await waits(keep)
        await caller.send(LIST)
        await caller.send(ALIVE)
        await (await caller.ping())
        await studio.hears(ALIVE)
        assert front.proxy.waiting == 1
        await studio.says(caller, type="communicationWarning", warning="the other direction flows")

        model.loaded.set()

        await studio.hears(ALIVE, wish, LIST)
        assert (model.loads, front.proxy.waiting) == (1, 0)


@pytest.mark.parametrize("wanted", [True, False])
async def test_a_model_that_is_not_wanted_is_from_then_on(wanted):
    keep, model = cold(wanted=wanted)
    async with tunnelled(keep) as (caller, _, _):
        await caller.send(GET)
        await waits(keep)

        assert [type(fact) for fact in model.facts] == ([] if wanted else [WarmAsked])


async def test_two_that_wait_on_one_connection_share_the_load_and_keep_their_order():
    keep, model = cold()
    second = channel("getOrLoad", {"identifier": "m"}, 2)
    async with tunnelled(keep) as (caller, studio, _):
        await caller.send(GET)
        await caller.send(LIST)
        await caller.send(second)
        await waits(keep)
        model.loaded.set()

        await studio.hears(GET, LIST, second)
        assert model.loads == 1


async def test_the_next_that_has_to_wait_holds_what_follows_it():
    keep, model = cold()
    other = keep.add("other", state="cold", loaded=asyncio.Event())
    second = channel("getOrLoad", {"identifier": "other"}, 2)
    async with tunnelled(keep) as (caller, studio, _):
        for message in (GET, second, LIST):
            await caller.send(message)
        model.loaded.set()
        await studio.hears(GET)
        await waits(keep)
        assert studio.heard == [GET]
        other.loaded.set()

        await studio.hears(GET, second, LIST)


@pytest.mark.parametrize(
    "wish",
    [
        channel("getOrLoad", {"identifier": "warm"}),
        channel("loadModel", {"modelKey": "warm"}),
        channel("getOrLoad", {"identifier": "nobody's"}),
        channel("getOrLoad", {"identifier": "elsewhere"}),
        channel("predict", named("m")),
        channel("getOrLoad", {}),
        "getOrLoad",
    ],
)
async def test_what_need_not_wait_goes_on_at_once(wish):
    keep, _ = cold()
    keep.add("warm")
    keep.add("elsewhere", upstream="other", state="cold")
    async with tunnelled(keep) as (caller, studio, _):
        await caller.send(wish)

        await studio.hears(wish)
        assert keep.warm_asked == 0


async def test_where_loads_pass_only_get_or_load_waits():
    keep, model = cold()
    async with tunnelled(keep, join_loads=False) as (caller, studio, _):
        await caller.send(LOAD)
        await studio.hears(LOAD)
        await caller.send(GET)
        await waits(keep)
        model.loaded.set()

        await studio.hears(LOAD, GET)


async def test_what_will_not_be_warm_goes_on_and_lm_studio_says_why():
    keep, model = cold(fails=NotWarm("no memory", retry_after=60))
    model.loaded.set()
    async with tunnelled(keep) as (caller, studio, _):
        await caller.send(GET)

        await studio.hears(GET)


async def test_a_wait_ends_after_the_models_longest():
    keep, _ = cold(max_wait=0.05)
    async with tunnelled(keep) as (caller, studio, front):
        await caller.send(GET)
        await caller.send(LIST)

        await studio.hears(GET, LIST)
        assert front.proxy.waiting == 0


@pytest.mark.parametrize("how", ["close", "reset", "half-close"])
async def test_a_caller_that_leaves_ends_its_wait_and_nothing_of_it_goes_on(how):
    keep, _ = cold()
    async with tunnelled(keep) as (caller, studio, front):
        await caller.send(GET)
        await caller.send(LIST)
        await waits(keep)
        if how == "close":
            await caller.close()
        elif how == "reset":
            caller.transport.abort()
        else:
            caller.transport.write_eof()

        await live.until(lambda: not keep.waiting, "the wait has ended")
        await live.until(lambda: studio.socket.state.name == "CLOSED", "LM Studio was told")
        assert studio.heard == []
        assert studio.socket.close_code == (1000 if how == "close" else 1006)  # told by the caller himself
        await live.until(lambda: not front.proxy.in_progress)


async def test_a_load_that_is_cancelled_waits_no_longer():
    keep, _ = cold()
    async with tunnelled(keep) as (caller, studio, _):
        await caller.send(GET)
        await waits(keep)
        await caller.send(CANCEL)

        await studio.hears(GET, CANCEL)
        await live.until(lambda: not keep.waiting)


async def test_who_says_too_much_behind_a_wait_is_not_read_until_it_is_over():
    keep, model = cold()
    large = "x" * 1_000_000
    async with tunnelled(keep) as (caller, studio, front):
        await caller.send(GET)
        await waits(keep)
        sending = asyncio.create_task(_send(caller, large, 60))
        await live.stands_still(lambda: caller.transport.get_write_buffer_size())
        assert not sending.done()
        model.loaded.set()
        await sending

        await studio.hears(GET, *[large] * 60)
        await caller.close()
        assert (await front.last()).outcome == "ok"


async def _send(caller, message, times):
    for _ in range(times):
        await caller.send(message)


async def test_an_sdk_and_a_server_that_would_compress_do_not_so_that_its_load_waits():
    keep, model = cold()
    async with tunnelled(keep, compression="deflate") as (caller, studio, _):
        await caller.send(GET)
        await waits(keep)
        assert studio.heard == []

        model.loaded.set()
        await studio.hears(GET)
        assert caller.response.headers.get("Sec-WebSocket-Extensions") is None


UPGRADE = b"GET /llm HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
SWITCH = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"


async def test_a_half_close_ends_a_wait_though_the_other_direction_goes_on():
    keep, _ = cold()
    got = []
    over = asyncio.Event()

    async def script(asking):
        await asking.send(SWITCH)
        got.append(await asking.reader.read())
        await over.wait()

    async with fronted(script, keep=keep) as (front, _):
        reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
        writer.write(UPGRADE)
        await reader.readuntil(b"\r\n\r\n")
        begun = frame(TEXT, LIST.encode())[:-1]
        writer.write(frame(TEXT, GET.encode()) + begun)
        await waits(keep)
        writer.write_eof()
        await live.until(lambda: got and not keep.waiting, "it has ended")

        assert got == [begun]
        over.set()
        writer.close()


async def test_what_is_not_understood_goes_on_with_all_that_waits_before_it():
    keep, model = cold()
    other = keep.add("other", state="cold", loaded=asyncio.Event())
    got = bytearray()
    second = channel("getOrLoad", {"identifier": "other"}, 2)
    sent = frame(TEXT, GET.encode()) + frame(TEXT, second.encode()) + b"\xc1\x80 not understood"

    async def script(asking):
        await asking.send(SWITCH)
        while data := await asking.reader.read(65_536):
            got.extend(data)

    async with fronted(script, keep=keep) as (front, _):
        reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
        writer.write(UPGRADE + sent)
        await reader.readuntil(b"\r\n\r\n")
        await live.until(lambda: len(got) == len(sent), "all of it has come")

        assert bytes(got) == sent
        writer.close()
    assert (model.loads, other.loads) == (0, 0)


@pytest.mark.parametrize("drip", [1, 7, 10_000])
@pytest.mark.parametrize("strange", [b"", b"\xc1\x80 not understood"])
async def test_bytes_go_on_as_they_came_however_they_are_cut(drip, strange):
    keep, model = cold()
    half = len(GET) // 2
    fragments = frame(TEXT, GET[:half].encode(), final=False), frame(CONTINUED, GET[half:].encode())
    ping, rest = frame(PING, b"?"), frame(TEXT, LIST.encode()) + frame(TEXT, b"x" * 2_000)
    got = bytearray()

    async def script(asking):
        await asking.send(SWITCH)
        while data := await asking.reader.read(65_536):
            got.extend(data)

    async with fronted(script, keep=keep) as (front, _):
        reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
        writer.write(UPGRADE)
        await reader.readuntil(b"\r\n\r\n")
        sent = fragments[0] + ping + fragments[1] + rest + strange
        for n in range(0, len(sent), drip):
            writer.write(sent[n : n + drip])
            await asyncio.sleep(0)
        if not strange:
            await waits(keep)
            assert bytes(got) in (b"", ping)
            model.loaded.set()
        await live.until(lambda: len(got) == len(sent), "all of it has come")

        assert bytes(got) == ping + b"".join(fragments) + rest + strange
        writer.close()


# --- use -------------------------------------------------------------------------------------------


def uses(model):
    return [
        "began" if isinstance(fact, RequestStarted) else ("ended", fact.answered)
        for fact in model.facts
        if isinstance(fact, (RequestStarted, RequestEnded))
    ]


@pytest.mark.parametrize(
    ("end", "answered"),
    [
        ({"type": "channelSend", "channelId": 1, "message": {"type": "success"}}, True),
        ({"type": "channelClose", "channelId": 1}, False),
        ({"type": "channelError", "channelId": 1, "error": {"title": "no"}}, False),
    ],
)
async def test_a_prediction_counts_as_use_until_it_is_over(end, answered):
    keep = Keep()
    model = keep.add("m")
    async with tunnelled(keep) as (caller, studio, _):
        wish = channel("predict", named("m"))
        await caller.send(wish)
        await studio.hears(wish)
        fragment = {"type": "fragment", "fragment": {"content": "success channelClose"}}
        await studio.says(caller, type="channelSend", channelId=1, message=fragment)
        await studio.says(caller, type="channelClose", channelId=2)
        await studio.says(caller, type="rpcResult", callId=1)
        assert uses(model) == ["began"]
        await studio.says(caller, **end)
        await studio.says(caller, type="channelClose", channelId=1)

        assert uses(model) == ["began", ("ended", answered)]


@pytest.mark.parametrize(("end", "answered"), [("rpcResult", True), ("rpcError", False)])
async def test_an_embedding_counts_as_use(end, answered):
    keep = Keep()
    model = keep.add("m")
    async with tunnelled(keep, "/embedding") as (caller, studio, _):
        wish = call("embedString", {**named("m"), "inputString": "x"})
        await caller.send(wish)
        await studio.hears(wish)
        assert uses(model) == ["began"]
        await studio.says(caller, type=end, callId=1)

        assert uses(model) == ["began", ("ended", answered)]


async def test_a_use_ends_with_its_tunnel():
    keep = Keep()
    model = keep.add("m")
    async with tunnelled(keep) as (caller, studio, _):
        await caller.send(channel("completeRawText", named("m")))
        await live.until(lambda: studio.heard)
        await caller.close()

        await live.until(lambda: uses(model) == ["began", ("ended", False)])


async def test_an_instance_is_known_by_what_was_shown_of_it_also_on_another_connection():
    keep = Keep()
    model, other = keep.add("m"), keep.add("other")
    info = {"identifier": "mine", "instanceReference": "r1", "modelKey": "m"}
    async with tunnelled(keep) as (caller, studio, front):
        await caller.send(LIST)
        await live.until(lambda: studio.heard)
        await studio.says(caller, type="rpcResult", callId=1, result=[info])
        async with connect(f"ws://127.0.0.1:{front.port}/llm", proxy=None, compression=None) as second:
            await second.send(channel("predict", referred("r1")))
            await second.send(channel("predict", named("mine"), 2))
            await live.until(lambda: len(uses(model)) == 2)

    assert uses(model) == ["began", "began", ("ended", False), ("ended", False)]
    assert uses(other) == []


async def test_an_instance_that_nobody_has_shown_can_be_any_that_is_there():
    keep = Keep()
    one, two = keep.add("one"), keep.add("two")
    others = (
        keep.add("cold", state="cold"),
        keep.add("three", upstream="other"),
        keep.add("e", kind="embedding"),
    )
    async with tunnelled(keep) as (caller, studio, _):
        await caller.send(channel("predict", referred("r9")))
        await live.until(lambda: studio.heard)
        await studio.says(caller, type="channelSend", channelId=1, message={"type": "success"})

        # It proves neither: it was one of them.
        assert [uses(model) for model in (one, two)] == [["began", ("ended", False)]] * 2
        assert [uses(model) for model in others] == [[]] * 3


UNLOAD = call("unloadModel", {"identifier": "m"})


@pytest.mark.parametrize(
    ("wish", "end", "told"),
    [
        (LOAD, {"type": "channelSend", "channelId": 1, "message": {"type": "success"}}, [ModelsChanged]),
        (LOAD, {"type": "channelError", "channelId": 1, "error": {}}, []),
        (UNLOAD, {"type": "rpcResult", "callId": 1}, [ModelsChanged, InstanceLost]),
        (UNLOAD, {"type": "rpcError", "callId": 1, "error": {}}, []),
        (LIST, {"type": "rpcResult", "callId": 1, "result": []}, []),
    ],
)
async def test_what_a_caller_loads_and_unloads_is_known_at_once(wish, end, told):
    keep = Keep()
    model = keep.add("m")
    facts = []
    record, keep.record = keep.record, lambda fact: (facts.append(fact), record(fact))
    async with tunnelled(keep) as (caller, studio, _):
        await caller.send(wish)
        await studio.hears(wish)
        assert facts == []
        await studio.says(caller, **end)
        await studio.says(caller, **end)

        assert [type(fact) for fact in facts] == told
        assert [type(fact) for fact in model.facts] == [kind for kind in told if kind is InstanceLost]


async def test_a_load_that_has_waited_is_known_at_once_too():
    keep, model = cold()
    facts = []
    keep.record = facts.append
    async with tunnelled(keep) as (caller, studio, _):
        await caller.send(LOAD)
        await waits(keep)
        model.loaded.set()
        await studio.hears(LOAD)
        await studio.says(caller, type="channelSend", channelId=1, message={"type": "success"})

        assert [type(fact) for fact in facts] == [ModelsChanged]


async def test_of_instances_that_were_shown_the_oldest_are_forgotten():
    instances = Instances()
    for n in range(2 * INSTANCES):
        instances.remember("local", Shown(f"r{n}", f"i{n}", "m"))

    def names(n, upstream="local"):
        return list(instances.names(upstream, Said(Wish.USE, None, None, f"r{n}")))

    assert names(2 * INSTANCES - 1) == [f"i{2 * INSTANCES - 1}", "m"]
    assert names(0) == []
    assert names(2 * INSTANCES - 1, "other") == []


# --- how far our load is ----------------------------------------------------------------------------


def told(progress, number=1):
    return {
        "type": "channelSend",
        "channelId": number,
        "message": {"type": "loadProgress", "progress": progress},
    }


class Turns:
    left = 3

    def tick(self, now):
        self.left -= 1


async def turns(front):
    """Until something could have been told."""
    seen = Turns()
    front.proxy.ticker.add(seen)
    await live.until(lambda: seen.left <= 0, "the clock turns")
    front.proxy.ticker.discard(seen)


async def test_who_waits_for_get_or_load_hears_how_far_the_load_is_and_never_that_it_goes_back():
    keep, model = cold(progress=None)
    async with tunnelled(keep, heartbeat=0.1) as (caller, studio, front):
        await caller.send(GET)
        await waits(keep)
        heard = []
        for progress in (0.1, 0.105, 0.05, 0.5):
            model.progress = progress
            if progress in (0.1, 0.5):
                heard.append(json.loads(await caller.recv()))
            await turns(front)
        model.loaded.set()
        await studio.hears(GET)
        await studio.says(caller, type="channelSend", channelId=1, message={"type": "alreadyLoaded"})

    assert heard == [told(0.1), told(0.5)]


async def test_who_waits_with_load_model_hears_nothing_of_it():
    keep, model = cold(progress=0.5)
    async with tunnelled(keep) as (caller, studio, front):
        await caller.send(LOAD)
        await waits(keep)
        assert len(front.proxy.ticker) == 0
        model.loaded.set()
        await studio.hears(LOAD)
        await studio.says(caller, type="channelClose", channelId=1)


async def test_what_lm_studio_is_in_the_middle_of_saying_is_not_interrupted():
    keep, _ = cold(progress=0.5)
    begun, rest = frame(TEXT, b"{}" * 5, masked=False)[:-3], frame(TEXT, b"{}" * 5, masked=False)[-3:]
    go_on = asyncio.Event()

    async def script(asking):
        await asking.send(SWITCH + begun)
        await go_on.wait()
        await asking.send(rest)
        await asking.reader.read()
        await asking.reader.read()

    async with fronted(script, keep=keep, heartbeat=0.1) as (front, _):
        reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
        writer.write(UPGRADE + frame(TEXT, GET.encode()))
        await reader.readuntil(b"\r\n\r\n")
        got = await reader.readexactly(len(begun))
        await waits(keep)
        await turns(front)
        go_on.set()
        got += await reader.readexactly(len(rest))
        after = await reader.readuntil(b"}}")

        assert got == begun + rest
        assert json.loads(after[2:]) == told(0.5)
        writer.close()


# --- the end of the daemon --------------------------------------------------------------------------


async def test_a_connection_without_a_call_is_ended_when_the_daemon_goes_away_and_both_sides_are_told():
    async with tunnelled(Keep()) as (caller, studio, front):
        await caller.send(LIST)
        await studio.hears(LIST)
        await studio.says(caller, type="rpcResult", callId=1, result=[])
        front.proxy.drain()

        await caller.wait_closed()
        await studio.socket.wait_closed()
        assert caller.close_code == studio.socket.close_code == 1001
        assert (await front.last()).outcome == "ok"


@pytest.mark.parametrize(
    ("wish", "end"),
    [
        (channel("predict", named("m")), {"type": "channelClose", "channelId": 1}),
        (LIST, {"type": "rpcResult", "callId": 1, "result": []}),
        (channel("download", {}), {"type": "channelError", "channelId": 1, "error": {}}),
    ],
)
async def test_a_call_under_way_is_answered_to_its_end_first(wish, end):
    keep = Keep()
    keep.add("m")
    async with tunnelled(keep) as (caller, studio, front):
        await caller.send(wish)
        await studio.hears(wish)
        front.proxy.drain()
        await studio.says(caller, type="channelSend", channelId=1, message={"type": "fragment"})
        assert caller.state.name == "OPEN"
        await studio.says(caller, **end)

        await caller.wait_closed()
        assert caller.close_code == 1001


async def test_who_waits_for_a_model_is_not_sent_away():
    keep, model = cold()
    async with tunnelled(keep) as (caller, studio, front):
        await caller.send(GET)
        await waits(keep)
        front.proxy.drain()
        model.loaded.set()
        await studio.hears(GET)
        await studio.says(caller, type="channelSend", channelId=1, message={"type": "alreadyLoaded"})
        assert caller.state.name == "OPEN"
        await studio.says(caller, type="channelClose", channelId=1)

        await caller.wait_closed()
        assert caller.close_code == 1001


async def test_where_it_is_not_known_what_is_under_way_nobody_is_cut_off():
    keep = Keep()
    async with tunnelled(keep, "/not/an/sdk") as (caller, studio, front):
        front.proxy.drain()
        await caller.send(LIST)

        await studio.hears(LIST)
        assert caller.state.name == "OPEN"
