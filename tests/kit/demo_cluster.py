"""Two daemons as one on this machine, to be killed by whoever watches: `make demo-cluster`. Needs etcd."""

import contextlib
import json
import os
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.cluster.test_member import member
from tests.kit import etcd as kit
from tests.kit.live import DaemonProcess, SimulatorProcess, ending, settings

MODEL = "qwen/qwen3-4b-2507"


def shown(name: str, daemon: DaemonProcess) -> str:
    if daemon.process.poll() is not None:
        return f"{name} has ended"
    try:
        # Whoever is stopped answers nobody.
        with urllib.request.urlopen(f"{daemon.url}/api/status", timeout=1.0) as answer:
            status = json.load(answer)
    except OSError:
        return f"{name} does not answer"
    [model] = status["models"]
    acts = "acts" if status["cluster"]["holders"].get("local") == name else "serves"
    etcd = "" if status["cluster"]["engine"]["up"] else ", without etcd"
    return f"{name} {acts}{etcd}, {MODEL} is {model['state']}"


def main() -> int:
    if kit.ETCD is None:
        print("This needs etcd, 3.4 or newer (Debian: apt install etcd-server).")
        return 1
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        etcd = stack.enter_context(kit.etcd(folder))
        lm_studio = SimulatorProcess(folder, MODEL)
        stack.enter_context(ending(lm_studio))
        daemons = {}
        for name in ("a", "b"):
            server = f'state_dir = "{folder / name}"\nlog_format = "json"'
            text = settings(lm_studio.url, MODEL, server=server) + member(etcd.url, "demo", name, "5s")
            daemons[name] = DaemonProcess(folder, text, name)
            stack.enter_context(ending(daemons[name]))
        print(
            f"etcd at {etcd.url}, a simulated LM Studio at {lm_studio.url}, and two daemons in front of it:"
        )
        for name, daemon in daemons.items():
            print(f"  {name}: its page is {daemon.url}")
        a, b = daemons["a"].process.pid, daemons["b"].process.pid
        print("\nIn another terminal, kill or stop whoever acts, and see the other one take over after 5 s:")
        print(f"  kill -9 {a}         kill -9 {b}")
        print(f"  kill -STOP {a}      kill -CONT {a}")
        print(f"  kill -STOP {etcd.process.pid}      etcd; what is warm is served without it\n")
        print(
            f'  curl -X POST {lm_studio.url}/simulator/evict -d \'{{"model": "{MODEL}"}}\'      LM Studio loses it\n'
        )
        last = ""
        while any(daemon.process.poll() is None for daemon in daemons.values()):
            now = "; ".join(shown(name, daemon) for name, daemon in daemons.items())
            if now != last:
                print(f"{time.strftime('%H:%M:%S')} {now}", flush=True)
                last = now
            time.sleep(0.3)
    return 0


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
    os._exit(0)
