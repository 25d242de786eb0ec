"""What standing before a model costs: whole products side by side in one run, `keepalive run` among them.

    python benchmarks/proxy [--short] [--rounds N] [--only nginx,keepalive] [--rows streams,requests] [--json FILE]
    python benchmarks/proxy setup

Exits with 1 where a target is missed. See ../README.md for how to read the table.
"""

import argparse
import json
import os
import platform
import random
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import own
from peers import PEERS, Missing, setup
from processes import HERE, cpu_seconds, free_port, held, load, memory_bytes, running, set_pace

OPEN_STREAMS = 5000
EVENTS_PER_SECOND = 50
#: They cannot keep up with what the others are asked.
SLOW = ("litellm",)


@dataclass
class Peer:
    name: str
    port: int
    pid: int | None  # None: nobody in between
    log: Path | None = None
    results: dict[str, list[float]] = field(default_factory=dict)

    def add(self, what: str, value: float) -> None:
        self.results.setdefault(what, []).append(value)


# --- measurements, each of one round ----------------------------------------------------------------


@dataclass(frozen=True)
class Pace:
    """How much of each is measured in a round."""

    streams: float = 4.0  # seconds
    firsts: int = 200
    requests: float = 2.0  # seconds
    opened: int = OPEN_STREAMS


SHORT = Pace(streams=2.0, firsts=100, requests=1.0, opened=1000)


def measure_streams(peer: Peer, upstream: int, pace: Pace, count: int) -> None:
    if peer.pid is None or (count > 20 and peer.name in SLOW):
        return
    events = int(pace.streams * EVENTS_PER_SECOND)
    set_pace(upstream, rate=EVENTS_PER_SECOND, events=events)
    before = cpu_seconds(peer.pid)
    result = load("streams", peer.port, count)
    used = cpu_seconds(peer.pid) - before
    expected = count * (events + 2)  # the role and the finish reason
    if abs(result["events"] - expected) > expected / 100:
        raise RuntimeError(f"{peer.name}: {result['events']} events of {expected}")
    peer.add(f"streams_{count}", used / expected * 1e6)


def measure_requests(peer: Peer, upstream: int, pace: Pace) -> None:
    before = cpu_seconds(peer.pid) if peer.pid else 0.0
    result = load("requests", peer.port, 16, pace.requests)
    peer.add("rate", result["requests"] / result["seconds"])
    if peer.pid:
        peer.add("requests", (cpu_seconds(peer.pid) - before) / result["requests"] * 1e6)


def measure_first(peer: Peer, upstream: int, pace: Pace) -> None:
    set_pace(upstream, rate=0, events=1)
    result = load("first", peer.port, 30 if peer.name in SLOW else pace.firsts)
    peer.add("first", result["p50"] * 1e6)


def measure_memory(peer: Peer, upstream: int, pace: Pace) -> None:
    if peer.pid is None or peer.name in SLOW or "memory" in peer.results:
        return
    set_pace(upstream, rate=0, events=1)
    load("first", peer.port, 50)
    set_pace(upstream, rate=0, events=0)
    before = memory_bytes(peer.pid)
    with held("hold", peer.port, pace.opened):
        time.sleep(1)
        peer.add("memory", (memory_bytes(peer.pid) - before) / pace.opened / 1024)


MEASURES: Mapping[str, Callable[[Peer, int, Pace], None]] = {
    "streams_20": lambda peer, upstream, pace: measure_streams(peer, upstream, pace, 20),
    "streams_200": lambda peer, upstream, pace: measure_streams(peer, upstream, pace, 200),
    "requests": measure_requests,
    "first": measure_first,
    "memory": measure_memory,
}


# --- the table --------------------------------------------------------------------------------------

ROWS = [
    ("streams_20", "CPU per event, 20 streams from begin to end", "us", 1),
    ("streams_200", "CPU per event, 200 streams from begin to end", "us", 1),
    ("requests", "CPU per small request", "us", 0),
    ("rate", "small requests, 16 at once", "1/s", 0),
    ("first", "time to the first event of a stream", "us", 0),
    ("memory", "memory per open stream", "KiB", 1),
]
# What is wanted of `keepalive run`: no more than so many times what another one takes in the same round.
WANTED = [
    ("requests", 1.0, "caddy"),
    ("requests", 1.5, "bare"),
    ("streams_200", 1.4, "nginx"),
    ("streams_200", 1.0, "envoy"),
    ("first", 1.3, "go"),
]
MEMORY_WANTED = 8.0  # KiB


def ratio(peer: Peer, base: Peer, what: str) -> float | None:
    """The median of the ratios round by round: what slows the machine in one round slows both."""
    pairs = list(zip(peer.results.get(what, []), base.results.get(what, []), strict=False))
    return statistics.median(a / b for a, b in pairs if b) if any(b for _, b in pairs) else None


