"""The `keepalive` command. Exit codes are part of the contract; colours and bars only on a terminal."""

import asyncio
import contextlib
import errno
import gc
import io
import json
import os
import shlex
import sys
import time
from collections.abc import Coroutine, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn, TextIO
from urllib.parse import quote

import typer
from rich.console import Console
from rich.live import Live
from rich.text import Text

from keepalive import __version__, config
from keepalive.admin import words
from keepalive.cli import asking, view
from keepalive.core.errors import KeepaliveError
from keepalive.core.quotes import unquoted

BAD_CONFIG = 3
_CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
# What shells say of a command that Ctrl-C ended.
INTERRUPTED = 130
POLL = 0.5
# Whoever waits for no longer than this still gets an answer from a machine that is busy loading a model.
ANSWER_MIN = 2.0
# Without a terminal nothing is wrapped: lines are read by programs, or by somebody who has a pager.
ENDLESS = 100_000

app = typer.Typer(
    help="Keeps LM Studio models loaded, and says at any moment what is warm, what is loading and why.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


class Imitated(StrEnum):
    """What the stand-in can be."""

    V1 = "v1"
    V0 = "v0"
    OPENAI = "openai"


ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "-c", "--config", help="Config file. Default: config.toml, then /etc/keepalive/config.toml."
    ),
]
UrlOption = Annotated[
    str | None,
    typer.Option(
        "--url", help="The daemon's admin address. Default: $KEEPALIVE_ADMIN_URL, else what the config says."
    ),
]


def _models_beginning(incomplete: str) -> list[str]:
    """For the shell, when somebody presses the tabulator: what the daemon keeps, or nothing."""
    with contextlib.suppress(Exception):
        document = asking.fetch(_admin_url(None, None), timeout=1.0)
        return [m["key"] for m in document["models"] if m["key"].startswith(incomplete)]
    return []


KeysArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[MODEL]...", help="Default: all that are wanted.", autocompletion=_models_beginning
    ),
]
KeyArgument = Annotated[str, typer.Argument(metavar="MODEL", autocompletion=_models_beginning)]


def main() -> None:
    gc.enable()
    _occupy_standard_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):
        # What a terminal has no letters for, as in a pipe on Windows, becomes a question mark and not an error.
        sys.stdout.reconfigure(errors="replace")
    try:
        app()
    except OSError as error:
        if error.errno not in _CANNOT_WRITE:
            raise
        # Python would try once more when it ends, and fail once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        with contextlib.suppress(OSError):
            typer.echo(
                f"what there is to say cannot be written: {os.strerror(error.errno).lower()}", err=True
            )
        # Whoever reads the exit code alone must not take a full disk for a state of the models.
        sys.exit(view.CANNOT_TELL)
    except (LookupError, TypeError, ValueError, AttributeError):
        if not asking.foreign:
            raise
        # Nor what could not be read.
        (address, version), *_ = asking.foreign.items()
        typer.echo(
            f"the daemon at {address} is keepalive {version}, and this is {__version__}, which does not understand "
            "all that it says; use the command of that version",
            err=True,
        )
        sys.exit(view.CANNOT_TELL)


