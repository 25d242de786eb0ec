"""Secrets, from where the config says they are: an environment variable, a file, or a systemd credential.

They are read when the daemon starts and at each reload, kept in memory, and appear in no message.
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

from keepalive.core.errors import KeepaliveError
from keepalive.core.quotes import unquoted

SECRET_MAX = 64 * 1024
NO_CREDENTIALS = "systemd passed no credentials; add LoadCredential= to the unit"


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
                raise TokenError(f"{where}: {NO_CREDENTIALS}")
            secrets[key.name] = _from_file(path, where)
    return secrets


class Notify(Protocol):
    """Where the addresses are kept that messages go to; each may hold a secret."""

    @property
    def urls_env(self) -> str | None: ...
    @property
    def urls_file(self) -> str | None: ...
    @property
    def urls_credential(self) -> str | None: ...


def of_notify(notify: Notify, environ: Mapping[str, str]) -> tuple[str, ...]:
    """The addresses that messages go to; none where nobody is to be told."""
    if notify.urls_env is not None:
        text, place = _variable(notify.urls_env, environ), f"the environment variable {notify.urls_env}"
        if not text:
            raise TokenError(f"notify.urls_env: {place} is not set")
    elif notify.urls_file is not None:
        text, place = _text(Path(notify.urls_file), "notify.urls_file"), notify.urls_file
    elif notify.urls_credential is not None:
        given = _credential(notify.urls_credential, environ)
        if given is None:
            raise TokenError(f"notify.urls_credential: {NO_CREDENTIALS}")
        text, place = _text(given, "notify.urls_credential"), str(given)
    else:
        return ()
    addresses = tuple(text.split())
    if not all("://" in address for address in addresses):
        raise TokenError(f"notify: {place} holds what is no address; each looks like service://…")
    return addresses


class Cluster(Protocol):
    """Where the password is kept by which etcd knows us."""

    @property
    def password_env(self) -> str | None: ...
    @property
    def password_file(self) -> str | None: ...


def of_cluster(cluster: Cluster, environ: Mapping[str, str]) -> str | None:
    if cluster.password_env is not None:
        return _from_variable(cluster.password_env, environ, "cluster.password_env")
    if cluster.password_file is not None:
        return _from_file(Path(cluster.password_file), "cluster.password_file")
    return None


def _credential(name: str, environ: Mapping[str, str]) -> Path | None:
    folder = environ.get("CREDENTIALS_DIRECTORY")
    return Path(folder) / name if folder else None


def _variable(name: str, environ: Mapping[str, str]) -> str:
    return unquoted(environ.get(name, "").strip()).strip()


def _from_variable(name: str, environ: Mapping[str, str], place: str) -> str:
    secret = _variable(name, environ)
    if not secret:
        raise TokenError(f"{place}: the environment variable {name} is not set")
    return _checked(secret, f"{place}: the environment variable {name}")


def _from_file(path: Path, place: str) -> str:
    return _checked(_text(path, place), f"{place}: {path}")


def _text(path: Path, place: str) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(SECRET_MAX).decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        raise TokenError(f"{place}: {path} holds something that is not text; save it as UTF-8") from None
    except OSError as error:
        raise TokenError(f"{place}: {path} cannot be read: {os.strerror(error.errno or 0)}") from error
    if not content:
        raise TokenError(f"{place}: {path} is empty")
    return content


def _checked(secret: str, place: str) -> str:
    """It will stand in an HTTP header."""
    if not secret.isascii() or not secret.isprintable() or " " in secret:
        raise TokenError(f"{place} holds more than one word of plain characters")
    return secret
