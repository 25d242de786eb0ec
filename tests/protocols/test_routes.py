import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepalive.protocols import routes
from keepalive.protocols.routes import Heartbeat, Protocol, route_of


@pytest.mark.parametrize(
    ("method", "path", "name", "protocol"),
    [
        (b"POST", b"/v1/chat/completions", "chat", Protocol.CHAT),
        (b"POST", b"/v1/completions", "completions", Protocol.COMPLETIONS),
        (b"POST", b"/v1/responses", "responses", Protocol.RESPONSES),
        (b"POST", b"/v1/messages", "messages", Protocol.MESSAGES),
        (b"POST", b"/v1/embeddings", "embeddings", Protocol.OPENAI),
        (b"POST", b"/v1/rerank", "rerank", Protocol.OPENAI),
        (b"POST", b"/api/v1/chat", "native_chat", Protocol.NATIVE),
        (b"POST", b"/api/v0/chat/completions", "v0_chat", Protocol.CHAT),
        (b"POST", b"/api/v0/completions", "v0_completions", Protocol.COMPLETIONS),
        (b"POST", b"/api/v0/embeddings", "v0_embeddings", Protocol.OPENAI),
        (b"POST", b"/v1/chat/completions?x=1", "chat", Protocol.CHAT),
        # Other spellings that LM Studio's router takes for the same.
        (b"POST", b"/V1/Chat/Completions", "chat", Protocol.CHAT),
        (b"POST", b"/v1/chat/completions/", "chat", Protocol.CHAT),
        (b"POST", b"//v1//chat/completions/?", "chat", Protocol.CHAT),
        (b"POST", b"/v1/%63hat/completions", "chat", Protocol.CHAT),
    ],
)
def test_routes_that_need_a_model_are_known_in_every_spelling(method, path, name, protocol):
    route = route_of(method, path)

    assert (route.name, route.protocol, route.inference) == (name, protocol, True)
    assert route.streams == (name not in ("embeddings", "v0_embeddings", "rerank"))


@pytest.mark.parametrize(
    "path",
    ["chat/completions", "completions", "completion", "infill", "responses", "embeddings", "embedding", "rerank",
     "reranking", "v1/reranking", "v2/rerank", "v1/messages/count_tokens", "tokenize", "detokenize", "apply-template",
     "v1/responses/input_tokens", "v1/responses/compact", "api/chat", "api/generate", "api/embed", "api/embeddings",
     "v1/audio/speech", "v1/audio/transcriptions", "v1/images/generations", "v1/images/edits", "v1/moderations"],
)  # fmt: skip
def test_routes_of_other_servers_that_need_a_model_are_known_and_told_from_those_of_lm_studio(path):
    assert route_of(b"POST", b"/" + path.encode()).inference
    assert route_of(b"POST", b"/" + path.encode() + b"/?x=1").foreign
    assert not route_of(b"GET", b"/" + path.encode()).inference


@pytest.mark.parametrize(
    ("target", "mode", "behind"),
    [
        (b"/heartbeat/reasoning/v1/chat/completions?x=1", "reasoning", b"/v1/chat/completions?x=1"),
        (b"/Heartbeat//OFF//v1/models", "off", b"//v1/models"),
        (b"/heartbeat/%6fff", "off", b"/"),
        (b"/heartbeat/comment?a=/b", "comment", b"/?a=/b"),
        (b"/heartbeat/louder/v1/models", "louder", b"/v1/models"),
        (b"/heartbeat/", "", b"/"),
        (b"/heartbeat/off/heartbeat/off/v1", "off", b"/heartbeat/off/v1"),
        (b"/heartbeat", None, b"/heartbeat"),
        (b"/heartbeats/off/v1", None, b"/heartbeats/off/v1"),
        (b"/v1/heartbeat/off", None, b"/v1/heartbeat/off"),
        (b"*", None, b"*"),
    ],
)
def test_a_heartbeat_mode_may_stand_in_front_of_a_route(target, mode, behind):
    assert routes.heartbeat_in(target) == (mode, behind)


