"""`keepalive demo`: a simulated LM Studio, the daemon in front of it, and a small story to watch.

The daemon is the real one with a config like anybody's; only LM Studio is simulated. The story: both models
load, one after the other; then somebody unloads the larger one, as people do and LM Studio does by itself; the
daemon notices and mends it.
"""

import asyncio
from typing import Any

from rich.console import Console
from rich.live import Live

from keepalive import config
from keepalive.admin import words
from keepalive.cli import view
from keepalive.core.errors import KeepaliveError
from keepalive.http1 import bind
from keepalive.observers import logs
from keepalive.service.daemon import Daemon
from keepalive.simulator.models import SimModel
from keepalive.simulator.server import serve
from keepalive.simulator.studio import Studio

MODELS = (
    SimModel("medicine-llm", size_bytes=7_200_000_000, load_seconds=12.0),
    SimModel("small-talk-1b", size_bytes=1_800_000_000, load_seconds=3.0),
)
EVICTED_AFTER = 12.0

SETTINGS = """
[server]
listen = "{listen}"
admin_listen = "{admin}"

[[upstreams]]
name = "simulator"
url = "{upstream}"

[defaults]
refresh_interval = "1s"
ping_interval = "10s"

[[models]]
key = "medicine-llm"
context_length = 8192

[[models]]
key = "small-talk-1b"

[[prompts]]
id = 28
title = "Explain something"
model = "medicine-llm"
content = "Explain {{{{topic}}}} to a nurse."
"""

WELCOME = """\
LM Studio is simulated at {upstream}. The daemon in front of it:

{settings}
Open {admin}/ in a browser: what is warm, what is loading and for how long yet, the last day, and a
playground. Or from another terminal:

    keepalive status --watch{url}
        what is warm, what is loading, for how long yet
    keepalive release medicine-llm{url}
        stop keeping it; `warm` takes it back
    curl -N {listen}/v1/chat/completions -d '{{"model":"medicine-llm","stream":true,
            "messages":[{{"role":"user","content":"What is a cold start?"}}]}}'
        ask, as an application does: a model that is not ready says so, then answers
    curl -N {listen}/api/prompts/execute/stream -H 'Content-Type: application/json' \\
            -d '{{"promptId":28,"variables":{{"topic":"a cold start"}}}}'
        run a configured prompt: the events that a "Loading model…" is made of
    curl {admin}/metrics
        what Prometheus scrapes
    curl -X POST {upstream}/simulator/evict -d '{{"model":"small-talk-1b"}}'
        throw a model out, and watch it come back

First both models load, one after the other. Ctrl-C ends it.
"""
EVICTED = "Somebody unloads medicine-llm by hand, to make room for another model. Nobody asks for it:"
MENDED = "It is back, without anybody's help. The demo goes on until Ctrl-C: try the commands above."


async def run(console: Console) -> None:
    """Show it until Ctrl-C. Raises a KeepaliveError when it cannot be shown."""
    # What the log would say is what is shown here.
    end_log = logs.start(level="error", as_json=None, stream=None)
    studio = Studio(MODELS)
    try:
        async with await serve(studio) as upstream, asyncio.TaskGroup() as tasks:
            server = config.Server()
            text = SETTINGS.format(
                listen=_free_address(server.listen),
                admin=_free_address(server.admin_listen),
                upstream=upstream.url,
            )
            # A demonstration leaves nothing on disk, and takes nothing from the environment.
            daemon = Daemon(config.parse(text, "demo", {}), None, {})
            daemon.watch_signals()
            tasks.create_task(daemon.run())
            await daemon.started.wait()
            console.print(_welcome(text, upstream.url, daemon), markup=False, soft_wrap=True)
            story = tasks.create_task(_throw_out(studio, daemon, console))
            await _show(daemon, console)
            story.cancel()
    except* KeepaliveError as errors:
        raise KeepaliveError(str(errors.exceptions[0])) from errors
    finally:
        end_log()


def _free_address(usual: config.Address) -> str:
    """The usual address, or any free port where it is taken."""
    try:
        found = bind(usual.host, usual.port)
    except OSError:
        return f"{usual.host}:0"
    for one in found:
        one.close()
    return str(usual)


def _welcome(text: str, upstream: str, daemon: Daemon) -> str:
    is_usual = daemon.admin_url.endswith(f":{config.Server().admin_listen.port}")
    return WELCOME.format(
        upstream=upstream,
        listen=daemon.url,
        admin=daemon.admin_url,
        url="" if is_usual else f" --url {daemon.admin_url}",
        settings="".join(f"    {line}".rstrip() + "\n" for line in text.strip().splitlines()),
    )


async def _show(daemon: Daemon, console: Console) -> None:
    said: dict[str, str] = {}
    with Live(console=console, auto_refresh=False) as live:
        while not daemon.stopping:
            document = daemon.status()
            if console.is_terminal:
                live.update(view.table(document), refresh=True)
            else:
                _say(console, document, said)
            await asyncio.sleep(0.25)


def _say(console: Console, document: dict[str, Any], said: dict[str, str]) -> None:
    """Without a terminal: a line when a state changes, and one every three seconds of a load."""
    for model, (name, line) in zip(document["models"], words.lines(document).items(), strict=True):
        mark = model["state"]
        if model["load"]:
            mark += str(int(model["load"]["elapsed_seconds"] / 3))
        if said.get(name) != mark:
            said[name] = mark
            console.print(line, markup=False)


async def _throw_out(studio: Studio, daemon: Daemon, console: Console) -> None:
    await _until(daemon, ready=True)
    await asyncio.sleep(EVICTED_AFTER)
    console.print(EVICTED, style="bold")
    studio.evict("medicine-llm")
    await _until(daemon, ready=False)
    await _until(daemon, ready=True)
    console.print(MENDED, style="bold")


async def _until(daemon: Daemon, *, ready: bool) -> None:
    while daemon.status()["ready"] is not ready:  # noqa: ASYNC110  # a story needs no more
        await asyncio.sleep(0.25)
