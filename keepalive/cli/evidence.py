"""What a doctor looks at: what each upstream, this machine and the daemon say. Nothing is changed by asking.

To list loads nothing and renews no lease.
"""

import asyncio
import importlib.util
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, tzinfo
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfoNotFoundError

from keepalive.config import Config, Kept, Upstream
from keepalive.core.errors import KeepaliveError
from keepalive.lmstudio.client import Client, Listing
from keepalive.service import tokens

Json = Mapping[str, Any]

# A question to systemd that takes longer will not be answered.
SYSTEM_TIMEOUT = 5.0


@dataclass(frozen=True, slots=True)
class Probe:
    """What one upstream said to a listing, or why it said nothing."""

    listing: Listing | None = None
    error: KeepaliveError | None = None


@dataclass(frozen=True, slots=True)
class Host:
    """This machine. None: it could not be asked."""

    now: datetime
    zone: tzinfo | str | None = None  # as text: why there is none
    synchronized: bool | None = None
    memory_bytes: int | None = None
    unit: str | None = None  # what systemd says of keepalive.service: "enabled", "disabled", …
    messages: bool = True  # what sends them is installed


@dataclass(frozen=True, slots=True)
class Evidence:
    """`status` is the daemon's, or None with `silence`: why it did not answer at `address`."""

    config: Config
    path: Path | None
    address: str
    status: Json | None
    silence: str
    host: Host
    probes: Mapping[str, Probe] = field(default_factory=dict)
    requests: Sequence[Json] = ()  # those of the last minutes

    def upstream_status(self, name: str) -> Json | None:
        return next((u for u in (self.status or {}).get("upstreams", ()) if u["name"] == name), None)

    def model_status(self, kept: Kept) -> Json | None:
        wanted = (kept.upstream, kept.key)
        models = (self.status or {}).get("models", ())
        return next((m for m in models if (m["upstream"], m["key"]) == wanted), None)


async def gather(
    config: Config,
    path: Path | None,
    environ: Mapping[str, str],
    address: str,
    status: Json | None,
    silence: str = "",
    requests: Sequence[Json] = (),
) -> Evidence:
    """Ask every upstream and this machine. Bounded by the longest `list_timeout`, three times."""
    probes = await asyncio.gather(*(_probe(config, upstream, environ) for upstream in config.upstreams))
    names = [upstream.name for upstream in config.upstreams]
    messages = importlib.util.find_spec("apprise") is not None
    host = Host(datetime.now(UTC), _zone(config), memory_bytes=_memory(), messages=messages)
    if _has_systemd():
        clock = await _said("timedatectl", "show", "--property=NTPSynchronized", "--value")
        unit = await _said("systemctl", "is-enabled", "keepalive.service")
        # Newer ones have a word for a unit that does not exist.
        unit = None if unit == "not-found" else unit
        host = replace(host, synchronized={"yes": True, "no": False}.get(clock or ""), unit=unit)
    probed = dict(zip(names, probes, strict=True))
    return Evidence(config, path, address, status, silence, host, probed, requests)


async def _probe(config: Config, upstream: Upstream, environ: Mapping[str, str]) -> Probe:
    try:
        token = tokens.of_upstream(upstream, environ)
        async with Client(
            upstream.name,
            upstream.url,
            token=token,
            connect_timeout=upstream.connect_timeout,
            list_timeout=upstream.list_timeout,
            sdk=upstream.sdk == "auto",
        ) as client:
            client.expect(
                {kept.key: kept.load_fields for kept in config.kept if kept.upstream == upstream.name}
            )
            listing = await client.listing()
            with suppress(TimeoutError):
                async with asyncio.timeout(upstream.list_timeout):
                    await client.estimated()
                    listing = await client.listing()
            return Probe(listing=listing)
    except KeepaliveError as error:
        return Probe(error=error)


def _zone(config: Config) -> tzinfo | str:
    try:
        return config.zone
    except (ZoneInfoNotFoundError, OSError, ValueError) as error:
        return str(error) or type(error).__name__


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None  # not every system tells


def _has_systemd() -> bool:
    return Path("/run/systemd/system").is_dir()


async def _said(*words: str) -> str | None:
    """What a command of the system prints; None when it says nothing."""
    try:
        process = await asyncio.create_subprocess_exec(
            *words, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
        )
    except OSError:
        return None
    try:
        async with asyncio.timeout(SYSTEM_TIMEOUT):
            out, _ = await process.communicate()
    except TimeoutError:
        process.kill()
        await process.wait()
        return None
    return out.decode(errors="replace").strip() or None
