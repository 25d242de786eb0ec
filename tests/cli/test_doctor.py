"""Each finding is brought about for real, found by what an operator types, and gone once it is mended."""

import asyncio
import json
import socket
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest

from keepalive import __version__, config
from keepalive.cli import doctor
from keepalive.cli.doctor import Finding, findings
from keepalive.cli.evidence import Evidence, Host, gather
from keepalive.service.daemon import Daemon
from keepalive.simulator.models import SimModel
from tests.kit.live import asked, command, daemon, model, settings, simulator, until
from tests.kit.raw import Close, RawServer, Read, answer
from tests.kit.router import Router

NOW = datetime(2026, 11, 22, 10, 0, tzinfo=UTC)
STATUS = {
    "version": __version__,
    "started_at": "2026-11-22T09:59:00.000Z",
    "scraped_at": "2026-11-22T09:59:50.000Z",
    "config": {"ok": True, "mistakes": []},
    "upstreams": [],
    "models": [],
}


async def examine(text: str, running: Daemon | None, **environ: str) -> list[Finding]:
    """What doctor finds with this config beside this daemon; nothing about the machine that runs the test."""
    status = json.loads((await asked(f"{running.admin_url}/api/status"))[2]) if running else None
    requests = (
        json.loads((await asked(f"{running.admin_url}/api/requests"))[2])["requests"] if running else []
    )
    address = running.admin_url if running else "http://127.0.0.1:9235"
    parsed = config.parse(text, "config.toml", environ)
    seen = await gather(parsed, Path("config.toml"), environ, address, status, "no daemon answers", requests)
    return findings(replace(seen, host=Host(datetime.now(UTC), ZoneInfo("Europe/Lisbon"))))


def at_rest(
    text: str,
    status: dict[str, object] | None = None,
    host: Host | None = None,
    requests: Sequence[dict[str, object]] = (),
) -> list[Finding]:
    """What is found without asking any LM Studio."""
    text = text if "[[models]]" in text else f'{text}\n[[models]]\nkey = "gemma"\n'
    parsed = config.parse(text, "config.toml", {})
    host = host or Host(NOW, ZoneInfo("Europe/Lisbon"))
    status = {**STATUS, "models": [{"upstream": k.upstream, "key": k.key, "state": "warm"} for k in parsed.kept],
              **(status or {})}  # fmt: skip
    return findings(
        Evidence(parsed, Path("config.toml"), "http://10.0.0.9:9235", status, "", host, requests=requests)
    )


async def warm(running: Daemon, *keys: str) -> None:
    for key in keys:
        await until(lambda key=key: model(running, key)["state"] == "warm", f"{key} is warm")


# --- nothing wrong ------------------------------------------------------------------------------------


async def test_nothing_is_found_where_nothing_is_wrong() -> None:
    async with simulator(SimModel("gemma", load_seconds=0.05)) as server:
        text = settings(server.url, 'key = "gemma"\ncontext_length = 4096')
        async with daemon(text) as running:
            await warm(running, "gemma")

            found = await examine(text, running)

    assert found == []


# --- the daemon ---------------------------------------------------------------------------------------


async def test_a_daemon_that_does_not_answer_is_the_first_finding() -> None:
    async with simulator(SimModel("gemma")) as server:
        found = await examine(settings(server.url, "gemma"), None)

    assert found == [
        Finding(
            "no daemon answers",
            "no model is kept loaded, and applications get no answer",
            "keepalive run -c config.toml",
        )
    ]


async def test_a_config_that_the_daemon_has_not_read_is_found() -> None:
    async with (
        simulator(SimModel("gemma", load_seconds=0.05), SimModel("qwen")) as server,
        daemon(settings(server.url, "gemma")) as running,
    ):
        await warm(running, "gemma")

        found = await examine(settings(server.url, "qwen"), running)

    assert [finding.what for finding in found] == [
        "the daemon and config.toml disagree: it does not keep qwen and still keeps gemma"
    ]
    assert found[0].do.startswith("kill -HUP its process")


