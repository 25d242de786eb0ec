"""Other systems, imitated: what they lack is taken away, what they do otherwise is done so.

Each folder here holds a `sitecustomize` that Python runs first when the folder is on its path. The standard library
and the libraries that we use ask on import which system they are on, and would look for the real one: so all of
them are imported before anything is changed, and only our own code is fooled.
"""

import asyncio  # noqa: F401
import concurrent.futures.thread  # noqa: F401
import http.client  # noqa: F401
import multiprocessing  # noqa: F401
import platform
import selectors  # noqa: F401
import sqlite3  # noqa: F401
import ssl  # noqa: F401
import subprocess  # noqa: F401
import sys
import tempfile  # noqa: F401
import urllib.request  # noqa: F401
from pathlib import Path
from types import ModuleType

import aiohttp.web  # noqa: F401
import anyio._backends._asyncio  # noqa: F401
import apscheduler.schedulers.asyncio  # noqa: F401
import httpcore  # noqa: F401
import httptools  # noqa: F401
import httpx  # noqa: F401
import prometheus_client  # noqa: F401
import pydantic  # noqa: F401
import rich.live
import rich.progress
import rich.table  # noqa: F401
import structlog  # noqa: F401
import typer.main  # noqa: F401
import tzlocal  # noqa: F401

platform.uname()  # remembers what it has found


def path(system: str) -> str:
    """The PYTHONPATH of a process that is to run on `system`."""
    here = Path(__file__).parent
    return f"{here / system}:{here.parents[2]}"


def without_modules(names: str) -> None:
    for name in names.split():
        sys.modules[name] = None  # type: ignore[assignment]  # this is how Python notes that there is none


def without(module: ModuleType, names: str) -> None:
    for name in names.split():
        if hasattr(module, name):
            delattr(module, name)
