"""What an image of keepalive is built with where nothing else may build one: buildah, and a small Debian of our own.

The Debian stands in for the image that people use, and its packages lie beside it, so that a test needs no network.
Both are made once, outside the repository, by

    python tests/kit/container.py install        (`make test-setup-container` calls it, as root)

and never by a test. Standard library only.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).parents[2]
BASE = "localhost/debian-python"
INCLUDED = "python3,python3-venv,ca-certificates"
STAMP = "installed-1"


def folder() -> Path:
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("KEEPALIVE_TEST_CACHE") or caches / "keepalive-tests") / "container"


def why_not() -> str | None:
    """Why no image can be built here, and what to do; None when one can."""
    if shutil.which("buildah") is None:
        return "no buildah here: apt install buildah"
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "only root builds images with --isolation=chroot"
    if not (folder() / STAMP).exists():
        return f"{folder()} is missing: run `make test-setup-container` once"
    return None


def buildah(*words: str) -> str:
    """Run it in a store of its own; its output."""
    store = ["--root", str(folder() / "store"), "--runroot", str(folder() / "run"), "--storage-driver", "vfs"]
    told = subprocess.run(["buildah", *store, *words], capture_output=True, text=True)
    if told.returncode:
        raise RuntimeError(f"buildah {' '.join(words)}: {told.stderr}")
    return told.stdout.strip()


def build(tag: str) -> dict[str, Any]:
    """The image of our Dockerfile, as its config says what it is."""
    wheels = f"{folder() / 'wheels'}:/wheels:ro"
    options = [f"BASE={BASE}", "PIP_OPTIONS=--no-index --find-links /wheels"]
    arguments = [word for option in options for word in ("--build-arg", option)]
    how = ["--isolation=chroot", "--format=docker", "--disable-compression", "--layers=false", "--quiet"]
    buildah("bud", *how, *arguments, "--volume", wheels, "--tag", tag, str(PROJECT))
    found: dict[str, Any] = json.loads(buildah("inspect", "--type", "image", tag))["Docker"]["config"]
    return found


def install() -> None:
    if (folder() / STAMP).exists():
        print(f"{folder()} is there already")
        return
    print(f"making a Debian in {folder()}: some minutes, 400 MB", flush=True)
    shutil.rmtree(folder(), ignore_errors=True)
    folder().mkdir(parents=True)
    with tempfile.TemporaryDirectory() as root:
        debian = ["debootstrap", "--variant=minbase", f"--include={INCLUDED}", "bookworm", root]
        subprocess.run(debian, check=True, stdout=subprocess.DEVNULL)
        asked = ["chroot", root, "python3", "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
        version = subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip()
        for part in ("var/cache/apt", "var/lib/apt", "usr/share/doc", "usr/share/locale", "usr/share/man"):
            shutil.rmtree(Path(root) / part)  # each build copies all of it, several times
        container = buildah("from", "scratch")
        buildah("copy", "--quiet", container, root, "/")
        buildah("commit", "--quiet", "--disable-compression", "--rm", container, BASE)
    _download(version)
    (folder() / STAMP).touch()


def _download(version: str) -> None:
    """What the image needs, for its Python and not for this one."""
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())
    extra = project["project"]["optional-dependencies"]["notify"]
    needs = [*project["project"]["dependencies"], *extra, *project["build-system"]["requires"]]
    kinds = [
        f"{kind}_{platform.machine()}"
        for kind in ("manylinux_2_28", "manylinux_2_17", "manylinux2014", "linux")
    ]
    which = [
        "--python-version",
        version,
        "--only-binary",
        ":all:",
        *(w for k in kinds for w in ("--platform", k)),
    ]
    pip = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--dest",
        str(folder() / "wheels"),
        *which,
        *needs,
    ]
    subprocess.run(pip, check=True)


if __name__ == "__main__":
    if sys.argv[1:] != ["install"]:
        sys.exit("python tests/kit/container.py install")
    install()
