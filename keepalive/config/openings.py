"""The files that `prime` names: each a request body as a caller would send it, or plain text.

They are read beside the config, because a model whose opening is in disorder is served all the same. No message holds
anything that a file says.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from keepalive.config import lines
from keepalive.config.mistakes import ConfigError, Key, Mistake, dotted, printable, shown
from keepalive.config.ping import no_constant, no_json
from keepalive.config.reading import NO_FILE, read
from keepalive.config.tables import LEARN, Config, Model

# A million tokens are 4 MB or less, and no model reads more in minutes.
LARGEST = 4 * 2**20


@dataclass(frozen=True, slots=True)
class Opening:
    """What is replayed, and the name that the config gives it. `wrong`: why it cannot be."""

    file: str
    body: Mapping[str, Any] = field(repr=False, default_factory=dict)
    wrong: str | None = None


class _Unusable(Exception):
    """`str()` goes on behind the name of the file."""


def read_openings(
    config: Config, path: Path | None
) -> tuple[Mapping[tuple[str, str], tuple[Opening, ...]], tuple[Mistake, ...]]:
    """The openings of each model, by its upstream and key, and what is wrong with some of them.

    `path` is that of the config, beside which they lie.
    """
    found: dict[tuple[str, str], tuple[Opening, ...]] = {}
    mistakes: list[Mistake] = []
    for number, model in enumerate(config.models):
        openings = []
        for position, name in enumerate(model.prime):
            if name == LEARN:
                continue
            try:
                body = _body((Path() if path is None else path.parent) / name)
                _check_model(body, model)
            except _Unusable as error:
                key = ("models", number, "prime", position)
                mistakes.append(_mistake(path, key, f"{shown(name)} {error}"))
                openings.append(Opening(name, wrong=str(error)))
            else:
                openings.append(Opening(name, body))
        for upstream in model.upstream or (config.upstreams[0].name,):
            found[upstream, model.key] = tuple(openings)
    return found, tuple(mistakes)


def with_openings(error: ConfigError, path: Path | None) -> ConfigError:
    """The same mistakes, and those of the openings: who mends a config wants to do so once."""
    if not isinstance(error.rest, Config):
        return error
    # Which names a model has is not known where one of them is wrong.
    torn = {
        at for at, _, name in (m.key.partition(".") for m in error.mistakes) if name[:3] in ("key", "ali")
    }
    told = {mistake.key for mistake in error.mistakes}
    found = [
        m
        for m in read_openings(error.rest, path)[1]
        if m.key.partition(".")[0] not in torn and m.key not in told
    ]
    every = sorted((*error.mistakes, *found), key=lambda mistake: (mistake.line is None, mistake.line or 0))
    return ConfigError(every)


def _mistake(path: Path | None, key: Key, message: str) -> Mistake:
    if path is None:
        return Mistake(NO_FILE, None, dotted(key), message)
    try:
        places = lines.find(read(path))
    except (ConfigError, ValueError):
        places = {}  # it has changed since
    line = next((places[key[:end]] for end in range(len(key), 0, -1) if key[:end] in places), None)
    return Mistake(printable(str(path)), line, dotted(key), message)


def _body(path: Path) -> Mapping[str, Any]:
    text = _text(path)
    if path.suffix.lower() != ".json" and not text.lstrip().startswith("{"):
        if not text.strip():
            raise _Unusable("is empty; write what the model is to have read")
        return {"messages": [{"role": "system", "content": text}]}
    try:
        body = json.loads(text, parse_constant=no_constant)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise _Unusable(f"is no JSON: {error.msg} at {place}; mend it, or name plain text .txt") from None
    except (ValueError, RecursionError):
        raise _Unusable(
            "is no JSON that can be read: a number too long, or lists too deep in each other"
        ) from None
    if not isinstance(body, dict) or not _asks(body):
        raise _Unusable('is no request of a chat; write { "messages": [ … ], "tools": [ … ] }')
    for key, message in no_json(body, ()):
        raise _Unusable(f"cannot be sent: {dotted(key)} {message}")
    if any(_images(body)):
        raise _Unusable("holds an image, and an opening is of words alone; leave it out")
    return body


def _text(path: Path) -> str:
    try:
        if not path.is_file():
            # To open a pipe would wait for whoever writes to it.
            raise _Unusable("is no file" if path.exists() else "cannot be read: there is no such file")
        with path.open("rb") as file:
            content = file.read(LARGEST + 1)
    except OSError as error:
        raise _Unusable(f"cannot be read: {error.strerror}") from None
    if len(content) > LARGEST:
        raise _Unusable(f"is larger than {LARGEST >> 20} MiB, which is no opening; name a smaller file")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise _Unusable("is not UTF-8 text; save it as UTF-8") from None


def _asks(body: Mapping[str, Any]) -> bool:
    """Whether it is what a route of chats takes."""
    messages = body.get("messages")
    if isinstance(messages, list) and messages:
        return all(isinstance(message, dict) for message in messages)
    return "messages" not in body and any(
        isinstance(body.get(name), str) for name in ("instructions", "system")
    )


def _images(value: object) -> Iterator[bool]:
    match value:
        case dict():
            kind = value.get("type")
            yield isinstance(kind, str) and "image" in kind and ("image_url" in value or "source" in value)
            for name, inner in value.items():
                if name != "tools":  # of which one may be about images
                    yield from _images(inner)
        case list():
            for inner in value:
                yield from _images(inner)


def _check_model(body: Mapping[str, Any], model: Model) -> None:
    """A body that was recorded names its model. Another one is a mistake: its opening would help nobody."""
    name = body.get("model")
    known = {name.lower() for name in (model.key, *model.aliases)}
    if name is not None and (not isinstance(name, str) or name.lower() not in known):
        raise _Unusable(f"asks for {shown(name)}, and stands at {shown(model.key)}; leave model out")
