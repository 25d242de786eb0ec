"""What it costs to be one of several daemons: `python benchmarks/cluster.py`. Needs etcd.

Three members of one cluster, and three daemons that know nothing of each other, each before a hundred warm models, are
asked at the same time, a thousand small requests a second of each three: what slows the machine meanwhile slows both.
What the members take more is the price of the cluster. Then one daemon that carries as much alone. No two processes of
one program take the same, so each round begins with new ones. Writes are etcd's own count. Where what is wanted is
missed the exit code is 1.
"""

import argparse
import json
import os
import platform
import re
import shutil
import signal
import statistics
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "proxy"))

from own import Row
from peers import Start, keepalive
from processes import HERE, cpu_seconds, free_port, load, running, set_pace

MEMBERS = 3
MODELS = 100
RATE = 1000.0
CONNECTIONS = 8  # to each daemon
TTL = 10.0
# As a daemon renews its lease: three times within it.
INTERVAL = TTL / 3
# Until all have been pinged, what callers use is written, and the socket of a session was looked for.
SETTLE_SECONDS = 15.0
# That the first callers come is news, and told to the others; that they go on coming is not.
WARMING_SECONDS = 2 * INTERVAL
TIMES_WANTED = 1.05
WRITES_WANTED = 1.0


@dataclass
class Team:
    """Daemons that are asked at once."""

    ports: list[int]
    pids: list[int]

    def cpu(self) -> float:
        return sum(map(cpu_seconds, self.pids))

    def ask(self, seconds: float) -> float:
        """So many are answered."""
        return load("paced", ",".join(map(str, self.ports)), CONNECTIONS, seconds, RATE, MODELS)["requests"]

    def cost(self, seconds: float) -> float:
        """CPU per request, in microseconds."""
        before = self.cpu()
        answered = self.ask(seconds)
        return (self.cpu() - before) / answered * 1e6


@contextmanager
def etcd(folder: Path) -> Iterator[tuple[int, int]]:
    """Its port, and its pid."""
    program = shutil.which("etcd")
    if program is None:
        raise SystemExit("This needs etcd, 3.4 or newer (Debian: apt install etcd-server).")
    client, peer = free_port(), free_port()
    words = [
        program, "--data-dir", str(folder / "etcd"),
        "--listen-client-urls", f"http://127.0.0.1:{client}", "--advertise-client-urls", f"http://127.0.0.1:{client}",
        "--listen-peer-urls", f"http://127.0.0.1:{peer}", "--initial-advertise-peer-urls", f"http://127.0.0.1:{peer}",
        "--initial-cluster", f"default=http://127.0.0.1:{peer}",
    ]  # fmt: skip
    with running(words, client, folder / "etcd.log", within=60) as pid:
        yield client, pid


