"""The log as it comes out of a real stream: what is said, what never is, and that nobody waits for it."""

import asyncio
import json
import logging
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import structlog

from keepalive.core.apply import apply
from keepalive.core.callers import Outcome, Seen
from keepalive.core.facts import (
    ClockJumped,
    DrainStarted,
    Entry,
    Fact,
    Instance,
    InstanceLost,
    Listed,
    ListingFailed,
    LoadEnded,
    LoadOutcome,
    LoadRemembered,
    LoadStarted,
    ModelId,
    OpeningsLearned,
    PingEnded,
    PingOutcome,
    PingStarted,
    PrimeEnded,
    PrimeOutcome,
    PrimeStarted,
    ReleaseAsked,
    Tier,
    Trouble,
    UnloadEnded,
    UnloadStarted,
)
from keepalive.core.records import Model, Upstream
from keepalive.core.upstreams import apply_upstream
from keepalive.observers import logs
from tests.kit.live import PATIENCE, environment, wait_until

GEMMA = ModelId("local", "gemma")
CANARY = "sk-canary-4711"
FULL_DISK = Path("/dev/full")
full_disk = pytest.mark.skipif(not FULL_DISK.exists(), reason="this system has no disk that is always full")


@contextmanager
def log_to(path: Path, level: str = "info", *, as_json: bool | None = None) -> Iterator[None]:
    with path.open("w") as stream:
        stop = logs.start(level=level, as_json=as_json, stream=stream)
        try:
            yield
        finally:
            stop()


