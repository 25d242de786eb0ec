"""What docs/cluster.md tells people to write is taken by what it is written for."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from keepalive import config
from tests.kit import PROJECT

TEXT = (PROJECT / "docs" / "cluster.md").read_text()


def test_the_config_is_one():
    [table] = re.findall(r"```toml\n(.*?)```", TEXT, re.DOTALL)
    found = config.parse('[[models]]\nkey = "gemma"\n' + table, "docs/cluster.md", {}).cluster

    assert (found.name, found.instance, len(found.etcd)) == ("ward", "a", 3)


@pytest.mark.skipif(shutil.which("haproxy") is None, reason="needs haproxy")
def test_haproxy_takes_its_config(tmp_path: Path):
    [text] = re.findall(r"```\n(defaults\n.*?)```", TEXT, re.DOTALL)
    (tmp_path / "haproxy.cfg").write_text(text)
    run = subprocess.run(
        ["haproxy", "-c", "-f", str(tmp_path / "haproxy.cfg")], capture_output=True, text=True, check=False
    )

    assert run.returncode == 0, run.stderr
