"""A real etcd, of one member or of three, in the folder of a test, which is skipped where this machine has none."""

import contextlib
import json
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.kit.live import ask, wait_until
from tests.kit.ports import reserved

ETCD = shutil.which("etcd")

needs_etcd = pytest.mark.skipif(ETCD is None, reason="needs etcd (Debian: etcd-server)")


class Etcd:
    """`url`; the process may be stopped, killed and started again with what it knew."""

    def __init__(
        self,
        folder: Path,
        client: int,
        peer: int,
        name: str = "one",
        cluster: str = "",
        host: str = "127.0.0.1",
    ) -> None:
        self.folder, self.name, self.host = folder, name, host
        self.url = f"http://{host}:{client}"
        self._peer = f"http://127.0.0.1:{peer}"
        self._cluster = cluster or f"{name}={self._peer}"

    def start(self, *, wait: bool = True) -> None:
        assert ETCD is not None
        words = [
            ETCD,
            "--name", self.name,
            "--data-dir", str(self.folder / self.name),
            "--listen-client-urls", self.url,
            "--advertise-client-urls", self.url,
            "--listen-peer-urls", self._peer,
            "--initial-advertise-peer-urls", self._peer,
            "--initial-cluster", self._cluster,
            "--unsafe-no-fsync",
        ]  # fmt: skip
        if "unsafe-no-fsync" not in subprocess.run([ETCD, "--help"], capture_output=True, text=True).stdout:
            words.pop()
        with (self.folder / "etcd.log").open("a") as log:
            self.process = subprocess.Popen(words, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        if wait:
            wait_until(self.answers, "etcd answers")

    def leads(self) -> bool:
        said = json.loads(ask(f"{self.url}/v3/maintenance/status", "POST", {})[2])
        return bool(said["leader"] == said["header"]["member_id"])

    def answers(self) -> bool:
        with contextlib.suppress(OSError):
            return ask(f"{self.url}/health")[0] == 200
        return False

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)
        if number is signal.SIGSTOP:
            # A signal is sent before it is obeyed, and each thread stops by itself.
            wait_until(self._is_stopped, "etcd has stopped")

    def _is_stopped(self) -> bool:
        stats = Path(f"/proc/{self.process.pid}/task").glob("*/stat")
        with contextlib.suppress(OSError):  # a thread that has ended meanwhile
            return all(stat.read_text().rpartition(")")[2].split()[0] == "T" for stat in stats)
        return False

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def etcd(folder: Path) -> Iterator[Etcd]:
    with reserved(2) as (client, peer):
        running = Etcd(folder, client, peer)
        try:
            running.start()
            yield running
        finally:
            running.kill()


@contextlib.contextmanager
def three(folder: Path, hosts: Sequence[str] = ("127.0.0.1",) * 3) -> Iterator[list[Etcd]]:
    """One cluster of three; `hosts` are the addresses at which they serve."""
    with reserved(6) as ports, contextlib.ExitStack() as stack:
        cluster = ",".join(f"n{n}=http://127.0.0.1:{ports[2 * n + 1]}" for n in range(3))
        members = [Etcd(folder, *ports[2 * n : 2 * n + 2], f"n{n}", cluster, hosts[n]) for n in range(3)]
        for one in members:
            one.start(wait=False)
            stack.callback(one.kill)
        wait_until(lambda: all(one.answers() for one in members), "all three answer")
        yield members
