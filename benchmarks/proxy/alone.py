"""The proxy by itself, with everything on, in front of one upstream whose model `bench` is always warm.

alone.py PORT UPSTREAM_URL [--profile FILE]
"""

import asyncio
import cProfile
import functools
import signal
import sys
from collections.abc import Sequence

import uvloop
from prometheus_client import Counter, Histogram

from keepalive.core.callers import Seen
from keepalive.core.facts import Fact, ModelId
from keepalive.core.keeping import View
from keepalive.http1 import bind, serve
from keepalive.proxy import Address, Proxy, Settings

BENCH = ModelId("local", "bench")


class AlwaysWarm:
    """A keeper that never has to do anything."""

    view_of_it = View(state="warm")

    def find(self, key: str, /) -> Sequence[ModelId]:
        return [BENCH] if key == "bench" else []

    def view(self, model: ModelId, /) -> View:
        return self.view_of_it

    async def ensure_warm(self, models: Sequence[ModelId], /) -> ModelId:
        return models[0]

    def record(self, fact: Fact, /) -> None:
        pass


FIRST = Histogram("first_token_seconds", "time to the first token", ["model", "start"])
DURATION = Histogram("request_duration_seconds", "a request", ["model", "route"])
REQUESTS = Counter("requests", "requests", ["model", "route", "outcome"])
GAPS = Counter("gaps", "gaps between events", ["bucket"])
BUCKETS = [GAPS.labels(str(i)) for i in range(32)]


@functools.cache
def children(model: str, route: str, outcome: str, start: str) -> tuple[Counter, Histogram, Histogram]:
    return REQUESTS.labels(model, route, outcome), DURATION.labels(model, route), FIRST.labels(model, start)


def observe(seen: Seen) -> None:
    """About what the daemon's metrics do with each request."""
    model = seen.model.key if seen.model else "other"
    requests, duration, first = children(model, seen.route, seen.outcome, seen.start or "warm")
    requests.inc()
    duration.observe(seen.seconds)
    if seen.first_token_seconds is not None:
        first.observe(seen.first_token_seconds)
    for bucket, count in zip(BUCKETS, seen.gaps, strict=False):
        if count:
            bucket.inc(count)


async def main(port: int, url: str) -> None:
    proxy = Proxy(Settings(upstreams={"local": Address(url)}), AlwaysWarm(), observe)
    listener = await serve(proxy, sockets=bind("127.0.0.1", port))
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await stop.wait()
    await listener.close()
    await proxy.close()


if __name__ == "__main__":
    profile = sys.argv[4] if sys.argv[3:4] == ["--profile"] else None
    if profile:
        profiler = cProfile.Profile()
        profiler.enable()
    uvloop.run(main(int(sys.argv[1]), sys.argv[2]))
    if profile:
        profiler.disable()
        profiler.dump_stats(profile)
