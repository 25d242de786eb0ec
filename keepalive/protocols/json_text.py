"""JSON as LM Studio's runtime reads it, which forgives more than Python does, and less."""

import json
from typing import Final


def text(body: bytes) -> str:
    """The characters of a body, in whichever encoding."""
    # Bytes that are no characters are replaced, as LM Studio's runtime does: they do not make a body invalid.
    if body.startswith(b'{"'):
        return body.decode("utf-8", "replace")  # no other encoding begins like that
    return body.decode(json.detect_encoding(body), "replace")


# Python reads no integer of thousands of digits, JavaScript does; so every number is a float here. NaN and Infinity
# are no JSON, and LM Studio says so; but servers in Python read them, and would load the model that stands beside.
JSON: Final = json.JSONDecoder(parse_int=float)


def read(said: str) -> object:
    """The value that is all of `said`. Raises ValueError, or RecursionError where it is too deep."""
    if said.startswith("{"):
        # Without a look for blanks around it, which nearly never are there.
        value, end = JSON.raw_decode(said)
        if not said[end:].strip(" \t\n\r"):
            return value
    return JSON.decode(said)


def parsed(raw: bytes) -> object:
    """One value; None for what is none."""
    try:
        return JSON.decode(raw.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return None
