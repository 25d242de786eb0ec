"""A real etcd, of one member or of three, in the folder of a test, which is skipped where this machine has none; and
certificates for it, of an authority of our own."""

import contextlib
import json
import shutil
import signal
import ssl
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path

import pytest
from aiohttp import web

from tests.kit.live import ask, wait_until
from tests.kit.ports import reserved

ETCD = shutil.which("etcd")

needs_etcd = pytest.mark.skipif(ETCD is None, reason="needs etcd (Debian: etcd-server)")


class Authority:
    """Signs certificates for 127.0.0.1; `ca` is its own."""

    def __init__(self, folder: Path, name: str = "ca") -> None:
        self.folder = folder
        self.ca, self._key = folder / f"{name}.pem", folder / f"{name}.key"
        _openssl("req", "-x509", *NEW_KEY, "-keyout", self._key, "-out", self.ca, "-subj", f"/CN={name}")

    def signs(self, name: str, days: int = 2) -> tuple[Path, Path]:
        """A certificate and its key; with less than no days it has expired."""
        cert, key = self.folder / f"{name}.pem", self.folder / f"{name}.key"
        request, more = self.folder / f"{name}.csr", self.folder / f"{name}.ext"
        more.write_text("subjectAltName=IP:127.0.0.1\n")
        _openssl("req", "-new", *NEW_KEY, "-keyout", key, "-out", request, "-subj", f"/CN={name}")
        signer = ("-CA", self.ca, "-CAkey", self._key, "-CAcreateserial")
        _openssl("x509", "-req", "-in", request, *signer, "-days", f"{days}", "-extfile", more, "-out", cert)
        return cert, key


def trusting(ca: Path) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=ca)


NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


def _openssl(*words: str | Path) -> None:
    subprocess.run(["openssl", *words], check=True, capture_output=True, stdin=subprocess.DEVNULL)


class Etcd:
    """`url`; the process may be stopped, killed and started again with what it knew. `more` are options of etcd's."""

    def __init__(
        self,
        folder: Path,
        client: int,
        peer: int,
        name: str = "one",
        cluster: str = "",
        host: str = "127.0.0.1",
        more: Sequence[str | Path] = (),
    ) -> None:
        self.folder, self.name, self.more = folder, name, more
        self.url = f"http{'s' if '--cert-file' in more else ''}://{host}:{client}"
        # Without TLS, whatever the rest has.
        self.health = next((str(url) for url in more if str(url).startswith("http:")), self.url)
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
            *self.more,
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
            return ask(f"{self.health}/health")[0] == 200
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

    def lose_everything(self) -> None:
        """Another one comes in its place, that knows nothing."""
        self.kill()
        self.empty()
        self.start()

    def empty(self) -> None:
        shutil.rmtree(self.folder / self.name)


@contextlib.contextmanager
def etcd(folder: Path, *more: str | Path) -> Iterator[Etcd]:
    with reserved(2) as (client, peer):
        running = Etcd(folder, client, peer, more=more)
        try:
            running.start()
            yield running
        finally:
            running.kill()


@contextlib.contextmanager
def secured(folder: Path, cert: tuple[Path, Path], *more: str | Path) -> Iterator[Etcd]:
    """One that speaks TLS."""
    with reserved() as [health]:
        own = ("--cert-file", cert[0], "--key-file", cert[1])
        with etcd(folder, *own, "--listen-metrics-urls", f"http://127.0.0.1:{health}", *more) as running:
            yield running


@contextlib.asynccontextmanager
async def in_place_of_etcd(
    answer: Callable[[web.BaseRequest], Awaitable[web.Response]],
) -> AsyncIterator[str]:
    """The URL of what answers there, and is none."""
    runner = web.ServerRunner(web.Server(answer))
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


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
