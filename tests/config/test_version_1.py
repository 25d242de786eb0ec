"""Files of version 1 are read as version 1 read them.

Beside each file lies what version 1 made of it, written by version 1. New keys may stand beside the old ones; no old
value may change.
"""

import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from keepalive import config
from tests.kit import DATA

FILES = sorted((DATA / "v1").glob("*.toml"))


def read(text: str) -> Any:
    """What is made of a file, as JSON can hold it."""
    found = config.parse(text, "config.toml", {"HOME": "/home/me"})
    return plain(
        {
            "server": dict(found.server),
            "history": dict(found.history),
            "upstreams": [dict(upstream) for upstream in found.upstreams],
            "defaults": dict(found.defaults),
            "kept": [{name: getattr(kept, name) for name in kept.__slots__} for kept in found.kept],
            "prompts": [dict(prompt) for prompt in found.prompts],
            "auth": {side: [dict(key) for key in keys] for side, keys in found.auth},
        }
    )


def plain(value: Any) -> Any:
    if hasattr(value, "items"):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return value if isinstance(value, bool | int | float | None) else str(value)


def old_part(value: Any, old: Any) -> Any:
    """`value` without the keys that version 1 did not have."""
    if isinstance(old, dict) and isinstance(value, dict):
        return {key: old_part(inner, old[key]) for key, inner in value.items() if key in old}
    if isinstance(old, list) and isinstance(value, list) and len(value) == len(old):
        return [old_part(*pair) for pair in zip(value, old, strict=True)]
    return value


def keys(table: Any, place: str = "") -> Iterator[str]:
    if isinstance(table, list):
        for inner in table:
            yield from keys(inner, place)
    elif isinstance(table, dict):
        for name, inner in table.items():
            yield f"{place}.{name}"
            yield from keys(inner, f"{place}.{name}")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_file_of_version_1_means_what_it_meant(file: Path) -> None:
    old = json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))
    found = read(file.read_text(encoding="utf-8"))

    assert old_part(found, old) == old


def test_the_files_hold_every_key_of_version_1() -> None:
    shipped = (DATA / "v1/shipped.toml").read_text(encoding="utf-8")
    every = set(keys(tomllib.loads(re.sub(r"(?m)^#(?=[a-z\[])", "", shipped))))
    tried = set(keys(tomllib.loads((DATA / "v1/everything.toml").read_text(encoding="utf-8"))))

    assert len(every) > 60
    assert tried == every


def test_the_shipped_file_of_version_1_can_be_used_line_by_line() -> None:
    """As people do it: take the "#" away."""
    shipped = (DATA / "v1/shipped.toml").read_text(encoding="utf-8")
    old = json.loads((DATA / "v1/uncommented.json").read_text(encoding="utf-8"))
    found = read(re.sub(r"(?m)^#(?=[a-z\[])", "", shipped))

    assert old_part(found, old) == old
