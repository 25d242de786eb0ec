"""What a member makes of a picture, no etcd asked."""

from dataclasses import replace
from typing import Any

from keepalive.cluster import rows
from keepalive.cluster.etcd import Access, Etcd
from keepalive.cluster.member import Cluster, Self
from keepalive.core.apply import apply
from keepalive.core.facts import ModelId
from keepalive.core.records import Model, Snapshot
from tests.kit.models import GEMMA, a_model, warm

HELD = rows.Row(rows.holder_key("local"), rows.holder_row("b", "life"), 1)
YIELD = rows.Row(rows.yield_key(GEMMA), rows.holder_row("b", "life"), 2)


class Records:
    """As much of a keeper as a picture is told to."""

    def __init__(self, *models: Model) -> None:
        self.models = {model.id: model for model in models}

    def record(self, fact: Any, /) -> None:
        self.models[fact.model] = apply(self.models[fact.model], fact)

    def snapshot(self) -> Snapshot:
        return Snapshot(50.0, (), tuple(self.models.values()))

    def tick(self) -> None: ...

    def reconsider(self) -> None: ...


def a_member(keeping: Records) -> Cluster:
    return Cluster(
        Etcd([], Access(), 1.0),
        Self("ward", "a", "host", "1"),
        10.0,
        lambda: keeping,
        lambda: 50.0,
        lambda: 50.0,
        lambda event, *, well, **fields: None,
    )


def test_what_is_let_go_no_more_is_given_again_though_the_config_was_read_anew_just_then():
    keeping = Records(warm())
    cluster = a_member(keeping)
    cluster._see(rows.picture([HELD, YIELD]))
    assert not keeping.models[GEMMA].given

    qwen = ModelId("local", "qwen")
    keeping.models[qwen] = replace(a_model(), id=qwen)
    cluster._see(rows.picture([HELD]))

    assert keeping.models[GEMMA].given