class Log:
    """What etcd has written since this was made, by its own count."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.began, self.before = time.monotonic(), self._counts()

    def writes(self) -> float:
        """Entries of its log, per member and interval of the lease."""
        intervals = (time.monotonic() - self.began) / INTERVAL
        return self._since("etcd_server_proposals_committed_total") / MEMBERS / intervals

    def size(self) -> float:
        """Bytes of a value that was put."""
        puts = self._since("etcd_mvcc_put_total")
        return self._since("etcd_debugging_mvcc_total_put_size_in_bytes") / puts if puts else 0.0

    def _since(self, name: str) -> float:
        return self._counts().get(name, 0.0) - self.before.get(name, 0.0)

    def _counts(self) -> dict[str, float]:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=5) as answer:
            page = answer.read().decode()
        return {name: float(value) for name, value in re.findall(r"^(etcd_\w+) (\S+)$", page, re.MULTILINE)}


def team(
    stack: ExitStack, folder: Path, name: str, upstream: int, count: int, engine: int | None = None
) -> Team:
    """So many daemons, all warm."""
    models = "".join(f'[[models]]\nkey = "other-{n}"\n' for n in range(MODELS))
    begun: list[tuple[Path, int, Start]] = []
    for number in range(count):
        directory, port, more = folder / f"{name}{number}", free_port(), models
        directory.mkdir()
        if engine is not None:
            more += (
                f'[cluster]\netcd = "http://127.0.0.1:{engine}"\ninstance = "m{number}"\nttl = "{TTL:g}s"\n'
            )
        begun.append((directory, port, keepalive(directory, port, upstream, more)))
    pids = [
        stack.enter_context(
            running(start.command, port, directory / "keepalive.log", within=120, ready=start.ready)
        )
        for directory, port, start in begun
    ]
    return Team([port for _, port, _ in begun], pids)


@dataclass
class Round:
    """What was measured between the start of some daemons and their end."""

    members: float  # CPU per request, in microseconds
    apart: float
    alone: float
    steady: float  # writes to etcd per member and interval of the lease, while all models are asked for
    busy: float  # the same, over the whole round: use comes and goes
    size: float  # bytes of a write


def measured(folder: Path, seconds: float) -> Round:
    with ExitStack() as stack:
        engine, _ = stack.enter_context(etcd(folder))
        upstream = free_port()
        serving = [sys.executable, str(HERE / "upstream.py"), str(upstream)]
        stack.enter_context(running(serving, upstream, folder / "upstream.log"))
        set_pace(upstream, rate=0, events=1, others=MODELS)
        # All before the same server: how its answers come, each alone or some at once, is part of what they cost.
        members = team(stack, folder, "member", upstream, MEMBERS, engine)
        apart = team(stack, folder, "apart", upstream, MEMBERS)
        alone = team(stack, folder, "alone", upstream, 1)
        time.sleep(SETTLE_SECONDS)
        log = Log(engine)
        with ThreadPoolExecutor() as at_once:
            list(at_once.map(lambda each: each.ask(WARMING_SECONDS), (members, apart)))
            meanwhile = Log(engine)
            of_members, of_apart = at_once.map(lambda each: each.cost(seconds), (members, apart))
            steady = meanwhile.writes()
        alone.ask(WARMING_SECONDS)
        return Round(of_members, of_apart, alone.cost(seconds), steady, log.writes(), log.size())


def table(rounds: list[Round]) -> list[Row]:
    def middle(figure: Callable[[Round], float]) -> float:
        return statistics.median(map(figure, rounds))

    return [
        Row(f"{MEMBERS} that know nothing of each other: CPU per request", middle(lambda r: r.apart), "us"),
        Row(f"{MEMBERS} members: CPU per request", middle(lambda r: r.members), "us"),
        Row("one that carries as much alone: CPU per request", middle(lambda r: r.alone), "us"),
        Row(
            "members, beside those that know nothing of each other",
            middle(lambda r: r.members / r.apart),
            "times",
            TIMES_WANTED,
        ),
        Row(
            "writes to etcd under that load, per member and interval",
            middle(lambda r: r.steady),
            "",
            WRITES_WANTED,
        ),
        Row("the same, while all of them come and go", middle(lambda r: r.busy), "", WRITES_WANTED),
        Row("a write", middle(lambda r: r.size) / 1024, "KiB"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="each with daemons of its own")
    parser.add_argument("--seconds", type=float, default=12.0, help="of each turn")
    parser.add_argument("--json", type=Path, help="write every figure there")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # it takes its children along
    print(
        f"{platform.python_implementation()} {platform.python_version()}, {os.cpu_count()} cores, "
        f"{options.rounds} rounds, load average before: {os.getloadavg()[0]:.1f}",
        flush=True,
    )
    with tempfile.TemporaryDirectory(prefix="keepalive-bench-") as folder:
        rounds = []
        for number in range(options.rounds):
            place = Path(folder, str(number))
            place.mkdir()
            rounds.append(measured(place, options.seconds))
            times = rounds[-1].members / rounds[-1].apart
            print(f"round {number + 1} of {options.rounds}: {times:.2f} times", file=sys.stderr)
        rows = table(rounds)
    print(f"\n{MEMBERS} daemons, {MODELS} models, {RATE:g} requests a second all in all")
    for row in rows:
        print(row)
    if options.json:
        options.json.write_text(json.dumps({row.title: row.value for row in rows}, indent=1))
    sys.exit(1 if any(row.missed for row in rows) else 0)


if __name__ == "__main__":
    main()
