"""The status in sentences, for a log, for systemd and for whoever has no terminal.

Takes the JSON of `/api/status` and nothing else, so that what a person reads and what a script reads agree.
"""

from collections.abc import Mapping, Sequence
from typing import Any

Json = Mapping[str, Any]

TROUBLE = ("down", "unauthorized")
NO_ENGINE = "nothing is loaded or unloaded, what is warm is served"
# An answer that thinks, or writes a tool call, says nothing for some seconds. From here on a person wants to know.
SILENT_FROM = 30.0


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
    engine = status.get("cluster", {}).get("engine", {"up": True})
    if not engine["up"]:
        parts.append(f"{NO_ENGINE}: {engine['error']}")
    for model in cold:
        if model["load"]:
            load = model["load"]
            parts.append(
                f"{model['key']} loading, {span(load['elapsed_seconds'])}{_done(load)}{_to_go(load)}"
            )
        elif model["state"] == "backoff":
            parts.append(f"{model['key']} failed: {model['reason']}")
    return "; ".join(parts)


def lines(status: Json) -> dict[str, str]:
    """Each model in one line of plain text, by a name that no other has."""
    several = len(status["upstreams"]) > 1
    named = {f"{m['key']} on {m['upstream']}" if several else m["key"]: m for m in status["models"]}
    return {name: _line(name, model) for name, model in named.items()}


def _line(name: str, model: Json) -> str:
    reason = f": {model['reason']}" if model["reason"] else ""
    load = f", {progress(model['load'])}" if model["load"] else ""
    silent = f", {said}" if (said := silence(model)) else ""
    primed = f"; {said}" if (said := unread(model)) else ""
    return f"{name} is {model['state']}{load}{silent}{reason}{primed}"


def memory(upstream: Json, models: Sequence[Json]) -> str | None:
    """Who has the memory of an upstream, who goes next and who waits; None where that is no matter.

    Such as "18.0 of 40.0 GB: a 9.0, x 9.0 (not ours); a goes next; b waits for room".
    """
    known = upstream.get("memory")
    if known is None:
        return None
    there = [m for m in models if m["upstream"] == upstream["name"] and (m["instances"] or m["load"])]
    parts = [
        f"{m['key']} {_gigabytes(m['memory_bytes'])}{'' if m['ours'] or m['load'] else ' (not ours)'}"
        for m in there
    ]
    parts += [f"{one['key']} {_gigabytes(one['bytes'])} (not ours)" for one in known["strangers"]]
    budget = known["budget_bytes"]
    of = "" if budget is None else f" of {_gigabytes(budget)}"
    told = [f"{_gigabytes(known['used_bytes'])}{of} GB" + (f": {', '.join(parts)}" if parts else "")]
    if known.get("places"):
        told.append(f"no more than {known['places']} at a time")
    if known["next_to_go"]:
        told.append(f"{known['next_to_go'][0]} goes next")
    if known["waiting"]:
        told.append(
            f"{', '.join(known['waiting'])} {'waits' if len(known['waiting']) == 1 else 'wait'} for room"
        )
    return "; ".join(told)


def _gigabytes(size: float | None) -> str:
    return "?" if size is None else f"{size / 1e9:.1f}"


def silence(status: Json) -> str | None:
    """How long the quietest answer of a model has been silent, once that is worth a word."""
    seconds = status.get("silent_seconds") or 0.0
    return f"silent for {span(seconds)}" if seconds >= SILENT_FROM else None


def unread(status: Json) -> str | None:
    """Which openings a model has not read ahead, or why it reads none."""
    return (status.get("primed") or {}).get("reason")


def span(seconds: float) -> str:
    """A duration as short as people say it."""
    if seconds < 9.95:  # what rounds to 10 has no digit behind the point
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.0f} h" if seconds < 172_800 else f"{seconds / 86_400:.0f} d"


def progress(load: Json) -> str:
    return f"{span(load['elapsed_seconds'])} so far{_done(load)}{_to_go(load)}"


def _done(load: Json) -> str:
    done = load.get("progress")
    return "" if done is None else f", {done:.0%} done"


def _to_go(load: Json) -> str:
    left = load["eta_seconds"]
    return "" if left is None else f", about {span(left)} to go" if left > 0 else ", longer than usual"
