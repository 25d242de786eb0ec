"""What docs/prompts.md shows is what happens."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kit import PROJECT
from tests.kit.live import PATIENCE, DaemonProcess, SimulatorProcess, ask, ending, environment, settings

DOCS = (PROJECT / "docs" / "prompts.md").read_text()
ADDRESS = "http://127.0.0.1:1235"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", DOCS, re.MULTILINE | re.DOTALL)


def run(folder: Path, *words: str) -> str:
    done = subprocess.run(
        words, cwd=folder, env=environment(), capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def documented(tmp_path: Path, url: str) -> DaemonProcess:
    return DaemonProcess(tmp_path, settings(url) + blocks("toml")[0])


def test_the_python_example_runs(tmp_path: Path) -> None:
    simulated = SimulatorProcess(tmp_path, "medicine-llm:3600s")
    with ending(simulated):
        running = documented(tmp_path, simulated.url)
        with ending(running):
            listen = running.events("daemon.started")[0]["listen"]
            program = blocks("python")[0].replace(ADDRESS, listen)
            command = [sys.executable, "-u", "-W", "error", "-c", program]
            with subprocess.Popen(
                command, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
            ) as example:
                assert example.stdout is not None
                said = b""
                while b"Loading medicine-llm: " not in said:
                    read = os.read(example.stdout.fileno(), 4096)
                    assert read, f"it ended with {said!r}"
                    said += read
                # Whoever starts the program is as slow as the machine; the hour ends once it was seen to wait.
                ask(f"{simulated.url}/simulator/advance", "POST", {"seconds": 3600})
                rest, wrong = example.communicate(timeout=PATIENCE)

    assert (example.returncode, wrong) == (0, b"")
    assert b"This answer comes from a simulator" in rest


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_the_curl_examples_run_and_answer_as_shown(tmp_path: Path) -> None:
    simulated = SimulatorProcess(tmp_path, "medicine-llm:100ms")
    with ending(simulated):
        running = documented(tmp_path, simulated.url)
        with ending(running):
            listen = running.events("daemon.started")[0]["listen"]
            execute, others = (text.replace(ADDRESS, listen) for text in blocks("sh")[:2])
            stream = run(tmp_path, "sh", "-c", execute)
            answers = [run(tmp_path, "sh", "-c", line) for line in others.splitlines()]
    shown = [json.loads(line) for line in blocks("json")[1].splitlines()]

    events = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: ")]
    documented_events = re.findall(r"^data: (.*)$", DOCS, re.MULTILINE)
    fields = {event["type"]: list(event) for event in map(json.loads, documented_events)}
    assert events[-1]["type"] == "done"
    # How far a load is may be told or not, by when it was asked.
    came = {event["type"]: [name for name in event if name != "progress"] for event in events}
    assert came == {kind: names for kind, names in fields.items() if kind in came}
    assert json.loads(answers[0]) == shown[0]
    assert json.loads(answers[1])["data"].keys() == shown[1]["data"].keys()


def test_every_code_that_is_shown_is_one_that_the_program_knows() -> None:
    folders = ("prompts", "protocols", "proxy")
    files = [file for folder in folders for file in (PROJECT / "keepalive" / folder).glob("*.py")]
    source = "".join(file.read_text() for file in files)
    rows = re.findall(r"^\| [45]\d\d.*? \| (.*?) \|", DOCS, re.MULTILINE)
    codes = {code for row in rows for code in re.findall(r"`(\w+)`", row)}
    codes |= {"timeout", "upstream_unreachable", "upstream_timeout", "upstream_cut", "upstream_error"}

    assert len(codes) > 10
    assert {code for code in codes if f'"{code}"' not in source} == set()
