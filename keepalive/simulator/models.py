"""Models on the simulated disk, their copies in memory, and loads under way."""

import re
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from keepalive.simulator.clock import Timer

ModelKind = Literal["llm", "embedding", "reranker"]
Owner = Literal["rest", "jit", "by hand"]


@dataclass(frozen=True, slots=True)
class SimModel:
    key: str
    kind: ModelKind = "llm"
    size_bytes: int = 2_500_000_000
    load_seconds: float = 3.0
    max_context_length: int = 32_768
    default_context_length: int = 4_096
    architecture: str = "llama"
    params: str | None = None
    quantization: str = "Q4_K_M"  # the variant that is selected
    further: tuple[str, ...] = ()  # quantizations that lie on the disk beside it
    vision: bool = False
    reasoning: tuple[str, ...] = ()  # allowed settings; with any, answers begin with reasoning

    @property
    def usual_context_length(self) -> int:
        return min(self.default_context_length, self.max_context_length)

    @property
    def publisher(self) -> str:
        return self.key.split("/")[0] if "/" in self.key else "local"

    @property
    def display_name(self) -> str:
        return self.key.rsplit("/", 1)[-1].replace("-", " ").title()

    @property
    def variant(self) -> str:
        return self.variants[0]

    @property
    def variants(self) -> list[str]:
        return [f"{self.key}@{name.lower()}" for name in (self.quantization, *self.further)]


DEFAULT_MODELS = (
    SimModel(
        "medicine-llm",
        size_bytes=8_540_000_000,
        load_seconds=12.0,
        max_context_length=32_768,
        default_context_length=8_192,
        params="13B",
    ),
    SimModel(
        "qwen/qwen3-1.7b",
        size_bytes=1_280_000_000,
        load_seconds=3.0,
        max_context_length=40_960,
        architecture="qwen3",
        params="1.7B",
    ),
    SimModel(
        "text-embedding-nomic-embed-text-v1.5",
        kind="embedding",
        size_bytes=84_106_624,
        load_seconds=1.0,
        max_context_length=2_048,
        default_context_length=2_048,
        architecture="nomic-bert",
    ),
)


class Guest(Protocol):
    """A request, as far as the model that it waits for or works with knows it."""

    n: int
    route: str
    phase: str
    granted: bool
    tokens: int
    instance: "Instance | None"
    slot: "Slot | None"

    def flag(self, name: str) -> bool: ...
    def wake(self) -> None: ...
    def fail(self, failure: Exception) -> None: ...
    def leave_hanging(self) -> None: ...


# From this part on a slot's memory of a prompt makes up for what else it holds.
SIMILAR = 0.1


def _common(read: list[str], words: list[str]) -> int:
    """How many words they begin with alike."""
    pairs = enumerate(zip(read, words, strict=False))
    return next((n for n, (one, other) in pairs if one != other), min(len(read), len(words)))


@dataclass(slots=True, eq=False)
class Slot:
    """Where one request at a time is worked on; what it has read stays in its cache."""

    read: list[str] = field(default_factory=list)
    taken: bool = False
    used: int = 0  # number of the request that had it last


@dataclass(slots=True, eq=False)
class Instance:
    """One copy in memory. `ttl_seconds` None never expires: only loads on demand carry an idle timer."""

    id: str
    model: SimModel
    variant: str
    owner: Owner
    context_length: int
    config: Mapping[str, object]
    ttl_seconds: float | None
    loaded_at: float
    listed_at: float
    load_seconds: float
    last_used: float | None = None
    crashed: bool = False
    grown: int = 0  # bytes beyond its size
    working: dict[int, Guest] = field(default_factory=dict)
    queue: deque[Guest] = field(default_factory=deque)
    expiry: Timer | None = None
    slots: list["Slot"] = field(default_factory=list)  # of those that have worked

    def slot(self, request: int, words: list[str], most: int) -> tuple[Slot, int]:
        """Where a prompt is read, and how many of its words are remembered there.

        As llama-server chooses it: the free slot that remembers a good part, else the one that has rested longest.
        """
        free = [slot for slot in self.slots if not slot.taken]
        found = max(free, key=lambda slot: _common(slot.read, words), default=None)
        if found is None or _common(found.read, words) <= SIMILAR * len(words):
            if len(self.slots) < most or found is None:
                found = Slot()
                self.slots.append(found)
            else:
                found = min(free, key=lambda slot: slot.used)
        found.taken, found.used = True, request
        return found, _common(found.read, words)

    def idle_seconds(self, now: float) -> float:
        if self.working or self.queue:
            return 0.0
        return max(0.0, now - (self.loaded_at if self.last_used is None else self.last_used))


