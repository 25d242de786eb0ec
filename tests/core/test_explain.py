"""What is said of a model: when it will be there, and why it is not."""

import contextlib
import itertools
from dataclasses import replace

import pytest

from keepalive.core.apply import apply
from keepalive.core.explain import eta, explain, next_try, ready_in
from keepalive.core.facts import Fact, Instance, LoadRemembered, LoadStarted, ModelId, RequestEnded, Tier
from keepalive.core.records import Model, Pending, Policy, Upstream, UpstreamState
from keepalive.core.states import IllegalMove, State
from tests.kit.models import (
    GEMMA,
    QWEN,
    a_model,
    after,
    cold,
    entry,
    every_fact,
    every_model,
    listed,
    load_ended,
    ours,
    warm,
)


def test_several_copies_are_said_and_the_oldest_of_ours_is_addressed():
    model = after(ours(), listed(20, entry("gemma", "gemma:2", "gemma")))

    assert model.instance_id == "gemma"
    assert explain(Upstream("local"), [model], model, 99.0) == "2 copies are in memory"


@pytest.mark.parametrize("then", [(load_ended(10),), ()])
def test_a_copy_that_came_while_ours_was_loading_is_taken_for_another_daemons(then: tuple[Fact, ...]):
    facts = [LoadStarted(2, GEMMA), *then, listed(11, entry("gemma", "gemma", "gemma:2"))]
    model = after(cold(), *facts, *([] if then else [load_ended(12)]))
    model = after(model, listed(13, entry("gemma", "gemma", "gemma:2")), RequestEnded(14, GEMMA, True))
    alone = after(cold(), LoadStarted(2, GEMMA), load_ended(10), listed(11, entry("gemma", "gemma")))

    assert (model.doubled_at, alone.doubled_at) == (11, None)
    assert explain(UP, [model], model, 15.0) == (
        "2 copies are in memory: one came while keepalive was loading it: does another keepalive keep the same models?"
    )


def test_copies_of_what_does_not_answer_are_not_what_is_odd_about_it():
    copies = (Instance("gemma"), Instance("gemma:2"))
    model = a_model(state=State.BACKOFF, reason="HTTP 500", instances=copies)

    assert explain(Upstream("local"), [model], model, 99.0) == "HTTP 500"


def test_the_eta_comes_from_past_loads():
    model = after(cold(recent_loads=(100.0, 120.0, 124.0)), LoadStarted(2, GEMMA))

    assert eta(model, [model], 33) == 89.0
    assert eta(model, [model], 500) == 0.0


def test_before_its_first_load_the_eta_comes_from_its_size_and_the_others_speed():
    model = replace(after(cold(), LoadStarted(2, GEMMA)), size_bytes=4_000)
    others = [
        a_model(QWEN, size_bytes=1_000, recent_loads=(10.0,)),
        a_model(ModelId("local", "c"), size_bytes=3_000, recent_loads=(10.0,)),
    ]

    assert eta(model, [model, *others], 12) == 10.0


def test_the_speed_of_the_others_is_known_from_those_that_have_a_size_and_were_loaded():
    model = replace(after(cold(), LoadStarted(2, GEMMA)), size_bytes=4_000)
    measured = a_model(QWEN, size_bytes=1_000, recent_loads=(10.0,))
    others = [
        a_model(ModelId("local", "c"), recent_loads=(1.0,)),
        a_model(ModelId("local", "d"), size_bytes=9_000),
        a_model(ModelId("local", "e"), size_bytes=9_000, recent_loads=(0.0,)),
    ]

    assert eta(model, [model, *others, measured], 2) == 40.0
    assert eta(model, [model, *others], 2) is None
    assert eta(replace(model, recent_loads=(7.0,)), [model, measured], 2) == 7.0


def test_an_eta_is_never_invented():
    loading = after(cold(), LoadStarted(2, GEMMA))

    assert eta(loading, [loading], 10) is None
    assert eta(replace(loading, size_bytes=4_000), [loading], 10) is None
    assert eta(warm(recent_loads=(3.0,)), [], 10) is None
    assert eta(loading, [loading, a_model(QWEN, size_bytes=1_000, recent_loads=(10.0,))], 10) is None


