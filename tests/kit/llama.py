"""llama.cpp's own servers, for the tests: a real prompt cache, and models of noise that read a page in seconds.

`LlamaServer` is one with one model, from a wheel; `LlamaRouter` is llama-server itself with as many as lie in a folder.
`tests.kit.installed` installs both. Standard library only, but for what their environments run of this file.
"""

import contextlib
import fcntl
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from tests.kit import PROJECT
from tests.kit.installed import LLAMA, ROUTER, Installation

# Only a broken server reaches these, on the busiest machine.
START_TIMEOUT = 240.0
ANSWER_TIMEOUT = 120.0


def made_model(run_folder: Path, by: Installation = LLAMA) -> Path:
    """The model, made by the first who asks for it in this folder; all others wait for it."""
    path = run_folder / "noise.gguf"
    with (run_folder / "noise.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            made = subprocess.run([*_me(by), "make-model", path], cwd=PROJECT, capture_output=True, text=True)
            if made.returncode:
                raise RuntimeError(f"the model could not be made:\n{made.stderr}")
    return path


def _me(by: Installation) -> list[str]:
    return [by.program("python"), "-m", "tests.kit.llama"]


class LlamaServer:
    """One server process with one model, on a port of its own."""

    def __init__(self, home: Path, model: Path, *, slots: int) -> None:
        self._log = home / "llama.log"
        with self._log.open("wb") as log:
            command = [*_me(LLAMA), "serve", model, str(slots)]
            self._process = subprocess.Popen(
                command, cwd=PROJECT, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        deadline = time.monotonic() + START_TIMEOUT
        while not self.port:
            said = self._log.read_text(errors="replace")
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.__exit__()
                raise RuntimeError(f"the server does not answer; its log:\n{said[-4000:]}")
            _, marked, rest = said.partition("\nSERVES http://127.0.0.1:")
            if marked and "\n" in rest:
                self.port = int(rest.partition("\n")[0])
            time.sleep(0.1)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()


class LlamaRouter:
    """llama-server as a router, with copies of one model under several names. Its port stays over its lives."""

    def __init__(
        self, home: Path, model: Path, keys: Sequence[str], *, most: int = 4, sleep: int | None = None
    ) -> None:
        models = home / "models"
        models.mkdir()
        for key in keys:
            (models / f"{key}.gguf").symlink_to(model)
        self._models, self._most, self._sleep = models, most, sleep
        self._log = home / "router.log"
        self._process: subprocess.Popen[bytes] | None = None
        # Held from now on, so that the kernel gives it to nobody else; the server sets SO_REUSEADDR and gets it.
        self._held = socket.socket()
        self._held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._held.bind(("127.0.0.1", 0))
        self.port: int = self._held.getsockname()[1]

    def breaks(self, key: str) -> None:
        """From now on its file is one that no load survives."""
        path = self._models / f"{key}.gguf"
        path.unlink()
        path.write_bytes(b"GGUF" + bytes(1000))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._held.close()

    def start(self) -> None:
        command = [
            ROUTER.program("llama-server"),
            "--models-dir",
            str(self._models),
            "--port",
            str(self.port),
        ]
        command += [
            "--models-max",
            str(self._most),
            "--ctx-size",
            "8192",
            "--parallel",
            "2",
            "--threads",
            "1",
        ]
        command += [] if self._sleep is None else ["--sleep-idle-seconds", str(self._sleep)]
        # What it is to do says this test alone, and nothing is looked for on the network.
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("LLAMA_", "HF_"))}
        environment["LLAMA_CACHE"] = str(self._models.parent / "cache")
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        deadline = time.monotonic() + START_TIMEOUT
        while True:
            # It may answer before it knows its models, with an error.
            with contextlib.suppress(OSError, http.client.HTTPException, LookupError):
                self.states()
                return
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise RuntimeError(f"the router does not answer; its log:\n{self.log()[-4000:]}")
            time.sleep(0.1)

    def kill(self) -> None:
        """As the kernel does when memory runs out: nothing is said. Its models end because it is gone."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def kill_process(self, key: str) -> None:
        """The same, of one model."""
        os.kill(self.processes()[key], signal.SIGKILL)

    def processes(self) -> dict[str, int]:
        """Those that its models run in, by their names."""
        assert self._process is not None
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                if parent == self._process.pid and "--alias" in words:
                    found[words[words.index("--alias") + 1]] = int(folder.name)
        return found

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def loads(self, key: str) -> int:
        """How many processes it has begun for a model."""
        return self.log().count(f"spawning server instance with name={key} on port")

    def states(self) -> dict[str, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=ANSWER_TIMEOUT)
        with contextlib.closing(connection):
            connection.request("GET", "/models")
            rows = json.loads(connection.getresponse().read())["data"]
        return {row["id"]: row["status"]["value"] for row in rows}


def ask(url: str, messages: list[dict[str, str]], model: Path) -> dict[str, Any]:
    """One token, past or through the daemon; the answer, with how much of the prompt was read."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=ANSWER_TIMEOUT)
    with contextlib.closing(connection):
        body = json.dumps({"model": str(model), "messages": messages, "max_tokens": 1})
        connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        text = answer.read().decode()
        assert answer.status == 200, text
        return dict(json.loads(text))


