"""`make test-timely` runs what it names."""

import pytest

from tests.kit import PROJECT
from tests.kit.timely import TESTS


@pytest.mark.parametrize("name", TESTS)
def test_what_it_names_is_there(name: str) -> None:
    file, _, function = name.partition("::")

    assert f"def {function}" in (PROJECT / file).read_text()
