"""Several upstreams' listings of models as one, and further names in it, in the shape that was asked for."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from keepalive.core.facts import fold_key
from keepalive.protocols.json_text import text

#: What a row is known by, for each name that the rows have together.
_IDENT: Final = {"data": "id", "models": "key"}


class Listing:
    """One upstream's answer; `rows` is the name of its list."""

    def __init__(self, body: bytes, rows: str) -> None:
        """Raises ValueError when it is no listing."""
        try:
            answer = json.loads(text(body))
        except RecursionError:
            raise ValueError("nested too deeply") from None
        if isinstance(answer, list) and answer and rows == "data":
            answer = {"object": "list", "data": answer}  # as clients of more than one such server read it
        found = answer.get(rows) if isinstance(answer, dict) else None
        if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
            raise ValueError("no listing")
        self._answer: dict[str, object] = answer
        self._rows = rows
        self.found: list[dict[str, object]] = found

    def written(self, found: Iterable[Mapping[str, object]]) -> bytes:
        """The same with these rows."""
        answer = {**self._answer, self._rows: list(found)}
        return json.dumps(answer, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")


def merged(listings: Sequence[tuple[Listing, Mapping[str, Sequence[str]]]], rows: str) -> bytes:
    """All of them as one, each with its aliases by the folded names of its rows.

    Of rows with one name the first upstream's stands; an alias comes before a model that is called so.
    """
    ident = _IDENT[rows]
    every: dict[object, Mapping[str, object]] = {}
    called: dict[object, Mapping[str, object]] = {}
    for listing, aliases in listings:
        for row in listing.found:
            name = row.get(ident)
            if not isinstance(name, str):
                every[id(row)] = row
                continue
            every.setdefault(fold_key(name), row)
            for alias in aliases.get(fold_key(name), ()):
                called.setdefault(fold_key(alias), {**row, ident: alias})
    return listings[0][0].written((every | called).values())
