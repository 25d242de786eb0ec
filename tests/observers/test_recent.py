"""The last requests and what no config names: bounded, and without a word of what was said."""

from keepalive.core.callers import Outcome, Seen
from keepalive.core.facts import ModelId
from keepalive.observers.recent import REQUESTS, UNNAMED, Recent

GEMMA, QWEN = ModelId("local", "gemma"), ModelId("local", "qwen")


class Wall:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_request_is_told_by_who_was_asked_and_how_it_went() -> None:
    recent = Recent(Wall())
    seen = Seen(GEMMA, "chat", "ward", Outcome.OK, 200, start="cold", wait_seconds=12.3456, first_token_seconds=13.0,
                seconds=14.5, bytes=900, events=31, gaps=(10, 20), gap_seconds=1.5)  # fmt: skip
    recent.add(seen)

    assert recent.requests() == [
        {
            "at": 1000.0, "model": "gemma", "upstream": "local", "route": "chat", "start": "cold", "outcome": "ok",
            "status": 200, "error": None, "wait_seconds": 12.346, "first_token_seconds": 13.0,
            "tokens_per_second": 20.0, "seconds": 14.5,
        }
    ]  # fmt: skip


def test_the_newest_comes_first_and_what_is_old_or_too_many_is_forgotten() -> None:
    wall = Wall()
    recent = Recent(wall)
    for status in range(REQUESTS + 10):
        recent.add(Seen(None, "chat", None, Outcome.OK, status))
    first = recent.requests()
    wall.now += 3600

    assert [one["status"] for one in first][:2] == [REQUESTS + 9, REQUESTS + 8]
    assert len(first) == REQUESTS
    assert recent.requests() == []


def test_what_no_config_names_is_counted_the_most_often_first() -> None:
    recent = Recent(Wall())
    for model, times in ((GEMMA, 1), (QWEN, 3)):
        for _ in range(times):
            recent.passed(model)

    assert recent.unnamed((), ()) == [
        {"key": "qwen", "upstream": "local", "requests": 3, "kept": False},
        {"key": "gemma", "upstream": "local", "requests": 1, "kept": False},
    ]
    assert [one["key"] for one in recent.unnamed((QWEN,), ())] == ["gemma"]


def test_what_was_adopted_stands_there_with_what_it_has_served() -> None:
    recent = Recent(Wall())
    recent.add(Seen(GEMMA, "chat", None, Outcome.OK, 200))

    assert recent.unnamed((GEMMA,), (GEMMA,)) == [
        {"key": "gemma", "upstream": "local", "requests": 1, "kept": True}
    ]


def test_what_is_loaded_and_was_never_asked_for_comes_last() -> None:
    recent = Recent(Wall())
    recent.passed(QWEN)

    assert [(one["key"], one["requests"]) for one in recent.unnamed((), (), (GEMMA, QWEN))] == [
        ("qwen", 1),
        ("gemma", 0),
    ]
    assert recent.unnamed((GEMMA, QWEN), (), (GEMMA, QWEN)) == []


def test_whoever_asks_for_thousands_of_models_takes_no_memory() -> None:
    recent = Recent(Wall())
    for n in range(10 * UNNAMED):
        recent.passed(ModelId("local", f"m{n}"))

    assert len(recent.unnamed((), ())) == UNNAMED
