"""What the openings say that are replayed to models: the keeper and its records know them by name alone."""

from collections.abc import Mapping, Sequence
from hashlib import blake2b
from json import dumps

from keepalive.config import Opening
from keepalive.core.facts import ModelId
from keepalive.protocols import openings

Replay = tuple[str, openings.Body]


class Openings:
    """The openings of all models, in memory."""

    def __init__(self) -> None:
        self._files: dict[ModelId, dict[str, Opening]] = {}

    def configure(self, found: Mapping[tuple[str, str], Sequence[Opening]]) -> None:
        """Those from files, by upstream and key."""
        self._files = {ModelId(*at): {_name(one): one for one in several} for at, several in found.items()}

    def of(self, model: ModelId) -> Mapping[str, str | None]:
        """The names of a model's openings from files, in order, each with why it cannot be replayed, or None."""
        files = self._files.get(model, {})
        return {name: one.wrong for name, one in files.items()}

    def look_up(self, model: ModelId, opening: str) -> Replay | None:
        one = self._files.get(model, {}).get(opening)
        return None if one is None else openings.replay(one.body)


def _name(opening: Opening) -> str:
    """The file, and which content of it: one that has changed is another opening, and replayed anew."""
    content = dumps(opening.body, separators=(",", ":")).encode()
    return f"{opening.file} {blake2b(content, digest_size=4).hexdigest()}"
