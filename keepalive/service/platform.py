"""What Linux, macOS and Windows do not have in common: open files, signals, the event loop.

Nothing here fails where a system lacks something or refuses it: the daemon does with what it gets. Two smaller
differences are settled where they belong: the lock of a file in `observers/history/store`, and how the kernel
finds out that a peer has vanished in `http1/vanished`.
"""

import asyncio
import signal
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path

# Without limits of its own it is Windows, whose `select()` in Python takes so many sockets.
SELECTABLE = 512
# What nearly every system grants, where it does not say.
USUAL_FILES = 256


def files(wanted: int) -> int:
    """How many files this process may have open, after asking for `wanted`.

    Systems start programs with few, for the sake of those that use `select()`: macOS with 256, systemd with 1,024.
    """
    try:
        import resource
    except ImportError:
        return SELECTABLE
    try:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = wanted if hard < 0 else min(wanted, hard)
        # The hard limit need not be true: macOS says infinite, and gives a process 10,240 or some more. What is
        # granted is in effect at once, so that the last number is the largest.
        low, high = sys.maxsize if soft < 0 else soft, most + 1
        while low < most:
            try:
                resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
                low = most
            except (ValueError, OSError):
                high = most
            most = (low + high) // 2
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    except (AttributeError, ValueError, OSError):
        return USUAL_FILES
    return sys.maxsize if soft < 0 else soft


def awake() -> float:
    """Seconds of a clock that goes on while the machine sleeps, where the system has one; `time.monotonic` stands still
    then, on Linux and on macOS."""
    goes_on = getattr(time, "CLOCK_BOOTTIME", getattr(time, "CLOCK_MONOTONIC", None))
    return time.monotonic() if goes_on is None else time.clock_gettime(goes_on)


def boot_id() -> str | None:
    """What names this life of the machine, where the system tells: Linux does."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() or None
    except (OSError, ValueError):
        return None


def watch_signals(actions: Mapping[str, Callable[[], None]]) -> None:
    """Have the running loop do this when that signal comes, each by its name; not every system knows all."""
    loop = asyncio.get_running_loop()
    for name, act in actions.items():
        number = getattr(signal, name, None)
        if number is None:
            continue
        try:
            loop.add_signal_handler(number, act)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [number])  # what came before is heard now
        except NotImplementedError:
            # Windows. Python runs the handler when the loop next wakes, which the schedule sees to each second.
            signal.signal(number, partial(_pass_on, loop, act))


def _pass_on(loop: asyncio.AbstractEventLoop, act: Callable[[], None], *_: object) -> None:
    with suppress(RuntimeError):  # the loop is closed already: what was asked for has happened
        loop.call_soon_threadsafe(act)


def new_event_loop() -> asyncio.AbstractEventLoop:
    """uvloop where there is one. Else not the default: that of Windows cannot wait until a socket is readable."""
    try:
        import uvloop
    except ImportError:
        return asyncio.SelectorEventLoop()
    return uvloop.new_event_loop()
