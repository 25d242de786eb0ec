"""What can happen, in the words by which the rest of the world knows it."""

from dataclasses import replace

import pytest

from keepalive.core.facts import (
    NO_SIGHT,
    Entry,
    HolderTold,
    Instance,
    Listed,
    LoadEnded,
    LoadOutcome,
    LoadRemembered,
    LoadStarted,
    ModelId,
    Need,
    Occupant,
    PingEnded,
    PingOutcome,
    PrimeEnded,
    PrimeOutcome,
    RequestsCounted,
    Sdk,
    Sight,
    Tier,
    Trouble,
    UnloadCause,
    UnloadEnded,
    UnloadStarted,
    WarmAsked,
    fold_key,
)
from tests.kit.models import GEMMA, entry, listed


def test_a_model_is_called_by_its_key_and_its_upstream():
    assert str(ModelId("local", "acme/gemma")) == "acme/gemma on local"


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Tier, ["v1", "v0", "llama", "openai"]),
        (Trouble, ["refused", "unreachable", "timeout", "unauthorized", "bad_answer", "loading"]),
        (LoadOutcome, ["ok", "failed", "refused", "unknown", "given_up"]),
        (PingOutcome, ["ok", "error", "timeout", "wrong_model", "refused", "skipped"]),
        (PrimeOutcome, ["ok", "given_up", "refused", "timeout", "error"]),
        (UnloadCause, ["room", "idle", "window", "released"]),
        (Sdk, ["off", "absent", "refused", "up"]),
    ],
)
def test_kinds_and_outcomes_go_by_the_words_that_metrics_logs_and_records_of_the_past_know(
    kind: type, words: list[str]
):
    assert list(kind) == words


def test_a_listing_says_what_is_loaded_and_what_is_being_loaded_in_folded_keys():
    rows = entry("Acme/Gemma", "gemma"), entry("QWEN", loading=True), entry("llama", loading=False)
    both = entry("phi", "phi", loading=True)
    fact = listed(1.0, *rows, both)

    assert fact.resident == {"acme/gemma", "phi"}
    assert fact.arriving == {"qwen", "phi"}


def test_a_listing_says_what_is_in_memory_with_all_its_copies_once_whatever_its_variants():
    row = replace(entry("Acme/Gemma", "gemma", "gemma:2", size=7), variants=("acme/gemma@q4",))
    fact = Listed(1.0, "local", 0.5, Tier.V1, {"acme/gemma": row, "acme/gemma@q4": row, "x": entry("x")})

    assert fact.occupants == (Occupant("acme/gemma", 2, 7),)


def test_only_where_there_are_calls_for_it_are_models_loaded_and_unloaded_by_calls():
    assert [tier for tier in Tier if tier.calls] == [Tier.V1, Tier.LLAMA]
    assert [tier for tier in Tier if tier.lm_studio] == [Tier.V1, Tier.V0]


def test_a_listing_is_told_without_its_entries():
    assert repr(Listed(1.0, "local", 0.5, Tier.V1, {"gemma": entry("gemma", "gemma")})) == (
        "Listed(at=1.0, upstream='local', asked=0.5, tier=<Tier.V1: 'v1'>, loading=True)"
    )


def test_what_is_not_said_is_not_known():
    assert Instance("gemma") == Instance(
        id="gemma", context_length=None, busy=None, queued=None, ttl=None, last_used=None
    )
    assert Entry("gemma") == Entry(
        key="gemma",
        kind="llm",
        size_bytes=None,
        instances=(),
        loading=None,
        variants=(),
        selected=None,
        need=None,
        context_max=None,
        asleep=False,
        exit_code=None,
    )
    assert Need(7) == Need(memory_bytes=7, passes_guardrails=None, sure=False)
    assert NO_SIGHT == Sight() == Sight(sdk=Sdk.OFF, why=None, session=0, hung_up=0, late=False, clock=None)
    plain = Listed(1.0, "local", 0.5, Tier.V1, {})
    assert (plain.loading, plain.sight, plain.places, plain.trusted) == (True, NO_SIGHT, None, False)
    assert LoadStarted(1.0, GEMMA) == LoadStarted(at=1.0, model=GEMMA, ahead=False, claim=None)
    assert LoadEnded(1.0, GEMMA, LoadOutcome.OK, 2.0) == LoadEnded(
        at=1.0,
        model=GEMMA,
        outcome=LoadOutcome.OK,
        elapsed=2.0,
        seconds=None,
        instance_id=None,
        proved=False,
        message=None,
    )
    assert LoadRemembered(1.0, GEMMA, 0.0, None).tells_loading is False
    assert HolderTold(1.0, GEMMA) == HolderTold(
        at=1.0,
        model=GEMMA,
        instance_ids=frozenset(),
        warm=False,
        ill=None,
        failure=None,
        failures=0,
        retry_at=None,
        loads=(),
        contested=False,
    )
    assert WarmAsked(1.0, GEMMA) == WarmAsked(at=1.0, model=GEMMA, alone=False)
    assert PingEnded(1.0, GEMMA, PingOutcome.OK) == PingEnded(
        at=1.0, model=GEMMA, outcome=PingOutcome.OK, seconds=0.0, message=None, why=None
    )
    assert PrimeEnded(1.0, GEMMA, "agent", PrimeOutcome.OK) == PrimeEnded(
        at=1.0,
        model=GEMMA,
        opening="agent",
        outcome=PrimeOutcome.OK,
        seconds=0.0,
        tokens=None,
        message=None,
        why=None,
    )
    assert UnloadStarted(1.0, GEMMA, "gemma").cause is None
    assert UnloadEnded(1.0, GEMMA, "gemma") == UnloadEnded(1.0, GEMMA, "gemma", message=None, in_use=False)
    assert RequestsCounted(1.0, GEMMA, 2, 3) == RequestsCounted(
        at=1.0, model=GEMMA, started=2, ended=3, ended_at=None, answered_at=None
    )


def test_keys_are_folded_as_lm_studio_folds_them():
    assert fold_key("Acme/GEMMA-Straße") == "acme/gemma-strasse"
    assert fold_key("CAFE\u0301") == fold_key("caf\u00e9")
