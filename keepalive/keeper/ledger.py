"""Loads begun, on disk, so that a restart does not begin them again; and whose copies are ours to let go.

LM Studio may be busy with a load for minutes and list nothing of it. A daemon that was killed meanwhile could
not know. So each load is written down before LM Studio hears of it, and struck out once its end is known. A
file per load, replaced atomically; no fsync, because a power cut ends LM Studio, too, and a killed process
leaves its writes to the kernel. What cannot be written costs this memory, never a load.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from keepalive.core.errors import KeepaliveError
from keepalive.core.facts import Fact, Listed, LoadRemembered, ModelId, OursRecalled
from keepalive.core.records import Model, Upstream, is_loading

ENTRY_MAX = 64 * 1024
# No load takes a day. A file that says so is damaged, and would keep the model from being loaded.
EXPECTED_MAX = 86_400.0
# Nobody unloads a model and loads it anew, unseen, in less time than it takes to load; nor, as with two listings of
# one life, between two looks that are no further apart than this.
UNSEEN_LEAST = 30.0
# A file system may tell its time in whole seconds.
CLOCK_APART = 2.0
OWNED_MAX = 1000


class LedgerError(KeepaliveError):
    """The state directory cannot be used."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A load that was begun at `started` (Unix seconds) on the server at `url`."""

    url: str
    key: str
    started: float
    expected: float | None
    tells_loading: bool
    boot: str | None = None  # in which life of its machine, where that is known


class Ledger:
    """Open loads in `folder`.

    `urls` gives each upstream's address, since a name may come to mean another server; `wall` Unix seconds;
    `boot` names the present life of the machine on which the server at an address runs, where that is known.
    """

    def __init__(
        self,
        folder: Path,
        urls: Callable[[], Mapping[str, str]],
        wall: Callable[[], float],
        boot: Callable[[str], str | None] = lambda url: None,
    ) -> None:
        self._folder = folder
        self._urls = urls
        self._wall = wall
        self._boot = boot
        self._written: dict[ModelId, Path] = {}

    def observe(self, fact: Fact, before: Model | Upstream, after: Model | Upstream) -> None:
        if not isinstance(before, Model) or not isinstance(after, Model):
            return
        if is_loading(after) and not is_loading(before):
            started = self._wall() - (fact.at - (after.loading_since or fact.at))
            self._write(after, started)
        elif is_loading(before) and not is_loading(after):
            self._strike(after.id)
        elif is_loading(after) and after.tells_loading and not before.tells_loading:
            # What the next life learns from a listing hangs on it.
            self._write(after, self._wall() - (fact.at - (after.loading_since or fact.at)))
        if after.policy.auto and (before.ours or after.ours or before.recalled):
            # Last: on a full disk the load is to be struck out all the same.
            self._keep_ours(fact, before, after)

    def recall(self, model: ModelId, at: float) -> LoadRemembered | None:
        """The load of this model that an earlier life did not see end, on the keeper's clock."""
        if model in self._written:
            return None  # begun by this life
        path = self._path(model)
        entry = _read(path) if path else None
        if (
            path is None
            or entry is None
            or (entry.url, entry.key) != (self._urls()[model.upstream], model.key)
        ):
            return None
        if entry.boot is not None and self._boot(entry.url) not in (None, entry.boot):
            # The machine that was loading it has been started anew since.
            with suppress(OSError):
                path.unlink()
            return None
        self._written[model] = path
        # A clock that was set back may put it into the future: then it began just now.
        ago = max(0.0, self._wall() - entry.started)
        return LoadRemembered(at, model, at - ago, entry.expected, entry.tells_loading)

    def _keep_ours(self, fact: Fact, before: Model, after: Model) -> None:
        """What may be let go is known to be ours in the next life, too, as long as nothing can have come between."""
        path = self._path(after.id, "ours")
        if path is None:
            return
        if not after.ours and after.recalled is None:
            with suppress(OSError):
                path.unlink()
        elif after.ours != before.ours:
            url = self._urls()[after.id.upstream]
            shortest = min(after.recent_loads, default=0.0)
            row = {"url": url, "key": after.id.key, "ids": sorted(after.ours), "boot": self._boot(url)}
            self._put(path, {**row, "shortest_load": shortest, "seen": self._wall()})
        elif isinstance(fact, Listed) and after.asked > before.asked:
            seen = self._wall()
            with suppress(OSError):
                os.utime(path, (seen, seen))

    def recall_ours(self, model: ModelId, at: float) -> OursRecalled | None:
        """The copies of this model that an earlier life loaded, on the keeper's clock."""
        path = self._path(model, "ours")
        row = _read_ours(path) if path else None
        if path is None or row is None or (row.url, row.key) != (self._urls()[model.upstream], model.key):
            return None
        if row.boot is not None and self._boot(row.url) not in (None, row.boot):
            return None
        unseen = self._wall() - row.seen
        if unseen < -CLOCK_APART:
            return None  # the clock was set back: nobody knows how long ago that was
        left = max(UNSEEN_LEAST, row.shortest_load) - unseen
        return OursRecalled(at, model, row.ids, at + left) if left > 0 else None

    def owned(self) -> list[ModelId]:
        """All models that an earlier life loaded or was loading, whether or not anybody still names them."""
        names = {url: name for name, url in self._urls().items()}
        begun = [_read(path) for path in sorted(self._folder.glob("load-*.json"))[:OWNED_MAX]]
        ours = [_read_ours(path) for path in sorted(self._folder.glob("ours-*.json"))[:OWNED_MAX]]
        rows = [row for row in (*begun, *ours) if row is not None and row.url in names]
        return list(dict.fromkeys(ModelId(names[row.url], row.key) for row in rows))

    def _path(self, model: ModelId, what: str = "load") -> Path | None:
        url = self._urls().get(model.upstream)
        if url is None:
            return None
        digest = hashlib.sha256(f"{url} {model.key}".encode()).hexdigest()[:24]
        return self._folder / f"{what}-{digest}.json"

    def _write(self, model: Model, started: float) -> None:
        path = self._path(model.id)
        if path is None:
            return
        url = self._urls()[model.id.upstream]
        entry = Entry(url, model.id.key, started, model.expected_load, model.tells_loading, self._boot(url))
        self._put(path, {name: getattr(entry, name) for name in Entry.__slots__})
        self._written[model.id] = path

    def _put(self, path: Path, row: Mapping[str, object]) -> None:
        draft = path.with_suffix(f".{os.getpid()}")
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            try:
                draft.write_text(json.dumps(row))
                draft.replace(path)
            except OSError:
                draft.unlink(missing_ok=True)
                raise
        except OSError as error:
            raise self._error(error) from error

    def _strike(self, model: ModelId) -> None:
        path = self._written.pop(model, None)
        if path is None:
            return
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise self._error(error) from error

    def _error(self, error: OSError) -> LedgerError:
        why = os.strerror(error.errno or 0).lower()
        return LedgerError(
            f"server.state_dir: loads cannot be noted in {self._folder} ({why}); "
            "if the daemon ends during one, the next may begin it again"
        )