async def test_what_was_asked_for_and_no_file_names_is_no_disagreement_where_it_is_kept() -> None:
    async with simulator(SimModel("gemma", load_seconds=0.05), SimModel("qwen", load_seconds=0.05)) as server:
        text = settings(server.url, "gemma", server='unlisted = "auto"')
        async with daemon(text) as running:
            await warm(running, "gemma")
            await asked(f"{running.url}/v1/chat/completions", "POST", {"model": "qwen", "messages": []})
            await until(lambda: len(running.status()["models"]) == 2, "it is kept")

            found = await examine(text, running)
            other = await examine(text.replace('"auto"', '"pass"'), running)

    assert found == []
    assert [finding.what for finding in other] == ["the daemon and config.toml disagree: it still keeps qwen"]


async def test_a_rejected_config_is_found_with_its_mistakes(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    async with simulator(SimModel("gemma", load_seconds=0.05)) as server:
        text = settings(server.url, "gemma")
        async with daemon(text, path=path) as running:
            await warm(running, "gemma")
            path.write_text(text + "\n[defaults2]\n")
            running.reload()

            found = await examine(text, running)

    assert len(found) == 1
    assert found[0].what.startswith("the daemon rejected its config: ")
    assert "defaults2" in found[0].what


def test_another_version_of_the_daemon_is_found() -> None:
    found = at_rest("", {"version": "0.0.1"}, Host(NOW, ZoneInfo("Europe/Lisbon"), unit="enabled"))

    assert found[0].what == f"the daemon is version 0.0.1, and this command {__version__}"
    assert found[0].do == "systemctl restart keepalive"


# --- answers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("seconds", "count"), [(None, 0), (299, 0), (312, 1)])
def test_an_answer_that_has_been_silent_for_minutes_is_found(seconds: int | None, count: int) -> None:
    gemma = {"upstream": "local", "key": "gemma", "state": "warm", "instance_id": "gemma:2"}

    found = at_rest("", {"models": [{**gemma, "silent_seconds": seconds}]})

    assert [finding.what for finding in found] == [
        "an answer of gemma on local has been silent for 5 min"
    ] * count
    assert all("lms unload gemma:2" in finding.do for finding in found)


@pytest.mark.parametrize(
    ("empty", "good", "count"), [(1, 0, 0), (2, 0, 1), (2, 2, 1), (2, 3, 0), (4, 5, 0), (5, 40, 1)]
)
def test_answers_without_a_word_are_found_where_they_are_no_exception(
    empty: int, good: int, count: int
) -> None:
    of_gemma = {"model": "gemma", "upstream": "local"}
    requests = [{**of_gemma, "outcome": "empty"}] * empty + [{**of_gemma, "outcome": "ok"}] * good
    others = [{"model": None, "upstream": None, "outcome": "empty"}] * 9

    found = at_rest("", requests=[*requests, *others])

    assert [finding.what for finding in found] == [
        f"{empty} of the last {empty + good} answers of gemma on local were empty"
    ] * count


def test_callers_who_are_turned_away_at_the_door_are_found() -> None:
    requests = [{"model": None, "upstream": None, "outcome": "rejected", "error": "host"}] * 2
    requests += [{"model": None, "upstream": None, "outcome": "rejected", "error": "origin"}]
    old = [{"model": None, "upstream": None, "outcome": "rejected"}]  # of a daemon before 1.1

    found = at_rest("", requests=[*requests, *old])

    assert [(finding.what, finding.do.partition("add ")[2].partition(",")[0]) for finding in found] == [
        ("1 request of the last minutes came from web pages of other origins, and was refused", "its origin"),
        (
            "2 requests of the last minutes came by a name that is not known here, and were refused",
            "the name that callers use",
        ),
    ]


async def test_a_model_that_says_nothing_is_found_by_what_an_operator_types(tmp_path: Path) -> None:
    async with simulator(SimModel("gemma", load_seconds=0.05), answer_tokens=0) as server:
        text = settings(server.url, "gemma")
        (tmp_path / "config.toml").write_text(text)
        async with daemon(text) as running:
            await warm(running, "gemma")
            for stream in (True, False):
                body = {"model": "gemma", "messages": [{"role": "user", "content": "hi"}], "stream": stream}
                await asked(f"{running.url}/v1/chat/completions", "POST", body)
            typed = await asyncio.to_thread(command, "doctor", "--url", running.admin_url, cwd=tmp_path)

    assert "✗ 2 of the last 2 answers of gemma on local were empty" in typed.stdout


# --- LM Studio ----------------------------------------------------------------------------------------


async def test_a_closed_port_is_found_with_the_command_that_opens_it() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        found = await examine(settings(url, "gemma"), None)

    assert found[1].what == f"LM Studio cannot be reached: nothing listens at {url}"
    assert found[1].do == f"lms server start --port {url.rpartition(':')[2]}"


async def test_a_server_that_is_there_and_no_tls_between_us_is_not_started_once_more() -> None:
    async with simulator(SimModel("gemma")) as server:
        found = await examine(settings(server.url.replace("http", "https"), "gemma"), None)

    assert found[1].what.endswith(f'where it speaks none, write "{server.url}" as url')
    assert found[1].do.startswith("mend url in [[upstreams]] 'local'")


async def test_another_program_on_the_port_is_found() -> None:
    page = answer(b"<html>It works!</html>", kind=b"text/html")
    async with RawServer([page, Close()]) as other:
        url = f"http://127.0.0.1:{other.port}"
        found = await examine(settings(url, "gemma"), None)

    assert found[1].what.startswith(f"what answers at {url} is not LM Studio: ")
    assert found[1].do == "find what uses the port (ss -ltnp), or mend url in [[upstreams]] 'local'"


async def test_a_program_that_speaks_another_protocol_is_found() -> None:
    async with RawServer([Read(), b"SSH-2.0-OpenSSH_9.2p1 Debian\r\n", Close()]) as other:
        url = f"http://127.0.0.1:{other.port}"
        found = await examine(settings(url, "gemma"), None)

    assert found[1].what.startswith(f"LM Studio at {url} does not list its models: ")
    assert found[1].do.startswith(
        "where a tunnel or a port forwarder listens there, start LM Studio's server"
    )


async def test_a_host_that_does_not_exist_is_found_with_the_url_to_mend() -> None:
    found = await examine(settings("http://nowhere.invalid:1234", "gemma"), None)

    assert found[1].do.startswith(
        "mend url in [[upstreams]] 'local', or the way there; else: on nowhere.invalid: lms"
    )


@pytest.mark.parametrize(
    ("status", "page", "said"),
    [
        (b"502 Bad Gateway", b"<html>", "what stands in front of LM Studio at {url} does not reach it: "),
        (b"503 No", b"The model is loading.", "{url} says that it is loading: "),
    ],
)
async def test_who_is_there_and_cannot_answer_yet_is_no_stranger(
    status: bytes, page: bytes, said: str
) -> None:
    reply = b"HTTP/1.1 %b\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%b" % (status, len(page), page)
    async with RawServer([Read(), reply, Close()]) as other:
        url = f"http://127.0.0.1:{other.port}"
        found = await examine(settings(url, "gemma"), None)

    assert found[1].what.startswith(said.format(url=url))


async def test_a_server_that_hangs_is_found() -> None:
    async with simulator(SimModel("gemma"), stalled=True) as server:
        found = await examine(settings(server.url, "gemma", upstream='list_timeout = "200ms"'), None)

    assert found[1].what == f"LM Studio does not answer: {server.url} did not answer the listing within 0.2 s"
    assert "raise list_timeout in [[upstreams]] 'local'" in found[1].do


async def test_another_server_of_the_same_protocol_is_found() -> None:
    async with simulator(SimModel("gemma")) as server:
        server.studio.set_tier("openai")
        found = await examine(settings(server.url, "gemma"), None)

    assert found[1].what == (
        f"what answers at {server.url} is not LM Studio, but another server of the same protocol"
    )


async def test_what_a_router_of_llama_server_does_otherwise_is_found() -> None:
    with Router(most=1) as router:
        for key in ("gemma", "qwen"):
            router.model(key)
        fields = 'key = "gemma"\ncontext_length = 4096'
        good = await examine(settings(router.url, "gemma"), None)
        found = await examine(settings(router.url, fields, "qwen", upstream='memory = "8GB"'), None)

    assert len(good) == 1
    assert [(finding.what, finding.why) for finding in found[1:]] == [
        (
            "context_length of gemma has no effect",
            "llama-server's router loads each model as its own presets say",
        ),
        (
            f"2 models are always to be kept, and llama-server at {router.url} keeps 1 at a time",
            "never loaded: qwen",
        ),
        *(
            (
                f"nothing tells what {key} takes",
                "llama-server says it of loaded models alone: until it was loaded once, it gets all there is",
            )
            for key in ("gemma", "qwen")
        ),
    ]


def test_a_stranger_on_a_router_is_unloaded_as_a_router_does_it() -> None:
    memory = {
        "strangers": [{"key": "x", "bytes": None}],
        "waiting": ["gemma"],
        "source": None,
        "budget_bytes": None,
    }
    upstream = {
        "name": "local",
        "url": "http://h:1",
        "state": "up",
        "tier": "llama",
        "sdk": "off",
        "memory": memory,
    }
    waits = {"upstream": "local", "key": "gemma", "state": "cold", "reason": "there is no room for it: x"}
    fails = {"upstream": "local", "key": "qwen", "state": "backoff", "reason": "its process ended with 1"}
    text = settings("http://h:1", "gemma", "qwen")

    found = at_rest(text, {"upstreams": [upstream], "models": [waits, fails]})

    assert """curl http://h:1/models/unload -d '{"model": "x"}'""" in [finding.do for finding in found]
    assert "the log of llama-server; then: keepalive warm qwen" in [finding.do for finding in found]


async def test_an_older_lm_studio_is_found_and_that_its_models_push_each_other_out() -> None:
    async with simulator(SimModel("gemma"), SimModel("qwen")) as server:
        server.studio.set_tier("v0")
        both = await examine(settings(server.url, "gemma", "qwen"), None)
        alone = await examine(settings(server.url, "gemma"), None)
        lifted = await examine(settings(server.url, "gemma", "qwen", upstream="auto_evict = false"), None)

    older = f"LM Studio at {server.url} is older than 0.4"
    pushed = f"2 models share {server.url}, where each load on demand may push out the one before"
    assert [finding.what for finding in both[1:]] == [older, pushed]
    assert both[2].why == "only gemma, the first in the config, can be kept warm for certain"
    assert [finding.what for finding in alone[1:]] == [older]
    assert [finding.what for finding in lifted[1:]] == [older]


async def test_a_token_that_is_needed_and_one_that_is_wrong_are_told_apart() -> None:
    async with simulator(SimModel("gemma"), auth_token="sk-lm-good:pass") as server:
        needed = await examine(settings(server.url, "gemma"), None)
        named = settings(server.url, "gemma", upstream='api_token_env = "LM_API_TOKEN"')
        wrong = await examine(named, None, LM_API_TOKEN="sk-lm-bad")
        right = await examine(named, None, LM_API_TOKEN="sk-lm-good:pass")
        unset = await examine(named, None)

    assert needed[1].what.startswith(f"{server.url} wants an API token")
    assert wrong[1].what == f"{server.url} does not accept the API token of upstream 'local'"
    assert right[1:] == []
    assert unset[1].what == (
        "upstreams 'local'.api_token_env: the environment variable LM_API_TOKEN is not set"
    )
    assert "sk-lm" not in str([needed, wrong, unset])


async def test_a_token_that_the_daemon_alone_can_read_is_no_finding() -> None:
    async with simulator(SimModel("gemma", load_seconds=0.05), auth_token="sk-lm-good:pass") as server:
        named = settings(server.url, "gemma", upstream='api_token_env = "LM_API_TOKEN"')
        async with daemon(named, environ={"LM_API_TOKEN": "sk-lm-good:pass"}) as running:
            await warm(running, "gemma")

            assert await examine(named, running) == []


# --- models -------------------------------------------------------------------------------------------


async def test_a_key_that_is_not_listed_is_found_with_the_nearest_ones() -> None:
    async with simulator(SimModel("qwen/qwen3-4b-2507"), SimModel("gemma")) as server:
        found = await examine(settings(server.url, "qwen/qwen3-4b"), None)

    assert found[1].what == "LM Studio 'local' does not list qwen/qwen3-4b; nearest are qwen/qwen3-4b-2507"
    assert found[1].do == (
        'key = "qwen/qwen3-4b-2507" in [[models]] of config.toml, or: lms get qwen/qwen3-4b'
    )


async def test_a_model_whose_ping_is_refused_is_found_with_what_to_set_and_gone_once_that_is_set() -> None:
    async with simulator(SimModel("gemma", load_seconds=0.05)) as server:
        server.studio.set_faults({"needs_image": True})
        text = settings(server.url, "gemma")
        async with daemon(text) as running:
            await warm(running, "gemma")
            found = await examine(text, running)
        mended = settings(server.url, 'key = "gemma"\nping = "off"')
        async with daemon(mended) as running:
            await warm(running, "gemma")
            healthy = await examine(mended, running)

    assert [f.what.partition(": ")[0] for f in found] == ["gemma on local is not proved by pings"]
    assert 'or ping = "off"' in found[0].do
    assert healthy == []


async def test_a_copy_that_came_while_ours_was_loading_is_found_as_somebody_elses() -> None:
    async with simulator(SimModel("gemma", load_seconds=1.0)) as server:
        text = settings(server.url, "gemma")
        async with daemon(text) as running:
            await until(lambda: bool(server.studio.memory.loads))
            # There before ours is, or it would be a copy like any other.
            server.studio.load("gemma", seconds=0.0)
            await warm(running, "gemma")
            await until(lambda: model(running, "gemma")["instances"] == 2)

            found = await examine(text, running)

    assert "somebody else loads gemma, too: a copy came while keepalive was loading it" in [
        f.what for f in found
    ]


async def test_copies_are_found_and_only_the_spare_one_is_to_be_unloaded() -> None:
    async with simulator(SimModel("gemma", load_seconds=0.05)) as server:
        text = settings(server.url, "gemma")
        async with daemon(text) as running:
            await warm(running, "gemma")
            await asked(f"{server.url}/api/v1/models/load", "POST", {"model": "gemma"},
                        **{"Content-Type": "application/json"})  # fmt: skip
            await until(lambda: model(running, "gemma")["instances"] == 2)

            found = await examine(text, running)

    assert [finding.what for finding in found] == ["2 copies of gemma are in memory: gemma, gemma:2"]
    assert found[0].do == "lms unload gemma:2"


async def test_a_context_of_another_length_is_found() -> None:
    async with simulator(SimModel("gemma", load_seconds=0.05)) as server:
        await asked(f"{server.url}/api/v1/models/load", "POST", {"model": "gemma", "context_length": 2048},
                    **{"Content-Type": "application/json"})  # fmt: skip
        found = await examine(settings(server.url, 'key = "gemma"\ncontext_length = 8192'), None)

    assert found[1].what == "gemma is loaded with a context of 2048 tokens, not 8192"
    assert found[1].do == "lms unload gemma; keepalive loads it again as configured"


async def test_a_model_that_cannot_be_loaded_is_found_with_its_reason() -> None:
    async with simulator(SimModel("gemma"), load_result="fail", load_seconds=0.05) as server:
        text = settings(server.url, "gemma")
        async with daemon(text) as running:
            await until(lambda: model(running, "gemma")["state"] == "backoff")

            found = await examine(text, running)

    assert len(found) == 1
    assert found[0].what.startswith("gemma on local cannot be had: ")


def test_a_ping_that_comes_after_the_lease_is_found() -> None:
    gone = {"at": "2026-11-22T09:00:00.000Z", "cause": "timer", "idle_seconds": 120.0}
    status = {"upstream": "local", "key": "gemma", "state": "warm", "last_eviction": gone}
    text = '[defaults]\nping_interval = "5m"\n[[models]]\nkey = "gemma"\n'

    found = at_rest(text, {"models": [status]})
    short = at_rest(text.replace("5m", "90s"), {"models": [status]})
    gone["idle_seconds"] = 304.0  # a lease of five minutes, which the next listing showed to be over
    equal = at_rest(text, {"models": [status]})

    assert [finding.do for finding in equal] == ['ping_interval = "2m32s" in [[models]] "gemma"']
    assert found == [
        Finding(
            "gemma was dropped after 2 min without a request, and is pinged every 5m",
            "LM Studio lets it go before the ping that should hold it",
            'ping_interval = "1m" in [[models]] "gemma"',
        )
    ]
    assert short == []


def test_a_model_that_another_one_pushed_out_is_found() -> None:
    gone = {"at": "2026-11-22T09:00:00.000Z", "cause": "displaced", "idle_seconds": None}
    status = {"upstream": "local", "key": "gemma", "state": "warm", "last_eviction": gone}

    found = at_rest('[[models]]\nkey = "gemma"\n', {"models": [status]})

    assert [finding.what for finding in found] == [
        "gemma was pushed out by another model, last at 2026-11-22T09:00:00.000Z"
    ]


# --- around it ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("server", "auth", "names"),
    [
        ('listen = "0.0.0.0:1235"', "", ["server.listen = 0.0.0.0:1235"]),
        ('admin_listen = ":9235"', "", ["server.admin_listen = :9235"]),
        ('listen = "[::1]:1235"', "", []),
        ('listen = "0.0.0.0:1235"', 'client_keys = [{ name = "a", env = "A" }]', []),
        (
            'listen = "0.0.0.0:1235"',
            'admin_keys = [{ name = "a", env = "A" }]',
            ["server.listen = 0.0.0.0:1235"],
        ),
    ],
)
def test_a_listener_without_keys_that_the_network_reaches_is_found(
    server: str, auth: str, names: list[str]
) -> None:
    found = at_rest(f"[server]\n{server}\n[auth]\n{auth}\n")

    assert [finding.what.partition(" can be reached")[0] for finding in found] == names


