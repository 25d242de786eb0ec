"""`keepalive replay`: files in, a table, JSON or a picture out."""

import csv
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from keepalive.admin.words import span
from keepalive.config import Config
from keepalive.config.mistakes import nearest
from keepalive.config.values import read_memory
from keepalive.core.errors import KeepaliveError
from keepalive.core.records import Policy
from keepalive.observers.history.past import is_history, past_loads, past_requests
from keepalive.replay import (
    POLICIES,
    Card,
    Report,
    Request,
    TraceError,
    picture,
    read_cards,
    read_requests,
    replay,
)

# The order in which a script reads them; more may follow.
FIELDS = (
    "policy", "hours_waited", "waited_share", "p95_seconds", "p99_seconds", "worst_seconds", "loads", "evictions",
    "ahead_used", "ahead_unused",
)  # fmt: skip


def run(
    requests: Sequence[Request],
    settings: Config | None,
    models: Path | None,
    memory: str | None,
    policies: Sequence[str],
) -> list[Report]:
    """One report for each of `policies`; raises KeepaliveError for what cannot be replayed."""
    for name in policies:
        if name not in POLICIES:
            near = nearest(name, POLICIES)
            raise TraceError(f'--policy: "{name}" is not known; write {near or ", ".join(POLICIES)}')
    cards: dict[str, Card] = {}
    if models is not None:
        with _opened(models) as lines:
            cards = {card.model: card for card in read_cards(lines, str(models))}
    kept: dict[str, Policy] = {}
    budget = None
    if settings is not None:
        budget = settings.upstreams[0].memory
        cards = _from_config(settings) | cards
        kept = {
            one.key: Policy(auto=one.auto, idle=one.idle, patience=one.patience)
            for one in settings.kept
            if one.upstream == settings.upstreams[0].name
        }
    if memory is not None:
        try:
            budget = read_memory(memory)
        except ValueError as error:
            raise TraceError(f"--memory: {error}") from None
    asked = {request.model for request in requests}
    if not asked & cards.keys():
        raise TraceError(
            f"nothing tells what {sorted(asked)[0]} takes and how long it loads; write it into a file with "
            "model,gigabytes,load_seconds and name that with --models"
        )
    chosen = dict.fromkeys(policies or POLICIES)
    return [replay(name, requests, list(cards.values()), budget, kept) for name in chosen]


def read(trace: Path | None, settings: Config | None) -> list[Request]:
    """The requests of a trace, a log or a history; of the configured one where none is named."""
    own = settings.history.path if settings is not None else None
    path = trace or own or None
    if path is None:
        raise TraceError(
            "there is no history: neither history.path nor server.state_dir is set; name a trace"
        )
    if not is_history(path):
        with _opened(path) as lines:
            return read_requests(lines, str(path))
    url = settings.upstreams[0].url if settings is not None and path == own else None
    requests = [Request(*row) for row in past_requests(path, url)]
    if not requests:
        raise TraceError(f"{path}: there is no request in it yet")
    return requests


def export(requests: Sequence[Request], to: Path) -> None:
    """Write them as a trace; "-" is the standard output."""
    rows = [("second", "model", "answer_seconds")]
    rows += [(f"{r.second:.3f}", r.model, f"{r.answer_seconds:.3f}") for r in requests]
    if str(to) == "-":
        csv.writer(sys.stdout, lineterminator="\n").writerows(rows)
        return
    try:
        with to.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)
    except OSError as error:
        raise KeepaliveError(f"{to}: cannot be written: {error.strerror}") from error


def _from_config(settings: Config) -> dict[str, Card]:
    """The models whose memory the file tells, and of which the history knows how long they load."""
    first = settings.upstreams[0]
    known = past_loads(settings.history.path, first.url) if settings.history.path else {}
    return {
        one.key: Card(one.key, one.memory, known[one.key])
        for one in settings.kept
        if one.memory is not None and one.key in known
    }


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield file
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise TraceError(f"{path}: cannot be read: {why}") from error


def documents(reports: Sequence[Report]) -> list[dict[str, Any]]:
    return [
        {
            name: round(value, 4) if isinstance(value, float) else value
            for name, value in ((name, getattr(report, name)) for name in FIELDS)
        }
        for report in reports
    ]


def table(reports: Sequence[Report]) -> RenderableType:
    head = ("POLICY", "WAITED", "OF ALL", "P95", "P99", "WORST", "LOADS", "EVICTED", "AHEAD USED", "UNUSED")
    rows = Table(box=None, padding=(0, 2, 0, 0))
    for name in head:
        rows.add_column(name, justify="left" if name == "POLICY" else "right", no_wrap=True)
    for r in reports:
        rows.add_row(
            r.policy,
            f"{r.hours_waited:.1f} h",
            f"{100 * r.waited_share:.1f} %",
            span(r.p95_seconds),
            span(r.p99_seconds),
            span(r.worst_seconds),
            str(r.loads),
            str(r.evictions),
            str(r.ahead_used),
            str(r.ahead_unused),
        )
    left_out = dict.fromkeys(model for report in reports for model in report.left_out)
    notes = [Text(f"left out, as too large or not described: {', '.join(left_out)}")] if left_out else []
    return Group(rows, *notes)


def draw(path: Path, reports: Sequence[Report]) -> None:
    try:
        path.write_text(picture(reports), encoding="utf-8")
    except OSError as error:
        raise KeepaliveError(f"{path}: cannot be written: {error.strerror}") from error
