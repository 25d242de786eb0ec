"""The whole daemon against the simulator, over sockets: in this process, and as processes that are killed."""

import asyncio
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from zoneinfo import ZoneInfo

import pytest
from freezegun import freeze_time
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from keepalive import config
from keepalive.observers import logs
from keepalive.service.daemon import Daemon, StartError
from keepalive.simulator.models import SimModel
from keepalive.simulator.server import serve
from keepalive.simulator.studio import Studio
from tests.kit.live import (
    KEEPALIVE,
    PATIENCE,
    DaemonProcess,
    Running,
    SimulatorProcess,
    ask,
    asked,
    bound,
    daemon,
    ending,
    environment,
    let_it_load,
    loads,
    model,
    reserved_port,
    settings,
    simulator,
    until,
    wait_until,
)
from tests.kit.raw import Middleman

GEMMA = SimModel("gemma", size_bytes=2_000_000_000, load_seconds=0.3)
# Loads until the test has seen enough and says `let_it_load`.
SLOW = SimModel("gemma", size_bytes=2_000_000_000, load_seconds=600.0)
QWEN = SimModel("qwen/qwen3", size_bytes=4_000_000_000, load_seconds=0.3)
CANARY = "sk-canary-4711-secret-token"


@contextmanager
def log_in(folder: Path, level: str = "debug") -> Iterator[Callable[[str | None], list[dict[str, Any]]]]:
    """What the daemon logs, by event. Whoever looks ends the log, so that all of it is there."""
    path = folder / "log"

    def lines(event: str | None = None) -> list[dict[str, Any]]:
        end()
        rows = [json.loads(line) for line in path.read_text().splitlines(True) if line.endswith("\n")]
        return [row for row in rows if event in (None, row["event"])]

    with path.open("w") as stream:
        end = functools.cache(logs.start(level=level, as_json=True, stream=stream))
        try:
            yield lines
        finally:
            end()


async def reaches(running: Daemon, key: str, state: str, upstream: str = "local") -> dict[str, Any]:
    def look() -> dict[str, Any] | None:
        found = model(running, key, upstream)
        return found if found["state"] == state else None

    found: dict[str, Any] = await until(look, f"{key} is {state}")
    return found


def metric(running: Daemon, name: str, **labels: str) -> float | None:
    families = parse_text(running.metrics("")[0].decode())
    values = [
        sample.value
        for family in families
        for sample in family.samples
        if sample.name == f"keepalive_{name}" and sample.labels == labels
    ]
    return values[0] if values else None


# --- from cold to warm ------------------------------------------------------------------------------


async def test_a_cold_model_is_loaded_once_proved_and_seen_everywhere(tmp_path: Path) -> None:
    with log_in(tmp_path, "info") as lines:
        # Over HTTP LM Studio says itself how long a load took.
        alone = 'sdk = "off"'
        async with (
            simulator(SLOW) as studio,
            daemon(settings(studio.url, "gemma", upstream=alone)) as running,
        ):
            loading = await reaches(running, "gemma", "loading")
            not_ready = await asked(f"{running.admin_url}/readyz")
            await let_it_load(studio.studio)
            warm = await reaches(running, "gemma", "warm")
            ready = await asked(f"{running.admin_url}/readyz?model=gemma")
            text = await asked(f"{running.admin_url}/metrics")
            openmetrics = await asked(
                f"{running.admin_url}/metrics", Accept="application/openmetrics-text; version=1.0.0"
            )
            events = studio.studio.log(0)
        states = [(row["was"], row["state"]) for row in lines("model.state")]

    assert loading["load"]["attempt"] == 1
    assert (not_ready[0], ready[0]) == (503, 200)
    assert (warm["ours"], warm["instances"], warm["loads"], warm["instance_id"]) == (True, 1, 1, "gemma")
    assert 600 <= warm["last_load_seconds"] < 600 + PATIENCE
    assert warm["last_ping"]["outcome"] == "ok"
    assert states == [("unknown", "cold"), ("cold", "loading"), ("loading", "warm")]
    assert [e["kind"] for e in events if "load" in e["kind"]] == ["load.started", "load.ended"]
    counted = {
        sample.value
        for families in (parse_text(text[2]), parse_openmetrics(openmetrics[2]))
        for family in families
        for sample in family.samples
        if sample.name == "keepalive_model_loads_total" and sample.labels["outcome"] == "ok"
    }
    assert counted == {1.0}


async def test_the_document_has_every_field_of_the_contract() -> None:
    async with simulator(GEMMA) as studio, daemon(settings(studio.url, "gemma")) as running:
        await reaches(running, "gemma", "warm")
        page = json.loads((await asked(f"{running.admin_url}/api/status"))[2])

    assert {"version", "ready", "started_at", "upstreams", "models"} <= page.keys()
    assert set(page["upstreams"][0]) == {
        "name", "url", "state", "tier", "since", "error", "sdk", "sdk_reason", "memory"
    }  # fmt: skip
    assert set(page["models"][0]) >= {
        "key", "upstream", "state", "since", "wanted", "busy", "in_flight", "waiting", "instance_id",
        "instances", "ours", "load", "last_load_seconds", "loads", "evictions", "last_ping", "next_ping_at",
        "retry_at", "reason",
    }  # fmt: skip


async def test_an_eviction_is_noticed_and_mended() -> None:
    async with simulator(GEMMA) as studio, daemon(settings(studio.url, "gemma")) as running:
        await reaches(running, "gemma", "warm")
        studio.studio.evict("gemma")
        await until(lambda: model(running, "gemma")["evictions"] == 1)
        warm = await reaches(running, "gemma", "warm")
        evictions = metric(running, "model_evictions_total", model="gemma", upstream="local", cause="by_hand")

    assert (warm["loads"], evictions, loads(studio.studio)) == (2, 1.0, 2)
    assert warm["last_eviction"]["cause"] == "by_hand"


