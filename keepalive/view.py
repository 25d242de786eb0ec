"""The status, drawn for a terminal.

Takes the JSON of `/api/status` and nothing else, so that what a person reads and what a script reads agree.
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

Json = Mapping[str, Any]

COLOURS = {"warm": "green", "loading": "yellow", "cold": "blue", "backoff": "red", "unknown": "magenta"}
TROUBLE = ("down", "unauthorized")

READY, WARMING, FAILING, CANNOT_TELL = 0, 1, 2, 3


def exit_code(status: Json, keys: Sequence[str] = ()) -> int:
    """0 when all wanted models (or those named) are warm, 1 while they warm up, 2 when something fails."""
    troubled = {u["name"] for u in status["upstreams"] if u["state"] in TROUBLE}
    missing = [m for m in chosen(status, keys) if m["state"] != "warm"]
    if not missing:
        return READY
    failing = any(m["state"] == "backoff" or not m["listed"] or m["upstream"] in troubled for m in missing)
    return FAILING if failing else WARMING


def chosen(status: Json, keys: Sequence[str]) -> list[Json]:
    """The models named, or without names all that are wanted."""
    return [m for m in status["models"] if (m["key"] in keys if keys else m["wanted"])]


def unknown_keys(status: Json, keys: Sequence[str]) -> list[str]:
    known = {m["key"] for m in status["models"]}
    return [key for key in keys if key not in known]


def table(status: Json) -> RenderableType:
    """Upstreams that have something to say, then a row per model."""
    now = datetime.now(UTC)
    several = len(status["upstreams"]) > 1
    rows = Table(box=None, pad_edge=False, header_style="bold", expand=False)
    for name in ("MODEL", *(["UPSTREAM"] if several else []), "STATE", "SINCE", "LAST LOAD", "NEXT PING"):
        rows.add_column(name, no_wrap=name != "MODEL")
    rows.add_column("WHY", ratio=1)
    for model in status["models"]:
        rows.add_row(
            Text(model["key"]),
            *([Text(model["upstream"])] if several else []),
            _state(model),
            Text(_ago(model["since"], now)),
            Text("–" if model["last_load_seconds"] is None else span(model["last_load_seconds"])),
            Text(_until(model["next_ping_at"], now)),
            _why(model, now),
        )
    parts: list[RenderableType] = [
        Text(f"{u['name']} ({u['url']}) is {u['state']}: {u['error'] or 'no answer yet'}", style="red")
        for u in status["upstreams"]
        if u["state"] in TROUBLE or u["error"]
    ]
    parts += [Text(f"config rejected: {mistake}", style="red") for mistake in status["config"]["mistakes"]]
    return Group(*parts, rows)


def line(model: Json) -> str:
    """One model in one line of plain text."""
    reason = f": {model['reason']}" if model["reason"] else ""
    load = f", {_progress(model['load'])}" if model["load"] else ""
    return f"{model['key']} is {model['state']}{load}{reason}"


def summary(status: Json) -> str:
    """All of it in one line, such as "3/4 models warm; medicine-llm loading, 62 s, about 50 s to go"."""
    wanted = [m for m in status["models"] if m["wanted"]]
    cold = [m for m in wanted if m["state"] != "warm"]
    parts = [f"{len(wanted) - len(cold)}/{len(wanted)} models warm"]
    if status.get("draining"):
        parts.insert(0, "stopping")
    if status["config"]["mistakes"]:
        parts.append("config rejected, the one before is in use")
    parts += [
        f"{u['name']} is {u['state']}: {u['error'] or 'no answer yet'}"
        for u in status["upstreams"]
        if u["state"] in TROUBLE
    ]
    for model in cold:
        if model["load"]:
            parts.append(f"{model['key']} loading, {_progress(model['load'])}")
        elif model["state"] == "backoff":
            parts.append(f"{model['key']} failed: {model['reason']}")
    return "; ".join(parts)


def span(seconds: float) -> str:
    """A duration as short as people say it."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.0f} h" if seconds < 172_800 else f"{seconds / 86_400:.0f} d"


def _state(model: Json) -> RenderableType:
    text = Text(model["state"], style=COLOURS[model["state"]])
    if model["busy"]:
        text.append(" (busy)")
    load = model["load"]
    if not load or load["eta_seconds"] is None:
        return text
    total = load["elapsed_seconds"] + load["eta_seconds"]
    bar = ProgressBar(total=total or 1, completed=load["elapsed_seconds"], width=10, complete_style="yellow")
    row = Table.grid(padding=(0, 1))
    row.add_row(text, bar)
    return row


def _why(model: Json, now: datetime) -> Text:
    parts = []
    if model["load"]:
        parts.append(_progress(model["load"]))
    if model["reason"]:
        parts.append(model["reason"])
    if not model["wanted"] and model["state"] != "cold":
        parts.append("not wanted now")
    if model["retry_at"]:
        parts.append(f"tries again {_until(model['retry_at'], now)}")
    return Text("; ".join(parts))


def _progress(load: Json) -> str:
    left = load["eta_seconds"]
    until = "" if left is None else f", about {span(left)} to go" if left > 0 else ", any moment now"
    return f"{span(load['elapsed_seconds'])}{until}"


def _ago(moment: str | None, now: datetime) -> str:
    return "–" if moment is None else span(max(0.0, (now - datetime.fromisoformat(moment)).total_seconds()))


def _until(moment: str | None, now: datetime) -> str:
    if moment is None:
        return "–"
    left = (datetime.fromisoformat(moment) - now).total_seconds()
    return f"in {span(left)}" if left > 0 else "now"
