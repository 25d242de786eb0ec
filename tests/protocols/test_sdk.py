"""What LM Studio's SDKs say about models is understood; all else means nothing."""

import json

import pytest

from keepalive.protocols.sdk import Answered, Said, Shown, Wish, answered, load_progress, said


def text(**message) -> bytes:
    return json.dumps(message).encode()


def channel(endpoint, parameter, number=3) -> bytes:
    return text(type="channelCreate", endpoint=endpoint, channelId=number, creationParameter=parameter)


def call(endpoint, parameter, number=3) -> bytes:
    return text(type="rpcCall", endpoint=endpoint, callId=number, parameter=parameter)


def test_progress_is_told_in_lm_studios_own_message_under_the_callers_number():
    told = load_progress(("channelId", 7.0), 0.12345)

    assert told is not None
    assert json.loads(told) == {
        "type": "channelSend",
        "channelId": 7,
        "message": {"type": "loadProgress", "progress": 0.123},
    }
    assert load_progress(("channelId", 1.5), 0.5) is load_progress(("channelId", 1e300), 0.5) is None


NO_CONFIG = {"layers": [{"layerName": "apiOverride", "config": {"fields": []}}]}
LARGE = {"layers": [{"config": {"fields": [{"key": "llm.load.contextLength", "value": 8192}]}}]}
QUERY = {"type": "query", "query": {"identifier": "chat"}}
REFERENCE = {"type": "instanceReference", "instanceReference": "r1"}
INFO = {"identifier": "mine", "instanceReference": "r1", "modelKey": "chat"}
SHOWN = (Shown("r1", "mine", "chat"),)


@pytest.mark.parametrize(
    ("message", "meant"),
    [
        (text(type="keepAlive"), Said(Wish.KEEP_ALIVE)),
        (
            channel("getOrLoad", {"identifier": "chat"}),
            Said(Wish.GET_OR_LOAD, ("channelId", 3), "chat", plain=True),
        ),
        (
            channel("getOrLoad", {"identifier": "chat", "loadConfigStack": NO_CONFIG}),
            Said(Wish.GET_OR_LOAD, ("channelId", 3), "chat", plain=True),
        ),
        (
            channel("getOrLoad", {"identifier": "chat", "loadConfigStack": LARGE}),
            Said(Wish.GET_OR_LOAD, ("channelId", 3), "chat"),
        ),
        (
            channel("loadModel", {"modelKey": "chat", "identifier": "mine"}),
            Said(Wish.LOAD, ("channelId", 3), "chat"),
        ),
        (channel("predict", {"modelSpecifier": QUERY}), Said(Wish.USE, ("channelId", 3), "chat")),
        (
            channel("completeRawText", {"modelSpecifier": REFERENCE}),
            Said(Wish.USE, ("channelId", 3), None, "r1"),
        ),
        (
            channel("predict", {"modelSpecifier": {"type": "query", "query": {"path": "acme/chat.gguf"}}}),
            Said(Wish.USE, ("channelId", 3)),
        ),
        (call("unloadModel", {"identifier": "mine"}), Said(Wish.UNLOAD, ("callId", 3), "mine")),
        (call("embedString", {"modelSpecifier": QUERY}), Said(Wish.USE, ("callId", 3), "chat")),
        (
            text(type="channelSend", channelId=3, message={"type": "cancel"}),
            Said(Wish.CANCEL, ("channelId", 3)),
        ),
        (call("listLoaded", None), Said(id=("callId", 3))),
        (channel("download", {"modelKey": "chat"}), Said(id=("channelId", 3))),
        (
            text(type="rpcCall", endpoint="estimateModelUsage", callId=3, parameter="loadModel"),
            Said(id=("callId", 3)),
        ),
        (text(type="channelSend", channelId=3, message="cancel"), Said()),
        (channel("getOrLoad", ["chat"]), Said(Wish.GET_OR_LOAD, ("channelId", 3), plain=True)),
        (channel("predict", {"modelSpecifier": "chat"}, number="3"), Said(Wish.USE)),
        (b'"keepAlive"', Said()),
        (b'{"type":"keepAlive"', Said()),
        (b"\xff\xfe keepAlive", Said()),
        pytest.param(b"[" * 100_000 + b"keepAlive", Said(), id="deep"),
        (b"", Said()),
    ],
)
def test_what_a_caller_wants(message, meant):
    assert said(message) == meant


@pytest.mark.parametrize(
    ("message", "meant"),
    [
        (text(type="rpcResult", callId=3, result=[INFO]), Answered(("callId", 3), True, SHOWN)),
        (text(type="rpcResult", callId=3), Answered(("callId", 3), True)),
        (text(type="rpcResult", callId=3, result=INFO), Answered(("callId", 3), True, SHOWN)),
        (text(type="rpcError", callId=3, error={}), Answered(("callId", 3))),
        (text(type="channelClose", channelId=3), Answered(("channelId", 3))),
        (text(type="channelError", channelId=3, error={}), Answered(("channelId", 3))),
        (
            text(type="channelSend", channelId=3, message={"type": "success", "info": INFO}),
            Answered(("channelId", 3), True, SHOWN),
        ),
        (
            text(type="channelSend", channelId=3, message={"type": "alreadyLoaded", "info": INFO}),
            Answered(None, False, SHOWN),
        ),
        (
            text(
                type="channelSend",
                channelId=3,
                message={"type": "fragment", "fragment": {"content": "success"}},
            ),
            Answered(),
        ),
        (text(type="channelSend", channelId=3, message={"instanceReference": None}), Answered()),
        (text(type="keepAliveAck"), Answered()),
        (b"success", Answered()),
    ],
)
def test_what_an_answer_ends_and_shows(message, meant):
    assert answered(message) == meant
