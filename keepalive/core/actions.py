"""What can be done. An action says it in the imperative, as a fact says in the past tense what came of it."""

from dataclasses import dataclass

from keepalive.core.facts import ModelId, UnloadCause


@dataclass(frozen=True, slots=True)
class Refresh:
    """List what the upstream has. `loading`: somebody needs to know what is being loaded, too."""

    upstream: str
    loading: bool = False


@dataclass(frozen=True, slots=True)
class Load:
    """`ahead` and `claim` as `LoadStarted` has them."""

    model: ModelId
    ahead: bool = False
    claim: int | None = None


@dataclass(frozen=True, slots=True)
class GiveUpLoad:
    """Ask LM Studio to end a load of ours that nobody waits for, because somebody waits behind it."""

    model: ModelId


@dataclass(frozen=True, slots=True)
class SendPing:
    model: ModelId
    instance_id: str


@dataclass(frozen=True, slots=True)
class SkipPing:
    model: ModelId


@dataclass(frozen=True, slots=True)
class Prime:
    """Replay an opening, so that the next request that begins with it finds it in the prompt cache."""

    model: ModelId
    instance_id: str
    opening: str


@dataclass(frozen=True, slots=True)
class GiveUpPrime:
    model: ModelId
    opening: str


@dataclass(frozen=True, slots=True)
class Unload:
    model: ModelId
    instance_id: str
    cause: UnloadCause | None = None


@dataclass(frozen=True, slots=True)
class Drain:
    """Give it to nobody any more, so that what it answers comes to an end."""

    model: ModelId


@dataclass(frozen=True, slots=True)
class EndDrain:
    model: ModelId


Action = Refresh | Load | GiveUpLoad | SendPing | SkipPing | Prime | GiveUpPrime | Unload | Drain | EndDrain