WINDOW = '[[models]]\nkey = "gemma"\nwindow = "Mon-Fri 08:00-19:00"\n'


def test_an_etcd_that_is_away_and_what_differs_between_the_daemons_of_a_cluster_is_found() -> None:
    text = '[cluster]\netcd = ["http://10.0.0.1:2379", "http://10.0.0.2:2379"]\nname = "ward"\n'
    engine: dict[str, object] = {"up": True, "error": None}
    cluster = {"name": "ward", "engine": engine, "differences": ["only a keeps gemma on local"]}
    differ = at_rest(text, {"cluster": cluster})
    away = {"up": False, "error": "etcd at http://10.0.0.1:2379 says: no"}
    down = at_rest(text, {"cluster": {**cluster, "engine": away, "differences": []}})

    assert [f.what for f in differ] == ["the daemons of cluster 'ward' differ: only a keeps gemma on local"]
    assert [(f.what, f.do) for f in down] == [
        (
            "this daemon of cluster 'ward' has no etcd: etcd at http://10.0.0.1:2379 says: no",
            "etcdctl --endpoints=http://10.0.0.1:2379,http://10.0.0.2:2379 endpoint health",
        )
    ]
    assert at_rest(text, {"cluster": {**cluster, "differences": []}}) == []

    by_tls = 'user = "ward a"\npassword_env = "PW"\nca = "/etc/k/ca.pem"\ncert = "/etc/k/a.pem"\nkey = "/etc/k/a.key"\n'
    [found] = at_rest(
        text.replace("http:", "https:") + by_tls, {"cluster": {**cluster, "engine": away, "differences": []}}
    )
    assert found.do == (
        "etcdctl --endpoints=https://10.0.0.1:2379,https://10.0.0.2:2379 --cacert=/etc/k/ca.pem --cert=/etc/k/a.pem "
        "--key=/etc/k/a.key --user='ward a' endpoint health"
    )


