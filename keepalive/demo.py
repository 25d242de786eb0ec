"""`keepalive demo`: a simulated LM Studio, the daemon in front of it, and a small story to watch.

The daemon is the real one with a config like anybody's; only LM Studio is simulated. The story: both models
load, one after the other; then something throws the larger one out, as LM Studio does when another model is
loaded on demand; the daemon notices and mends it.
"""

import asyncio
import socket
from typing import Any

from rich.console import Console
from rich.live import Live

from keepalive import config, view
from keepalive.daemon import Daemon
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
"""

WELCOME = """\
A simulated LM Studio runs at {upstream} and the daemon in front of it, with this config:
{settings}
Look at it from another terminal, or a browser:
  keepalive status --watch{url}           what is warm, what is loading, for how long yet
  keepalive release medicine-llm{url}    stop keeping it; `warm` takes it back
  curl {admin}/metrics                 what Prometheus scrapes
  curl -X POST {upstream}/simulator/evict -d '{{"model":"small-talk-1b"}}'    throw a model out
Ctrl-C ends it.
"""


async def run(console: Console) -> None:
    """Show it until Ctrl-C."""
    studio = Studio(MODELS)
    async with await serve(studio) as upstream, asyncio.TaskGroup() as tasks:
        text = SETTINGS.format(admin=_free_address(), upstream=upstream.url)
        # A demonstration leaves nothing on disk, and takes nothing from the environment.
        daemon = Daemon(config.parse(text, "demo", {}), None, {})
        daemon.watch_signals()
        tasks.create_task(daemon.run())
        await daemon.started.wait()
        admin = daemon.admin_url
        console.print(_welcome(text, upstream.url, admin), markup=False)
        story = tasks.create_task(_throw_out(studio, daemon, console))
        await _show(daemon, console)
        story.cancel()


def _free_address() -> str:
    """The usual admin address, or any free port where it is taken."""
    usual = config.Server().admin_listen
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((usual.host, usual.port))
        except OSError:
            return f"{usual.host}:0"
    return str(usual)


def _welcome(text: str, upstream: str, admin: str) -> str:
    is_usual = admin.endswith(f":{config.Server().admin_listen.port}")
    return WELCOME.format(
        upstream=upstream,
        admin=admin,
        url="" if is_usual else f" --url {admin}",
        settings="".join(f"    {line}\n" for line in text.strip().splitlines()),
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
    for model in document["models"]:
        mark = model["state"]
        if model["load"]:
            mark += str(int(model["load"]["elapsed_seconds"] / 3))
        if said.get(model["key"]) != mark:
            said[model["key"]] = mark
            console.print(view.line(model), markup=False)


async def _throw_out(studio: Studio, daemon: Daemon, console: Console) -> None:
    while not daemon.status()["ready"]:  # noqa: ASYNC110  # a story needs no more
        await asyncio.sleep(0.5)
    await asyncio.sleep(EVICTED_AFTER)
    console.print(
        "Another program loads something large, and LM Studio throws medicine-llm out:", style="bold"
    )
    studio.evict("medicine-llm")