async def test_a_restart_of_lm_studio_is_what_took_a_model() -> None:
    async with simulator(GEMMA) as studio, daemon(settings(studio.url, "gemma")) as running:
        await reaches(running, "gemma", "warm")
        studio.studio.restart(down_seconds=600.0)
        await until(lambda: running.status()["upstreams"][0]["state"] == "down")
        studio.studio.advance(600)
        await until(lambda: model(running, "gemma")["evictions"] == 1)
        lost = model(running, "gemma")["last_eviction"]

    assert lost["cause"] == "restart"


async def test_a_tunnel_that_ends_during_a_load_and_is_back_is_no_end_of_lm_studio() -> None:
    async with simulator(SLOW, v0_shows_loading=False) as studio:
        tunnel = Middleman(studio.port)
        await tunnel.__aenter__()
        async with daemon(settings(f"http://127.0.0.1:{tunnel.port}", "gemma")) as running:
            await until(lambda: loads(studio.studio) == 1, "a load has begun")
            await tunnel.__aexit__()
            await until(lambda: running.status()["upstreams"][0]["state"] == "down", "the tunnel is missed")
            async with Middleman(studio.port, at=tunnel.port):
                await until(lambda: running.status()["upstreams"][0]["state"] == "up", "it is back")
                waiting = await reaches(running, "gemma", "loading")
                studio.studio.advance(600)
                await reaches(running, "gemma", "warm")
                begun = loads(studio.studio)

    assert "an earlier load may still be under way" in waiting["reason"]
    assert begun == 1


async def test_what_happened_to_a_model_is_told_in_its_order() -> None:
    async with simulator(GEMMA) as studio, daemon(settings(studio.url, "gemma", QWEN.key)) as running:
        await reaches(running, "gemma", "warm")
        studio.studio.evict("gemma")
        await until(lambda: model(running, "gemma")["loads"] == 2, "it is loaded again")
        await reaches(running, "gemma", "warm")
        status, _, text = await asked(f"{running.admin_url}/api/history?model=GEMMA")
        _, _, every = await asked(f"{running.admin_url}/api/history")
    told = json.loads(text)
    gemma = told["models"][0]

    assert (status, told["kept"], told["reason"]) == (
        200,
        False,
        "neither history.path nor server.state_dir is set",
    )
    assert [m["key"] for m in told["models"]] == ["gemma"]
    assert [m["key"] for m in json.loads(every)["models"]] == ["gemma", QWEN.key]
    assert [load["outcome"] for load in gemma["loads"]] == ["ok", "ok"]
    assert all(0.3 <= load["seconds"] < PATIENCE for load in gemma["loads"])
    assert [lost["cause"] for lost in gemma["evictions"]] == ["by_hand"]
    states = [entry["state"] for entry in gemma["timeline"]]
    assert states == ["unknown", "cold", "loading", "warm", "cold", "loading", "warm"]
    assert gemma["timeline"] == sorted(gemma["timeline"], key=lambda entry: entry["at"])
    assert gemma["pings"]["ok"] >= 2


async def test_the_document_says_when_its_metrics_were_last_read() -> None:
    async with simulator(GEMMA) as studio, daemon(settings(studio.url, "gemma")) as running:
        never = running.status()["scraped_at"]
        await asked(f"{running.admin_url}/metrics")
        scraped = running.status()["scraped_at"]

    assert never is None
    assert datetime.fromisoformat(scraped).timestamp() == pytest.approx(time.time(), abs=60)


async def test_the_time_left_is_null_then_from_the_size_then_from_past_loads() -> None:
    small = SimModel("small", size_bytes=1_000_000_000, load_seconds=0.8)
    large = SimModel("large", size_bytes=2_000_000_000, load_seconds=1.6)
    async with simulator(small, large) as studio, daemon(settings(studio.url, "small", "large")) as running:
        unknown = (await reaches(running, "small", "loading"))["load"]
        by_size = (await reaches(running, "large", "loading"))["load"]
        took = (await reaches(running, "small", "warm"))["last_load_seconds"]
        studio.studio.evict("small")
        await reaches(running, "large", "warm")
        by_past = (await reaches(running, "small", "loading"))["load"]

    # Against what the load really took on this machine: large has twice the size.
    assert unknown["eta_seconds"] is None
    assert by_size["elapsed_seconds"] + by_size["eta_seconds"] == pytest.approx(2 * took, abs=0.1)
    assert by_past["elapsed_seconds"] + by_past["eta_seconds"] == pytest.approx(took, abs=0.1)


async def test_an_upstream_that_appears_later_is_found_and_liveness_never_depends_on_it() -> None:
    with reserved_port() as port:
        async with daemon(settings(f"http://127.0.0.1:{port}", "gemma")) as running:
            await until(lambda: running.status()["upstreams"][0]["state"] == "down")
            down = running.status()
            alive = await asked(f"{running.admin_url}/livez")
            async with await serve(Studio((GEMMA,)), port=port):
                warm = await reaches(running, "gemma", "warm")

    assert down["upstreams"][0]["error"] == f"nothing listens at http://127.0.0.1:{port}"
    assert (down["models"][0]["state"], down["models"][0]["reason"]) == (
        "unknown",
        f"nothing listens at http://127.0.0.1:{port}",
    )
    assert alive[0] == 200
    assert warm["loads"] == 1


