"""Packages of npm that tests need: from whichever registry it is configured for, into a cache outside of the
repository, once.
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

INSTALL_SECONDS = 90.0


def packages(package: Path, whose: str) -> Path:
    """The packages that this package.json asks for, installed; skips where that cannot be."""
    npm = shutil.which("npm")
    if npm is None or shutil.which("node") is None:
        pytest.skip("no npm here: apt install nodejs npm")
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cache = Path(os.environ.get("KEEPALIVE_TEST_CACHE") or caches / "keepalive-tests")
    name = package.parent.name
    done = cache / f"{name}-{hashlib.sha256(package.read_bytes()).hexdigest()[:12]}"
    cache.mkdir(parents=True, exist_ok=True)
    with one_at_a_time(cache / f"{name}.lock"):
        if done.exists():
            return done / "node_modules"
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            fresh = Path(folder) / name
            fresh.mkdir()
            shutil.copy(package, fresh)
            command = [npm, "install", "--ignore-scripts", "--no-package-lock", "--no-audit", "--no-fund"]
            command += ["--fetch-retries=1", "--fetch-retry-mintimeout=1000", "--prefer-offline"]
            try:
                subprocess.run(command, cwd=fresh, capture_output=True, check=True, timeout=INSTALL_SECONDS)
            except subprocess.TimeoutExpired:
                pytest.skip(f"npm did not install the packages of {whose} within {INSTALL_SECONDS:.0f} s")
            except subprocess.CalledProcessError as error:
                said = re.search(r"^npm error (?!code)(.*)", error.stderr.decode(), re.MULTILINE)
                pytest.skip(f"npm cannot install the packages of {whose}: {said and said[1]}")
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
