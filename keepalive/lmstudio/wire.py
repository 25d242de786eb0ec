"""LM Studio's JSON to our types, and back.

Pure. An answer counts by the field that it must have, never by its status: LM Studio answers unknown routes
with 200 and an `error`, and its own crashes with 400. Evidence for every shape: LM Studio's documentation
(2026-04) and recorded answers of 0.4.25.
"""

import json
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from keepalive.core.errors import Reason, Refused, Unexpected, says_loading
from keepalive.core.facts import Entry, Instance, Odd, Tier, fold_key
from keepalive.core.names import COPY_NUMBER

Json = Any
Row = TypeVar("Row")

MESSAGE_MAX = 300

# Fields of a load that only the socket of the SDKs takes: over HTTP the schema is closed.
SDK_ALONE = frozenset({"num_parallel_sessions"})

# Texts of LM Studio's errors, by what they mean for us. Compared without case, by substring, in this order:
# a failed load may name its inner reason, and the reason is what decides when to try again.
_REASONS: tuple[tuple[str, Reason], ...] = (
    ("unexpected endpoint or method", Reason.UNKNOWN_ROUTE),
    ("failed to load image or audio file", Reason.OTHER),  # of a request, in llama.cpp's words
    ("invalid_api_key", Reason.UNAUTHORIZED),
    ("insufficient system resources", Reason.RESOURCES),
    ("model loading guardrails", Reason.RESOURCES),
    ("insufficient memory", Reason.RESOURCES),  # Metal
    ("not enough memory", Reason.RESOURCES),
    ("unable to allocate", Reason.RESOURCES),
    ("failed to allocate", Reason.RESOURCES),
    ("cannot allocate", Reason.RESOURCES),
    ("out of memory", Reason.RESOURCES),
    ("out_of_memory", Reason.RESOURCES),  # CUDA's names for it, and Vulkan's, HIP's and Metal's
    ("outofmemory", Reason.RESOURCES),
    ("outofdevicememory", Reason.RESOURCES),
    ("outofhostmemory", Reason.RESOURCES),
    ("insufficient vram", Reason.RESOURCES),
    ("more system memory", Reason.RESOURCES),
    ("bad_alloc", Reason.RESOURCES),
    ("has crashed", Reason.CRASHED),
    ("model was unloaded", Reason.UNLOADED),
    ("model unloaded", Reason.UNLOADED),
    ("model is unloaded", Reason.UNLOADED),
    ("model is not loaded", Reason.UNLOADED),  # llama-server's router
    ("is not running", Reason.UNLOADED),
    ("model reloaded", Reason.UNLOADED),
    ("no models loaded", Reason.UNLOADED),
    ("invalid model identifier", Reason.UNKNOWN_MODEL),
    ("model limit reached", Reason.LOAD_FAILED),
    ("' not found", Reason.UNKNOWN_MODEL),
    ("failed to load", Reason.LOAD_FAILED),
    ("error loading model", Reason.LOAD_FAILED),
    ("model_load_failed", Reason.LOAD_FAILED),
    ("model_not_found", Reason.UNKNOWN_MODEL),
)


def parsed(text: bytes) -> Json:
    """The JSON in `text`. Raises ValueError or RecursionError."""
    answer = json.loads(text)
    if b"\\ud" in text or b"\\uD" in text:
        # Halves of a character cannot be sent back, nor written into a log.
        answer = json.loads(json.dumps(answer, ensure_ascii=False).encode("utf-8", "replace"))
    return answer


def decode(body: bytes, what: str) -> Json:
    """The JSON in `body`; `Unexpected` with what stands there instead."""
    if not body:
        raise Unexpected(f"{what} was answered with nothing")
    try:
        return parsed(body)
    except (ValueError, RecursionError):
        start = body.lstrip()[:15].lower()
        kind = "HTML" if start.startswith((b"<html", b"<!doctype")) else "something that is not whole JSON"
        raise Unexpected(f"{what} was answered with {kind} ({len(body)} bytes)") from None


