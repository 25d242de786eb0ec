"""The demo, as somebody sees it who has just installed the program."""

import io
import os
import signal
import socket
import sys
from pathlib import Path

import pytest
from rich.console import Console

from keepalive import config
from keepalive.cli import demo
from keepalive.core.errors import KeepaliveError
from keepalive.service.daemon import Daemon
from tests.kit.live import Running, ending, settings, wait_until

# The same story, in a few seconds.
QUICK = """
from keepalive.cli import app as cli
from keepalive.cli import demo
from keepalive.simulator.models import SimModel
demo.MODELS = (
    SimModel("medicine-llm", size_bytes=7_200_000_000, load_seconds=2.0),
    SimModel("small-talk-1b", size_bytes=1_800_000_000, load_seconds=0.5),
)
demo.EVICTED_AFTER = 0.5
cli.app(["demo"])
"""


def states(text: str, key: str) -> list[str]:
    """Each state that the narrative shows, once."""
    words = [line.split()[2].rstrip(",:") for line in text.splitlines() if line.startswith(f"{key} is ")]
    return [word for i, word in enumerate(words) if i == 0 or words[i - 1] != word]


@pytest.mark.xdist_group("package")  # where the others begin that take the usual addresses
def test_one_sees_cold_loading_warm_an_eviction_and_its_repair(tmp_path: Path) -> None:
    running = Running([sys.executable, "-c", QUICK], tmp_path, "demo")
    with ending(running):
        wait_until(lambda: demo.MENDED in running.out.read_text(), "the repair")
        # Which of the two lines comes first is left to chance.
        wait_until(lambda: states(running.out.read_text(), "medicine-llm")[-1] == "warm", "its last line")
        running.signal(signal.SIGINT)
        code = running.ended()
    text = running.out.read_text()

    assert (code, running.err.read_text()) == (0, "")
    assert states(text, "medicine-llm")[-3:] == ["warm", "loading", "warm"] or states(text, "medicine-llm")[
        -4:
    ] == ["warm", "cold", "loading", "warm"]
    assert states(text, "small-talk-1b")[-2:] == ["loading", "warm"]
    assert "small-talk-1b is cold: waits for its turn: medicine-llm is loading" in text
    assert text.index(demo.EVICTED) < text.index(demo.MENDED)
    assert "to go" in text[text.index(demo.EVICTED) :]
    assert "daemon.started" not in text
    assert "[info" not in text
    assert "\x1b" not in text


@pytest.mark.xdist_group("package")
def test_it_leaves_nothing_on_disk(tmp_path: Path) -> None:
    running = Running([sys.executable, "-c", QUICK], tmp_path, "demo", HOME=str(tmp_path / "home"))
    with ending(running):
        wait_until(lambda: "medicine-llm is loading" in running.out.read_text(), "the load")
        running.signal(signal.SIGTERM)
        code = running.ended()

    assert code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo.err", "demo.out"]


def test_its_config_is_a_good_one() -> None:
    text = demo.SETTINGS.format(
        listen="127.0.0.1:1235", admin="127.0.0.1:9235", upstream="http://127.0.0.1:1234"
    )

    settings = config.parse(text, "demo", {})

    assert [model.key for model in settings.models] == ["medicine-llm", "small-talk-1b"]
    assert [model.load_seconds for model in demo.MODELS] == [12.0, 3.0]
    assert settings.server.state_dir is None


async def test_what_to_try_names_the_address_where_it_is_not_the_usual_one() -> None:
    daemon = Daemon(config.parse(settings("http://127.0.0.1:1", "x"), "test", {}), None, {})
    daemon.url = "http://127.0.0.1:1235"
    daemon.admin_url = "http://127.0.0.1:9235"
    usual = demo._welcome("x", "http://127.0.0.1:1", daemon)
    daemon.admin_url = "http://127.0.0.1:4000"
    other = demo._welcome("x", "http://127.0.0.1:1", daemon)

    assert "    keepalive status --watch\n" in usual
    assert "    keepalive status --watch --url http://127.0.0.1:4000\n" in other
    assert "    curl http://127.0.0.1:4000/metrics\n" in other
    assert """    curl -X POST http://127.0.0.1:1/simulator/evict -d '{"model":"small-talk-1b"}'\n""" in other
    assert "    curl -N http://127.0.0.1:1235/v1/chat/completions -d '{" in other


def test_a_usual_address_that_is_taken_is_passed_over() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = config.Address("127.0.0.1", taken.getsockname()[1])
        while_taken = demo._free_address(address)

    assert while_taken == "127.0.0.1:0"
    assert demo._free_address(address) == str(address)


async def test_an_address_that_cannot_be_had_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr(
            demo, "_free_address", lambda usual: f"127.0.0.1:{port if usual.port == 1235 else 0}"
        )
        with pytest.raises(KeepaliveError) as caught:
            await demo.run(Console(file=io.StringIO()))

    assert str(caught.value).startswith(f"server.listen: cannot listen on 127.0.0.1:{port}: ")
    assert os.strerror(98).lower() in str(caught.value)
