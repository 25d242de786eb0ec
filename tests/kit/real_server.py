"""An inference server that nobody here wrote, for the tests: `transformers serve`.

It loads a model on the first request for it and drops it after some idle seconds, which is what a keep-alive
is for. `tests.kit.installed` installs it. The same file makes the model, with that environment's Python.
"""

import contextlib
import fcntl
import hashlib
import http.client
import inspect
import itertools
import json
import os
import signal
import socket
import string
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from tests.kit import PROJECT
from tests.kit.installed import TRANSFORMERS

# Only a broken server reaches these, on the busiest machine.
START_TIMEOUT = 240.0
ANSWER_TIMEOUT = 120.0


def made_model() -> Path:
    """A model of random weights, made by the first who ever asks for it; all others wait for it, or find it there.

    It lies beside the server that it is for, since to make it takes as long as to start that; and by what makes it.
    """
    made_by = hashlib.sha256(inspect.getsource(_make_model).encode()).hexdigest()[:12]
    path = TRANSFORMERS.folder / f"random-32m-{made_by}"
    stamp, locked = (path.with_name(f"{path.name}.{what}") for what in ("made", "lock"))
    with locked.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not stamp.exists():
            make_model(path)
            stamp.touch()
    return path


def make_model(path: Path) -> None:
    """Write it, with the server's own library."""
    command = [TRANSFORMERS.program("python"), "-m", "tests.kit.real_server", "make-model", path]
    made = subprocess.run(command, env=_environment(path.parent), cwd=PROJECT, capture_output=True, text=True)
    if made.returncode:
        raise RuntimeError(f"the model could not be made:\n{made.stderr}")


def _environment(home: Path) -> dict[str, str]:
    """Without the network, and with an empty model cache: the server fails to list one that is missing."""
    hub = home / "hub"
    hub.mkdir(exist_ok=True)
    # A token or a mirror of the person who runs the tests is none of the server's business.
    outer = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
    # Threads of several servers on few cores hold each other up, and make short answers slow at random.
    outer |= {"OMP_NUM_THREADS": "1"}
    quiet = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONUNBUFFERED": "1"}
    return {**outer, **quiet, "HF_HUB_OFFLINE": "1", "HF_HOME": str(home), "HF_HUB_CACHE": str(hub)}


def _make_model(path: str) -> None:
    """In the server's environment. Small, but with as many words as large models have: reading those takes
    a second, so that a cold start stands out from the noise of a busy machine."""
    import torch  # type: ignore[import-not-found]  # only the server's environment has these
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # type: ignore[import-not-found]
    from transformers import (  # type: ignore[import-not-found]
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
    )

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<s>", "</s>", "<unk>", *letters]
    spellings = (itertools.product(string.ascii_lowercase, repeat=length) for length in (2, 3, 4))
    merged = ["".join(s) for s in itertools.islice(itertools.chain.from_iterable(spellings), 250_000)]
    vocabulary = {word: number for number, word in enumerate(words + merged)}
    merges = [(word[:-1], word[-1]) for word in merged]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=template,
    ).save_pretrained(path)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(path)


class RealServer:
    """One `transformers serve` process on a port of its own, which it keeps over restarts."""

    def __init__(self, home: Path, *, idle_seconds: int) -> None:
        home.mkdir(exist_ok=True)
        self._home = home
        self._idle_seconds = idle_seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._lives = 0
        # Held from now on, so that the kernel gives it to nobody else; the server sets SO_REUSEADDR and gets it.
        self._held = socket.socket()
        self._held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._held.bind(("127.0.0.1", 0))
        self.port: int = self._held.getsockname()[1]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._held.close()

    def start(self) -> None:
        """Return at once; `wait` for it."""
        self._lives += 1
        command = [TRANSFORMERS.program("transformers"), "serve", "--device", "cpu", "--host", "127.0.0.1"]
        command += ["--port", str(self.port), "--model-timeout", str(self._idle_seconds)]
        # At `info` it says when it has dropped a model.
        command += ["--log-level", "info"]
        with self._log_path.open("wb") as log:
            self._process = subprocess.Popen(
                command, env=_environment(self._home), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def wait(self) -> None:
        """Until it answers."""
        deadline = time.monotonic() + START_TIMEOUT
        while True:
            with contextlib.suppress(OSError, http.client.HTTPException):
                if self.ask("GET", "/health")[0] == 200:
                    return
            ended = self._process is None or self._process.poll() is not None
            if ended or time.monotonic() > deadline:
                raise RuntimeError(f"the server does not answer; its log:\n{self.log()[-4000:]}")
            time.sleep(0.2)

    def kill(self) -> None:
        """As the kernel does when memory runs out: nothing is said, nothing is tidied up."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def resident_mib(self) -> float:
        """Memory of the process, as the kernel counts it."""
        assert self._process is not None
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) / 1024

    @property
    def _log_path(self) -> Path:
        return self._home / f"server-{self._lives}.log"

    def log(self) -> str:
        """What it has written since it was last started."""
        return self._log_path.read_text(errors="replace")

    def loads(self) -> int:
        """How often it has loaded a model since it was last started."""
        return self.log().count("] Loading ")

    def drops(self) -> int:
        """How often it has dropped one for being idle."""
        return self.log().count("was removed from memory after")

    def ask(self, method: str, path: str, body: object = None) -> tuple[int, str, float]:
        """Status, text and seconds, on a connection of its own."""
        began = time.monotonic()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=ANSWER_TIMEOUT)
        try:
            content = None if body is None else json.dumps(body)
            connection.request(method, path, content, {"Content-Type": "application/json"} if content else {})
            answer = connection.getresponse()
            text = answer.read().decode()
            return answer.status, text, time.monotonic() - began
        finally:
            connection.close()

    def chat(self, model: Path) -> float:
        """A user's short question; how many seconds he waits for the answer."""
        messages = [{"role": "user", "content": "hello"}]
        status, text, seconds = self.ask(
            "POST", "/v1/chat/completions", {"model": str(model), "messages": messages, "max_tokens": 2}
        )
        if status != 200:
            raise RuntimeError(f"the server answered {status}: {text}\n{self.log()[-4000:]}")
        answer: dict[str, Any] = json.loads(text)
        assert answer["object"] == "chat.completion"
        return seconds


@contextlib.contextmanager
def started(*servers: RealServer) -> Iterator[None]:
    """All of them up, started side by side; all of them gone at the end."""
    with contextlib.ExitStack() as stack:
        for server in servers:
            stack.enter_context(server)
        for server in servers:
            server.wait()
        yield


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["make-model", path]:
            _make_model(path)
        case _:
            sys.exit("usage: python -m tests.kit.real_server make-model PATH")
