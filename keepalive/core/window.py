"""Calendar windows: the spans of a week in which a model is wanted.

    Mon-Fri 08:00-19:00
    Mon-Fri 08:00-12:00, 13:00-19:00; Sat 09:00-12:00
    Mon, Wed, Fri 22:00-06:00

After a comma the days before it go on, after a semicolon they start anew; without days, every day is meant.
A span over midnight belongs to the day on which it starts.

A window is a set of minutes on the wall clock of a week and nothing else. So a clock change needs no rule:
local times that the night skips never happen, and an hour that happens twice is inside twice.
"""

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta, tzinfo

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")

# What people write for several days. Near to a day's name, it is none of those days.
_SPANS = {
    **dict.fromkeys(
        ("weekday", "weekdays", "workday", "workdays", "working days", "business days"), "Mon-Fri"
    ),
    **dict.fromkeys(("weekend", "weekends"), "Sat-Sun"),
}
_EVERY_DAY = ("daily", "everyday", "every day", "all days")

_DAY = 24 * 60
_WEEK = 7 * _DAY
_WEEK_SECONDS = 604_800

# No zone changes its offset twice within six hours, so one comparison of offsets per step finds every change.
_STEP = timedelta(hours=6)

# Two weeks and a day, because a span can fall whole into the hour that a clock change skips: its next
# chance is a week later, and we may be asked right after it closed the week before.
_HORIZON = timedelta(days=15)

# Room for a dozen spans for every day, and none for a file that was pasted.
_LONGEST = 1000

_TIMES = re.compile(r"(?P<start>\d{1,2}:\d{2})\s*-\s*(?P<end>\d{1,2}:\d{2})", re.ASCII)
_LOOKS_LIKE_TIMES = re.compile(r"\d", re.ASCII)


@dataclass(frozen=True, slots=True)
class Window:
    """When a model is wanted. `text` is how it was written; two windows with the same minutes are equal."""

    minutes: tuple[tuple[int, int], ...]
    """Half-open spans of minutes since Monday 00:00, in order, apart from each other."""

    text: str = field(compare=False)

    def __str__(self) -> str:
        return self.text

    @property
    def always(self) -> bool:
        return self.minutes == ((0, _WEEK),)

    def contains(self, moment: datetime, zone: tzinfo) -> bool:
        """Whether the wall clock in `zone` stands inside the window. `moment` must know its own zone."""
        minute = _seconds_of_week(_aware(moment).astimezone(zone)) // 60
        return any(start <= minute < end for start, end in self.minutes)

    def next_change(self, moment: datetime, zone: tzinfo) -> datetime | None:
        """The first instant after `moment` at which `contains` answers otherwise, in UTC; None: never.

        In UTC, because local times of a repeated hour compare by their wall clock, so out of order.
        """
        if self.always:
            return None
        inside = self.contains(moment, zone)
        # In UTC, because adding to a local time moves its wall clock and not the time that passes.
        now = _aware(moment).astimezone(UTC).replace(microsecond=0)
        last = now + _HORIZON
        while now < last:
            now = self._next_candidate(now, zone)
            if self.contains(now, zone) != inside:
                return now
        return None

    def _next_candidate(self, now: datetime, zone: tzinfo) -> datetime:
        """The next instant at which something can change: an edge of the window or the offset of the zone."""
        local = now.astimezone(zone)
        second = _seconds_of_week(local)
        to_edge = min((edge * 60 - second - 1) % _WEEK_SECONDS + 1 for span in self.minutes for edge in span)
        then = min(now + timedelta(seconds=to_edge), now + _STEP)
        if then.astimezone(zone).utcoffset() == local.utcoffset():
            return then
        return _offset_change(now, then, zone)


def parse(text: str) -> Window:
    """Reads a window as a person writes it. ValueError says what is wrong with it and what to write."""
    if len(text) > _LONGEST:
        raise ValueError(f"has {len(text)} characters; write at most {_LONGEST}")
    spans: list[tuple[int, int]] = []
    for group in text.replace("–", "-").split(";"):
        days: list[int] = []
        # "Mon, Wed 08:00-12:00": days wait for the times that come behind them.
        waiting: list[int] = []
        for part in group.split(","):
            named, times = _read_part(part)
            waiting += named
            if times is None:
                continue
            start, end = times
            days, waiting = waiting or days or list(range(7)), []
            spans += [(day * _DAY + start, day * _DAY + end) for day in days]
        if waiting:
            raise ValueError(f'"{_short(part)}" has no times; write "{_short(part)} 00:00-24:00"')
    return Window(_merged(spans), " ".join(text.split()))


