"""Who is meant by the name in a request. Everything that is given a name asks here.

A name is looked up in this order, case folded: key, alias, instance id of the newest listing, variant, any model
that some upstream lists, the default model, and then LM Studio decides. A copy number that is nobody's means the
model, and Ollama's `:latest` may stand there or not. What an upstream listed last keeps its
meaning while that one is away. Where nothing is known of variants, a variant is the kept model: a request that
waits in vain does less harm than a second copy.
"""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Final

from keepalive.core.facts import Entry, ModelId, fold_key
from keepalive.core.quotes import unquoted

# LM Studio calls further copies of a model `key:2`, `key:3`, …
COPY_NUMBER: Final = re.compile(r":[0-9]+$")
# Ollama lists what was pulled without a tag under this one, and takes it without. Whose clients speak to others, too.
_TAG: Final = ":latest"
# What files of Windows begin with, and no blank by Python's rules.
_MARK: Final = "\ufeff"

NONE_UP: Final[Collection[str]] = frozenset()


@dataclass(frozen=True, slots=True)
class Meaning:
    """What a name means.

    `models`: those that are kept, on whichever upstreams. `upstream`: where to ask when none of them is meant, or
    nobody waits for them. `known`: some upstream has that model; otherwise LM Studio chooses who answers.
    `perhaps`: kept models that may answer all the same.
    """

    upstream: str
    models: tuple[ModelId, ...] = ()
    known: bool = True
    perhaps: tuple[ModelId, ...] = ()
    #: The listing of these has not come yet, and may change what is meant.
    open: frozenset[str] = frozenset()
    renamed: bool = False
    name: str | None = None

    @property
    def stands_in(self) -> bool:
        """The default model is meant, in the place of nobody."""
        return self.name is not None and bool(self.models)

    def written(self, model: ModelId | None = None) -> str | None:
        """The name that LM Studio knows `model` by, or what is meant in its place; None: as it was asked for."""
        if not self.renamed:
            return None
        if model is None:
            model = next((m for m in self.models if m.upstream == self.upstream), None)
        return self.name if model is None else model.key


class _Listing:
    """What one upstream listed last, by every name that it can be asked for there."""

    __slots__ = ("_instances", "entries")

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        self.entries = entries
        self._instances: dict[str, Entry] | None = None

    @property
    def instances(self) -> Mapping[str, Entry]:
        # Most names are keys: made when somebody asks for another.
        if self._instances is None:
            entries = self.entries.values()
            self._instances = {fold_key(i.id): entry for entry in entries for i in entry.instances}
        return self._instances

    def row(self, key: str) -> Entry | None:
        """The entry of a folded key or variant."""
        entry = self.entries.get(key)
        if entry is not None:
            return entry
        # A listing that names no variants may have this one.
        base = self.entries.get(key.rpartition("@")[0])
        return base if base is not None and not base.variants else None

    def find(self, name: str) -> Entry | None:
        """The entry that is listed under a folded name."""
        return self.entries.get(name) or self.instances.get(name)

    def find_near(self, name: str) -> Entry | None:
        """The same for one that is listed so nowhere: a copy that is gone or to come, a tag, a variant."""
        return self.entries.get(_twin(name)) or self.row(COPY_NUMBER.sub("", name))


