"""Who keeps the models, as those see it who ask for one."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from keepalive.core.facts import ModelFact, ModelId, UpstreamFact
from keepalive.core.names import Meaning


@dataclass(frozen=True)  # without `slots`, so that it can be copied at once
class View:
    """What is known of a model at this moment; times in seconds."""

    state: str
    reason: str | None = None
    elapsed: float | None = None
    eta: float | None = None
    progress: float | None = None  # from 0 to 1, where LM Studio tells it
    instance_id: str | None = None
    retry_after: float | None = None
    max_wait: float = 600.0
    wanted: bool = True
    kind: str = "llm"
    context_length: int | None = None  # of the instance
    load_fields: Mapping[str, object] = field(default_factory=dict)
    stall_timeout: float | None = None  # None: its answers may be silent for ever
    # For how long LM Studio has been seen to say that it rests, and how long ago it was last asked.
    resting: tuple[float, float] | None = None
    questioned: bool = False  # a ping of ours, or an opening, is not answered yet


class Keeping(Protocol):
    """Who keeps the models."""

    def find(self, name: str, /) -> Sequence[ModelId]:
        """The models that a request for `name` means, on whichever upstreams; none when nobody keeps it."""

    async def meant(self, name: str, /) -> Sequence[ModelId]:
        """The same, for whoever asks for one: what LM Studio lists may be kept from now on.

        May wait for an upstream's first listing.
        """

    def take_up(self, name: str, /) -> None:
        """Keep what LM Studio lists under that name from now on, where that is wanted of what is asked for."""

    def offered(self) -> Collection[str]:
        """The names that may be asked for, for whoever wrote another."""

    async def meaning(self, name: str | None, /, *, default: bool = True) -> Meaning:
        """What a request means that names `name`, or nobody; see `Names.meaning`.

        May wait for an upstream's first listing.
        """

    def present(self, upstream: str, kind: str, /) -> Sequence[ModelId]:
        """The models of a kind that may answer there when LM Studio chooses."""

    def is_lm_studio(self, upstream: str, /) -> bool:
        """Whether it is known to be LM Studio, and no other server."""

    def is_away(self, upstream: str, /) -> bool:
        """Whether it is known not to answer."""

    def rows(self, upstream: str, /) -> Mapping[str, Sequence[str]]:
        """The aliases of each row of that upstream's listing, by the row's folded key."""

    def view(self, model: ModelId, /) -> View: ...

    def ready(self, models: Sequence[ModelId], /) -> ModelId | None:
        """Which of them is to be asked at once: the least busy of those that are warm; None where none is."""

    async def ensure_warm(self, models: Sequence[ModelId], /) -> ModelId:
        """Waits until one of them is warm. Raises NotWarm. Cancelling it is leaving: the load goes on."""

    def record(self, fact: ModelFact | UpstreamFact, /) -> None: ...
