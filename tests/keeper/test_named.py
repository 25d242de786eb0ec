"""Whatever a request names: none reaches LM Studio that would load a kept model on demand.

The keeper and the proxy's surgery against the simulator's own idea of who is meant, which shares no code with ours.
What no listing shows is left out of these worlds: which variant an instance is of, where that is not the one that
the key means or the one that is kept.
"""

import asyncio
import itertools
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keepalive.core import names as naming
from keepalive.core.facts import Listed, ModelId, Tier
from keepalive.core.records import Policy
from keepalive.keeper.given import Keep, Server
from keepalive.keeper.keeper import Keeper
from keepalive.lmstudio import wire
from keepalive.protocols.asked import read_body
from keepalive.protocols.renamed import renamed
from keepalive.simulator.call import Call
from keepalive.simulator.exchange import Refusal, Request
from keepalive.simulator.listing import v0_models, v1_models
from keepalive.simulator.models import SimModel
from keepalive.simulator.naming import resolve
from keepalive.simulator.studio import Studio
from tests.kit.simulated import InstantLoop

KEYS = ["acme/tiny-4b", "coder", "text-embedding-x"]
VARIANTS = ["q4_k_m", "q8_0", "4bit"]
IDENTIFIERS = ["my-own", "gpt-4o", "coder:3"]
UPSTREAMS = ["a", "b"]


@dataclass
class Site:
    """One LM Studio: its models with their quantizations, and what is loaded, by key and identifier."""

    tier: Tier
    models: dict[str, list[str]]
    loaded: list[tuple[str, str | None]]
    faults: dict[str, Any]
    heard: bool


@st.composite
def sites(draw: st.DrawFn) -> Site:
    keys = draw(st.lists(st.sampled_from(KEYS), unique=True))
    some = st.lists(st.sampled_from(VARIANTS), min_size=1, unique=True)
    loaded = st.tuples(st.sampled_from(keys or KEYS), st.none() | st.sampled_from(IDENTIFIERS))
    return Site(
        draw(st.sampled_from([Tier.V1, Tier.V0])),
        {key: draw(some) for key in keys},
        draw(st.lists(loaded, max_size=3, unique_by=lambda one: one[1] or one)) if keys else [],
        {
            "variant_ids": draw(st.sampled_from(["key", "variant"])),
            "wrong_model_fallback": draw(st.booleans()),
        },
        draw(st.booleans()),
    )


@st.composite
def kept(draw: st.DrawFn) -> dict[ModelId, tuple[str, ...]]:
    found: dict[ModelId, tuple[str, ...]] = {}
    for upstream in UPSTREAMS:
        for key in draw(st.lists(st.sampled_from(KEYS), unique=True)):
            variant = draw(st.none() | st.none() | st.sampled_from(VARIANTS))
            # An alias is one model's on an upstream.
            aliases = draw(st.sampled_from([(), (f"alias-of-{key}",)]))
            found[ModelId(upstream, key if variant is None else f"{key}@{variant}")] = aliases
    return found


def spelled(names: Iterable[str]) -> st.SearchStrategy[str]:
    return st.sampled_from(list(names)).flatmap(
        lambda name: st.sampled_from([name, name.upper(), name.title()])
    )


EVERY = [
    *KEYS, *IDENTIFIERS, *(f"alias-of-{key}" for key in KEYS), *(f"{key}:2" for key in KEYS),
    *(f"{key}@{variant}" for key in KEYS for variant in VARIANTS), *(f"{key}@q4_k_m:2" for key in KEYS), "nobody", "",
]  # fmt: skip


def studio_of(site: Site, upstream: str, keeps: Iterable[ModelId]) -> Studio:
    models = [
        SimModel(
            key,
            kind="embedding" if "embed" in key else "llm",
            quantization=first.upper(),
            further=tuple(rest),
        )
        for key, (first, *rest) in site.models.items()
    ]
    studio = Studio(models, tier=site.tier.value, faults=site.faults)  # type: ignore[arg-type]
    variants = {m.key.partition("@")[0]: m.key for m in keeps if m.upstream == upstream}
    for key, identifier in site.loaded:
        # As we, or somebody who means the same, loads it.
        name = variants.get(key, key)
        if studio.memory.find(name) is not None:
            studio.load(name, seconds=0, identifier=identifier)
    return studio


