"""Who was asked for, and how much of late: what tells which model is worth having in memory before anybody asks."""

from collections.abc import Iterable
from math import exp2, inf

from keepalive.core.records import Model

# Of what was asked for this long ago half still counts.
HALF_LIFE = 4 * 3600.0
# Below this nobody has asked for so long that memory may as well stay empty.
FORGOTTEN = 0.05


def faded(asked: Iterable[tuple[float, float]]) -> float:
    """What is left of having been asked for: pairs of how many seconds ago, and how many times."""
    return sum(times * exp2(-max(0.0, ago) / HALF_LIFE) for ago, times in asked)


def demand(model: Model, now: float) -> float:
    """How much it was asked for of late: each request counts one, and half of that after each half-life."""
    if model.asks_at == -inf:
        return 0.0
    return faded([(now - model.asks_at, model.asks)])