def test_windows_that_are_read_in_utc_by_accident_are_found() -> None:
    utc = Host(NOW, ZoneInfo("UTC"))

    assert [f.what for f in at_rest(WINDOW, host=utc)] == [
        "windows are read in UTC, because that is the zone of this machine"
    ]
    assert at_rest(WINDOW + '[server]\ntimezone = "UTC"\n', host=utc) == []
    assert at_rest('[[models]]\nkey = "gemma"\n', host=utc) == []


def test_a_zone_that_cannot_be_read_is_found() -> None:
    found = at_rest(WINDOW, host=Host(NOW, "'No time zone found with key Mars/Olympus'"))

    assert [f.what for f in found] == [
        "the time zone of this machine cannot be read: 'No time zone found with key Mars/Olympus'"
    ]


def test_a_clock_that_nobody_sets_and_one_that_went_back_are_found() -> None:
    loose = at_rest("", host=Host(NOW, ZoneInfo("Europe/Lisbon"), synchronized=False))
    back = at_rest("", host=Host(NOW - timedelta(days=1), ZoneInfo("Europe/Lisbon")))

    assert [f.what for f in loose] == ["the clock of this machine is set by nobody"]
    assert [f.what for f in back] == ["the daemon says that it started 24 h from now"]


@pytest.mark.parametrize(
    ("unit", "what"),
    [
        ("disabled", ["keepalive.service is disabled"]),
        ("masked-runtime", ["keepalive.service is masked"]),
        ("enabled", []),
        (None, []),
    ],
)
def test_a_unit_that_does_not_start_at_boot_is_found(unit: str | None, what: list[str]) -> None:
    found = at_rest("", host=Host(NOW, ZoneInfo("Europe/Lisbon"), unit=unit))

    assert [f.what for f in found] == what


