"""Openings as a user has them: files beside his config, what status, log and metrics say of them, and a reload."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from keepalive import config
from keepalive.cli.doctor import findings
from keepalive.cli.evidence import gather
from keepalive.simulator.models import SimModel
from tests.kit.live import (
    DaemonProcess,
    SimulatorProcess,
    ask,
    asked,
    command,
    daemon,
    ending,
    model,
    settings,
    simulator,
    until,
    wait_until,
)
from tests.service.test_daemon import log_in, metric

GEMMA = SimModel("gemma", load_seconds=0.1)
CANARY = "canary-of-the-ward"
WORDS = " ".join(f"{CANARY}-{n}" for n in range(500))


def written(folder: Path, url: str, *names: str, **more: Any) -> Path:
    path = folder / "config.toml"
    path.write_text(settings(url, f'key = "gemma"\nprime = {json.dumps(names)}', **more))
    return path


def prompts(studio: Any) -> list[tuple[int, int]]:
    """Of each prompt that was read: its words, and how many of them were remembered."""
    ended = [e for e in studio.studio.log(0) if e["kind"] == "generation.ended"]
    return [(e["prompt"], e["cached"]) for e in ended]


async def test_what_a_file_holds_is_read_after_the_load_and_the_first_caller_waits_for_his_own_words(
    tmp_path: Path,
) -> None:
    body = {"model": "gemma", "messages": [{"role": "system", "content": WORDS}], "stream": True}
    (tmp_path / "agent.json").write_text(json.dumps(body))
    with log_in(tmp_path) as lines:
        async with simulator(GEMMA) as studio:
            path = written(tmp_path, studio.url, "agent.json")
            async with daemon(path.read_text(), path=path) as running:
                await until(lambda: model(running, "gemma")["primed"]["at"], "it is primed")
                known = model(running, "gemma")
                asks = {"model": "gemma", "messages": [*body["messages"], {"role": "user", "content": "hi"}]}
                status, _, _ = await asked(f"{running.url}/v1/chat/completions", "POST", asks)
                counted = metric(running, "model_primes_total", model="gemma", upstream="local", outcome="ok")
                took = metric(running, "model_prime_duration_seconds_count", model="gemma", upstream="local")
                page = "".join(
                    [(await asked(running.admin_url + at))[2] for at in ("/api/status", "/metrics")]
                )
                read = prompts(studio)
        (said,) = lines("model.primed")
        log = json.dumps(lines(None))

    assert known["state"] == "warm"
    assert {**known["primed"], "at": None} == {
        "openings": 1,
        "of": 1,
        "tokens": 509,
        "at": None,
        "under_way": False,
        "reason": None,
    }
    assert status == 200
    assert (counted, took) == (1.0, 1.0)
    assert (said["opening"], said["tokens"], said["model"]) == ("agent.json", 509, "gemma")
    (_, ping), (words, cold), (again, cached) = read
    assert (ping, cold <= 2) == (0, True)
    assert again - cached <= 3 < words
    assert CANARY not in log + page


async def test_where_nothing_is_to_be_primed_nothing_is_said_of_it() -> None:
    async with simulator(GEMMA) as studio, daemon(settings(studio.url, "gemma")) as running:
        await until(lambda: model(running, "gemma")["state"] == "warm", "it is warm")

        assert model(running, "gemma")["primed"] is None


async def test_a_file_that_cannot_be_used_is_said_at_the_start_and_the_model_is_served(
    tmp_path: Path,
) -> None:
    (tmp_path / "broken.json").write_text("{")
    with log_in(tmp_path) as lines:
        async with simulator(GEMMA) as studio:
            path = written(tmp_path, studio.url, "broken.json")
            async with daemon(path.read_text(), path=path) as running:
                await until(lambda: model(running, "gemma")["state"] == "warm", "it is warm")
                known = model(running, "gemma")
        (said,) = lines("prime.unusable")

    assert (known["primed"]["openings"], known["primed"]["of"]) == (0, 1)
    assert known["primed"]["reason"].startswith("broken.json: is no JSON: ")
    assert '"broken.json" is no JSON' in said["reason"]


async def test_a_reload_replays_what_has_changed_and_refuses_what_has_vanished(tmp_path: Path) -> None:
    (tmp_path / "agent.txt").write_text(WORDS)
    (tmp_path / "other.txt").write_text("other")
    async with simulator(GEMMA) as studio:
        path = written(tmp_path, studio.url, "agent.txt", "other.txt")
        async with daemon(path.read_text(), path=path) as running:

            def primes() -> float:
                count = metric(running, "model_primes_total", model="gemma", upstream="local", outcome="ok")
                assert count is not None
                return count

            await until(lambda: primes() == 2, "both are read")
            running.reload()
            (tmp_path / "agent.txt").write_text(WORDS + " today")
            running.reload()
            await until(lambda: primes() == 3, "the one that changed is read again")
            (tmp_path / "agent.txt").unlink()
            running.reload()
            rejected = running.status()["config"]["mistakes"]
            await until(lambda: model(running, "gemma")["primed"]["openings"] == 2, "the rest is as it was")
            loads = model(running, "gemma")["loads"]

    assert rejected == [f'{path}:16: models[0].prime[0]: "agent.txt" cannot be read: there is no such file']
    assert loads == 1


def test_check_finds_what_is_wrong_with_the_files(tmp_path: Path) -> None:
    path = written(tmp_path, "http://127.0.0.1:9", "gone.txt")

    run = command("check", "-c", str(path), cwd=tmp_path)

    assert run.returncode == 3
    assert run.stderr == f'{path}:16: models[0].prime[0]: "gone.txt" cannot be read: there is no such file\n'


def asks(url: str, system: str, said: str, **more: Any) -> int:
    messages = [{"role": "system", "content": system}, {"role": "user", "content": said}]
    return ask(f"{url}/v1/chat/completions", "POST", {"model": "gemma", "messages": messages, **more})[0]


def test_what_callers_share_is_read_after_the_next_load_and_shows_nowhere(tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    simulated = SimulatorProcess(tmp_path, "gemma:0.1s")
    text = settings(
        simulated.url,
        'key = "gemma"\nprime = "learn"',
        server=f'log_level = "debug"\nlog_format = "json"\nstate_dir = "{state}"',
    )
    running = DaemonProcess(tmp_path, text)
    with ending(simulated, running):
        running.reaches("gemma", "warm")
        front = running.events("daemon.started")[0]["listen"]

        for said in ("one", "two"):
            assert asks(front, WORDS, said) == 200
        wait_until(lambda: (running.model("gemma")["primed"] or {}).get("openings") == 1, "it is learned")
        unload = ask(f"{simulated.url}/api/v1/models/unload", "POST", {"instance_id": "gemma"})
        assert unload[0] == 200
        wait_until(lambda: running.model("gemma")["loads"] == 2, "it is loaded anew")
        wait_until(lambda: running.model("gemma")["primed"]["openings"] == 1, "and has read it")
        assert asks(front, WORDS, "three", stream=True) == 200

        ends = [e for e in simulated.log() if e["kind"] == "generation.ended" and e["prompt"] > 500]
        assert ends[-1]["prompt"] - ends[-1]["cached"] <= 3
        shown = [
            ask(running.url + at)[2] for at in ("/", "/metrics", "/api/status", "/api/history?model=gemma")
        ]
        counted = ask(f"{running.url}/metrics")[2]
        running.signal(signal.SIGTERM)
        assert running.ended() == 0
    assert 'keepalive_proxy_time_to_first_token_seconds_count{model="gemma",start="primed"} 1.0' in counted
    written_down = [
        path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and "simulator" not in path.name
    ]
    assert len(written_down) >= 3  # config, log, history
    assert not any(CANARY.encode() in content for content in written_down)
    assert not any(CANARY in page for page in shown)


@pytest.mark.parametrize("remembers", [True, False])
async def test_where_it_does_not_help_it_says_so_and_stops(remembers: bool, tmp_path: Path) -> None:
    (tmp_path / "agent.txt").write_text(WORDS)
    with log_in(tmp_path) as lines:
        async with simulator(GEMMA, prompt_cache=remembers, prompt_token_seconds=0.002) as studio:
            path = written(tmp_path, studio.url, "agent.txt")
            async with daemon(path.read_text(), path=path) as running:
                await until(lambda: model(running, "gemma")["primed"]["at"], "it is primed")
                # Twice as slow: a busy machine, too, may have been slow to read the opening.
                studio.studio.set_faults(prompt_token_seconds=0.004)
                messages = [{"role": "system", "content": WORDS}, {"role": "user", "content": "hi"}]
                asks = {"model": "gemma", "messages": messages, "stream": True, "max_tokens": 2}
                for _ in range(5):
                    assert (await asked(f"{running.url}/v1/chat/completions", "POST", asks))[0] == 200
                await until(lambda: model(running, "gemma")["in_flight"] == 0, "all is answered")
                known = model(running, "gemma")
                parsed = config.parse(path.read_text(), str(path), {})
                found = findings(await gather(parsed, path, {}, "", running.status()))
                text = (await asked(f"{running.admin_url}/metrics"))[2]
        stopped = lines("model.priming_stopped")

    count = 'keepalive_proxy_time_to_first_token_seconds_count{model="gemma",start="primed"} 5.0'
    assert count in text
    told = [finding.what for finding in found if "priming" in finding.what]
    if remembers:
        assert (known["primed"]["reason"], stopped, told) == (None, [], [])
    else:
        assert known["primed"]["reason"].startswith("priming has not made answers faster: ")
        assert [line["reason"] for line in stopped] == [known["primed"]["reason"]]
        assert told == [f"gemma on local: {known['primed']['reason']}"]
