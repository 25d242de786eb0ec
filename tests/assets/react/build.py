"""The React application of the tests: the sources beside this file and those in docs/browser.md, bundled.

Its packages come from whichever registry npm is configured for, into a cache outside of the repository, once.
"""

import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kit import PROJECT

HERE = Path(__file__).parent
PACKAGE = HERE / "package.json"
INSTALL_SECONDS = 90.0


def snippets(language: str) -> list[str]:
    """The blocks of docs/browser.md in one language."""
    text = (PROJECT / "docs" / "browser.md").read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def bundle(folder: Path) -> bytes:
    """The application as one script. Skips where it cannot be built."""
    modules = packages()
    shutil.copytree(HERE / "src", folder, dirs_exist_ok=True)
    shutil.copy(PROJECT / "keepalive" / "assets" / "keepalive.js", folder)
    for block in snippets("js") + snippets("jsx"):
        if named := re.match(r"// (\S+\.jsx?)\n", block):
            (folder / named[1]).write_text(block)
    (folder / "node_modules").symlink_to(modules)
    command = [str(modules / ".bin" / "esbuild"), "main.jsx", "--bundle", "--jsx=automatic", "--format=esm"]
    # Only React's development build mounts everything twice under StrictMode.
    command += ["--define:process.env.NODE_ENV='development'", "--log-level=warning"]
    built = subprocess.run(command, cwd=folder, capture_output=True, check=False)
    assert built.returncode == 0, built.stderr.decode()
    assert built.stderr == b""
    return built.stdout


def packages() -> Path:
    """The installed packages."""
    npm = shutil.which("npm")
    if npm is None or shutil.which("node") is None:
        pytest.skip("no npm here: apt install nodejs npm")
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cache = Path(os.environ.get("KEEPALIVE_TEST_CACHE") or caches / "keepalive-tests")
    wanted = hashlib.sha256(PACKAGE.read_bytes()).hexdigest()[:12]
    done = cache / f"react-{wanted}"
    cache.mkdir(parents=True, exist_ok=True)
    with one_at_a_time(cache / "react.lock"):
        if done.exists():
            return done / "node_modules"
        with tempfile.TemporaryDirectory(dir=cache) as name:
            fresh = Path(name) / "react"
            fresh.mkdir()
            shutil.copy(PACKAGE, fresh)
            command = [npm, "install", "--ignore-scripts", "--no-package-lock", "--no-audit", "--no-fund"]
            command += ["--fetch-retries=1", "--fetch-retry-mintimeout=1000", "--prefer-offline"]
            try:
                subprocess.run(command, cwd=fresh, capture_output=True, check=True, timeout=INSTALL_SECONDS)
            except subprocess.TimeoutExpired:
                pytest.skip(
                    f"npm did not install the packages of the React app within {INSTALL_SECONDS:.0f} s"
                )
            except subprocess.CalledProcessError as error:
                said = re.search(r"^npm error (?!code)(.*)", error.stderr.decode(), re.MULTILINE)
                pytest.skip(f"npm cannot install the packages of the React app: {said and said[1]}")
            # All or nothing: an installation that was interrupted is begun again.
            fresh.rename(done)
    return done / "node_modules"


@contextlib.contextmanager
def one_at_a_time(file: Path) -> Iterator[None]:
    """Of all the processes that run these tests: whoever comes second finds what the first has installed."""
    import fcntl  # there is none on Windows

    with file.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