@pytest.mark.parametrize(
    ("started", "scraped", "what"),
    [
        ("09:00", None, ["Prometheus has not read /metrics since the daemon was started"]),
        ("09:00", "09:40", ["Prometheus has not read /metrics for 20 min"]),
        ("09:00", "09:59", []),
        ("09:58", None, []),  # it may still come
    ],
)
def test_metrics_that_nobody_reads_are_found(started: str, scraped: str | None, what: list[str]) -> None:
    moments = {
        "started_at": f"2026-11-22T{started}:00.000Z",
        "scraped_at": scraped and f"2026-11-22T{scraped}:00.000Z",
    }
    found = at_rest("", moments)

    assert [f.what for f in found] == what
    assert all("10.0.0.9:9235" in f.do for f in found)


@pytest.mark.parametrize(
    ("address", "more", "unit", "count"),
    [
        ("http://127.0.0.1:9235", "", None, 0),
        ("http://127.0.0.1:9235", "", "enabled", 1),
        ("http://127.0.0.1:9235", '[server]\nadmin_listen = ":9235"\n', None, 1),
        ("http://10.0.0.9:9235", "", None, 1),
    ],
)
def test_on_ones_own_machine_nobody_has_to_have_a_prometheus(
    address: str, more: str, unit: str | None, count: int
) -> None:
    parsed = config.parse(more + '[[models]]\nkey = "gemma"\n', "config.toml", {})
    status = {**STATUS, "scraped_at": None, "started_at": "2026-11-22T08:00:00.000Z"}
    host = Host(NOW, ZoneInfo("Europe/Lisbon"), unit=unit)
    seen = Evidence(parsed, None, address, status, "", host)

    assert len(list(doctor._scraping(seen))) == count