async def test_nobody_waits_for_an_upstream_that_hangs_or_is_down() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, bound() as gone:
        hangs, down = (f"http://127.0.0.1:{s.getsockname()[1]}" for s in (silent, gone))
        async with simulator(GEMMA) as studio:
            text = settings(
                studio.url, *(f'key = "gemma"\nupstream = "{n}"' for n in ("down", "hangs", "local"))
            )
            for name, url in (("hangs", hangs), ("down", down)):
                text += f'\n[[upstreams]]\nname = "{name}"\nurl = "{url}"\nlist_timeout = "1h"\n'
            async with daemon(text) as running:
                warm = await reaches(running, "gemma", "warm")

                def states() -> dict[str, str]:
                    return {u["name"]: u["state"] for u in running.status()["upstreams"]}

                await until(lambda: states()["down"] == "down")
                seen = states()

    assert warm["loads"] == 1
    assert seen == {"local": "up", "down": "down", "hangs": "unknown"}


async def test_a_model_is_asked_for_and_released_by_hand() -> None:
    async with simulator(GEMMA) as studio, daemon(settings(studio.url, "gemma")) as running:
        await reaches(running, "gemma", "warm")
        released = await asked(f"{running.admin_url}/api/models/gemma/release", "POST")
        cold = await reaches(running, "gemma", "cold")
        ready = running.status()["ready"]
        wanted = await asked(f"{running.admin_url}/api/models/GEMMA/warm", "POST")
        warm = await reaches(running, "gemma", "warm")

    assert (released[0], json.loads(released[2])["wanted"]) == (202, False)
    assert (cold["reason"], cold["evictions"], ready) == ("released by hand", 0, True)
    assert (wanted[0], json.loads(wanted[2])["wanted"]) == (202, True)
    assert warm["loads"] == 2


