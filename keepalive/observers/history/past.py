"""What a file of an earlier life tells, for whoever asks once and keeps nothing: it is only ever read."""

import sqlite3
from contextlib import closing
from pathlib import Path
from statistics import median

from keepalive.core.facts import LoadOutcome

_LOADS = """
    SELECT key, seconds FROM loads JOIN models ON models.id = loads.model
    WHERE url = ? AND outcome = ? AND seconds > 0 ORDER BY at
"""


def past_loads(path: Path, url: str) -> dict[str, float]:
    """The seconds that loads usually took on the server at `url`, by key; nothing where the file does not tell."""
    try:
        with closing(
            sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=1.0)
        ) as database:
            rows = database.execute(_LOADS, (url, LoadOutcome.OK.value)).fetchall()
    except (sqlite3.Error, ValueError):
        return {}
    found: dict[str, list[float]] = {}
    for key, seconds in rows:
        if isinstance(key, str) and isinstance(seconds, float):
            found.setdefault(key, []).append(seconds)
    return {key: median(seconds) for key, seconds in found.items()}
