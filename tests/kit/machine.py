"""Other machines, each by a cable: network namespaces that can lose their power, or lose sight of an address, so that
nobody says goodbye."""

import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.kit.live import Running, wait_until


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=60).stdout


_numbers = itertools.count()


class Machine:
    """`here` is our address on the cable, `there` its own."""

    def __init__(self, folder: Path) -> None:
        process, number = os.getpid(), next(_numbers) % 60
        self.name = f"keepalive-{process}-{number}"
        self._ours, self._theirs = f"ka{process}.{number}a", f"ka{process}.{number}b"
        net = f"10.{200 + process % 50}.{process // 50 % 250}"
        self.here, self.there = f"{net}.{4 * number + 1}", f"{net}.{4 * number + 2}"
        self._folder = folder
        self._running: list[Running] = []

    def power_on(self) -> None:
        ip("netns", "add", self.name)
        ip("link", "add", self._ours, "type", "veth", "peer", "name", self._theirs, "netns", self.name)
        ip("addr", "add", f"{self.here}/30", "dev", self._ours)
        ip("link", "set", self._ours, "up")
        ip("-n", self.name, "addr", "add", f"{self.there}/30", "dev", self._theirs)
        ip("-n", self.name, "link", "set", "lo", "up")
        ip("-n", self.name, "link", "set", self._theirs, "up")
        ip("-n", self.name, "route", "add", "default", "via", self.here)

    def loses_sight_of(self, *addresses: str, sends: bool = False) -> None:
        """Nothing comes from them any more; with `sends`, what is sent to them still arrives."""
        for address in addresses:
            self._filter("-A", "INPUT", "-s", address, "-j", "DROP")
            if not sends:
                self._filter("-A", "OUTPUT", "-d", address, "-j", "DROP")

    def sees_all(self) -> None:
        self._filter("-F")

    def _filter(self, *words: str) -> None:
        enter = ["ip", "netns", "exec", self.name, "iptables", "-w"]
        subprocess.run([*enter, *words], check=True, capture_output=True, text=True, timeout=60)

    def run(self, *words: str, name: str) -> Running:
        """A program on it, once it has said its first word."""
        running = Running(["ip", "netns", "exec", self.name, *words], self._folder, name)
        self._running.append(running)
        with running.begun():
            wait_until(lambda: "\n" in running.out.read_text(), f"{name} says something")
        return running

    def lose_power(self) -> None:
        """Nothing leaves it any more; its programs end, and nobody hears of it."""
        ip("-n", self.name, "link", "set", self._theirs, "down")
        for running in self._running:
            running.kill()
        self._running.clear()

    def is_removed(self) -> None:
        for running in self._running:
            running.kill()
        self._running.clear()
        # A namespace lives as long as connections that nobody answers any more, so its cable is cut by hand.
        ip("link", "del", self._ours)
        ip("netns", "del", self.name)


@contextmanager
def addresses(*wanted: str) -> Iterator[None]:
    """Addresses of ours, that all of these machines can tell apart."""
    with ExitStack() as stack:
        for address in wanted:
            ip("addr", "add", f"{address}/32", "dev", "lo")
            stack.callback(ip, "addr", "del", f"{address}/32", "dev", "lo")
        yield


@contextmanager
def machine(folder: Path) -> Iterator[Machine]:
    """Such a machine, switched on. Skips where there can be none."""
    if sys.platform != "linux" or os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("another machine is a network namespace: that takes Linux, root and `ip`")
    made = Machine(folder)
    try:
        made.power_on()
    except subprocess.CalledProcessError as error:
        subprocess.run(["ip", "netns", "del", made.name], capture_output=True, timeout=60, check=False)
        pytest.skip(f"no network namespace here: {error.stderr.strip()}")
    try:
        yield made
    finally:
        made.is_removed()
