"""What it costs to be one of several daemons: `python benchmarks/cluster.py`. Needs etcd.

Three members of one cluster, and three daemons that know nothing of each other, each before a hundred warm models, are
asked in turns in one run: a thousand small requests a second all in all. What the members take more is the price of
the cluster. Then one daemon that carries all of it alone. Writes are etcd's own count. Where what is wanted is missed
the exit code is 1.
"""

import argparse
import json
import os
import platform
import random
import re
import shutil
import signal
import statistics
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
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
WARMING_SECONDS = 1.5
TIMES_WANTED = 1.05
WRITES_WANTED = 1.0


@dataclass
class Team:
    """Daemons that are asked at once."""

    ports: list[int]
    pids: list[int]
    costs: list[float] = field(default_factory=list)  # CPU per request, in microseconds

    def cpu(self) -> float:
        return sum(map(cpu_seconds, self.pids))

    def ask(self, seconds: float) -> float:
        """So many are answered."""
        return load("paced", ",".join(map(str, self.ports)), CONNECTIONS, seconds, RATE, MODELS)["requests"]

    def round(self, seconds: float) -> float:
        self.ask(WARMING_SECONDS)
        before = self.cpu()
        answered = self.ask(seconds)
        self.costs.append((self.cpu() - before) / answered * 1e6)
        return answered


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


def counted(port: int) -> dict[str, float]:
    """What etcd has done so far: entries of its log, and bytes of all values that were ever put."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        page = answer.read().decode()
    found = {name: float(value) for name, value in re.findall(r"^(etcd_\w+) (\S+)$", page, re.MULTILINE)}
    names = {"writes": "etcd_server_proposals_committed_total", "puts": "etcd_mvcc_put_total"}
    names |= {"size": "etcd_debugging_mvcc_total_put_size_in_bytes"}
    return {what: found.get(name, 0.0) for what, name in names.items()}


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


def ratio(ours: Team, base: Team) -> float:
    """The median of the ratios round by round: what slows the machine in one round slows both."""
    return statistics.median(a / b for a, b in zip(ours.costs, base.costs, strict=True))


def measured(folder: Path, rounds: int, seconds: float) -> list[Row]:
    with ExitStack() as stack:
        engine, _ = stack.enter_context(etcd(folder))
        upstream = free_port()
        serving = [sys.executable, str(HERE / "upstream.py"), str(upstream)]
        stack.enter_context(running(serving, upstream, folder / "upstream.log"))
        set_pace(upstream, rate=0, events=1, others=MODELS)
        # All before the same server: how its answers come, each alone or some at once, is part of what they cost.
        teams = {
            "members": team(stack, folder, "member", upstream, MEMBERS, engine),
            "apart": team(stack, folder, "apart", upstream, MEMBERS),
            "alone": team(stack, folder, "alone", upstream, 1),
        }
        time.sleep(SETTLE_SECONDS)
        before, began = counted(engine), time.monotonic()
        for number in range(rounds):
            for name in random.sample(list(teams), len(teams)):
                teams[name].round(seconds)
            print(f"round {number + 1} of {rounds}", file=sys.stderr)
        # Of three turns the members have one: use by all models comes and goes.
        wrote = {what: value - before[what] for what, value in counted(engine).items()}
        busy = wrote["writes"] / MEMBERS / ((time.monotonic() - began) / INTERVAL)
        steady = steadily(teams["members"], engine)
    members, apart, alone = teams["members"], teams["apart"], teams["alone"]
    rows = [
        Row(
            f"{MEMBERS} that know nothing of each other: CPU per request",
            statistics.median(apart.costs),
            "us",
        ),
        Row(f"{MEMBERS} members: CPU per request", statistics.median(members.costs), "us"),
        Row("one that carries all of it: CPU per request", statistics.median(alone.costs), "us"),
        Row(
            "members, beside those that know nothing of each other",
            ratio(members, apart),
            "times",
            TIMES_WANTED,
        ),
        Row("writes to etcd under that load, per member and interval", steady["writes"], "", WRITES_WANTED),
        Row("the same, while all of them come and go", busy, "", WRITES_WANTED),
    ]
    if wrote["puts"]:
        rows.append(Row("a write", wrote["size"] / wrote["puts"] / 1024, "KiB"))
    return rows


def steadily(members: Team, engine: int) -> dict[str, float]:
    """Writes while all models are asked for all the time, per member and interval of the lease."""
    seconds = 6 * INTERVAL
    members.ask(2 * INTERVAL)
    before = counted(engine)
    members.ask(seconds)
    after = counted(engine)
    return {what: (after[what] - before[what]) / MEMBERS / (seconds / INTERVAL) for what in after}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each turn")
    parser.add_argument("--json", type=Path, help="write every figure there")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # it takes its children along
    print(
        f"{platform.python_implementation()} {platform.python_version()}, {os.cpu_count()} cores, "
        f"{options.rounds} rounds, load average before: {os.getloadavg()[0]:.1f}",
        flush=True,
    )
    with tempfile.TemporaryDirectory(prefix="keepalive-bench-") as folder:
        rows = measured(Path(folder), options.rounds, options.seconds)
    print(f"\n{MEMBERS} daemons, {MODELS} models, {RATE:g} requests a second all in all")
    for row in rows:
        print(row)
    if options.json:
        options.json.write_text(json.dumps({row.title: row.value for row in rows}, indent=1))
    sys.exit(1 if any(row.missed for row in rows) else 0)


if __name__ == "__main__":
    main()
