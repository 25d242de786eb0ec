"""The daemon and a real inference server, both as processes: `transformers serve`, which nobody here wrote.

It loads a model on the first request for it and drops it after `IDLE` quiet seconds. It does not show what is
loaded; that it says so in its log is what proves these tests right.
"""

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest

from keepalive.core.facts import Tier
from keepalive.core.records import Cause
from keepalive.lmstudio import wire
from tests.kit.installed import TRANSFORMERS
from tests.kit.real_server import RealServer, made_model, started

MISSING = TRANSFORMERS.why_not()
# None takes more than a minute, but its server may meet a busy machine.
pytestmark = [
    pytest.mark.real_server,
    pytest.mark.xdist_group("a real server"),  # to start one costs more than most of these tests
    pytest.mark.timeout(600),
    pytest.mark.skipif(MISSING is not None, reason=MISSING or ""),
]

IDLE = 20
# Often enough that a busy machine may be late by three of them.
PING = 4

Seen = TypeVar("Seen")


@pytest.fixture(scope="module")
def model() -> Path:
    return made_model()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    with started(server := RealServer(tmp_path_factory.mktemp("server"), idle_seconds=IDLE)):
        yield server


@pytest.fixture
def server(shared: RealServer) -> RealServer:
    """One that runs; what others have loaded there may still be loaded."""
    if not shared.is_running():
        shared.start()
        shared.wait()
    return shared


@pytest.fixture
def fresh(shared: RealServer) -> RealServer:
    """One that runs, and has loaded nothing."""
    if not shared.is_running() or shared.loads():
        shared.kill()
        shared.start()
        shared.wait()
    return shared


class Daemon:
    """`keepalive run` as a process."""

    def __init__(self, home: Path, server: RealServer, models: list[Path]) -> None:
        home.mkdir()
        config = home / "config.toml"
        lines = [
            "[server]",
            'listen = "127.0.0.1:0"',
            'admin_listen = "127.0.0.1:0"',
            'log_format = "json"',
            f'state_dir = "{home / "state"}"',
            "[[upstreams]]",
            'name = "real"',
            f'url = "{server.url}"',
            'list_timeout = "1m"',
            "[defaults]",
            f'ping_interval = "{PING}s"',
            'refresh_interval = "2s"',
        ]
        for model in models:
            lines += ["[[models]]", f'key = "{model}"']
        config.write_text("\n".join(lines) + "\n")
        self._log_path = home / "keepalive.log"
        with self._log_path.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "keepalive", "run", "-c", config], stdin=subprocess.DEVNULL, stderr=log
            )
        self.admin = str(eventually(lambda: self.logged("daemon.started"))[0]["admin"])

    def stop(self) -> int:
        self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(90)
        finally:
            self._process.kill()

    def logged(self, event: str) -> list[dict[str, Any]]:
        assert self._process.poll() is None, f"the daemon ended:\n{self._log_path.read_text()}"
        # What stands behind the last line break is still being written; a traceback is for people.
        lines = [line for line in self._log_path.read_text().split("\n")[:-1] if line.startswith("{")]
        return [record for record in map(json.loads, lines) if record["event"] == event]

    def get(self, path: str) -> str:
        with urlopen(self.admin + path, timeout=90) as answer:
            text: str = answer.read().decode()
        return text

    def is_ready(self) -> bool:
        try:
            self.get("/readyz")
        except HTTPError as error:
            error.close()
            return False
        return True

    def status(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self.get("/api/status"))
        return document

    def metric(self, name: str, *labels: str) -> float:
        """The one sample of `name` that carries all of these labels, written as on the page."""
        samples = re.findall(rf"^{name}(?:\{{(.*)\}})? (\S+)$", self.get("/metrics"), re.MULTILINE)
        values = [float(value) for given, value in samples if all(label in given for label in labels)]
        assert len(values) == 1, f"{len(values)} samples of {name} with {labels}"
        return values[0]


@pytest.fixture
def keep(tmp_path: Path) -> Iterator[Callable[..., Daemon]]:
    running: list[Daemon] = []

    def run(server: RealServer, *models: Path) -> Daemon:
        running.append(Daemon(tmp_path / f"daemon-{len(running)}", server, list(models)))
        return running[-1]

    yield run
    for daemon in running:
        daemon.stop()


def eventually(look: Callable[[], Seen], within: float = 200.0) -> Seen:
    """The first answer of `look` that holds."""
    deadline = time.monotonic() + within
    while not (seen := look()):
        assert time.monotonic() < deadline, f"still not so after {within:.0f} s"
        time.sleep(0.1)
    return seen