class Names:
    """The names of all models: those that are kept, and those that each upstream listed last."""

    def __init__(self) -> None:
        self._upstreams: tuple[str, ...] = ()
        self._default: str | None = None
        self._aliases: Mapping[ModelId, Sequence[str]] = {}
        self._by_key: dict[str, tuple[ModelId, ...]] = {}
        self._by_base: dict[str, tuple[ModelId, ...]] = {}
        self._by_alias: dict[str, tuple[ModelId, ...]] = {}
        self._listings: dict[str, _Listing] = {}
        self._heard: set[str] = set()

    def configure(
        self, upstreams: Iterable[str], kept: Mapping[ModelId, Sequence[str]], default: str | None = None
    ) -> None:
        """These are kept, with these aliases; `default` is what a request means that names nobody."""
        self._upstreams = tuple(upstreams)
        self._default = default
        self._aliases = kept
        self._by_key = _grouped(kept, lambda model: [model.key])
        self._by_base = _grouped(kept, lambda model: [model.key.rpartition("@")[0]])
        self._by_alias = _grouped(kept, lambda model: kept[model])
        for name in self._listings.keys() - set(self._upstreams):
            self.forget(name)

    # --- what is heard of the upstreams -------------------------------------------------------------

    def listed(self, upstream: str, entries: Mapping[str, Entry]) -> None:
        """Its newest listing, by folded key and variant."""
        self._heard.add(upstream)
        known = self._listings.get(upstream)
        if known is None or known.entries != entries:
            self._listings[upstream] = _Listing(entries)

    def unheard(self, upstream: str) -> None:
        """It was asked and did not say: what it listed last holds on."""
        self._heard.add(upstream)

    def forget(self, upstream: str) -> None:
        """Another server may stand behind that name now."""
        self._heard.discard(upstream)
        self._listings.pop(upstream, None)

    def row(self, upstream: str, name: str) -> Entry | None:
        """The entry there that a name means; none where it means another variant than the one that is loaded."""
        listing, folded = self._listings.get(upstream), fold_key(name)
        entry = (listing.find(folded) or listing.find_near(folded)) if listing is not None else None
        if entry is None:
            return None
        other = "@" in folded and entry.selected is not None and fold_key(entry.selected) != folded
        return None if other and fold_key(entry.key) != folded else entry

    def entries(self) -> Iterator[Entry]:
        """All that the upstreams list."""
        return chain.from_iterable(listing.entries.values() for listing in self._listings.values())

    def loaded(self) -> list[ModelId]:
        """All that the upstreams list as loaded, kept or not, each once."""
        found = {
            ModelId(upstream, entry.key): None
            for upstream, listing in self._listings.items()
            for entry in listing.entries.values()
            if entry.instances
        }
        return list(found)

    # --- what is asked ------------------------------------------------------------------------------

    def find(self, name: str) -> tuple[ModelId, ...]:
        """The kept models that a request for `name` means, in the config's order; none when nobody keeps it."""
        return self._kept(fold_key(self._bare(name)))[0]

    def meaning(self, name: str | None, up: Collection[str] = NONE_UP, *, default: bool = True) -> Meaning:
        """What a request means that names `name`, or nobody; `up` are the upstreams that answer now.

        `default`: the default model may stand in for nobody.
        """
        first = self._upstreams[0]
        meaning = self._named(name, up) if name else Meaning(first, known=False)
        if meaning.known or not default or self._default is None:
            return meaning
        stand_in = self._named(self._default, up)
        return Meaning(
            stand_in.upstream,
            stand_in.models,
            stand_in.known,
            stand_in.perhaps,
            open=meaning.open | stand_in.open,
            renamed=True,
            name=self._default,
        )

    def rows(self, upstream: str) -> Mapping[str, Sequence[str]]:
        """The aliases that belong to each row of a listing of `upstream`, by the row's folded key."""
        found: dict[str, list[str]] = {}
        for model, aliases in self._aliases.items():
            if model.upstream == upstream and aliases:
                entry = self._entry(model)
                found.setdefault(fold_key(entry.key if entry else model.key), []).extend(aliases)
        return found

    def _named(self, name: str, up: Collection[str]) -> Meaning:
        plain = self._bare(name)
        if name != plain:
            # LM Studio knows nobody of that name.
            bare = self._named(plain, up)
            written = None if bare.models else bare.name or plain
            return replace(bare, renamed=True, name=written) if bare.known else bare
        folded = fold_key(name)
        models, renamed = self._kept(folded)
        if models:
            sure = folded in self._by_key or folded in self._by_alias
            still = frozenset[str]() if sure else self._open(folded)
            order = {m.upstream: (m.upstream not in up, not self._loaded(m)) for m in models}
            return Meaning(min(order, key=order.__getitem__), models, open=still, renamed=renamed)
        here, near = self._where(folded, up, _Listing.find), None
        if here is None:
            here = self._where(folded, up, _Listing.find_near)
            near = self._listings[here].entries.get(_twin(folded)) if here is not None else None
        if here is None:
            waits = frozenset(self._upstreams) - self._heard
            # Whether there is such a variant is for whoever lists the model to say: another may answer by another one.
            lister = self._where(folded.rpartition("@")[0], up, _Listing.find)
            return Meaning(lister or self._upstreams[0], known=False, open=waits)
        # A variant that is loaded answers to the key, and may stand in for another one.
        related = self._related(folded)
        perhaps = tuple(m for m in related if m.upstream == here and self._loaded(m))
        if near is not None:  # nobody there knows it by the name that was asked for
            # Its key would mean the variant that is selected.
            listed = next(own for own in (near.key, *near.variants) if fold_key(own) == _twin(folded))
            return Meaning(here, perhaps=perhaps, renamed=True, name=listed)
        return Meaning(here, perhaps=perhaps)

    def _where(
        self, folded: str, up: Collection[str], find: Callable[[_Listing, str], Entry | None]
    ) -> str | None:
        """The best of the upstreams that list it."""
        here = []
        for place, upstream in enumerate(self._upstreams):
            listing = self._listings.get(upstream)
            entry = find(listing, folded) if listing is not None else None
            if entry is not None:
                here.append((upstream not in up, not entry.instances, place, upstream))
        return min(here)[-1] if here else None

    def _bare(self, name: str) -> str:
        """Without what a file or a variable has put around it: line breaks, a byte order mark, quotes."""
        bare = name.strip().strip(_MARK).strip()
        return bare if fold_key(bare) in self._by_alias else unquoted(bare).strip()

    def _kept(self, folded: str) -> tuple[tuple[ModelId, ...], bool]:
        """The kept models of a folded name, and whether LM Studio knows them by another one."""
        models = self._by_key.get(folded)
        if models is not None:
            return models, False
        models = self._by_alias.get(folded)
        if models is not None:
            return models, True
        models = tuple(m for m in self._aliases if self._is_instance(m, folded)) or self._by_variant(folded)
        if models:
            return models, False
        twins = self._by_key.get(_twin(folded), ())
        models = tuple(m for m in twins if self._lists(m, folded) and not self._lists(m, _twin(folded)))
        if models:
            return models, False
        if any(folded in listing.entries for listing in self._listings.values()):
            return (), False
        # A copy that is gone, or not listed yet: nobody there may know it by that name. Nor an alias with a tag.
        plain, twin = COPY_NUMBER.sub("", folded), _twin(folded)
        models = self._by_key.get(plain) or self._by_variant(plain) or twins or self._by_variant(twin)
        models = models or self._by_alias.get(plain) or self._by_alias.get(twin) or ()
        return models, bool(models)

    def _by_variant(self, folded: str) -> tuple[ModelId, ...]:
        """`key@variant` where the key is kept, and the key where a variant of it is kept."""
        found = [
            m for m in self._by_key.get(folded.rpartition("@")[0], ()) if self._selected(m) in (None, folded)
        ]
        found += [m for m in self._by_base.get(folded, ()) if self._selected(m) in (None, fold_key(m.key))]
        return tuple(found)

    def _entry(self, model: ModelId) -> Entry | None:
        listing = self._listings.get(model.upstream)
        key = fold_key(model.key)
        return (listing.row(key) or listing.entries.get(_twin(key))) if listing is not None else None

    def _selected(self, model: ModelId) -> str | None:
        """The variant that its key means there, folded; None where that is not known."""
        entry = self._entry(model)
        return fold_key(entry.selected) if entry is not None and entry.selected is not None else None

    def _lists(self, model: ModelId, name: str) -> bool:
        """Whether the upstream of a model lists one under that name."""
        listing = self._listings.get(model.upstream)
        return listing is not None and name in listing.entries

    def _is_instance(self, model: ModelId, folded: str) -> bool:
        listing = self._listings.get(model.upstream)
        entry = listing.instances.get(folded) if listing is not None else None
        return entry is not None and entry is self._entry(model)

    def _loaded(self, model: ModelId) -> bool:
        entry = self._entry(model)
        return entry is not None and bool(entry.instances)

    def _open(self, folded: str) -> frozenset[str]:
        """The upstreams whose first listing may tell that a variant is another model."""
        return frozenset(m.upstream for m in self._related(folded)) - self._heard

    def _related(self, folded: str) -> tuple[ModelId, ...]:
        """The kept models of which this may be a variant, or which may be a variant of this."""
        return (*self._by_key.get(folded.rpartition("@")[0], ()), *self._by_base.get(folded, ()))


def _twin(folded: str) -> str:
    """The same name with Ollama's tag, or without."""
    return folded.removesuffix(_TAG) if folded.endswith(_TAG) else folded + _TAG


def _grouped(
    kept: Iterable[ModelId], names: Callable[[ModelId], Iterable[str]]
) -> dict[str, tuple[ModelId, ...]]:
    found: dict[str, tuple[ModelId, ...]] = {}
    for model in kept:
        for name in names(model):
            if name:
                folded = fold_key(name)
                found[folded] = (*found.get(folded, ()), model)
    return found