def test_whoever_is_told_by_messages_needs_no_scraping_but_what_sends_them() -> None:
    notify, old = (
        '[notify]\nurls_env = "TELL"\n',
        {"started_at": "2026-11-22T08:00:00.000Z", "scraped_at": None},
    )
    bare = Host(NOW, ZoneInfo("Europe/Lisbon"), messages=False)

    assert at_rest(notify, old) == []
    assert [f.what for f in at_rest(notify, old, bare)] == [
        "[notify] is configured, and apprise, which sends the messages, is not installed"
    ]


# --- as it is typed -----------------------------------------------------------------------------------


async def test_the_command_says_what_why_and_what_to_do_and_its_exit_code(tmp_path: Path) -> None:
    async with simulator(SimModel("gemma", load_seconds=0.05)) as server:
        text = settings(server.url, "gemma")
        (tmp_path / "config.toml").write_text(text)
        async with daemon(text) as running:
            await warm(running, "gemma")
            address = running.admin_url
            well = await asyncio.to_thread(command, "doctor", "--url", address, cwd=tmp_path)
            await server.close()
            await until(lambda: running.status()["upstreams"][0]["state"] == "down")
            ill = await asyncio.to_thread(command, "doctor", "--url", address, cwd=tmp_path)

    assert (well.returncode, well.stderr) == (0, "")
    assert well.stdout == f"healthy: the config, the daemon at {address}, 1 upstream and 1 model\n"
    assert (ill.returncode, ill.stderr) == (1, "")
    assert ill.stdout.splitlines()[:4] == [
        f"✗ LM Studio cannot be reached: nothing listens at {server.url}",
        "  why: none of its models can be kept warm until it answers",
        f"  do:  lms server start --port {server.url.rpartition(':')[2]}",
        "",
    ]