@pytest.fixture
def lines_of(tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """The log lines that these facts make, without their times."""

    def told(*facts: Fact) -> list[dict[str, Any]]:
        model, upstream = Model(id=GEMMA), Upstream("local")
        with log_to(tmp_path / "log"):
            log = logs.Log()
            for fact in facts:
                was, upstream = upstream, apply_upstream(upstream, fact)
                log.observe(fact, was, upstream)
                before, model = model, apply(model, fact)
                log.observe(fact, before, model)
        rows = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
        return [{name: value for name, value in row.items() if name != "timestamp"} for row in rows]

    return told


def listed(at: float, *instances: str) -> Listed:
    entry = Entry("gemma", instances=tuple(Instance(i) for i in instances))
    return Listed(at, "local", at, Tier.V1, {"gemma": entry})


LOADED = (
    listed(1.0),
    LoadStarted(2.0, GEMMA),
    LoadEnded(8.5, GEMMA, LoadOutcome.OK, 6.5, seconds=6.0, instance_id="gemma"),
    listed(9.0, "gemma"),
    PingStarted(9.1, GEMMA),
    PingEnded(9.2, GEMMA, PingOutcome.OK, 0.1),
)
PLACE = {"upstream": "local", "model": "gemma"}
LOADED_LINES = [
    {
        "event": "upstream.state",
        "level": "info",
        "upstream": "local",
        "state": "up",
        "was": "unknown",
        "tier": "v1",
    },
    {"event": "model.state", "level": "info", **PLACE, "state": "cold", "was": "unknown"},
    {"event": "model.state", "level": "info", **PLACE, "state": "loading", "was": "cold"},
    {
        "event": "model.loaded",
        "level": "info",
        **PLACE,
        "seconds": 6.0,
        "elapsed": 6.5,
        "instance": "gemma",
    },
    {"event": "model.state", "level": "info", **PLACE, "state": "warm", "was": "loading"},
]


def test_the_way_from_nothing_to_warm_is_a_line_per_transition_and_one_for_the_load(lines_of: Any) -> None:
    assert lines_of(*LOADED) == LOADED_LINES


def test_what_changes_nothing_is_not_said(lines_of: Any) -> None:
    pings = (PingStarted(20.0, GEMMA), PingEnded(20.1, GEMMA, PingOutcome.OK, 0.1))

    assert lines_of(*LOADED, listed(15.0, "gemma"), *pings, listed(30.0, "gemma")) == LOADED_LINES


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        (
            (
                listed(1.0),
                LoadStarted(2.0, GEMMA),
                LoadEnded(3.0, GEMMA, LoadOutcome.FAILED, 1.0, message="no"),
            ),
            [
                {
                    "event": "model.load_failed",
                    "level": "warning",
                    **PLACE,
                    "outcome": "failed",
                    "elapsed": 1.0,
                    "reason": "no",
                    "retry_in": 5.0,
                },
                {
                    "event": "model.state",
                    "level": "warning",
                    **PLACE,
                    "state": "backoff",
                    "was": "loading",
                    "reason": "no",
                },
            ],
        ),
        (
            (*LOADED, listed(20.0)),
            [
                {"event": "model.evicted", "level": "warning", **PLACE, "cause": "by_hand", "evictions": 1},
                {
                    "event": "model.state",
                    "level": "info",
                    **PLACE,
                    "state": "cold",
                    "was": "warm",
                    "reason": "LM Studio no longer has it in memory",
                },
            ],
        ),
        (
            (
                *LOADED,
                PingStarted(20.0, GEMMA),
                PingEnded(80.0, GEMMA, PingOutcome.TIMEOUT, 60.0, "no answer"),
            ),
            [
                {
                    "event": "model.ping_failed",
                    "level": "warning",
                    **PLACE,
                    "outcome": "timeout",
                    "seconds": 60.0,
                    "reason": "no answer",
                }
            ],
        ),
        (
            (
                *LOADED,
                OpeningsLearned(20.0, GEMMA, ("agent.json 1f",)),
                PrimeStarted(20.0, GEMMA, "agent.json 1f"),
                PrimeEnded(21.0, GEMMA, "agent.json 1f", PrimeOutcome.GIVEN_UP, 1.0),
                PrimeStarted(30.0, GEMMA, "agent.json 1f"),
                PrimeEnded(36.0, GEMMA, "agent.json 1f", PrimeOutcome.OK, 6.0, 5900),
                PrimeStarted(38.0, GEMMA, "agent.json 1f"),
                PrimeEnded(39.0, GEMMA, "agent.json 1f", PrimeOutcome.OK, 0.1, 5900),
                PrimeStarted(40.0, GEMMA, "agent.json 1f"),
                PrimeEnded(41.0, GEMMA, "agent.json 1f", PrimeOutcome.REFUSED, 1.0, message="too long"),
            ),
            [
                {
                    "event": "model.primed",
                    "level": "info",
                    **PLACE,
                    "opening": "agent.json",
                    "seconds": 6.0,
                    "tokens": 5900,
                },
                {
                    "event": "model.prime_failed",
                    "level": "warning",
                    **PLACE,
                    "opening": "agent.json",
                    "outcome": "refused",
                    "reason": "too long",
                },
            ],
        ),
        (
            (
                *LOADED,
                PingStarted(20.0, GEMMA),
                PingEnded(21.0, GEMMA, PingOutcome.REFUSED, 0.1, "no image"),
                PingStarted(320.0, GEMMA),
                PingEnded(321.0, GEMMA, PingOutcome.REFUSED, 0.1, "no image"),
            ),
            [{"event": "model.ping_refused", "level": "warning", **PLACE, "reason": "no image"}],
        ),
        (
            (*LOADED, listed(20.0, "gemma", "gemma:2")),
            [{"event": "model.copies", "level": "warning", **PLACE, "instances": 2}],
        ),
        (
            (
                *LOADED,
                ReleaseAsked(20.0, GEMMA),
                UnloadStarted(21.0, GEMMA, "gemma"),
                UnloadEnded(22.0, GEMMA, "gemma"),
            ),
            [
                {"event": "model.released", "level": "info", **PLACE},
                {"event": "model.unloaded", "level": "info", **PLACE, "instance": "gemma"},
                {"event": "model.state", "level": "info", **PLACE, "state": "cold", "was": "warm"},
            ],
        ),
        (
            (
                *LOADED,
                ReleaseAsked(20.0, GEMMA),
                UnloadStarted(21.0, GEMMA, "gemma"),
                UnloadEnded(22.0, GEMMA, "gemma", "it answers somebody", in_use=True),
            ),
            [{"event": "model.released", "level": "info", **PLACE}],
        ),
        (
            (*LOADED, DrainStarted(20.0, GEMMA), replace(listed(21.0), tier=Tier.V0)),
            [
                {"event": "model.unloaded", "level": "info", **PLACE, "instance": "gemma", "cause": "room"},
                {
                    "event": "model.state",
                    "level": "info",
                    **PLACE,
                    "state": "cold",
                    "was": "warm",
                    "reason": "it made room for another",
                },
            ],
        ),
        (
            (*LOADED, InstanceLost(20.0, GEMMA, "Model was unloaded")),
            [
                {"event": "model.lost", "level": "warning", **PLACE, "reason": "Model was unloaded"},
                {
                    "event": "model.state",
                    "level": "warning",
                    **PLACE,
                    "state": "backoff",
                    "was": "warm",
                    "reason": "Model was unloaded",
                },
            ],
        ),
        (
            (*LOADED, ClockJumped(20.0, "local", 86_400.04)),
            [{"event": "clock.jumped", "level": "warning", "upstream": "local", "seconds": 86_400.0}],
        ),
        (
            (*LOADED, ListingFailed(20.0, "local", 19.0, Trouble.REFUSED, "nothing listens")),
            [
                {
                    "event": "upstream.state",
                    "level": "warning",
                    "upstream": "local",
                    "state": "down",
                    "was": "up",
                    "tier": "v1",
                    "error": "nothing listens",
                },
                {
                    "event": "model.state",
                    "level": "info",
                    **PLACE,
                    "state": "unknown",
                    "was": "warm",
                    "reason": "nothing listens",
                },
            ],
        ),
        (
            (LoadRemembered(5.0, GEMMA, started=1.0, expected=60.0),),
            [{"event": "model.load_remembered", "level": "info", **PLACE, "seconds_ago": 4.0}],
        ),
    ],
)
def test_what_goes_wrong_is_said_with_its_reason(
    lines_of: Any, facts: tuple[Fact, ...], said: list[dict[str, Any]]
) -> None:
    assert lines_of(*facts)[-len(said) :] == said


