"""Official clients, imported by the first test that needs one.

Every worker reads every test file, and to import these takes seconds: tests of them are on one worker.
"""

from typing import Any

import pytest

on_one_worker = pytest.mark.xdist_group("official clients")
no_issuers = pytest.mark.usefixtures("no_issuers")  # of `tests/conftest.py`


class Official:
    """A package, by its name; whoever wants something of it is skipped where it is not installed."""

    def __init__(self, package: str) -> None:
        self._package = package

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # asked by the collection, of everything
            raise AttributeError(name)
        package = pytest.importorskip(self._package, reason=f"the package {self._package} is not installed")
        return getattr(package, name)
