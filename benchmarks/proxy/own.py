"""What `keepalive run` alone does: hold callers for a cold model, release them, keep its pace under overload."""

import json
import re
import statistics
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from peers import keepalive
from processes import HERE, cpu_seconds, free_port, held, load, memory_bytes, running, set_pace

WAITING = 1000
# More than any core carries: each sends its next request once the last one is answered.
CROWD = 400
REFRESH, PING = 2.0, 5.0
# So that both happen often enough within an overload to be measured. Everything else is as shipped.
OFTEN = f"""
[defaults]
refresh_interval = "{REFRESH:g}s"
[[models]]
key = "quiet"
ping_interval = "{PING:g}s"
"""


@dataclass(frozen=True)
class Row:
    """One figure, beside what is wanted."""

    title: str
    value: float
    unit: str
    most: float | None = None

    @property
    def missed(self) -> bool:
        return self.most is not None and self.value > self.most

    def __str__(self) -> str:
        shown = f"{self.value:.0f}" if self.value >= 100 else f"{self.value:.3g}"
        wanted = "" if self.most is None else f"<= {self.most:g}" + ("   missed" if self.missed else "")
        return f"  {self.title:<66}{shown:>8} {self.unit:<12}{wanted}".rstrip()


@dataclass(frozen=True)
class Daemon:
    port: int
    admin: int
    pid: int
    upstream: int
    log: Path

    def get(self, path: str) -> bytes:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.admin}{path}", timeout=60) as answer:
            body: bytes = answer.read()
        return body

    def requests(self) -> int:
        """How many it has counted, whatever became of them."""
        found = re.findall(
            rb"^keepalive_proxy_requests_total\{.*\} (\S+)$", self.get("/metrics"), re.MULTILINE
        )
        return int(sum(map(float, found)))


@contextmanager
def daemon(config: str = "", *, loaded: bool = True) -> Iterator[Daemon]:
    """One before an upstream of its own."""
    with tempfile.TemporaryDirectory(prefix="keepalive-bench-") as folder:
        directory, upstream, port = Path(folder), free_port(), free_port()
        serving = [sys.executable, str(HERE / "upstream.py"), str(upstream)]
        with running(serving, upstream, directory / "upstream.log"):
            set_pace(upstream, rate=0, events=1, loaded=int(loaded))
            start, log = keepalive(directory, port, upstream, config), directory / "keepalive.log"
            assert start.admin is not None
            ready = start.ready if loaded else None
            with running(start.command, port, log, within=start.within, ready=ready) as pid:
                yield Daemon(port, start.admin, pid, upstream, log)


def waiting(seconds: float) -> Iterator[Row]:
    """Callers who wait for a load, and what happens once it is over."""
    with daemon(loaded=False) as subject:
        before = memory_bytes(subject.pid)
        with held("crowd", subject.port, WAITING) as callers:
            assert callers.stdin
            assert callers.stdout
            began, at_begin = time.monotonic(), cpu_seconds(subject.pid)
            time.sleep(seconds)
            used, span = cpu_seconds(subject.pid) - at_begin, time.monotonic() - began
            memory = memory_bytes(subject.pid) - before
            callers.stdin.write("\n")
            callers.stdin.flush()
            set_pace(subject.upstream, loaded=1)
            last = json.loads(callers.stdout.readline())["last"]
    yield Row("held for a cold model: CPU per caller and second", used / span / WAITING * 1e6, "us")
    yield Row("held for a cold model: memory per caller", memory / WAITING / 1024, "KiB")
    yield Row(f"{WAITING} released by one load: until the last one streams", last * 1000, "ms")


@dataclass
class Probe:
    """Asks the admin address again and again, as a scraper and a service manager do."""

    subject: Daemon
    path: str
    took: list[float] = field(default_factory=list)
    over: bool = False

    def run(self) -> None:
        while not self.over:
            began = time.perf_counter()
            self.subject.get(self.path)
            self.took.append(time.perf_counter() - began)
            time.sleep(0.25)


def gaps(times: list[float], begin: float, end: float) -> float:
    """The longest time between two of them within a span."""
    inside = [begin, *(at for at in times if begin < at < end), end]
    return max(after - before for before, after in pairwise(inside))


def overload(seconds: float) -> Iterator[Row]:
    with daemon(OFTEN) as subject:
        load("requests", subject.port, 16, 1)
        counted, lines = subject.requests(), subject.log.read_bytes().count(b"\n")
        probes = [Probe(subject, path) for path in ("/livez", "/metrics")]
        threads = [threading.Thread(target=probe.run) for probe in probes]
        for thread in threads:
            thread.start()
        began, at_begin = time.monotonic(), cpu_seconds(subject.pid)
        result = load("requests", subject.port, CROWD, seconds)
        end, used = time.monotonic(), cpu_seconds(subject.pid) - at_begin
        for probe in probes:
            probe.over = True
        for thread in threads:
            thread.join()
        time.sleep(1)  # what is logged is written by then
        uncounted = result["requests"] - (subject.requests() - counted)
        unsaid = result["requests"] - (subject.log.read_bytes().count(b"\n") - lines)
        seen = json.loads(
            urllib.request.urlopen(f"http://127.0.0.1:{subject.upstream}/seen", timeout=5).read()
        )
    name = f"{CROWD} at once"
    yield Row(f"{name}: requests per second", result["requests"] / result["seconds"], "1/s")
    yield Row(f"{name}: CPU of the daemon", 100 * used / (end - began), "% of a core")
    yield Row(f"{name}: a request waits, median", result["p50"] * 1000, "ms")
    yield Row(f"{name}: the slowest of a thousand, over the median", result["p999"] / result["p50"], "times")
    yield Row(f"{name}: requests without an answer, or that no metric counts", abs(uncounted), "", 0)
    yield Row(f"{name}: requests that are missing in the log", max(unsaid, 0), "", 0)
    for probe in probes:
        yield Row(f"{name}: {probe.path}, median", statistics.median(probe.took) * 1000, "ms")
        yield Row(f"{name}: {probe.path}, slowest", max(probe.took) * 1000, "ms")
    for what, pace in (("listed", REFRESH), ("pinged", PING)):
        longest = gaps(seen[what], began, end)
        yield Row(
            f"{name}: longest time between two that are due every {pace:g} s ({what})", longest, "s", 2 * pace
        )


def measured(*, short: bool) -> list[Row]:
    return [*waiting(5.0 if short else 15.0), *overload(6.0 if short else 20.0)]
