"""What the names mean that callers use: of what is kept, and of what the upstreams list."""

import asyncio
import contextlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Protocol

from keepalive.core.changed import replace
from keepalive.core.facts import Entry, ModelId, Tier, fold_key
from keepalive.core.names import Meaning, Names

# Names are the callers', who may make up any number of them.
MEANINGS_REMEMBERED = 256
# What is kept of its own accord once it is asked for, where the config says so.
ADOPTED = ("llm", "embedding")


class Owner(Protocol):
    """Who keeps what is meant: a `Keeper`."""

    @property
    def kept(self) -> Collection[ModelId]: ...
    @property
    def adopts(self) -> bool:
        """What is only listed is kept from when it is asked for."""

    def adopt(self, model: ModelId, kind: str, /) -> None: ...
    def up(self) -> set[str]:
        """The upstreams that answer."""

    def tier(self, upstream: str, /) -> Tier | None: ...


class Meanings:
    """The names of all models, and what was found to be meant by them."""

    def __init__(self, owner: Owner) -> None:
        self._owner = owner
        self._names = Names()
        # Until anything is heard of an upstream: callers say the same few.
        self._found: dict[tuple[str | None, bool], Meaning] = {}
        self._unheard: dict[str, asyncio.Event] = {}

    # --- who asks -----------------------------------------------------------------------------------

    def find(self, name: str) -> tuple[ModelId, ...]:
        """The models that a request for `name` means, in the config's order; none when nobody keeps it."""
        return self._names.find(name)

    async def meaning(self, name: str | None, within: float, *, default: bool = True) -> Meaning:
        """What a request means that names `name`, or nobody; see `Names.meaning`.

        Where an upstream's first listing decides, it is waited for, until it comes or fails or for `within` seconds.
        """
        known = self._found.get((name, default))
        if known is not None:
            return known
        meaning = self._meaning(name, default=default, adopts=default)
        if not meaning.open:
            if len(self._found) >= MEANINGS_REMEMBERED:
                self._found.clear()
            self._found[name, default] = meaning
            return meaning
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within):
                for unheard in [self._unheard[name] for name in meaning.open if name in self._unheard]:
                    await unheard.wait()
        return self._meaning(name, default=default, adopts=default)

    async def meant(self, name: str, within: float) -> tuple[ModelId, ...]:
        """The same as `find`, for whoever asks for one: what is only listed is kept from now on, where that is wanted.

        A first listing is waited for as by `meaning`.
        """
        if not (found := self.find(name)) and self._owner.adopts:
            await self.meaning(name, within, default=False)
            self.take_up(name)
            found = self.find(name)
        return found

    def take_up(self, name: str) -> None:
        """Keeps what is listed under that name from now on, where that is wanted of what is asked for."""
        if self._owner.adopts and not self.find(name):
            self._meaning(name, default=False, adopts=True)

    def offered(self) -> list[str]:
        """The keys of all that is kept, and, where that is wanted, of all that would be if it were asked for."""
        keys = {model.key: None for model in self._owner.kept}
        if self._owner.adopts:
            keys |= {entry.key: None for entry in self._names.entries() if entry.kind in ADOPTED}
        return list(keys)

    def loaded(self) -> list[ModelId]:
        """All that the upstreams list as loaded, kept or not."""
        return self._names.loaded()

    def listed_as(self, upstream: str, name: str) -> str | None:
        """The key under which that upstream lists what a name means there."""
        entry = self._names.row(upstream, name)
        return None if entry is None else entry.key

    def rows(self, upstream: str) -> Mapping[str, Sequence[str]]:
        """The aliases that belong to each row of a listing of `upstream`, by the row's folded key."""
        return self._names.rows(upstream)

    def _meaning(self, name: str | None, *, default: bool, adopts: bool) -> Meaning:
        owner = self._owner
        meaning = self._names.meaning(name, owner.up(), default=default)
        if not meaning.models and meaning.known and owner.adopts and adopts:
            entry = self._names.row(meaning.upstream, meaning.written() or name or "")
            if (
                entry is not None
                and entry.kind in ADOPTED
                and owner.tier(meaning.upstream) is not Tier.OPENAI
            ):
                owner.adopt(ModelId(meaning.upstream, entry.key), entry.kind)
                meaning = self._names.meaning(name, owner.up(), default=default)
        if any(self._is_misspelt(name, model) for model in meaning.models):
            meaning = replace(meaning, renamed=True)
        return meaning

    def _is_misspelt(self, name: str | None, model: ModelId) -> bool:
        """Whether it is the key of a model but for its letter case, where that counts: everywhere but in LM Studio."""
        same = name is not None and name != model.key and fold_key(name) == fold_key(model.key)
        tier = self._owner.tier(model.upstream) if same else None
        return tier is not None and not tier.lm_studio

    # --- what is known ------------------------------------------------------------------------------

    def configure(
        self, upstreams: Iterable[str], aliases: Mapping[ModelId, Sequence[str]], default: str | None
    ) -> None:
        """See `Names.configure`."""
        self._names.configure(upstreams, aliases, default)
        self.changed()

    def changed(self) -> None:
        """Something is known of an upstream, or kept, that was not: what was found may not hold any more."""
        self._found.clear()

    def begin(self, upstream: str) -> None:
        """An upstream that was never listed: it is waited for where its listing decides."""
        self._unheard.setdefault(upstream, asyncio.Event())

    def forget(self, upstream: str) -> None:
        """Another server stands there now."""
        self._names.forget(upstream)
        self.begin(upstream)

    def listed(self, upstream: str, entries: Mapping[str, Entry]) -> None:
        self._names.listed(upstream, entries)
        self.hear(upstream)

    def unheard(self, upstream: str) -> None:
        """Its listing failed."""
        self._names.unheard(upstream)
        self.hear(upstream)

    def hear(self, upstream: str) -> None:
        """Nobody need wait for its first listing any more."""
        unheard = self._unheard.pop(upstream, None)
        if unheard is not None:
            unheard.set()
