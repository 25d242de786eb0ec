"""What keeping models warm costs while nobody asks for anything: `python benchmarks/idle.py`.

The real daemon, as a process of its own, against simulated LM Studios in a second process, over loopback.
CPU and memory are what the kernel counts for the daemon alone. The table says what was measured, beside what is
wanted, and where that is missed the exit code is 1.
"""

import argparse
import asyncio
import contextlib
import http.client
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
# The defaults of the daemon, written out: what is measured must not change with them unnoticed.
REFRESH_SECONDS = 15.0
SETTLE_SECONDS = 5.0
WARM_TIMEOUT = 120.0
STOP_TIMEOUT = 10.0
SCRAPES = 40


# --- the two processes --------------------------------------------------------------------------------


async def simulate(servers: int, models: int) -> None:
    """Serve until stdin ends, which it does however the benchmark ends. Prints one URL per server."""
    from keepalive.simulator.models import SimModel
    from keepalive.simulator.server import serve
    from keepalive.simulator.studio import Studio

    async with contextlib.AsyncExitStack() as stack:
        for server in range(servers):
            keys = [f"team-{server:02}/model-{number:03}" for number in range(models)]
            studio = Studio([SimModel(key, load_seconds=0.0) for key in keys])
            print((await stack.enter_async_context(await serve(studio))).url)
        print("ready", flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


@contextlib.contextmanager
def simulators(servers: int, models: int) -> Iterator[list[str]]:
    command = [sys.executable, __file__, "--simulate", str(servers), str(models)]
    pipe = subprocess.PIPE
    with running(subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)) as child:
        urls = []
        for line in child.stdout or ():
            if line.strip() == "ready":
                break
            urls.append(line.strip())
        yield urls


@contextlib.contextmanager
def running(process: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    """However this block ends, the process ends too."""
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@dataclass
class Daemon:
    pid: int
    admin: str

    def get(self, path: str) -> tuple[int, bytes, float]:
        """Status, body and seconds until the last byte, on a connection of its own as a scraper's is."""
        address = urlsplit(self.admin)
        began = time.perf_counter()
        connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=60)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            body = answer.read()
            return answer.status, body, time.perf_counter() - began
        finally:
            connection.close()

    def cpu(self) -> float:
        """Seconds of CPU used so far by all of its threads, by the scheduler's own clock.

        What wakes up with a timer hides from the ticks that `/proc/PID/stat` counts.
        """
        tasks = Path(f"/proc/{self.pid}/task").glob("*/schedstat")
        return sum(int(task.read_text().split()[0]) for task in tasks) / 1e9

    def memory(self) -> dict[str, float]:
        """MiB, as `Rss` and `Pss`: what it has mapped, and its share of that."""
        lines = Path(f"/proc/{self.pid}/smaps_rollup").read_text().splitlines()[1:]
        sizes = {line.split(":")[0]: int(line.split()[1]) / 1024 for line in lines}
        return {name: sizes[name] for name in ("Rss", "Pss")}


@contextlib.contextmanager
def daemon(urls: list[str], models: int) -> Iterator[Daemon]:
    """A daemon that keeps `models` models on each of the servers."""
    with tempfile.TemporaryDirectory(prefix="keepalive-bench-") as folder:
        config = Path(folder, "config.toml")
        config.write_text(settings(urls, models, Path(folder, "state")))
        # Nothing of the caller's own configuration may leak into the measurement.
        environment = {k: v for k, v in os.environ.items() if not k.upper().startswith("KEEPALIVE_")}
        command = [sys.executable, "-m", "keepalive", "run", "-c", str(config)]
        # `-m` looks in the current directory first, so that one holds nothing.
        child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, cwd=folder)
        with running(child):
            yield Daemon(child.pid, admin_address(child))


def settings(urls: list[str], models: int, state_dir: Path) -> str:
    lines = [
        "[server]",
        'listen = "127.0.0.1:0"',
        'admin_listen = "127.0.0.1:0"',
        'log_format = "json"',
        f"state_dir = {json.dumps(str(state_dir))}",
        "[defaults]",
        f'refresh_interval = "{REFRESH_SECONDS:.0f}s"',
        'ping_interval = "5m"',
    ]
    for server, url in enumerate(urls):
        lines += ["[[upstreams]]", f'name = "team-{server:02}"', f'url = "{url}"']
    for server in range(len(urls)):
        for number in range(models):
            key = f"team-{server:02}/model-{number:03}"
            lines += ["[[models]]", f'key = "{key}"', f'upstream = "team-{server:02}"']
    return "\n".join(lines) + "\n"