async def test_changes_are_pushed_to_those_who_watch() -> None:
    async with simulator(SLOW) as studio, daemon(settings(studio.url, "gemma")) as running:
        place = urlsplit(running.admin_url)
        reader, writer = await asyncio.open_connection(place.hostname, place.port)
        writer.write(b"GET /api/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        states = []
        async with asyncio.timeout(PATIENCE):
            while not states or states[-1] != "warm":
                line = await reader.readline()
                if line.startswith(b"data: "):
                    states.append(json.loads(line[6:])["models"][0]["state"])
                    if states.count("loading") == 1 and states[-1] == "loading":
                        await let_it_load(studio.studio)
        writer.close()

    assert "loading" in states


# --- bookkeeping ------------------------------------------------------------------------------------


class Raising:
    def __init__(self) -> None:
        self.told = 0

    def observe(self, fact: Any, before: Any, after: Any) -> None:
        self.told += 1
        raise RuntimeError("the disk of the history is full")


async def test_an_observer_that_raises_at_everything_changes_nothing_and_is_said_once(tmp_path: Path) -> None:
    raising = Raising()
    with log_in(tmp_path) as lines:
        async with simulator(GEMMA) as studio, daemon(settings(studio.url, "gemma")) as running:
            running.keeper._observers = [raising, *running.keeper._observers]
            warm = await reaches(running, "gemma", "warm")
            seen = loads(studio.studio)
        said = lines("bookkeeping.failed")

    assert raising.told > 5
    assert (warm["loads"], seen) == (1, 1)
    assert [row["error"] for row in said] == ["RuntimeError: the disk of the history is full"]


async def test_a_state_directory_that_cannot_be_used_is_a_warning_for_each_use_and_nothing_else(
    tmp_path: Path,
) -> None:
    (tmp_path / "file").write_text("")
    server = f'state_dir = "{tmp_path}/file/state"'
    with log_in(tmp_path) as lines:
        async with (
            simulator(GEMMA, QWEN) as studio,
            daemon(settings(studio.url, "gemma", "qwen/qwen3", server=server)) as running,
        ):
            await reaches(running, "gemma", "warm")
            await reaches(running, "qwen/qwen3", "warm")
        said = lines("bookkeeping.failed")

    assert sorted(row["error"] for row in said) == [
        f"history.path: nothing can be kept in {tmp_path}/file/state/history.db (not a directory); "
        "it is remembered until the daemon ends",
        f"server.state_dir: loads cannot be noted in {tmp_path}/file/state (not a directory); "
        "if the daemon ends during one, the next may begin it again",
    ]


async def test_garbage_in_the_state_directory_is_passed_over(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    server = f'state_dir = "{folder}"'
    async with (
        simulator(GEMMA, load_result="stuck") as studio,
        daemon(settings(studio.url, "gemma", server=server)) as running,
    ):
        await reaches(running, "gemma", "loading")
        await until(lambda: list(folder.glob("load-*.json")))
    name = next(folder.glob("load-*.json"))
    for content in (b"[" * 50_000, b"\x00" * 500, b"", b"{}"):
        name.write_bytes(content)
        (folder / "other.bin").write_bytes(os.urandom(100))
        async with (
            simulator(GEMMA) as studio,
            daemon(settings(studio.url, "gemma", server=server)) as running,
        ):
            warm = await reaches(running, "gemma", "warm")

        assert warm["loads"] == 1


async def test_nothing_is_left_behind_when_it_ends() -> None:
    before = asyncio.all_tasks()
    async with simulator(GEMMA) as studio:
        async with daemon(settings(studio.url, "gemma")) as running:
            await reaches(running, "gemma", "loading")
        await until(lambda: not studio.studio.in_flight)
    await until(lambda: len(asyncio.all_tasks()) == len(before))

    assert running.stopping


# --- reload -----------------------------------------------------------------------------------------


async def test_a_reload_is_a_difference(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    old = SimModel("old", load_seconds=0.1)
    async with (
        simulator(GEMMA, QWEN, old) as studio,
        daemon(settings(studio.url, "gemma", "old"), path=path) as running,
    ):
        before = await reaches(running, "gemma", "warm")
        await reaches(running, "old", "warm")
        path.write_text(settings(studio.url, "gemma", "qwen/qwen3", defaults='ping_interval = "1h"'))
        running.reload()
        await reaches(running, "qwen/qwen3", "warm")
        after = model(running, "gemma")
        keys = [m["key"] for m in running.status()["models"]]
        sinces = [model(running, "gemma")["since"] for _ in range(5)]
        await until(lambda: not studio.studio.memory.copies(old), "what we loaded is unloaded")
        series = metric(running, "model_wanted", model="old", upstream="local")
        seen = [loads(studio.studio, key) for key in ("gemma", "old", "qwen/qwen3")]

    same = ("state", "since", "instance_id", "ours", "loads", "evictions", "last_ping", "wanted")
    assert {name: after[name] for name in same} == {
        **{name: before[name] for name in same},
        "since": after["since"],
    }
    # Two clocks are read for it, one after the other; when this process had to wait between them shows in one.
    moved = [datetime.fromisoformat(at) - datetime.fromisoformat(before["since"]) for at in sinces]
    assert min(map(abs, moved)) < timedelta(milliseconds=50)
    assert keys == ["gemma", "qwen/qwen3"]
    assert series is None
    assert seen == [1, 1, 1]


@pytest.mark.parametrize("change", [("local", "renamed"), ('"gemma"', '"Gemma"')])
async def test_a_load_goes_on_under_another_name_though_nothing_is_written_down(
    change: tuple[str, str], tmp_path: Path
) -> None:
    path = tmp_path / "config.toml"
    slow = SimModel("gemma", load_seconds=1.5)
    async with simulator(slow, v0_shows_loading=False) as studio:
        text = settings(studio.url, "gemma").replace("[defaults]", "max_loading = 2\n[defaults]", 1)
        async with daemon(text, path=path) as running:
            await until(lambda: studio.studio.memory.loads_of(slow), "it loads")
            path.write_text(text.replace(*change))
            running.reload()
            await until(lambda: all(m["state"] == "warm" for m in running.status()["models"]), "it is warm")

            assert loads(studio.studio, "gemma") == 1


BAD = {
    "a mistake": lambda path: path.write_text("[servre]\n"),
    "not TOML": lambda path: path.write_text("= = ="),
    "binary": lambda path: path.write_bytes(os.urandom(1000)),
    "empty": lambda path: path.write_text(""),
    "deleted": lambda path: path.unlink(),
    "a directory": lambda path: (path.unlink(), path.mkdir()),
    "a dangling link": lambda path: (path.unlink(), path.symlink_to("/nowhere")),
    "half": lambda path: path.write_text(path.read_text()[:150]),
    "a token that is not there": lambda path: path.write_text(
        path.read_text().replace("[defaults]", 'api_token_env = "NOT_SET"\n[defaults]')
    ),
}


@pytest.mark.parametrize("spoil", BAD.values(), ids=BAD)
async def test_a_bad_reload_changes_nothing_and_is_seen(spoil: Callable[[Path], Any], tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    with log_in(tmp_path, "info") as lines:
        async with simulator(GEMMA) as studio, daemon(settings(studio.url, "gemma"), path=path) as running:
            before = await reaches(running, "gemma", "warm")
            good = (metric(running, "config_last_reload_successful"), running.status()["config"])
            spoil(path)
            running.reload()
            bad = (metric(running, "config_last_reload_successful"), running.status()["config"])
            after = model(running, "gemma")
        said = lines("config.rejected")

    assert (good[0], good[1]["ok"], good[1]["mistakes"]) == (1.0, True, [])
    assert (good[1]["path"], good[1]["unlisted"]) == (str(path), "pass")
    assert (bad[0], bad[1]["ok"], len(bad[1]["mistakes"])) == (0.0, False, len(said[0]["mistakes"]))
    assert (said[0]["level"], said[0]["path"]) == ("error", str(path))
    assert said[0]["mistakes"] == bad[1]["mistakes"] != []
    assert (after["state"], after["loads"]) == (before["state"], before["loads"])


async def test_a_good_reload_after_a_bad_one_mends_the_gauge(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    async with simulator(GEMMA) as studio, daemon(settings(studio.url, "gemma"), path=path) as running:
        text = path.read_text()
        first = metric(running, "config_last_reload_success_timestamp_seconds")
        path.write_text("nonsense")
        running.reload()
        second = metric(running, "config_last_reload_success_timestamp_seconds")
        path.write_text(text)
        running.reload()
        third = metric(running, "config_last_reload_success_timestamp_seconds")
        gauge, shown = metric(running, "config_last_reload_successful"), running.status()["config"]

    assert first is not None
    assert third is not None
    assert first == second < third
    assert (gauge, shown["ok"], shown["mistakes"]) == (1.0, True, [])


async def test_a_token_that_was_refused_counts_from_the_reload_on_that_brings_the_right_one(
    tmp_path: Path,
) -> None:
    """After a 401 nobody asks again for a minute; whoever mends the token does not wait that long."""
    path, token = tmp_path / "config.toml", tmp_path / "token"
    token.write_text("wrong")
    async with simulator(GEMMA, auth_token=CANARY) as studio:
        text = settings(studio.url, "gemma", upstream=f'api_token_file = "{token}"')
        async with daemon(text, path=path) as running:
            await until(lambda: running.status()["upstreams"][0]["state"] == "unauthorized")
            reason = model(running, "gemma")["reason"]
            token.write_text(CANARY)
            running.reload()
            await reaches(running, "gemma", "warm")

    assert reason == f"{studio.url} does not accept the API token of upstream 'local'"


async def test_a_token_that_changes_while_all_is_well_disturbs_nothing(tmp_path: Path) -> None:
    path, token = tmp_path / "config.toml", tmp_path / "token"
    token.write_text("first")
    async with simulator(GEMMA, auth_token="first") as studio:
        text = settings(studio.url, "gemma", upstream=f'api_token_file = "{token}"')
        async with daemon(text, path=path) as running:
            await reaches(running, "gemma", "warm")
            studio.studio.set_faults({"auth_token": "second"})
            token.write_text("second")
            running.reload()
            state = model(running, "gemma")
            asked_before = len(studio.studio.log(0))
            await until(lambda: len(studio.studio.log(0)) > asked_before + 4)
            later = model(running, "gemma")
            refused = [e for e in studio.studio.log(0) if e.get("status") == 401]

    assert (state["state"], state["ours"], later["state"], later["loads"]) == ("warm", True, "warm", 1)
    assert len(refused) <= 1


async def test_another_address_behind_the_name_is_another_server(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    async with (
        simulator(GEMMA) as first,
        simulator(GEMMA) as second,
        daemon(settings(first.url, "gemma"), path=path) as running,
    ):
        await reaches(running, "gemma", "warm")
        path.write_text(settings(second.url, "gemma"))
        running.reload()
        await until(lambda: loads(second.studio) == 1)
        await reaches(running, "gemma", "warm")
        url = running.status()["upstreams"][0]["url"]

    assert url == second.url
    assert (loads(first.studio), loads(second.studio)) == (1, 1)


async def test_what_needs_a_restart_is_said(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    with log_in(tmp_path) as lines:
        async with simulator(GEMMA) as studio, daemon(settings(studio.url, "gemma"), path=path) as running:
            path.write_text(settings(studio.url, "gemma", server='log_level = "debug"'))
            running.reload()
        said = [row["key"] for row in lines("config.needs_restart")]

    assert said == ["server.log_level"]


async def test_keys_change_with_a_reload(tmp_path: Path) -> None:
    path, key = tmp_path / "config.toml", tmp_path / "key"
    key.write_text("right")
    async with simulator(GEMMA) as studio, daemon(settings(studio.url, "gemma"), path=path) as running:
        free = await asked(f"{running.admin_url}/api/status")
        path.write_text(
            settings(studio.url, "gemma") + f'\n[auth]\nadmin_keys = [{{ name = "ops", file = "{key}" }}]\n'
        )
        running.reload()
        refused = await asked(f"{running.admin_url}/api/status")
        right = await asked(f"{running.admin_url}/api/status", Authorization="Bearer right")

    assert [free[0], refused[0], right[0]] == [200, 401, 200]


async def test_without_a_file_there_is_nothing_to_reload(tmp_path: Path) -> None:
    with log_in(tmp_path) as lines:
        async with simulator(GEMMA) as studio, daemon(settings(studio.url, "gemma")) as running:
            running.reload()
        said = lines("config.unchanged")

    assert [row["reason"] for row in said] == ["it comes from the environment alone"]


async def test_a_hundred_reloads_in_a_row_change_nothing(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    async with simulator(GEMMA) as studio, daemon(settings(studio.url, "gemma"), path=path) as running:
        await reaches(running, "gemma", "loading")
        for _ in range(100):
            running.reload()
            await asyncio.sleep(0)
        warm = await reaches(running, "gemma", "warm")

    assert (warm["loads"], loads(studio.studio)) == (1, 1)


# --- secrets ----------------------------------------------------------------------------------------

LEAKS: list[dict[str, Any]] = [
    {"load_result": "fail", "load_fail_reason": f"token {CANARY} is not allowed"},
    {"load_result": "fail", "load_fail_reason": "x" * 290 + CANARY},
    {"auth_token": "another", "auth_status": 401},
    {"auth_token": "another", "auth_status": 403, "auth_on_chat_only": True},
    {"answer_model": CANARY},
    {"answer": "error_500"},
    {"list_reply": "other_shape"},
]


@pytest.mark.parametrize("faults", LEAKS[:1] + LEAKS[2:4] + LEAKS[5:])
async def test_no_token_shows_anywhere_whatever_lm_studio_says(
    faults: dict[str, Any], tmp_path: Path
) -> None:
    token = tmp_path / "token"
    token.write_text(CANARY)
    with log_in(tmp_path, "debug") as lines:
        async with simulator(GEMMA, **faults) as studio:
            text = settings(studio.url, "gemma", upstream=f'api_token_file = "{token}"')
            async with daemon(text) as running:
                await until(
                    lambda: (
                        model(running, "gemma")["state"] == "backoff"
                        or running.status()["upstreams"][0]["error"]
                    )
                )
                shown = json.dumps(running.status()) + running.metrics("")[0].decode() + repr(running._config)
        said = json.dumps(lines(None))

    assert CANARY not in shown
    assert CANARY not in said
    assert CANARY[:12] not in said


# --- windows and clocks -----------------------------------------------------------------------------

WINDOW = 'timezone = "Europe/Lisbon"'


def frozen_wall() -> float:
    return datetime.now(UTC).timestamp()


async def passes(running: Daemon, frozen: Any, seconds: float) -> None:
    """Time goes on by this much, at once; what the scheduler then owes has run."""
    frozen.tick(timedelta(seconds=seconds))
    running._schedule._scheduler.wakeup()
    for _ in range(10):
        await asyncio.sleep(0)


async def test_a_window_opens_and_closes_and_what_we_loaded_is_unloaded() -> None:
    windowed = 'key = "gemma"\nwindow = "Mon-Fri 08:00-19:00"'
    with freeze_time("2026-11-20T07:59:58Z", real_asyncio=True) as frozen:
        async with (
            simulator(GEMMA) as studio,
            daemon(settings(studio.url, windowed, server=WINDOW), wall=frozen_wall) as running,
        ):
            await until(lambda: model(running, "gemma")["state"] == "cold")
            outside = model(running, "gemma")
            await passes(running, frozen, 2)
            inside = model(running, "gemma")["wanted"]

            async def warm() -> dict[str, Any]:
                while (found := model(running, "gemma"))["state"] != "warm":
                    await passes(running, frozen, 0.5)
                    await asyncio.sleep(0.02)
                return found

            loaded = await asyncio.wait_for(warm(), PATIENCE)
            frozen.move_to("2026-11-20T19:00:01Z")
            await passes(running, frozen, 1)
            while studio.studio.memory.copies(GEMMA):
                await passes(running, frozen, 0.5)
                await asyncio.sleep(0.02)
            await until(lambda: model(running, "gemma")["state"] == "cold")
            after = model(running, "gemma")

    today, monday = (datetime.fromisoformat(f"2026-11-{day}T08:00Z").astimezone() for day in (20, 23))
    until_today, until_monday = f"{today:%H:%M:%S}", f"{monday:%a %d %b %H:%M}"
    assert (outside["wanted"], inside) == (False, True)
    assert outside["reason"] == f"outside its window until {until_today}"
    assert loaded["ours"] is True
    assert (after["wanted"], after["evictions"]) == (False, 0)
    assert after["reason"] == f"outside its window until {until_monday}"


async def test_what_somebody_else_loaded_is_left_alone_when_a_window_closes() -> None:
    windowed = 'key = "gemma"\nwindow = "Mon-Fri 08:00-19:00"'

    def listings() -> int:
        return sum(event.get("route") == "list" for event in studio.studio.log(0))

    with freeze_time("2026-11-20T18:59:58Z", real_asyncio=True) as frozen:
        async with simulator(GEMMA) as studio:
            studio.studio.load("gemma", seconds=0.0)
            await until(lambda: studio.studio.memory.copies(GEMMA))
            text = settings(studio.url, windowed, server=WINDOW)
            async with daemon(text, wall=frozen_wall) as running:
                warm = await reaches(running, "gemma", "warm")
                await passes(running, frozen, 2)
                wanted = model(running, "gemma")["wanted"]
                enough = listings() + 3
                while listings() < enough:
                    await passes(running, frozen, 0.5)
                    await asyncio.sleep(0.02)
                copies = len(studio.studio.memory.copies(GEMMA))
                unloads = [e for e in studio.studio.log(0) if e["kind"] == "unloaded"]

    assert (warm["ours"], wanted) == (False, False)
    assert (copies, unloads, loads(studio.studio)) == (1, [], 1)


@pytest.mark.parametrize(
    ("night", "window", "looks"),
    [
        ("2026-03-29", "Sun 00:30-03:00", 18),  # 01:00 to 02:00 does not exist
        ("2026-03-29", "Sun 01:10-01:50", 0),
        ("2026-10-25", "Sun 00:30-03:00", 35),  # 01:00 to 02:00 comes twice; we begin at the first 01:05
        ("2026-10-25", "Sun 01:10-01:50", 16),
    ],
)
async def test_on_the_nights_when_clocks_change_a_window_is_open_when_the_wall_clock_says_so(
    night: str, window: str, looks: int
) -> None:
    zone = ZoneInfo("Europe/Lisbon")
    start, end = (int(part[:2]) * 60 + int(part[3:]) for part in window.split()[1].split("-"))
    text = settings("http://127.0.0.1:1", f'key = "gemma"\nwindow = "{window}"', server=WINDOW)
    opened = 0
    with freeze_time(f"{night}T00:00:00Z", real_asyncio=True) as frozen:
        async with daemon(text, wall=frozen_wall) as running:
            for _ in range(5 * 12):
                await passes(running, frozen, 5 * 60)
                local = datetime.now(UTC).astimezone(zone)
                expected = start <= local.hour * 60 + local.minute < end and local.weekday() == 6

                assert model(running, "gemma")["wanted"] is expected, local
                opened += expected

    assert opened == looks


@pytest.mark.parametrize("days", [1, -1, 365])
async def test_a_clock_that_jumps_ends_in_the_right_state_and_loads_nothing_twice(
    days: int, tmp_path: Path
) -> None:
    week = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
    # A year is a day of the week later.
    other = week[(datetime.now(UTC) + timedelta(days=days)).weekday()]
    jump = 0.0
    windowed = f'key = "qwen/qwen3"\nwindow = "{other} 00:00-24:00"'
    with log_in(tmp_path) as lines:
        async with simulator(GEMMA, QWEN) as studio:
            text = settings(studio.url, "gemma", windowed, server='timezone = "UTC"')
            async with daemon(text, wall=lambda: time.time() + jump) as running:
                await reaches(running, "gemma", "warm")
                wanted = model(running, "qwen/qwen3")["wanted"]
                since = model(running, "gemma")["since"]
                jump = days * 86_400.0
                qwen = await reaches(running, "qwen/qwen3", "warm")
                gemma = model(running, "gemma")
                alive = running.alive()
        said = lines("clock.jumped")

    assert wanted is False
    assert [round(row["seconds"], -1) for row in said] == [days * 86_400.0]
    assert (gemma["state"], gemma["loads"], qwen["loads"]) == ("warm", 1, 1)
    assert (loads(studio.studio, "gemma"), loads(studio.studio, "qwen/qwen3")) == (1, 1)
    assert alive is None
    assert gemma["since"] == since
    assert datetime.fromisoformat(qwen["since"]).timestamp() == pytest.approx(time.time() + jump, abs=300)


# --- addresses --------------------------------------------------------------------------------------


async def test_a_port_in_use_is_a_sentence() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        text = settings("http://127.0.0.1:1", "gemma").replace(
            'admin_listen = "127.0.0.1:0"', f'admin_listen = "127.0.0.1:{port}"'
        )
        with pytest.raises(StartError) as caught:
            await Daemon(config.parse(text, "test", {}), None, {}).run()

    assert str(caught.value) == (
        f"server.admin_listen: cannot listen on 127.0.0.1:{port}: address already in use; "
        "end what uses it, or write another port"
    )


async def test_a_name_that_is_nobodys_is_a_sentence() -> None:
    text = settings("http://127.0.0.1:1", "gemma").replace(
        'admin_listen = "127.0.0.1:0"', 'admin_listen = "no-such-host.invalid:9"'
    )
    with pytest.raises(StartError) as caught:
        await Daemon(config.parse(text, "test", {}), None, {}).run()

    assert str(caught.value).startswith("server.admin_listen: cannot listen on no-such-host.invalid:9: ")
    assert "Unknown error" not in str(caught.value)


async def test_an_address_that_the_network_reaches_is_warned_of_when_it_takes_no_keys(tmp_path: Path) -> None:
    text = settings("http://127.0.0.1:1", "gemma").replace(
        'admin_listen = "127.0.0.1:0"', 'admin_listen = ":0"'
    )
    with log_in(tmp_path) as lines:
        async with daemon(text) as running:
            status, _, _ = await asked(
                running.admin_url.replace("[::]", "[::1]").replace("0.0.0.0", "127.0.0.1") + "/livez"
            )
        said = [(row["level"], row["key"]) for row in lines("listener.open")]

    assert said == [("warning", "server.admin_listen")]
    assert status == 200


# --- as processes -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one_lm_studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimulatorProcess]:
    keys = (
        "a:200ms:2GB",
        "b:200ms:2GB",
        "c:600s:2GB",
        "d:600s:2GB",
        "e:600s:2GB",
        "f:600s:2GB",
        "g:600s:2GB",
    )
    process = SimulatorProcess(tmp_path_factory.mktemp("simulator"), *keys)
    with ending(process):
        yield process


@pytest.fixture
def lm_studio(one_lm_studio: SimulatorProcess) -> Iterator[SimulatorProcess]:
    """One process for all, because it takes a second to start: each test has models of its own."""
    yield one_lm_studio
    one_lm_studio.faults(v0_shows_loading=None, listing_lag_seconds=None)


def test_sighup_reloads_and_sigterm_leaves_models_loaded_and_exits_0(
    lm_studio: SimulatorProcess, tmp_path: Path
) -> None:
    running = DaemonProcess(tmp_path, settings(lm_studio.url, "a"))
    with ending(running):
        running.reaches("a", "warm")
        running.config.write_text("nonsense")
        running.signal(signal.SIGHUP)
        wait_until(lambda: not running.status()["config"]["ok"])
        running.config.write_text(settings(lm_studio.url, "a", "b"))
        running.signal(signal.SIGHUP)
        wait_until(lambda: len(running.status()["models"]) == 2)
        running.reaches("b", "warm")
        running.signal(signal.SIGTERM)
        code = running.ended()

    assert code == 0
    assert (lm_studio.instances("a"), lm_studio.instances("b")) == (1, 1)
    assert running.events()[-1]["event"] == "daemon.stopped"
    assert [row["level"] for row in running.events("config.rejected")] == ["error"]


class ToldToReload(DaemonProcess):
    """Before it can have heard of it."""

    told = False

    def _started(self) -> dict[str, Any] | None:
        if not self.told and self.process.poll() is None:
            blocked = Path(f"/proc/{self.process.pid}/status").read_text().partition("SigBlk:")[2].split()[0]
            if int(blocked, 16) & 1 << signal.SIGHUP - 1:
                self.signal(signal.SIGHUP)
                self.told = True
        return super()._started()


@pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux says of a process")
def test_a_reload_that_is_asked_for_while_the_daemon_starts_is_done_once_it_listens(tmp_path: Path) -> None:
    running = ToldToReload(tmp_path, settings("http://127.0.0.1:9", "a"))
    with ending(running):
        wait_until(lambda: running.events("config.applied"), "it has read its config again")

        assert running.told
        assert running.status()["config"]["ok"]


@pytest.mark.parametrize(("number", "key"), [(signal.SIGTERM, "c"), (signal.SIGINT, "d")])
def test_a_signal_in_the_middle_of_a_load_ends_it_at_once_with_0(
    number: signal.Signals, key: str, lm_studio: SimulatorProcess, tmp_path: Path
) -> None:
    running = DaemonProcess(tmp_path, settings(lm_studio.url, key))
    with ending(running):
        running.reaches(key, "loading")
        running.signal(number)
        running.signal(number)
        code = running.ended()

    assert code == 0
    assert "Traceback" not in running.err.read_text()


@pytest.mark.parametrize(
    ("key", "remembers", "faults"),
    [
        ("e", True, {"v0_shows_loading": False}),
        ("f", False, {"v0_shows_loading": True}),
        ("g", True, {"v0_shows_loading": False, "listing_lag_seconds": 600.0}),
    ],
    ids=["by the state directory", "by what v0 shows", "listed late"],
)
def test_killed_during_a_load_and_started_again_it_loads_nothing_twice(
    key: str, remembers: bool, faults: dict[str, Any], lm_studio: SimulatorProcess, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    folder = tmp_path / "kept" if remembers else tmp_path / "file" / "not"
    text = settings(lm_studio.url, key, server=f'state_dir = "{folder}"')
    lm_studio.faults(**faults)
    first = DaemonProcess(tmp_path, text, "first")
    with ending(first):
        wait_until(lambda: lm_studio.happened("load.started", key))
        if "listing_lag_seconds" in faults:
            lm_studio.let_it_load(key)
            wait_until(lambda: lm_studio.happened("load.ended", key))
        first.kill()
    second = DaemonProcess(tmp_path, text, "second")
    with ending(second):
        # It has listed, and found nothing that is loaded.
        wait_until(lambda: second.status()["upstreams"][0]["state"] == "up")
        lm_studio.advance(600)
        warm = second.reaches(key, "warm")
        left = list(folder.glob("load-*")) if remembers else []

    assert (lm_studio.happened("load.started", key), lm_studio.instances(key)) == (1, 1)
    assert warm["instances"] == 1
    assert left == []
    assert len(second.events("model.load_remembered")) == remembers


@pytest.fixture
def port() -> Iterator[int]:
    with reserved_port() as port:
        yield port


def answers(url: str) -> bool:
    try:
        return ask(url)[0] == 200
    except OSError:
        return False


def test_a_stderr_that_nobody_reads_stops_neither_the_daemon_nor_its_end(
    lm_studio: SimulatorProcess, tmp_path: Path, port: int
) -> None:
    read, write = os.pipe()
    os.set_blocking(write, False)
    while True:
        try:
            os.write(write, b"x" * 4096)
        except BlockingIOError:
            break
    os.set_blocking(write, True)
    url = f"http://127.0.0.1:{port}"
    text = settings(lm_studio.url, "a").replace(
        'admin_listen = "127.0.0.1:0"', f'admin_listen = "{urlsplit(url).netloc}"'
    )
    running = DaemonProcess(tmp_path, text, stderr=write)
    with ending(running):
        wait_until(lambda: answers(f"{url}/readyz"))
        running.signal(signal.SIGTERM)
        code = running.ended()
    os.close(read)
    os.close(write)

    assert code == 0


@pytest.mark.parametrize("configured", [True, False])
def test_a_stderr_that_is_closed_changes_nothing(
    lm_studio: SimulatorProcess, tmp_path: Path, port: int, configured: bool
) -> None:
    url = f"http://127.0.0.1:{port}"
    path = tmp_path / "its.toml"
    path.write_text(
        settings(lm_studio.url, "a").replace(
            'admin_listen = "127.0.0.1:0"', f'admin_listen = "{urlsplit(url).netloc}"'
        )
    )
    words = [
        "sh",
        "-c",
        'exec "$@" 2>&-',
        "sh",
        *KEEPALIVE,
        "run",
        *(["-c", str(path)] if configured else []),
    ]
    environ = {
        "KEEPALIVE_SERVER__LISTEN": "127.0.0.1:0",
        "KEEPALIVE_SERVER__ADMIN_LISTEN": urlsplit(url).netloc,
        "KEEPALIVE_UPSTREAMS__0__URL": lm_studio.url,
    }
    running = Running(words, tmp_path, "daemon", **environ)
    with ending(running):
        wait_until(lambda: answers(f"{url}/readyz"))
        running.signal(signal.SIGTERM)
        code = running.ended()

    assert code == 0


def test_it_runs_on_uvloop_where_there_is_one() -> None:
    script = (
        "import asyncio\nfrom keepalive.cli.app import _run\n"
        "async def main(): print(type(asyncio.get_running_loop()).__module__)\n_run(main())"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment(), check=True
    )

    pytest.importorskip("uvloop", reason="uvloop is not installed")
    assert ran.stdout == "uvloop\n"


async def test_an_address_that_leads_back_to_the_daemon_is_told_and_costs_no_sockets() -> None:
    with reserved_port() as port:
        # As a machine's name or its address in the network would: no look at the config can tell.
        text = settings(f"http://127.0.0.2:{port}", "a").replace("127.0.0.1:0", f"0.0.0.0:{port}", 1)
        async with daemon(text) as running:
            await until(lambda: running.status()["upstreams"][0]["state"] == "down", "it is asked")
            why = "the url of upstream local leads back to keepalive itself; write where LM Studio listens"
            assert running.status()["upstreams"][0]["error"] == why
            sockets = len(os.listdir("/proc/self/fd"))
            answers = [await asked(f"http://127.0.0.1:{port}{path}") for path in ("/v1/models", "/anything")]

            assert [status for status, *_ in answers] == [502, 502]
            assert all(why in text for *_, text in answers)
            assert len(os.listdir("/proc/self/fd")) < sockets + 20


async def test_two_daemons_that_take_each_other_for_lm_studio_say_so() -> None:
    with reserved_port() as one, reserved_port() as two:

        def text(mine: int, other: int) -> str:
            return settings(f"http://127.0.0.1:{other}", "a").replace("127.0.0.1:0", f"127.0.0.1:{mine}", 1)

        async with daemon(text(one, two)) as first, daemon(text(two, one)) as second:
            for running in (first, second):
                await until(
                    lambda running=running: "leads back" in str(running.status()["upstreams"][0]["error"]),
                    "it is told",
                )

            assert (await asked(first.url + "/v1/models"))[0] == 502