def refusal(status: int, answer: Json, *, retry_after: bool = False) -> Refused | None:
    """The error that an answer carries, in any of LM Studio's layouts, with any status; None without one.

    `retry_after`: its head said when to ask again.
    """
    error = answer.get("error") if isinstance(answer, Mapping) else None
    if not error and status < 400:
        return None
    if not error and isinstance(answer, Mapping):
        # How servers built on FastAPI say it, and those whose answer is the error itself: vLLM, gateways.
        error = answer.get("detail") or answer
    if isinstance(error, list):
        told = (part.get("msg") for part in error if isinstance(part, Mapping))
        error = "; ".join(msg for msg in told if isinstance(msg, str))
    kind = code = ""
    if isinstance(error, Mapping):
        message, kind, code = (str(error.get(k) or "") for k in ("message", "type", "code"))
    else:
        message = error if isinstance(error, str) else ""
    haystack = f"{message} {kind} {code}".lower()
    otherwise = Reason.UNKNOWN_ROUTE if status in (404, 405) else Reason.OTHER
    if status == 503 and (retry_after or "unavailable_error" in haystack or says_loading(str(answer))):
        otherwise = Reason.LOADING  # how llama-server says it, on every path
    why = reason(haystack, otherwise)
    return Refused(clean(message) or f"HTTP {status} {kind or code}".strip(), reason=why, status=status)


def reason(text: str, otherwise: Reason = Reason.OTHER) -> Reason:
    """What an error text of LM Studio's means."""
    haystack = text.lower()
    return next((reason for part, reason in _REASONS if part in haystack), otherwise)


def clean(text: str) -> str:
    """One line of bounded length, of what somebody else's program wrote."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text[: 4 * MESSAGE_MAX]).split())
    return line if len(line) <= MESSAGE_MAX else line[: MESSAGE_MAX - 1] + "…"


# --- listings ---------------------------------------------------------------------------------------


def by_key(entries: Iterable[Entry]) -> dict[str, Entry]:
    """Entries by folded key, and by each variant that is nobody's key."""
    entries = _once(entries)
    index = {fold_key(e.key): e for e in entries}
    for entry in entries:
        for variant in entry.variants:
            index.setdefault(fold_key(variant), entry)
    return index


def _once(entries: Iterable[Entry]) -> list[Entry]:
    """Each key once. Of two rows for one model either may show the instance that must not be loaded again."""
    found: dict[str, Entry] = {}
    for entry in entries:
        key = fold_key(entry.key)
        one = found.get(key)
        found[key] = entry if one is None else _both(one, entry)
    return list(found.values())


def _both(one: Entry, other: Entry) -> Entry:
    known = {instance.id for instance in one.instances}
    return replace(
        one,
        size_bytes=one.size_bytes or other.size_bytes,
        instances=one.instances + tuple(i for i in other.instances if i.id not in known),
        loading=one.loading or other.loading,
        variants=tuple(dict.fromkeys(one.variants + other.variants)),
        selected=one.selected or other.selected,
    )


def _rows(answer: Json, name: str, what: str) -> list[Mapping[str, Json]]:
    rows = answer.get(name) if isinstance(answer, Mapping) else None
    if not isinstance(rows, list) or not all(isinstance(row, Mapping) for row in rows):
        raise Unexpected(f"{what} was answered without a list of `{name}`")
    return rows


def read_rows(
    answer: Json,
    name: str,
    ident: str,
    what: str,
    read: Callable[[Mapping[str, Json]], Row],
    odd: Callable[[Odd], None] | None,
) -> list[Row]:
    """What `read` makes of the rows. One that it cannot read costs its own model, by every row of that, and is told
    to `odd`: whether that model is loaded shows nowhere.

    Where none can be read it is not this listing at all.
    """
    rows = answer.get(name) if isinstance(answer, Mapping) else None
    if not isinstance(rows, list):
        raise Unexpected(f"{what} was answered without a list of `{name}`")
    found: list[tuple[Json, Row]] = []
    lost: dict[str, str] = {}
    wrong: list[str] = []
    for row in rows:
        try:
            if not isinstance(row, Mapping):
                raise Unexpected(f"{what} lists something that is no model")
            found.append((row.get(ident), read(row)))
        except Unexpected as error:
            key = row.get(ident) if isinstance(row, Mapping) else None
            if isinstance(key, str) and key:
                names = fold_key(key), COPY_NUMBER.sub("", fold_key(key))
                lost |= dict.fromkeys(names, f"its row in the listing cannot be read: {error}")
                wrong.append(f"{error}, for {clean(key)}")
            else:
                wrong.append(str(error))
    if wrong and len(wrong) == len(rows):
        raise Unexpected(wrong[0])
    if wrong and odd is not None:
        told = "; ".join(dict.fromkeys(wrong[:3]))
        odd(Odd(f"{len(wrong)} of {len(rows)} rows are left out, as not to be read: {told}", lost))
    return [one for key, one in found if not (isinstance(key, str) and fold_key(key) in lost)]


