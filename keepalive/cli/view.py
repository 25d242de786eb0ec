"""The status, drawn for a terminal.

Takes the JSON of `/api/status` and nothing else, so that what a person reads and what a script reads agree.
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.padding import Padding
from rich.text import Text

from keepalive.admin.words import NO_ENGINE, TROUBLE, memory, progress, silence, span, unread

Json = Mapping[str, Any]

COLOURS = {"warm": "green", "loading": "yellow", "cold": "blue", "backoff": "red", "unknown": "magenta"}
BAR = 10
GAP = 2
# A key is shortened to make room, but never further.
KEY_MIN = 16
# The reason stands in its model's row when this much of it fits, else below.
WHY_MIN = 30

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
    """Upstreams that have something to say, then the models with why they are not warm."""
    several = len(status["upstreams"]) > 1
    parts: list[RenderableType] = [
        Text(f"{u['name']} ({u['url']}) is {u['state']}: {u['error'] or 'no answer yet'}", style="red")
        for u in status["upstreams"]
        if u["state"] in TROUBLE or u["error"]
    ]
    parts += [
        Text(f"memory of {upstream['name']}: {told}", style="dim")
        for upstream in status["upstreams"]
        if (told := memory(upstream, status["models"]))
    ]
    parts += _cluster(status)
    parts += [Text(f"config rejected: {mistake}", style="red") for mistake in status["config"]["mistakes"]]
    return Group(*parts, _Rows(status["models"], several, datetime.now(UTC)))


def _cluster(status: Json) -> list[Text]:
    """The daemons that are one with this."""
    cluster = status.get("cluster")
    if cluster is None:
        return []
    holders: dict[str, list[str]] = {}
    for upstream, instance in cluster["holders"].items():
        holders.setdefault(instance, []).append(upstream)
    acts = "acts" if cluster["engine"]["up"] else "acted"  # nobody can know who does now
    upgraded = len({m.get("version") for m in cluster["members"]}) > 1  # one by one
    members = [
        f"{m['instance']}{' (this one)' if m['instance'] == cluster['instance'] else ''}"
        + (f" {m['version']}" if upgraded else "")
        + (f" {acts} on {', '.join(upstreams)}" if (upstreams := holders.get(m["instance"])) else "")
        for m in cluster["members"]
    ]
    lines = [
        Text(f"cluster {cluster['name']}: {'; '.join(members) or 'nobody has been seen yet'}", style="dim")
    ]
    if not cluster["engine"]["up"]:
        lines.append(Text(f"{NO_ENGINE}: {cluster['engine']['error']}", style="red"))
    return lines + [Text(difference, style="yellow") for difference in cluster["differences"]]


class _Rows:
    """A row per model. What does not fit beside it, its reason, stands below it."""

    def __init__(self, models: Sequence[Json], several: bool, now: datetime) -> None:
        self._models = models
        self._several = several
        self._now = now

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        names = (
            "MODEL",
            *(["UPSTREAM"] if self._several else []),
            "STATE",
            "SINCE",
            "LAST LOAD",
            "NEXT PING",
        )
        head = [Text(name, style="bold") for name in names]
        cells = [self._cells(model, bars=console.is_terminal) for model in self._models]
        whys = [_why(model, self._now) for model in self._models]
        widths = [max(cell_len(row[i].plain) for row in (head, *cells)) for i in range(len(names))]
        rest = sum(widths[1:]) + GAP * len(widths)
        longest = max((cell_len(why) for why in whys), default=0)
        beside = options.max_width - widths[0] - rest >= min(longest, WHY_MIN)
        widths[0] = min(widths[0], max(KEY_MIN, options.max_width - rest + GAP))
        yield _row([*head, Text("WHY", style="bold")] if beside else head, widths)
        for row, why in zip(cells, whys, strict=True):
            text = _row(row, widths)
            if not beside or not why:
                yield text
                if why:
                    yield Padding(Text(why), (0, 0, 0, 2 * GAP))
                continue
            indent = sum(widths) + GAP * len(widths)
            first, *more = Text(why).wrap(console, max(1, options.max_width - indent))
            text.pad_right(indent - cell_len(text.plain))
            yield text.append_text(first)
            yield from (Padding(rest_of_it, (0, 0, 0, indent)) for rest_of_it in more)

    def _cells(self, model: Json, *, bars: bool) -> list[Text]:
        return [
            Text(model["key"]),
            *([Text(model["upstream"])] if self._several else []),
            _state(model, bars=bars),
            Text(_ago(model["since"], self._now)),
            Text("–" if model["last_load_seconds"] is None else span(model["last_load_seconds"])),
            Text(_until(model["next_ping_at"], self._now)),
        ]


def _row(cells: Sequence[Text], widths: Sequence[int]) -> Text:
    row = Text(no_wrap=True, overflow="ellipsis", end="\n")
    for cell, width in zip(cells, [*widths, 0], strict=False):
        shown = _shortened(cell, width) if width else cell
        row.append_text(shown)
        row.pad_right(max(0, width - cell_len(shown.plain)) + GAP)
    row.rstrip()
    return row


def _shortened(cell: Text, width: int) -> Text:
    """Both ends of a key tell models apart, so the middle goes."""
    if cell_len(cell.plain) <= width:
        return cell
    head = width // 2
    return Text(f"{cell.plain[:head]}…{cell.plain[-(width - head - 1) :]}", style=cell.style)


def finding(what: str, why: str, do: str) -> RenderableType:
    """One thing that is wrong, with why it matters and what to do about it."""
    rows = (
        (0, Text.assemble(("✗ ", "bold red"), (what, "bold"))),
        (2, Text(f"why: {why}")),
        (2, Text("do:  ").append(do, style="cyan")),
    )
    return Group(*(Padding(row, (0, 0, 0, indent), expand=False) for indent, row in rows), "")


def _state(model: Json, *, bars: bool) -> Text:
    text = Text(model["state"], style=COLOURS.get(model["state"], ""))
    if model["busy"]:
        text.append(" (busy)")
    load = model["load"]
    if bars and load and (share := _done(load)) is not None:
        done = min(BAR, int(BAR * share))
        text.append(f" {'━' * done}").append("─" * (BAR - done), style="dim")
    return text


def _done(load: Json) -> float | None:
    """How far a load is: by LM Studio's own word, else by the time that is left; None where nobody knows."""
    if load.get("progress") is not None:
        return float(load["progress"])
    if load["eta_seconds"] is None:
        return None
    total = load["elapsed_seconds"] + load["eta_seconds"]
    return load["elapsed_seconds"] / total if total else 1.0


def _why(model: Json, now: datetime) -> str:
    parts = []
    if model["load"]:
        parts.append(progress(model["load"]))
    if model["reason"]:
        parts.append(model["reason"])
    if not model["load"] and (left := model.get("eta_seconds")) is not None:
        parts.append(f"about {span(left)} to go")
    if silent := silence(model):
        parts.append(silent)
    if primed := unread(model):
        parts.append(primed)
    if not model["wanted"] and model["state"] != "cold":
        parts.append("on demand" if model.get("keep") == "auto" else "not wanted now")
    if model["retry_at"]:
        parts.append(f"tries again {_until(model['retry_at'], now)}")
    return "; ".join(parts)


def _ago(moment: str | None, now: datetime) -> str:
    return "–" if moment is None else span(max(0.0, (now - datetime.fromisoformat(moment)).total_seconds()))


def _until(moment: str | None, now: datetime) -> str:
    if moment is None:
        return "–"
    left = (datetime.fromisoformat(moment) - now).total_seconds()
    return f"in {span(left)}" if left > 0 else "now"
