"""Secrets, from where the config says they are: an environment variable, a file, or a systemd credential.

They are read when the daemon starts and at each reload, kept in memory, and appear in no message.
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

from keepalive.core.errors import KeepaliveError

SECRET_MAX = 64 * 1024


class Upstream(Protocol):
    """A server that may want a token; where it is kept, if the credential of its name is not meant."""

    @property
    def name(self) -> str: ...
    @property
    def api_token_env(self) -> str | None: ...
    @property
    def api_token_file(self) -> str | None: ...


class AccessKey(Protocol):
    """A key that callers may send, and the one place that holds it; none means the credential of its name."""

    @property
    def name(self) -> str: ...
    @property
    def env(self) -> str | None: ...
    @property
    def file(self) -> str | None: ...
    @property
    def credential(self) -> str | None: ...


class TokenError(KeepaliveError):
    """A secret that the config names cannot be had."""


def of_upstream(upstream: Upstream, environ: Mapping[str, str]) -> str | None:
    """The API token for this upstream, or None where it takes none."""
    place = f"upstreams {upstream.name!r}"
    if upstream.api_token_env is not None:
        return _from_variable(upstream.api_token_env, environ, f"{place}.api_token_env")
    if upstream.api_token_file is not None:
        return _from_file(Path(upstream.api_token_file), f"{place}.api_token_file")
    given = _credential(f"lm_token.{upstream.name}", environ)
    return _from_file(given, place) if given and given.exists() else None


def of_callers(keys: Iterable[AccessKey], environ: Mapping[str, str], place: str) -> dict[str, str]:
    """Name to secret of each key that a caller may send."""
    secrets = {}
    for key in keys:
        where = f"{place} {key.name!r}"
        if key.env is not None:
            secrets[key.name] = _from_variable(key.env, environ, where)
        elif key.file is not None:
            secrets[key.name] = _from_file(Path(key.file), where)
        else:
            path = _credential(key.credential or key.name, environ)
            if path is None:
                raise TokenError(f"{where}: systemd passed no credentials; add LoadCredential= to the unit")
            secrets[key.name] = _from_file(path, where)
    return secrets


def _credential(name: str, environ: Mapping[str, str]) -> Path | None:
    folder = environ.get("CREDENTIALS_DIRECTORY")
    return Path(folder) / name if folder else None


def _from_variable(name: str, environ: Mapping[str, str], place: str) -> str:
    secret = environ.get(name, "").strip()
    if not secret:
        raise TokenError(f"{place}: the environment variable {name} is not set")
    return _checked(secret, f"{place}: the environment variable {name}")


def _from_file(path: Path, place: str) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(SECRET_MAX).decode().strip()
    except UnicodeDecodeError:
        raise TokenError(f"{place}: {path} holds something that is not text") from None
    except OSError as error:
        raise TokenError(f"{place}: {path} cannot be read: {os.strerror(error.errno or 0)}") from error
    if not content:
        raise TokenError(f"{place}: {path} is empty")
    return _checked(content, f"{place}: {path}")


def _checked(secret: str, place: str) -> str:
    """It will stand in an HTTP header."""
    if not secret.isascii() or not secret.isprintable() or " " in secret:
        raise TokenError(f"{place} holds more than one word of plain characters")
    return secret
