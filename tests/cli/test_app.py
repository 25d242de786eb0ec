"""The command as people and scripts use it: exit codes, what is printed where, and no traceback ever."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from keepalive import __version__
from keepalive.cli import app as cli
from keepalive.cli import asking
from tests.kit.live import (
    KEEPALIVE,
    DaemonProcess,
    SimulatorProcess,
    ask,
    command,
    ending,
    environment,
    reserved_port,
    settings,
    wait_until,
)
from tests.kit.terminal import Terminal


def model(key: str, state: str = "warm", **more: Any) -> dict[str, Any]:
    return {
        "key": key, "upstream": "local", "state": state, "since": "2026-11-22T10:00:00.000Z", "wanted": True,
        "listed": True, "busy": False, "load": None, "last_load_seconds": None, "next_ping_at": None,
        "retry_at": None, "reason": None, **more,
    }  # fmt: skip


def page(*models: dict[str, Any]) -> dict[str, Any]:
    upstream = {"name": "local", "url": "http://127.0.0.1:1234", "state": "up", "error": None}
    return {"models": list(models), "upstreams": [upstream], "config": {"ok": True, "mistakes": []}}


class Answering(ThreadingHTTPServer):
    """What answers at the admin address: pages in turn, the last of them for ever."""

    daemon_threads = True

    def __init__(self, *pages: Any) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.pages = list(pages)
        self.asked: list[tuple[str, str]] = []
        self.keys: list[str | None] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Answering

    def do_GET(self) -> None:
        self.server.asked.append((self.command, self.path))
        self.server.keys.append(self.headers["Authorization"])
        pages = self.server.pages
        answer = pages.pop(0) if len(pages) > 1 else pages[0]
        status, body = answer if isinstance(answer, tuple) else (200, answer)
        if status == 0:
            self.close_connection = True
            return
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body if isinstance(body, bytes) else json.dumps(body).encode())

    do_POST = do_GET

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@contextmanager
def answering(*pages: Any) -> Iterator[Answering]:
    with Answering(*pages) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [n for n in os.environ if n.startswith("KEEPALIVE_") or n in ("NO_COLOR", "FORCE_COLOR")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "POLL", 0.02)
    # A `--timeout` of a moment is about what is said then, not about how fast this machine answers.
    monkeypatch.setattr(cli, "ANSWER_MIN", asking.ANSWER_TIMEOUT)


class Told:
    """What a command printed, and its exit code."""

    def __init__(self, *words: str, **environ: str) -> None:
        result = CliRunner().invoke(cli.app, words, env=environ)
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
        self.code, self.out, self.err = result.exit_code, result.stdout, result.stderr


@pytest.fixture
def nowhere() -> Iterator[str]:
    with reserved_port() as port:
        yield f"http://127.0.0.1:{port}"


WARM, LOADING = page(model("a")), page(model("a", "loading"))
FAILING = page(model("a"), model("b", "backoff", reason="no memory"))


# --- status -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("document", "code"), [(WARM, 0), (LOADING, 1), (FAILING, 2)])
def test_status_tells_by_its_exit_code(document: Any, code: int) -> None:
    with answering(document) as server:
        table = Told("status", "--url", server.url)
        as_json = Told("status", "--json", "--url", server.url)

    assert (table.code, as_json.code) == (code, code)
    assert table.out.split()[:3] == ["MODEL", "STATE", "SINCE"]
    assert json.loads(as_json.out) == document
    assert "\x1b" not in table.out


def test_without_a_terminal_a_reason_is_not_wrapped_however_long() -> None:
    reason = "because " * 100
    with answering(page(model("a", "backoff", reason=reason.strip()))) as server:
        told = Told("status", "--url", server.url)

    assert len(told.out.splitlines()) == 2
    assert reason.strip() in told.out


def test_a_daemon_that_does_not_run_is_a_sentence_and_3(nowhere: str) -> None:
    url = nowhere
    for words in (
        ["status"],
        ["status", "--json"],
        ["warm", "a"],
        ["release", "a"],
        ["wait", "--timeout", "0s"],
    ):
        told = Told(*words, "--url", url)

        assert (told.code, told.out) == (3, "")
        assert told.err.splitlines()[-1] == (
            f"no daemon at {url} (Connection refused). Is it running? "
            "Another address: --url or KEEPALIVE_ADMIN_URL."
        )


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((200, b"<html>"), "what answers at {url} is not keepalive"),
        ((200, b""), "what answers at {url} is not keepalive"),
        ((200, b"[" * 100_000), "what answers at {url} is not keepalive"),
        ((200, b"[]"), "what answers at {url} is not keepalive"),
        ((200, {"models": None, "x": 1}) and (200, {"x": 1}), "what answers at {url} is not keepalive"),
        ((0, b""), "no daemon at {url} ("),
        ((404, b"<html>"), "{url} answered 404: Not Found"),
        ((401, {"error": "this address wants a key of [auth]"}),
         "{url} answered 401: this address wants a key of [auth]; set KEEPALIVE_ADMIN_KEY"),
        ((403, {"error": "'x' is not a name of this daemon\x1b[31m"}),
         "{url} answered 403: 'x' is not a name of this daemon [31m"),
        ((500, [1]), "{url} answered 500: Internal Server Error"),
    ],
)  # fmt: skip
def test_whatever_else_answers_is_a_sentence_and_3(answer: Any, said: str) -> None:
    with answering(answer) as server:
        told = Told("status", "--url", server.url)

    assert (told.code, told.out) == (3, "")
    assert told.err.startswith(said.format(url=server.url))
    assert len(told.err.splitlines()) == 1


@pytest.mark.parametrize("words", [["status"], ["wait"], ["warm", "a"], ["status", "--json"]])
def test_what_a_daemon_of_another_version_says_and_nobody_understands_is_a_sentence_and_3(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = {"version": "9.9\n", "models": [{"key": "a", "state": "hibernating"}], "upstreams": []}
    with answering(other) as server:
        monkeypatch.setattr(asking, "foreign", {})
        monkeypatch.setattr(sys, "argv", ["keepalive", *words, "--url", server.url])
        with pytest.raises(SystemExit) as ended:
            cli.main()

    said = capsys.readouterr().err
    assert ended.value.code == 3
    assert said.startswith(f"the daemon at {server.url} is keepalive 9.9 , and this is {__version__}, which ")
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize(
    "url", ["http://[", "http://127.0.0.1:99999", "nonsense:::", "http://no-such.invalid:1"]
)
def test_an_address_that_is_none_is_a_sentence_and_3(url: str) -> None:
    told = Told("status", "--url", url)

    assert told.code == 3
    assert told.err.startswith("no daemon at ")


def test_the_address_is_the_option_then_the_variable_then_the_config_then_the_default(tmp_path: Path) -> None:
    with answering(WARM) as option, answering(LOADING) as variable, answering(FAILING) as configured:
        text = settings("http://127.0.0.1:1", "a").replace(
            'admin_listen = "127.0.0.1:0"', f'admin_listen = "{configured.url[7:]}"'
        )
        (tmp_path / "other.toml").write_text(text)
        from_option = Told("status", "--url", option.url[7:], KEEPALIVE_ADMIN_URL=variable.url)
        from_variable = Told("status", "-c", "other.toml", KEEPALIVE_ADMIN_URL=f"{variable.url}/")
        from_config = Told("status", "-c", "other.toml")
        from_overlay = Told("status", "-c", "other.toml", KEEPALIVE_SERVER__ADMIN_LISTEN=option.url[7:])
        with_key = Told("status", "-c", "other.toml", KEEPALIVE_ADMIN_KEY="secret")
        # As `docker run --env-file` hands them on.
        quoted = Told("status", KEEPALIVE_ADMIN_URL=f'"{variable.url}"')

    codes = [t.code for t in (from_option, from_variable, from_config, from_overlay, with_key, quoted)]
    assert codes == [0, 1, 2, 0, 2, 1]
    assert cli._admin_url(None, None) == "http://127.0.0.1:9235"
    assert configured.keys == [None, "Bearer secret"]


@pytest.mark.parametrize(
    ("listen", "url"),
    [
        (":9000", "http://127.0.0.1:9000"),
        ("0.0.0.0:9000", "http://127.0.0.1:9000"),
        ("[::]:9000", "http://[::1]:9000"),
        ("[fe80::1]:9000", "http://[fe80::1]:9000"),
        ("ops.example.org:9000", "http://ops.example.org:9000"),
    ],
)
def test_an_address_for_everybody_is_asked_on_this_machine(listen: str, url: str, tmp_path: Path) -> None:
    text = settings("http://127.0.0.1:1", "a").replace(
        'admin_listen = "127.0.0.1:0"', f'admin_listen = "{listen}"'
    )
    (tmp_path / "config.toml").write_text(text)

    assert cli._admin_url(None, None) == url


def test_a_bad_config_that_was_named_is_3_and_one_that_was_not_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("[servre]")

    named = Told("status", "-c", "config.toml")

    assert named.code == 3
    assert "servre" in named.err
    assert cli._admin_url(None, None) == "http://127.0.0.1:9235"


# --- wait, warm, release ----------------------------------------------------------------------------


def test_wait_ends_when_all_is_warm_and_says_what_changes() -> None:
    steps = [page(model("a", "cold")), page(model("a", "cold")), LOADING, WARM]
    with answering(*steps) as server:
        told = Told("wait", "--url", server.url)

    assert told.code == 0
    assert told.out.splitlines()[:4] == ["a is cold", "a is loading", "a is warm", told.out.splitlines()[3]]
    assert told.out.splitlines()[3].startswith("MODEL")


@pytest.mark.parametrize("words", [["wait", "an-alias"], ["warm", "an-alias"]])
def test_a_model_is_asked_for_by_any_name_that_the_daemon_knows(words: list[str]) -> None:
    every, named = page(model("a"), model("b", "cold")), {**page(model("a")), "named": ["an-alias"]}
    with answering(every, named, every) as server:
        told = Told(*words, "--url", server.url)

    assert "/api/status?model=an-alias" in [path for _, path in server.asked]
    assert "a " in told.out
    assert "b " not in told.out


def test_a_daemon_that_does_not_know_the_name_is_told_from_one_that_knows_it() -> None:
    with answering(page(model("a"))) as server:
        told = Told("wait", "an-alias", "--url", server.url)

    assert (told.code, told.err.strip()) == (3, "the daemon keeps no an-alias; it keeps a")


def test_wait_for_one_model_does_not_care_about_others() -> None:
    with answering(FAILING) as server:
        one = Told("wait", "a", "--url", server.url)
        other = Told("wait", "a", "b", "--timeout", "100ms", "--url", server.url)

    assert (one.code, other.code) == (0, 2)
    assert "no memory" in other.out


def test_wait_gives_up_when_it_was_told_to() -> None:
    with answering(LOADING) as server:
        told = Told("wait", "--timeout", "100ms", "--url", server.url)

    assert told.code == 1


def test_wait_waits_for_the_daemon_too_and_says_so() -> None:
    with answering((0, b""), (0, b""), WARM) as server:
        told = Told("wait", "--url", server.url)

    assert told.code == 0
    assert told.err.splitlines()[0].endswith("KEEPALIVE_ADMIN_URL. Waiting for it.")
    assert len(told.err.splitlines()) == 1


def test_wait_does_not_wait_longer_than_its_timeout_for_a_daemon_that_hangs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(asking, "ANSWER_TIMEOUT", 3600.0)  # what it must not wait for
    monkeypatch.setattr(cli, "ANSWER_MIN", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        told = Told("wait", "--timeout", "300ms", "--url", f"http://127.0.0.1:{silent.getsockname()[1]}")

    assert told.code == 3


def test_a_timeout_that_is_no_duration_says_what_to_write(nowhere: str) -> None:
    told = Told("wait", "--timeout", "10", "--url", nowhere)

    assert (told.code, told.err) == (3, '--timeout: "10" is no duration; write "30s", "10m" or "1h30m"\n')


@pytest.mark.parametrize("words", [["wait", "x", "y"], ["warm", "x"], ["release", "x"]])
def test_a_model_that_nobody_keeps_is_3_and_says_which_are_kept(words: list[str]) -> None:
    with answering(FAILING) as server:
        told = Told(*words, "--url", server.url)

    assert told.code == 3
    assert told.err == f"the daemon keeps no {', '.join(words[1:])}; it keeps a, b\n"
    assert all(method == "GET" for method, _ in server.asked)


@pytest.mark.parametrize("verb", ["warm", "release"])
def test_a_change_is_posted_for_the_key_as_it_is_and_answers_as_status(verb: str) -> None:
    key = "org/model @1%"
    with answering(page(model(key), model("b", "loading"))) as server:
        told = Told(verb, key, "--url", server.url)

    assert told.code == 1
    assert ("POST", f"/api/models/org%2Fmodel%20%401%25/{verb}") in server.asked
    assert key in told.out
    assert "loading" not in told.out


# --- check, run, simulate ---------------------------------------------------------------------------


def test_check_says_good_with_0_or_every_mistake_with_3(tmp_path: Path) -> None:
    (tmp_path / "good.toml").write_text(settings("http://127.0.0.1:1", "a", "b"))
    (tmp_path / "bad.toml").write_text('[servre]\n[[models]]\nkey = "a"\nping_interval = "30"\n')

    good, bad = Told("check", "-c", "good.toml"), Told("check", "-c", "bad.toml")

    assert (good.code, good.out) == (0, "good.toml is good: 2 models to keep warm on 1 upstream\n")
    assert (bad.code, bad.out) == (3, "")
    assert len(bad.err.splitlines()) == 2
    assert "servre" in bad.err
    assert '"30" has no unit' in bad.err


def test_check_reports_a_file_that_is_missing_beside_every_other_mistake(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text('[[models]]\nkey = "a"\nprime = ["gone.json"]\nkeep = "sometimes"\n')

    told = Told("check", "-c", str(file))

    assert told.code == 3
    assert [line.split(": ")[1] for line in told.err.splitlines()] == [
        "models[0].prime[0]",
        "models[0].keep",
    ]


def test_check_takes_the_environment_for_a_config() -> None:
    told = Told("check", KEEPALIVE_MODELS__0__KEY="a", KEEPALIVE_ADMIN_KEY="of status")

    assert (told.code, told.out) == (0, "the environment is good: 1 model to keep warm on 1 upstream\n")


def test_there_is_nothing_to_check_where_there_is_no_config() -> None:
    told = Told("check")

    assert (told.code, told.out) == (3, "")
    assert told.err.startswith(
        "there is no config to check. Without a config keepalive stands in front of LM Studio"
    )


def test_without_a_config_a_daemon_serves_what_is_asked_for_and_says_so(tmp_path: Path) -> None:
    names = ["org/gemma", "org/first", "org/second", "org/third"]
    lm_studio = SimulatorProcess(tmp_path, *(f"{name}:100ms:2GB" for name in names))
    with ending(lm_studio), reserved_port() as port, reserved_port() as admin:
        environ = {
            "KEEPALIVE_UPSTREAMS__0__URL": lm_studio.url,
            "KEEPALIVE_SERVER__LISTEN": f"127.0.0.1:{port}",
            "KEEPALIVE_SERVER__ADMIN_LISTEN": f"127.0.0.1:{admin}",
        }
        terminal = Terminal("run", cwd=tmp_path, columns=200, HOME=str(tmp_path), **environ)
        try:
            terminal.shows(f"Without a config keepalive stands in front of LM Studio at {lm_studio.url}")
            terminal.shows(f"Base URL: http://127.0.0.1:{port}/v1. Page: http://127.0.0.1:{admin}/")
            terminal.shows("daemon.started")
            body = {"model": "org/gemma", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 3}
            answer = ask(f"http://127.0.0.1:{port}/v1/chat/completions", "POST", body)
            url = f"http://127.0.0.1:{admin}"
            status = command("status", "--json", cwd=tmp_path, KEEPALIVE_ADMIN_URL=url)
            astray = command("status", "--url", f"http://127.0.0.1:{port}", cwd=tmp_path)
            # Every other way to ask for one is as good.
            kind = {"Content-Type": "application/json"}
            order = {"prompt": "hello", "model": "org/first", "maxTokens": 3}
            prompted = ask(f"http://127.0.0.1:{port}/api/prompts/execute/stream", "POST", order, **kind)
            warmup = ask(
                f"http://127.0.0.1:{port}/api/models/warmup", "POST", {"modelId": "org/second"}, **kind
            )
            misspelt = ask(
                f"http://127.0.0.1:{port}/api/models/warmup", "POST", {"modelId": "org/frist"}, **kind
            )
            warmed = command("warm", "ORG/third", cwd=tmp_path, KEEPALIVE_ADMIN_URL=url)
            unknown = ask(f"{url}/api/models/org/thrid/warm", "POST")
            on_demand = [e for e in lm_studio.log() if e["kind"] == "load.started" and e["owner"] == "jit"]
            terminal.process.send_signal(signal.SIGTERM)
            code = terminal.ended()
        finally:
            terminal.kill()

    document = json.loads(status.stdout)
    assert (answer[0], code) == (200, 0)
    assert [(m["key"], m["state"], m["keep"]) for m in document["models"]] == [("org/gemma", "warm", "auto")]
    assert (document["config"]["path"], document["config"]["unlisted"]) == (None, "auto")
    assert "config.none" in terminal.text
    assert (prompted[0], warmup[0], json.loads(warmup[2])["data"]["modelId"]) == (200, 200, "org/second")
    assert (misspelt[0], json.loads(misspelt[2])["error"]["message"]) == (
        404, 'modelId: "org/frist" is no model that is kept here; write "org/first"'
    )  # fmt: skip
    assert (astray.returncode, astray.stderr) == (
        3,
        f"http://127.0.0.1:{port} is where applications ask; commands ask the admin address "
        "(server.admin_listen, 127.0.0.1:9235 by default)\n",
    )
    assert (warmed.returncode, "org/third" in warmed.stdout) in [(0, True), (1, True)]
    assert (unknown[0], json.loads(unknown[2])["error"]) == (
        404, "no such model here: org/thrid; write org/third"
    )  # fmt: skip
    assert on_demand == []


def test_run_says_in_a_sentence_that_its_port_is_taken(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        text = settings("http://127.0.0.1:1", "a").replace(
            'admin_listen = "127.0.0.1:0"', f'admin_listen = "127.0.0.1:{port}"'
        )
        (tmp_path / "config.toml").write_text(text)
        ran = command("run", cwd=tmp_path)

    assert ran.returncode == 1
    assert ran.stderr.splitlines()[-1] == (
        f"server.admin_listen: cannot listen on 127.0.0.1:{port}: address already in use; "
        "end what uses it, or write another port"
    )
    assert "Traceback" not in ran.stderr


def test_run_says_in_a_sentence_that_a_token_is_missing(tmp_path: Path) -> None:
    text = settings("http://127.0.0.1:1", "a", upstream='api_token_env = "NOT_SET"')
    (tmp_path / "config.toml").write_text(text)

    ran = command("run", cwd=tmp_path)

    assert ran.returncode == 1
    assert ran.stderr == "upstreams 'local'.api_token_env: the environment variable NOT_SET is not set\n"


@pytest.mark.parametrize("option", [["--model", ""], ["--fault", "nonsense=1"], ["--model", "a:soon"]])
def test_simulate_says_what_it_does_not_understand(option: list[str]) -> None:
    told = Told("simulate", *option)

    assert told.code == 1
    assert len(told.err.splitlines()) == 1


def test_simulate_says_where_it_cannot_listen() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]

        told = Told("simulate", "--port", str(port))
        assert (told.code, told.err) == (1, f"cannot listen on 127.0.0.1:{port}: address already in use\n")
        assert Told("simulate", "--port", "99999").code == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_where_nothing_can_be_written_that_is_said_and_taken_for_no_state_of_the_models() -> None:
    with answering(LOADING) as server, Path("/dev/full").open("wb") as full:
        for words in (["status"], ["status", "--json"]):
            ran = subprocess.run(
                [*KEEPALIVE, *words, "--url", server.url],
                stdout=full,
                stderr=subprocess.PIPE,
                env=environment(),
                text=True,
                check=False,
            )

            assert ran.returncode == 3
            assert ran.stderr == "what there is to say cannot be written: no space left on device\n"


def test_the_version_and_help_are_there() -> None:
    assert Told("--version").out == f"keepalive {__version__}\n"
    overview = Told("--help").out
    for name in ("run", "init", "demo", "simulate", "check", "status", "wait", "warm", "release", "doctor"):
        assert f"\n  {name} " in overview
    assert "..." not in overview.partition("Commands:")[2]


# --- a real daemon, a real terminal -----------------------------------------------------------------


asks_live = pytest.mark.xdist_group("a daemon that is asked")  # the same for all


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[DaemonProcess, SimulatorProcess]]:
    folder = tmp_path_factory.mktemp("live")
    lm_studio = SimulatorProcess(folder, "org/gemma:500ms:2GB")
    with ending(lm_studio):
        daemon = DaemonProcess(folder, settings(lm_studio.url, "org/gemma"))
        with ending(daemon):
            yield daemon, lm_studio


@asks_live
def test_a_script_waits_for_a_real_model_and_then_all_is_well(
    live: tuple[DaemonProcess, SimulatorProcess], tmp_path: Path
) -> None:
    url = live[0].url
    waited = command("wait", "--timeout", "80s", cwd=tmp_path, KEEPALIVE_ADMIN_URL=url)
    status = command("status", "--json", "--url", url, cwd=tmp_path)
    released = command("release", "org/gemma", "--url", url, cwd=tmp_path)
    again = command("warm", "org/gemma", "--url", url, cwd=tmp_path)

    assert (waited.returncode, waited.stderr) == (0, "")
    assert waited.stdout.splitlines()[-2].split() == [
        "MODEL",
        "STATE",
        "SINCE",
        "LAST",
        "LOAD",
        "NEXT",
        "PING",
        "WHY",
    ]
    assert status.returncode == 0
    assert json.loads(status.stdout)["models"][0]["state"] == "warm"
    assert (released.returncode, again.returncode) == (0, again.returncode)
    assert again.returncode in (0, 1)


@asks_live
def test_on_a_terminal_waiting_is_a_bar_and_colour(
    live: tuple[DaemonProcess, SimulatorProcess], tmp_path: Path
) -> None:
    """It was judged by whether the load was quicker than the command; now it ends once the bar was seen."""
    daemon, lm_studio = live
    daemon.reaches("org/gemma", "warm")  # so there is a past load to draw a bar from
    command("release", "org/gemma", "--url", daemon.url, cwd=tmp_path)
    daemon.reaches("org/gemma", "cold")
    lm_studio.faults(load_seconds=600.0)
    command("warm", "org/gemma", "--url", daemon.url, cwd=tmp_path)
    daemon.reaches("org/gemma", "loading")
    terminal = Terminal("wait", "--url", daemon.url, cwd=tmp_path)
    try:
        terminal.shows("loading")
        terminal.shows("━")
        lm_studio.let_it_load("org/gemma")
        code = terminal.ended()
    finally:
        terminal.kill()
        lm_studio.faults(load_seconds=None)

    assert code == 0
    assert "\x1b[32mwarm" in terminal.text


def test_watching_goes_on_through_a_daemon_that_is_gone_and_ends_with_ctrl_c(tmp_path: Path) -> None:
    gone = (503, {"error": "away for a moment"})
    with answering(LOADING, gone, gone, WARM) as server:
        terminal = Terminal("status", "--watch", "--url", server.url, cwd=tmp_path, NO_COLOR="1")
        try:
            terminal.shows("loading")
            terminal.shows("away for a moment")
            terminal.shows("warm")
            terminal.process.send_signal(signal.SIGINT)
            code = terminal.ended()
        finally:
            terminal.kill()

    assert code == 0
    assert "\x1b[3" not in terminal.text
    assert "Traceback" not in terminal.text


def test_watching_without_a_terminal_is_a_line_per_change_or_json_per_look(tmp_path: Path) -> None:
    for words in ([], ["--json"]):
        with (
            answering(LOADING, LOADING, WARM) as server,
            subprocess.Popen(
                [*KEEPALIVE, "status", "--watch", "--url", server.url, *words],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=environment(),
                cwd=tmp_path,
            ) as process,
        ):
            wait_until(lambda server=server: len(server.asked) >= 4)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=90)

        assert (process.returncode, err) == (0, "")
        if words:
            assert [json.loads(line)["models"][0]["state"] for line in out.splitlines()][:3] == [
                "loading",
                "loading",
                "warm",
            ]
        else:
            assert out.splitlines() == ["a is loading", "a is warm"]
