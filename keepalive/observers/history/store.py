"""The file: one SQLite database, what it looks like, and what is read from it and written to it.

Used by one thread. What the disk does comes out as `sqlite3.Error` or `OSError`. `Unusable` is a file that must be
left as it is, and `is_damage` says which errors mean that the file itself is broken. Nothing that is read is
believed before it has been looked at: a file may be damaged in ways that SQLite does not notice.

At most a second of it is lost when the daemon is killed; after a power cut some more, but never the file.
"""

import os
import sqlite3
import stat
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

from keepalive.core.errors import KeepaliveError
from keepalive.core.facts import LoadOutcome, PingOutcome
from keepalive.core.records import LOADS_REMEMBERED, Cause
from keepalive.core.states import State
from keepalive.observers.history.story import (
    CHANGES_MAX,
    DAY,
    HOUR,
    LAST,
    OFF,
    Asked,
    Changed,
    Entry,
    Evicted,
    Loaded,
    Pinged,
    Story,
    Waited,
    hour_of,
)

# Marks the file as ours, in its header.
APPLICATION = int.from_bytes(b"keep")
# A step for each version; the number of those that were taken is the version of the file.
MIGRATIONS = (
    """
    CREATE TABLE lives (id INTEGER PRIMARY KEY, began REAL NOT NULL, seen REAL NOT NULL);
    CREATE TABLE models (id INTEGER PRIMARY KEY, url TEXT NOT NULL, key TEXT NOT NULL, UNIQUE (url, key));
    CREATE TABLE loads (
        id INTEGER PRIMARY KEY, model INTEGER NOT NULL, at REAL NOT NULL, outcome TEXT NOT NULL, seconds REAL
    );
    CREATE INDEX loads_of ON loads (model);
    CREATE TABLE evictions (
        id INTEGER PRIMARY KEY, model INTEGER NOT NULL, at REAL NOT NULL, cause TEXT NOT NULL, idle_seconds REAL
    );
    CREATE INDEX evictions_of ON evictions (model);
    CREATE TABLE states (
        id INTEGER PRIMARY KEY, model INTEGER NOT NULL, at REAL NOT NULL, state TEXT NOT NULL
    );
    CREATE INDEX states_of ON states (model);
    CREATE TABLE pings (
        model INTEGER NOT NULL, hour INTEGER NOT NULL, outcome TEXT NOT NULL, count INTEGER, seconds REAL,
        PRIMARY KEY (model, hour, outcome)
    ) WITHOUT ROWID;
    CREATE TABLE waits (
        model INTEGER NOT NULL, hour INTEGER NOT NULL, requests INTEGER, served INTEGER, seconds REAL,
        PRIMARY KEY (model, hour)
    ) WITHOUT ROWID;
    """,
    """
    CREATE TABLE requests (id INTEGER PRIMARY KEY, model INTEGER NOT NULL, at REAL NOT NULL, seconds REAL NOT NULL);
    CREATE INDEX requests_of ON requests (model, at);
    """,
    "ALTER TABLE requests ADD COLUMN count INTEGER NOT NULL DEFAULT 1",
)
VERSION = len(MIGRATIONS)

# Each takes the fields of an entry, and then the number of its model.
_INSERT: Mapping[type[Entry], str] = {
    Loaded: "INSERT INTO loads (at, outcome, seconds, model) VALUES (?, ?, ?, ?)",
    Evicted: "INSERT INTO evictions (at, cause, idle_seconds, model) VALUES (?, ?, ?, ?)",
    Changed: "INSERT INTO states (at, state, model) VALUES (?, ?, ?)",
    Asked: "INSERT INTO requests (at, seconds, count, model) VALUES (?, ?, ?, ?)",
    Pinged: """
        INSERT INTO pings (hour, outcome, seconds, model, count)
        VALUES (CAST(? / 3600 AS INTEGER) * 3600, ?, ?, ?, 1)
        ON CONFLICT DO UPDATE SET count = count + 1, seconds = seconds + excluded.seconds
        """,
    Waited: """
        INSERT INTO waits (hour, seconds, served, model, requests)
        VALUES (CAST(? / 3600 AS INTEGER) * 3600, ?, ?, ?, 1)
        ON CONFLICT DO UPDATE SET
        requests = requests + 1, served = served + excluded.served, seconds = seconds + excluded.seconds
        """,
}