def test_an_upstream_that_stays_down_is_said_once(lines_of: Any) -> None:
    down = [ListingFailed(at, "local", at, Trouble.REFUSED, "nothing listens") for at in (1.0, 16.0, 46.0)]

    assert [line["event"] for line in lines_of(*down)] == ["upstream.state"]


def test_elsewhere_than_on_a_terminal_a_line_is_json_with_its_time(tmp_path: Path) -> None:
    with log_to(tmp_path / "log"):
        logs.logger().info("daemon.started", models=2)

    row = json.loads((tmp_path / "log").read_text())
    assert row["timestamp"].endswith("Z")
    del row["timestamp"]
    assert row == {"event": "daemon.started", "level": "info", "models": 2}


def test_on_a_terminal_it_is_for_people_and_no_color_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    pages = []
    for no_color in ("", "1"):
        monkeypatch.setenv("NO_COLOR", no_color)
        ours, theirs = os.openpty()
        with os.fdopen(theirs, "w") as stream:
            stop = logs.start(level="info", as_json=None, stream=stream)
            logs.logger().info("daemon.started", models=2)
            stop()
            pages.append(os.read(ours, 4096).decode())
        os.close(ours)

    assert "\x1b[" in pages[0]
    assert "\x1b[" not in pages[1]
    assert "daemon.started" in pages[1]
    assert "models=2" in pages[1]
    assert not pages[1].startswith("{")


