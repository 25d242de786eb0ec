"""Who keeps the models, as those see it who ask for one."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from keepalive.core.facts import ModelFact, ModelId


@dataclass(frozen=True, slots=True)
class View:
    """What is known of a model at this moment; times in seconds."""

    state: str
    reason: str | None = None
    elapsed: float | None = None
    eta: float | None = None
    instance_id: str | None = None
    in_flight: int = 0
    waiting: int = 0
    retry_after: float | None = None
    max_wait: float = 600.0


class Keeping(Protocol):
    """Who keeps the models."""

    def find(self, key: str, /) -> Sequence[ModelId]:
        """The models that a request for `key` means, on whichever upstreams; none when nobody keeps it."""

    def view(self, model: ModelId, /) -> View: ...

    async def ensure_warm(self, models: Sequence[ModelId], /) -> ModelId:
        """Waits until one of them is warm. Raises NotWarm. Cancelling it is leaving: the load goes on."""

    def record(self, fact: ModelFact, /) -> None: ...
