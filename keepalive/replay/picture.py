"""Who was in memory when, and who waited, as SVG: a row per model, light while it loads, red where somebody waits."""

from collections.abc import Iterable, Sequence
from html import escape

from keepalive.replay.policies import Report

WIDTH, ROW, LEFT, TOP = 1600, 26, 180, 46
# What is less than a pixel apart is one thing to look at: a trace of months stays a small file.
STEP = 1.0


def picture(reports: Sequence[Report]) -> str:
    """One below the other, on one scale of time."""
    stays = [s for report in reports for s in report.outcome.stays]
    began = min((s.began for s in stays), default=0.0)
    ended = max((s.ended for s in stays), default=1.0)
    scale = WIDTH / max(ended - began, 1.0)
    parts: list[str] = []
    top = TOP
    for report in reports:
        models = sorted({s.model for s in report.outcome.stays} | {m for _, m, _ in report.outcome.waits})
        title = f"{report.policy}: {report.hours_waited:.1f} hours waited, {report.loads} loads"
        parts.append(f'<text x="4" y="{top - 8}" class="title">{escape(title)}</text>')
        for model in models:
            parts.append(f'<text x="4" y="{top + 17}">{escape(model)}</text>')
            parts.append(f'<rect x="{LEFT}" y="{top + 4}" width="{WIDTH}" height="18" class="none"/>')
            own = [s for s in report.outcome.stays if s.model == model]
            parts += _bars("stays", ((s.loaded, s.ended) for s in own), began, scale, top + 4, 18)
            parts += _bars("loads", ((s.began, s.loaded) for s in own), began, scale, top + 4, 18)
            waits = [(at, at + seconds) for at, of, seconds in report.outcome.waits if of == model]
            parts += _bars("waits", waits, began, scale, top + 18, 4)
            top += ROW
        top += TOP
    height = top - TOP + 30
    days = _days(began, ended, scale, height - 6)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDTH + 10} {height}" '
        'font-family="sans-serif" font-size="13">'
        "<style>.title{font-weight:bold;font-size:15px}.none{fill:#eee}.stays{fill:#3b82b8}.loads{fill:#a9cfe8}"
        ".waits{fill:#c0392b}text{fill:#333}</style>"
        f'<rect width="100%" height="100%" fill="#fff"/>{"".join(parts)}{days}</svg>\n'
    )


def _bars(
    kind: str, spans: Iterable[tuple[float, float]], began: float, scale: float, y: float, height: float
) -> list[str]:
    merged: list[list[float]] = []
    for start, end in sorted(spans):
        left, right = LEFT + (start - began) * scale, LEFT + (end - began) * scale
        if merged and left <= merged[-1][1] + STEP:
            merged[-1][1] = max(merged[-1][1], right)
        elif right >= left:
            merged.append([left, right])
    return [
        f'<rect x="{left:.1f}" y="{y}" width="{max(right - left, 0.5):.1f}" height="{height}" class="{kind}"/>'
        for left, right in merged
    ]


def _days(began: float, ended: float, scale: float, y: float) -> str:
    hours = (ended - began) / 3600
    step = next((s for s in (1, 6, 24, 24 * 7, 24 * 30) if hours / s <= 16), 24 * 365)
    marks = range(0, int(hours) + 1, step)
    unit = "h" if step < 24 else "d"
    return "".join(
        f'<text x="{LEFT + hour * 3600 * scale:.0f}" y="{y}">{hour if unit == "h" else hour // 24} {unit}</text>'
        for hour in marks
    )
