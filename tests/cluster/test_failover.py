"""Who holds an upstream is killed, or stopped and wakes again, during a load that callers wait for: as processes.

LM Studio's own log is the judge.
"""

import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.cluster.test_member import member
from tests.kit import etcd as kit
from tests.kit.etcd import needs_etcd
from tests.kit.live import DaemonProcess, SimulatorProcess, ask, ending, settings, wait_until

pytestmark = [needs_etcd, pytest.mark.xdist_group("etcd")]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[kit.Etcd]:
    with kit.etcd(tmp_path_factory.mktemp("etcd")) as running:
        yield running


@pytest.fixture(scope="module")
def lm_studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimulatorProcess]:
    running = SimulatorProcess(tmp_path_factory.mktemp("lm_studio"), "killed", "stopped")
    with ending(running):
        running.faults(load_seconds=600.0)
        yield running


def pair(
    folder: Path, lm_studio: SimulatorProcess, server: kit.Etcd, key: str
) -> tuple[DaemonProcess, DaemonProcess]:
    found = []
    for name in ("a", "b"):
        state = f'state_dir = "{folder / name}"\nlog_format = "json"'
        text = settings(lm_studio.url, key, server=state) + member(server.url, key, name, "3s")
        found.append(DaemonProcess(folder, text, name))
    return found[0], found[1]


def chat(asked: DaemonProcess, key: str) -> int:
    """A caller's request, held until that is warm; its status."""
    body = {"model": key, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
    url = asked.events("daemon.started")[0]["listen"]
    return ask(f"{url}/v1/chat/completions", "POST", body)[0]


def test_the_load_of_a_holder_that_is_killed_is_waited_for_by_its_successor(
    lm_studio: SimulatorProcess, server: kit.Etcd, tmp_path: Path
):
    a, b = pair(tmp_path, lm_studio, server, "killed")
    with ThreadPoolExecutor() as callers, ending(a, b):
        wait_until(lambda: lm_studio.happened("load.started", "killed"), "one of them loads it")
        first, other = (
            (a, b) if a.model("killed")["load"] and not a.events("model.load_remembered") else (b, a)
        )
        held = callers.submit(chat, other, "killed")
        wait_until(lambda: other.model("killed")["waiting"], "somebody waits for it")
        first.kill()
        wait_until(lambda: other.events("cluster.took_over"), "the other acts from now on")
        assert not held.done()
        lm_studio.let_it_load("killed")
        warm = other.reaches("killed", "warm")

        assert held.result() == 200
    assert (lm_studio.happened("load.started", "killed"), warm["instances"]) == (1, 1)
    assert len(other.events("model.load_remembered")) == 1


def test_a_holder_that_was_stopped_longer_than_its_lease_does_nothing_on_waking(
    lm_studio: SimulatorProcess, server: kit.Etcd, tmp_path: Path
):
    a, b = pair(tmp_path, lm_studio, server, "stopped")
    with ThreadPoolExecutor() as callers, ending(a, b):
        wait_until(lambda: lm_studio.happened("load.started", "stopped"), "one of them loads it")
        first, other = (
            (a, b) if a.model("stopped")["load"] and not a.events("model.load_remembered") else (b, a)
        )
        held = callers.submit(chat, first, "stopped")
        wait_until(lambda: first.model("stopped")["waiting"], "somebody waits for it")
        first.signal(signal.SIGSTOP)
        wait_until(lambda: other.events("cluster.took_over"), "the other acts from now on")
        lm_studio.let_it_load("stopped")
        other.reaches("stopped", "warm")
        # It is lost while the first sleeps, and loaded by the other; when that one wakes it finds it under way.
        lm_studio.evict("stopped")
        wait_until(lambda: lm_studio.happened("load.started", "stopped") == 2, "the other loads it again")
        first.signal(signal.SIGCONT)
        wait_until(lambda: first.events("cluster.gave_up"), "it knows that it has slept")
        lm_studio.let_it_load("stopped")
        warm = [daemon.reaches("stopped", "warm")["instances"] for daemon in (first, other)]

        assert held.result() == 200
    assert (lm_studio.happened("load.started", "stopped"), warm) == (2, [1, 1])
