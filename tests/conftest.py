"""A test file that says `BOTH_LOOPS = True` has each of its tests run on asyncio's own loop and on uvloop."""

import asyncio
import os

import hypothesis
import pytest

try:
    import uvloop
except ImportError:  # not to be had everywhere
    uvloop = None

# The same examples in each run, and none that fails for being slow on a busy machine, so that a run can be
# trusted; KEEPALIVE_SEED=random looks for new ones.
hypothesis.settings.register_profile(
    "fixed", derandomize=os.environ.get("KEEPALIVE_SEED") != "random", deadline=None
)
hypothesis.settings.load_profile("fixed")


def pytest_asyncio_loop_factories(config, item):
    factories = {"asyncio": asyncio.SelectorEventLoop}
    module = item.getparent(pytest.Module)
    if uvloop is not None and module is not None and getattr(module.obj, "BOTH_LOOPS", False):
        factories["uvloop"] = uvloop.new_event_loop
    return factories
