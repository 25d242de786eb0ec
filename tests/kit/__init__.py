"""What tests stand on: real servers, machines, browsers and callers, and where the project lies."""

from pathlib import Path

PROJECT = Path(__file__).parents[2]
DATA = PROJECT / "tests" / "data"
