"""What passing a stream on costs: this proxy beside nginx, HAProxy and Go's reverse proxy, in one run.

    python benchmarks/proxy [--quick] [--with-litellm] [--only nginx,keepalive] [--rounds N] [--json FILE]

See ../README.md for how to read the table.
"""

import argparse
import json
import os
import random
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent
OPEN_STREAMS = 2000
EVENTS_PER_SECOND = 50


# --- processes and what they cost ------------------------------------------------------------------


def tree(pid: int) -> list[int]:
    """A process and all below it."""
    found = [pid]
    for parent in found:
        for children in Path(f"/proc/{parent}/task").glob("*/children"):
            found += map(int, children.read_text().split())
    return found


def cpu_seconds(pid: int) -> float:
    """CPU time of a tree so far, by the scheduler's own clock.

    utime and stime are sampled at a tick here and there, and what wakes up with a timer hides between ticks.
    """
    nanoseconds = 0
    for each in tree(pid):
        for task in Path(f"/proc/{each}/task").glob("*/schedstat"):
            nanoseconds += int(task.read_text().split()[0])
    return nanoseconds / 1e9


def memory_bytes(pid: int) -> int:
    """Proportional set size: what the tree would free if it ended. Socket buffers are not in it."""
    total = 0
    for each in tree(pid):
        for line in Path(f"/proc/{each}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1]) * 1024
    return total


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
        return port


@contextmanager
def running(command: list[str], port: int, log: Path, within: float = 15) -> Iterator[int]:
    """The pid of a server that answers on `port`."""
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, stdin=subprocess.DEVNULL)
        try:
            deadline = time.monotonic() + within
            while True:
                try:
                    socket.create_connection(("127.0.0.1", port), 1).close()
                    break
                except OSError:
                    if process.poll() is not None or time.monotonic() > deadline:
                        raise RuntimeError(
                            f"{command[0]} does not serve: {log.read_text()[-2000:]}"
                        ) from None
                    time.sleep(0.05)
            yield process.pid
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def load(*arguments: object) -> dict[str, float]:
    """Runs the load generator to its end."""
    command = [sys.executable, str(HERE / "load.py"), *map(str, arguments)]
    out = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if out.returncode:
        raise RuntimeError(f"load.py {arguments}: {out.stderr[-500:]}")
    result: dict[str, float] = json.loads(out.stdout.splitlines()[-1])
    return result


# --- peers -----------------------------------------------------------------------------------------

NGINX = """
daemon off; worker_processes 1; pid {dir}/nginx.pid; error_log {dir}/nginx.err crit; {user}
worker_rlimit_nofile 65536;
events {{ worker_connections 16384; }}
http {{
  access_log off; client_body_temp_path {dir}; proxy_temp_path {dir}; fastcgi_temp_path {dir};
  uwsgi_temp_path {dir}; scgi_temp_path {dir}; keepalive_requests 10000000;
  upstream model {{ server 127.0.0.1:{upstream}; keepalive 512; keepalive_requests 10000000; }}
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    location / {{
      proxy_pass http://model; proxy_http_version 1.1; proxy_set_header Connection "";
      proxy_buffering off; proxy_read_timeout 1h;
    }}
  }}
}}
"""

HAPROXY = """
global
  maxconn 4500
  nbthread 1
defaults
  mode http
  option http-no-delay
  timeout connect 5s
  timeout client 1h
  timeout server 1h
frontend callers
  bind 127.0.0.1:{port} backlog 4096
  default_backend model
backend model
  http-reuse always
  server model 127.0.0.1:{upstream}
"""

LITELLM = """
model_list:
  - model_name: bench
    litellm_params: {{model: openai/bench, api_base: "http://127.0.0.1:{upstream}/v1", api_key: none}}
"""


class Missing(Exception):
    """Why a peer cannot take part."""


def find(program: str) -> str:
    beside = Path(sys.executable).parent / program
    path = str(beside) if beside.exists() else shutil.which(program)
    if path is None:
        raise Missing(f"no {program} on this machine")
    return path


def nginx(directory: Path, port: int, upstream: int) -> list[str]:
    config = directory / "nginx.conf"
    user = "user root;" if os.geteuid() == 0 else ""
    config.write_text(NGINX.format(dir=directory, port=port, upstream=upstream, user=user))
    return [find("nginx"), "-p", str(directory), "-c", str(config), "-e", f"{directory}/nginx.err"]


