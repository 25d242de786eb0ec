"""More models than memory, from the first request to the last byte: the real daemon, sockets and all."""

import asyncio
import json
import re
from pathlib import Path
from typing import Any

from keepalive.config import parse
from keepalive.core.facts import ModelId
from keepalive.service.daemon import Daemon
from keepalive.simulator.models import SimModel
from tests.kit.live import asked, daemon, model, settings, simulator, until

CHAT = "/v1/chat/completions"
A, B = (
    SimModel("acme/a", size_bytes=9 * 10**9, load_seconds=0.1),
    SimModel("acme/b", size_bytes=9 * 10**9, load_seconds=0.1),
)
EMBED = SimModel("acme/embed", kind="embedding", size_bytes=10**8, load_seconds=0.1)


async def chat(running: Daemon, name: str, **more: Any) -> tuple[int, str]:
    body = {"model": name, "messages": [{"role": "user", "content": "x"}], "max_tokens": 2, **more}
    status, _, text = await asked(running.url + CHAT, "POST", body)
    return status, text


async def metrics(running: Daemon) -> str:
    _, _, text = await asked(running.admin_url + "/metrics")
    return text


async def test_two_models_take_turns_in_the_room_of_one_and_all_of_it_is_said() -> None:
    async with simulator(A, B) as upstream:
        tables = [f'key = "{m.key}"\nkeep = "auto"' for m in (A, B)]
        text = settings(upstream.url, *tables, upstream='memory = "12GB"\nsdk = "off"')
        async with daemon(text) as running:
            assert (await asked(running.admin_url + "/readyz"))[0] == 200
            answers = [await chat(running, key) for key in (A.key, B.key, A.key)]
            here = model(running, A.key)
            away = model(running, B.key)
            status = running.status()
            page = await metrics(running)
            kinds = [e["kind"] for e in upstream.studio.log(0) if e["kind"] in ("load.started", "unloaded")]

    assert [status for status, _ in answers] == [200, 200, 200]
    assert kinds == ["load.started", "unloaded", "load.started", "unloaded", "load.started"]
    assert (here["keep"], here["memory_bytes"], here["memory_source"]) == ("auto", 10_800_000_000, "size")
    assert (away["state"], away["wanted"], away["reason"]) == (
        "cold",
        False,
        "loaded when somebody asks for it",
    )
    assert status["upstreams"][0]["memory"] == {
        "budget_bytes": 12 * 10**9,
        "places": None,
        "used_bytes": 10_800_000_000,
        "source": "config",
        "strangers": [],
        "next_to_go": [],
        "waiting": [],
    }
    assert 'keepalive_model_unloads_total{model="acme/a",upstream="local",cause="room"} 1.0' in page
    assert 'keepalive_upstream_memory_budget_bytes{upstream="local"} 1.2e+010' in page.replace(
        "e+10", "e+010"
    )


async def test_who_waits_for_his_turn_is_told_how_long_that_will_take() -> None:
    async with simulator(A, B) as upstream:
        tables = [f'key = "{m.key}"\nkeep = "auto"' for m in (A, B)]
        text = settings(upstream.url, *tables, upstream='memory = "30GB"', server='heartbeat = "100ms"')
        async with daemon(text) as running:
            for m in (A, B):
                assert (await chat(running, m.key))[0] == 200
            upstream.studio.set_faults(load_seconds={"value": 3.0, "model": A.key})
            upstream.studio.restart()
            await until(lambda: not any(m["instances"] for m in running.status()["models"]), "they are gone")
            first = asyncio.create_task(chat(running, A.key, stream=True))
            await until(lambda: model(running, A.key)["state"] == "loading", "A is loading")
            second = asyncio.create_task(chat(running, B.key, stream=True))
            await until(lambda: model(running, B.key)["waiting"] == 1, "B waits")
            shown = model(running, B.key)
            told = (await second)[1]
            await first

    assert (shown["state"], shown["load"]) == ("cold", None)
    assert shown["eta_seconds"] is not None
    assert re.search(r"keepalive model=acme/b state=cold elapsed=\S+ eta=\d", told)


async def test_an_answer_under_way_goes_on_to_its_end_while_others_wait_for_its_room() -> None:
    async with simulator(A, B, token_seconds=0.05) as upstream:
        tables = [f'key = "{m.key}"\nkeep = "auto"' for m in (A, B)]
        text = settings(upstream.url, *tables, upstream='memory = "12GB"', defaults='patience = "0s"')
        async with daemon(text) as running:
            long = asyncio.create_task(chat(running, A.key, max_tokens=40, stream=True))
            await until(lambda: model(running, A.key)["in_flight"] == 1, "A answers")
            other = asyncio.create_task(chat(running, B.key))
            await until(lambda: "makes room" in (model(running, A.key)["reason"] or ""), "A is drained")
            late = asyncio.create_task(chat(running, A.key))
            (_, streamed), (status, _), (late_status, _) = await asyncio.gather(long, other, late)

    assert streamed.rstrip().endswith("[DONE]")
    assert "error" not in streamed
    assert (status, late_status) == (200, 200)