# Table, the column that tells its age, days and rows kept. Together about 40 MB at the most.
BOUNDS = (
    ("loads", "at", 90, 50_000),
    ("evictions", "at", 90, 50_000),
    ("states", "at", 30, 200_000),
    ("pings", "hour", 7, 200_000),
    ("waits", "hour", 90, 200_000),
    ("lives", "seen", 90, 10_000),
    ("requests", "at", 90, 200_000),
)
# Requests that took less than this, of one model and one second, are one row: an indexer asks by the thousand, and in a
# minute there would be no room left for anybody else's.
SHORT = 1.0
# Somebody may be reading the file with a tool of his own.
LOCKED_TIMEOUT = 1.0
# A file is looked through when it is opened, but not for longer than this.
CHECK_TIMEOUT = 2.0
# What no clock and no load says unless the file is damaged.
TIME_MAX = 1e11
SECONDS_MAX = 1e9

_DAMAGE = (
    sqlite3.SQLITE_ERROR,  # a table or column that must be there is not
    sqlite3.SQLITE_CORRUPT,
    sqlite3.SQLITE_NOTADB,
    sqlite3.SQLITE_FORMAT,
)
_HEADER = b"SQLite format 3\0"
# Windows knows no pipes in its folders, and would take some bytes for ends of lines.
_AS_IT_IS = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


class Unusable(KeepaliveError):
    """The file must be left as it is. `str()` says why."""


def is_damage(error: Exception) -> bool:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in _DAMAGE


class Place(NamedTuple):
    """A model by what it is, since the name of an upstream may come to mean another server."""

    url: str
    key: str


@dataclass(frozen=True, slots=True)
class Past:
    """What earlier lives have left of one model.

    `loads` are the seconds of the last that succeeded; `asked` how often it was asked for lately, each a pair of how
    many seconds ago and how many times.
    """

    story: Story
    loads: tuple[float, ...] = ()
    asked: tuple[tuple[float, int], ...] = ()