def test_a_config_with_mistakes_is_a_finding_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text('[[models]]\nkey = ""\nping_intervall = "5m"\n')

    done = command("doctor", cwd=tmp_path)

    assert done.returncode == 1
    assert "ping_interval" in done.stderr
    assert done.stderr.endswith("Mend it, then ask again.\n")


# --- the socket of LM Studio's SDKs -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "what"),
    [
        (
            {"sdk_answers": "refused"},
            "LM Studio 'local' refuses the socket of its SDKs: the SDK socket /llm wants an",
        ),
        (
            {"websocket": "refuse"},
            "LM Studio 'local' does not serve the socket of its SDKs: there is no SDK socket at",
        ),
    ],
)
async def test_a_socket_that_is_not_to_be_had_is_found_and_what_it_alone_can_do(
    fault: dict[str, str], what: str
) -> None:
    async with simulator(SimModel("gemma", load_seconds=0.05), **fault) as server:
        text = settings(server.url, 'key = "gemma"\nnum_parallel_sessions = 2')
        async with daemon(text) as running:
            await warm(running, "gemma")

            found = await examine(text, running)

    assert [finding.what.startswith(what) for finding in found] == [True, False]
    assert found[1].what == "num_parallel_sessions of gemma has no effect"
    assert found[0].do.endswith("sdk = \"off\" in [[upstreams]] 'local'")


