"""Real Prometheus and Alertmanager for tests, as processes on free ports with their data in a folder of the test.

Where one is not installed, a test that needs it is skipped and says so.
"""

import json
import math
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

from tests.kit.live import Running, ask, wait_until

Json = dict[str, Any]
# Nothing here waits this long unless it fails, however busy the computer is.
PATIENCE = 240.0


def installed(*names: str) -> str:
    """The path of a program under one of its names; Debian calls Alertmanager prometheus-alertmanager."""
    found = next((path for path in map(shutil.which, names) if path), None)
    if found is None:
        pytest.skip(f"no {names[0]} here: apt install prometheus prometheus-alertmanager")
    return found


def promtool(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """It computes for as long as it must; pytest ends what hangs."""
    return subprocess.run(
        [installed("promtool"), *words], cwd=cwd, capture_output=True, text=True, check=False
    )


class _Listening(Running):
    """A program of the Prometheus family: it says in its log on which port it ended up."""

    def __init__(self, words: list[str], folder: Path, name: str) -> None:
        words = [*words, "--web.listen-address=127.0.0.1:0", "--log.level=info"]
        super().__init__(words, folder, name)
        found = wait_until(self._address, f"{name} listens", PATIENCE)
        self.url = f"http://{found}"
        wait_until(lambda: ask(f"{self.url}/-/ready")[0] == 200, f"{name} is ready", PATIENCE)

    def _address(self) -> str | None:
        log = self.err.read_text()
        assert self.process.poll() is None, log
        found = re.search(r'msg="Listening on" address=(\S+)', log)
        return found[1] if found else None


class Prometheus(_Listening):
    """Prometheus with this config; its rule files are in the same folder."""

    def __init__(self, folder: Path, config: str) -> None:
        (folder / "prometheus.yml").write_text(config)
        data = f"--storage.tsdb.path={folder / 'prometheus'}"
        program = installed("prometheus")
        super().__init__([program, f"--config.file={folder / 'prometheus.yml'}", data], folder, "prometheus")

    def _get(self, path: str, **query: str) -> Any:
        status, _, text = ask(f"{self.url}/api/v1/{path}?{urlencode(query)}")
        assert status == 200, f"{query}: {text}"
        return json.loads(text)["data"]

    def now(self, expression: str) -> dict[tuple[tuple[str, str], ...], float]:
        """The value of each series at this moment, by its labels."""
        return {
            tuple(sorted(series["metric"].items())): float(series["value"][1])
            for series in self._get("query", query=expression)["result"]
        }

    def sees(self, expression: str, what: str) -> None:
        """Wait until it has a value. Asked at the pace of what it reads, which is a second in tests: to answer
        takes it more time than anything else that it does."""
        end = time.monotonic() + PATIENCE
        while not self.now(expression):
            assert time.monotonic() < end, f"not within {PATIENCE:.0f} s: {what}"
            time.sleep(0.25)

    def over(self, expression: str, start: float, end: float, step: float = 1.0) -> list[tuple[float, float]]:
        """Time and value of every number that it had, of any series, `end` included: what came up last counts too."""
        steps = math.ceil((end - start) / step)
        query = {"query": expression, "start": f"{end - steps * step}", "end": f"{end}", "step": f"{step}"}
        points = [
            (float(at), float(value))
            for series in self._get("query_range", **query)["result"]
            for at, value in series["values"]
        ]
        return [point for point in points if not math.isnan(point[1])]

    def rules(self) -> list[Json]:
        """Each rule as Prometheus read it, and how its last evaluation went."""
        return [rule for group in self._get("rules")["groups"] for rule in group["rules"]]

    def targets(self) -> Mapping[str, str]:
        return {target["scrapeUrl"]: target["health"] for target in self._get("targets")["activeTargets"]}


class Alertmanager(_Listening):
    def __init__(self, folder: Path, config: str) -> None:
        (folder / "alertmanager.yml").write_text(config)
        data = f"--storage.path={folder / 'alertmanager'}"
        words = [f"--config.file={folder / 'alertmanager.yml'}", data, "--cluster.listen-address="]
        program = installed("alertmanager", "prometheus-alertmanager")
        super().__init__([program, *words], folder, "alertmanager")


class Receiver:
    """Somebody's pager: keeps each alert that Alertmanager posts to it."""

    def __init__(self) -> None:
        self.alerts: list[Json] = []
        alerts = self.alerts

        class Post(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                alerts.extend(json.loads(body)["alerts"])
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Post)
        self.url = f"http://127.0.0.1:{self._server.server_port}/"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def got(self, name: str, status: str) -> Json | None:
        """The first alert of that name that came with that status, firing or resolved."""
        found: Iterator[Json] = (
            alert
            for alert in self.alerts
            if (alert["labels"]["alertname"], alert["status"]) == (name, status)
        )
        return next(found, None)
