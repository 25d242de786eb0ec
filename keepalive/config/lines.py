"""The line of every key and table of a TOML text, which tomllib does not tell.

The text is cut into its statements, and tomllib reads each by itself: so what a key is, stays its business.
"""

import re
import tomllib
from collections.abc import Iterator
from typing import Any

from keepalive.config.mistakes import Key

_PIECE = re.compile(
    r'"""(?:\\.|[^\\])*?"{3,5}'
    r"|'''.*?'{3,5}"
    r'|"(?:\\.|[^"\\])*"'
    r"|'[^']*'"
    r"|#[^\n]*"
    r"|[\[{\]}\n]"
    r"|[^\"'#\[{\]}\n]+",
    re.DOTALL,
)


def find(text: str) -> dict[Key, int]:
    """The lines of a valid TOML text. What stands in a value is found by the line on which that begins."""
    lines: dict[Key, int] = {}
    counts: dict[Key, int] = {}
    table: Key = ()
    for line, statement in _statements(text):
        content = tomllib.loads(statement)
        if not statement.lstrip().startswith("["):
            for key in _keys(content):
                lines.setdefault(table + key, line)
            continue
        table = ()
        while content:
            ((name, content),) = content.items()
            table += (name,)
            if isinstance(content, list):  # [[…]] opens one more table
                counts[table] = counts.get(table, -1) + 1
                lines.setdefault(table, line)
                content = {}
            if table in counts:
                table += (counts[table],)
        lines.setdefault(table, line)
    return lines


def _statements(text: str) -> Iterator[tuple[int, str]]:
    """What ends at a line end that stands in no text and no bracket, with the line on which it begins."""
    start = depth = 0
    line = first = 1
    for piece in _PIECE.finditer(text):
        line += piece[0].count("\n")
        depth += (piece[0] in "[{") - (piece[0] in "]}")
        if piece[0] == "\n" and depth == 0:
            yield first, text[start : piece.end()]
            start, first = piece.end(), line
    yield first, text[start:]


def _keys(table: dict[str, Any], deep: int = 40) -> Iterator[Key]:
    """Down to where nobody writes any more: a.a.a.a… may go on for as long as the file is."""
    for name, value in table.items():
        yield (name,)
        if isinstance(value, dict) and deep:
            yield from ((name, *inner) for inner in _keys(value, deep - 1))