def test_console_format_can_be_asked_for_without_a_terminal(tmp_path: Path) -> None:
    with log_to(tmp_path / "log", as_json=False):
        logs.logger().info("daemon.started", models=2)

    text = (tmp_path / "log").read_text()
    assert "daemon.started" in text
    assert "\x1b[" not in text
    assert "models=2" in text


def test_what_ends_it_puts_back_all_that_was_before_for_whoever_logs_in_the_same_process(
    tmp_path: Path,
) -> None:
    def standing() -> list[Any]:
        root, own = logging.getLogger(), logging.getLogger("keepalive")
        return [structlog.get_config(), root.handlers[:], root.level, own.level]

    before = standing()
    with log_to(tmp_path / "log", "error"):
        within = standing()

    assert all(now != was for now, was in zip(within, before, strict=True))
    assert standing() == before


@pytest.mark.parametrize(
    ("level", "events"),
    [
        ("debug", ["a", "b", "c", "d", "foreign warning", "foreign error"]),
        ("info", ["b", "c", "d", "foreign warning", "foreign error"]),
        ("warning", ["c", "d", "foreign warning", "foreign error"]),
        ("error", ["d", "foreign error"]),
    ],
)
def test_the_level_holds_for_everybody_and_debug_only_for_us(
    tmp_path: Path, level: str, events: list[str]
) -> None:
    with log_to(tmp_path / "log", level):
        own, foreign = logs.logger(), logging.getLogger("httpx")
        own.debug("a")
        own.info("b")
        own.warning("c")
        own.error("d")
        foreign.debug("foreign debug")
        foreign.info("foreign info")
        foreign.warning("foreign warning")
        foreign.error("foreign error")

    assert [json.loads(line)["event"] for line in (tmp_path / "log").read_text().splitlines()] == events


def test_a_foreign_traceback_is_its_type_and_place_because_its_text_may_hold_a_secret(tmp_path: Path) -> None:
    def fail(secret: str) -> None:
        raise ValueError(f"could not parse {secret}")

    with log_to(tmp_path / "log", "debug"):
        try:
            fail(CANARY)
        except ValueError:
            logging.getLogger("aiohttp.server").exception(
                "Error handling request from %s\n%s", "127.0.0.1", CANARY
            )

    text = (tmp_path / "log").read_text()
    row = json.loads(text)
    assert CANARY not in text
    assert row["event"].startswith("Error handling request from 127.0.0.1 (ValueError at test_logs.py:")
    assert (row["logger"], row["level"]) == ("aiohttp.server", "error")


async def test_a_task_that_failed_unseen_is_said_without_what_it_was_given(tmp_path: Path) -> None:
    async def fail(secret: str) -> None:
        raise ValueError(secret)

    with log_to(tmp_path / "log", "debug"):
        task = asyncio.create_task(fail(CANARY))
        await asyncio.wait([task])
        asyncio.get_running_loop().call_exception_handler(
            {"message": f"Task exception\nfuture: {task!r}", "exception": task.exception(), "task": task}
        )

    text = (tmp_path / "log").read_text()
    assert CANARY not in text
    assert "ValueError at test_logs.py:" in text


def test_a_library_that_repeats_itself_is_heard_once_a_minute(tmp_path: Path) -> None:
    with log_to(tmp_path / "log"):
        for number in range(5000):
            logging.getLogger("asyncio").error("socket.accept() out of system resource %s", number)
        logging.getLogger("asyncio").error("something else")

    assert len((tmp_path / "log").read_text().splitlines()) == 2


def test_what_cannot_be_written_as_json_is_written_all_the_same(tmp_path: Path) -> None:
    with log_to(tmp_path / "log"):
        logs.logger().info("odd", value=object(), text="\udce9", path=Path("/x"))
        logs.logger().info("next")

    rows = [json.loads(line)["event"] for line in (tmp_path / "log").read_text().splitlines()]
    assert rows == ["odd", "next"]


