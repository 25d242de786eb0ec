"""Failovers without end, as processes and under traffic: `make chaos`.

Three daemons, a real etcd and the simulator as LM Studio. Again and again one fault of a kind: whoever acts is killed,
or stopped and woken later; etcd is stopped, or killed; a model is lost meanwhile. LM Studio's own log is the judge: no
load ever begins beside another one or beside an instance, and after each fault every model is warm again in bounded
time. `python tests/chaos.py [FAILOVERS] [SEED]` exits with 1 at the first that is not so.
"""

import contextlib
import random
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.cluster.test_member import member
from tests.kit import etcd as kit
from tests.kit.live import DaemonProcess, SimulatorProcess, ask, ending, settings, wait_until
from tests.kit.ports import reserved

FAILOVERS = 500
MODELS = ("one", "two")
NAMES = ("a", "b", "c")
TTL = 3.0
LOAD = 1.0
# A holder that is gone is succeeded after its lease, a load whose end nobody saw is waited for, and a machine is busy.
RECOVERS_WITHIN = 240.0


class Chaos:
    def __init__(self, folder: Path, lm_studio: SimulatorProcess, etcd: kit.Etcd, seed: str) -> None:
        self.folder, self.lm_studio, self.etcd = folder, lm_studio, etcd
        self.chance = random.Random(seed)
        self.daemons: dict[str, DaemonProcess] = {}
        self.ports: list[int] = []
        self.seen = 0
        self.answers = {"well": 0, "not": 0}
        self.over = threading.Event()

    def start(self, name: str) -> None:
        number = NAMES.index(name)
        listen = f'state_dir = "{self.folder / name}"\nlog_format = "json"'
        text = settings(self.lm_studio.url, *MODELS, server=listen)
        text += member(self.etcd.url, "chaos", name, f"{TTL:.0f}s")
        for port in self.ports[2 * number : 2 * number + 2]:
            text = text.replace('127.0.0.1:0"', f'127.0.0.1:{port}"', 1)
        self.daemons[name] = DaemonProcess(self.folder, text, name)

    def holder(self) -> str:
        """Who acts, as far as any of them knows."""
        for name in self.chance.sample(NAMES, len(NAMES)):
            with contextlib.suppress(OSError, KeyError, ValueError):
                found = self.daemons[name].status()["cluster"]["holders"].get("local")
                if found in self.daemons:
                    return str(found)
        return self.chance.choice(NAMES)

    def fault(self) -> str:
        kind = self.chance.choice(("kill", "kill", "stop", "stop", "term", "etcd stopped", "etcd killed"))
        during = self.chance.choice(("at rest", "a model lost before", "a model lost after"))
        lost = self.chance.choice(MODELS)
        if during == "a model lost before":
            self.lose(lost)
            time.sleep(self.chance.uniform(0, 1.5 * LOAD))
        name = self.holder()
        process = self.daemons[name]
        match kind:
            case "kill" | "term":
                process.signal(signal.SIGKILL if kind == "kill" else signal.SIGTERM)
            case "stop":
                process.signal(signal.SIGSTOP)
            case "etcd stopped":
                self.etcd.signal(signal.SIGSTOP)
            case "etcd killed":
                self.etcd.kill()
        if during == "a model lost after":
            self.lose(lost)
        time.sleep(self.chance.choice((0.1, TTL / 2, 2 * TTL, 3 * TTL)))
        match kind:
            case "kill" | "term":
                process.ended()
                self.start(name)
            case "stop":
                process.signal(signal.SIGCONT)
            case "etcd stopped":
                self.etcd.signal(signal.SIGCONT)
            case "etcd killed":
                self.etcd.start()
        return f"{kind} of {name}, {during}"

    def lose(self, key: str) -> None:
        # It may not be there to be lost.
        ask(f"{self.lm_studio.url}/simulator/evict", "POST", {"model": key})

    def judge(self) -> list[dict[str, Any]]:
        """The loads that should not have been."""
        log = self.lm_studio.log()
        wrong = [e for e in log if e["kind"] == "load.started" and e["copies"] and e["n"] > self.seen]
        self.seen = max((e["n"] for e in log), default=self.seen)
        return wrong

    def warm(self) -> bool:
        states = []
        for process in self.daemons.values():
            with contextlib.suppress(OSError):
                states += [m["state"] == "warm" for m in process.status()["models"]]
        return len(states) == len(MODELS) * len(NAMES) and all(states)

    def traffic(self) -> None:
        chance = random.Random(7)
        while not self.over.is_set():
            number = chance.randrange(len(NAMES))
            body = {
                "model": chance.choice(MODELS),
                "messages": [{"role": "user", "content": "x"}],
                "max_tokens": 4,
            }
            try:
                url = f"http://127.0.0.1:{self.ports[2 * number]}/v1/chat/completions"
                self.answers["well" if ask(url, "POST", body)[0] == 200 else "not"] += 1
            except OSError:
                self.answers["not"] += 1
            time.sleep(0.2)


def main(failovers: int, seed: str) -> int:
    if kit.ETCD is None:
        print("this needs etcd (Debian: etcd-server)")
        return 1
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        etcd = stack.enter_context(kit.etcd(folder))
        lm_studio = SimulatorProcess(folder, *MODELS)
        stack.enter_context(ending(lm_studio))
        lm_studio.faults(load_seconds=LOAD)
        chaos = Chaos(folder, lm_studio, etcd, seed)
        chaos.ports = stack.enter_context(reserved(2 * len(NAMES)))
        stack.callback(lambda: [d.kill() for d in chaos.daemons.values() if d.process.poll() is None])
        for name in NAMES:
            chaos.start(name)
        traffic = threading.Thread(target=chaos.traffic, daemon=True)
        traffic.start()
        stack.callback(chaos.over.set)
        wait_until(chaos.warm, "all is warm")
        for number in range(1, failovers + 1):
            what = chaos.fault()
            began = time.monotonic()
            try:
                wait_until(chaos.warm, "all is warm again", within=RECOVERS_WITHIN)
            except AssertionError:
                print(f"{number} {what}: not warm within {RECOVERS_WITHIN:.0f} s, seed {seed}")
                for process in chaos.daemons.values():
                    print(process.err.read_text()[-3000:])
                return 1
            wrong = chaos.judge()
            print(f"{number} {what}: warm after {time.monotonic() - began:.1f} s {chaos.answers}", flush=True)
            if wrong:
                print(f"loads beside others, seed {seed}: {wrong}")
                for name, process in chaos.daemons.items():
                    print(name, process.err.read_text()[-4000:])
                return 1
    return 0


if __name__ == "__main__":
    arguments = [*sys.argv[1:], *[str(FAILOVERS), "0"][len(sys.argv) - 1 :]]
    sys.exit(main(int(arguments[0]), arguments[1]))
