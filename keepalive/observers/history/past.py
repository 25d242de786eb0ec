"""What a file of an earlier life tells, for whoever asks once and keeps nothing: it is only ever read."""

import sqlite3
from contextlib import closing
from pathlib import Path
from statistics import median

from keepalive.core.errors import KeepaliveError
from keepalive.core.facts import LoadOutcome

_LOADS = """
    SELECT key, seconds FROM loads JOIN models ON models.id = loads.model
    WHERE url = ? AND outcome = ? AND seconds > 0 ORDER BY at
"""


_REQUESTS = """
    SELECT at, key, requests.seconds FROM requests JOIN models ON models.id = requests.model
    WHERE ? IS NULL OR url = ? ORDER BY at
"""


def is_history(path: Path) -> bool:
    """Whether a file is one that a daemon, or somebody else, keeps in SQLite."""
    try:
        with path.open("rb") as file:
            return file.read(16) == b"SQLite format 3\0"
    except OSError:
        return False


def past_requests(path: Path, url: str | None) -> list[tuple[float, str, float]]:
    """When which model was asked for and for how long it answered; `url` None: on whichever server.

    Raises KeepaliveError where the file does not tell.
    """
    try:
        with closing(_reading(path)) as database:
            rows = database.execute(_REQUESTS, (url, url)).fetchall()
    except (sqlite3.Error, ValueError) as error:
        raise KeepaliveError(f"{path}: it tells of no requests: {error}") from error
    return [
        (at, key, seconds)
        for at, key, seconds in rows
        if isinstance(at, float) and isinstance(key, str) and isinstance(seconds, float)
    ]


def _reading(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=1.0)


def past_loads(path: Path, url: str) -> dict[str, float]:
    """The seconds that loads usually took on the server at `url`, by key; nothing where the file does not tell."""
    try:
        with closing(_reading(path)) as database:
            rows = database.execute(_LOADS, (url, LoadOutcome.OK.value)).fetchall()
    except (sqlite3.Error, ValueError):
        return {}
    found: dict[str, list[float]] = {}
    for key, seconds in rows:
        if isinstance(key, str) and isinstance(seconds, float):
            found.setdefault(key, []).append(seconds)
    return {key: median(seconds) for key, seconds in found.items()}
