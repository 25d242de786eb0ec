"""What became of the original's figures: `python benchmarks/prompts.py`.

The original orchestrator streamed one answer of 1,999 chunks in 57.9 s without an error, and lost 75 of 100 prompts
to models that were not loaded. Here the daemon does the same, as a process of its own, before a simulated LM
Studio in a second one, asked by the client in Python in this one. Times are shown, and judge nothing: what
counts are chunks, characters, answers lost, and what a prompt costs beside the same chat.
"""

import argparse
import asyncio
import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

from idle import TICKS_PER_SECOND, running

from keepalive import __version__
from keepalive.client import Chunk, Client, ClientError, Done

CHUNKS, CHARACTERS, SECONDS = 1999, 7170, 57.9
# 1,174 words of three letters, 825 of two, and the spaces between them.
ANSWER = " ".join(["abc"] * 1174 + ["ab"] * 825)
PACE = SECONDS / CHUNKS
AT_ONCE = 60
MODELS = 50
LOAD_SECONDS = 120.0
HURRY = 30.0

CONFIG = """
[server]
listen = "127.0.0.1:0"
admin_listen = "127.0.0.1:0"
log_format = "json"
state_dir = {state}
[[upstreams]]
url = "{url}"
max_loading = {models}
[defaults]
refresh_interval = "1s"
ping_interval = "1h"
lease = "3h"
"""


# --- the two processes --------------------------------------------------------------------------------


async def simulate(token_seconds: float, load_seconds: float, times: float) -> None:
    """An LM Studio whose time passes `times` as fast, until stdin ends."""
    from keepalive.simulator.models import SimModel
    from keepalive.simulator.server import serve
    from keepalive.simulator.studio import Studio

    answers = {
        "answer_tokens": CHUNKS,
        "answer_text": ANSWER,
        "token_seconds": token_seconds,
        "parallel": AT_ONCE,
    }
    models = [SimModel(f"model-{n}", load_seconds=load_seconds) for n in range(MODELS)]
    studio = Studio(models, faults={**answers, "prompt_seconds": 0.0})
    async with await serve(studio) as server:
        print(server.url, flush=True)
        end = asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
        while not end.done():
            await asyncio.sleep(0.02)
            studio.advance(0.02 * (times - 1))


class Daemon:
    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.url = ""
        assert process.stderr is not None
        for line in process.stderr:
            record = json.loads(line)
            if record["event"] == "daemon.started":
                self.url = record["listen"]
                break
        # The rest of its log is read, lest it fill the pipe and wait.
        threading.Thread(target=process.stderr.read, daemon=True).start()

    def cpu(self) -> float:
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS_PER_SECOND


@contextlib.contextmanager
def daemon(*, token_seconds: float = 0.0, load_seconds: float = 0.0, times: float = 1.0) -> Iterator[Daemon]:
    command = [sys.executable, __file__, "--simulate", *map(str, (token_seconds, load_seconds, times))]
    pipe = subprocess.PIPE
    with (
        tempfile.TemporaryDirectory(prefix="keepalive-bench-") as folder,
        running(subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)) as upstream,
    ):
        assert upstream.stdout is not None
        url = upstream.stdout.readline().strip()
        text = CONFIG.format(url=url, models=MODELS, state=json.dumps(folder))
        text += "".join(f'[[models]]\nkey = "model-{n}"\n' for n in range(MODELS))
        config = Path(folder, "config.toml")
        config.write_text(text)
        environment = {k: v for k, v in os.environ.items() if not k.upper().startswith("KEEPALIVE_")}
        words = [sys.executable, "-m", "keepalive", "run", "-c", str(config)]
        child = subprocess.Popen(words, stderr=pipe, text=True, env=environment, cwd=folder)
        with running(child):
            yield Daemon(child)


# --- what is measured ---------------------------------------------------------------------------------


async def asked(events: AsyncIterator[object]) -> tuple[int, int, bool]:
    """Chunks, characters, and whether the answer came whole."""
    chunks = characters = 0
    try:
        async for event in events:
            if isinstance(event, Chunk):
                chunks += 1
                characters += len(event.text)
            if isinstance(event, Done):
                return chunks, characters, (event.chunks, event.characters) == (chunks, characters)
    except ClientError as error:
        print(f"    lost: {type(error).__name__}: {error}")
    return chunks, characters, False


