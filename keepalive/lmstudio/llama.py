"""The JSON of llama-server's router to our types.

Pure. A row of its listing is a model, of which one copy runs at most, in a process of its own and under the name of
the model. Evidence for every shape: recorded answers of build 11434, and its source.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import pairwise

from keepalive.core.errors import Unexpected
from keepalive.core.facts import Entry, Instance, Odd, fold_key
from keepalive.lmstudio import wire
from keepalive.lmstudio.wire import Json

WHAT = "GET /v1/models"
# What takes memory, or is about to.
RUNNING = ("loading", "loaded", "sleeping")


def may_list(answer: Json) -> bool:
    """Whether a listing may be a router's: it is signed, and says how a model stands, if there is any."""
    rows = answer.get("data") if isinstance(answer, Mapping) else None
    if not isinstance(rows, list) or not rows:
        return rows == []
    return any(isinstance(row, Mapping) and row.get("owned_by") == "llamacpp" and _value(row) for row in rows)


def is_router(props: Json) -> bool:
    """By its `GET /props`; others that list a status load by other calls."""
    return isinstance(props, Mapping) and props.get("role") == "router"


def places(props: Json) -> int | None:
    """How many models it keeps at a time; None: as many as are asked for."""
    most = props.get("max_instances") if isinstance(props, Mapping) else None
    return most if isinstance(most, int) and not isinstance(most, bool) and most > 0 else None


def rows(answer: Json, odd: Callable[[Odd], None] | None = None) -> list[Mapping[str, Json]]:
    """The rows of a listing, each with a name and a status; those without are told to `odd`."""

    def read(row: Mapping[str, Json]) -> Mapping[str, Json]:
        if not isinstance(row.get("id"), str) or not row["id"]:
            raise Unexpected(f"{WHAT} lists a model without `id`")
        if not _value(row):
            raise Unexpected(f"{WHAT} lists a model without `status`")
        return row

    return wire.read_rows(answer, "data", "id", WHAT, read, odd)


def entry(row: Mapping[str, Json], on_disk: int | None = None) -> Entry:
    """One model. Its size is told of what is loaded; else it is that of its file, where that can be seen."""
    key, value = row["id"], _value(row)
    meta = row.get("meta")
    meta = meta if isinstance(meta, Mapping) else {}
    instances: tuple[Instance, ...] = ()
    if value == "loaded":
        instances = (Instance(key, _count(meta.get("n_ctx")), ttl=_sleeps_after(row)),)
    aliases = row.get("aliases")
    return Entry(
        key=key,
        size_bytes=_count(meta.get("size")) or on_disk,
        instances=instances,
        loading=value == "loading",
        variants=tuple(a for a in aliases if isinstance(a, str) and a != key)
        if isinstance(aliases, list)
        else (),
        context_max=_count(meta.get("n_ctx_train")),
        asleep=value == "sleeping",
        exit_code=exit_code(row),
    )


def status(answer: Json, key: str) -> tuple[str, Mapping[str, Json]]:
    """How one model stands, by its name or an alias, and its row; "absent" without it."""

    def left_out(odd: Odd) -> None:
        if fold_key(key) in odd.keys:
            raise Unexpected(odd.keys[fold_key(key)])

    for row in rows(answer, left_out):
        aliases = row.get("aliases")
        if row["id"] == key or (isinstance(aliases, list) and key in aliases):
            return _value(row), row
    return "absent", {}


def process(row: Mapping[str, Json]) -> tuple[str, ...]:
    """What tells one process of a model from the next: its arguments, with its own port."""
    return tuple(_args(row))


def exit_code(row: Mapping[str, Json]) -> int | None:
    """With what its process ended, where it ended by itself."""
    told = row.get("status")
    code = told.get("exit_code") if isinstance(told, Mapping) and told.get("failed") is True else None
    return code if isinstance(code, int) and not isinstance(code, bool) else None


def file(row: Mapping[str, Json]) -> str | None:
    """The path of its weights, on the machine where they are."""
    return _argument(row, ("--model", "-m"))


def progress(event: Json, keys: Collection[str]) -> float | None:
    """How far the load of a model is that has one of these names, from 0 to 1; its stages count alike."""
    if not _is_about(event, keys):
        return None
    data = event.get("data")
    told = data.get("progress") if isinstance(data, Mapping) else None
    if not isinstance(told, Mapping):
        return None
    stages, current, value = told.get("stages"), told.get("current"), told.get("value")
    if not isinstance(stages, list) or current not in stages:
        return None
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value <= 1:
        return None
    return (stages.index(current) + value) / len(stages)


def ends(event: Json, keys: Collection[str]) -> bool:
    """Whether an event says that a model is loaded, or that it is not going to be."""
    if not _is_about(event, keys):
        return False
    data = event.get("data")
    return isinstance(data, Mapping) and data.get("status") in ("loaded", "unloaded", "sleeping")


def _is_about(event: Json, keys: Collection[str]) -> bool:
    model = event.get("model") if isinstance(event, Mapping) else None
    return isinstance(model, str) and model in keys


def works(slots: Json) -> bool:
    """Whether a model answers anybody, by its `GET /slots`."""
    return isinstance(slots, list) and any(
        isinstance(slot, Mapping) and slot.get("is_processing") is True for slot in slots
    )


def as_it_is(path: str) -> str:
    """The path of a request that is to load nothing. Without this a router loads whatever it is asked for."""
    return f"{path}{'&' if '?' in path else '?'}autoload=false"


def _value(row: Mapping[str, Json]) -> str:
    told = row.get("status")
    value = told.get("value") if isinstance(told, Mapping) else None
    return value if isinstance(value, str) else ""


def _args(row: Mapping[str, Json]) -> list[str]:
    told = row.get("status")
    args = told.get("args") if isinstance(told, Mapping) else None
    return [arg for arg in args if isinstance(arg, str)] if isinstance(args, list) else []


def _argument(row: Mapping[str, Json], names: Sequence[str]) -> str | None:
    args = _args(row)
    return next((value for name, value in pairwise(args) if name in names), None)


def _sleeps_after(row: Mapping[str, Json]) -> float | None:
    """Seconds of idleness after which it lets go of its memory; None where it never does."""
    told = _argument(row, ("--sleep-idle-seconds",))
    try:
        seconds = float(told or 0)
    except ValueError:
        return None
    return seconds if 0 < seconds < 1e9 else None


def _count(value: Json) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