def _read_part(part: str) -> tuple[list[int], tuple[int, int] | None]:
    """Days and the minutes of a day between them; the end lies past 24:00 when it is on the next day."""
    part = part.strip()
    if not part:
        raise ValueError('a span is missing; write one such as "Mon-Fri 08:00-19:00"')
    times = _TIMES.search(part)
    if times is None:
        if _LOOKS_LIKE_TIMES.search(part):
            raise ValueError(f'"{_short(part)}" has no time span; write one such as "Mon-Fri 08:00-19:00"')
        return _read_days(part), None
    rest = part[times.end() :].strip()
    if rest:
        raise ValueError(f'"{_short(rest)}" follows a time; write days before the time and "," between spans')
    start, end = _read_time(times["start"]), _read_time(times["end"])
    if start == _DAY:
        raise ValueError('24:00 can only end a span; write "00:00" to start one')
    if start == end:
        raise ValueError(
            f'"{times[0]}" has no length, so it is never open; write "00:00-24:00" for a whole day'
        )
    days = part[: times.start()].strip()
    return (_read_days(days) if days else []), (start, end if end > start else end + _DAY)


def _read_time(text: str) -> int:
    hour, minute = map(int, text.split(":"))
    if minute > 59 or hour * 60 + minute > _DAY:
        raise ValueError(f'"{text}" is no time of day; write one from "00:00" to "24:00"')
    return hour * 60 + minute


def _read_days(text: str) -> list[int]:
    first, dash, last = (piece.strip() for piece in text.partition("-"))
    start = _read_day(first)
    end = _read_day(last) if dash else start
    return [(start + offset) % 7 for offset in range((end - start) % 7 + 1)]


def _read_day(text: str) -> int:
    for number, day in enumerate(DAYS):
        if text.lower() in (day.lower(), day[:3].lower()):
            return number
    if text.lower() in _EVERY_DAY:
        raise ValueError(f'"{_short(text)}" is no day; leave it out, because without days every day is meant')
    # A slip is seldom in the first letter; "lun" is Monday, in French, and not Sunday.
    names = {name.lower(): name for day in DAYS if day[0] == text[:1].upper() for name in (day[:3], day)}
    near = difflib.get_close_matches(text.lower()[:20], names, cutoff=0.5)
    # The short name, because that is what people write; "Thurs" and "Tues" are abbreviations and no slips.
    meant = _SPANS.get(text.lower()) or (names[near[0]][:3] if near else "")
    advice = f'write "{meant}"' if meant else 'write "Mon", "Tue", "Wed", "Thu", "Fri", "Sat" or "Sun"'
    raise ValueError(f'"{_short(text)}" is no day; {advice}')


def _merged(spans: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """The same minutes with no overlap. What runs past Sunday night goes on on Monday morning."""
    within: list[tuple[int, int]] = []
    for start, end in spans:
        within.append((start, min(end, _WEEK)))
        if end > _WEEK:
            within.append((0, end - _WEEK))
    merged: list[tuple[int, int]] = []
    for start, end in sorted(within):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return tuple(merged)


def _offset_change(before: datetime, after: datetime, zone: tzinfo) -> datetime:
    """The first second after `before` with another offset. A zone does not tell its changes, so we halve."""
    old = before.astimezone(zone).utcoffset()
    low, high = 0, int((after - before).total_seconds())
    while high - low > 1:
        middle = (low + high) // 2
        if (before + timedelta(seconds=middle)).astimezone(zone).utcoffset() == old:
            low = middle
        else:
            high = middle
    return before + timedelta(seconds=high)


def _seconds_of_week(local: datetime) -> int:
    return local.weekday() * _DAY * 60 + local.hour * 3600 + local.minute * 60 + local.second


def _aware(moment: datetime) -> datetime:
    if moment.utcoffset() is None:
        raise ValueError("a window needs a moment that knows its zone")
    return moment


def _short(text: str) -> str:
    printable = "".join(c if c.isprintable() else "?" for c in text.strip())
    return printable if len(printable) <= 40 else f"{printable[:39]}…"
