"""The properties of `test_fuzz`, driven by coverage: `python tests/http1/fuzz_http1.py [-max_total_time=60]`.

Needs the package `atheris`. Options are libFuzzer's.
"""

import sys
from pathlib import Path

import atheris

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]

with atheris.instrument_imports(include=["keepalive.http1"]):
    import test_fuzz as properties

TESTS = [
    getattr(properties, name)
    for name in sorted(vars(properties))
    if hasattr(getattr(properties, name), "hypothesis")
]


def one(data: bytes) -> None:
    """The first byte says which property, the rest is what it is tried on."""
    if data:
        TESTS[data[0] % len(TESTS)].hypothesis.fuzz_one_input(data[1:])


if __name__ == "__main__":
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()