async def test_what_nobody_wrote_down_is_kept_once_it_is_asked_for_and_stays_so_after_a_reload() -> None:
    async with simulator(A, EMBED) as upstream:
        text = settings(upstream.url, server='unlisted = "auto"', upstream='memory = "12GB"')
        async with daemon(text) as running:
            before = running.status()["models"]
            status, _ = await chat(running, "ACME/A")
            await chat(running, "no-such-model")
            await until(lambda: model(running, A.key)["state"] == "warm", "it is kept")
            running._apply(parse(text, "test", {}))
            after = running.status()["models"]
            page = await metrics(running)
            jit = [e for e in upstream.studio.log(0) if e["kind"] == "load.started" and e["owner"] == "jit"]

    assert before == []
    assert (status, jit) == (200, [])
    assert [(m["key"], m["keep"], m["state"]) for m in after] == [(A.key, "auto", "warm")]
    assert 'keepalive_model_state{model="acme/a",upstream="local",state="warm"} 1.0' in page
    assert "no-such-model" not in page


async def test_a_model_that_can_never_fit_is_refused_at_once_and_says_why() -> None:
    async with simulator(A) as upstream:
        text = settings(upstream.url, f'key = "{A.key}"\nkeep = "auto"', upstream='memory = "8GB"')
        async with daemon(text) as running:
            await until(lambda: model(running, A.key)["state"] == "cold", "it is known")
            status, body = await chat(running, A.key)

    assert status == 503
    assert "it takes 10.8 GB, and the budget is 8.0 GB" in json.loads(body)["error"]["message"]


async def test_the_next_daemon_lets_go_of_what_the_one_before_it_loaded(tmp_path: Path) -> None:
    async with simulator(A, B) as upstream:
        server = f'unlisted = "auto"\nstate_dir = "{tmp_path}"'
        text = settings(upstream.url, server=server, upstream='memory = "12GB"')
        async with daemon(text) as running:
            assert (await chat(running, A.key))[0] == 200
        async with daemon(text) as running:
            await until(lambda: [m["ours"] for m in running.status()["models"]] == [True], "it is ours still")
            status, _ = await chat(running, B.key)
            kinds = [(e["kind"], e["model"]) for e in upstream.studio.log(0) if e["kind"] == "unloaded"]

    assert status == 200
    assert kinds == [("unloaded", A.key)]


async def test_after_a_restart_of_both_free_room_is_filled_with_what_was_asked_for_before(
    tmp_path: Path,
) -> None:
    async with simulator(A, B) as upstream:
        tables = [f'key = "{m.key}"\nkeep = "auto"' for m in (A, B)]
        text = settings(upstream.url, *tables, server=f'state_dir = "{tmp_path}"', upstream='memory = "12GB"')
        async with daemon(text) as running:
            said = [{"role": "user", "content": "canary of a secret"}]
            assert (await chat(running, B.key, messages=said))[0] == 200
        upstream.studio.restart()
        async with daemon(text) as running:
            await until(lambda: model(running, B.key)["state"] == "warm", "it is loaded, though nobody asks")
            began = [e["model"] for e in upstream.studio.log(0) if e["kind"] == "load.started"]

    assert began == [B.key, B.key]
    assert b"canary" not in (tmp_path / "history.db").read_bytes()


async def test_what_an_earlier_life_loaded_is_taken_up_when_a_reload_says_so(tmp_path: Path) -> None:
    async with simulator(A, B) as upstream:
        server = f'state_dir = "{tmp_path}"\nunlisted = "{{}}"'
        text = settings(
            upstream.url, f'key = "{B.key}"\nkeep = "auto"', server=server, upstream='memory = "12GB"'
        )
        async with daemon(text.replace("{}", "auto")) as running:
            assert (await chat(running, A.key))[0] == 200
        file = tmp_path / "config.toml"
        async with daemon(text.replace("{}", "pass"), path=file) as running:
            named = [m["key"] for m in running.status()["models"]]
            file.write_text(text.replace("{}", "auto"))
            running.reload()
            await until(
                lambda: [m["ours"] for m in running.status()["models"]] == [False, True], "it is ours still"
            )

    assert named == [B.key]


async def test_of_models_that_nobody_wrote_down_a_hundred_have_series_of_their_own() -> None:
    models = [SimModel(f"m-{n}", load_seconds=0.1) for n in range(130)]
    async with simulator(*models) as upstream:
        text = settings(upstream.url, server='unlisted = "auto"', upstream='memory = "900GB"\nsdk = "off"')
        async with daemon(text) as running:
            for one in models[:-1]:
                running.keeper.adopt(ModelId("local", one.key))
            assert (await chat(running, models[-1].key))[0] == 200
            page = await metrics(running)
            known = len(running.status()["models"])

    assert known == 130
    assert page.count("keepalive_model_wanted{") == 100
    assert 'model="m-129"' not in page
    assert [
        line
        for line in page.splitlines()
        if line.startswith("keepalive_proxy_requests_total{") and "other" in line
    ]