def test_without_a_stream_nothing_is_written_by_anybody(capfd: pytest.CaptureFixture[str]) -> None:
    stop = logs.start(level="debug", as_json=None, stream=None)
    logs.logger().error("lost")
    logging.getLogger("asyncio").error("lost, too")
    stop()

    assert capfd.readouterr() == ("", "")


def test_a_stream_that_nobody_reads_delays_neither_the_lines_nor_the_end() -> None:
    read, write = os.pipe()
    with os.fdopen(write, "w") as stream:
        stop = logs.start(level="info", as_json=True, stream=stream)
        for number in range(logs.LINES_WAITING + 5000):  # to wait for a reader here would be for ever
            logs.logger().info("line", number=number, padding="x" * 100)
        stopping = threading.Thread(target=stop, daemon=True)
        stopping.start()
        stopping.join(PATIENCE)
        ended = not stopping.is_alive()
        os.close(read)

    assert ended


def test_lines_come_whole_and_in_order_through_a_pipe_that_is_full_at_times() -> None:
    read, write = os.pipe()
    os.set_blocking(write, False)
    text = bytearray()

    def take() -> None:
        while piece := os.read(read, 500):
            text.extend(piece)

    taking = threading.Thread(target=take)
    taking.start()
    with os.fdopen(write, "w") as stream:
        stop = logs.start(level="info", as_json=True, stream=stream)
        for number in range(3000):
            logs.logger().info("line", number=number)
        output = logging.getLogger().handlers[0]
        assert isinstance(output, logs._Output)
        wait_until(lambda: output.idle)
        stop()
    taking.join()
    os.close(read)

    assert [json.loads(line)["number"] for line in text.splitlines()] == list(range(3000))


def test_a_stream_that_broke_is_not_an_error() -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as stream:
        stop = logs.start(level="info", as_json=True, stream=stream)
        logs.logger().info("line")
        stop()


BLOCKED = """
import sys, time
from keepalive.observers import logs
end = logs.start(level="info", as_json=True, stream=sys.stderr)
for number in range(5000):
    logs.logger().info("line", number=number, padding="x" * 100)
end()
"""


def test_an_interpreter_ends_well_though_nobody_reads_its_stderr() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", BLOCKED], stderr=subprocess.PIPE, env=environment()
    ) as process:
        code = process.wait(30)

    assert code == 0


SEEN = [
    Seen(
        GEMMA,
        "chat",
        None,
        Outcome.OK,
        200,
        "warm",
        first_token_seconds=0.1234,
        seconds=1.5,
        bytes=257,
        events=3,
    ),
    Seen(None, "other", "ward", Outcome.REJECTED, 403, seconds=0.00049, error="origin"),
    Seen(
        ModelId("a b", 'odd "quoted" = \\ é'),
        "chat",
        "a=b",
        Outcome.CUT,
        502,
        "cold",
        wait_seconds=96.4,
        seconds=1e6,
    ),
]


@pytest.mark.parametrize("as_json", [True, False, None])
@pytest.mark.parametrize("journal", [True, False])
def test_a_request_s_line_is_what_any_other_line_would_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, journal: bool, as_json: bool | None
) -> None:
    with (tmp_path / "log").open("w") as stream:
        at = os.fstat(stream.fileno())
        monkeypatch.setenv("JOURNAL_STREAM", f"{at.st_dev}:{at.st_ino}" if journal else "")
        stop = logs.start(level="info", as_json=as_json, stream=stream)
        for seen in SEEN:
            logs.request(seen)
            logs._tell_request(seen, "info" if seen.outcome is Outcome.OK else "warning")
        stop()

    lines = [
        re.sub(r"[0-9-]+T[0-9:.]+Z", "now", line) for line in (tmp_path / "log").read_text().splitlines()
    ]
    assert len(lines) == 2 * len(SEEN)
    assert lines[::2] == lines[1::2]