def haproxy(directory: Path, port: int, upstream: int) -> list[str]:
    config = directory / "haproxy.cfg"
    config.write_text(HAPROXY.format(port=port, upstream=upstream))
    return [find("haproxy"), "-db", "-f", str(config)]


def go(directory: Path, port: int, upstream: int) -> list[str]:
    program = directory / "reverse"
    environment = os.environ | {
        "GOFLAGS": "-mod=mod",
        "GOPROXY": "off",
        "GOTOOLCHAIN": "local",
        "GO111MODULE": "off",
    }
    environment |= {"GOCACHE": str(directory / "go"), "GOPATH": str(directory / "gopath")}
    built = subprocess.run(
        [find("go"), "build", "-o", str(program), str(HERE / "reverse.go")],
        env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    if built.returncode:
        raise Missing(f"go build failed: {built.stderr[-500:]}")
    return [str(program), str(port), f"http://127.0.0.1:{upstream}"]


def keepalive(directory: Path, port: int, upstream: int) -> list[str]:
    return [sys.executable, str(HERE / "alone.py"), str(port), f"http://127.0.0.1:{upstream}"]


def litellm(directory: Path, port: int, upstream: int) -> list[str]:
    config = directory / "litellm.yaml"
    config.write_text(LITELLM.format(upstream=upstream))
    return [find("litellm"), "--config", str(config), "--host", "127.0.0.1", "--port", str(port)]


PEERS: dict[str, Callable[[Path, int, int], list[str]]] = {
    "nginx": nginx,
    "haproxy": haproxy,
    "go": go,
    "keepalive": keepalive,
}


@dataclass
class Peer:
    name: str
    port: int
    pid: int | None  # None: nobody in between
    results: dict[str, list[float]] = field(default_factory=dict)

    def add(self, what: str, value: float) -> None:
        self.results.setdefault(what, []).append(value)


# --- measurements ----------------------------------------------------------------------------------


def set_pace(upstream: int, rate: float, events: int) -> None:
    urllib.request.urlopen(f"http://127.0.0.1:{upstream}/pace?rate={rate}&events={events}", timeout=5).close()


def measure_streams(peer: Peer, upstream: int, count: int, seconds: float) -> None:
    events = int(seconds * EVENTS_PER_SECOND)
    set_pace(upstream, EVENTS_PER_SECOND, events)
    before = cpu_seconds(peer.pid) if peer.pid else 0.0
    result = load("streams", peer.port, count)
    used = cpu_seconds(peer.pid) - before if peer.pid else 0.0
    expected = count * (events + 2)  # the role and the finish reason
    if abs(result["events"] - expected) > expected / 100:
        raise RuntimeError(f"{peer.name}: {result['events']} events of {expected}")
    if peer.pid:
        peer.add(f"cpu_{count}", used / expected * 1e6)


def measure_first(peer: Peer, upstream: int, count: int) -> None:
    set_pace(upstream, 0, 1)
    result = load("first", peer.port, count)
    peer.add("first", result["p50"] * 1e6)
    peer.add("first_p99", result["p99"] * 1e6)


def measure_requests(peer: Peer, seconds: float) -> None:
    before = cpu_seconds(peer.pid) if peer.pid else 0.0
    result = load("requests", peer.port, 16, seconds)
    peer.add("requests", result["requests"] / result["seconds"])
    if peer.pid:
        peer.add("request_cpu", (cpu_seconds(peer.pid) - before) / result["requests"] * 1e6)


def measure_memory(peer: Peer, upstream: int, count: int) -> None:
    if not peer.pid:
        return
    set_pace(upstream, 0, 1)
    load("first", peer.port, 50)
    set_pace(upstream, 0, 0)
    before = memory_bytes(peer.pid)
    command = [sys.executable, str(HERE / "load.py"), "hold", str(peer.port), str(count)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin
        assert process.stdout
        try:
            opened = json.loads(process.stdout.readline() or "{}").get("open")
            if opened != count:
                raise RuntimeError(f"{peer.name}: {opened} streams open of {count}")
            time.sleep(1)
            peer.add("memory", (memory_bytes(peer.pid) - before) / count / 1024)
        finally:
            process.stdin.close()


# --- the table -------------------------------------------------------------------------------------

ROWS = [
    ("cpu_20", "CPU per event, 20 streams", "us", 1),
    ("cpu_200", "CPU per event, 200 streams", "us", 1),
    ("first", "time to first event, median", "us", 0),
    ("first_p99", "time to first event, p99", "us", 0),
    ("added", "added to it, median", "us", 0),
    ("requests", "small JSON", "1/s", 0),
    ("request_cpu", "CPU per small JSON", "us", 0),
    ("memory", f"memory per open stream of {OPEN_STREAMS}", "KiB", 1),
]


def ratio(peer: Peer, base: Peer, what: str) -> float | None:
    """The median of the ratios round by round: what slows the machine in one round slows both."""
    pairs = list(zip(peer.results.get(what, []), base.results.get(what, []), strict=False))
    return statistics.median(a / b for a, b in pairs if b) if any(b for _, b in pairs) else None


def table(peers: dict[str, Peer]) -> str:
    lines = []
    for what, title, unit, digits in ROWS:
        if not any(what in peer.results for peer in peers.values()):
            continue
        lines += ["", f"{title} ({unit})"]
        lines.append(f"  {'':10} {'median':>9}  {'spread':>17}  {'/ nginx':>8}  {'/ go':>8}")
        for peer in peers.values():
            values = peer.results.get(what)
            if not values:
                continue
            spread = f"{min(values):.{digits}f} .. {max(values):.{digits}f}"
            ratios = [ratio(peer, peers[base], what) if base in peers else None for base in ("nginx", "go")]
            shown = "  ".join(f"{'' if r is None else f'{r:.2f}':>8}" for r in ratios)
            lines.append(f"  {peer.name:10} {statistics.median(values):9.{digits}f}  {spread:>17}  {shown}")
    return "\n".join(lines)


# --- the run ---------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one short round: does it run at all")
    parser.add_argument("--with-litellm", action="store_true", help="its start alone takes half a minute")
    parser.add_argument("--only", help="peers, with commas; direct is always there")
    parser.add_argument("--rounds", type=int, help="default 3")
    parser.add_argument("--json", type=Path, help="write every single value there")
    options = parser.parse_args()
    rounds = options.rounds or (1 if options.quick else 3)
    seconds = 1.5 if options.quick else 3.0

    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 65_536), hard))
    makers = PEERS | ({"litellm": litellm} if options.with_litellm else {})
    if options.only:
        makers = {name: maker for name, maker in makers.items() if name in options.only.split(",")}

    began = time.monotonic()
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        directory.chmod(0o755)
        upstream = free_port()
        stack.enter_context(
            running(
                [sys.executable, str(HERE / "upstream.py"), str(upstream)],
                upstream,
                directory / "upstream.log",
            )
        )
        peers = {"direct": Peer("direct", upstream, None)}
        for name, maker in makers.items():
            port = free_port()
            try:
                command = maker(directory, port, upstream)
                within = 90 if name == "litellm" else 15
                pid = stack.enter_context(running(command, port, directory / f"{name}.log", within))
            except (Missing, RuntimeError) as reason:
                print(f"without {name}: {reason}")
                continue
            peers[name] = Peer(name, port, pid)

        for number in range(rounds):
            # Round by round and in another order each time, so that a noisy minute hits everybody.
            for peer in random.sample(list(peers.values()), len(peers)):
                slow = peer.name == "litellm"
                try:
                    measure_streams(peer, upstream, 20, seconds)
                    if not slow:  # it cannot keep up with these
                        measure_streams(peer, upstream, 200, seconds)
                    measure_first(peer, upstream, 30 if slow else 200)
                    measure_requests(peer, seconds / 2)
                    if number == 0 and not slow:
                        measure_memory(peer, upstream, OPEN_STREAMS)
                except (RuntimeError, subprocess.TimeoutExpired) as problem:
                    log = (directory / f"{peer.name}.log").read_text()[-500:] if peer.pid else ""
                    print(f"{peer.name}, round {number + 1}: {problem}\n{log}")
            print(f"round {number + 1} of {rounds} after {time.monotonic() - began:.0f} s", file=sys.stderr)

    for peer in list(peers.values())[1:]:
        for through, directly in zip(
            peer.results.get("first", []), peers["direct"].results.get("first", []), strict=False
        ):
            peer.add("added", through - directly)
    print(table(peers))
    print(f"\n{os.cpu_count()} cores, {rounds} rounds, {time.monotonic() - began:.0f} s")
    if options.json:
        options.json.write_text(json.dumps({peer.name: peer.results for peer in peers.values()}, indent=1))


if __name__ == "__main__":
    main()
