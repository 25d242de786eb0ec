"""The daemon as a member of a cluster, from its config. Nothing of it is imported where there is no cluster."""

import re
import socket
import ssl
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from keepalive import __version__
from keepalive.config import Cluster as Wanted
from keepalive.config import Config, Kept, Upstream
from keepalive.core.errors import KeepaliveError
from keepalive.core.facts import fold_key
from keepalive.observers import logs
from keepalive.service import platform, tokens
from keepalive.service.front import is_loopback

if TYPE_CHECKING:
    from keepalive.cluster.given import Keeping
    from keepalive.cluster.member import Cluster


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
    from keepalive.cluster.given import Self
    from keepalive.cluster.hold import Hold
    from keepalive.cluster.member import Cluster

    access = Access(wanted.user, tokens.of_cluster(wanted, environ), tls(wanted))
    # No call may take so long that the next renewal of the lease would come too late.
    engine = Etcd(wanted.etcd, access, Hold(wanted.ttl).interval)
    host = socket.gethostname()
    me = Self(wanted.name, wanted.instance or named(host), host, __version__)
    return Cluster(engine, me, wanted.ttl, keeping, clock, platform.awake, _tell)


def named(host: str) -> str:
    """The name of a host, as an instance may be called."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", host).strip("._-")[:63] or "keepalive"


def settings_of(kept: Iterable[Kept]) -> Mapping[str, str]:
    """How each model is loaded, in words, for others to compare with theirs."""
    found = {}
    for one in kept:
        fields = [f"{name} {value}" for name, value in sorted(one.load_fields.items())]
        words = ", ".join(['keep "auto"' if one.auto else 'keep "always"', *fields])
        found[f"{fold_key(one.key)} on {one.upstream}"] = words
    return found


def places_of(upstreams: Iterable[Upstream]) -> Mapping[str, str]:
    """Where each server is, as it can be compared with what another host says: 127.0.0.1 is another one there."""
    return {
        upstream.name: f"{upstream.url} of {socket.gethostname()}"
        if is_loopback(urlsplit(upstream.url).hostname or "")
        else upstream.url
        for upstream in upstreams
    }


def shown(cluster: "Cluster", status: Mapping[str, Any]) -> dict[str, Any]:
    """The status with what is to be said of the cluster, also of a model that nobody may load just now."""
    models = status["models"]
    if not cluster.engine_up:
        models = [
            {**model, "reason": cluster.why_nobody_acts}
            if model["state"] == "cold"
            and model["listed"]
            and (model["wanted"] or model["waiting"])
            and not cluster.acts(model["upstream"])
            else model
            for model in models
        ]
    return {**status, "models": models, "cluster": _document(cluster)}


def _document(cluster: "Cluster") -> Mapping[str, Any]:
    members = cluster.members
    return {
        "name": cluster.name,
        "instance": cluster.instance,
        "engine": {"up": cluster.engine_up, "error": cluster.trouble},
        "members": [
            {
                "instance": name,
                "host": member.host,
                "version": member.version,
                "url": member.client,
                "admin_url": member.admin,
                "ready": member.ready,
                "sees": sorted(member.sees),
            }
            for name, member in members.items()
        ],
        "holders": cluster.holders,
        "differences": cluster.differences,
    }


def targets(cluster: "Cluster | None", own: str) -> list[Mapping[str, Any]]:
    """Where Prometheus finds the metrics of all daemons, as its `http_sd` takes it."""
    if cluster is None:
        return [{"targets": [urlsplit(own).netloc], "labels": {}}]
    members = {name: (member.admin, member.host) for name, member in cluster.members.items()}
    members = {**members, cluster.instance: (own, socket.gethostname())}
    return [
        {
            "targets": [_reachable(admin, host)],
            "labels": {"__meta_keepalive_cluster": cluster.name, "__meta_keepalive_instance": name},
        }
        for name, (admin, host) in sorted(members.items())
        if admin
    ]


def _reachable(url: str, host: str) -> str:
    """Who listens on every interface is found by the name of his host."""
    place = urlsplit(url)
    return f"{host}:{place.port}" if place.hostname in ("0.0.0.0", "::") else place.netloc  # noqa: S104


def _tell(event: str, *, well: bool, **fields: object) -> None:
    log = logs.logger()
    (log.info if well else log.warning)(event, **fields)


def tls(wanted: Wanted) -> ssl.SSLContext | None:
    """By which etcd is known to be itself, and we to it."""
    if not (wanted.ca or wanted.cert):
        return None
    for name, path in (("ca", wanted.ca), ("cert", wanted.cert), ("key", wanted.key)):
        with _used(name, path):
            if path:
                Path(path).read_bytes()  # what goes wrong with the next two is not said of either
    with _used("ca", wanted.ca):
        context = ssl.create_default_context(cafile=wanted.ca)
    if wanted.cert and wanted.key:
        with _used("cert", wanted.cert):
            # Without a word for it OpenSSL would ask whoever sits at the terminal, and wait.
            context.load_cert_chain(wanted.cert, wanted.key, password=lambda: _encrypted(wanted))
    return context


def _encrypted(wanted: Wanted) -> str:
    raise MembershipError(f"cluster.key: {wanted.key} is encrypted; write it anew without a password")


@contextmanager
def _used(name: str, path: str | None) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        words = error.strerror or type(error).__name__
        if isinstance(error, ssl.SSLError):
            words = (error.reason or "there is none in it").replace("_", " ").lower()
            if error.reason == "KEY_VALUES_MISMATCH":
                words = "cluster.key is the key to another one"
        raise MembershipError(f"cluster.{name}: {path} cannot be used: {words}") from error
