"""What LM Studio serves: which route a request is for."""

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Final
from urllib.parse import unquote_to_bytes


class Protocol(StrEnum):
    """How a route streams and words its errors."""

    CHAT = "chat"  # OpenAI chat completions
    COMPLETIONS = "completions"  # OpenAI completions
    RESPONSES = "responses"  # OpenAI responses
    MESSAGES = "messages"  # Anthropic messages
    NATIVE = "native"  # LM Studio /api/v1
    OPENAI = "openai"  # OpenAI's errors, never streamed: embeddings, listings
    PLAIN = "plain"  # anything else


@dataclass(frozen=True, slots=True)
class Route:
    """One kind of request. `name` is a metric label: one of a fixed few, never from the request."""

    name: str
    protocol: Protocol
    inference: bool = False  # its body names a model that has to be loaded
    streams: bool = False  # may answer with server-sent events
    websocket: bool = False  # one of the namespaces of LM Studio's own SDKs
    changes: bool = False  # loads, unloads or downloads a model: what was listed before is stale


OTHER: Final = Route("other", Protocol.PLAIN)
_OTHER_OPENAI: Final = Route("other", Protocol.OPENAI)
_OTHER_NATIVE: Final = Route("other", Protocol.NATIVE)
_MODELS: Final = Route("models", Protocol.OPENAI)
_SDK: Final = Route("sdk", Protocol.PLAIN, websocket=True)

_ROUTES: Final = {
    (b"POST", b"/v1/chat/completions"): Route("chat", Protocol.CHAT, inference=True, streams=True),
    (b"POST", b"/v1/completions"): Route("completions", Protocol.COMPLETIONS, inference=True, streams=True),
    (b"POST", b"/v1/responses"): Route("responses", Protocol.RESPONSES, inference=True, streams=True),
    (b"POST", b"/v1/messages"): Route("messages", Protocol.MESSAGES, inference=True, streams=True),
    (b"POST", b"/v1/embeddings"): Route("embeddings", Protocol.OPENAI, inference=True),
    (b"GET", b"/v1/models"): _MODELS,
    (b"POST", b"/api/v0/chat/completions"): Route("v0_chat", Protocol.CHAT, inference=True, streams=True),
    (b"POST", b"/api/v0/completions"): Route(
        "v0_completions", Protocol.COMPLETIONS, inference=True, streams=True
    ),
    (b"POST", b"/api/v0/embeddings"): Route("v0_embeddings", Protocol.OPENAI, inference=True),
    (b"GET", b"/api/v0/models"): _MODELS,
    (b"POST", b"/api/v1/chat"): Route("native_chat", Protocol.NATIVE, inference=True, streams=True),
    (b"GET", b"/api/v1/models"): Route("models", Protocol.NATIVE),
    (b"POST", b"/api/v1/models/load"): Route("load", Protocol.NATIVE, changes=True),
    (b"POST", b"/api/v1/models/unload"): Route("unload", Protocol.NATIVE, changes=True),
    (b"POST", b"/api/v1/models/download"): Route("download", Protocol.NATIVE, changes=True),
    (b"GET", b"/lmstudio-greeting"): Route("greeting", Protocol.PLAIN),
} | {
    (b"GET", b"/" + namespace): _SDK
    for namespace in (b"llm", b"embedding", b"system", b"files", b"repository", b"diagnostics", b"plugins")
}


#: A request that the daemon itself asks in the name of a caller of its streaming prompt API.
PROMPTS: Final = Route("prompts", Protocol.CHAT, inference=True, streams=True)


def route_of(method: bytes, path: bytes) -> Route:
    """The route of a request; `path` is the raw target, with or without its query.

    Generous where LM Studio's router (Express) is: letter case, a trailing slash, escapes. A spelling that it
    serves and that we did not know would be a way past the keeper.
    """
    route = _ROUTES.get((method, path))
    if route is not None:
        return route
    path = re.sub(b"//+", b"/", unquote_to_bytes(path.partition(b"?")[0])).lower()
    route = _ROUTES.get((method, path.rstrip(b"/")))
    if route is not None:
        return route
    if path.startswith((b"/v1/", b"/api/v0/")):
        return _MODELS if method == b"GET" and path.startswith(b"/api/v0/models/") else _OTHER_OPENAI
    return _OTHER_NATIVE if path.startswith(b"/api/v1/") else OTHER
