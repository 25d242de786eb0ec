"""The simulator as a program: `run` is what `keepalive simulate` calls."""

import argparse
import asyncio
import contextlib
import signal
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from keepalive.simulator.faults import parse_fault
from keepalive.simulator.models import DEFAULT_MODELS, SimModel, parse_model
from keepalive.simulator.server import serve
from keepalive.simulator.studio import TIERS, Studio, Tier


async def run(
    host: str = "127.0.0.1",
    port: int = 1234,
    models: Iterable[SimModel] = (),
    tier: Tier = "v1",
    faults: Mapping[str, Any] | None = None,
    prefix: str = "",
) -> None:
    """Serve until SIGINT or SIGTERM. No models means the default three. Raises OSError when the port is
    taken."""
    studio = Studio(tuple(models) or DEFAULT_MODELS, tier=tier, faults=faults)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    async with await serve(studio, host, port, prefix) as server:
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(
                NotImplementedError
            ):  # not on Windows; there the KeyboardInterrupt does it
                loop.add_signal_handler(number, stop.set)
        sys.stdout.write(_welcome(studio, server.url))
        sys.stdout.flush()
        await stop.wait()


def _welcome(studio: Studio, url: str) -> str:
    rows = [
        f"  {model.key}  ({model.kind}, {model.size_bytes / 1e9:.1f} GB, loads in {model.load_seconds:g} s)\n"
        for model in studio.memory.models.values()
    ]
    return f"LM Studio simulator ({studio.tier}) on {url}\n{''.join(rows)}What it can do: {url}/simulator/\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="keepalive simulate", description="A stand-in LM Studio.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=1234)
    parser.add_argument("--model", action="append", default=[], metavar="KEY[@VARIANT,...][:SECONDS[:SIZE]]")
    parser.add_argument("--tier", choices=TIERS, default="v1")
    parser.add_argument("--fault", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--prefix", default="", help="a path under which everything is served, as /lm")
    options = parser.parse_args(argv)
    try:
        models = [parse_model(text) for text in options.model]
        faults = dict(parse_fault(text) for text in options.fault)
        asyncio.run(run(options.host, options.port, models, options.tier, faults, options.prefix))
    except (ValueError, OSError) as mistake:
        sys.stderr.write(f"{mistake}\n")
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
