"""The bare data path: the proxy in front of one upstream whose model `bench` is always warm, and nobody listening.

What it does for users is on (holding, reading `model` from the body, event boundaries, metering, heartbeats); a
stub stands in the keeper's place, and what is seen of a request goes nowhere. bare.py PORT UPSTREAM_URL
"""

import asyncio
import signal
import sys
from collections.abc import Mapping, Sequence

import uvloop

from keepalive.core.callers import Seen
from keepalive.core.facts import Fact, ModelId
from keepalive.core.keeping import View
from keepalive.core.names import Meaning
from keepalive.http1 import bind, serve
from keepalive.proxy import Address, Proxy, Settings

BENCH = ModelId("local", "bench")


class AlwaysWarm:
    """A keeper that never has to do anything."""

    of_it = Meaning("local", (BENCH,))
    view_of_it = View(state="warm")

    def find(self, name: str, /) -> Sequence[ModelId]:
        return [BENCH]

    async def meaning(self, name: str | None, /, *, default: bool = True) -> Meaning:
        return self.of_it

    def present(self, upstream: str, kind: str, /) -> Sequence[ModelId]:
        return [BENCH]

    def rows(self, upstream: str, /) -> Mapping[str, Sequence[str]]:
        return {}

    def view(self, model: ModelId, /) -> View:
        return self.view_of_it

    def ready(self, models: Sequence[ModelId], /) -> ModelId | None:
        return models[0]

    async def ensure_warm(self, models: Sequence[ModelId], /) -> ModelId:
        return models[0]

    def record(self, fact: Fact, /) -> None:
        pass


def forget(seen: Seen) -> None:
    pass


async def main(port: int, url: str) -> None:
    proxy = Proxy(Settings(upstreams={"local": Address(url)}), AlwaysWarm(), forget)
    listener = await serve(proxy, sockets=bind("127.0.0.1", port))
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await stop.wait()
    await listener.close()
    await proxy.close()


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1]), sys.argv[2]))
