"""For how long we may act on the strength of a lease, by our own clock alone.

A lease runs out at the engine no sooner than `ttl` after it was last renewed there. That happened some time after the
renewal was *asked* for, so that counting from then errs on the safe side whatever the network does. What is taken off
besides is for clocks that do not run at the same pace. The clock is one that goes on while the machine sleeps.
"""

from dataclasses import dataclass
from math import inf

# Of a lease this much is not used: far more than two clocks differ in so short a time.
MARGIN = 0.15
# So often is it renewed while it runs: two renewals may be lost.
RENEWALS = 3.0


@dataclass(frozen=True, slots=True)
class Hold:
    """`asked`: when the last renewal that was answered was asked for; -inf: there is no lease."""

    ttl: float
    asked: float = -inf

    def renewed(self, asked: float) -> "Hold":
        return Hold(self.ttl, max(self.asked, asked))

    @property
    def until(self) -> float:
        """From then on nothing may be begun, whatever the engine would say."""
        return self.asked + self.ttl * (1 - MARGIN)

    @property
    def interval(self) -> float:
        return self.ttl / RENEWALS

    def good(self, now: float) -> bool:
        return now < self.until