def _occupy_standard_streams() -> None:
    """Put /dev/null where a standard stream is closed.

    Else a socket takes its number: what is meant for stderr goes out over it, and libuv aborts on closing it.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)


def _on_terminal(stream: TextIO | None) -> bool:
    """None is a stream that was closed, or never there: Windows starts programs without a console like that."""
    return stream is not None and stream.isatty()


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"keepalive {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


@app.command()
def run(path: ConfigOption = None) -> None:
    """Run the daemon until SIGTERM or Ctrl-C. SIGHUP reads the config again."""
    settings, found = _config(path)
    gc.disable()  # see `keepalive/__main__.py`; `_run` ends it
    from keepalive.observers import logs
    from keepalive.service.daemon import Daemon

    if found is None and not settings.models and _on_terminal(sys.stderr):
        typer.echo(_without_config(settings), err=True)

    form = settings.server.log_format
    as_json = None if form == "auto" else form == "json"
    end_log = logs.start(level=settings.server.log_level, as_json=as_json, stream=sys.stderr)

    async def live() -> None:
        daemon = Daemon(settings, found, _environ())
        daemon.watch_signals()
        await daemon.run()

    try:
        _run(live())
    except KeepaliveError as error:
        _fail(str(error), 1)
    finally:
        end_log()


@app.command()
def init(
    url: Annotated[
        str | None,
        typer.Option("--url", help="LM Studio's address. Default: where it listens on this machine."),
    ] = None,
    path: Annotated[
        Path | None, typer.Option("-c", "--config", help="The file to write. Default: config.toml.")
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model", metavar="KEY", help="A model to keep loaded. Repeatable; nothing is asked then."
        ),
    ] = None,
    token_env: Annotated[
        str | None, typer.Option(metavar="NAME", help="The variable that holds LM Studio's API token.")
    ] = None,
    token_file: Annotated[
        str | None, typer.Option(metavar="FILE", help="The file that holds LM Studio's API token.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
) -> None:
    """Ask LM Studio what it has, and write a config with it.

    On a terminal you choose what is kept; else --model says it, or it is what is loaded now. Nothing is loaded by it.
    """
    from keepalive.cli import init as beginning

    environ = _environ()
    path = path or Path(environ.get("KEEPALIVE_CONFIG") or "config.toml")
    try:
        beginning.refuse(path, force=force)
        urls = [url] if url else beginning.usual_urls(Path.home())
        candidates = [beginning.upstream_at(one, token_env, token_file) for one in urls]
        found = asyncio.run(beginning.find(candidates, environ, lambda line: typer.echo(line, err=True)))
        if model:
            keys = beginning.named(found, model)
        elif _on_terminal(sys.stdin) and _on_terminal(sys.stdout):
            keys = beginning.asked(found, input, typer.echo, _console().width)
        else:
            keys = beginning.unasked(found)
        text = beginning.document(found, keys)
        beginning.write(path, text, force=force)
    except KeepaliveError as error:
        _fail(str(error), 1)
    except (KeyboardInterrupt, EOFError):
        _fail("\nNothing was written.", INTERRUPTED)
    option = "" if config.find(None, environ) == path else f" -c {shlex.quote(str(path))}"
    typer.echo(
        f"Wrote {path}, which keeps {', '.join(keys)} loaded. Next:\n\n    keepalive run{option}\n\n"
        f"and set the base URL of your applications to http://{config.Server().listen}/v1"
    )


@app.command()
def demo() -> None:
    """Watch it work, with nothing to configure. LM Studio is simulated."""
    from keepalive.cli import demo as demonstration

    try:
        _run(demonstration.run(_console()))
    except KeepaliveError as error:
        _fail(str(error), 1)


@app.command()
def simulate(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65_535, help="0 takes a free one.")] = 1234,
    model: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY[@VARIANT,...][:SECONDS[:SIZE]]",
            help="A model, its variants (the first is selected), how long it loads, its size. Repeatable.",
        ),
    ] = None,
    tier: Annotated[
        Imitated, typer.Option(help="v1 is LM Studio 0.4, v0 is 0.3, openai is any other server.")
    ] = Imitated.V1,
    fault: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="A fault to begin with. Repeatable.")
    ] = None,
    prefix: Annotated[str, typer.Option(help="A path under which everything is served, as /lm.")] = "",
) -> None:
    """Run a stand-in LM Studio. For development and tests."""
    from keepalive.simulator.__main__ import run as simulation
    from keepalive.simulator.faults import parse_fault
    from keepalive.simulator.models import parse_model

    try:
        models = [parse_model(text) for text in model or []]
        faults = dict(parse_fault(text) for text in fault or [])
        asyncio.run(simulation(host, port, models, tier.value, faults, prefix))
    except OSError as error:
        if error.errno in _CANNOT_WRITE:
            raise
        # asyncio's words repeat the address in a tuple; those of name resolution, with negative numbers, do not.
        code = error.errno or 0
        why = os.strerror(code).lower() if code > 0 else error.strerror or str(error)
        _fail(f"cannot listen on {host}:{port}: {why}", 1)
    except ValueError as error:
        _fail(str(error), 1)


@app.command()
def check(path: ConfigOption = None) -> None:
    """Report every mistake in a config at once. Exit code 0 good, 3 bad."""
    settings, found = _config(path)
    if found is None and not settings.models:
        _fail(f"there is no config to check. {_without_config(settings)}", BAD_CONFIG)
    _, mistakes = config.read_openings(settings, found)
    if mistakes:
        _fail(str(config.ConfigError(mistakes)), BAD_CONFIG)
    models, upstreams = len(settings.kept), len(settings.upstreams)
    what = f"{models} {'model' if models == 1 else 'models'} to keep warm"
    where = f"{upstreams} {'upstream' if upstreams == 1 else 'upstreams'}"
    typer.echo(f"{found or 'the environment'} is good: {what} on {where}")
    for _, why in config.overbooked(settings):
        typer.echo(f"but: {why}")


@app.command()
def status(
    as_json: Annotated[bool, typer.Option("--json", help="The daemon's answer as it is.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Go on showing it until Ctrl-C.")] = False,
    url: UrlOption = None,
    path: ConfigOption = None,
) -> None:
    """Show what is warm, what is not, and why.

    Exit code 0 all wanted models are warm, 1 warming up, 2 failing, 3 cannot tell.
    """
    address = _admin_url(url, path)
    document = _ask(address)
    if watch:
        document = _watch(address, document, as_json=as_json)
        if document is None:
            raise typer.Exit(view.CANNOT_TELL)
    elif as_json:
        typer.echo(json.dumps(document, indent=1))
    else:
        _console().print(view.table(document))
    raise typer.Exit(view.exit_code(document))


@app.command()
def wait(
    models: KeysArgument = None,
    timeout: Annotated[str, typer.Option(help="Give up after this long.")] = "10m",
    url: UrlOption = None,
    path: ConfigOption = None,
) -> None:
    """Block until models are warm. Exit code as `status`."""
    address, names = _admin_url(url, path), models or []
    keys = names
    try:
        deadline = time.monotonic() + config.seconds(timeout)
    except ValueError:
        _fail(f'--timeout: "{timeout}" is no duration; write "30s", "10m" or "1h30m"', view.CANNOT_TELL)
    console, said, shown = _console(), dict[str, str](), dict[str, Any]()
    code = view.CANNOT_TELL
    with Live(console=console, auto_refresh=False, transient=True) as live:
        while True:
            try:
                left = deadline - time.monotonic()
                document = asking.fetch(address, timeout=min(asking.ANSWER_TIMEOUT, max(ANSWER_MIN, left)))
            except asking.NoAnswer as error:
                # It may be starting just now.
                if error.final or time.monotonic() >= deadline:
                    trouble = str(error)
                    break
                if console.is_terminal:
                    live.update(Text(f"{error} Waiting for it."), refresh=True)
                elif not said:
                    said[""] = str(error)
                    typer.echo(f"{error} Waiting for it.", err=True)
                time.sleep(POLL)
                continue
            keys = _keys(address, document, names)
            trouble = _unknown(document, keys)
            if trouble:
                if _takes_unlisted(document):
                    trouble += ". To ask for a model: keepalive warm MODEL"
                break
            code = view.exit_code(document, keys)
            shown = {**document, "models": view.chosen(document, keys)}
            if console.is_terminal:
                live.update(view.table(shown), refresh=True)
            else:
                _say_changes(console, shown, said)
            if code == view.READY or time.monotonic() >= deadline:
                break
            time.sleep(min(POLL, max(0.0, deadline - time.monotonic())))
    if trouble:
        _fail(trouble, view.CANNOT_TELL)
    console.print(view.table(shown))
    raise typer.Exit(code)


@app.command()
def warm(
    model: KeyArgument,
    without_engine: Annotated[
        bool,
        typer.Option(
            help="Also while etcd, by which several daemons agree, is away: that no other loads it is yours to know."
        ),
    ] = False,
    url: UrlOption = None,
    path: ConfigOption = None,
) -> None:
    """Ask for a model now. Also outside its window or after a failure. Exit code as `status`."""
    _change(_admin_url(url, path), model, "warm", "?without_engine=1" if without_engine else "")


@app.command()
def release(model: KeyArgument, url: UrlOption = None, path: ConfigOption = None) -> None:
    """Stop keeping a model. Until its next window or a restart. Exit code as `status`."""
    _change(_admin_url(url, path), model, "release")


@app.command()
def replay(
    trace: Annotated[
        Path | None,
        typer.Argument(
            metavar="[TRACE]",
            help="CSV with second,model,answer_seconds, a JSON log, or a history.db. Default: the config's.",
        ),
    ] = None,
    path: ConfigOption = None,
    models: Annotated[
        Path | None,
        typer.Option(help="CSV with model,gigabytes,load_seconds. Outranks the config."),
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="How much there is for models, as 40GB. Outranks the config.")
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(help="ours, lru, auto-evict or clairvoyant. Repeatable. Default: all of them."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="A list, one object for each policy.")] = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.svg", help="Draw who was in memory when, and who waited.")
    ] = None,
    export: Annotated[
        Path | None,
        typer.Option(metavar="FILE.csv", help='Only write the requests as a trace; "-": to standard output.'),
    ] = None,
) -> None:
    """Tell what callers would have waited with another memory.

    Replays requests of the past with other models, another memory, another policy. The decisions are those of
    the daemon; the clock is not.
    """
    from keepalive.cli import replaying

    try:
        exported = export is not None and trace is not None
        needed = path is not None or trace is None or (models is None and not exported)
        settings = _config(path)[0] if needed else None
        requests = replaying.read(trace, settings)
        if export is not None:
            replaying.export(requests, export)
            raise typer.Exit
        reports = replaying.run(requests, settings, models, memory, policy or [])
        if plot is not None:
            replaying.draw(plot, reports)
    except KeepaliveError as error:
        _fail(str(error), 1)
    if as_json:
        typer.echo(json.dumps(replaying.documents(reports), indent=1))
    else:
        _console().print(replaying.table(reports))


@app.command()
def doctor(url: UrlOption = None, path: ConfigOption = None) -> None:
    """Find what is wrong, and how to mend it. Exit code 0 healthy, 1 findings.

    Asks the config, the daemon, LM Studio and this machine, and changes nothing.
    """
    from keepalive.cli import doctor as practice
    from keepalive.cli import evidence

    try:
        found = config.find(path, _environ())
        settings = config.load(found, _environ())
    except config.ConfigError as error:
        _fail(f"{error}\nA daemon does not start with this config. Mend it, then ask again.", 1)
    address, status, silence = _admin_url(url, path), None, ""
    requests: list[dict[str, Any]] = []
    try:
        status = asking.fetch(address)
    except asking.NoAnswer as error:
        silence = str(error)
    with contextlib.suppress(asking.NoAnswer):  # a daemon before 1.1 does not tell them
        requests = asking.fetch(address, "/api/requests", holds="requests")["requests"] if status else []
    seen = asyncio.run(evidence.gather(settings, found, _environ(), address, status, silence, requests))
    findings = practice.findings(seen)
    console = _console()
    for finding in findings:
        console.print(view.finding(finding.what, finding.why, finding.do))
    if not findings:
        console.print(Text(practice.health(seen), style="green"))
    raise typer.Exit(1 if findings else 0)


def _change(address: str, model: str, verb: str, query: str = "") -> None:
    document = _ask(address)
    keys = _keys(address, document, [model])
    unknown = _unknown(document, keys)
    if unknown and not (verb == "warm" and _takes_unlisted(document)):
        _fail(unknown, view.CANNOT_TELL)
    changed = _ask(address, f"/api/models/{quote(model, safe='')}/{verb}{query}", method="POST")
    if unknown:
        keys = [m["key"] for m in changed["models"]]
    document = _ask(address)
    _console().print(view.table({**document, "models": view.chosen(document, keys)}))
    raise typer.Exit(view.exit_code(document))


def _watch(address: str, document: Any, *, as_json: bool) -> Any:
    """Show it until Ctrl-C, through restarts of the daemon; returns what was known last, or None."""
    console, said = _console(), dict[str, str]()
    plain = as_json or not console.is_terminal
    trouble = ""
    with Live(console=console, auto_refresh=False, screen=not plain) as live:
        try:
            while True:
                if document is None:
                    if plain and said.get("") != trouble:
                        said[""] = trouble
                        typer.echo(trouble, err=True)
                    live.update(Text(trouble), refresh=not plain)
                elif as_json:
                    typer.echo(json.dumps(document))
                elif plain:
                    _say_changes(console, document, said)
                else:
                    live.update(view.table(document), refresh=True)
                time.sleep(2 * POLL)
                try:
                    document = asking.fetch(address)
                    said.pop("", None)
                except asking.NoAnswer as error:
                    document, trouble = None, str(error)
        except KeyboardInterrupt:
            return document


def _say_changes(console: Console, document: Any, said: dict[str, str]) -> None:
    """Without a terminal: a line when a model's state changes."""
    states = {f"{m['upstream']} {m['key']}": m["state"] for m in document["models"]}
    for (place, state), line in zip(states.items(), words.lines(document).values(), strict=True):
        if said.get(place) != state:
            said[place] = state
            console.print(line, markup=False)


