"""Which model a form names (`multipart/form-data`), as sound and pictures are sent to servers that take them.

LM Studio takes none. Of a form only the value of its last field `model` is looked at, and changed.
"""

import re
from typing import Final

from keepalive.protocols.asked import NAME_BYTES, NOTHING_ASKED, Asked

_BOUNDARY: Final = re.compile(rb';\s*boundary=(?:"([^"]+)"|([^\s;"]+))', re.IGNORECASE)
_NAMED: Final = re.compile(rb';\s*name\s*=\s*"?([^";\r\n]*)', re.IGNORECASE)


def boundary_of(kind: bytes | None) -> bytes | None:
    """What stands between the fields of a form, by its Content-Type; None where that is no form's."""
    if kind is None or not kind.lstrip().lower().startswith(b"multipart/form-data"):
        return None
    found = _BOUNDARY.search(kind)
    return (found[1] or found[2]) if found else None


def asked_in_form(body: bytes, boundary: bytes) -> Asked:
    """What a form asks for."""
    span = _model(body, boundary)
    if span is None:
        return NOTHING_ASKED
    name = body[span[0] : span[1]].decode("utf-8", "replace").strip()
    return Asked(None, readable=True, misnamed=True) if len(name) > NAME_BYTES else Asked(name, readable=True)


def renamed_form(body: bytes, boundary: bytes, name: str) -> bytes | None:
    """`body` asking for `name`; None where it names nobody."""
    span = _model(body, boundary)
    return None if span is None else body[: span[0]] + name.encode() + body[span[1] :]


def _model(body: bytes, boundary: bytes) -> tuple[int, int] | None:
    """Where the value of the last field `model` begins and ends."""
    mark, span, at = b"--" + boundary, None, 0
    while (at := body.find(mark, at)) >= 0:
        at += len(mark)
        begin = body.find(b"\r\n\r\n", at)
        if begin < 0:
            break
        named = _NAMED.search(body, at, begin)
        end = body.find(b"\r\n" + mark, begin + 2)
        if end < 0:
            break
        if named is not None and named[1] == b"model":
            span = begin + 4, max(end, begin + 4)
        at = end
    return span
