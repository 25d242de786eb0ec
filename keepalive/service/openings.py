"""What the openings say that are replayed to models: the keeper and its records know them by name alone.

What is learned from requests stays in memory, and nothing here shows what it holds.
"""

import secrets
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from json import loads

from keepalive.config import LEARN, Kept, Opening
from keepalive.core.callers import Begun
from keepalive.core.facts import ModelId
from keepalive.protocols import openings
from keepalive.protocols.routes import Protocol

Replay = tuple[str, openings.Body]

# A larger request is not looked into: it would hold up everybody's streams for longer than 5 ms.
LOOKED_INTO = 512 * 1024
# A shorter opening is read in no time.
LEAST_BYTES = 1024
# Of each model: how many requests are remembered as a mark, how many openings are kept, and how many bytes of them.
MARKS = 1024
LEARNED = 4
LEARNED_BYTES = 2 * 2**20
# A request counts half as much after a day, and what nobody has begun with for three is forgotten.
DAY = 86400.0
DAYS = 3 * DAY
SHARED = 2


@dataclass(slots=True)
class _Seen:
    """How often requests began with an opening. What it says is kept from the second one on."""

    count: int = 0
    weight: float = 0.0
    at: float = 0.0
    body: bytes = field(default=b"", repr=False)


class Openings:
    """The openings of all models. `clock` is the keeper's; `tell` is told when other ones are learned."""

    def __init__(self, clock: Callable[[], float], tell: Callable[[ModelId, tuple[str, ...]], None]) -> None:
        self._clock = clock
        self._tell = tell
        self._files: dict[ModelId, dict[str, Opening]] = {}
        self._marks: dict[ModelId, dict[bytes, str]] = {}  # of those from files
        self._learns: dict[ModelId, OrderedDict[bytes, _Seen]] = {}
        self._learned: dict[ModelId, tuple[bytes, ...]] = {}
        # Marks are of no use to whoever has another key: nobody can try whether he knows an opening.
        self._key = secrets.token_bytes(32)

    def configure(self, found: Mapping[tuple[str, str], Sequence[Opening]], kept: Collection[Kept]) -> None:
        """Those from files, by upstream and key; and which models learn."""
        self._files = {ModelId(*at): {_name(one): one for one in several} for at, several in found.items()}
        self._marks = {
            model: {mark: name for name, one in several.items() if (mark := self._mark_of_file(one))}
            for model, several in self._files.items()
        }
        learns = [ModelId(one.upstream, one.key) for one in kept if LEARN in one.prime]
        self._learns = {model: self._learns.get(model, OrderedDict()) for model in learns}
        self._learned = {model: self._learned.get(model, ()) for model in learns}

    def of(self, model: ModelId) -> Mapping[str, str | None]:
        """The names of a model's openings from files, in order, each with why it cannot be replayed, or None."""
        return {name: one.wrong for name, one in self._files.get(model, {}).items()}

    def look_up(self, model: ModelId, opening: str) -> Replay | None:
        """What is sent to have it read."""
        one = self._files.get(model, {}).get(opening)
        if one is not None:
            return openings.replay(one.body)
        for mark, seen in self._learns.get(model, {}).items():
            if _learned_name(mark) == opening and seen.body and self._clock() - seen.at <= DAYS:
                return openings.replay(loads(seen.body))
        return None

    def wants(self, model: ModelId) -> bool:
        """Whether it is of use to `note` requests for this model."""
        return model in self._learns or bool(self._files.get(model))

    def note(self, model: ModelId, protocol: Protocol, body: bytes) -> Begun | None:
        """A request was passed on to that model; the opening that it begins with, where that has a name."""
        if len(body) > LOOKED_INTO or len(body) < LEAST_BYTES:
            return None
        try:
            found = openings.opening(protocol, loads(body))
        except (ValueError, RecursionError):
            return None
        words = None if found is None else openings.written(found)
        if words is None:
            return None
        mark, mostly = self._mark(protocol, words), len(body) < 1.5 * len(words)
        name = self._marks.get(model, {}).get(mark)
        if name is not None:
            return Begun(name, mostly)
        if model not in self._learns or len(words) < LEAST_BYTES:
            return None
        self._count(model, mark, words)
        return Begun(_learned_name(mark), mostly)

    # --- learning -----------------------------------------------------------------------------------

    def _count(self, model: ModelId, mark: bytes, words: bytes) -> None:
        now, known = self._clock(), self._learns[model]
        seen = known.setdefault(mark, _Seen(at=now))
        seen.weight = seen.weight * 0.5 ** ((now - seen.at) / DAY) + 1
        seen.count += 1
        seen.at = now
        known.move_to_end(mark)
        if seen.count >= SHARED:
            seen.body = words
        while known and (len(known) > MARKS or now - next(iter(known.values())).at > DAYS):
            known.popitem(last=False)
        best = self._best(known, now)
        for other, theirs in known.items():
            if other not in best:
                theirs.body = b""  # it comes back with its next request
        if set(best) != set(self._learned[model]):
            self._learned[model] = best
            self._tell(model, tuple(map(_learned_name, best)))

    @staticmethod
    def _best(known: Mapping[bytes, _Seen], now: float) -> tuple[bytes, ...]:
        """Those that are shared most, as many as are kept."""
        shared = [(mark, seen) for mark, seen in known.items() if seen.body]
        shared.sort(key=lambda found: found[1].weight * 0.5 ** ((now - found[1].at) / DAY), reverse=True)
        best: list[bytes] = []
        room = LEARNED_BYTES
        for mark, seen in shared:
            room -= len(seen.body)
            if room >= 0 and len(best) < LEARNED:
                best.append(mark)
        return tuple(best)

    # --- names --------------------------------------------------------------------------------------

    def _mark(self, protocol: Protocol, words: bytes) -> bytes:
        return blake2b(words, digest_size=16, key=self._key, person=protocol.value.encode()).digest()

    def _mark_of_file(self, opening: Opening) -> bytes | None:
        if opening.wrong is not None:
            return None
        path, _ = openings.replay(opening.body)
        protocol = openings.PROTOCOLS[path]
        found = openings.opening(protocol, dict(opening.body))
        words = None if found is None else openings.written(found)
        return None if words is None else self._mark(protocol, words)


def _name(opening: Opening) -> str:
    """The file, and which content of it: one that has changed is another opening, and replayed anew."""
    content = openings.written(opening.body) or b""
    return f"{opening.file} {blake2b(content, digest_size=4).hexdigest()}"


def _learned_name(mark: bytes) -> str:
    return f"learned {mark[:4].hex()}"