def _keys(address: str, document: Any, names: list[str]) -> list[str]:
    """The keys that the daemon understands by names; a name that it does not know stays as it is."""
    keys: list[str] = []
    for name in names:
        meant = [name]
        if view.unknown_keys(document, [name]):
            with contextlib.suppress(asking.NoAnswer):
                found = asking.fetch(address, f"/api/status?model={quote(name, safe='')}")
                if found.get("named") == [name]:
                    meant = [m["key"] for m in found["models"]]
        keys += meant
    return list(dict.fromkeys(keys))


def _unknown(document: Any, keys: list[str]) -> str:
    """What to say about keys that the daemon does not keep; nothing when it keeps all."""
    unknown = view.unknown_keys(document, keys)
    if not unknown:
        return ""
    known = ", ".join(dict.fromkeys(m["key"] for m in document["models"]))
    return f"the daemon keeps no {', '.join(unknown)}; it keeps {known or 'nothing yet'}"


def _takes_unlisted(document: Any) -> bool:
    """Whether that daemon keeps what LM Studio lists once it is asked for."""
    return bool(document["config"].get("unlisted") == "auto")


def _environ() -> Mapping[str, str]:
    """What settings may come from: the key with which these commands ask is not one."""
    return {name: value for name, value in os.environ.items() if name != "KEEPALIVE_ADMIN_KEY"}


