"""A real etcd of one member, in the folder of a test; where there is none on this machine, the test is skipped."""

import contextlib
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kit.live import ask, wait_until
from tests.kit.ports import reserved

ETCD = shutil.which("etcd")

needs_etcd = pytest.mark.skipif(ETCD is None, reason="needs etcd (Debian: etcd-server)")


class Etcd:
    """`url`; the process may be stopped, killed and started again with what it knew."""

    def __init__(self, folder: Path, client: int, peer: int) -> None:
        self.folder = folder
        self.url = f"http://127.0.0.1:{client}"
        self._peer = f"http://127.0.0.1:{peer}"
        self.start()

    def start(self) -> None:
        assert ETCD is not None
        words = [
            ETCD,
            "--data-dir", str(self.folder / "etcd"),
            "--listen-client-urls", self.url,
            "--advertise-client-urls", self.url,
            "--listen-peer-urls", self._peer,
            "--initial-advertise-peer-urls", self._peer,
            "--initial-cluster", f"default={self._peer}",
            "--unsafe-no-fsync",
        ]  # fmt: skip
        if "unsafe-no-fsync" not in subprocess.run([ETCD, "--help"], capture_output=True, text=True).stdout:
            words.pop()
        with (self.folder / "etcd.log").open("a") as log:
            self.process = subprocess.Popen(words, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        wait_until(self._answers, "etcd answers")

    def _answers(self) -> bool:
        with contextlib.suppress(OSError):
            return ask(f"{self.url}/health")[0] == 200
        return False

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def etcd(folder: Path) -> Iterator[Etcd]:
    with reserved(2) as (client, peer):
        running = Etcd(folder, client, peer)
        try:
            yield running
        finally:
            running.kill()
