"""From a file and the environment to a config, or to everything that is wrong with them."""

import json
import os
import re
import tomllib
import unicodedata
import zoneinfo
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from keepalive.config import lines
from keepalive.config.checks import Checks
from keepalive.config.mistakes import (
    ConfigError,
    Key,
    Mistake,
    dotted,
    nearest,
    one_of,
    printable,
    short,
    shown,
)
from keepalive.config.tables import SECTIONS, Config, Table, one_or_many
from keepalive.core.quotes import unquoted

NO_FILE = "environment"
"""What mistakes are attributed to when there is no file."""

SEARCHED = (Path("config.toml"), Path("/etc/keepalive/config.toml"))

_LARGEST_FILE = 1024 * 1024

# What other languages have for values, and TOML has otherwise or not at all.
_WORDS = {
    **dict.fromkeys(("true", "yes", "on"), "write true"),
    **dict.fromkeys(("false", "no", "off"), 'write false, or "off" where that is among the choices'),
    **dict.fromkeys(("none", "null", "nil", "undefined"), "take the line away, so that the default holds"),
}


def find(explicit: Path | None, environ: Mapping[str, str]) -> Path | None:
    """The file: `-c FILE`, $KEEPALIVE_CONFIG, ./config.toml or /etc/keepalive/config.toml, if there is one.

    A file that was named is returned whether it exists or not, and so is one that exists and cannot be read:
    to pass over it in silence would run the daemon with somebody else's settings.
    """
    if explicit is not None:
        return explicit
    if environ.get("KEEPALIVE_CONFIG"):
        return Path(unquoted(environ["KEEPALIVE_CONFIG"]))
    return next((path for path in SEARCHED if os.path.lexists(path)), None)


def load(path: Path | None, environ: Mapping[str, str]) -> Config:
    """The config in `path` and `environ`; no path: in `environ` alone. ConfigError holds every mistake."""
    source = NO_FILE if path is None else str(path)
    config = parse("" if path is None else read(path), source, environ)
    if any(kept.window for kept in config.kept):
        try:
            _ = config.zone
        except (OSError, ValueError, zoneinfo.ZoneInfoNotFoundError) as error:
            message = 'the zone of this machine cannot be told; write one such as "Europe/Lisbon"'
            raise ConfigError([Mistake(printable(source), None, "server.timezone", message)]) from error
    return config


def read(path: Path) -> str:
    """The text of the file. ConfigError says in one sentence why it cannot be had."""
    line = None
    try:
        with path.open("rb") as file:
            # One byte more than allowed tells that there is more, also of a device that never ends.
            content = file.read(_LARGEST_FILE + 1)
        if len(content) <= _LARGEST_FILE:
            # Editors on Windows put a byte order mark first, which TOML does not know.
            return content.decode("utf-8-sig")
        message = "is larger than 1 MiB, so it is no config; name another file by -c FILE"
    except OSError as error:
        message = f"cannot be read: {error.strerror}; name another file by -c FILE"
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        message = "is not UTF-8 text; save it as UTF-8, or name another file by -c FILE"
    raise ConfigError([Mistake(printable(str(path)), line, "", message)])


def parse(text: str, source: str, environ: Mapping[str, str]) -> Config:
    """The config in `text` and `environ`. ConfigError holds every mistake; they call the text `source`."""
    source = printable(source)
    reading = _Reading(source, text, _parse_toml(text, source))
    reading.overlay(environ)
    config = reading.config(environ)
    if reading.mistakes:
        in_order = sorted(reading.mistakes, key=lambda found: (found.line is None, found.line or 0))
        raise ConfigError(dict.fromkeys(in_order), config)
    return config


