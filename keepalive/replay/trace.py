"""The files that a replay reads: requests as `second,model,answer_seconds`, models as `model,gigabytes,load_seconds`.

Columns stand in any order and more of them are let be, as are lines that begin with "#". Requests may also be what the
daemon has written into its log as JSON (`server.log_format`), by itself or in the journal's (`journalctl -o json`).
"""

import csv
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from itertools import chain

from keepalive.core.errors import KeepaliveError

# No clock of a trace and no model says more.
SECONDS_MAX = 1e10
GIGABYTES_MAX = 1e6


class TraceError(KeepaliveError):
    """A file is not what a replay can use."""


@dataclass(frozen=True, slots=True)
class Request:
    second: float
    model: str
    answer_seconds: float


@dataclass(frozen=True, slots=True)
class Card:
    """A model as far as a replay has to know it."""

    model: str
    bytes: int
    load_seconds: float


def read_requests(lines: Iterable[str], name: str) -> list[Request]:
    """In the order of time. TraceError says where a line is wrong."""
    lines = iter(lines)
    first = next(lines, "")
    if first.startswith("{"):
        return _from_log(chain([first], lines), name)
    rows = _rows(chain([first], lines), name, ("second", "model", "answer_seconds"))
    requests = [
        Request(
            _number(row, "second", place, least=-SECONDS_MAX, most=SECONDS_MAX),
            _text(row, "model", place),
            _number(row, "answer_seconds", place, least=0.0, most=SECONDS_MAX),
        )
        for place, row in rows
    ]
    if not requests:
        raise TraceError(f"{name}: there is no request in it; write lines with second,model,answer_seconds")
    return sorted(requests, key=lambda r: r.second)


def _from_log(lines: Iterable[str], name: str) -> list[Request]:
    """Whatever else a log says is let be."""
    requests = [request for line in lines if (request := _logged(line)) is not None]
    if not requests:
        raise TraceError(f"{name}: no line of this log tells of a request for a model that is kept")
    return sorted(requests, key=lambda r: r.second)


def _logged(line: str) -> Request | None:
    try:
        row = json.loads(line)
        at = None
        if "MESSAGE" in row:
            at, row = int(row["__REALTIME_TIMESTAMP"]) / 1e6, json.loads(row["MESSAGE"])
        if row.get("event") != "proxy.request" or not row.get("model"):
            return None
        if at is None:
            at = datetime.fromisoformat(row["timestamp"]).timestamp()
        seconds, waited = float(row["seconds"]), float(row["waited"])
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        return None
    # The line is written at the end of the request.
    return Request(at - seconds, str(row["model"]), max(0.0, seconds - waited))


def read_cards(lines: Iterable[str], name: str) -> list[Card]:
    """TraceError says where a line is wrong."""
    cards: dict[str, Card] = {}
    for place, row in _rows(lines, name, ("model", "gigabytes", "load_seconds")):
        key = _text(row, "model", place)
        if key in cards:
            raise TraceError(f"{place}: {key} stands there a second time; leave one of them out")
        size = _number(row, "gigabytes", place, least=0.0, most=GIGABYTES_MAX)
        if size == 0.0:
            raise TraceError(f"{place}: {key} takes no memory; write gigabytes above 0")
        seconds = _number(row, "load_seconds", place, least=0.0, most=86_400.0)
        cards[key] = Card(key, round(size * 1e9), seconds)
    return list(cards.values())


def _rows(
    lines: Iterable[str], name: str, columns: tuple[str, ...]
) -> Iterator[tuple[str, Mapping[str, str]]]:
    numbered = ((number, line) for number, line in enumerate(lines, start=1) if not line.startswith("#"))
    places: list[int] = []

    def told() -> Iterator[str]:
        for number, line in numbered:
            places.append(number)
            yield line

    try:
        reader = csv.DictReader(told())
        missing = [column for column in columns if column not in (reader.fieldnames or ())]
        if missing:
            raise TraceError(f"{name}: its first line names no {missing[0]}; write {','.join(columns)}")
        for row in reader:
            yield f"{name}:{places[-1]}", row
    except csv.Error as error:
        raise TraceError(f"{name}:{places[-1] if places else 1}: {error}") from error


def _text(row: Mapping[str, str | None], column: str, place: str) -> str:
    value = (row[column] or "").strip()
    if not value or not value.isprintable() or len(value) > 256:
        raise TraceError(f"{place}: {column} is no name of a model; write its key")
    return value


def _number(row: Mapping[str, str | None], column: str, place: str, *, least: float, most: float) -> float:
    text = row[column] or ""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not least <= value <= most:
        raise TraceError(f'{place}: {column} "{text[:40]}" is no number from {least:g} to {most:g}')
    return value