def admin_address(process: subprocess.Popen[str]) -> str:
    """Where the daemon says that it listens. Its log is read to the end, lest it fill the pipe and wait."""
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        record = json.loads(line) if line.startswith("{") else {}
        if record.get("event") == "daemon.started":
            threading.Thread(target=process.stderr.read, daemon=True).start()
            return str(record["admin"])
    sys.exit("the daemon did not start:\n" + "".join(said))


# --- what is measured ---------------------------------------------------------------------------------


def warm_up(subject: Daemon) -> float:
    """Seconds until every model is warm."""
    began = time.monotonic()
    while subject.get("/readyz")[0] != 200:
        if time.monotonic() > began + WARM_TIMEOUT:
            sys.exit(f"not every model is warm after {WARM_TIMEOUT:.0f} s")
        time.sleep(1)  # with a thousand models each of these questions costs the daemon 50 ms
    return time.monotonic() - began


def measure_idle(report: "Report", seconds: float) -> None:
    report.section(f"10 warm models on one server, left alone for {seconds:.0f} s")
    with simulators(1, 10) as urls, daemon(urls, 10) as subject:
        warm_up(subject)
        time.sleep(SETTLE_SECONDS)
        began, before = time.monotonic(), subject.cpu()
        time.sleep(seconds)
        used, span = subject.cpu() - before, time.monotonic() - began
        memory = subject.memory()
    report.row("CPU", 100 * used / span, "% of a core", below=0.5)
    report.row("memory, resident (RSS)", memory["Rss"], "MiB", below=80.0)
    report.row("memory, its share (PSS)", memory["Pss"], "MiB")


def measure_many(report: "Report", rounds: int) -> None:
    report.section("1,000 models on 20 servers, 50 each")
    with simulators(20, 50) as urls, daemon(urls, 50) as subject:
        warm_after = warm_up(subject)
        warm_cpu = subject.cpu()
        time.sleep(SETTLE_SECONDS)
        # Every server is listed once per interval, so a whole number of intervals holds that many rounds.
        # The ticks of each second are in it, too: they are part of the price.
        before = subject.cpu()
        time.sleep(rounds * REFRESH_SECONDS)
        per_round = (subject.cpu() - before) / rounds
        memory = subject.memory()
        _, page, first = subject.get("/metrics")
        took = []
        for _ in range(SCRAPES):
            time.sleep(REFRESH_SECONDS / SCRAPES)  # some meet a refresh round, as a scraper's would
            took.append(subject.get("/metrics")[2])
    report.row("until all are warm, load time 0", warm_after, "s")
    report.row("CPU until then, start included", warm_cpu, "s")
    report.row(f"CPU of one refresh round (of {rounds})", per_round, "s", below=0.5)
    report.row("/metrics, first", 1000 * first, "ms", below=200.0)
    report.row(f"/metrics, median of {SCRAPES}", 1000 * statistics.median(took), "ms", below=200.0)
    report.row(f"/metrics, slowest of {SCRAPES}", 1000 * max(took), "ms", below=200.0)
    report.row("/metrics, size", len(page) / 1024, "KiB")
    report.row("memory, resident (RSS)", memory["Rss"], "MiB")


class Report:
    """The table, written as it comes."""

    def __init__(self) -> None:
        self.missed = False

    def section(self, title: str) -> None:
        print(f"\n{title}", flush=True)

    def row(self, name: str, value: float, unit: str, *, below: float | None = None) -> None:
        shown = f"{value:.0f}" if value >= 100 else f"{value:.3g}"
        self.missed = self.missed or (below is not None and value >= below)
        wanted = "" if below is None else f"< {below:g}" + ("" if value < below else "   missed")
        print(f"  {name:<36}{shown:>8} {unit:<12}{wanted}".rstrip(), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="What keeping models warm costs while nobody asks.")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long ten models are watched")
    parser.add_argument(
        "--rounds", type=int, default=4, help="how many refresh rounds of a thousand models; 0: without"
    )
    parser.add_argument("--simulate", type=int, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.simulate:
        # Ctrl-C reaches this process, too: the end of stdin is enough.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        asyncio.run(simulate(*options.simulate))
        return
    # Ended by a signal, too, it takes its children along.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    from keepalive import __version__

    load = os.getloadavg()[0]
    print(
        f"keepalive {__version__}, {platform.python_implementation()} {platform.python_version()}, "
        f"{os.cpu_count()} cores, load average before: {load:.1f}"
    )
    report = Report()
    measure_idle(report, options.seconds)
    if options.rounds:
        measure_many(report, options.rounds)
    sys.exit(1 if report.missed else 0)


if __name__ == "__main__":
    main()
