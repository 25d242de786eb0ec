"""Two daemons as one on this machine, to be killed by whoever watches: `make demo-cluster`. Needs etcd."""

import contextlib
import json
import os
import signal
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.cluster.test_member import member
from tests.kit import etcd as kit
from tests.kit.live import DaemonProcess, SimulatorProcess, ending, settings
from tests.kit.ports import reserved

MODEL = "qwen/qwen3-4b-2507"
# Longer than the lease, so that the other one is seen to take over.
STARTED_AGAIN = 10.0


class Shown:
    """One of them, started again when it has ended, as systemd would."""

    def __init__(self, folder: Path, name: str, text: str) -> None:
        self.folder, self.name, self.text = folder, name, text
        self.ended: float | None = None
        self.start()

    def start(self) -> None:
        self.daemon, self.ended = DaemonProcess(self.folder, self.text, self.name), None

    def look(self) -> str:
        """What it is, in a few words."""
        name, process = self.name, self.daemon.process
        if process.poll() is not None:
            self.ended = self.ended or time.monotonic()
            if time.monotonic() - self.ended > STARTED_AGAIN:
                self.start()
                return f"{name} is started again: kill {self.daemon.process.pid}"
            return f"{name} has ended"
        try:
            # Whoever is stopped answers nobody.
            with urllib.request.urlopen(f"{self.daemon.url}/api/status", timeout=1.0) as answer:
                status = json.load(answer)
        except OSError:
            return f"{name} does not answer"
        [model] = status["models"]
        if not status["cluster"]["engine"]["up"]:
            return f"{name} serves without etcd, {MODEL} is {model['state']}"
        acts = "acts" if status["cluster"]["holders"].get("local") == name else "serves"
        return f"{name} {acts}, {MODEL} is {model['state']}"


def main() -> int:
    if kit.ETCD is None:
        print("This needs etcd, 3.4 or newer (Debian: apt install etcd-server).")
        return 1
    print("Starting etcd, a simulated LM Studio and two daemons: a few seconds.", flush=True)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        etcd = stack.enter_context(kit.etcd(folder))
        lm_studio = SimulatorProcess(folder, MODEL)
        stack.enter_context(ending(lm_studio))
        ports = stack.enter_context(reserved(4))
        pair: list[Shown] = []
        stack.callback(lambda: [one.daemon.kill() for one in pair])
        for n, name in enumerate("ab"):
            server = f'state_dir = "{folder / name}"\nlog_format = "json"'
            text = settings(lm_studio.url, MODEL, server=server) + member(etcd.url, "demo", name, "5s")
            for port in ports[2 * n : 2 * n + 2]:
                text = text.replace('127.0.0.1:0"', f'127.0.0.1:{port}"', 1)
            pair.append(Shown(folder, name, text))
        print(f"etcd is at {etcd.url}, LM Studio at {lm_studio.url}, and in front of it:")
        for one in pair:
            [started] = one.daemon.events("daemon.started")
            print(f"  {one.name}: its page is {one.daemon.url}, callers ask {started['listen']}")
        (a, a_url), (b, b_url) = ((one.daemon.process.pid, one.daemon.url) for one in pair)
        asked = json.dumps(
            {"model": MODEL, "stream": True, "messages": [{"role": "user", "content": "Hello"}]}
        )
        [started] = pair[1].daemon.events("daemon.started")
        print(f"""
In another terminal, kill or stop whoever acts, and see the other one take over after 5 s:
  kill -9 {a}      kill -9 {b}      (it is started again after {STARTED_AGAIN:.0f} s)
  kill -STOP {a}      kill -CONT {a}
Stop etcd, and what is warm is served without it; let it go on, and so does all else:
  kill -STOP {etcd.process.pid}      kill -CONT {etcd.process.pid}
Have LM Studio lose the model, and see what a caller of any daemon is told until it is back:
  curl -X POST {lm_studio.url}/simulator/evict -d '{{"model": "{MODEL}"}}'
  curl -N {started["listen"]}/v1/chat/completions -d '{asked}'
Ask either of them what it knows:
  .venv/bin/keepalive status --url {a_url}      .venv/bin/keepalive status --url {b_url}

Ctrl-C ends it all. Now:""")
        last = ""
        while True:
            now = "; ".join(one.look() for one in pair)
            if now != last:
                print(f"{time.strftime('%H:%M:%S')} {now}", flush=True)
                last = now
            time.sleep(0.3)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # nobody is left behind by that either
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
    os._exit(0)
