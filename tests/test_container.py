"""The image: built by a real builder, run without root on a file system that nobody can write to, and its manual."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from keepalive import config
from tests.kit import PROJECT, container
from tests.kit.live import PATIENCE, Running, SimulatorProcess, ask, ending, reserved_port, wait_until

MANUAL = (PROJECT / "docs/containers.md").read_text()
USER = 10001

# The image is built once, for all who look at it, and that may take as long as a busy machine wants.
builds = pytest.mark.xdist_group("container")
PATIENT = 1800


@dataclass(frozen=True)
class Image:
    config: dict[str, Any]
    files: Path

    def within(self, folder: Path, words: list[str]) -> list[str]:
        """What runs `words` as this image says, with its state in `folder` and everything else read-only."""
        script = """
            set -e
            mount --bind "$FILES" "$FILES"
            mount -t proc proc "$FILES/proc"
            mount --bind /dev "$FILES/dev"
            mount --bind "$STATE" "$FILES/var/lib/keepalive"
            mount -o remount,bind,ro "$FILES"
            exec chroot --userspec="$ACCOUNT" "$FILES" "$@"
        """
        given = {"FILES": str(self.files), "STATE": str(folder), "ACCOUNT": self.config["User"]}
        names = [f"{name}={value}" for name, value in given.items()]
        return ["env", *names, "unshare", "--mount", "sh", "-c", script, "sh", *words]

    @property
    def environ(self) -> dict[str, str]:
        return dict(pair.split("=", 1) for pair in self.config["Env"])


@pytest.fixture(scope="module")
def image() -> Iterator[Image]:
    if (why_not := container.why_not()) is not None:
        pytest.skip(why_not)
    tag = f"localhost/keepalive:{os.getpid()}"
    found = container.build(tag)
    made = container.buildah("from", tag)
    try:
        yield Image(found, Path(container.buildah("mount", made)))
    finally:
        container.buildah("umount", made)
        container.buildah("rm", made)
        container.buildah("rmi", tag)


@builds
@pytest.mark.timeout(PATIENT)
def test_an_image_runs_without_root_read_only_is_healthy_and_ends_as_it_is_told(
    image: Image, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    state.mkdir()
    os.chown(state, USER, USER)
    lm_studio = SimulatorProcess(tmp_path, "gemma:100ms:1GB")
    with ending(lm_studio), reserved_port() as port, reserved_port() as admin:
        environ = {
            **image.environ,
            "KEEPALIVE_SERVER__LISTEN": f"127.0.0.1:{port}",
            "KEEPALIVE_SERVER__ADMIN_LISTEN": f"127.0.0.1:{admin}",
            "KEEPALIVE_UPSTREAMS__0__URL": lm_studio.url,
            "KEEPALIVE_MODELS__0__KEY": "gemma",
            "KEEPALIVE_DEFAULTS__REFRESH_INTERVAL": "100ms",
        }
        words = ["env", "-i", *(f"{name}={value}" for name, value in environ.items())]
        running = Running(
            image.within(state, [*words, *image.config["Entrypoint"], "run"]), tmp_path, "image"
        )
        with ending(running):
            url = f"http://127.0.0.1:{admin}"
            wait_until(lambda: "daemon.started" in running.err.read_text(), "it starts")
            wait_until(lambda: ask(f"{url}/readyz")[0] == 200, "its model is warm")
            status = Path(f"/proc/{running.process.pid}/status").read_text()
            check = [word.replace("9235", str(admin)) for word in image.config["Healthcheck"]["Test"][1:]]
            healthy = subprocess.run(image.within(state, [*words, *check]), check=False, timeout=PATIENCE)
            running.signal(15)
            code = running.ended()
            sick = subprocess.run(
                image.within(state, [*words, *check]), check=False, timeout=PATIENCE, capture_output=True
            )

    assert re.search(rf"^Uid:\s{USER}\s", status, re.MULTILINE)
    assert (healthy.returncode, code, sick.returncode) == (0, 0, 1)
    assert {path.name for path in state.iterdir()} >= {"history.db"}
    assert "bookkeeping.failed" not in running.err.read_text()


@builds
@pytest.mark.timeout(PATIENT)
def test_the_image_says_how_it_is_run(image: Image) -> None:
    said = image.config

    assert (said["User"], said["StopSignal"]) == (f"{USER}:{USER}", "SIGTERM")
    assert set(said["ExposedPorts"]) == {"1235/tcp", "9235/tcp"}
    assert (said["Entrypoint"], said["Cmd"]) == (["keepalive"], ["run", "-c", "/etc/keepalive/config.toml"])
    assert said["Healthcheck"]["Test"][0] == "CMD"
    assert set(said["Volumes"]) == {"/var/lib/keepalive"}
    owned = subprocess.run(
        ["find", image.files, "-xdev", "-uid", str(USER)], capture_output=True, text=True, check=True
    )
    assert owned.stdout.splitlines() == [f"{image.files}/var/lib/keepalive"]


# --- what needs no builder ----------------------------------------------------------------------------


[COMPOSE] = re.findall(r"^```yaml\n(.*?)^```", MANUAL, re.MULTILINE | re.DOTALL)

# Writes down what it is asked for, as the program would be asked where there is one.
PODMAN = """#!/bin/sh
echo "$@" >>$SAID
case $1 in --version | version) echo podman version 5.4.0 ;; ps) echo '[]' ;; esac
"""


def compose() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(COMPOSE)
    return found


def test_the_settings_that_the_image_and_the_manual_name_are_settings() -> None:
    in_file = re.findall(r"(KEEPALIVE_\w+__\w+)=(\S+)", (PROJECT / "Dockerfile").read_text())
    [shown] = re.findall(r"^```sh\n(.*?)^```", MANUAL, re.MULTILINE | re.DOTALL)
    environ = dict(in_file) | dict(re.findall(r"-e (KEEPALIVE_\w+)=(\S+)", shown))
    read = config.load(None, {**environ, "STATE_DIRECTORY": "/var/lib/keepalive"})
    alone = dict(re.findall(r"-e (KEEPALIVE_SERVER_\w+)=(\S+?)[`\s]", MANUAL))

    assert (str(read.server.listen), str(read.server.admin_listen)) == (":1235", ":9235")
    assert read.upstreams[0].url == "http://host.docker.internal:1234"
    assert str(read.history.path) == "/var/lib/keepalive/history.db"
    assert len(alone) == 2
    assert config.load(None, {**environ, **alone}).server.listen.host == "127.0.0.1"


def test_the_compose_file_mounts_what_is_there_and_calls_the_daemon_by_its_own_name() -> None:
    services = compose()["services"]
    mounted = [volume.split(":")[0] for one in services.values() for volume in one.get("volumes", [])]
    base_url = services["open-webui"]["environment"]["OPENAI_API_BASE_URL"]

    # What is not there is the folder that one makes for one's own config.
    assert {path for path in mounted if path.startswith("./") and not (PROJECT / path).exists()} == {
        "./config"
    }
    assert f"http://{services['keepalive']['hostname']}:1235/heartbeat/" in base_url
    assert services["keepalive"]["read_only"]
    assert all(port.startswith("127.0.0.1:") for one in services.values() for port in one["ports"])
    scraped = yaml.safe_load((PROJECT / "monitoring/prometheus/compose.yml").read_text())["scrape_configs"][0]
    assert (scraped["job_name"], scraped["static_configs"][0]["targets"]) == ("keepalive", ["keepalive:9235"])


def test_the_compose_file_is_one_and_has_the_rest_wait_for_a_daemon_that_is_well(tmp_path: Path) -> None:
    program = Path(sys.executable).with_name("podman-compose")
    if not program.exists():
        pytest.skip(f"no podman-compose beside {sys.executable}")
    podman, said = tmp_path / "podman", tmp_path / "said"
    podman.write_text(PODMAN)
    podman.chmod(0o755)
    (tmp_path / "compose.yml").write_text(COMPOSE)
    shutil.copy(PROJECT / "Dockerfile", tmp_path)
    environ = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SAID": str(said), "HOME": str(tmp_path)}

    subprocess.run([program, "up", "-d"], cwd=tmp_path, env=environ, check=True, capture_output=True)

    asked = said.read_text().splitlines()
    made = {name: line for line in asked for name in compose()["services"] if f"service={name} " in line}
    tight = ("--read-only", "--cap-drop ALL", "--security-opt no-new-privileges:true")
    assert [word for word in tight if word not in made["keepalive"]] == []
    assert "/monitoring/prometheus/compose.yml:/etc/prometheus/prometheus.yml:ro" in made["prometheus"]
    began = [re.sub(r" \S+_(\S+)_1$", r" \1", line) for line in asked if line.startswith(("start", "wait"))]
    assert began[-2:] == ["wait --condition=healthy keepalive", "start open-webui"]


def test_what_the_image_is_built_from_is_let_in() -> None:
    """What `.dockerignore` leaves out cannot be copied."""
    let_in = {
        line[1:] for line in (PROJECT / ".dockerignore").read_text().splitlines() if line.startswith("!")
    }
    copied = re.findall(r"^COPY (?!--from)(.*) \S+$", (PROJECT / "Dockerfile").read_text(), re.MULTILINE)

    assert {name for line in copied for name in line.split()} == let_in
    assert all((PROJECT / name).exists() for name in let_in)