@dataclass(frozen=True, slots=True)
class Ours:
    """Copies that were loaded by us on the server at `url`, and when they were last seen there (Unix seconds)."""

    url: str
    key: str
    ids: frozenset[str]
    seen: float
    shortest_load: float
    boot: str | None


def _read_ours(path: Path) -> Ours | None:
    try:
        with path.open("rb") as file:
            row = json.loads(file.read(ENTRY_MAX))
            seen = max(float(row["seen"]), os.fstat(file.fileno()).st_mtime)
        shortest, ids = float(row["shortest_load"]), row["ids"]
        if not math.isfinite(seen) or not 0 <= shortest <= EXPECTED_MAX or not isinstance(ids, list):
            return None
        boot = row["boot"] if isinstance(row.get("boot"), str) else None
        return Ours(str(row["url"]), str(row["key"]), frozenset(map(str, ids)), seen, shortest, boot)
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return None


def _read(path: Path) -> Entry | None:
    """The entry in a file, or None when there is none that makes sense."""
    try:
        with path.open("rb") as file:
            row = json.loads(file.read(ENTRY_MAX))
        started, expected = float(row["started"]), row["expected"]
        expected = None if expected is None else float(expected)
        if not math.isfinite(started) or not (expected is None or 0 <= expected <= EXPECTED_MAX):
            return None
        return Entry(
            url=str(row["url"]),
            key=str(row["key"]),
            started=started,
            expected=expected,
            tells_loading=row["tells_loading"] is True,
            # Version 1.0 wrote none.
            boot=row["boot"] if isinstance(row.get("boot"), str) else None,
        )
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return None
