"""The daemon as a member of a cluster, from its config. Nothing of it is imported where there is no cluster."""

import hashlib
import json
import re
import socket
import ssl
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from keepalive import __version__
from keepalive.config import Config, Kept
from keepalive.core.errors import KeepaliveError
from keepalive.core.facts import fold_key
from keepalive.observers import logs
from keepalive.service import platform, tokens

if TYPE_CHECKING:
    from keepalive.cluster.member import Cluster, Keeping


class MembershipError(KeepaliveError):
    """What the config says of the cluster cannot be used."""


def member(
    settings: Config, environ: Mapping[str, str], keeping: "Callable[[], Keeping]", clock: Callable[[], float]
) -> "Cluster | None":
    """None where the config names no cluster."""
    wanted = settings.cluster
    if not wanted.on:
        return None
    from keepalive.cluster.etcd import Access, Etcd
    from keepalive.cluster.hold import Hold
    from keepalive.cluster.member import Cluster, Self

    access = Access(wanted.user, tokens.of_cluster(wanted, environ), _tls(settings))
    # No call may take so long that the next renewal of the lease would come too late.
    engine = Etcd(wanted.etcd, access, Hold(wanted.ttl).interval)
    host = socket.gethostname()
    me = Self(wanted.name, wanted.instance or named(host), host, __version__)
    return Cluster(engine, me, wanted.ttl, keeping, clock, platform.awake, _tell)


def named(host: str) -> str:
    """The name of a host, as an instance may be called."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", host).strip("._-")[:63] or "keepalive"


def fingerprints(kept: Iterable[Kept]) -> Mapping[str, str]:
    """How each model would be loaded, for others to compare with theirs; no more than a digest."""
    return {
        f"{one.upstream}/{fold_key(one.key)}": hashlib.sha256(
            json.dumps([dict(one.load_fields), one.auto], sort_keys=True).encode()
        ).hexdigest()[:12]
        for one in kept
    }


def _tell(event: str, *, well: bool, **fields: object) -> None:
    log = logs.logger()
    (log.info if well else log.warning)(event, **fields)


def _tls(settings: Config) -> ssl.SSLContext | None:
    wanted = settings.cluster
    if not (wanted.ca or wanted.cert):
        return None
    try:
        context = ssl.create_default_context(cafile=wanted.ca)
    except (OSError, ssl.SSLError) as error:
        raise MembershipError(f"cluster.ca: {wanted.ca} cannot be used: {_words(error)}") from error
    if wanted.cert and wanted.key:
        try:
            context.load_cert_chain(wanted.cert, wanted.key)
        except (OSError, ssl.SSLError) as error:
            raise MembershipError(f"cluster.cert: {wanted.cert} cannot be used: {_words(error)}") from error
    return context


def _words(error: OSError) -> str:
    return error.strerror or type(error).__name__