def listing_of(studio: Studio, tier: Tier) -> Any:
    shown = (v1_models if tier is Tier.V1 else v0_models)(studio.memory, studio.faults)
    entries = (wire.v1_entries if tier is Tier.V1 else wire.v0_entries)(json.loads(json.dumps(shown)))
    return wire.by_key(entries)


async def reaches(
    keeps: dict[ModelId, tuple[str, ...]], default: str | None, two: list[Site], name: str | None, route: str
) -> None:
    """Asks for `name`, and fails where that is a load on demand of a kept model."""
    studios = {u: studio_of(site, u, keeps) for u, site in zip(UPSTREAMS, two, strict=True)}
    keeper = Keeper(itertools.count(1.0).__next__)
    servers = [Server(upstream, object()) for upstream in UPSTREAMS]  # type: ignore[arg-type]
    keeper.configure(servers, [Keep(m, Policy(), aliases=aliases) for m, aliases in keeps.items()], default)
    for upstream, site in zip(UPSTREAMS, two, strict=True):
        if site.heard:
            entries = listing_of(studios[upstream], site.tier)
            keeper.record(Listed(3.0, upstream, 2.0, site.tier, entries))
    body = json.dumps({} if name is None else {"model": name}).encode()
    meaning = await keeper.meanings.meaning(read_body(body).model, 0.0)
    if meaning.models:
        # Whoever is warm has an instance; nobody else is asked.
        warm = [m for m in meaning.models if (known := keeper.model(m)) is not None and known.instances]
        if not warm:
            return
        upstream, written = warm[0].upstream, meaning.written(warm[0])
    else:
        upstream, written = meaning.upstream, meaning.written()
    passed = body if written is None else renamed(body, written) or body
    call = Call(studios[upstream], 1, Request("POST", "/v1/x", "", {}, passed), route)
    call.payload = json.loads(passed)
    try:
        target = resolve(call, "embedding" if route == "embeddings" else "llm")
    except Refusal:
        return
    if not isinstance(target, SimModel):
        return
    loaded = (call.variant or target.variant).lower()
    means = {m.key.lower(): m.key for m in keeps if m.upstream == upstream}
    bare = means.get(target.key)
    assert loaded not in means, f"{name!r} loads {loaded}, which is kept"
    assert bare is None or loaded != target.variant.lower(), f"{name!r} loads {target.key}, which is kept"


WORLDS = {
    "keeps": kept(),
    "default": st.integers(0, 5),
    "two": st.lists(sites(), min_size=2, max_size=2),
    "name": st.none() | spelled(EVERY),
    "route": st.sampled_from(["chat", "native_chat", "embeddings"]),
}


def run(keeps: Any, default: int, two: Any, name: Any, route: str) -> None:
    # A key or an alias of one of them, or none.
    known = [text for model, aliases in keeps.items() for text in (model.key, *aliases)]
    chosen = known[default] if default < len(known) else None
    with asyncio.Runner(loop_factory=InstantLoop) as runner:
        runner.run(reaches(keeps, chosen, two, name, route))


@settings(max_examples=200, deadline=None)
@given(**WORLDS)
def test_no_name_makes_lm_studio_load_a_kept_model_on_demand(
    keeps: Any, default: int, two: Any, name: Any, route: str
) -> None:
    run(keeps, default, two, name, route)


def test_a_resolver_that_knows_no_variants_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(naming.Names, "_by_variant", lambda self, folded: ())
    site = Site(Tier.V1, {"coder": ["q4_k_m", "q8_0"]}, [], {}, heard=True)
    empty = Site(Tier.V1, {}, [], {}, heard=True)

    with pytest.raises(AssertionError, match="which is kept"):
        run({ModelId("a", "coder"): ()}, 5, [site, empty], "coder@Q4_K_M", "chat")
