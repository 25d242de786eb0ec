"""Readers of a ping of one's own: the path that is asked, and the body, which has to be JSON in the end."""

import json
import math
import re
from collections.abc import Iterator, Mapping
from datetime import date, datetime, time
from types import MappingProxyType
from typing import Any, NoReturn

from pydantic import ValidationError
from pydantic_core import InitErrorDetails

from keepalive.config.mistakes import Key, looks_secret, shown

_PATH = re.compile(r"(/(?!\.{1,2}(/|$))([A-Za-z0-9._~!$&'()*+,;=:@-]|%[0-9A-Fa-f]{2})+)+/?", re.ASCII)
_CHANGES_MODELS = re.compile(r"/models/(un|down)?load\b", re.IGNORECASE)

# Nobody writes this by hand, and what takes a body apart calls itself for each table in a table.
_DEEPEST = 32

EXAMPLE = {"query": "ping", "documents": ["ping"]}


def read_path(value: str) -> str:
    if not _PATH.fullmatch(value) or len(value) > 256:
        # People copy the whole URL, or leave the first slash out.
        meant = "/" + re.split(r"[?#]", re.sub(r"^[A-Za-z]+://[^/]*", "", value))[0].lstrip("/")
        sound = _PATH.fullmatch(meant) and len(meant) <= 60 and not looks_secret(meant)
        raise ValueError(f'{shown(value)} is no path from "/"; write "{meant if sound else "/v1/rerank"}"')
    if _CHANGES_MODELS.search(value):
        why = "changes what is loaded, and a ping only asks"
        raise ValueError(f'{shown(value)} {why}; write a route that answers, such as "/v1/rerank"')
    return value


def read_body(value: object) -> Mapping[str, Any]:
    """A table, or the text of a JSON object, which is how a variable of the environment says it."""
    if isinstance(value, str):
        value = _parsed(value)
    if not isinstance(value, dict):
        raise ValueError(f"{shown(value)} is no table; {_advice()}")  # noqa: TRY004  # for pydantic
    wrong = [*_not_ours(value), *no_json(value, ())]
    if wrong:
        # Each in its own place: pydantic puts the way to the body in front.
        raise ValidationError.from_exception_data(
            "body",
            [
                InitErrorDetails(type="value_error", loc=key, input=None, ctx={"error": ValueError(message)})
                for key, message in wrong
            ],
        )
    return MappingProxyType(value)


def _parsed(text: str) -> object:
    try:
        return json.loads(text, parse_constant=no_constant)
    except json.JSONDecodeError as error:
        # Without the text: a body may hold anything.
        raise ValueError(f"is no JSON: {error.msg} at character {error.pos + 1}; {_advice()}") from None
    except (ValueError, RecursionError):
        raise ValueError(f"is no JSON that can be read; {_advice()}") from None


def no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _advice() -> str:
    return f"write {{ {', '.join(f'{key} = {json.dumps(value)}' for key, value in EXAMPLE.items())} }}"


def _not_ours(body: Mapping[str, Any]) -> Iterator[tuple[Key, str]]:
    if "model" in body:
        yield ("model",), "is put in by keepalive, which knows the copy that it asks; leave it out"
    if body.get("stream", False) is not False:
        yield ("stream",), "makes the answer a stream, and a ping reads a whole one; leave it out"


def no_json(value: object, key: Key) -> Iterator[tuple[Key, str]]:
    """Where it cannot be sent as JSON, and why: whatever TOML can hold and JSON cannot."""
    if len(key) > _DEEPEST:
        yield key, f"lies in more than {_DEEPEST} tables and lists; write a flatter body"
        return
    match value:
        case dict():
            for name, inner in value.items():
                yield from no_json(name, (*key, name))
                yield from no_json(inner, (*key, name))
        case list():
            for number, inner in enumerate(value):
                yield from no_json(inner, (*key, number))
        case datetime() | date() | time():
            yield key, f"{shown(value)} is a date or a time, which JSON does not have; write it in quotes"
        case float() if not math.isfinite(value):
            yield key, f"{shown(value)} is no number that JSON has; write another one"
        case int() if abs(value) >= 2**63:
            yield key, "is too large a number; write one of at most 63 bits"
        case str() if any("\ud800" <= c <= "\udfff" for c in value):
            yield key, "holds half of a character, which cannot be sent; write it anew"