def _text(row: Mapping[str, Json], name: str, what: str) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value:
        raise Unexpected(f"{what} lists a model without `{name}`")
    return value


def _count(value: Json) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _kind(value: Json) -> str:
    return "embedding" if isinstance(value, str) and value.startswith("embedding") else "llm"


def v1_entries(answer: Json, odd: Callable[[Odd], None] | None = None) -> list[Entry]:
    """`GET /api/v1/models`, where `loaded_instances` is the residency."""
    what = "GET /api/v1/models"

    def read(row: Mapping[str, Json]) -> Entry:
        instances = []
        for loaded in _rows(row, "loaded_instances", what):
            config = loaded.get("config")
            context = config.get("context_length") if isinstance(config, Mapping) else None
            instances.append(Instance(_text(loaded, "id", what), _count(context)))
        key = row.get("key")
        if not (isinstance(key, str) and key) and instances:
            key = COPY_NUMBER.sub("", instances[0].id)  # what is in memory must not be overlooked
        else:
            key = _text(row, "key", what)
        return Entry(
            key=key,
            kind=_kind(row.get("type")),
            size_bytes=_count(row.get("size_bytes")),
            instances=tuple(instances),
            variants=_variants(row),
            selected=_selected(row, key),
            context_max=_count(row.get("max_context_length")),
        )

    return _once(read_rows(answer, "models", "key", what, read, odd))


def _variants(row: Mapping[str, Json]) -> tuple[str, ...]:
    variants = row.get("variants")
    return tuple(v for v in variants if isinstance(v, str)) if isinstance(variants, list) else ()


def _selected(row: Mapping[str, Json], key: str) -> str | None:
    """The variant that the key means: named by newer versions, else told by the quantization."""
    selected = row.get("selected_variant")
    if isinstance(selected, str) and selected:
        return selected
    quantization = row.get("quantization")
    name = quantization.get("name") if isinstance(quantization, Mapping) else quantization
    return f"{key}@{name.lower()}" if isinstance(name, str) and name else None


_COPY = re.compile(r"(?P<key>.+):(?P<number>[0-9]+)")


def v0_entries(answer: Json, odd: Callable[[Odd], None] | None = None) -> list[Entry]:
    """`GET /api/v0/models`, where `state` is the residency; anything but `loaded` is not ready.

    Further copies have rows of their own (`key:2`), even while the row of the bare key reads `not-loaded`.
    """
    what = "GET /api/v0/models"

    def read(row: Mapping[str, Json]) -> Entry:
        key, state = _text(row, "id", what), _text(row, "state", what)
        loaded = (Instance(key, _count(row.get("loaded_context_length"))),) if state == "loaded" else ()
        return Entry(
            key,
            _kind(row.get("type")),
            None,
            loaded,
            loading=state == "loading",
            selected=_selected(row, key),
            context_max=_count(row.get("max_context_length")),
        )

    found: dict[str, Entry] = {}
    copies: list[Entry] = []
    for entry in read_rows(answer, "data", "id", what, read, odd):
        if _COPY.fullmatch(entry.key):
            copies.append(entry)
        else:
            found[entry.key] = _both(found[entry.key], entry) if entry.key in found else entry
    for copy in copies:
        match = _COPY.fullmatch(copy.key)
        base = found.get(match["key"]) if match else None
        if base is None:
            found[copy.key] = copy  # a key that merely looks like a copy
            continue
        found[base.key] = _both(base, copy)
    return _once(found.values())


def openai_entries(answer: Json, odd: Callable[[Odd], None] | None = None) -> list[Entry]:
    """`GET /v1/models`: names, and nothing about what is loaded."""
    what = "GET /v1/models"
    if answer == {"object": "list", "data": None}:
        return []  # how Ollama says that it has none
    if isinstance(answer, list) and answer:
        answer = {"data": answer}  # Together and GitHub list without anything around it
    return read_rows(answer, "data", "id", what, lambda row: Entry(key=_text(row, "id", what)), odd)


