"""Whatever a caller calls a model that we keep: it is held, counted and protected as that model.

The real daemon before simulated LM Studios. Whatever a test does, no request of ours loads a kept model on demand.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from keepalive.service.daemon import Daemon
from keepalive.simulator.models import SimModel
from keepalive.simulator.studio import Studio
from tests.kit.live import asked, daemon, let_it_load, loads, model, settings, simulator, until

KEY = "acme/tiny-4b"
TINY = SimModel(KEY, quantization="Q4_K_M", further=("Q8_0",), load_seconds=0.1)
KEPT = f'key = "{KEY}"\naliases = ["gpt-4o-mini", "local-model"]'

AT_ONCE = {"token_seconds": 0.0}  # nobody listens here to how it speaks


@contextlib.asynccontextmanager
async def named(
    *models: SimModel, kept: str = KEPT, server: str = "", **faults: Any
) -> AsyncIterator[tuple[Daemon, Studio]]:
    async with simulator(*(models or (TINY,)), **{**AT_ONCE, **faults}) as upstream:
        async with daemon(settings(upstream.url, kept, server=server)) as running:
            yield running, upstream.studio
        started = [event for event in upstream.studio.log(0) if event["kind"] == "load.started"]
        assert [event for event in started if event["model"] == KEY and event["owner"] == "jit"] == []
        assert [event for event in started if event["model"] == KEY and event["copies"] > 0] == []


@contextlib.asynccontextmanager
async def two(
    a: tuple[SimModel, ...], b: tuple[SimModel, ...], *tables: str, server: str = ""
) -> AsyncIterator[tuple[Daemon, Studio, Studio]]:
    async with simulator(*a, **AT_ONCE) as first, simulator(*b, **AT_ONCE) as second:
        more = f'\n[[upstreams]]\nname = "far"\nurl = "{second.url}"\n'
        text = settings(first.url, *tables, server=server).replace("[defaults]", more + "[defaults]")
        async with daemon(text) as running:
            yield running, first.studio, second.studio


def said(path: str, name: str | None, *, stream: bool = False) -> dict[str, Any]:
    """The smallest request of each route that answers for a while."""
    body: dict[str, Any] = {} if name is None else {"model": name}
    if stream:
        body["stream"] = True
    if path.endswith("/embeddings"):
        return {**body, "input": "x"}
    if path.endswith(("/responses", "/api/v1/chat")):
        return {**body, "input": "x"}
    if path.endswith("/v1/completions") or path.endswith("v0/completions"):
        return {**body, "prompt": "x", "max_tokens": 2}
    return {**body, "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}


async def post(running: Daemon, path: str, body: Any, **headers: str) -> tuple[int, Any]:
    status, _, text = await asked(running.url + path, "POST", body, **headers)
    return status, json.loads(text) if text.startswith("{") else text


async def warm(running: Daemon, key: str = KEY, upstream: str = "local") -> None:
    await until(lambda: model(running, key, upstream)["state"] == "warm", f"{key} is warm on {upstream}")


CHAT = "/v1/chat/completions"
TEXT_ROUTES = [
    CHAT, "/v1/completions", "/v1/responses", "/v1/messages", "/api/v0/chat/completions", "/api/v0/completions",
    "/api/v1/chat",
]  # fmt: skip


@pytest.mark.parametrize(
    "name", [f"{KEY}@q4_k_m", "ACME/Tiny-4B@Q4_K_M", "gpt-4o-mini", "GPT-4o-Mini", KEY.upper()]
)
async def test_a_cold_model_is_loaded_once_under_any_of_its_names(name: str) -> None:
    async with named(load_seconds=600.0) as (running, studio):
        asking = asyncio.create_task(post(running, CHAT, said(CHAT, name, stream=True)))
        await until(lambda: model(running, KEY)["waiting"] == 1, "it is held")
        await let_it_load(studio)
        status, text = await asking

        assert status == 200
        assert "data: [DONE]" in text
        assert f": keepalive model={KEY} state=" in text
        page = (await asked(f"{running.admin_url}/metrics"))[2]
        assert f'keepalive_proxy_requests_total{{model="{KEY}",outcome="ok",route="chat"}} 1.0' in page


@pytest.mark.parametrize("path", TEXT_ROUTES)
async def test_every_route_understands_an_alias_a_variant_and_the_default(path: str) -> None:
    async with named(server='default_model = "local-model"') as (running, _):
        await warm(running)
        for name in ("local-model", f"{KEY}@q4_k_m", "nobody-lists-this", None, ""):
            for stream in (False, True):
                status, answer = await post(running, path, said(path, name, stream=stream))

                assert status == 200, (name, stream, answer)
        page = (await asked(f"{running.admin_url}/metrics"))[2]
        counted = [line for line in page.splitlines() if line.startswith("keepalive_proxy_requests_total")]
        assert len(counted) == 1
        assert f'model="{KEY}"' in counted[0]
        assert counted[0].endswith(" 10.0")


async def test_embeddings_understand_an_alias_and_the_default() -> None:
    embed = SimModel("text-embedding-x", kind="embedding", load_seconds=0.1)
    kept = 'key = "text-embedding-x"\naliases = ["text-embedding-3-small"]'
    async with named(embed, kept=kept, server='default_model = "text-embedding-x"') as (running, studio):
        for path in ("/v1/embeddings", "/api/v0/embeddings"):
            for name in ("text-embedding-3-small", None):
                status, answer = await post(running, path, said(path, name))
                assert (status, answer["model"]) == (200, "text-embedding-x")
        assert loads(studio) == 1


async def test_the_default_stands_in_only_for_models_of_its_kind() -> None:
    embed = SimModel("text-embedding-x", kind="embedding", load_seconds=0.1)
    server = f'default_model = "{KEY}"'
    async with named(TINY, embed, server=server, load_seconds=600.0) as (running, studio):
        await until(lambda: model(running, KEY)["state"] == "loading", "our load is under way")
        for name in ("text-embedding-3-small", None):
            status, _ = await post(running, "/v1/embeddings", said("/v1/embeddings", name))
            assert status == 400  # LM Studio says so at once
        asked_for = [e.get("asked") for e in studio.log(0) if e.get("route") == "embeddings"]

        assert KEY not in asked_for
        assert model(running, KEY)["waiting"] == 0


async def test_another_variant_is_another_model() -> None:
    async with named() as (running, studio):
        await warm(running)
        studio.set_faults(jit=False, wrong_model_fallback=False)  # else one is loaded beside ours
        status, _ = await post(running, CHAT, said(CHAT, f"{KEY}@q8_0"))

        assert status == 400
        assert model(running, KEY)["state"] == "warm"


async def test_an_alias_is_understood_wherever_a_model_is_named() -> None:
    async with named(server="heartbeat = '200ms'") as (running, _):
        await warm(running)
        for name in ("gpt-4o-mini", f"{KEY}@q4_k_m", KEY.upper()):
            quoted = name.replace("/", "%2F")
            assert (await asked(f"{running.admin_url}/readyz?model={quoted}"))[0] == 200
            status, _, text = await asked(f"{running.admin_url}/api/models/{quoted}/warm", "POST")
            assert (status, json.loads(text)["key"]) == (202, KEY)
            shown = json.loads((await asked(f"{running.admin_url}/api/status?model={quoted}"))[2])
            assert [m["key"] for m in shown["models"]] == [KEY]
            told = await post(
                running, "/api/models/warmup", {"modelId": name}, **{"Content-Type": "application/json"}
            )
            assert (told[0], told[1]["data"]["modelId"]) == (200, KEY)
            order = {"prompt": "x", "model": name, "maxTokens": 2}
            status, text = await post(
                running, "/api/prompts/execute/stream", order, **{"Content-Type": "application/json"}
            )
            assert (status, '"type":"done"' in text) == (200, True)
        assert (await asked(f"{running.admin_url}/readyz?model=nobody"))[0] == 404
        assert (await asked(f"{running.admin_url}/api/models/gpt-4o-mini/release", "POST"))[0] == 202
        await until(lambda: not model(running, KEY)["wanted"], "released")


@pytest.mark.parametrize("bad", [7, ["a"], {"id": "a"}, False, "m" * 1_000_000])
async def test_what_is_nobodys_name_is_refused_in_the_words_of_the_route(bad: Any) -> None:
    async with named() as (running, studio):
        await warm(running)
        for path in TEXT_ROUTES:
            status, answer = await post(running, path, {**said(path, None), "model": bad})
            assert status == 400
            assert "model is no name" in answer["error"]["message"]
        inference = [
            e for e in studio.log(0) if e["kind"] == "request" and e.get("route") in ("chat", "responses")
        ]
        assert all(event.get("asked") in (None, KEY) for event in inference)


@pytest.mark.parametrize(
    ("body", "server"),
    [
        ({**said(CHAT, None, stream=True), "max_tokens": 200}, ""),
        ({**said(CHAT, "local-model-of-nobody", stream=True), "max_tokens": 200}, ""),
        (None, ""),
        (None, f'default_model = "{KEY}"'),
    ],
    ids=["none", "nobody", "no body", "no body, and a default"],
)
async def test_a_request_whose_model_lm_studio_chooses_protects_it(
    body: dict[str, Any] | None, server: str
) -> None:
    async with named(token_seconds=0.02, kept=f'key = "{KEY}"', server=server) as (running, studio):
        await warm(running)
        asking = asyncio.create_task(post(running, CHAT, body))
        await until(lambda: model(running, KEY)["in_flight"] == 1, "it counts as use")
        await asked(f"{running.admin_url}/api/models/{KEY}/release", "POST")
        status, text = await asking

        assert status == 200
        assert ("data: [DONE]" if body else "chatcmpl-") in str(text)
        assert [e for e in studio.log(0) if e["kind"] == "unloaded"] == []
        page = (await asked(f"{running.admin_url}/metrics"))[2]
        assert 'keepalive_proxy_requests_total{model="other",outcome="ok",route="chat"} 1.0' in page
        await until(lambda: model(running, KEY)["in_flight"] == 0, "it has ended")


# --- two upstreams ------------------------------------------------------------------------------------

ONLY_B = SimModel("on-b-only", load_seconds=0.1)


async def test_what_only_another_upstream_lists_is_asked_there() -> None:
    async with two((TINY,), (ONLY_B,), KEPT + '\nupstream = "local"') as (running, _, far):
        await warm(running)
        status, answer = await post(running, CHAT, said(CHAT, "ON-B-only"))

        assert (status, answer["model"]) == (200, "on-b-only")
        assert loads(far, "on-b-only") == 1
        for path in ("/api/v0/models/on-b-only", "/api/v0/models/gpt-4o-mini"):
            assert (await asked(running.url + path))[0] == 200


async def test_a_copy_that_has_just_been_loaded_is_asked_for_where_it_is() -> None:
    async with two((TINY,), (ONLY_B,), KEPT + '\nupstream = "local"') as (running, _, far):
        await warm(running)
        await post(running, CHAT, said(CHAT, "on-b-only"))
        _, loaded = await post(running, LOAD, {"model": "on-b-only"})
        far.set_faults(list_reply="error_500")  # what was listed before is all that is known
        status, answer = await post(running, CHAT, said(CHAT, loaded["instance_id"]))

        assert (status, answer["model"]) == (200, "on-b-only:2")


@pytest.mark.parametrize(
    ("path", "rows", "ident"),
    [("/v1/models", "data", "id"), ("/api/v0/models", "data", "id"), ("/api/v1/models", "models", "key")],
)
async def test_the_models_of_all_upstreams_are_one_list_with_the_aliases(
    path: str, rows: str, ident: str
) -> None:
    async with two((TINY,), (ONLY_B, TINY), KEPT + '\nupstream = "local"') as (running, local, far):
        await warm(running)
        listed = json.loads((await asked(running.url + path))[2])[rows]
        far.set_faults(list_reply="error_500")
        without = json.loads((await asked(running.url + path))[2])[rows]
        local.set_faults(list_reply="error_500")
        status = (await asked(running.url + path))[0]

        assert [row[ident] for row in listed] == [KEY, "on-b-only", "gpt-4o-mini", "local-model"]
        assert {**listed[2], ident: KEY} == listed[0]
        assert [row[ident] for row in without] == [KEY, "gpt-4o-mini", "local-model"]
        assert status == 500


async def test_one_upstream_without_aliases_lists_in_its_own_bytes() -> None:
    async with named(kept=f'key = "{KEY}"') as (running, _studio):
        await warm(running)
        for path in ("/v1/models", "/api/v0/models", "/api/v1/models"):
            _, _, ours = await asked(running.url + path)
            assert ours == (await asked(f"{running.status()['upstreams'][0]['url']}{path}"))[2]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "ident"), [("/v1/responses", "id"), ("/api/v1/chat", "response_id")])
async def test_an_answer_is_gone_on_from_where_it_is_stored(path: str, ident: str, stream: bool) -> None:
    kept = f'key = "{KEY}"\nupstream = ["local", "far"]'
    async with two((TINY,), (TINY,), kept) as (running, _local, _far):
        await warm(running)
        await warm(running, KEY, "far")
        for _ in range(4):  # whichever of them answers
            status, first = await post(running, path, said(path, KEY, stream=stream))
            assert status == 200
            ids = (
                [first[ident]]
                if not stream
                else [
                    part.split('"')[0] for part in first.split(f'"{ident}":"')[1:] if part.startswith("resp_")
                ]
            )
            for name in (KEY, None):
                body = {**said(path, name), "previous_response_id": ids[0]}
                if path == "/api/v1/chat" and name is None:
                    continue  # there a model has to be named
                status, answer = await post(running, path, body)
                assert status == 200, answer


@pytest.mark.parametrize("name", [None, "local-model"])
async def test_who_names_nobody_goes_on_from_an_answer_where_it_is_and_not_at_the_default(
    name: str | None,
) -> None:
    kept = [f'key = "{KEY}"\nupstream = "local"', 'key = "beyond"\nupstream = "far"']
    far = SimModel("beyond", load_seconds=0.1)
    async with two((TINY,), (far,), *kept, server=f'default_model = "{KEY}"') as (running, _local, _far):
        await warm(running)
        await warm(running, "beyond", "far")
        _, first = await post(running, "/v1/responses", said("/v1/responses", "beyond"))

        body = {**said("/v1/responses", name), "previous_response_id": first["id"]}
        status, answer = await post(running, "/v1/responses", body)

        assert status == 200, answer
        assert answer["model"] == "beyond"


async def test_after_a_restart_each_upstream_is_asked_for_a_stored_answer() -> None:
    kept = f'key = "{KEY}"\nupstream = ["local", "far"]'
    async with two((TINY,), (TINY,), kept) as (running, _local, _far):
        await warm(running)
        await warm(running, KEY, "far")
        url = running.status()["upstreams"][1]["url"]
        ident = json.loads((await asked(f"{url}/v1/responses", "POST", said("/v1/responses", KEY)))[2])["id"]

        status, answer = await post(
            running, "/v1/responses", {**said("/v1/responses", KEY), "previous_response_id": ident}
        )
        assert status == 200, answer
        assert (await asked(f"{running.url}/v1/responses/{ident}"))[0] == 200
        assert (await asked(f"{running.url}/v1/responses/{ident}", "DELETE"))[0] == 200
        assert (await asked(f"{running.url}/v1/responses/resp_{'0' * 48}"))[0] == 404


# --- loads ---------------------------------------------------------------------------------------------

LOAD = "/api/v1/models/load"


@pytest.mark.parametrize("name", [KEY, "gpt-4o-mini", f"{KEY}@q4_k_m"])
async def test_a_callers_load_joins_ours(name: str) -> None:
    async with named(load_seconds=600.0) as (running, studio):
        await until(lambda: model(running, KEY)["state"] == "loading", "our load is under way")
        asking = [
            asyncio.create_task(post(running, LOAD, {"model": name, "echo_load_config": True}))
            for _ in range(3)
        ]
        await until(lambda: model(running, KEY)["waiting"] == 3, "they wait for it")
        await let_it_load(studio)
        answers = await asyncio.gather(*asking)
        answers.append(await post(running, LOAD, {"model": name, "echo_load_config": True}))

        for status, answer in answers:
            assert status == 200
            assert answer["load_time_seconds"] >= 0
            assert (answer["type"], answer["instance_id"], answer["status"]) == ("llm", KEY, "loaded")
            assert answer["load_config"]["context_length"] == 4096
        assert loads(studio) == 1


async def test_where_all_is_kept_that_is_asked_for_a_load_is_asking() -> None:
    async with (
        simulator(TINY, ONLY_B, **AT_ONCE) as upstream,
        daemon(settings(upstream.url, server='unlisted = "auto"')) as running,
    ):
        answers = [post(running, LOAD, {"model": "on-b-only", "echo_load_config": True}) for _ in range(3)]
        ids = [answer["instance_id"] for _, answer in await asyncio.gather(*answers)]
        # Who wants more than the model has it made.
        _, own = await post(running, LOAD, {"model": KEY, "context_length": 8192})

        assert ids == ["on-b-only"] * 3
        assert loads(upstream.studio, "on-b-only") == 1
        assert own["instance_id"] == KEY
        assert (await post(running, LOAD, {"model": "nobody-lists-this"}))[0] == 404


async def test_a_callers_load_of_a_released_model_is_a_wish_for_it() -> None:
    async with named() as (running, studio):
        await warm(running)
        await asked(f"{running.admin_url}/api/models/{KEY}/release", "POST")
        await until(lambda: model(running, KEY)["instances"] == 0, "unloaded")
        status, headers, _ = await asked(running.url + LOAD, "POST", {"model": KEY, "context_length": 1024})

        assert (status, headers["X-Keepalive-Load"]) == (200, "joined")
        assert headers["X-Keepalive-Load-Differs"] == "context_length"
        assert model(running, KEY)["wanted"]
        assert loads(studio) == 2


async def test_a_callers_load_that_does_not_come_in_time_fails_in_lm_studios_layout() -> None:
    async with named(load_seconds=600.0) as (running, _):
        status, answer = await post(running, LOAD, {"model": KEY}, Prefer="wait=1")

        assert status == 503
        assert answer["error"]["type"]


async def test_loads_are_passed_where_the_config_says_so_and_for_other_models() -> None:
    async with simulator(TINY, ONLY_B) as upstream:
        async with daemon(settings(upstream.url, KEPT, server='loads = "pass"')) as running:
            await warm(running)
            assert (await post(running, LOAD, {"model": "gpt-4o-mini"}))[1]["instance_id"] == f"{KEY}:2"
        async with daemon(settings(upstream.url, KEPT)) as running:
            await warm(running)
            for name in (f"{KEY}@q8_0", "on-b-only"):
                assert (await post(running, LOAD, {"model": name}))[0] == 200
            assert (await post(running, LOAD, {}))[0] == 400
        assert loads(upstream.studio, KEY) == 3


async def test_a_caller_may_unload_ours_and_it_is_known_at_once() -> None:
    kept = f'{KEPT}\nrefresh_interval = "5m"'
    async with named(kept=kept) as (running, studio):
        await warm(running)
        status, _ = await post(running, "/api/v1/models/unload", {"instance_id": KEY})
        assert status == 200
        status, answer = await post(running, CHAT, said(CHAT, KEY))

        assert (status, answer["model"]) == (200, KEY)
        assert loads(studio) == 2


async def test_an_unload_by_an_alias_is_one_of_its_model_and_a_copy_that_is_gone_costs_no_other() -> None:
    kept = f'{KEPT}\nrefresh_interval = "5m"'
    async with named(kept=kept) as (running, studio):
        await warm(running)
        status, _ = await post(running, "/api/v1/models/unload", {"instance_id": f"{KEY}:2"})
        assert (status, len(studio.memory.copies(TINY))) == (404, 1)

        answer = await post(running, "/api/v1/models/unload", {"instance_id": "GPT-4o-mini"})
        assert answer == (200, {"instance_id": KEY})
        status, answer = await post(running, "/api/v1/models/unload", {"instance_id": "gpt-4o-mini"})

        assert (status, len(studio.memory.copies(TINY))) == (404, 0)