@dataclass(slots=True, eq=False)
class Load:
    """A load under way. `instance` is set when it ended well, `failure` when it did not."""

    instance_id: str
    model: SimModel
    variant: str
    owner: Owner
    context_length: int
    config: Mapping[str, object]
    ttl_seconds: float | None
    seconds: float
    result: str
    reason: str
    lag_seconds: float
    drops_after: float
    asked_at: float
    started_at: float | None = None  # None while it waits for another model's load
    instance: Instance | None = None
    failure: str | None = None
    refused: bool = False  # by the guardrails, at once
    waiters: list[Guest] = field(default_factory=list)
    timer: Timer | None = None

    @property
    def ended(self) -> bool:
        return self.instance is not None or self.failure is not None

    def progress(self, now: float) -> float:
        if self.instance is not None:
            return 1.0
        if self.started_at is None or self.result == "stuck":
            return 0.0
        return min(0.99, (now - self.started_at) / self.seconds) if self.seconds > 0 else 0.99


@dataclass(frozen=True, slots=True)
class Stored:
    """An answer that the server keeps, for whoever goes on from it."""

    tokens: int  # of the whole conversation so far
    response: (
        Mapping[str, object] | None
    )  # as `GET /v1/responses/ID` shows it; LM Studio's own chat has no such route


_SECONDS = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m)?")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)(B|KB|MB|GB|TB)", re.IGNORECASE)
_SIZE_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def parse_model(text: str) -> SimModel:
    """`KEY[@VARIANT,…][:load time[:size]]`, as in `medicine-llm:12s:8GB`; the first variant is the one selected.
    A key with "embed" in it is an embedding model, one with "rerank" a reranker."""
    name, _, rest = text.strip().partition(":")
    seconds, _, size = rest.partition(":")
    key, _, variants = name.partition("@")
    quantization, *further = variants.upper().split(",") if variants else ["Q4_K_M"]
    if not key:
        raise ValueError(f'model "{text}" has no key; write KEY[:seconds[:size]], as in medicine-llm:12s:8GB')
    embedding = "embed" in key.lower()
    return SimModel(
        key,
        kind="embedding" if embedding else "reranker" if "rerank" in key.lower() else "llm",
        quantization=quantization,
        further=tuple(further),
        size_bytes=_parse_size(text, size) if size else 84_000_000 if embedding else 2_500_000_000,
        load_seconds=_parse_seconds(text, seconds) if seconds else 1.0 if embedding else 3.0,
        max_context_length=2_048 if embedding else 32_768,
        default_context_length=2_048 if embedding else 4_096,
        architecture="nomic-bert" if embedding else "llama",
    )


def _parse_seconds(text: str, seconds: str) -> float:
    match = _SECONDS.fullmatch(seconds)
    if match is None:
        raise ValueError(f'model "{text}": "{seconds}" is no load time; write 12, 12s, 500ms or 2m')
    return float(match[1]) * {"ms": 0.001, "s": 1.0, "m": 60.0}[match[2] or "s"]


def _parse_size(text: str, size: str) -> int:
    match = _SIZE.fullmatch(size)
    if match is None:
        raise ValueError(f'model "{text}": "{size}" is no size; write 4GB or 400MB')
    return round(float(match[1]) * _SIZE_UNITS[match[2].upper()])