def with_loading(entries: Iterable[Entry], v0: Iterable[Entry]) -> list[Entry]:
    """v1 entries, told by the v0 listing of the same server which of them are being loaded."""
    loading = {fold_key(e.key): e.loading for e in v0}
    return [replace(e, loading=loading.get(fold_key(e.key))) for e in entries]


# --- calls ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Loaded:
    """A load that was answered; `seconds` as LM Studio measured it, where it says so."""

    instance_id: str | None
    seconds: float | None


def loaded(answer: Json) -> Loaded:
    """The answer of `POST /api/v1/models/load`, which comes once, at the end of the load."""
    instance_id = answer.get("instance_id") if isinstance(answer, Mapping) else None
    if not isinstance(instance_id, str) or not instance_id:
        raise Unexpected("POST /api/v1/models/load was answered without an `instance_id`")
    seconds = answer.get("load_time_seconds")
    known = isinstance(seconds, (int, float)) and not isinstance(seconds, bool) and 0 <= seconds < 1e6
    return Loaded(instance_id, float(seconds) if known else None)


def ping(kind: str, target: str, tier: Tier, lease: float | None = None) -> tuple[str, Mapping[str, Json]]:
    """Path and body of the smallest request that makes a model answer.

    The prompt is constant, so that it takes at most one place in a prompt cache. `lease` in seconds: on
    0.3.x a `ttl`, which counts only when this very request loads the model.
    """
    body: dict[str, Json]
    if kind == "embedding":
        path, body = "/v1/embeddings", {"model": target, "input": "."}
    elif kind == "reranker":
        # As Jina's API has it, and llama-server, vLLM and others after it.
        path, body = "/v1/rerank", {"model": target, "query": ".", "documents": ["."]}
    else:
        path = "/v1/chat/completions"
        body = {
            "model": target,
            "messages": [{"role": "user", "content": "."}],
            "max_tokens": 1,
            "stream": False,
        }
        if tier is not Tier.OPENAI:
            body["temperature"] = 0
    if lease is not None:
        body["ttl"] = int(lease)
    return path, body


def own_ping(own: tuple[str, Mapping[str, Json]], target: str) -> tuple[str, Mapping[str, Json]]:
    """A ping that its owner wrote, with the copy that is asked put in."""
    path, body = own
    return path, {**body, "model": target}


def answered_by(answer: Json) -> str | None:
    """The model that an inference answer names as its author."""
    name = answer.get("model") if isinstance(answer, Mapping) else None
    return name if isinstance(name, str) and name else None


def tokens(answer: Json) -> int | None:
    """How many tokens the prompt had that was answered."""
    usage = answer.get("usage") if isinstance(answer, Mapping) else None
    if not isinstance(usage, Mapping):
        return None
    return _count(usage.get("prompt_tokens")) or _count(usage.get("input_tokens"))


def quotes(message: str, body: Json) -> bool:
    """Whether a message repeats what a body says: no prompt may go into a log by way of an error."""
    said = " ".join(_said(body))
    return any(message[at : at + 12] in said for at in range(0, len(message) - 11, 4))


def _said(value: Json) -> Iterator[str]:
    match value:
        case str():
            yield from value.split()
        case Mapping():
            for inner in value.values():
                yield from _said(inner)
        case list() | tuple():
            for inner in value:
                yield from _said(inner)


def is_answer_of(
    name: str | None, accepted: Iterable[str], tier: Tier, listed: Container[str] = frozenset[str]()
) -> bool:
    """Whether an answer signed `name` comes from the model that was asked.

    LM Studio signs with the instance id, and lets another model answer for an unknown name. Other servers
    sign more freely: with a path, with a revision behind the name, or not at all. Where one stands in front of
    others (llama-swap, LiteLLM) it may be any name that the model has over there, the file's for one: another model
    is what signs with another name that is `listed`, folded.
    """
    folded = [fold_key(a) for a in accepted]
    if tier is not Tier.OPENAI:
        return name is not None and fold_key(name) in folded
    if name is None:
        return True
    said = fold_key(name)
    return any(a in said or said in a for a in folded) or not any(one in listed for one in _signed(said))


def _signed(name: str) -> Iterator[str]:
    """The names that a signature may stand for: with a path before it, a revision or a file's ending behind it."""
    while name:
        yield name
        yield name.partition("@")[0]
        yield name.removesuffix(".gguf")
        name = name.partition("/")[2]