class Store:
    """The open file. `began` is when this life of the daemon began."""

    def __init__(self, path: Path, began: float, now: float) -> None:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._path = path
        self._ids: dict[Place, int] = {}
        self._lock: int | None = _lock(path)
        self._database: sqlite3.Connection | None = None
        try:
            self._identity = _look_at(path)
            self._database = self._connect()
            self._begin(began, now)
            self.prune(now, by_age=False)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        database, self._database = self._database, None
        try:
            if database is not None:
                database.close()
        finally:
            # Last: somebody else may be waiting for it.
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None

    def is_there(self) -> bool:
        """Whether the path still leads to this file: one that was removed can be written to without an error."""
        try:
            found = self._path.stat()
        except FileNotFoundError:
            return False
        return (found.st_dev, found.st_ino) == self._identity

    # --- writing ------------------------------------------------------------------------------------

    def write(self, rows: Iterable[tuple[Place, Entry]], now: float) -> int:
        """All or none of them, and that the daemon lives; how many rows of the file that made."""
        gathered = _gathered(rows)
        with self._transaction() as do:
            for place, entry in gathered:
                do(_INSERT[type(entry)], (*entry, self._id(place)))
            do("UPDATE lives SET seen = ? WHERE id = (SELECT max(id) FROM lives)", (now,))
        return len(gathered)

    def prune(self, now: float, *, by_age: bool) -> None:
        with self._transaction() as do:
            for table, column, days, rows in BOUNDS:
                # What came last is kept, whatever its time; of what is counted by the hour, the last hours.
                order = "hour" if column == "hour" else "id"
                first = f"(SELECT {order} FROM {table} ORDER BY {order} DESC LIMIT 1 OFFSET ?)"  # noqa: S608  # our own
                do(f"DELETE FROM {table} WHERE {order} <= {first}", (rows,))  # noqa: S608  # as above
                if by_age:
                    do(f"DELETE FROM {table} WHERE {column} < ?", (now - days * DAY,))  # noqa: S608  # as above

    @contextmanager
    def _transaction(self) -> Iterator[Callable[[str, tuple[object, ...]], sqlite3.Cursor]]:
        self._do("BEGIN IMMEDIATE")
        try:
            yield self._do
            self._do("COMMIT")
        except BaseException:
            self._ids.clear()
            if self._database is not None and self._database.in_transaction:
                self._do("ROLLBACK")
            raise

    def _id(self, place: Place) -> int:
        found = self._ids.get(place) or self._find(place)
        if found is None:
            found = self._do("INSERT INTO models (url, key) VALUES (?, ?)", place).lastrowid or 0
        self._ids[place] = found
        return found

    def _find(self, place: Place) -> int | None:
        row = self._do("SELECT id FROM models WHERE url = ? AND key = ?", place).fetchone()
        return int(row[0]) if row else None

    # --- reading ------------------------------------------------------------------------------------

    def read(self, place: Place, now: float) -> Past:
        """What is known of a model; nothing of what this life has written must be among it."""
        story, model = Story(), self._find(place)
        if model is None:
            return Past(story)
        for newest, read, limit in _NEWEST:
            for entry in list(_sound(read, self._do(newest, (model, limit))))[::-1]:
                story.add(entry)
        lately = model, _hour(now - DAY), _hour(now)
        pings = "SELECT hour, outcome, count FROM pings WHERE model = ? AND hour BETWEEN ? AND ?"
        for hour, outcome, count in _sound(_pinged, self._do(pings, lately)):
            story.add_pings(hour, outcome, count)
        waits = "SELECT hour, requests, seconds FROM waits WHERE model = ? AND hour BETWEEN ? AND ?"
        for hour, requests, seconds in _sound(_waited, self._do(waits, lately)):
            story.add_waits(hour, requests, seconds)
        good = "SELECT at, outcome, seconds FROM loads WHERE model = ? AND outcome = 'ok' ORDER BY id DESC LIMIT ?"
        loads = [load.seconds for load in _sound(_loaded, self._do(good, (model, LAST)))]
        # By the minute, or those of a busy day would be read one by one.
        minutes = (
            "SELECT max(at), sum(count) FROM requests WHERE model = ? AND at BETWEEN ? AND ? "
            "GROUP BY CAST(at / 60 AS INTEGER) ORDER BY at DESC"
        )
        asked = [
            (now - at, count) for at, count in _sound(_asked, self._do(minutes, (model, now - DAY, now)))
        ]
        return Past(story, tuple(loads[:LOADS_REMEMBERED][::-1]), tuple(asked))

    # --- opening ------------------------------------------------------------------------------------

    def _connect(self) -> sqlite3.Connection:
        database = sqlite3.connect(self._path, timeout=LOCKED_TIMEOUT, isolation_level=None)
        try:
            # Text that is none any more must not be an error of its own kind.
            database.text_factory = lambda text: text.decode(errors="replace")
            self._database = database
            # Where it cannot be had, another mode does as well, and costs a little more.
            self._do("PRAGMA journal_mode = WAL").fetchall()
            self._do("PRAGMA synchronous = NORMAL")
            self._migrate()
            self._check()
        except BaseException:
            database.close()
            raise
        return database

    def _migrate(self) -> None:
        version = self._do("PRAGMA user_version").fetchone()[0]
        if version > VERSION:
            raise Unusable(_newer(version))
        for number in range(version, VERSION):
            with self._transaction() as do:
                for statement in MIGRATIONS[number].split(";"):
                    do(statement, ())
                do(f"PRAGMA application_id = {APPLICATION}", ())
                do(f"PRAGMA user_version = {number + 1}", ())

    def _check(self) -> None:
        assert self._database is not None
        end = time.monotonic() + CHECK_TIMEOUT
        self._database.set_progress_handler(lambda: time.monotonic() > end, 10_000)
        try:
            said = self._do("PRAGMA quick_check(1)").fetchone()
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_INTERRUPT:
                raise
            said = ("ok",)
        finally:
            self._database.set_progress_handler(None, 0)
        if said != ("ok",):
            damage = sqlite3.DatabaseError(str(said[0]).splitlines()[0] if said else "nothing can be read")
            damage.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
            raise damage

    def _begin(self, began: float, now: float) -> None:
        """Note that a life begins, and for each model that nobody watched since the one before had ended."""
        before = self._do("SELECT began, seen FROM lives ORDER BY id DESC LIMIT 1").fetchone()
        if before is not None and before[0] == began:
            return  # it is this one, which has lost its file for a while
        with self._transaction() as do:
            if before is not None:
                do(
                    "INSERT INTO states (model, at, state) SELECT model, ?, ? FROM "
                    "(SELECT model, state, max(id) FROM states GROUP BY model) WHERE state != ?",
                    (before[1], OFF, OFF),
                )
            do("INSERT INTO lives (began, seen) VALUES (?, ?)", (began, now))

    def _do(self, statement: str, values: tuple[object, ...] = ()) -> sqlite3.Cursor:
        assert self._database is not None
        return self._database.execute(statement, values)


def _gathered(rows: Iterable[tuple[Place, Entry]]) -> list[tuple[Place, Entry]]:
    found: list[tuple[Place, Entry]] = []
    short: dict[tuple[Place, int], Asked] = {}
    for place, entry in rows:
        if isinstance(entry, Asked) and entry.seconds < SHORT:
            second = place, int(entry.at)
            first = short.get(second)
            if first is not None:
                entry = Asked(first.at, max(first.seconds, entry.seconds), first.times + entry.times)
            short[second] = entry
        else:
            found.append((place, entry))
    return found + [(place, entry) for (place, _), entry in short.items()]


