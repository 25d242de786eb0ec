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


class Heartbeat(StrEnum):
    """What a caller sees while it waits for its stream."""

    COMMENT = "comment"
    REASONING = "reasoning"
    OFF = "off"


@dataclass(frozen=True, slots=True)
class Route:
    """One kind of request. `name` is a metric label: one of a fixed few, never from the request."""

    name: str
    protocol: Protocol
    inference: bool = False  # its body names a model that has to be loaded
    streams: bool = False  # may answer with server-sent events
    websocket: bool = False  # one of the namespaces of LM Studio's own SDKs
    changes: bool = False  # loads, unloads or downloads a model: what was listed before is stale
    kind: str = "llm"  # of the models that it is for; "": none that we know
    rows: str = ""  # it lists models, in a list of that name
    one: bool = False  # its path names a model
    stores: bool = False  # what it answers may be gone on from, by its id
    stored: bool = False  # its path names such an answer
    foreign: bool = False  # LM Studio has no such route, other servers do
    form: bool = False  # what it asks for may come as a form, with files in it

    @property
    def names(self) -> bool:
        """Its body says who is meant."""
        return self.inference or self.name in ("load", "unload")


OTHER: Final = Route("other", Protocol.PLAIN)
_OTHER_OPENAI: Final = Route("other", Protocol.OPENAI)
_OTHER_NATIVE: Final = Route("other", Protocol.NATIVE)
_MODELS: Final = Route("models", Protocol.OPENAI, rows="data")
_MODEL_V0: Final = Route("models", Protocol.OPENAI, one=True)
_MODEL: Final = Route("other", Protocol.OPENAI, one=True)
_STORED: Final = Route("other", Protocol.OPENAI, stored=True)
_SDK: Final = Route("sdk", Protocol.PLAIN, websocket=True)

_ROUTES: Final = (
    {
        (b"POST", b"/v1/chat/completions"): Route("chat", Protocol.CHAT, inference=True, streams=True),
        (b"POST", b"/v1/completions"): Route(
            "completions", Protocol.COMPLETIONS, inference=True, streams=True
        ),
        (b"POST", b"/v1/responses"): Route(
            "responses", Protocol.RESPONSES, inference=True, streams=True, stores=True
        ),
        (b"POST", b"/v1/messages"): Route("messages", Protocol.MESSAGES, inference=True, streams=True),
        (b"POST", b"/v1/embeddings"): Route("embeddings", Protocol.OPENAI, inference=True, kind="embedding"),
        (b"POST", b"/v1/rerank"): Route("rerank", Protocol.OPENAI, inference=True, kind="reranker"),
        (b"GET", b"/v1/models"): _MODELS,
        (b"POST", b"/api/v0/chat/completions"): Route("v0_chat", Protocol.CHAT, inference=True, streams=True),
        (b"POST", b"/api/v0/completions"): Route(
            "v0_completions", Protocol.COMPLETIONS, inference=True, streams=True
        ),
        (b"POST", b"/api/v0/embeddings"): Route(
            "v0_embeddings", Protocol.OPENAI, inference=True, kind="embedding"
        ),
        (b"GET", b"/api/v0/models"): _MODELS,
        (b"POST", b"/api/v1/chat"): Route(
            "native_chat", Protocol.NATIVE, inference=True, streams=True, stores=True
        ),
        (b"GET", b"/api/v1/models"): Route("models", Protocol.NATIVE, rows="models"),
        (b"POST", b"/api/v1/models/load"): Route("load", Protocol.NATIVE, changes=True),
        (b"POST", b"/api/v1/models/unload"): Route("unload", Protocol.NATIVE, changes=True),
        (b"POST", b"/api/v1/models/download"): Route("download", Protocol.NATIVE, changes=True),
        # llama-server's router; it loads for whatever names a model.
        (b"POST", b"/models/load"): Route("other", Protocol.OPENAI, changes=True),
        (b"POST", b"/models/unload"): Route("other", Protocol.OPENAI, changes=True),
        (b"POST", b"/chat/completions"): Route(
            "chat", Protocol.CHAT, inference=True, streams=True, foreign=True
        ),
        (b"POST", b"/responses"): Route(
            "responses", Protocol.RESPONSES, inference=True, streams=True, stores=True, foreign=True
        ),
        (b"GET", b"/lmstudio-greeting"): Route("greeting", Protocol.PLAIN),
        (b"GET", b"/embedding"): Route("sdk", Protocol.PLAIN, websocket=True, kind="embedding"),
    }
    | {
        (b"POST", path): Route(name, Protocol.OPENAI, inference=True, kind=kind, foreign=True)
        for name, kind, paths in (
            ("embeddings", "embedding", (b"/embeddings", b"/embedding")),
            ("rerank", "reranker", (b"/rerank", b"/reranking", b"/v1/reranking", b"/v2/rerank")),
            # These stream, too, in ways of their own: they are held without a word.
            ("completions", "llm", (b"/completions", b"/completion", b"/infill")),
            # They count, and say no word: measured as a chat their answers would be empty.
            (
                "other",
                "llm",
                (
                    b"/tokenize",
                    b"/detokenize",
                    b"/apply-template",
                    b"/v1/messages/count_tokens",
                    b"/v1/responses/input_tokens",
                    b"/v1/responses/compact",
                ),
            ),
        )
        for path in paths
    }
    | {
        # Sound, pictures and the like: of models of no kind that we know, for which nobody stands in.
        (b"POST", b"/v1/" + path): Route(
            "other", Protocol.OPENAI, inference=True, kind="", foreign=True, form=form
        )
        for form, paths in (
            (
                False,
                (b"audio/speech", b"images/generations", b"moderations", b"score", b"classify", b"pooling"),
            ),
            (True, (b"audio/transcriptions", b"audio/translations", b"images/edits", b"images/variations")),
        )
        for path in paths
    }
    | {
        # Ollama's own, in streams of its own.
        (b"POST", path): Route(name, Protocol.PLAIN, inference=True, kind=kind, foreign=True)
        for path, name, kind in (
            (b"/api/chat", "chat", "llm"),
            (b"/api/generate", "completions", "llm"),
            (b"/api/embed", "embeddings", "embedding"),
            (b"/api/embeddings", "embeddings", "embedding"),
        )
    }
    | {
        (b"GET", b"/" + namespace): _SDK
        for namespace in (b"llm", b"system", b"files", b"repository", b"diagnostics", b"plugins")
    }
)


