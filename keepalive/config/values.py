"""Readers of single values: text of the file in, what we use out. ValueError says what to write instead."""

import re
import zoneinfo
from pathlib import Path
from typing import Literal

from keepalive.config.mistakes import looks_secret, nearest, short, shown
from keepalive.core import window as windows
from keepalive.core.window import Window

_UNITS = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}
_DURATION = re.compile(
    r"(?=\d)" + "".join(rf"(?:(\d{{1,12}}(?:\.\d{{1,12}})?){unit})?" for unit in _UNITS), re.ASCII
)
_UNIT_WORD = re.compile(r"([dhms])(?:ays?|(?:ou)?rs?|in(?:ute)?s?|ec(?:ond)?s?)(?![a-z])")

_SIZES = {"kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_SIZE = re.compile(rf"(\d{{1,12}})({'|'.join(_SIZES)})", re.ASCII)

_MEMORY_UNITS = {**_SIZES, "TB": 10**12, "TiB": 2**40}
_MEMORY = re.compile(rf"(\d{{1,12}}(?:\.\d{{1,6}})?)({'|'.join(_MEMORY_UNITS)})", re.ASCII)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", re.ASCII)

# Looser than the readers, because the engines of some editors know no lookahead.
DURATION_PATTERN = r"(\d+(\.\d+)?(ms|[smhd]))+"
SIZE_PATTERN = _SIZE.pattern
MEMORY_PATTERN = rf"(\d+(\.\d+)?)({'|'.join(_MEMORY_UNITS)})"


def seconds(text: str) -> float:
    """ "1h30m" is 5400.0. ValueError where it is no duration."""
    found = _DURATION.fullmatch(text)
    if found is None:
        raise ValueError("no duration")
    return sum(
        float(number or 0) * unit for number, unit in zip(found.groups(), _UNITS.values(), strict=True)
    )


def written(duration: float) -> str:
    """5400.0 is "1h30m": how a duration stands in a config."""
    rest, parts = round(duration * 1000), []
    for unit, length in _UNITS.items():
        count, rest = divmod(rest, round(length * 1000))
        parts += [f"{count}{unit}"] if count else []
    return "".join(parts) or "0s"


def read_duration(value: object, low: str, high: str) -> float:
    if isinstance(value, str) and _DURATION.fullmatch(value):
        length = seconds(value)
        if not seconds(low) <= length <= seconds(high):
            raise ValueError(f'{shown(value)} is out of range; write one from "{low}" to "{high}"')
        return length
    text = shown(value).strip('" ').lower()
    if re.fullmatch(r"\d+(\.\d+)?", text, re.ASCII):
        advice = f'"{text}s" or "{text}m"' if float(text) else f'"{low}"'
        raise ValueError(f"{shown(value)} has no unit; write {advice}")
    plain = _UNIT_WORD.sub(r"\1", text.replace(" ", ""))
    fits = _DURATION.fullmatch(plain)
    advice = f'write "{plain}"' if fits else 'write one such as "500ms", "30s", "5m" or "1h30m"'
    raise ValueError(f"{shown(value)} is no duration; {advice}")


def read_duration_or_off(value: object, low: str, high: str) -> float | Literal["off"]:
    if value == "off":
        return "off"
    try:
        return read_duration(value, low, high)
    except ValueError as error:
        raise ValueError(f'{error}, or "off"') from None


def read_size(value: object) -> int:
    found = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if found is None:
        advice = _size_meant(value, _SIZE) or 'a number and a unit, such as "64MiB"'
        raise ValueError(f"{shown(value)} is no size; write {advice}")
    size = int(found[1]) * _SIZES[found[2]]
    if not 2**10 <= size <= 2**34:
        raise ValueError(f'{shown(value)} is out of range; write a size from "1KiB" to "16GiB"')
    return size


def _size_meant(value: object, fits: re.Pattern[str]) -> str | None:
    """A size whose unit is spelt otherwise, quoted; "G" alone is what `free -h` and `ulimit` mean by it."""
    found = re.fullmatch(r"([\d.]+)([a-z]+)", shown(value).strip('"').replace(" ", "").lower(), re.ASCII)
    if found is None:
        return None
    units = {unit.lower(): unit for unit in _MEMORY_UNITS} | {
        unit[0].lower(): unit for unit in _MEMORY_UNITS if unit.endswith("iB")
    }
    meant = found[1] + units.get(found[2], "")
    return f'"{meant}"' if fits.fullmatch(meant) else None


def read_memory(value: object) -> int:
    found = _MEMORY.fullmatch(value) if isinstance(value, str) else None
    if found is None:
        advice = _size_meant(value, _MEMORY) or 'a number and a unit, such as "40GiB" or "4.5GB"'
        raise ValueError(f"{shown(value)} is no size; write {advice}")
    size = round(float(found[1]) * _MEMORY_UNITS[found[2]])
    if not 2**20 <= size <= 2**50:
        raise ValueError(f'{shown(value)} is out of range; write a size from "1MiB" to "1024TiB"')
    return size


def read_window(value: str) -> Window:
    if looks_secret(value):
        raise ValueError(f'{shown(value)} is no window; write one such as "Mon-Fri 08:00-19:00"')
    return windows.parse(value)


def _zone_meant(value: str) -> str | None:
    """A zone that is spelt a little otherwise, or named by its place alone.

    None for what is short for one, or counts hours: the nearest to CEST is EST, seven hours from it, and Etc/GMT+2 is
    two hours *behind* Greenwich.
    """
    zones = sorted(zone for zone in zoneinfo.available_timezones() if not zone.startswith("Etc/"))
    said = value.lower().replace(" ", "_")
    named = (zone for zone in zones if said in (zone.lower(), zone.rpartition("/")[2].lower()))
    return next(named, None) or nearest(value, (zone for zone in zones if "/" in zone), 0.85)


def read_zone_name(value: str) -> str:
    try:
        zoneinfo.ZoneInfo(value)
    except (OSError, ValueError, zoneinfo.ZoneInfoNotFoundError):
        near = _zone_meant(value[:40])
        advice = f'write "{near}"' if near else 'write an IANA name such as "Europe/Lisbon"'
        raise ValueError(f"{shown(value)} is no known time zone; {advice}") from None
    return value


def read_directory(value: str) -> Path:
    if not value.startswith("/") or "\0" in value:
        raise ValueError(f'{shown(value)} is no path from "/"; write one such as "/var/lib/keepalive"')
    return Path(value)


def read_file(value: object) -> Path | Literal[False]:
    """A path, or false where there shall be none."""
    if value is False:
        return False
    if not isinstance(value, str) or not value.startswith("/") or value.endswith("/") or "\0" in value:
        advice = 'write one such as "/var/lib/keepalive/history.db", or false for none'
        raise ValueError(f'{shown(value)} is no path of a file from "/"; {advice}')
    return Path(value)


def read_name(value: str) -> str:
    # It becomes a label in metrics and part of the file name of a systemd credential.
    if not _NAME.fullmatch(value):
        raise ValueError(f'{shown(value)} is no name; write letters and digits, ".", "-" and "_" between')
    return value


def read_line(value: str) -> str:
    # It stands in logs, labels, URLs and on a terminal: nothing in it may move a cursor or end a line.
    if not value.strip() or value != value.strip() or not value.isprintable() or len(value) > 256:
        raise ValueError(f"{shown(value)} is not one line; write 1 to 256 characters, no space around them")
    return value


def read_prime(value: str) -> str:
    # A whole prompt in the place of a file's name is told by its lines, and not repeated.
    if not value.strip() or not value.isprintable() or len(value) > 1024:
        raise ValueError('is no name of a file; write one such as "prompts/agent.json", or "learn"')
    return value


def read_prompt_id(value: object) -> int | str:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError(f"{shown(value)} is no prompt id; write a number such as 28, or text")  # noqa: TRY004
    return read_line(value) if isinstance(value, str) else value


def read_template(value: str) -> str:
    if not value.strip():
        raise ValueError("is empty; write some text")
    torn = re.search(r"\{\{\s*(\w+)\s*\}(?!\})", value)
    if torn:
        raise ValueError(f'a variable is not closed; write "{{{{{short(torn[1])}}}}}"')
    return value


def read_secret_place(value: object, *, what: str, pattern: str, example: str) -> str:
    # Told without the value: the usual mistake is to write the secret itself.
    if not isinstance(value, str) or not value.isprintable() or not re.fullmatch(pattern, value, re.ASCII):
        raise ValueError(
            f'is not the name of a {what}; write one such as "{example}", never the secret itself'
        )
    return value
