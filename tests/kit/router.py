"""A small imitation of llama-server as a router, for tests that cannot wait for the real one or not have it.

It shares no code with our client, and is judged by recordings of the real one (`tests/lmstudio/test_router.py`).
What it answers it makes up; how it loads, unloads, sleeps, pushes out and fails is as over there.
"""

import contextlib
import json
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

Json = Any
RUNNING = ("loading", "loaded", "sleeping")
# What a loaded model says of itself beside its name.
ABOUT = {"vocab_type": 1, "n_vocab": 1280, "n_ctx": 8192, "n_ctx_train": 8192, "n_embd": 64}


class Refused(Exception):
    def __init__(self, status: int, message: str, kind: str) -> None:
        super().__init__(message)
        self.status = status
        self.error = {"error": {"code": status, "message": message, "type": kind}}


class Row:
    """One model, and the process that it has or had."""

    def __init__(self, key: str, size: int, load_seconds: float, aliases: tuple[str, ...]) -> None:
        self.key, self.size, self.load_seconds, self.aliases = key, size, load_seconds, aliases
        self.value = "unloaded"
        self.exit_code: int | None = None
        self.port = 0
        self.used = 0.0
        self.answering = 0
        self.stopping = False
        self.broken = False


class Router:
    """It listens from the beginning. `most` models at a time; `sleep` is the idle seconds that its models are given."""

    def __init__(self, *, most: int = 4, sleep: int | None = None) -> None:
        self.most, self.sleep_seconds = most, sleep
        self.rows: dict[str, Row] = {}
        self.loads: Counter[str] = Counter()
        self.served: Counter[str] = Counter()
        self.asked: list[str] = []
        self.answer_seconds = 0.0
        self._changed = threading.Condition()
        self._ports = iter(range(40000, 60000))
        self._told: list[str] = []
        self._server: ThreadingHTTPServer | None = None
        self.port = 0

    def model(
        self, key: str, *, size: int = 1043712, load_seconds: float = 0.05, aliases: tuple[str, ...] = ()
    ) -> Row:
        row = self.rows[key] = Row(key, size, load_seconds, aliases)
        return row

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        router = self

        class Handler(_Handler):
            of = router

        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def kill(self) -> None:
        """Its models go with it, without a word."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None
        with self._changed:
            for row in self.rows.values():
                row.value, row.exit_code, row.stopping = "unloaded", None, False
            self._changed.notify_all()

    # --- what its models do -----------------------------------------------------------------------------

    def states(self) -> dict[str, str]:
        return {key: row.value for key, row in self.rows.items()}

    def kill_process(self, key: str) -> None:
        self._becomes(self.rows[key], "unloaded", exit_code=1)

    def falls_asleep(self, key: str) -> None:
        self._becomes(self.rows[key], "sleeping")

    def _becomes(self, row: Row, value: str, exit_code: int | None = None, **more: Json) -> None:
        with self._changed:
            row.value, row.stopping, row.exit_code = value, False, exit_code
            data = {"status": value, **({} if exit_code is None else {"exit_code": exit_code}), **more}
            self._tell(row, "status_change", data)

    def _tell(self, row: Row, event: str, data: Json) -> None:
        self._told.append(json.dumps({"model": row.key, "event": event, "data": data}, separators=(",", ":")))
        self._changed.notify_all()

    def _running(self) -> list[Row]:
        return [row for row in self.rows.values() if row.value in RUNNING]

    def load(self, row: Row) -> None:
        with self._changed:
            if self.most and len(self._running()) >= self.most:
                idle = [r for r in self._running() if not r.answering and r.value != "loading"]
                if idle:
                    idle.sort(key=lambda r: r.used)
                    self._stop(idle[0])
                    self._changed.wait_for(lambda: idle[0].value == "unloaded", 30)
            if self.most and len(self._running()) >= self.most:
                raise Refused(500, "model limit reached, try again later", "server_error")
            row.value, row.exit_code, row.port, row.used = (
                "loading",
                None,
                next(self._ports),
                time.monotonic(),
            )
            self.loads[row.key] += 1
            self._tell(row, "model_status", {"status": "loading"})
        threading.Thread(target=self._loading, args=(row, row.port), daemon=True).start()

    def _loading(self, row: Row, port: int) -> None:
        for done in (0.0, 0.25, 0.5, 0.75, 1.0):
            with self._changed:
                if row.value != "loading" or row.port != port:
                    return
                progress = {"stages": ["text_model"], "current": "text_model", "value": done}
                self._tell(row, "status_change", {"status": "loading", "progress": progress})
            if row.broken:
                self._becomes(row, "unloaded", exit_code=1)
                return
            time.sleep(row.load_seconds / 5)
        with self._changed:
            if row.value == "loading" and row.port == port:
                self._becomes(row, "loaded", info={"id": row.key})

    def unload(self, row: Row) -> None:
        with self._changed:
            if row.value == "loading":
                self._becomes(row, "unloaded", exit_code=1)
            else:
                self._stop(row)

    def _stop(self, row: Row) -> None:
        if not row.stopping:
            row.stopping = True
            threading.Timer(0.05, self._becomes, (row, "unloaded", 0)).start()

    # --- what it answers --------------------------------------------------------------------------------

    def found(self, name: Json) -> Row | None:
        return next((row for row in self.rows.values() if name == row.key or name in row.aliases), None)

    def listing(self) -> Json:
        return {"data": [self._listed(row) for row in self.rows.values()], "object": "list"}

    def _listed(self, row: Row) -> Json:
        args = ["llama-server", "--host", "127.0.0.1", "--port", str(row.port), "--alias", row.key]
        args += [] if self.sleep_seconds is None else ["--sleep-idle-seconds", str(self.sleep_seconds)]
        status: Json = {"value": row.value, "args": args}
        if row.value == "unloaded" and row.exit_code:
            status |= {"exit_code": row.exit_code, "failed": True}
        listed = {
            "id": row.key,
            "aliases": list(row.aliases),
            "tags": [],
            "object": "model",
            "owned_by": "llamacpp",
        }
        listed |= {"created": int(time.time()), "status": status, "source": "models_dir", "can_remove": False}
        listed["architecture"] = {"input_modalities": ["text"], "output_modalities": ["text"]}
        return listed | ({"meta": {**ABOUT, "size": row.size}} if row.value in ("loaded", "sleeping") else {})

    def ready(self, name: Json, *, autoload: bool) -> Row:
        """What is asked for, in memory; a load if need be."""
        if not name:
            raise Refused(400, "model name is missing from the request", "invalid_request_error")
        row = self.found(name)
        if row is None:
            raise Refused(400, f"model '{name}' not found", "invalid_request_error")
        with self._changed:
            if row.value not in RUNNING and not autoload:
                raise Refused(400, "model is not loaded", "invalid_request_error")
            if row.value == "sleeping":
                self._becomes(row, "loaded")
            if row.stopping:
                self._changed.wait_for(lambda: row.value == "unloaded", 30)
            if row.value == "unloaded":
                self.load(row)
            self._changed.wait_for(lambda: row.value != "loading", 60)
            if row.value != "loaded":
                raise Refused(500, f"model name={row.key} failed to load", "server_error")
            row.used = time.monotonic()
            row.answering += 1
        return row

    def answer(self, method: str, target: str, body: Json) -> Json:
        path, query = urlsplit(target).path, parse_qs(urlsplit(target).query)
        autoload = query.get("autoload", ["true"])[0] == "true"
        match method, path:
            case "GET", "/health":
                return {"status": "ok"}
            case "GET", "/props" if "model" not in query:
                return {"role": "router", "max_instances": self.most, "models_autoload": True}
            case "GET", "/v1/models" | "/models":
                with self._changed:
                    return self.listing()
            case "GET", "/slots":
                row = self.ready(query.get("model", [""])[0], autoload=autoload)
                row.answering -= 1
                return [{"id": 0, "is_processing": row.answering > 0}]
            case "POST", "/models/load" | "/models/unload":
                return self._told_to(path, self.found(body.get("model")))
            case "POST", "/v1/chat/completions" | "/v1/embeddings":
                row = self.ready(body.get("model"), autoload=autoload)
                self.served[row.key] += 1
                try:
                    time.sleep(self.answer_seconds)
                    return self._said(row)
                finally:
                    row.answering -= 1
        raise Refused(404, "File Not Found", "not_found_error")

    def _told_to(self, path: str, row: Row | None) -> Json:
        loads = path.endswith("/load")
        if row is None and loads:
            raise Refused(404, "File Not Found", "not_found_error")
        if row is None:
            raise Refused(400, "model is not found", "invalid_request_error")
        if loads and row.value in RUNNING:
            raise Refused(400, "model is already running", "invalid_request_error")
        if not loads and row.value not in RUNNING:
            raise Refused(400, "model is not running", "invalid_request_error")
        (self.load if loads else self.unload)(row)
        return {"success": True}

    def _said(self, row: Row) -> Json:
        message = {"role": "assistant", "content": " vebi"}
        return {
            "choices": [{"finish_reason": "length", "index": 0, "message": message}],
            "created": int(time.time()),
            "model": row.key,
            "object": "chat.completion",
            "usage": {"completion_tokens": 1, "prompt_tokens": 25, "total_tokens": 26},
        }

    def events(self, at: int) -> tuple[int, list[str]]:
        with self._changed:
            self._changed.wait_for(lambda: len(self._told) > at or self._server is None, 0.2)
            return len(self._told), self._told[at:]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    of: Router

    def do_GET(self) -> None:
        self._do()

    def do_POST(self) -> None:
        self._do()

    def _do(self) -> None:
        self.of.asked.append(f"{self.command} {self.path}")
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path == "/models/sse":
            self._stream()
            return
        try:
            status, answer = 200, self.of.answer(self.command, self.path, json.loads(content or b"{}"))
        except Refused as error:
            status, answer = error.status, error.error
        if self.of._server is None:
            self.close_connection = True  # killed meanwhile
            return
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _stream(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        at = len(self.of._told)  # one program
        while self.of._server is not None:
            at, told = self.of.events(at)
            for event in told:
                self.wfile.write(f"data: {event}\n\n".encode())

    def handle(self) -> None:
        with contextlib.suppress(OSError):  # whoever asked has left
            super().handle()

    def log_message(self, *_: Any) -> None:
        pass