def test_when_the_quiet_time_is_over_only_the_model_that_we_keep_is_still_there(
    model: Path, keep: Callable[..., Daemon], fresh: RealServer, tmp_path: Path
) -> None:
    # Two equal servers side by side: what the one shows without us, the other shows with us, in the same
    # seconds on the same machine. What counts is whether a user's question made them load: how long he waited for
    # it (20 to 60 times as long, on a machine with nothing else to do) is told, and not judged.
    alone = RealServer(tmp_path / "alone", idle_seconds=IDLE)
    kept = fresh
    with started(alone):
        daemon = keep(kept, model)
        eventually(daemon.is_ready)
        began = time.monotonic()
        pings = daemon.metric("keepalive_model_pings_total", 'outcome="ok"')
        kept.chat(model)
        alone.chat(model)
        loaded = alone.resident_mib()

        eventually(lambda: alone.drops() == 1)

        eventually(lambda: loaded - alone.resident_mib() > 40)
        cold, still_warm = alone.chat(model), kept.chat(model)
        print(f"the user waited {cold:.2f} s without the daemon, {still_warm:.2f} s with it")

        # without the daemon: dropped, the memory given back, and loaded again while the user waits
        assert alone.loads() == 2
        # with it: the first load was the only one
        assert kept.drops() == 0
        assert kept.loads() == 1

        # and the metrics say so
        assert daemon.metric("keepalive_upstream_up", 'upstream="real"') == 1
        assert daemon.metric("keepalive_model_state", 'state="warm"') == 1
        assert daemon.metric("keepalive_model_loads_total", 'outcome="ok"') == 1
        lost = [daemon.metric("keepalive_model_evictions_total", f'cause="{cause}"') for cause in Cause]
        assert lost == [0, 0, 0, 0, 0, 0]
        more = daemon.metric("keepalive_model_pings_total", 'outcome="ok"') - pings
        assert 1 <= more <= (time.monotonic() - began) / PING + 1
        for outcome in ("error", "timeout", "wrong_model"):
            assert daemon.metric("keepalive_model_pings_total", f'outcome="{outcome}"') == 0
        count = daemon.metric("keepalive_model_ping_duration_seconds_count")
        mean = daemon.metric("keepalive_model_ping_duration_seconds_sum") / count
        assert mean > 0
        assert daemon.metric("keepalive_model_last_load_seconds") > 0
        (shown,) = daemon.status()["models"]
        assert (shown["state"], shown["loads"], shown["reason"]) == ("warm", 1, None)
        # nobody was told of trouble where there was none
        assert [record["state"] for record in daemon.logged("upstream.state")] == ["up"]
        assert daemon.stop() == 0
    # We leave no process or model behind, and have taken none away.
    assert kept.drops() == 0


def test_a_server_that_was_killed_is_reported_and_kept_again_when_it_is_back(
    model: Path, keep: Callable[..., Daemon], server: RealServer
) -> None:
    daemon = keep(server, model)
    eventually(daemon.is_ready)

    server.kill()

    eventually(lambda: not daemon.is_ready())
    status = daemon.status()
    assert status["upstreams"][0]["state"] == "down"
    assert status["upstreams"][0]["error"] == f"nothing listens at {server.url}"
    assert status["models"][0]["state"] == "unknown"
    assert daemon.metric("keepalive_upstream_up", 'upstream="real"') == 0

    server.start()
    server.wait()
    eventually(daemon.is_ready)

    # loaded once in its second life, and never twice
    assert server.loads() == 1
    assert daemon.metric("keepalive_model_loads_total", 'outcome="ok"') == 2
    assert daemon.metric("keepalive_upstream_up", 'upstream="real"') == 1
    # The log is written by the batch, a moment after what it tells.
    wanted = ["cold", "loading", "warm", "unknown", "cold", "loading", "warm"]
    eventually(lambda: [record["state"] for record in daemon.logged("model.state")] == wanted)
    assert [record["state"] for record in daemon.logged("upstream.state")] == ["up", "down", "up"]
    # whoever comes now does not wait
    server.chat(model)
    assert server.loads() == 1


def test_our_ping_is_taken_and_its_answer_is_signed_in_a_way_that_we_know(
    model: Path, server: RealServer
) -> None:
    path, body = wire.ping("llm", str(model), Tier.OPENAI)
    status, text, _ = server.ask("POST", path, body)
    listed = server.ask("GET", "/v1/models")[:2]

    assert status == 200, text
    answer = json.loads(text)
    assert answer["model"] == f"{model}@main"
    assert answer["usage"]["completion_tokens"] == 1
    assert wire.is_answer_of(wire.answered_by(answer), [str(model)], Tier.OPENAI)
    # It serves models that it does not list: a listing is no reason not to ask.
    assert listed == (200, '{"object":"list","data":[]}')
    # A `ttl`, which LM Studio takes, is refused here.
    path, body = wire.ping("llm", str(model), Tier.V0, lease=60.0)
    assert server.ask("POST", path, body)[0] == 422


def test_a_model_that_cannot_be_loaded_is_tried_again_later_and_disturbs_no_other(
    model: Path, keep: Callable[..., Daemon], server: RealServer
) -> None:
    nowhere = model.with_name("nowhere")

    daemon = keep(server, nowhere, model)

    good, bad = (f'model="{path}"' for path in (model, nowhere))
    eventually(lambda: daemon.metric("keepalive_model_state", good, 'state="warm"') == 1)
    # The server answers 500 with bare text at once, and closes the connection without a word.
    failures = eventually(lambda: daemon.logged("model.load_failed")[1:])
    assert failures[0]["outcome"] == "failed"
    assert failures[0]["reason"].endswith("with status 500")
    assert failures[0]["retry_in"] == 10.0
    (status, _) = daemon.status()["models"]
    assert (status["state"], status["loads"]) == ("backoff", 0)
    assert daemon.metric("keepalive_model_loads_total", good, 'outcome="ok"') == 1
    assert daemon.metric("keepalive_model_loads_total", bad, 'outcome="unknown"') == 0
    # that closed connection was no outage
    assert [record["state"] for record in daemon.logged("upstream.state")] == ["up"]