# --- in the server's environment ------------------------------------------------------------------------


def _serve(path: str, slots: str) -> None:
    import xllamacpp  # type: ignore[import-not-found]  # only the server's environment has it

    given = xllamacpp.CommonParams()
    given.model.path = path
    given.port = 0
    given.n_parallel = int(slots)
    given.n_ctx = 8192 * int(slots)
    given.cpuparams.n_threads = 1
    given.warmup = False
    server = xllamacpp.Server(given)
    print(f"\nSERVES {server.listening_address}\n", flush=True)
    while True:
        time.sleep(3600)


TEMPLATE = (
    "{%- for m in messages -%}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
WIDTH, HEAD, LAYERS, CONTEXT = 64, 16, 4, 8192


def _make_model(path: str) -> None:
    """A complete model of the kind "llama", tokenizer and template included, whose weights are noise."""
    import gguf  # type: ignore[import-not-found]  # only the server's environment has these
    import numpy as np  # type: ignore[import-not-found,unused-ignore]

    kind = gguf.TokenType
    tokens = [("<unk>", kind.UNKNOWN)]
    tokens += [(special, kind.CONTROL) for special in ("<s>", "</s>", "<|im_start|>", "<|im_end|>")]
    tokens += [(f"<0x{byte:02X}>", kind.BYTE) for byte in range(256)]
    tokens += [(chr(code), kind.NORMAL) for code in range(0x21, 0x7F)] + [("\u2581", kind.NORMAL)]
    noise = np.random.default_rng(1)

    def of(*shape: int) -> Any:
        return noise.standard_normal(shape, np.float32) / np.float32(shape[-1] ** 0.5)

    def ones() -> Any:
        return np.ones(WIDTH, np.float32)

    made = gguf.GGUFWriter(f"{path}.part", "llama")
    made.add_name("noise")
    made.add_context_length(CONTEXT)
    made.add_embedding_length(WIDTH)
    made.add_block_count(LAYERS)
    made.add_feed_forward_length(4 * WIDTH)
    made.add_head_count(WIDTH // HEAD)
    made.add_head_count_kv(WIDTH // HEAD)
    made.add_layer_norm_rms_eps(1e-5)
    made.add_rope_dimension_count(HEAD)
    made.add_vocab_size(len(tokens))
    made.add_tokenizer_model("llama")
    made.add_tokenizer_pre("default")
    made.add_token_list([token for token, _ in tokens])
    made.add_token_scores([0.0] * len(tokens))
    made.add_token_types([int(of_kind) for _, of_kind in tokens])
    made.add_unk_token_id(0)
    made.add_bos_token_id(1)
    made.add_eos_token_id(4)
    made.add_add_bos_token(True)
    made.add_chat_template(TEMPLATE)
    tensors = {"token_embd": of(len(tokens), WIDTH), "output_norm": ones(), "output": of(len(tokens), WIDTH)}
    for n in range(LAYERS):
        tensors |= {f"blk.{n}.{norm}": ones() for norm in ("attn_norm", "ffn_norm")}
        tensors |= {f"blk.{n}.attn_{part}": of(WIDTH, WIDTH) for part in ("q", "k", "v", "output")}
        tensors |= {f"blk.{n}.ffn_{part}": of(4 * WIDTH, WIDTH) for part in ("gate", "up")}
        tensors[f"blk.{n}.ffn_down"] = of(WIDTH, 4 * WIDTH)
    for name, tensor in tensors.items():
        made.add_tensor(f"{name}.weight", tensor)
    made.write_header_to_file()
    made.write_kv_data_to_file()
    made.write_tensors_to_file()
    made.close()
    Path(f"{path}.part").rename(path)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["make-model", path]:
            _make_model(path)
        case ["serve", path, slots]:
            _serve(path, slots)
        case _:
            sys.exit("usage: python -m tests.kit.llama make-model PATH | serve PATH SLOTS")