async def test_a_socket_that_is_not_used_is_no_finding() -> None:
    async with simulator(SimModel("gemma", load_seconds=0.05), websocket="refuse") as server:
        text = settings(server.url, "gemma", upstream='sdk = "off"')
        async with daemon(text) as running:
            await warm(running, "gemma")

            found = await examine(text, running)

    assert found == []


async def test_models_that_will_be_refused_or_do_not_fit_together_are_found_before_they_are_loaded() -> None:
    big, small = SimModel("big", size_bytes=40_000_000_000), SimModel("small", size_bytes=8_000_000_000)
    async with simulator(big, small, memory_bytes=20_000_000_000) as server:
        parsed = config.parse(settings(server.url, "big", "small"), "config.toml", {})
        seen = await gather(
            parsed, Path("config.toml"), {}, "http://10.0.0.9:9235", None, "no daemon answers"
        )
        seen = replace(seen, host=Host(NOW, ZoneInfo("Europe/Lisbon"), memory_bytes=32_000_000_000))
        found = [finding.what for finding in findings(seen)]
        loads = [event for event in server.studio.log(0) if event["kind"] == "load.started"]

    assert found[1:] == [
        "LM Studio 'local' will refuse to load big: it would take 45.0 GB",
        "the models of 'local' do not fit together: big 45.0 GB, small 9.0 GB, and this machine has 32.0 GB",
    ]
    assert loads == []


def test_what_there_is_no_room_for_is_found_by_the_file_and_by_the_daemon() -> None:
    text = """
        [[upstreams]]
        url = "http://127.0.0.1:1"
        memory = "20GiB"
        [[models]]
        key = "a"
        memory = "15GiB"
        [[models]]
        key = "b"
        memory = "9GiB"
        [[models]]
        key = "c"
        keep = "auto"
    """
    lacks = "waits for room: it takes 9.0 GB, and 1.0 GB are free; x was loaded by somebody else"
    known = {
        "budget_bytes": 18 * 10**9,
        "used_bytes": 17 * 10**9,
        "source": "refusal",
        "strangers": [{"key": "x"}],
    }
    waiting = {"key": "c", "upstream": "local", "state": "cold", "reason": lacks, "last_ping": None}
    status = {"upstreams": [{"name": "local", "state": "up", "memory": known}], "models": [waiting]}
    seen = Evidence(
        config.parse(text, "test", {}),
        Path("config.toml"),
        "http://x",
        status,
        "",
        Host(NOW, ZoneInfo("UTC")),
    )

    found = {finding.what: finding.do for finding in doctor._without_room(seen)}

    assert list(found) == [
        '"b" never fits on "local": it takes 9.0 GiB, and memory is 20.0 GiB, of which 15.0 GiB are kept for those '
        "before it",
        f"c on local {lacks}",
        "LM Studio 'local' refuses loads beyond 18.0 GB",
    ]
    assert found[f"c on local {lacks}"] == "lms unload x"


def test_what_does_not_fit_by_what_lm_studio_says_is_found_as_by_what_the_file_says():
    text = '[[upstreams]]\nurl = "http://x"\nmemory = "10GiB"\n[[models]]\nkey = "a"\n[[models]]\nkey = "b"\n'
    models = [{"key": key, "upstream": "local", "memory_bytes": 6 * 2**30, "reason": None} for key in "ab"]
    host = Host(NOW, ZoneInfo("UTC"))
    seen = Evidence(config.parse(text, "test", {}), None, "http://x", {"models": models}, "", host)

    assert [finding.what for finding in doctor._without_room(seen)] == [
        '"b" never fits on "local": it takes 6.0 GiB, and memory is 10.0 GiB, of which 6.0 GiB are kept for those '
        "before it"
    ]