@pytest.mark.parametrize("state", UpstreamState)
def test_no_next_try_ever_lies_in_the_past(state: UpstreamState):
    upstream = replace(Upstream("local"), state=state, due_at=70.0)
    for model, fact in itertools.product(every_model().values(), every_fact(50.0)):
        with contextlib.suppress(IllegalMove):
            after_it = apply(model, fact)
            for now in (0.0, 49.9, 50.0, 69.9, 70.0, 1e6):
                again = next_try(upstream, after_it, now)

                assert again is None or again > now


def test_the_next_try_of_what_failed_is_told_and_behind_a_wrong_token_that_of_the_token():
    held, upstream = a_model(state=State.BACKOFF, retry_at=60.0), replace(UP, due_at=70.0)
    barred = replace(upstream, state=UpstreamState.UNAUTHORIZED)

    assert (next_try(upstream, held, 50.0), next_try(upstream, held, 60.0)) == (60.0, None)
    assert next_try(barred, held, 50.0) == 70.0
    assert next_try(barred, replace(held, retry_at=90.0), 50.0) == 90.0
    assert next_try(barred, a_model(), 50.0) == 70.0
    assert (next_try(upstream, a_model(), 50.0), next_try(barred, warm(), 50.0)) == (None, None)


def test_a_warm_model_needs_no_explanation():
    assert explain(Upstream("local"), [warm()], warm(), 99.0) is None


# --- why it is not warm ---------------------------------------------------------------------------

UP = Upstream("local")


def test_a_warm_model_says_what_is_odd_about_it():
    model = replace(warm(), reason="no answer in 60 s")

    assert explain(UP, [model], model, 99.0) == "no answer in 60 s"


def test_what_nobody_wants_says_who_does_not():
    assert explain(UP, [], cold(window_open=False), 99.0) == "outside its window"
    assert (
        explain(UP, [], cold(window_open=False), 99.0, opens="08:00:00")
        == "outside its window until 08:00:00"
    )
    assert explain(UP, [], cold(asked_for=False), 99.0) == "released by hand"


def test_what_has_to_wait_says_for_which():
    model, other = cold(), a_model(QWEN, load_started=1.0)

    assert explain(UP, [a_model(ModelId("local", "c")), other, model], model, 99.0) == (
        "waits for its turn: qwen is loading"
    )


def test_what_is_about_to_be_loaded_has_no_more_to_say():
    assert explain(UP, [cold(), warm()], cold(), 99.0) is None


def test_what_is_not_listed_waits_for_nothing():
    unlisted = replace(cold(), listed=False, reason="LM Studio does not list this key")

    assert explain(UP, [unlisted, a_model(QWEN, load_started=1.0)], unlisted, 99.0) == (
        "LM Studio does not list this key"
    )


def test_a_model_does_not_wait_for_its_own_load():
    pending = Pending(since=1.0, until=9.0, alive_at=1.0)
    model = replace(cold(), pending=pending, reason="an earlier life began to load it")

    assert explain(UP, [model], model, 99.0) == "an earlier life began to load it"
    believed = replace(model, pending=replace(pending, until=105.0, expected=30.0))
    assert explain(UP, [believed], believed, 2.0) == "an earlier life began to load it"


def test_a_load_whose_end_was_not_seen_says_until_when_it_is_believed_in_and_why():
    model = after(a_model(), LoadRemembered(1, GEMMA, -20.0, 30.0), listed(2, entry("gemma")))
    tell = "second {:.0f}".format

    assert explain(UP, [model], model, 3.0, tell) == (
        "an earlier load may still be under way until second 85, because it was begun before this daemon was "
        "started or its config read anew, and nobody saw it end"
    )
    assert explain(UP, [warm()], warm(), 3.0, tell) is None
    assert explain(UP, [model], model, 3.0) == model.reason
    for other in (
        replace(model, pending=None),
        replace(model, reason="its own"),
        replace(model, reason=None),
    ):
        assert explain(UP, [other], other, 3.0, tell) == other.reason


def test_nobody_waits_for_the_turn_of_a_load_of_which_nothing_shows_that_it_is_alive():
    ghost = a_model(QWEN, pending=Pending(since=1.0, until=300.0, alive_at=1.0))
    known = replace(ghost, pending=Pending(since=1.0, until=105.0, alive_at=1.0, expected=30.0))

    assert explain(UP, [ghost, cold()], cold(), 2.0) is None
    assert explain(UP, [known, cold()], cold(), 30.9) == "waits for its turn: qwen is loading"
    assert explain(UP, [known, cold()], cold(), 31.0) is None


