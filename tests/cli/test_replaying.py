"""`keepalive replay`, as it is typed."""

import json
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from keepalive.cli import replaying
from keepalive.config import parse
from keepalive.core.errors import KeepaliveError
from keepalive.observers.history.past import past_loads
from keepalive.observers.history.store import Place, Store
from keepalive.observers.history.story import Asked

TRACE = "second,model,answer_seconds\n" + "".join(f"{60 * n},{'abc'[n % 3]},5\n" for n in range(30))
MODELS = "model,gigabytes,load_seconds\na,9,10\nb,9,20\nc,9,30\n"


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    (tmp_path / "trace.csv").write_text(TRACE)
    (tmp_path / "models.csv").write_text(MODELS, encoding="utf-8-sig")  # as spreadsheets write it
    return tmp_path / "trace.csv", tmp_path / "models.csv"


def typed(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "keepalive", "replay", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


def test_a_table_json_and_a_picture(files: tuple[Path, Path], tmp_path: Path):
    trace, models = files
    said = typed(trace, "--models", models, "--memory", "20GB", "--json", "--plot", tmp_path / "x.svg")

    assert said.stderr == ""
    reports = json.loads(said.stdout)
    assert [r["policy"] for r in reports] == ["ours", "lru", "auto-evict", "clairvoyant"]
    assert list(reports[0]) == list(replaying.FIELDS)
    assert reports[2]["hours_waited"] >= reports[1]["hours_waited"] >= reports[3]["hours_waited"]
    assert (tmp_path / "x.svg").read_text().startswith("<svg")


def test_what_is_wrong_is_one_sentence(files: tuple[Path, Path], tmp_path: Path):
    trace, models = files

    def wrong(**changes: object) -> str:
        given = {
            "trace": trace,
            "settings": None,
            "models": models,
            "memory": "20GB",
            "policies": [],
        }

        def go(trace: Path, **more: Any) -> None:
            replaying.run(replaying.read(trace, None), **more)

        with pytest.raises(KeepaliveError) as raised:
            go(**{**given, **changes})  # type: ignore[arg-type]
        return str(raised.value).replace(str(tmp_path), "")

    assert wrong(policies=["lrru"]) == '--policy: "lrru" is not known; write lru'
    assert wrong(trace=tmp_path / "none") == "/none: cannot be read: No such file or directory"
    assert (
        wrong(memory="20")
        == '--memory: "20" is no size; write a number and a unit, such as "40GiB" or "4.5GB"'
    )
    assert wrong(models=None) == (
        "nothing tells what a takes and how long it loads; write it into a file with model,gigabytes,load_seconds "
        "and name that with --models"
    )


def test_the_config_says_what_is_kept_and_how_much_there_is(files: tuple[Path, Path]):
    trace, models = files
    text = '[[upstreams]]\nurl = "http://x"\nmemory = "20GB"\n[[models]]\nkey = "a"\n'

    settings = parse(text, "test", {})
    reports = replaying.run(replaying.read(trace, settings), settings, models, None, ["ours"])

    # Loaded at the start, for which its first request waits, and there ever after; the others take turns.
    assert [at for at, model, _ in reports[0].outcome.waits if model == "a"] == [0]
    assert len([at for at, model, _ in reports[0].outcome.waits if model == "b"]) > 5


HERE, THERE = "http://127.0.0.1:1234", "http://far:1234"


@pytest.fixture
def history(tmp_path: Path) -> Path:
    path = tmp_path / "state" / "history.db"
    with closing(Store(path, 0.0, 900.0)) as store:
        rows = [(Place(HERE, "abc"[n % 3]), Asked(60.0 * n + 0.25, 5.0)) for n in range(9)]
        store.write([*rows, (Place(THERE, 'odd,"key"'), Asked(7.0, 1.0))], 900.0)
    return path


def test_the_history_is_a_trace_and_is_written_as_one(
    history: Path, files: tuple[Path, Path], tmp_path: Path
):
    config, out = tmp_path / "config.toml", tmp_path / "out.csv"
    server = f'[server]\nstate_dir = "{history.parent}"\nunlisted = "auto"\n'
    config.write_text(f'{server}[[upstreams]]\nurl = "{HERE}"\nmemory = "20GB"\n')

    said = typed("-c", config, "--export", "-")
    every = replaying.read(history, None)
    replaying.export(every, out)

    assert (said.returncode, said.stderr) == (0, "")
    assert said.stdout.splitlines()[:3] == ["second,model,answer_seconds", "0.250,a,5.000", "60.250,b,5.000"]
    assert len(said.stdout.splitlines()) == 10
    assert '7.000,"odd,""key""",1.000' in out.read_text().splitlines()
    assert replaying.read(out, None) == every
    report = replaying.run(every, None, files[1], "20GB", ["ours"])[0]
    assert report.left_out == ('odd,"key"',)
    assert report.waited_share > 0


def test_a_history_without_requests_says_so(tmp_path: Path):
    path = tmp_path / "history.db"
    Store(path, 0.0, 900.0).close()
    with pytest.raises(KeepaliveError, match="there is no request in it yet"):
        replaying.read(path, None)
    with closing(sqlite3.connect(path)) as database:
        database.execute("DROP TABLE requests")  # as version 1.0 has written it
    with pytest.raises(KeepaliveError, match="it tells of no requests"):
        replaying.read(path, None)
    with pytest.raises(KeepaliveError, match="there is no history"):
        replaying.read(None, parse('[server]\nunlisted = "auto"\n', "test", {}))


def test_what_is_no_history_tells_nothing(tmp_path: Path):
    (tmp_path / "torn").write_bytes(b"no database")

    assert past_loads(tmp_path / "torn", "http://x") == {}
    assert past_loads(tmp_path / "none", "http://x") == {}
    assert not (tmp_path / "none").exists()
