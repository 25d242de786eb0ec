"""What a request body may hold: JSON, the fields of closed schemas, and how long its prompt is."""

import json
import zlib
from collections.abc import Iterator
from typing import Any

from keepalive.simulator.exchange import flat, native_error

NATIVE_FIELDS = frozenset(
    [
        "model",
        "input",
        "system_prompt",
        "integrations",
        "stream",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "repeat_penalty",
        "max_output_tokens",
        "reasoning",
        "context_length",
        "store",
        "previous_response_id",
    ]
)
LOAD_FIELDS = {
    "model": str,
    "context_length": int,
    "eval_batch_size": int,
    "flash_attention": bool,
    "num_experts": int,
    "offload_kv_cache_to_gpu": bool,
    "echo_load_config": bool,
}


# How zlib calls the two that Express's body parser inflates; a further one, br, is refused here as an unknown one is.
WINDOW_BITS = {"gzip": 31, "deflate": 15}


def inflated(body: bytes, encoding: str) -> bytes:
    encoding = encoding.strip().lower()
    if encoding in ("", "identity"):
        return body
    if encoding not in WINDOW_BITS:
        raise flat(415, f'unsupported content encoding "{encoding}"')
    inflater = zlib.decompressobj(WINDOW_BITS[encoding])
    try:
        plain = inflater.decompress(body)
    except zlib.error:
        raise flat(400, "incorrect header check") from None
    if not inflater.eof:
        raise flat(400, "unexpected end of file")
    return plain


def parsed(body: bytes) -> dict[str, Any]:
    value = json.loads(body or b"{}")
    if not isinstance(value, dict):
        raise ValueError("the body is no JSON object")  # noqa: TRY004 - as for what is no JSON at all
    return value


def only_known_fields(payload: dict[str, Any], known: frozenset[str]) -> None:
    """E15: the native routes have closed schemas."""
    if unknown := [field for field in payload if field not in known]:
        names = ", ".join(f"'{field}'" for field in unknown)
        raise native_error(
            400, "invalid_request", f"Unrecognized key(s) in object: {names}", code="unrecognized_keys"
        )


def required(payload: dict[str, Any], *fields: str) -> None:
    """E16."""
    for field in fields:
        if payload.get(field) is None:
            raise native_error(
                400,
                "invalid_request",
                f'"{field}" is required',
                code="missing_required_parameter",
                param=field,
            )


def prompt_tokens(payload: dict[str, Any]) -> int:
    """Words stand for tokens; 8 more for the template."""
    count = 8
    pending: list[Any] = [
        payload.get(field) for field in ("messages", "prompt", "input", "system", "system_prompt")
    ]
    while pending:
        part = pending.pop()
        if isinstance(part, str):
            count += len(part.split())
        elif isinstance(part, list):
            pending.extend(part)
        elif isinstance(part, dict):
            pending.extend(part.get(field) for field in ("content", "text"))
    return count


def prompt_words(payload: dict[str, Any]) -> list[str]:
    """A prompt as the template makes it, tools first, then who says what, in order; a word is a token."""
    told: list[str] = ["<begin>"]
    for field in ("tools", "functions"):
        if payload.get(field):
            told += ["<tools>", *json.dumps(payload[field]).split()]
    for field in ("system", "system_prompt", "instructions"):
        if payload.get(field):
            told += ["<system>", *_words(payload[field])]
    for field in ("messages", "input", "prompt"):
        items = payload.get(field)
        for item in items if isinstance(items, list) else [items] if items else []:
            role = item.get("role", "user") if isinstance(item, dict) else "user"
            told += [f"<{role}>", *_words(item)]
    return [*told, "<assistant>"]


def _words(part: Any) -> Iterator[str]:
    match part:
        case str():
            yield from part.split()
        case list():
            for inner in part:
                yield from _words(inner)
        case dict():
            for field in ("content", "text"):
                yield from _words(part.get(field))
            if part.get("tool_calls"):
                yield from json.dumps(part["tool_calls"]).split()


def contents(payload: dict[str, Any]) -> Iterator[str | list[Any]]:
    """What the messages of a body say: a text, or a list of parts."""
    if isinstance(said := payload.get("input"), str):
        yield said
    for field in ("messages", "input"):
        items = payload.get(field)
        for item in items if isinstance(items, list) else []:
            content = item.get("content") if isinstance(item, dict) else None
            if isinstance(content, (str, list)):
                yield content
            elif isinstance(item, dict) and content is None:
                yield [item]  # LM Studio's own chat: the parts are the list


def has_image(payload: dict[str, Any]) -> bool:
    parts = [part for content in contents(payload) if isinstance(content, list) for part in content]
    return any(isinstance(part, dict) and "image" in str(part.get("type")) for part in parts)
