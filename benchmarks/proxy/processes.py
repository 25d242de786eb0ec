"""Processes: started, measured by the kernel's own count, and ended."""

import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).parent


def tree(pid: int) -> list[int]:
    """A process and all below it."""
    found = [pid]
    for parent in found:
        for children in Path(f"/proc/{parent}/task").glob("*/children"):
            found += map(int, children.read_text().split())
    return found


def cpu_seconds(pid: int) -> float:
    """CPU time of a tree so far, all of its threads, by the scheduler's own clock.

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


def set_pace(upstream: int, **pace: float) -> None:
    """What the upstream does from now on."""
    query = "&".join(f"{name}={value}" for name, value in pace.items())
    urllib.request.urlopen(f"http://127.0.0.1:{upstream}/pace?{query}", timeout=5).close()


@contextmanager
def running(
    command: list[str], port: int, log: Path, *, within: float = 15, ready: Callable[[], bool] | None = None
) -> Iterator[int]:
    """The pid of a server that answers on `port`, and that `ready` is content with."""
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, stdin=subprocess.DEVNULL, cwd=log.parent)
        try:
            deadline = time.monotonic() + within
            while True:
                try:
                    socket.create_connection(("127.0.0.1", port), 1).close()
                    if ready is None or ready():
                        break
                except OSError:
                    pass
                if process.poll() is not None or time.monotonic() > deadline:
                    said = log.read_text(errors="replace")[-2000:]
                    raise RuntimeError(f"{command[0]} does not serve: {said}")
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
    """Runs the callers to their end."""
    command = [sys.executable, str(HERE / "load.py"), *map(str, arguments)]
    out = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if out.returncode:
        raise RuntimeError(f"load.py {arguments}: {out.stderr[-500:]}")
    result: dict[str, float] = json.loads(out.stdout.splitlines()[-1])
    return result


@contextmanager
def held(*arguments: object, within: float = 60) -> Iterator[subprocess.Popen[str]]:
    """Callers that have begun and stay, until this ends."""
    command = [sys.executable, str(HERE / "load.py"), *map(str, arguments)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin
        assert process.stdout
        try:
            if not json.loads(process.stdout.readline() or "{}").get("open"):
                raise RuntimeError(f"load.py {arguments}: not all of them could begin")
            yield process
        finally:
            process.stdin.close()
            try:
                process.wait(within)
            except subprocess.TimeoutExpired:
                process.kill()
