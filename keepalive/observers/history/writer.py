"""The thread that owns the file, so that nobody waits for a disk.

What is to be written goes into a queue that never makes anybody wait; about once a second the thread takes what
is there and writes it in one transaction. Whatever the disk does costs the history alone: what could not be
written is tried again, what does not fit into the queue any more is lost, the oldest first, and `trouble` says
so meanwhile. A damaged file is put aside for a new one; one that is somebody else's is left as it is.
"""

import os
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from keepalive.core.errors import KeepaliveError
from keepalive.observers.history.store import Past, Place, Store, Unusable, is_damage, set_aside
from keepalive.observers.history.story import Entry

# Rows that wait for the disk: about 4 MB, and hours of a usual day.
ROWS_WAITING = 20_000
# So many are written before it is seen to it that the file stays as small as it is to be.
ROWS_UNBOUNDED = 20_000
# One transaction holds what came within this time.
GATHER = 1.0
# The end of a daemon that was killed is known to within this time.
HEARTBEAT = 30.0
RETRY = 5.0
# Age is first looked at after an hour, and an hour after the clock was set: a clock that is wrong when the
# machine starts must not make everything look old.
PRUNE_INTERVAL = 3600.0
# A disk that has not answered for so long is in trouble.
STUCK = 5.0
# The end of the daemon waits for the last rows no longer than this.
LAST_WORDS = 2.0

Told = Callable[[Mapping[Place, Past]], None]
_DISK = (
    sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_IOERR, sqlite3.SQLITE_FULL, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PROTOCOL,
    sqlite3.SQLITE_PERM,
)  # fmt: skip


class HistoryError(KeepaliveError):
    """The history cannot be kept as it should."""


class Writer:
    """Keeps rows in the file at `path`. `report` is told, in the thread, once when trouble begins."""

    def __init__(self, path: Path, wall: Callable[[], float], report: Callable[[HistoryError], None]) -> None:
        self._path = path
        self._wall = wall
        self._report = report
        self._began = wall()
        self._rows: deque[tuple[Place, Entry]] = deque(maxlen=ROWS_WAITING)
        self._asked: deque[tuple[tuple[Place, ...], Told]] = deque()
        self._woken = threading.Event()
        self._ending = threading.Event()
        # Whether the file can be read has turned out, and `told` has been called.
        self.tried = threading.Event()
        self._store: Store | None = None
        self._why: str | None = "it has not been opened yet"
        self._said = False  # that it is in trouble
        self._busy_since: float | None = None
        self._retry_at = 0.0
        self._prune_at = time.monotonic() + PRUNE_INTERVAL
        self._written = 0  # since it was last bounded
        self._thread = threading.Thread(target=self._run, name="history", daemon=True)

    # --- never waits ----------------------------------------------------------------------------------

    def start(self) -> None:
        self._thread.start()

    def put(self, place: Place, entry: Entry) -> None:
        self._rows.append((place, entry))
        if not self._woken.is_set():
            self._woken.set()

    def ask(self, places: Iterable[Place], told: Told) -> None:
        """Have `told` called, in the thread, with what is known of `places` before anything else is written.

        As soon as the file can be read: that may be never.
        """
        self._asked.append((tuple(places), told))
        self._woken.set()

    def clock_jumped(self) -> None:
        self._prune_at = time.monotonic() + PRUNE_INTERVAL

    @property
    def trouble(self) -> str | None:
        since = self._busy_since
        stuck = 0.0 if since is None else time.monotonic() - since
        why = f"the disk has not answered for {stuck:.0f} s" if stuck > STUCK else self._why
        return None if why is None else f"{self._path}: {why}"

    def end(self) -> None:
        """Write what is left. Waits for a while; on a disk that hangs, the rest is lost."""
        self._ending.set()
        self._woken.set()
        if self._thread.ident is not None:
            self._thread.join(LAST_WORDS)

    # --- the thread -----------------------------------------------------------------------------------

    def _run(self) -> None:
        over = False
        while not over:
            self._woken.wait(HEARTBEAT if self._why is None else RETRY)
            if not self._asked:
                self._ending.wait(GATHER)
            self._woken.clear()
            over = self._ending.is_set()
            if over or time.monotonic() >= self._retry_at:
                self._turn()
        self._close()

    def _turn(self) -> None:
        self._busy_since = time.monotonic()
        rows = [self._rows.popleft() for _ in range(len(self._rows))]
        try:
            self._work(rows)
        except Exception as error:  # noqa: BLE001  # whatever it is, it costs the history alone
            if _may_pass(error):
                self._rows.extendleft(reversed(rows))
            self._close()
            self._recover(error)
        else:
            self._why, self._said = None, False
        finally:
            self._busy_since = None
            self.tried.set()

    def _work(self, rows: list[tuple[Place, Entry]]) -> None:
        if self._store is not None and not self._store.is_there():
            self._close()
        now = self._wall()
        if self._store is None:
            self._store = Store(self._path, self._began, now)
        while self._asked:
            places, told = self._asked[0]
            told({place: self._store.read(place, now) for place in places})
            self._asked.popleft()
        self._written += self._store.write(rows, now)
        by_age = time.monotonic() >= self._prune_at
        if by_age or self._written >= ROWS_UNBOUNDED:
            self._written = 0
            if by_age:
                self._prune_at = time.monotonic() + PRUNE_INTERVAL
            self._store.prune(now, by_age=by_age)

    def _recover(self, error: Exception) -> None:
        why, wait = _words(error), RETRY
        said = f"nothing can be kept in {self._path} ({why}); it is remembered until the daemon ends"
        if is_damage(error):
            try:
                aside = set_aside(self._path)
            except OSError as failed:
                why = f"{why}, and it cannot be put aside: {_words(failed)}"
            else:
                said, wait = (
                    f"{self._path} is damaged ({why}): it is now {aside}, and a new one is begun",
                    0.0,
                )
                self._woken.set()
        self._retry_at = time.monotonic() + wait
        # A disk that is full, say, fails in more than one way, one after the other.
        if not self._said or not wait:
            self._report(HistoryError(f"history.path: {said}"))
        self._why, self._said = why, bool(wait)

    def _close(self) -> None:
        store, self._store = self._store, None
        if store is not None:
            try:
                store.close()
            except (sqlite3.Error, OSError) as error:
                self._why = _words(error)


def _may_pass(error: Exception) -> bool:
    """Whether the same rows may be written later, or into another file. What nobody can write is let go."""
    if isinstance(error, sqlite3.Error):
        return getattr(error, "sqlite_errorcode", 0) & 0xFF in _DISK or is_damage(error)
    return isinstance(error, OSError | Unusable)


def _words(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno).lower()
    return str(error) if isinstance(error, sqlite3.Error | Unusable) else type(error).__name__
