"""The last requests, for whoever looks at the page: who was asked, and how it went. Nothing of what was said.

And what was asked for that the config does not name: models that some upstream lists, by the key that it lists, never
by the words of a caller. In memory alone, and bounded.
"""

from collections import Counter, deque
from collections.abc import Callable, Collection
from typing import Any

from keepalive.core.callers import Seen
from keepalive.core.facts import ModelId

REQUESTS = 50
SHOWN_FOR = 15 * 60.0
UNNAMED = 100


class Recent:
    """Told of each request when it is over; `wall` gives Unix seconds."""

    def __init__(self, wall: Callable[[], float]) -> None:
        self._wall = wall
        self._seen: deque[tuple[float, Seen]] = deque(maxlen=REQUESTS)
        self._passed: Counter[ModelId] = Counter()
        self._served: Counter[ModelId] = Counter()

    def add(self, seen: Seen) -> None:
        self._seen.append((self._wall(), seen))
        if seen.model is not None and (seen.model in self._served or len(self._served) < 2 * UNNAMED):
            self._served[seen.model] += 1

    def passed(self, model: ModelId) -> None:
        """A request for a model that is listed and not kept was passed on."""
        if model in self._passed or len(self._passed) < UNNAMED:
            self._passed[model] += 1

    def requests(self) -> list[dict[str, Any]]:
        """Those of the last minutes, the newest first."""
        since = self._wall() - SHOWN_FOR
        return [_document(at, seen) for at, seen in reversed(self._seen) if at >= since]

    def unnamed(
        self, kept: Collection[ModelId], adopted: Collection[ModelId], loaded: Collection[ModelId] = ()
    ) -> list[dict[str, Any]]:
        """What was asked for and stands in no config, the most often first; `adopted` are kept all the same.

        And `loaded`, though nobody has asked for it here.
        """
        counts = {model: 0 for model in loaded if model not in kept}
        counts |= {model: count for model, count in self._passed.items() if model not in kept}
        counts |= {model: self._served[model] for model in adopted}
        found = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))[:UNNAMED]
        return [
            {"key": model.key, "upstream": model.upstream, "requests": count, "kept": model in adopted}
            for model, count in found
        ]


def _document(at: float, seen: Seen) -> dict[str, Any]:
    gaps = sum(seen.gaps)
    return {
        "at": at,
        "model": seen.model.key if seen.model else None,
        "upstream": seen.model.upstream if seen.model else None,
        "route": seen.route,
        "start": seen.start,
        "outcome": seen.outcome.value,
        "status": seen.status,
        "error": seen.error,
        "wait_seconds": round(seen.wait_seconds, 3),
        "first_token_seconds": None
        if seen.first_token_seconds is None
        else round(seen.first_token_seconds, 3),
        # Of events, which LM Studio sends one for each token, or nearly so.
        "tokens_per_second": round(gaps / seen.gap_seconds, 1) if gaps and seen.gap_seconds > 0 else None,
        "seconds": round(seen.seconds, 3),
    }
