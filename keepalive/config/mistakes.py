"""What is told to a person: mistakes, and values in a form that is fit for a terminal and keeps secrets."""

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass

from keepalive.core.errors import KeepaliveError

Key = tuple[str | int, ...]
"""Where a value stands: ("models", 1, "ping_interval")."""

# Shapes that only secrets have. LM Studio's own tokens start with "sk-lm-"; long runs of letters and digits
# are keys of other programs, and no model, host or window is written like that.
_SECRET = re.compile(
    r"sk-lm-|(?<![a-zA-Z])(?:sk|pk|hf|ghp|pat)[-_]\w|(?i:bearer\s)"
    r"|(?=[a-zA-Z]{0,99}\d)(?=\d{0,99}[a-zA-Z])[a-zA-Z0-9]{32}",
    re.ASCII,
)
_CREDENTIALS = re.compile(r"(//|:)[^\s/]{0,99}@")


@dataclass(frozen=True, slots=True)
class Mistake:
    """One thing to correct. For a variable of the environment, `file` is its name and `line` is None."""

    file: str
    line: int | None
    key: str
    message: str
    column: int | None = None

    def __str__(self) -> str:
        place = ":".join(str(part) for part in (self.file, self.line, self.column) if part is not None)
        return ": ".join(part for part in (place, self.key, self.message) if part)


class ConfigError(KeepaliveError):
    """A config that cannot be used, with everything that is wrong with it: one line per mistake.

    `rest` is the config without what is wrong, where there is one: for whoever looks for further mistakes.
    """

    def __init__(self, mistakes: Iterable[Mistake], rest: object = None) -> None:
        self.mistakes = tuple(mistakes)
        self.rest = rest
        super().__init__("\n".join(map(str, self.mistakes)))


def looks_secret(text: str) -> bool:
    # No message shows what stands further behind, and a file may hold a megabyte in one value.
    return _SECRET.search(text[:1000]) is not None


def short(text: str) -> str:
    """As it may stand on one line of a terminal."""
    if looks_secret(text):
        return "(a secret?)"
    text = _CREDENTIALS.sub(r"\1…@", text[:1000])
    return printable(text if len(text) <= 60 else f"{text[:59]}…")


def printable(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shown(value: object) -> str:
    """A value as it stands in the file, short and on one line. Tables and lists only by what they are."""
    match value:
        case bool():
            return str(value).lower()
        case str():
            return f'"{short(value)}"'
        case int() if abs(value) >= 10**30:
            return "a huge number"
        case dict():
            return "a table"
        case list() | tuple():
            return "a list"
        case _:
            return short(str(value))


def dotted(key: Key) -> str:
    """models[1].ping_interval"""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{_name(part)}" for part in key)[1:]


def _name(name: str) -> str:
    # A key is also a place where a secret or a terminal's control codes can stand.
    plain = re.fullmatch(r"[A-Za-z0-9_-]{1,40}", name) and not looks_secret(name)
    return name if plain else shown(name)


def nearest(word: str, known: Iterable[str], likeness: float = 0.6) -> str | None:
    lower = {name.lower(): name for name in known}
    near = difflib.get_close_matches(word.lower()[:100], lower, n=1, cutoff=likeness)
    return lower[near[0]] if near else None


def one_of(words: Iterable[str]) -> str:
    return " or ".join(dict.fromkeys(map(shown, words)))
