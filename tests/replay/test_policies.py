"""What each policy comes to: by hand where that can be done, and by rules under random arrivals."""

import random
from dataclasses import replace
from itertools import pairwise

import pytest

from keepalive.core.records import Policy
from keepalive.replay import POLICIES, Card, Request, picture, replay
from keepalive.replay.policies import Report

GB = 10**9
A, B, C = Card("a", 9 * GB, 10.0), Card("b", 9 * GB, 20.0), Card("c", 9 * GB, 30.0)


def ask(*requests: tuple[float, str, float]) -> list[Request]:
    return [Request(*request) for request in requests]


def waits(report: Report) -> list[tuple[float, str, float]]:
    return sorted((at, model, round(seconds, 3)) for at, model, seconds in report.outcome.waits)


def test_the_first_request_waits_for_the_load_and_those_after_it_do_not():
    report = replay("lru", ask((0, "a", 5), (4, "a", 5), (20, "a", 5), (30, "a", 1)), [A], 10 * GB)

    assert waits(report) == [(0, "a", 10), (4, "a", 6)]
    assert (report.loads, report.evictions, report.waited_share) == (1, 0, 0.5)
    assert report.hours_waited == pytest.approx(16 / 3600)
    assert (report.p95_seconds, report.p99_seconds, report.worst_seconds) == (10.0, 10.0, 10.0)


def test_who_needs_the_room_waits_for_the_answer_to_end_and_for_the_load():
    report = replay("lru", ask((0, "a", 50), (20, "b", 5)), [A, B], 10 * GB)

    # The answer of a ends at 60, three seconds later it goes, and b takes 20 s.
    assert waits(report) == [(0, "a", 10), (20, "b", 63)]
    assert (report.loads, report.evictions) == (2, 1)


def test_after_patience_a_busy_model_is_drained_in_favour_of_who_waits():
    requests = ask(*((float(t), "a", 8.0) for t in range(0, 400, 5)), (50, "b", 5))
    report = replay("lru", requests, [A, B], 10 * GB)

    at, _, seconds = next(w for w in report.outcome.waits if w[1] == "b")
    assert at == 50
    assert 120 + 20 <= seconds <= 120 + 8 + 20 + 1


def test_the_least_recently_used_goes():
    report = replay("lru", ask((0, "a", 1), (50, "b", 1), (100, "a", 1), (150, "c", 1)), [A, B, C], 20 * GB)

    assert [(s.model, s.ended) for s in report.outcome.stays[:1]] == [("b", 150)]


def test_the_hole_is_filled_and_each_load_ahead_counts_as_used_or_not():
    requests = ask((0, "a", 1), (30, "b", 1), (60, "large", 1), (100, "c", 1), (200, "b", 1))
    cards = [A, B, C, Card("large", 19 * GB, 10.0)]

    ours, lru = replay("ours", requests, cards, 20 * GB), replay("lru", requests, cards, 20 * GB)

    # When the large one has gone for c, b comes back before it is asked for.
    assert [w[1] for w in waits(lru)] == ["a", "b", "large", "c", "b"]
    assert [w[1] for w in waits(ours)] == ["a", "b", "large", "c"]
    assert (ours.ahead_used, ours.ahead_unused, lru.ahead_used) == (1, 0, 0)


def test_a_load_ahead_is_given_up_for_who_waits_behind_it():
    requests = ask((0, "a", 1), (30, "b", 1), (60, "large", 1), (100, "c", 1), (140, "a", 1))
    cards = [A, B, C, Card("large", 19 * GB, 10.0)]

    report = replay("ours", requests, cards, 20 * GB)

    # c is there at 130; b, which was asked for last of the others, would load until 150.
    assert [w for w in waits(report) if w[1] == "a"] == [(0, "a", 10), (140, "a", 10)]
    assert [(s.model, round(s.began), round(s.ended)) for s in report.outcome.stays][2:4] == [
        ("large", 60, 100),
        ("b", 130, 140),
    ]
    assert report.ahead_unused == 1


def test_left_to_itself_lm_studio_keeps_one_at_a_time_however_much_there_is():
    report = replay("auto-evict", ask((0, "a", 1), (50, "b", 1), (100, "a", 1)), [A, B], 100 * GB)

    assert (report.loads, report.evictions) == (3, 2)


def test_who_knows_the_future_lets_go_what_is_wanted_last():
    requests = ask((0, "b", 1), (50, "a", 1), (100, "c", 1), (150, "b", 1), (900, "a", 1))

    lru, best = (replay(p, requests, [A, B, C], 20 * GB) for p in ("lru", "clairvoyant"))

    assert next(s.model for s in lru.outcome.stays) == "b"
    assert next(s.model for s in best.outcome.stays) == "a"