def set_aside(path: Path) -> Path:
    """Put a damaged file out of the way, in the place of one that may be there already; says where it is."""
    aside = path.with_name(f"{path.name}.damaged")
    for ending in ("-wal", "-shm", ""):
        part = path.with_name(path.name + ending)
        if part.exists():
            part.replace(aside.with_name(aside.name + ending))
    return aside


def _lock(path: Path) -> int:
    """A lock that ends with this process: two daemons in one file would tell one story of two."""
    file = os.open(path.with_name(f"{path.name}.lock"), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        _hold(file)
    except BaseException as error:
        os.close(file)
        if isinstance(error, BlockingIOError):
            raise Unusable("another daemon keeps its history there") from None
        raise
    return file


def _hold(file: int) -> None:
    """Lock it, in the way of this system; BlockingIOError when another process has done so."""
    with suppress(ImportError):  # a system that has neither way
        if sys.platform == "win32":
            import msvcrt

            try:
                msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
            except PermissionError as error:
                raise BlockingIOError from error
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _look_at(path: Path) -> tuple[int, int]:
    """The device and number of the file, which is there and may be ours."""
    # Made here, or others could read it; and without waiting for whoever might write into a pipe.
    file = os.open(path, os.O_RDWR | os.O_CREAT | _AS_IT_IS, 0o600)
    try:
        found = os.fstat(file)
        if not stat.S_ISREG(found.st_mode):
            raise Unusable("that is no regular file")
        head = os.read(file, 100)
    finally:
        os.close(file)
    if head.startswith(_HEADER) and len(head) == 100:
        schema, version, application = (int.from_bytes(head[n : n + 4]) for n in (40, 60, 68))
        # The moment in which it was killed may have left one without anything in it.
        if application != APPLICATION and (application or schema):
            raise Unusable("that is a database of another program")
        if version > VERSION:
            raise Unusable(_newer(version))
    return found.st_dev, found.st_ino


def _newer(version: int) -> str:
    return f"a newer keepalive has written it (version {version}, and this one knows {VERSION})"


def _hour(at: float) -> int:
    """The second in which an hour begins: that is how tools show it as a time."""
    return int(hour_of(at) * HOUR)


T = TypeVar("T")


def _sound(read: Callable[..., T], rows: Iterable[tuple[object, ...]]) -> Iterator[T]:
    """What makes sense among `rows`."""
    for row in rows:
        try:
            yield read(*row)
        except (ValueError, TypeError):
            continue


def _number(value: object, most: float) -> float:
    if not isinstance(value, int | float) or not 0 <= value <= most:
        raise ValueError(value)
    return value


def _seconds(value: object) -> float:
    return _number(value, SECONDS_MAX)


def _loaded(at: object, outcome: str, seconds: object) -> Loaded:
    return Loaded(_number(at, TIME_MAX), LoadOutcome(outcome), _seconds(seconds))


def _evicted(at: object, cause: str, idle: object) -> Evicted:
    return Evicted(_number(at, TIME_MAX), Cause(cause), _seconds(idle))


def _changed(at: object, state: str) -> Changed:
    return Changed(_number(at, TIME_MAX), OFF if state == OFF else State(state))


def _pinged(hour: object, outcome: str, count: object) -> tuple[int, PingOutcome, int]:
    return hour_of(_number(hour, TIME_MAX)), PingOutcome(outcome), int(_number(count, SECONDS_MAX))


def _asked(at: object, count: object) -> tuple[float, int]:
    return _number(at, TIME_MAX), int(_number(count, SECONDS_MAX))


def _waited(hour: object, requests: object, seconds: object) -> tuple[int, int, float]:
    return hour_of(_number(hour, TIME_MAX)), int(_number(requests, SECONDS_MAX)), _seconds(seconds)


_NEWEST: tuple[tuple[str, Callable[..., Entry], int], ...] = (
    ("SELECT at, outcome, seconds FROM loads WHERE model = ? ORDER BY id DESC LIMIT ?", _loaded, LAST),
    (
        "SELECT at, cause, idle_seconds FROM evictions WHERE model = ? ORDER BY id DESC LIMIT ?",
        _evicted,
        LAST,
    ),
    ("SELECT at, state FROM states WHERE model = ? ORDER BY id DESC LIMIT ?", _changed, CHANGES_MAX),
)