def table(peers: Mapping[str, Peer]) -> list[str]:
    lines: list[str] = []
    for what, title, unit, digits in ROWS:
        if not any(what in peer.results for peer in peers.values()):
            continue
        lines += ["", f"{title} ({unit})"]
        for peer in peers.values():
            values = peer.results.get(what)
            if not values:
                continue
            low, high = (f"{value:.{digits}f}" for value in (min(values), max(values)))
            lines.append(f"  {peer.name:<12}{statistics.median(values):>9.{digits}f}   {low:>9} .. {high}")
    return lines


def judged(peers: Mapping[str, Peer]) -> Iterator[own.Row]:
    """The targets that compare."""
    ours = peers.get("keepalive")
    if ours is None:
        return
    for what, most, name in WANTED:
        base = peers.get(name)
        found = ratio(ours, base, what) if base is not None else None
        if found is not None:
            title = next(title for row, title, _, _ in ROWS if row == what)
            yield own.Row(f"{title}, beside {name}", found, "times", most)
    if "memory" in ours.results:
        yield own.Row(
            "memory per open stream", statistics.median(ours.results["memory"]), "KiB", MEMORY_WANTED
        )


# --- the run ----------------------------------------------------------------------------------------


@contextmanager
def upstream_server(directory: Path) -> Iterator[int]:
    port = free_port()
    command = [sys.executable, str(HERE / "upstream.py"), str(port)]
    with running(command, port, directory / "upstream.log"):
        yield port


def side_by_side(options: argparse.Namespace, pace: Pace, rounds: int) -> dict[str, Peer]:
    began = time.monotonic()
    makers = {name: maker for name, maker in PEERS.items() if not options.only or name in options.only}
    measures = {what: m for what, m in MEASURES.items() if not options.rows or what in options.rows}
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="keepalive-bench-")))
        directory.chmod(0o755)
        upstream = stack.enter_context(upstream_server(directory))
        peers = {"direct": Peer("direct", upstream, None)}
        for name, make in makers.items():
            port, log = free_port(), directory / f"{name}.log"
            try:
                start = make(directory, port, upstream)
                pid = stack.enter_context(
                    running(start.command, port, log, within=start.within, ready=start.ready)
                )
            except (Missing, RuntimeError) as reason:
                print(f"without {name}: {reason}", flush=True)
                continue
            peers[name] = Peer(name, port, pid, log)
        for number in range(rounds):
            for what, measure in measures.items():
                # One measurement after the other, in which all have their turn, in another order each time: what
                # is compared is then no more than seconds apart, and a noisy minute hits everybody.
                for peer in random.sample(list(peers.values()), len(peers)):
                    try:
                        measure(peer, upstream, pace)
                    except (RuntimeError, subprocess.TimeoutExpired) as problem:
                        log_end = peer.log.read_text(errors="replace")[-500:] if peer.log else ""
                        print(f"{peer.name}, {what}, round {number + 1}: {problem}\n{log_end}", flush=True)
            print(f"round {number + 1} of {rounds} after {time.monotonic() - began:.0f} s", file=sys.stderr)
    return peers


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", choices=["run", "setup"], default="run")
    parser.add_argument("--short", action="store_true", help="less of everything, in less than three minutes")
    parser.add_argument("--only", type=lambda text: text.split(","), help="peers, with commas")
    parser.add_argument("--rows", type=lambda text: text.split(","), help=f"of {', '.join(MEASURES)}, own")
    parser.add_argument("--rounds", type=int, help="default 7, short 3")
    parser.add_argument("--json", type=Path, help="write every single value there")
    options = parser.parse_args()
    if options.what == "setup":
        setup()
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # it takes its children along
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 65_536), hard))
    pace, rounds = (SHORT, 3) if options.short else (Pace(), 7)
    rounds = options.rounds or rounds
    if options.short and not options.only:
        options.only = [name for name in PEERS if name not in ("haproxy", "litellm")]
    print(
        f"{platform.python_implementation()} {platform.python_version()}, {os.cpu_count()} cores, "
        f"{rounds} rounds, load average before: {os.getloadavg()[0]:.1f}",
        flush=True,
    )

    peers = side_by_side(options, pace, rounds)
    print("\n".join(table(peers)), flush=True)
    rows = list(judged(peers))
    if not options.rows or "own" in options.rows:
        rows += own.measured(short=options.short)
    print("\nwanted")
    for row in rows:
        print(row)
    if options.json:
        results = {peer.name: peer.results for peer in peers.values()}
        results["own"] = {row.title: [row.value] for row in rows}
        options.json.write_text(json.dumps(results, indent=1))
    sys.exit(1 if any(row.missed for row in rows) else 0)


if __name__ == "__main__":
    main()
