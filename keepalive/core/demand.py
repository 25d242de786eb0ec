"""Who was asked for, and how much of late: what tells which model is worth having in memory before anybody asks."""

from math import exp2, inf

from keepalive.core.records import Model

# Of what was asked for this long ago half still counts.
HALF_LIFE = 4 * 3600.0
# Below this nobody has asked for so long that memory may as well stay empty.
FORGOTTEN = 0.05


def demand(model: Model, now: float) -> float:
    """How much it was asked for of late: each request counts one, and half of that after each half-life."""
    if model.asks_at == -inf:
        return 0.0
    return model.asks * exp2(-max(0.0, now - model.asks_at) / HALF_LIFE)
