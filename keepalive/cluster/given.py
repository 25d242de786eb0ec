"""What a member is given: who it is, the keeper that it tells, and whoever its parts belong to."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from keepalive.core.facts import ModelFact, UpstreamFact
from keepalive.core.records import Snapshot


class Tell(Protocol):
    """A line of the log."""

    def __call__(self, event: str, *, well: bool, **fields: object) -> None: ...


@dataclass(frozen=True, slots=True)
class Self:
    """Who we are, as others are to see it."""

    cluster: str
    instance: str
    host: str
    version: str


class Keeping(Protocol):
    """The keeper, as far as this needs it."""

    def record(self, fact: ModelFact | UpstreamFact, /) -> None: ...
    def snapshot(self) -> Snapshot: ...
    def tick(self) -> None: ...
    def reconsider(self) -> None: ...


class Owner(Protocol):
    """Whose parts these are: a `Cluster`."""

    @property
    def addresses(self) -> tuple[str, str]: ...
    @property
    def config(self) -> Mapping[str, str]: ...
    @property
    def places(self) -> Mapping[str, str]: ...
    @property
    def doubled(self) -> bool: ...
    @property
    def leaving(self) -> bool: ...
    @property
    def changed(self) -> Callable[[], None]: ...

    def look_again(self) -> None:
        """Something may stand there that no picture has shown yet."""

    def say(self) -> None:
        """Something has changed here that others are to know."""
