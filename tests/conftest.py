"""How the tests run: beside each other, the same ones each time, and on which loop.

A test file that says `BOTH_LOOPS = True` has each of its tests run on asyncio's own loop and on uvloop. A test marked
`clock_jumps` has one whose clock nobody waits for (`tests/kit/clock.py`). Tests that share something that costs time
to set up, or must not meet, name it: `pytest.mark.xdist_group("a browser")`.
"""

import asyncio
import gc
import os
import signal
from pathlib import Path

import hypothesis
import pytest
import pytest_asyncio

from tests.kit.clock import JumpingLoop

try:
    import uvloop
except ImportError:  # not to be had everywhere
    uvloop = None

# The same examples in each run, and none that fails for being slow on a busy machine, so that a run can be
# trusted; KEEPALIVE_SEED=random looks for new ones.
hypothesis.settings.register_profile(
    "fixed",
    derandomize=os.environ.get("KEEPALIVE_SEED") != "random",
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("fixed")


def pytest_configure(config):
    # A run in the background of a script ignores Ctrl-C, and so would each command that a test starts and interrupts.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # Programs written in Go (promtool, Prometheus, etcd) look for garbage less often: a seventh of what rules cost.
    os.environ.setdefault("GOGC", "400")
    config.option.loadscopereorder = (
        False  # pytest-xdist would begin with the largest group, which is not the longest
    )
    if config.getoption("dist", "no") == "no":  # who hands tests out collects none
        gc.disable()  # until all is collected, of which nothing is garbage: an eighth of what each worker begins with


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all workers of this run, and of no other run."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture
def no_issuers(monkeypatch: pytest.MonkeyPatch) -> None:
    """No issuers of the world: to read those takes each client of an official package a twentieth of a second."""
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    monkeypatch.setenv("SSL_CERT_DIR", os.devnull)


def pytest_asyncio_loop_factories(config, item):
    if item.get_closest_marker("clock_jumps"):
        return {"jumping": JumpingLoop}
    factories = {"asyncio": asyncio.SelectorEventLoop}
    module = item.getparent(pytest.Module)
    if uvloop is not None and module is not None and getattr(module.obj, "BOTH_LOOPS", False):
        factories["uvloop"] = uvloop.new_event_loop
    return factories


def pytest_xdist_auto_num_workers(config):
    """More than cores: most tests wait for processes and sockets, not for the processor."""
    return 3 * (os.cpu_count() or 1)


# What has to run on one worker and takes minutes, of which it waits for most: the more of it at once, the less there is
# to do for the processor. So half of the workers begin with the longest, and the others with what needs a processor;
# the second of the booted machines finds installed what the first one has installed.
AT_ONCE = ("systemd-changes", "a real server", "etcd")
SOON = (
    "systemd-restarts",
    "the page in a browser",
    "monitoring-watched",
    "the module in a browser",
    "systemd-calm",
    "etcd in trouble",
)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """What takes longest comes first, so that no worker is left with it when the others are done.

    What is given more time than all others (`timeout`) needs the most of a processor.
    """
    usual = float(config.getini("timeout"))

    def order(item):
        marker, given = item.get_closest_marker("xdist_group"), item.get_closest_marker("timeout")
        group = marker.args[0] if marker else None
        if group in AT_ONCE:
            return 0, AT_ONCE.index(group)
        if group in SOON:
            return 2, SOON.index(group)
        if group:
            return 3, 0
        seconds = given.args[0] if given else usual
        return 1 if seconds > usual else 4, -seconds

    items.sort(key=order)


def pytest_collection_finish(session):
    gc.enable()
    _look_no_more_at_what_stays()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown():
    result = yield
    _look_no_more_at_what_stays()
    return result


def _look_no_more_at_what_stays():
    """What a test holds no more is looked for (`gc.collect`) among what it made, not in all that was loaded before.

    That is no small thing: to look through the official clients once takes longer than most tests.
    """
    gc.collect()
    gc.freeze()


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def browser():
    """The Chromium of this process, begun by the first test that wants it; see `tests/kit/browser.py`."""
    from tests.kit.browser import chromium

    async with chromium() as started:
        yield started


def pytest_make_parametrize_id(config, val, argname):
    """Workers must agree on the names of tests, and each sends all of them: packed bytes hold the time at which they
    were packed, and some of what is tried has a million letters."""
    packed = isinstance(val, bytes) and val.startswith(b"\x1f\x8b")
    return argname if packed or (isinstance(val, bytes | str) and len(val) > 100) else None