def _config(path: Path | None) -> tuple[config.Config, Path | None]:
    found = config.find(path, _environ())
    try:
        return config.load(found, _environ()), found
    except config.ConfigError as error:
        _fail(str(config.with_openings(error, found)), BAD_CONFIG)


def _without_config(settings: config.Config) -> str:
    """Two lines for whoever has not written anything."""
    where, server = settings.upstreams[0].url, settings.server
    return (
        f"Without a config keepalive stands in front of LM Studio at {where} and keeps what is asked for.\n"
        f"Base URL: http://{server.listen}/v1. Page: http://{server.admin_listen}/. To pin models: keepalive init"
    )


def _admin_url(url: str | None, path: Path | None) -> str:
    given = url or unquoted(os.environ.get("KEEPALIVE_ADMIN_URL", ""))
    if given:
        return (given if "://" in given else f"http://{given}").rstrip("/")
    try:
        address = config.load(config.find(path, _environ()), _environ()).server.admin_listen
    except config.ConfigError as error:
        if path is not None:
            _fail(str(error), BAD_CONFIG)
        address = config.Server().admin_listen
    host = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(address.host, address.host)  # noqa: S104
    return f"http://[{host}]:{address.port}" if ":" in host else f"http://{host}:{address.port}"


def _ask(address: str, route: str = "/api/status", *, method: str = "GET") -> Any:
    """The daemon's answer, or the end with exit code 3 and a sentence."""
    try:
        return asking.fetch(address, route, method=method)
    except asking.NoAnswer as error:
        _fail(str(error), view.CANNOT_TELL)


def _console() -> Console:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = ENDLESS
    return console


def _fail(message: str, code: int) -> NoReturn:
    typer.echo(message, err=True)
    raise typer.Exit(code)


def _run(main: Coroutine[Any, Any, None]) -> None:
    from keepalive.service import platform

    gc.freeze()  # nor is what was imported looked through again, as long as it runs
    gc.enable()
    with asyncio.Runner(loop_factory=platform.new_event_loop) as runner:
        runner.run(main)