#: A request that the daemon itself asks in the name of a caller of its streaming prompt API.
PROMPTS: Final = Route("prompts", Protocol.CHAT, inference=True, streams=True)


_HEARTBEAT: Final = re.compile(rb"/heartbeat/+([^/?]*)(.*)", re.IGNORECASE | re.DOTALL)


def heartbeat_in(target: bytes) -> tuple[str | None, bytes]:
    """The heartbeat mode that stands in front of a route, and the target without it; None where none stands there.

    For clients that can set nothing but their base URL. The mode may be none that exists: see `Heartbeat`.
    """
    found = _HEARTBEAT.match(target) if target[:11].lower() == b"/heartbeat/" else None
    if found is None:
        return None, target
    behind = found[2] if found[2].startswith(b"/") else b"/" + found[2]
    return unquote_to_bytes(found[1]).decode("utf-8", "replace").lower(), behind


def chosen_heartbeat(header: bytes | None, named: str | None) -> Heartbeat | None:
    """The mode that a caller wants: that of its header, where it is one, else that in front of its route."""
    said = (header or b"").decode("latin-1").lower()
    wanted = said if said in set(Heartbeat) else named
    return None if wanted is None else Heartbeat(wanted)


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
        if method == b"GET" and path.startswith((b"/api/v0/models/", b"/v1/models/")):
            return _MODEL_V0 if path.startswith(b"/api") else _MODEL
        return _STORED if path.startswith(b"/v1/responses/") else _OTHER_OPENAI
    return _OTHER_NATIVE if path.startswith(b"/api/v1/") else OTHER


_NAMED: Final = re.compile(rb"(/+(?:api/+v0|v1)/+models/+)([^?]+)(.*)", re.IGNORECASE | re.DOTALL)
_STORED_PATH: Final = re.compile(rb"/+v1/+responses/+([^/?]+)", re.IGNORECASE)


def named_in(target: bytes) -> tuple[bytes, str, bytes]:
    """The model that the target of a `one` route names, with what stands before it and behind; "" for none."""
    found = _NAMED.fullmatch(target)
    if found is None:
        return target, "", b""
    return found[1], unquote_to_bytes(found[2]).decode("utf-8", "replace").rstrip("/"), found[3]


def stored_in(target: bytes) -> str | None:
    """The stored answer that a target names."""
    found = _STORED_PATH.match(target)
    return unquote_to_bytes(found[1]).decode("utf-8", "replace") if found else None
