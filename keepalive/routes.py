"""What LM Studio serves: which route a request is for, which model it asks for, and how that route says no."""

from dataclasses import dataclass
from enum import StrEnum


class Protocol(StrEnum):
    """How a route streams and words its errors."""

    CHAT = "chat"  # OpenAI chat completions
    COMPLETIONS = "completions"  # OpenAI completions
    RESPONSES = "responses"  # OpenAI responses
    MESSAGES = "messages"  # Anthropic messages
    NATIVE = "native"  # LM Studio /api/v1
    OPENAI = "openai"  # OpenAI layout, never streamed: embeddings, listings
    PLAIN = "plain"  # anything else


@dataclass(frozen=True, slots=True)
class Route:
    """One kind of request. `name` is a metric label: one of a fixed few, never from the request."""

    name: str
    protocol: Protocol
    inference: bool = False  # its body names a model that has to be loaded
    streams: bool = False  # may answer with server-sent events
    websocket: bool = False  # one of the namespaces of LM Studio's own SDKs
    changes: bool = False  # loads, unloads or downloads a model: the listing is stale afterwards


OTHER = Route("other", Protocol.PLAIN)


def route_of(method: bytes, path: bytes) -> Route:
    """The route of a request; `path` is the raw target, with or without its query."""
    raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Asked:
    """What a request body asks for.

    `model` None: no string under that name, or not JSON. `conversation` is equal for two requests of one
    conversation (same model, same first messages) and None when there is nothing to tell it from.
    """

    model: str | None = None
    stream: bool = False
    conversation: bytes | None = None


class ModelFinder:
    """Reads what a JSON body asks for while it comes in, without keeping or parsing the body."""

    __slots__ = ()

    def feed(self, chunk: bytes) -> None:
        """The next bytes of the body."""
        raise NotImplementedError

    def finish(self) -> Asked:
        """The answer, as `json.loads` of the whole body would give it: the last of several equal keys counts."""
        raise NotImplementedError


def read_body(body: bytes) -> Asked:
    """`ModelFinder` for a body that is there as a whole."""
    raise NotImplementedError


def error_body(route: Route, status: int, message: str, code: str) -> bytes:
    """A JSON body in the layout of `route`: send it as `application/json`."""
    raise NotImplementedError


def error_event(route: Route, message: str, code: str) -> bytes:
    """The end of a stream that failed, so that the official client of `route` raises.

    Stands at an event boundary; nothing follows it but the end of the body.
    """
    raise NotImplementedError


def heartbeat_comment(model: str, state: str, elapsed: float, eta: float | None) -> bytes:
    """A comment that every SSE reader skips."""
    raise NotImplementedError


def heartbeat_reasoning(route: Route, model: str, state: str, elapsed: float, eta: float | None) -> bytes:
    """The same as text that chat programs show as reasoning; a comment where the route knows no such thing."""
    raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Lost:
    """An answer that says the model is not there any more. `retryable`: nothing was generated for it."""

    kind: str  # "crashed", "unloaded", "reloaded"
    retryable: bool


def looks_lost(status: int, body: bytes) -> Lost | None:
    """Whether an error answer (or an error event's data) says that the model went away."""
    raise NotImplementedError
