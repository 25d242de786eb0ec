"""A body with another name for its model, and every other byte as it came."""

import codecs
import json
from typing import Final

from keepalive.protocols.toplevel import TopLevel

# What may stand in front of the text, and how the text behind it is written.
_MARKS: Final = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


def renamed(body: bytes, name: str, field: str = "model") -> bytes | None:
    """`body` asking for `name`, in `field`; None where it is no JSON object.

    Of several equal keys the last counts, so that one is changed. Where there is none it is put in front.
    """
    mark, encoding = next((m for m in _MARKS if body.startswith(m[0])), (b"", json.detect_encoding(body)))
    plain = body[len(mark) :] if mark else body
    scan = TopLevel((field,), 0)
    if encoding == "utf-8":
        scan.feed(plain)
    else:
        # What is no character is replaced by one of its own width, so that what follows keeps its place.
        told = plain.decode(encoding, "replace").encode("utf-8", "replace")
        scan.feed(told)
    if not scan.complete:
        return None
    said = json.dumps(name)
    begin, end = scan.spans.get(field, (scan.opened, scan.opened))
    if begin == end:
        said = f'"{field}":{said}' + ("" if scan.bare else ",")
    if encoding != "utf-8":
        begin, end = (len(told[:at].decode("utf-8", "replace").encode(encoding)) for at in (begin, end))
    return b"".join((mark, plain[:begin], said.encode(encoding), plain[end:]))
