"""What LM Studio would say to a load, said of an instance that is there."""

import json
from collections.abc import Mapping
from typing import Any, Final, Protocol

from keepalive.protocols.json_text import text


class Loaded(Protocol):
    @property
    def kind(self) -> str: ...
    @property
    def instance_id(self) -> str | None: ...
    @property
    def context_length(self) -> int | None: ...
    @property
    def load_fields(self) -> Mapping[str, object]: ...


_PLAIN: Final = frozenset(("model", "echo_load_config"))


def is_plain(body: bytes) -> bool:
    """Whether a load asks for nothing but its model."""
    return _asked(body).keys() <= _PLAIN


def joined(body: bytes, loaded: Loaded, key: str, waited: float) -> tuple[bytes, list[str]]:
    """The answer to the load in `body`, and the names of what it asked for and does not get."""
    asked = _asked(body)
    config = dict(loaded.load_fields)
    if loaded.context_length is not None:
        config["context_length"] = loaded.context_length
    # What nobody told us is LM Studio's choice, and may well be what was asked for.
    differs = [name for name, value in config.items() if name in asked and asked[name] not in (None, value)]
    answer: dict[str, object] = {
        "type": "embedding" if loaded.kind == "embedding" else "llm",
        "instance_id": loaded.instance_id or key,
        "load_time_seconds": round(waited, 3),
        "status": "loaded",
    }
    if asked.get("echo_load_config") is True:
        answer["load_config"] = config
    return json.dumps(answer, separators=(",", ":")).encode(), differs


def _asked(body: bytes) -> dict[str, Any]:
    try:
        return dict(json.loads(text(body)))
    except (ValueError, RecursionError):
        return {}  # it names a model, so it is no worse than nested without end
