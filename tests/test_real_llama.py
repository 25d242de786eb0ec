"""Priming in front of a real llama.cpp server, which says itself how much of a prompt it had to read."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.kit.installed import LLAMA
from tests.kit.live import DaemonProcess, ending, settings, wait_until
from tests.kit.live import ask as live_ask
from tests.kit.llama import LlamaServer, ask, made_model

MISSING = LLAMA.why_not()
pytestmark = [
    pytest.mark.real_server,
    pytest.mark.timeout(600),
    pytest.mark.skipif(MISSING is not None, reason=MISSING or ""),
]

RULES = " ".join(f"Rule {n}: wash your hands." for n in range(100))
SYSTEM = {"role": "system", "content": RULES}


def read(answer: dict[str, Any]) -> tuple[int, int]:
    """Tokens of the prompt that were computed, and that were in the cache."""
    timings = answer["timings"]
    return timings["prompt_n"], timings["cache_n"]


def primes(running: DaemonProcess, model: Path, outcome: str) -> float:
    """How often an opening was replayed that ended so."""
    line = rf'^keepalive_model_primes_total{{model="{model}",upstream="local",outcome="{outcome}"}} (\S+)$'
    found = re.search(line, live_ask(f"{running.url}/metrics")[2], re.MULTILINE)
    return float(found[1]) if found else 0.0


def test_what_was_primed_is_not_read_again_when_a_caller_begins_with_it(
    run_folder: Path, tmp_path: Path
) -> None:
    """With one slot, which a ping of its own would take."""
    model = made_model(run_folder)
    (tmp_path / "agent.json").write_text(json.dumps({"messages": [SYSTEM]}))
    with LlamaServer(tmp_path, model, slots=1) as server:
        text = settings(
            server.url,
            f'key = "{model}"\nprime = "agent.json"',
            server='log_format = "json"',
            defaults='ping_interval = "2s"',
        )
        running = DaemonProcess(tmp_path, text)
        with ending(running):
            front = running.events("daemon.started")[0]["listen"]
            known = wait_until(
                lambda: (primed := running.model(str(model))["primed"])["at"] and primed, "it is primed"
            )
            wait_until(lambda: primes(running, model, "ok") >= 3, "it was pinged by what it has read")

            computed, cached = read(
                ask(front, [SYSTEM, {"role": "user", "content": "May I sit down?"}], model)
            )
            other = read(
                ask(
                    front,
                    [{"role": "system", "content": RULES[::-1]}, {"role": "user", "content": "?"}],
                    model,
                )
            )
            # It may have been read once more since: another's prompt has taken its place in the cache.
            line, *_ = wait_until(lambda: running.events("model.primed"), "it is logged")

    print(f"read in {line['seconds']:.2f} s; then {computed} tokens of {computed + cached}")
    assert known["tokens"] > 2000
    assert computed <= 40
    assert cached > known["tokens"] - 40
    # what nobody has primed is read from the first word on
    assert other[0] > 2000


def test_a_caller_who_comes_while_it_is_read_has_the_only_slot_at_once_and_it_is_gone_on_with_later(
    run_folder: Path, tmp_path: Path
) -> None:
    model = made_model(run_folder)
    (tmp_path / "long.txt").write_text(f"{RULES} {RULES[:5000]} {RULES}"[:7000])
    with LlamaServer(tmp_path, model, slots=1) as server:
        text = settings(server.url, f'key = "{model}"\nprime = "long.txt"', server='log_format = "json"')
        running = DaemonProcess(tmp_path, text)
        with ending(running):
            front = running.events("daemon.started")[0]["listen"]
            wait_until(lambda: running.model(str(model))["primed"]["under_way"], "it is being read")

            ask(front, [{"role": "user", "content": "May I sit down?"}], model)

            assert running.events("model.primed") == []
            assert running.model(str(model))["primed"]["openings"] == 0
            given_up = primes(running, model, "given_up")
            known = wait_until(
                lambda: (primed := running.model(str(model))["primed"])["at"] and primed, "it is primed"
            )

    assert given_up == 1
    assert known["tokens"] > 6000
