"""What is said of a model: when it will be there, and why it is not."""

from dataclasses import replace

from keepalive.core.explain import eta, explain
from keepalive.core.facts import LoadStarted, ModelId
from keepalive.core.records import Upstream
from tests.kit.models import GEMMA, QWEN, a_model, after, cold, entry, listed, ours, warm


def test_several_copies_are_said_and_the_oldest_of_ours_is_addressed():
    model = after(ours(), listed(20, entry("gemma", "gemma:2", "gemma")))

    assert model.instance_id == "gemma"
    assert explain(Upstream("local"), [model], model, 21) == "2 copies are in memory"


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


def test_an_eta_is_never_invented():
    loading = after(cold(), LoadStarted(2, GEMMA))

    assert eta(loading, [loading], 10) is None
    assert eta(replace(loading, size_bytes=4_000), [loading], 10) is None
    assert eta(warm(recent_loads=(3.0,)), [], 10) is None


def test_a_warm_model_needs_no_explanation():
    assert explain(Upstream("local"), [warm()], warm(), 4) is None