def test_what_is_always_kept_stays_and_what_does_not_fit_is_left_out():
    kept = {"a": Policy(auto=False)}
    cards = [A, B, C, Card("huge", 50 * GB, 60.0)]
    requests = ask((50, "b", 1), (100, "c", 1), (150, "a", 1), (200, "huge", 1), (250, "nobody", 1))

    report = replay("ours", requests, cards, 20 * GB, kept)

    assert "a" not in [m for _, m, _ in report.outcome.waits]
    assert report.left_out == ("huge", "nobody")


def test_what_lies_idle_is_let_go():
    kept = {"a": Policy(auto=True, idle=60.0)}

    report = replay("ours", ask((0, "a", 1), (500, "a", 1)), [A], 20 * GB, kept)

    assert (report.loads, [round(s.ended) for s in report.outcome.stays]) == (2, [71, 571])


# --- whatever comes -------------------------------------------------------------------------------


def random_trace(seed: int) -> tuple[list[Request], list[Card], int]:
    chance = random.Random(seed)
    cards = [
        Card(f"m{n}", int(chance.uniform(1, 14) * GB), chance.choice([1.0, 5.0, 20.0, 60.0]))
        for n in range(chance.randint(2, 7))
    ]
    pace = chance.choice([0.5, 4.0, 30.0])
    answer = chance.choice([0.5, 10.0, 40.0])
    now, requests = 0.0, []
    for _ in range(300):
        now += chance.expovariate(1 / pace)
        model = cards[min(int(chance.expovariate(0.7)), len(cards) - 1)].model
        requests.append(Request(now, model, chance.expovariate(1 / answer)))
    return requests, cards, int(chance.uniform(10, 30) * GB)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("seed", range(5))
def test_all_are_served_in_bounded_time_within_the_memory_and_no_load_serves_nobody(seed: int, policy: str):
    requests, cards, memory = random_trace(seed)
    takes = {card.model: card.bytes for card in cards}

    report = replay(policy, requests, cards, memory)
    outcome = report.outcome

    assert outcome.unserved == 0
    # Every other model may come first, each with its patience, its load, and answers that are not cut off.
    longest = max(r.answer_seconds for r in requests)
    assert report.worst_seconds <= len(cards) * (120 + 60 + longest + 3)
    changes = [(s.began, takes[s.model]) for s in outcome.stays] + [
        (s.ended, -takes[s.model]) for s in outcome.stays
    ]
    used = most = 0
    for _, bytes_ in sorted(changes):
        used += bytes_
        most = max(most, used)
    assert most <= memory or policy == "auto-evict"
    # Whoever came is answered by a model that was there from before his answer began until after it had ended.
    waited = {(at, model): seconds for at, model, seconds in outcome.waits}
    stays: dict[str, list[tuple[float, float]]] = {}
    for stay in outcome.stays:
        stays.setdefault(stay.model, []).append((stay.loaded, stay.ended))
    unused = 0
    for model, spans in stays.items():
        assert all(first[1] <= second[0] for first, second in pairwise(sorted(spans)))
        served = [
            (began, began + r.answer_seconds)
            for r in requests
            if r.model == model
            for began in [r.second + waited.get((r.second, model), 0.0)]
        ]
        for began, ended in served:
            assert any(a <= began + 1e-6 and ended <= b + 1e-6 for a, b in spans), "an answer was cut off"
        unused += sum(not any(a - 1e-6 <= began <= b for began, _ in served) for a, b in spans)
    assert unused <= outcome.ahead_unused + (policy in ("ours", "clairvoyant")) * len(cards)


def test_the_same_trace_comes_to_the_same_thing():
    requests, cards, memory = random_trace(3)

    assert replay("ours", requests, cards, memory) == replace(replay("ours", requests, cards, memory))


def test_a_picture_shows_every_model_every_load_and_whoever_waited():
    report = replay("ours", ask((0, "a<&>", 5), (500, "b", 5)), [Card("a<&>", 9 * GB, 10.0), B], 10 * GB)

    drawn = picture([report])

    assert drawn.startswith("<svg")
    assert drawn.count('class="loads"') == 2
    assert drawn.count('class="waits"') == 2
    assert "a&lt;&amp;&gt;" in drawn
    assert "ours: 0.0 hours waited, 2 loads" in drawn
    assert picture([]).startswith("<svg")