async def one_answer(pace: float) -> None:
    with daemon(token_seconds=pace) as subject:
        async with Client(subject.url) as client:
            await client.warmup("model-0")
            began, before = time.monotonic(), subject.cpu()
            chunks, characters, whole = await asked(client.stream_prompt(prompt="x", model="model-0"))
            seconds, used = time.monotonic() - began, subject.cpu() - before
    row("one answer: chunks", f"{chunks:,}", f"{CHUNKS:,}")
    row("one answer: characters", f"{characters:,}", f"{CHARACTERS:,}")
    row("one answer: errors", str(int(not whole)), "0")
    row("one answer: seconds", f"{seconds:.1f}", f"{SECONDS}")
    row("one answer: CPU of the daemon", f"{100 * used / seconds:.1f} %", "")


async def many_at_once(pace: float, tokens: int) -> None:
    messages = [{"role": "user", "content": "x"}]
    costs = []
    with daemon(token_seconds=pace) as subject:
        async with Client(subject.url) as client:
            await client.warmup("model-0")
            for how in ("prompt", "chat") * 2:
                streams: list[AsyncIterator[object]] = [
                    client.stream_prompt(prompt="x", model="model-0", max_tokens=tokens)
                    if how == "prompt"
                    else client.stream_chat("model-0", messages, max_tokens=tokens)
                    for _ in range(AT_ONCE)
                ]
                before = subject.cpu()
                told = await asyncio.gather(*map(asked, streams))
                costs.append((subject.cpu() - before) / sum(chunks for chunks, _, _ in told))
                if how == "prompt":
                    whole = sum(done and chunks == tokens for chunks, _, done in told)
    row(f"{AT_ONCE} at once: whole answers", f"{whole} of {AT_ONCE}", "")
    row(f"{AT_ONCE} at once: CPU per chunk", f"{1e6 * (costs[0] + costs[2]) / 2:.0f} µs", "")
    row("  of a prompt over that of a chat", f"{(costs[0] + costs[2]) / (costs[1] + costs[3]):.2f}", "")


async def cold_starts() -> None:
    whole = 0
    for _ in range(100 // MODELS):
        with daemon(load_seconds=LOAD_SECONDS, times=HURRY) as subject:
            async with Client(subject.url) as client:
                streams = [
                    client.stream_prompt(prompt="x", model=f"model-{n}", max_tokens=20) for n in range(MODELS)
                ]
                whole += sum(done for _, _, done in await asyncio.gather(*map(asked, streams)))
    row(f"100 cold starts of {LOAD_SECONDS:.0f} s: prompts lost", str(100 - whole), "75")


def row(name: str, measured: str, original: str) -> None:
    print(f"  {name:<42}{measured:>12}{original:>14}".rstrip(), flush=True)


async def measure(*, quick: bool) -> None:
    print(f"\n  {'':<42}{'keepalive':>12}{'the original':>14}")
    await one_answer(0.001 if quick else PACE)
    await many_at_once(0.002 if quick else PACE, 100 if quick else 400)
    await cold_starts()
    print(f"\n  The simulator's time passes {HURRY:.0f} times as fast during the cold starts.")


def main() -> None:
    parser = argparse.ArgumentParser(description="The figures of the original, and what became of them.")
    parser.add_argument("--quick", action="store_true", help="faster than a model speaks: does it run at all")
    parser.add_argument("--simulate", type=float, nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.simulate:
        # Ctrl-C reaches this process, too: the end of stdin is enough.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        asyncio.run(simulate(*options.simulate))
        return
    # Ended by a signal, too, it takes its children along.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    print(
        f"keepalive {__version__}, {platform.python_implementation()} {platform.python_version()}, "
        f"{os.cpu_count()} cores, load average before: {os.getloadavg()[0]:.1f}"
    )
    asyncio.run(measure(quick=options.quick))


if __name__ == "__main__":
    main()
