"""Configs as text, for the tests of what reads them."""

from collections.abc import Mapping

import pytest

from keepalive import config
from keepalive.config import Config, ConfigError

MODEL = '[[models]]\nkey = "gemma"\n'


def parse(text: str, environ: Mapping[str, str] | None = None) -> Config:
    return config.parse(text, "config.toml", environ or {})


def mistakes(text: str, environ: Mapping[str, str] | None = None) -> list[str]:
    """The report, line by line, without the name of the file."""
    with pytest.raises(ConfigError) as raised:
        parse(text, environ)
    return [line.removeprefix("config.toml:") for line in str(raised.value).splitlines()]
