"""What people install: a wheel and a source archive that build, say what they are, and run where nothing else is."""

import os
import signal
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from collections.abc import Iterator
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import pytest

from keepalive import __version__
from tests.kit import PROJECT
from tests.kit.live import Running, ending, environment, wait_until

pytestmark = pytest.mark.xdist_group("package")

WHEEL = f"keepalive-{__version__}-py3-none-any.whl"


def build(source: Path, into: Path) -> None:
    words = [sys.executable, "-m", "hatchling", "build", "-d", str(into)]
    subprocess.run(words, cwd=source, check=True, capture_output=True)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    build(PROJECT, folder)
    return folder


@pytest.fixture(scope="module")
def source(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source archive, unpacked."""
    folder = tmp_path_factory.mktemp("source")
    with tarfile.open(built / f"keepalive-{__version__}.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder / f"keepalive-{__version__}"


@pytest.fixture(scope="module")
def fresh(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment in which the wheel is installed, and what it needs: from where that lies here, not the network."""
    folder = tmp_path_factory.mktemp("fresh") / "env"
    venv.create(folder, symlinks=True)
    packages = next(folder.glob("lib/python3*/site-packages"))
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(folder),
        "--disable-pip-version-check",
        "install",
        "--quiet",
    ]
    subprocess.run([*pip, "--no-deps", "--no-index", str(built / WHEEL)], check=True)
    (packages / "needs.pth").write_text(sysconfig.get_path("purelib"))
    return folder


@pytest.fixture(scope="module")
def metadata(built: Path) -> Message:
    with zipfile.ZipFile(built / WHEEL) as wheel:
        return message_from_bytes(wheel.read(f"keepalive-{__version__}.dist-info/METADATA"))


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as opened:
        return set(opened.namelist())


def test_the_source_builds_the_same_wheel(built: Path, source: Path, tmp_path: Path) -> None:
    build(source, tmp_path)

    assert names(tmp_path / WHEEL) == names(built / WHEEL)


def test_the_wheel_holds_the_page_the_types_and_no_test(built: Path) -> None:
    held = names(built / WHEEL)

    assert {"keepalive/assets/index.html", "keepalive/assets/keepalive.js", "keepalive/py.typed"} <= held
    assert {path.relative_to(PROJECT).as_posix() for path in (PROJECT / "keepalive").rglob("*.py")} <= held
    assert not [name for name in held if name.startswith("tests")]


def test_the_source_holds_what_a_contributor_and_an_operator_need(source: Path) -> None:
    for name in ("Makefile", "README.md", "CONTRIBUTING.md", "LICENSE", "config.toml", "desktop/keepalive.service",
                 "systemd/install", "docs/operations.md", "monitoring/README.md", "tests/conftest.py"):  # fmt: skip
        assert (source / name).is_file(), name
    assert os.access(source / "systemd/install", os.X_OK)


def test_it_says_what_it_is(metadata: Message) -> None:
    assert (metadata["Name"], metadata["Version"], metadata["License-Expression"]) == (
        "keepalive",
        __version__,
        "MIT",
    )
    assert metadata["Requires-Python"] == ">=3.11"
    assert "notify" in metadata.get_all("Provides-Extra", [])
    assert "Typing :: Typed" in metadata.get_all("Classifier", [])
    assert metadata.get_payload().startswith("# keepalive\n")
    assert metadata["Project-URL"] is None


@pytest.fixture
def demo(fresh: Path, tmp_path: Path) -> Iterator[Running]:
    running = Running([str(fresh / "bin/keepalive"), "demo"], tmp_path, "demo", PYTHONPATH="")
    with ending(running):
        yield running


def test_the_demonstration_runs_where_nothing_but_the_wheel_is_installed(demo: Running, fresh: Path) -> None:
    wait_until(lambda: "medicine-llm is loading" in demo.out.read_text(), "the story begins")
    demo.signal(signal.SIGTERM)
    code = demo.ended()
    module = subprocess.run(
        [fresh / "bin/python", "-c", "import keepalive.client; print(keepalive.__file__)"],
        env=environment(PYTHONPATH=""),
        cwd=fresh,
        capture_output=True,
        text=True,
        check=True,
    )

    assert (code, demo.err.read_text()) == (0, "")
    assert str(fresh) in module.stdout
    assert (fresh / "share/man/man1/keepalive.1").is_file()


def test_a_shell_completes_commands(fresh: Path, tmp_path: Path) -> None:
    asked = {"_KEEPALIVE_COMPLETE": "complete_bash", "COMP_WORDS": "keepalive wa", "COMP_CWORD": "1"}
    told = subprocess.run(
        [fresh / "bin/keepalive"],
        env=environment(PYTHONPATH="", **asked),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )

    assert told.stdout.split() == ["wait", "warm"]


def test_it_runs_as_a_module_too(fresh: Path, tmp_path: Path) -> None:
    told = subprocess.run(
        [fresh / "bin/python", "-m", "keepalive", "--version"],
        env=environment(PYTHONPATH=""),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )

    assert told.stdout == f"keepalive {__version__}\n"