@pytest.mark.parametrize(
    ("level", "outcomes"), [("info", ["ok", "rejected", "cut"]), ("warning", ["rejected", "cut"])]
)
def test_a_request_that_went_well_is_said_at_info(tmp_path: Path, level: str, outcomes: list[str]) -> None:
    with log_to(tmp_path / "log", level):
        for seen in SEEN:
            logs.request(seen)

    assert [json.loads(line)["outcome"] for line in (tmp_path / "log").read_text().splitlines()] == outcomes


def test_a_request_that_cannot_be_written_down_costs_its_own_line_alone(tmp_path: Path) -> None:
    with log_to(tmp_path / "log"):
        logs.request(SEEN[0])
        logs.request(replace(SEEN[0], seconds=None))
        logs.logger().info("line")
        logs.request(SEEN[0])

    rows = [json.loads(line)["event"] for line in (tmp_path / "log").read_text().splitlines()]
    assert rows == ["proxy.request", "line", "proxy.request"]


@contextmanager
def log_to_a_full_disk(path: Path) -> Iterator[Callable[[], object]]:
    """A log whose first line has found no room, as long as the caller likes; from then on it is in this file."""
    with FULL_DISK.open("w") as stream, path.open("w") as file:
        stop = logs.start(level="info", as_json=True, stream=stream)
        try:
            logs.logger().info("line", number=0)
            wait_until(lambda: logging.getLogger().handlers[0].idle, "it was tried")
            yield partial(os.dup2, file.fileno(), stream.fileno())
        finally:
            stop()


def rows_in(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@full_disk
def test_what_is_said_while_the_disk_is_full_is_written_once_there_is_room(tmp_path: Path) -> None:
    path, log = tmp_path / "log", logs.logger()
    with log_to_a_full_disk(path) as is_cleared:
        for number in range(1, 301):
            log.info("line", number=number)
        is_cleared()
        wait_until(lambda: path.read_text().count("\n") == 301, "all of it is written")

    assert [row["number"] for row in rows_in(path)] == list(range(301))


@full_disk
def test_what_did_not_fit_while_the_disk_was_full_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "LINES_WAITING", 20)
    path, log = tmp_path / "log", logs.logger()
    with log_to_a_full_disk(path) as is_cleared:
        for number in range(1, 31):
            log.info("line", number=number)
        is_cleared()
        wait_until(lambda: path.read_text().count("\n") == 21, "what fitted is written")
        log.info("line", number=31)

    rows = rows_in(path)
    assert [row.get("number") for row in rows] == [*range(21), None, 31]
    assert (rows[21]["event"], rows[21]["lines"]) == ("log.lines_lost", 10)


@full_disk
def test_a_full_disk_holds_up_nobodys_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "LAST_WORDS", 0.05)
    with FULL_DISK.open("w") as stream:
        stop = logs.start(level="info", as_json=True, stream=stream)
        output = logging.getLogger().handlers[0]
        logs.logger().info("line")
        wait_until(lambda: output.idle, "it was tried")  # type: ignore[attr-defined]
        stop()
        wait_until(lambda: not output._thread.is_alive(), "nobody tries any more")  # type: ignore[attr-defined]


def test_how_many_lines_were_lost_is_said_once_there_is_room_again() -> None:
    read, write = os.pipe()
    text = bytearray()

    def take() -> None:
        while piece := os.read(read, 65_536):
            text.extend(piece)

    taking = threading.Thread(target=take)
    with os.fdopen(write, "w") as stream:
        stop = logs.start(level="info", as_json=True, stream=stream)
        written = logs.LINES_WAITING + 5000
        for number in range(written):
            logs.logger().info("line", number=number)
        taking.start()
        output = logging.getLogger().handlers[0]
        assert isinstance(output, logs._Output)
        wait_until(lambda: output.idle)
        logs.request(SEEN[0])
        stop()
    taking.join()
    os.close(read)

    rows = [json.loads(line) for line in text.splitlines()]
    assert [row["event"] for row in rows[-2:]] == ["log.lines_lost", "proxy.request"]
    assert rows[-2]["lines"] == written - len(rows[:-2]) > 0