@pytest.mark.parametrize("state", [State.UNKNOWN, State.LOADING, State.BACKOFF])
def test_a_model_that_is_not_cold_has_a_reason_of_its_own(state: State):
    model = a_model(state=state, reason="its own", window_open=False)
    foreign = replace(UP, tier=Tier.V0, resident=frozenset({"llama"}))

    assert explain(foreign, [model, a_model(QWEN, load_started=1.0)], model, 99.0) == "its own"


def test_what_must_not_push_out_another_says_so_before_it_speaks_of_its_turn():
    model = cold()
    foreign = replace(UP, tier=Tier.V0, resident=frozenset({"llama"}))

    assert explain(foreign, [model, a_model(QWEN, load_started=1.0)], model, 99.0) == (
        "loading it on LM Studio 0.3.x could push out llama, which we did not load"
    )


# --- how long it will take ------------------------------------------------------------------------


def waits(key: str, rank: int, *took: float, **changes: object) -> Model:
    known = {"state": State.COLD, "reason": None, "recent_loads": took}
    return a_model(ModelId("local", key), rank=rank, **{**known, **changes})


def test_who_waits_for_his_turn_is_told_how_long_the_loads_before_his_own_take():
    loads = after(cold(recent_loads=(100.0,)), LoadStarted(2, GEMMA))
    first, second = waits("b", 1, 10.0), waits("c", 2, 5.0)
    two = replace(UP, max_loading=2)

    def told(model: Model, upstream: Upstream = UP, load: Model = loads) -> float | None:
        return ready_in(upstream, [load, first, second], model, 32.0)

    assert [told(model) for model in (loads, first, second)] == [70.0, 80.0, 85.0]
    assert [told(model, two) for model in (loads, first, second)] == [70.0, 10.0, 15.0]
    assert told(first, load=replace(loads, giving_up=True)) == 10.0
    assert told(first, load=replace(loads, recent_loads=())) is None
    assert ready_in(two, [replace(loads, recent_loads=()), first], first, 32.0) is None


def test_nobody_is_told_how_long_it_takes_who_is_not_in_the_line_or_behind_what_nobody_knows():
    known, unknown = waits("b", 2, 10.0), waits("c", 1)
    unwanted = waits("d", 3, 10.0, window_open=False)

    assert ready_in(UP, [known, unknown], known, 50.0) is None
    assert ready_in(UP, [known, replace(unknown, rank=3)], known, 50.0) == 10.0
    assert ready_in(UP, [known, unwanted], unwanted, 50.0) is None
    assert ready_in(UP, [known, replace(unknown, size_bytes=500)], known, 50.0) is None
    sized = replace(known, size_bytes=1000)
    assert ready_in(UP, [sized, replace(unknown, size_bytes=500)], sized, 50.0) == 15.0


def test_what_somebody_waits_behind_says_whether_anybody_wants_it():
    loads = waits("a", 0, state=State.LOADING, load_started=40.0, ahead=True)
    behind, turn = waits("b", 1, waiting=1), "waits for its turn: a is loading"

    def said(load: Model) -> str | None:
        return explain(UP, [load, behind], behind, 50.0)

    assert said(replace(loads, ahead=False)) == turn
    assert said(loads) == f"{turn}, which nobody waits for, but LM Studio takes no word to end that"
    assert said(replace(loads, giving_up=True)) == (
        f"{turn}, which nobody waits for, and LM Studio is asked to end that"
    )


def test_what_is_drained_says_that_it_makes_room():
    model = warm(draining=True)

    assert explain(UP, [model], model, 50.0) == (
        "makes room: it is given to nobody until another one has been there"
    )


def test_what_nobody_asks_for_may_be_as_large_as_the_budget_and_no_larger():
    known = {"state": State.COLD, "policy": Policy(auto=True, memory=10**9)}
    model = a_model(**known)

    assert explain(replace(UP, memory=10**9), [model], model, 50.0) == "loaded when somebody asks for it"
    assert explain(replace(UP, memory=10**9 - 1), [model], model, 50.0) == (
        "it never fits: it takes 1.0 GB, and the budget is 1.0 GB"
    )


def test_where_memory_is_no_matter_all_who_are_wanted_are_in_the_line():
    first, second = waits("b", 1, 10.0), waits("c", 2, 5.0)

    assert ready_in(replace(UP, tier=Tier.V0), [first, second], second, 50.0) == 15.0
