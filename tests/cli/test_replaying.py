"""`keepalive replay`, as it is typed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from keepalive.cli import replaying
from keepalive.config import parse
from keepalive.core.errors import KeepaliveError
from keepalive.observers.history.past import past_loads

TRACE = "second,model,answer_seconds\n" + "".join(f"{60 * n},{'abc'[n % 3]},5\n" for n in range(30))
MODELS = "model,gigabytes,load_seconds\na,9,10\nb,9,20\nc,9,30\n"


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    (tmp_path / "trace.csv").write_text(TRACE)
    (tmp_path / "models.csv").write_text(MODELS)
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
            "environ": {},
        }
        with pytest.raises(KeepaliveError) as raised:
            replaying.run(**{**given, **changes})  # type: ignore[arg-type]
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

    reports = replaying.run(trace, parse(text, "test", {}), models, None, ["ours"], {})

    # Loaded at the start, for which its first request waits, and there ever after; the others take turns.
    assert [at for at, model, _ in reports[0].outcome.waits if model == "a"] == [0]
    assert len([at for at, model, _ in reports[0].outcome.waits if model == "b"]) > 5


def test_what_is_no_history_tells_nothing(tmp_path: Path):
    (tmp_path / "torn").write_bytes(b"no database")

    assert past_loads(tmp_path / "torn", "http://x") == {}
    assert past_loads(tmp_path / "none", "http://x") == {}
    assert not (tmp_path / "none").exists()
