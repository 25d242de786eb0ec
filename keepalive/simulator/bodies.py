"""What a request body may hold: JSON, the fields of closed schemas, and how long its prompt is."""

import json
from typing import Any

from keepalive.simulator.exchange import native_error

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
