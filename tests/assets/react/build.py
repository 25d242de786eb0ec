"""The React application of the tests: the sources beside this file and those in docs/browser.md, bundled."""

import re
import shutil
import subprocess
from pathlib import Path

from tests.kit import PROJECT
from tests.kit.npm import packages

HERE = Path(__file__).parent
PACKAGE = HERE / "package.json"


def snippets(language: str) -> list[str]:
    """The blocks of docs/browser.md in one language."""
    text = (PROJECT / "docs" / "browser.md").read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def bundle(folder: Path) -> bytes:
    """The application as one script. Skips where it cannot be built."""
    modules = packages(PACKAGE, "the React app")
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