def _parse_toml(text: str, source: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        said, _, place = str(error).rpartition(" (at ")
        line, column = map(int, re.findall(r"\d+", place) or (text.rstrip("\n").count("\n") + 1, 0))
        rows = text.split("\n")
        row = rows[line - 1] if line <= len(rows) else ""
        message = f"not TOML: {short(said)}{_slip(said, row[max(column - 1, 0) :])}"
        raise ConfigError([Mistake(source, line, "", message, column or None)]) from None
    except (ValueError, RecursionError):
        # Python's own limits on nesting and on the digits of a number, far from any config that is meant.
        message = "not TOML that can be read: lists too deep in each other, or a number too long"
        raise ConfigError([Mistake(source, None, "", message)]) from None


def _slip(said: str, rest: str) -> str:
    """How people come to what TOML says: they write another language, leave quotes out, or paste from a page.

    `rest` is the line from that place on.
    """
    if twice := re.fullmatch(r"Cannot declare \('(\w+)',\) twice", said):
        if f"[[{twice[1]}]]" in SECTIONS:
            return f"; write [[{twice[1]}]] above each table"
        return "; it stands above already, so write its keys there"
    if said == "Cannot overwrite a value":
        return "; it stands above already, so take one of the two away"
    mark = rest.lstrip()[:1]
    if unicodedata.category(rest[:1] or " ") in ("Zs", "Cf") and rest[:1] not in ("", " "):
        return "; there is a blank or a mark here that cannot be seen, so type this line anew"
    if mark and mark in "“”„‟″‘’‚′«»`":
        return '; quotes are straight ones, as in "text"'
    if said.startswith("Expected '='") and mark == ":":
        return '; write "=" for ":"'
    if said.startswith("Expected newline") and mark and mark in ",;":
        return f'; take the "{mark}" away'
    word = re.match(r"[A-Za-z]*\b", rest)
    if said.startswith("Invalid value") and word and word[0].lower() in _WORDS:
        return f"; {_WORDS[word[0].lower()]}"
    if said.startswith(("Invalid value", "Expected newline", "Illegal character")):
        return "; text and durations stand in quotes"
    if said.startswith(("Unescaped '\\'", "Invalid hex value")):
        return "; in 'single quotes' a backslash is one, as in 'C:\\keepalive'"
    return ""


@dataclass
class _Reading:
    """One pass over one config, and what was found wrong on the way."""

    source: str
    text: str
    data: dict[str, Any]
    variables: dict[Key, str] = field(default_factory=dict)
    mistakes: list[Mistake] = field(default_factory=list)
    wrong: set[Key] = field(default_factory=set)

    @cached_property
    def lines(self) -> Mapping[Key, int]:
        return lines.find(self.text)

    def report(self, key: Key, message: str) -> None:
        self.wrong.add(key)
        self.mistakes.append(Mistake(*self._place(key), dotted(key), message))

    def _place(self, key: Key) -> tuple[str, int | None]:
        """The nearest thing that a person can go to: the variable, the line, else the table around it."""
        for end in range(len(key), 0, -1):
            if key[:end] in self.variables:
                return self.variables[key[:end]], None
            if key[:end] in self.lines:
                return self.source, self.lines[key[:end]]
            for inside, name in self.variables.items():
                if inside[:end] == key[:end]:
                    return name, None
        return self.source, None

    # The environment

    def overlay(self, environ: Mapping[str, str]) -> None:
        """Puts what the KEEPALIVE_… variables say into the tables, as if it stood in the file."""
        for name in sorted(environ, key=lambda name: re.sub(r"\d+", lambda number: number[0].zfill(4), name)):
            text = environ[name]
            # Compose files pass on every variable they mention, empty where nobody set it.
            if not name.startswith("KEEPALIVE_") or not text:
                continue
            *parts, last = name.removeprefix("KEEPALIVE_").lower().split("__")
            numbered = (int(part) if re.fullmatch(r"\d{1,3}", part, re.ASCII) else part for part in parts[1:])
            key: Key = (*parts[:1], *numbered, last)
            if parts and self._set(key, _from_variable(text)):
                self.variables[key] = name
            elif parts or (_MEANT.match(last) and name not in self.text and name not in environ.values()):
                advice = "write one such as KEEPALIVE_SERVER__LISTEN, or KEEPALIVE_MODELS__0__KEY and so on"
                self.mistakes.append(Mistake(short(name), None, "", f"is no setting; {advice}"))

    def _set(self, key: Key, value: object) -> bool:
        here: Any = self.data
        for depth, (part, following) in enumerate(pairwise(key), 1):
            if isinstance(here, list):
                here += [{}] if part == len(here) else []
                if int(part) >= len(here):
                    return False
            elif part not in here or self._gives_way(key[:depth], here[part]):
                here[part] = [] if isinstance(following, int) else {}
            here = here[part]
            if not isinstance(here, list if isinstance(following, int) else dict):
                return False
        here[key[-1]] = value
        return True

    def _gives_way(self, key: Key, value: object) -> bool:
        """Whether a word of the file stands where a table may stand as well, of which a variable now says a part."""
        is_either = len(key) > 1 and _header(key) is not None and isinstance(key[-1], str)
        return is_either and isinstance(value, str) and key not in self.variables

    def _misspelt(self, detail: ErrorDetails) -> str | None:
        """In the words of a variable that has something unknown in its name; None where it is not that, or not near."""
        key = detail["loc"]
        name = next((name for inside, name in self.variables.items() if inside[: len(key)] == key), None)
        if detail["type"] != "extra_forbidden" or name is None or key in self.lines:
            return None
        meant = _meant(_table_at(key[:-1]), str(key[-1]), detail["input"])
        if meant is None:
            return None
        parts = name.split("__")
        parts[len(key) - 1] = f"KEEPALIVE_{meant.upper()}" if len(key) == 1 else meant.upper()
        return f"is unknown; write {'__'.join(parts)}"

    # The tables

    def config(self, environ: Mapping[str, str]) -> Config:
        """The config; of no use after a mistake."""
        self.data = {name: value for name, value in self.data.items() if value != []}
        try:
            config = Config.model_validate(self.data)
        except ValidationError as error:
            for detail in error.errors(include_url=False):
                self.report(detail["loc"], self._misspelt(detail) or _explained(detail))
                self._repair(detail["loc"])
            config = Config.model_validate(self.data)
        if not config.models and not self.mistakes and config.server.unlisted == "pass":
            if self.source != NO_FILE or "unlisted" in config.server.model_fields_set:
                self.report((), _nothing_to_keep(self.source))
            # Nobody has said anything: whoever is asked for is kept, and nothing has to be written first.
            config = config.model_copy(
                update={"server": config.server.model_copy(update={"unlisted": "auto"})}
            )
        for key, message in Checks(config, frozenset(self.wrong)).all():
            self.report(key, message)
        state_dir = config.server.state_dir or _state_dir(environ)
        server = config.server.model_copy(update={"state_dir": state_dir})
        path = state_dir / "history.db" if state_dir and config.history.path is None else config.history.path
        history = config.history.model_copy(update={"path": path})
        return config.model_copy(update={"server": server, "history": history})

    def _repair(self, key: Key) -> None:
        """Puts something sound in the place of what is wrong, so that the rest can be compared."""
        if self._stands_in(key):
            return
        while len(key) > 1 and not _header(key[:-1] if isinstance(key[-1], str) else key):
            key = key[:-1]  # a piece of a value, such as one text of a list: the value goes
            self.wrong.add(key)
        *path, last = key
        here: Any = self.data
        for part in path:
            here = here[part]
        kind = _table_at(key if isinstance(last, int) else key[:-1])
        examples = {name: _example(info) for name, info in kind.model_fields.items() if info.is_required()}
        if isinstance(last, int):
            here[last] = examples
            self.wrong |= {(*key, name) for name in kind.model_fields}
        elif last in examples:
            here[last] = examples[last]
        else:
            here.pop(last, None)

    def _stands_in(self, key: Key) -> bool:
        """Whether it is one text of a list, of which the others can now be compared, each at its place."""
        if len(key) < 2 or not isinstance(key[-1], int) or _header(key[:-1]):
            return False
        *path, name, position = key
        info = _table_at(tuple(path)).model_fields.get(str(name))
        if info is None or not info.examples:
            return False
        here: Any = self.data
        for part in path:
            here = here[part]
        values: Any = one_or_many(here[name])
        here[name] = list(values)
        here[name][position] = info.examples[0]
        return True


# What begins like a section, and is no variable of another program or one that the config names.
_MEANT = re.compile(rf"({'|'.join(Config.model_fields)})(_|$)")


def _from_variable(text: str) -> object:
    """The value as it would stand in the file; what is no TOML is text."""
    found = _value(text)
    if isinstance(found, str) and found != text and found.startswith(("[", "{")):
        # `docker run --env-file` takes the quotes around a list for a part of it.
        return _value(found)
    return found


def _value(text: str) -> Any:
    try:
        found = tomllib.loads(f"it = {text}")
    except (ValueError, RecursionError):
        return text
    return found["it"] if len(found) == 1 else text


def _explained(detail: ErrorDetails) -> str:
    """In our words what pydantic found."""
    key, context = detail["loc"], detail.get("ctx", {})
    # Who writes a key of [auth] in the wrong way writes the secret itself.
    value = "this" if key[0] == "auth" else shown(detail["input"])
    kind, name, header = _table_at(key[:-1]), str(key[-1]), _header(key)
    example = _as_toml(_example(kind.model_fields.get(name)))
    match detail["type"]:
        case "extra_forbidden":
            return _unknown(kind, name, detail["input"])
        case "missing":
            return f"is missing; write {name} = {example}"
        case "value_error":
            return str(context["error"])
        case "literal_error":
            allowed = re.findall(r"'([^']+)'", context["expected"])
            near = nearest(str(detail["input"]), allowed)
            return f"{value} is not known; write {shown(near) if near else one_of(allowed)}"
        case "int_type" | "int_from_float":
            return f"{value} is no whole number; write one such as {example}, without quotes"
        case "bool_type":
            return f"{value} is neither true nor false; write one of them, without quotes"
        case "greater_than_equal":
            return f"{value} is too small; write {context['ge']} or more"
        case "less_than_equal":
            return f"{value} is too large; write {context['le']} or less"
        case "model_type":
            return f"{value} is no table; write {header} and the keys below it"
        case "tuple_type" if header:
            return f"{value} is no list; write {header} above each table"
        case "tuple_type":
            return f"{value} is no list; write one such as [{example}]"
    return f"{value} cannot stand here: {short(detail['msg'])}"


def _header(key: Key) -> str | None:
    """The header of the table at `key`; None where no table can stand."""
    names = [part for part in key if isinstance(part, str)]
    return next((header for header in SECTIONS if header.strip("[]").split(".") == names), None)


def _table_at(key: Key) -> type[Table]:
    header = _header(key)
    return SECTIONS[header] if header else Config


def _example(info: FieldInfo | None) -> Any:
    return info.examples[0] if info and info.examples else 1


def _as_toml(value: object) -> str:
    if isinstance(value, dict):
        return f"{{ {', '.join(f'{key} = {_as_toml(inner)}' for key, inner in value.items())} }}"
    return json.dumps(value, ensure_ascii=False)


# What LM Studio and other programs call it.
_ALSO_CALLED = {
    "base_url": "url", "host": "url", "id": "key", "model": "key", "name": "key", "ttl": "lease",
    "url": "urls_env", "urls": "urls_env",
}  # fmt: skip


def _known(kind: type[Table]) -> Mapping[str, str]:
    """The names that may stand in a table, and how each is written in the file."""
    if kind is Config:
        return {header.strip("[]"): header for header in SECTIONS if "." not in header}
    return {field: field for field in kind.model_fields}


def _meant(kind: type[Table], name: str, value: object) -> str | None:
    """The one that a wrong name of this table most likely stands for; None where it is that of another table."""
    known = _known(kind)
    also = _ALSO_CALLED.get(name)
    if also in known:
        return also
    return None if _elsewhere(name, value) else nearest(name, known)


def _elsewhere(name: str, value: object) -> list[str]:
    """The headers of the tables where this could stand."""
    if isinstance(value, dict | list):
        return []
    return [header for header, other in SECTIONS.items() if _may_stand(other, name, value)]


def _unknown(kind: type[Table], name: str, value: object) -> str:
    known = _known(kind)
    if meant := _meant(kind, name, value):
        return f"is unknown; write {known[meant]}"
    if elsewhere := _elsewhere(name, value):
        return f"is unknown here; write it below {' or '.join(elsewhere)}"
    every = ", ".join(known.values())
    return f"is unknown; write {every if len(known) == 1 else f'one of {every}'}"


def _may_stand(kind: type[Table], name: str, value: object) -> bool:
    """Whether that table has such a key, and the value is none of another kind of key by that name."""
    if name not in kind.model_fields:
        return False
    try:
        kind.model_validate({name: value})
    except ValidationError as error:
        return ((name,), "literal_error") not in {(e["loc"], e["type"]) for e in error.errors()}
    return True


def _nothing_to_keep(source: str) -> str:
    if source == NO_FILE:
        missing = f"there is no {SEARCHED[0]} and no {SEARCHED[1]}"
        return f'nothing to keep warm, because {missing}; "keepalive init" writes one'
    return 'nothing to keep warm; add [[models]] and key = "…", a key that LM Studio lists'


def _state_dir(environ: Mapping[str, str]) -> Path | None:
    if environ.get("STATE_DIRECTORY"):
        # systemd lists several, with colons between, when a unit asks for several; the first one is ours.
        return Path(environ["STATE_DIRECTORY"].split(":")[0])
    if environ.get("XDG_STATE_HOME"):
        return Path(environ["XDG_STATE_HOME"]) / "keepalive"
    return Path(environ["HOME"]) / ".local/state/keepalive" if environ.get("HOME") else None