@pytest.mark.parametrize(
    ("header", "named", "mode"),
    [
        (None, None, None),
        (None, "off", Heartbeat.OFF),
        (b"Reasoning", "off", Heartbeat.REASONING),
        (b"loud", "off", Heartbeat.OFF),
        (b"\xff", None, None),
    ],
)
def test_a_header_outranks_the_mode_in_front_of_a_route(header, named, mode):
    assert routes.chosen_heartbeat(header, named) is mode


@pytest.mark.parametrize(
    ("method", "path", "name", "protocol"),
    [
        (b"GET", b"/v1/models", "models", Protocol.OPENAI),
        (b"GET", b"/api/v0/models", "models", Protocol.OPENAI),
        (b"GET", b"/api/v0/models/acme%2Ftiny", "models", Protocol.OPENAI),
        (b"GET", b"/api/v1/models", "models", Protocol.NATIVE),
        (b"GET", b"/lmstudio-greeting", "greeting", Protocol.PLAIN),
        (b"GET", b"/v1/chat/completions", "other", Protocol.OPENAI),
        (b"OPTIONS", b"/v1/chat/completions", "other", Protocol.OPENAI),
        (b"HEAD", b"/api/v1/chat", "other", Protocol.NATIVE),
        (b"GET", b"/v1/responses/resp_1", "other", Protocol.OPENAI),
        (b"post", b"/v1/chat/completions", "other", Protocol.OPENAI),
        (b"GET", b"/favicon.ico", "other", Protocol.PLAIN),
        (b"OPTIONS", b"*", "other", Protocol.PLAIN),
        (b"GET", b"", "other", Protocol.PLAIN),
        (b"GET", b"/%zz\xff?%", "other", Protocol.PLAIN),
    ],
)
def test_other_routes_need_no_model(method, path, name, protocol):
    route = route_of(method, path)

    assert (route.name, route.protocol) == (name, protocol)
    assert (route.inference, route.streams, route.websocket, route.changes) == (False,) * 4


def test_loads_and_sdk_connections_are_told_apart():
    assert [
        route_of(b"POST", b"/api/v1/models/" + what).changes for what in (b"load", b"unload", b"download")
    ] == [True] * 3
    assert [route_of(b"POST", b"/models/" + what).changes for what in (b"load", b"unload")] == [True] * 2
    assert route_of(b"GET", b"/llm").websocket
    assert route_of(b"GET", b"/embedding").websocket
    assert not route_of(b"POST", b"/llm").websocket


@pytest.mark.parametrize(
    ("path", "before", "name", "behind"),
    [
        (b"/v1/models/acme/tiny", b"/v1/models/", "acme/tiny", b""),
        (b"/v1/models/acme%2Ftiny/?x=1", b"/v1/models/", "acme/tiny", b"?x=1"),
        (b"//API//v0/Models/a%40q8", b"//API//v0/Models/", "a@q8", b""),
    ],
)
def test_a_path_may_name_a_model(path, before, name, behind):
    assert route_of(b"GET", path).one
    assert routes.named_in(path) == (before, name, behind)


def test_a_path_that_only_looks_like_it_names_nobody():
    assert routes.named_in(b"/v1/%6dodels/a") == (b"/v1/%6dodels/a", "", b"")


@pytest.mark.parametrize("path", [b"/v1/responses/resp_1", b"//V1/responses/resp%5f1/input_items?after=2"])
def test_a_path_may_name_a_stored_answer(path):
    assert route_of(b"GET", path).stored
    assert route_of(b"DELETE", path).stored
    assert routes.stored_in(path) == "resp_1"


@given(st.binary(), st.binary())
def test_any_request_has_one_of_few_route_names(method, path):
    names = {route.name for route in routes._ROUTES.values()} | {"other"}

    assert route_of(method, path).name in names
    assert route_of(b"POST", b"/v1/" + path).name in names
