"""What members of a cluster write for each other: keys and values in, a picture of all of it out.

    members/INSTANCE        who is there, with its lease
    holders/UPSTREAM        who acts there, with its lease: whoever creates it first
    uses/INSTANCE           what its callers do, and what the holder has forgotten, with its lease
    loads/UPSTREAM/KEY      a load begun and not seen to end; outlives whoever began it
    states/UPSTREAM         what the holder knows and no listing shows; outlives it, too
    yields/UPSTREAM/KEY     about to be unloaded: nobody is to give it to a caller any more, and each says so in `uses`
    wishes/UPSTREAM/KEY     what a person has asked for, until that is spent

Values are JSON objects with `v`, the version of their format. A newer member may add fields, and what is not known is
passed over; of a newer format as much is read as is known, and who writes it is named. Whatever cannot be read counts
as not there, but for a load and a holder: that there is one is plain from its row being there. Keys of models are
folded. Nothing here is a time of day: no two clocks are compared.

INSTANCE is unique among those who are there. Whoever finds its own taken, by its last life or by another daemon, goes
by another one meanwhile, so that what its callers do is known from the start.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

from keepalive.core.facts import ModelId, fold_key

VERSION = 1
# Of a hundred models a holder writes some 30 kB. What is far larger was not written by one of us.
VALUE_MAX = 512 * 1024
SECONDS_MAX = 86_400.0
STANDS_IN = "~"
# What is to go when whoever has written it is gone.
LEASED = ("members/", "holders/", "uses/")


class Row(NamedTuple):
    """A key below our prefix, as the engine has it."""

    key: str
    value: bytes
    created: int  # revision
    modified: int = 0


@dataclass(frozen=True, slots=True)
class Member:
    instance: str
    life: str
    host: str = ""
    version: str = ""
    admin: str = ""
    client: str = ""
    sees: frozenset[str] = frozenset()  # upstreams that answer it
    ready: bool = False
    # How it would load each model, as far as that shows: what differs between members is a mistake.
    config: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    # Where it finds each upstream: one name is to mean one server.
    places: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    doubled: bool = False  # it has found that another daemon has its name
    format: int = VERSION
    created: int = 0  # revision


@dataclass(frozen=True, slots=True)
class Holder:
    instance: str
    life: str
    created: int


@dataclass(frozen=True, slots=True)
class Intent:
    """A load that was begun, or was about to be."""

    instance: str
    life: str
    created: int
    expected: float | None = None
    tells_loading: bool = False
    progress: float | None = None
    number: int = 0  # among those of that model in that life; 0: an older release does not say


@dataclass(frozen=True, slots=True)
class Use:
    waiting: int = 0
    used: bool = False
    yielded: bool = False  # given to nobody any more
    asked: int | None = None  # by which revision of the row that asks so; None: an older release does not say
    ours: frozenset[str] = frozenset()  # copies that one of us loaded, of which the holder does not know


@dataclass(frozen=True, slots=True)
class Told:
    """Of one model, by the holder. `retry_in`: seconds from when it was written."""

    warm: bool = False
    ours: frozenset[str] = frozenset()
    ill: str | None = None
    failure: str | None = None
    failures: int = 0
    retry_in: float | None = None
    loads: tuple[float, ...] = ()
    contested: bool = False
    lost: frozenset[str] = frozenset()  # copies that may be another's since it lost sight of them


@dataclass(frozen=True, slots=True)
class Wish:
    warm: bool
    life: str
    created: int


NONE: Mapping[Any, Any] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Picture:
    """All that is written, as of one revision; models by upstream and folded key."""

    members: Mapping[str, Member] = field(default_factory=lambda: NONE)
    holders: Mapping[str, Holder] = field(default_factory=lambda: NONE)
    uses: Mapping[str, Mapping[ModelId, Use]] = field(default_factory=lambda: NONE)  # by instance
    loads: Mapping[ModelId, Intent] = field(default_factory=lambda: NONE)
    states: Mapping[str, Mapping[ModelId, Told]] = field(default_factory=lambda: NONE)
    wishes: Mapping[ModelId, Wish] = field(default_factory=lambda: NONE)
    yields: Mapping[ModelId, int] = field(default_factory=lambda: NONE)  # each with its revision
    values: Mapping[str, bytes] = field(default_factory=lambda: NONE)  # by key, as they were written
    modified: Mapping[str, int] = field(default_factory=lambda: NONE)  # by key, at which revision
    unreadable: tuple[str, ...] = ()
    newer: tuple[str, ...] = ()  # keys of rows in a format that is newer than ours

    def is_said(self, upstream: str, since: float = 0) -> bool:
        """Whether what stands there is the word of who holds it now, and of since that revision."""
        holder = self.holders.get(upstream)
        return holder is not None and self.modified.get(states_key(upstream), 0) > max(holder.created, since)

    def uses_elsewhere(self, instance: str) -> Mapping[ModelId, Use]:
        """What callers of all others do, taken together."""
        found: dict[ModelId, Use] = {}
        for other, uses in self.uses.items():
            if other == instance:
                continue
            for model, use in uses.items():
                known = found.get(model, Use())
                waiting, used = known.waiting + use.waiting, known.used or use.used
                found[model] = Use(waiting, used, ours=known.ours | use.ours)
        return found


def folded(model: ModelId) -> ModelId:
    return ModelId(model.upstream, fold_key(model.key))


def member_key(instance: str) -> str:
    return f"members/{instance}"


def stand_in(instance: str, life: str) -> str:
    """What a member goes by while its name is taken; no config can name anybody so."""
    return f"{instance}{STANDS_IN}{life[:8]}"


def named(member: str) -> str:
    """What its config calls it."""
    return member.partition(STANDS_IN)[0]


def holder_key(upstream: str) -> str:
    return f"holders/{upstream}"


def uses_key(instance: str) -> str:
    return f"uses/{instance}"


def load_key(model: ModelId) -> str:
    return f"loads/{model.upstream}/{fold_key(model.key)}"


def states_key(upstream: str) -> str:
    return f"states/{upstream}"


def yield_key(model: ModelId) -> str:
    return f"yields/{model.upstream}/{fold_key(model.key)}"


def wish_key(model: ModelId) -> str:
    return f"wishes/{model.upstream}/{fold_key(model.key)}"


def written(row: Mapping[str, Any]) -> bytes:
    return json.dumps({"v": VERSION, **row}, separators=(",", ":"), sort_keys=True).encode()


def member_row(member: Member) -> bytes:
    return written(
        {
            "instance": member.instance,
            "life": member.life,
            "host": member.host,
            "version": member.version,
            "admin": member.admin,
            "client": member.client,
            "sees": sorted(member.sees),
            "ready": member.ready,
            "config": dict(member.config),
            "places": dict(member.places),
            "doubled": member.doubled,
        }
    )


def holder_row(instance: str, life: str) -> bytes:
    return written({"instance": instance, "life": life})


def load_row(intent: Intent) -> bytes:
    return written(
        {
            "instance": intent.instance,
            "life": intent.life,
            "expected": intent.expected,
            "tells_loading": intent.tells_loading,
            "progress": intent.progress,
            **({"number": intent.number} if intent.number else {}),
        }
    )


def uses_row(uses: Mapping[ModelId, Use]) -> bytes:
    rows: dict[str, dict[str, Any]] = {}
    for model, use in uses.items():
        rows.setdefault(model.upstream, {})[fold_key(model.key)] = {
            "waiting": use.waiting,
            "used": use.used,
            "yielded": use.yielded,
            **({"asked": use.asked} if use.asked is not None else {}),
            **({"ours": sorted(use.ours)} if use.ours else {}),
        }
    return written({"uses": rows})


def states_row(states: Mapping[ModelId, Told]) -> bytes:
    return written(
        {
            "models": {
                fold_key(model.key): {
                    "warm": told.warm,
                    "ours": sorted(told.ours),
                    **({"lost": sorted(told.lost)} if told.lost else {}),
                    "ill": told.ill,
                    "failure": told.failure,
                    "failures": told.failures,
                    "retry_in": told.retry_in,
                    "contested": told.contested,
                    "loads": list(told.loads),
                }
                for model, told in states.items()
            }
        }
    )


def wish_row(life: str, number: str, *, warm: bool) -> bytes:
    """`number` tells it from the same wish of earlier."""
    return written({"warm": warm, "life": life, "number": number})


def picture(rows: Iterable[Row]) -> Picture:
    """What these rows say, garbage among them left out and named."""
    members: dict[str, Member] = {}
    holders: dict[str, Holder] = {}
    uses: dict[str, Mapping[ModelId, Use]] = {}
    loads: dict[ModelId, Intent] = {}
    states: dict[str, Mapping[ModelId, Told]] = {}
    wishes: dict[ModelId, Wish] = {}
    yields: dict[ModelId, int] = {}
    values: dict[str, bytes] = {}
    modified: dict[str, int] = {}
    unreadable: list[str] = []
    newer: list[str] = []
    for row in rows:
        values[row.key], modified[row.key] = row.value, row.modified
        kind, _, rest = row.key.partition("/")
        upstream, _, key = rest.partition("/")
        said = _object(row.value)
        if said is None:
            unreadable.append(row.key)
            if kind == "holders":
                holders[rest] = Holder("somebody", "", row.created)
            elif kind == "loads" and key:
                # Whatever it was to say: somebody may be loading that.
                loads[ModelId(upstream, key)] = Intent("somebody", "", row.created)
            continue
        if said["v"] > VERSION:
            newer.append(row.key)
        match kind:
            case "members":
                members[rest] = _member(rest, said, row.created)
            case "holders":
                holders[rest] = Holder(_text(said, "instance"), _text(said, "life"), row.created)
            case "uses":
                uses[rest] = _uses(said)
            case "loads" if key:
                loads[ModelId(upstream, key)] = Intent(
                    _text(said, "instance"),
                    _text(said, "life"),
                    row.created,
                    _seconds(said, "expected"),
                    said.get("tells_loading") is True,
                    _number(said, "progress", 1.0),
                    said["number"] if type(said.get("number")) is int else 0,
                )
            case "states":
                states[rest] = _states(rest, said)
            case "yields" if key:
                yields[ModelId(upstream, key)] = row.modified
            case "wishes" if key and isinstance(said.get("warm"), bool):
                wishes[ModelId(upstream, key)] = Wish(said["warm"], _text(said, "life"), row.created)
    return Picture(
        members,
        holders,
        uses,
        loads,
        states,
        wishes,
        yields,
        values,
        modified,
        tuple(unreadable),
        tuple(newer),
    )


Json = Mapping[str, Any]


def _object(value: bytes) -> Json | None:
    if len(value) > VALUE_MAX:
        return None
    try:
        said = json.loads(value)
    except (ValueError, RecursionError):
        return None
    return said if isinstance(said, dict) and type(said.get("v")) is int else None


def _member(instance: str, said: Json, created: int) -> Member:
    return Member(
        instance,
        _text(said, "life"),
        host=_text(said, "host"),
        version=_text(said, "version"),
        admin=_text(said, "admin"),
        client=_text(said, "client"),
        sees=_ids(said, "sees"),
        ready=said.get("ready") is True,
        config=_texts(said, "config"),
        places=_texts(said, "places"),
        doubled=said.get("doubled") is True,
        format=said["v"],
        created=created,
    )


def _uses(said: Json) -> Mapping[ModelId, Use]:
    return {
        ModelId(upstream, fold_key(key)): Use(
            int(_number(use, "waiting", 1e6) or 0),
            use.get("used") is True,
            use.get("yielded") is True,
            use["asked"] if type(use.get("asked")) is int else None,
            _ids(use, "ours"),
        )
        for upstream, models in _tables(said, "uses")
        for key, use in models.items()
        if isinstance(use, dict)
    }


def _states(upstream: str, said: Json) -> Mapping[ModelId, Told]:
    return {ModelId(upstream, fold_key(key)): _told(one) for key, one in _tables(said, "models")}


def _told(said: Json) -> Told:
    loads = said.get("loads")
    return Told(
        warm=said.get("warm") is True,
        ours=_ids(said, "ours"),
        lost=_ids(said, "lost"),
        ill=_text(said, "ill") or None,
        failure=_text(said, "failure") or None,
        failures=int(_number(said, "failures", 1e6) or 0),
        retry_in=_seconds(said, "retry_in"),
        contested=said.get("contested") is True,
        loads=tuple(s for s in loads if _is_number(s, SECONDS_MAX)) if isinstance(loads, list) else (),
    )


def _tables(said: Json, name: str) -> Iterable[tuple[str, Json]]:
    found = said.get(name)
    return [(k, v) for k, v in found.items() if isinstance(v, dict)] if isinstance(found, dict) else []


def _ids(said: Json, name: str) -> frozenset[str]:
    found = said.get(name)
    return frozenset(one for one in found if isinstance(one, str)) if isinstance(found, list) else frozenset()


def _texts(said: Json, name: str) -> Mapping[str, str]:
    found = said.get(name)
    return {key: _text(found, key) for key in found if key.isprintable()} if isinstance(found, dict) else NONE


def _text(said: Json, name: str) -> str:
    found = said.get(name)
    # It may stand in a log, and on a terminal.
    return found[:1000] if isinstance(found, str) and found.isprintable() else ""


def _is_number(value: Any, most: float) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and 0 <= value <= most


def _number(said: Json, name: str, most: float) -> float | None:
    found = said.get(name)
    return float(found) if found is not None and _is_number(found, most) else None


def _seconds(said: Json, name: str) -> float | None:
    return _number(said, name, SECONDS_MAX)
