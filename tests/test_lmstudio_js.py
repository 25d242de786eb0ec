"""LM Studio's own JavaScript SDK is the strictest judge: it checks each message against its schemas, and says what is
wrong with it. It meets the simulator as it would LM Studio, alone and through us.
"""

import asyncio
import contextlib
import json
import shutil
from pathlib import Path

import pytest

from keepalive.simulator.models import SimModel
from tests.kit import PROJECT, live
from tests.kit.npm import packages

JUDGE = PROJECT / "tests" / "data" / "lmstudio-js"
KEPT = SimModel("acme/chat-8b", load_seconds=600.0, max_context_length=32_768, params="8B")
SMALL = SimModel("acme/small-1b", load_seconds=0.3)
EMBED = SimModel("text-embedding-tiny", kind="embedding", load_seconds=0.3, max_context_length=2_048)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the judge sits, beside its packages."""
    (tmp_path / "node_modules").symlink_to(packages(JUDGE / "package.json", "LM Studio's SDK"))
    shutil.copy(JUDGE / "judge.mjs", tmp_path)
    return tmp_path


class Judge:
    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    async def verdict(self) -> dict[str, object]:
        """What came of each step; nothing was wrong with any message."""
        out, err = await asyncio.wait_for(self.process.communicate(), live.PATIENCE)

        assert err.decode() == ""
        return dict(json.loads(line) for line in out.splitlines())


@contextlib.asynccontextmanager
async def judge(folder: Path, url: str, *steps: str):
    process = await asyncio.create_subprocess_exec(
        "node",
        "judge.mjs",
        url.replace("http", "ws", 1),
        *steps,
        cwd=folder,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        yield Judge(process)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


@contextlib.asynccontextmanager
async def met(way: str, *keys: str, **faults: object):
    """A simulator, and where it is asked: itself, or a keepalive in front of it that keeps these."""
    async with live.simulator(KEPT, SMALL, EMBED, **faults) as server:
        if way == "alone":
            yield server.url, server.studio
            return
        async with live.daemon(live.settings(server.url, *(keys or ("acme/absent",)))) as running:
            yield running.url, server.studio


@pytest.mark.parametrize("way", ["alone", "through"])
async def test_it_lists_loads_with_progress_answers_embeds_and_unloads(way: str, folder: Path):
    steps = (
        "downloaded",
        f"load={SMALL.key}",
        "loaded",
        f"get={SMALL.key}",
        f"answer={SMALL.key}",
        f"embed={EMBED.key}",
        "unload=mine",
    )
    async with met(way, answer_tokens=5) as (url, studio), judge(folder, url, *steps) as judging:
        found = await judging.verdict()

        assert found == {
            "downloaded": [["llm", KEPT.key], ["llm", SMALL.key], ["embedding", EMBED.key]],
            "load": ["mine", SMALL.key, 2_048, 2_048, True],
            "loaded": ["mine"],
            "get": "mine",
            "answer": ["This answer comes from a", "eosFound", SMALL.key],
            "embed": 8,
            "unload": None,
        }
        assert list(studio.memory.instances) == [EMBED.key]


async def test_it_waits_for_the_one_load_of_a_cold_model(folder: Path):
    async with (
        met("through", KEPT.key, answer_tokens=3) as (url, studio),
        judge(folder, url, f"hear={KEPT.key}", f"get={KEPT.key}", f"answer={KEPT.key}", "loaded") as judging,
    ):
        # It is told how far the load is, and its schemas have nothing against it.
        await live.until(lambda: studio.memory.loads, "it is being loaded")
        studio.advance(300)
        heard = await asyncio.wait_for(judging.process.stdout.readline(), live.PATIENCE)
        await live.let_it_load(studio)
        found = await judging.verdict()

        assert found == {
            "get": KEPT.key,
            "answer": ["This answer comes", "eosFound", KEPT.key],
            "loaded": [KEPT.key],
        }
        assert json.loads(heard) == ["hear", True]
        assert live.loads(studio) == 1
