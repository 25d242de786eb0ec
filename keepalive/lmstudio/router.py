"""llama-server as a router: how it is told to load and to unload, calls that it answers before they are done.

Whether they are is seen by looking; its events only say when to look, and how far a load is.
"""

import asyncio
import re
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable
from contextlib import aclosing, asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final, Protocol
from urllib.parse import quote, urlsplit

from keepalive.core.errors import GivenUp, Reason, Refused, UpstreamError
from keepalive.core.facts import Entry, Odd
from keepalive.lmstudio import llama, wire

#: How often it is looked whether a load or an unload is over, unless an event says so.
LOOK: Final = 0.5
#: A model that takes longer to say what it does is doing something.
SILENT: Final = 5.0
LOOPBACK: Final = ("localhost", "127.0.0.1", "[::1]", "::1")
_SHARD: Final = re.compile(r"-\d{5}-of-(?P<count>\d{5})\.gguf$")


class Call(Protocol):
    def __call__(
        self, method: str, path: str, body: dict[str, Any] | None = None
    ) -> Awaitable[wire.Json]: ...


class Router:
    """One of them; `call` asks it, and `events` streams what it says at a path. They raise UpstreamError."""

    def __init__(self, call: Call, events: Callable[[str], AsyncGenerator[wire.Json]], url: str) -> None:
        self._call = call
        self._events = events
        self._here = urlsplit(url).hostname in LOOPBACK
        self._sizes: dict[str, int | None] = {}
        self.places: int | None = None
        self._loading: set[str] = set()  # by us
        self._given_up: set[str] = set()

    async def entries(self, odd: Callable[[Odd], None]) -> list[Entry]:
        """What it lists, but for what is told to `odd`; `places` is as of then."""
        # Each time: it may have been started anew, with another number, between two looks.
        self.places = llama.places(await self._call("GET", "/props"))
        rows = llama.rows(await self._call("GET", "/v1/models"), odd)
        await self._measure(path for row in rows if (path := llama.file(row)) is not None)
        return [llama.entry(row, self._sizes.get(llama.file(row) or "")) for row in rows]

    async def load(self, key: str, told: Callable[[float], None]) -> wire.Loaded:
        """Load it, or wait for a load that is under way. Without an instance it was somebody else's."""
        self._given_up.discard(key)
        try:
            return await self._load(key, told)
        finally:
            self._loading.discard(key)

    async def give_up(self, key: str) -> None:
        """Ask for the end of our load of it: `load` then raises GivenUp. Never raises."""
        if key in self._loading:
            self._given_up.add(key)
            with suppress(UpstreamError, TimeoutError):
                async with asyncio.timeout(SILENT):
                    await self._call("POST", "/models/unload", {"model": key})

    async def _load(self, key: str, told: Callable[[float], None]) -> wire.Loaded:
        ours, names = True, {key}
        async with self._watched(names, told) as changed:
            try:
                await self._call("POST", "/models/load", {"model": key})
                self._loading.add(key)
            except Refused as error:
                if error.status == 404:
                    raise Refused("it is not there", reason=Reason.UNKNOWN_MODEL, status=404) from None
                if "already running" not in str(error):
                    raise
                ours = False
            while True:
                value, row = llama.status(await self._call("GET", "/v1/models"), key)
                names.add(row.get("id", key))  # it may have been asked for by an alias
                if value == "loaded":
                    return wire.Loaded(row["id"] if ours else None, None)
                if value == "sleeping":
                    # Asked what it does it wakes, and answers when it is awake.
                    await self._slots(key)
                    ours = True
                elif value == "unloaded" and key in self._given_up:
                    raise GivenUp("it was given up")
                elif value == "unloaded":
                    code = llama.exit_code(row)
                    how = "it was unloaded meanwhile" if code is None else f"its process ended with {code}"
                    raise Refused(f"it could not be loaded: {how}", reason=Reason.LOAD_FAILED, status=200)
                elif value != "loading":
                    raise Refused(f"it is {value}", reason=Reason.LOAD_FAILED, status=200)
                await _first(changed, LOOK)

    async def unload(self, key: str) -> None:
        """Unload it, unless it answers somebody; comes back when its process is gone."""
        if await self._works(key):
            why = "it answers somebody who does not ask through keepalive"
            raise Refused(why, reason=Reason.IN_USE, status=200)
        value, row = llama.status(await self._call("GET", "/v1/models"), key)
        process = llama.process(row)
        try:
            await self._call("POST", "/models/unload", {"model": key})
        except Refused as error:
            if error.reason is not Reason.UNLOADED:
                raise
            return  # somebody was faster
        while value in llama.RUNNING and llama.process(row) == process:
            await asyncio.sleep(LOOK / 5)
            value, row = llama.status(await self._call("GET", "/v1/models"), key)

    async def _works(self, key: str) -> bool:
        try:
            async with asyncio.timeout(SILENT):
                return llama.works(await self._slots(key))
        except TimeoutError:
            return True
        except UpstreamError:
            return False  # it does not say, which its owner may have chosen

    async def _slots(self, key: str) -> wire.Json:
        return await self._call("GET", llama.as_it_is(f"/slots?model={quote(key, safe='')}"))

    @asynccontextmanager
    async def _watched(self, names: set[str], told: Callable[[float], None]) -> AsyncIterator[asyncio.Event]:
        """Set when something has become of a load; its progress is told meanwhile."""
        changed = asyncio.Event()

        async def watch() -> None:
            async with aclosing(self._events("/models/sse")) as events:
                async for event in events:
                    if (done := llama.progress(event, names)) is not None:
                        told(done)
                    if llama.ends(event, names):
                        changed.set()

        watching = asyncio.create_task(watch())
        try:
            yield changed
        finally:
            watching.cancel()
            await asyncio.wait([watching])

    async def _measure(self, paths: Iterable[str]) -> None:
        """See how large the files are that nobody has looked at, where they lie on this machine."""
        new = [path for path in paths if path not in self._sizes] if self._here else []
        if new:
            # Once: a folder of a server that is gone may hold up whoever looks into it.
            self._sizes.update(dict.fromkeys(new))
            with suppress(TimeoutError):
                async with asyncio.timeout(SILENT / 10):
                    self._sizes.update(await asyncio.to_thread(lambda: {path: _size(path) for path in new}))


def _size(path: str) -> int | None:
    shards = _SHARD.search(path)
    paths = [path]
    if shards:
        first, count = path[: shards.start()], int(shards["count"])
        paths = [f"{first}-{n:05}-of-{count:05}.gguf" for n in range(1, min(count, 1000) + 1)]
    try:
        return sum(Path(part).stat().st_size for part in paths) or None
    except (OSError, ValueError):
        return None


async def _first(event: asyncio.Event, seconds: float) -> None:
    """Wait for the event, so long at most; it is taken back."""
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return
    event.clear()
