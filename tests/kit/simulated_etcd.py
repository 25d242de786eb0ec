"""As much of etcd's JSON gateway as a member of a cluster asks of it, on the clock of the loop.

One state behind several addresses, as a majority has it. Leases run out by its own clock, whose pace may be another
one, and begin anew when etcd comes back, as after the choice of a leader. `tests/cluster/test_simulated_etcd.py` puts
the same questions to this one and to a real one.
"""

import asyncio
import base64
import contextvars
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Json = Mapping[str, Any]
# Of the request that is answered, whose it is.
BY: contextvars.ContextVar[int | None] = contextvars.ContextVar("by", default=None)

NO_LEASE = 404, {"error": "etcdserver: requested lease not found", "code": 5}


@dataclass(frozen=True)
class Kv:
    value: bytes
    created: int
    modified: int
    lease: int
    by: int | None  # whose request has created it


@dataclass
class Lease:
    ttl: float
    timer: asyncio.TimerHandle | None = None
    keys: dict[str, None] = field(default_factory=dict)


class Watch:
    """One stream of a watch: lines come by `send`; None ends it."""

    def __init__(self, start: bytes, end: bytes, send: Callable[[bytes | None], None]) -> None:
        self.start, self.end, self.send = start, end, send


class SimulatedEtcd:
    """`pace`: the seconds of its clock in one of ours."""

    def __init__(self, addresses: Iterable[str], pace: float = 1.0) -> None:
        self.members: dict[str, Literal["up", "refuses", "hangs"]] = dict.fromkeys(addresses, "up")
        self.pace = pace
        self.cluster, self.term, self.revision = 14_841_639_068_965_178_418, 2, 1
        self.kvs: dict[str, Kv] = {}
        self.leases: dict[int, Lease] = {}
        self.watches: dict[Watch, str] = {}  # each with the address that it is at
        self.on_created: list[Callable[[str, Kv], None]] = []
        self.writes = 0
        self._there = True
        self._numbers = 7_587_800_000_000_000_000

    # --- how it stands ------------------------------------------------------------------------------

    def set(self, address: str, how: Literal["up", "refuses", "hangs"]) -> None:
        self.members[address] = how
        for watch, at in list(self.watches.items()):
            if at == address and how != "up":
                del self.watches[watch]
                if how == "refuses":
                    watch.send(None)  # the process has ended; one that hangs says nothing
        there = self.there
        if there is not self._there:
            self._there = there
            self.term += there  # a leader is chosen anew
            for number in list(self.leases):
                self._arm(number)

    @property
    def there(self) -> bool:
        """Whether a majority is."""
        return 2 * sum(how == "up" for how in self.members.values()) > len(self.members)

    def compact(self) -> None:
        """Watches that lag behind are ended, by a word on streams that stay open."""
        self.revision += 1
        for watch in self.watches:
            watch.send(_line({"canceled": True, "compact_revision": str(self.revision)}))
        self.watches.clear()

    def empty(self) -> None:
        """Another one is in its place, with nothing in it. Its watches end, as its connections do."""
        self.stop()
        self.cluster, self.term, self.revision = self.cluster + 1, 2, 1
        self.kvs.clear()
        self.leases.clear()
        for watch in self.watches:
            watch.send(None)
        self.watches.clear()

    def stop(self) -> None:
        for lease in self.leases.values():
            if lease.timer is not None:
                lease.timer.cancel()

    # --- what it is asked ---------------------------------------------------------------------------

    def answer(self, path: str, body: Json) -> tuple[int, Json]:
        match path:
            case "/v3/lease/grant":
                self._numbers += 1
                self.leases[self._numbers] = Lease(float(body["TTL"]))
                self._arm(self._numbers)
                return 200, {"ID": str(self._numbers), "TTL": body["TTL"]}
            case "/v3/lease/keepalive":
                number = int(body["ID"])
                if number not in self.leases:
                    return 200, {"result": {"ID": body["ID"]}}
                self._arm(number)
                return 200, {"result": {"ID": body["ID"], "TTL": str(int(self.leases[number].ttl))}}
            case "/v3/lease/revoke":
                return (200, {}) if self._end(int(body["ID"])) else NO_LEASE
            case "/v3/kv/range":
                start, end = _decoded(body["key"]), _decoded(body["range_end"])
                found = [(k, kv) for k, kv in sorted(self.kvs.items()) if start <= k.encode() < end]
                header = {
                    "cluster_id": str(self.cluster),
                    "revision": str(self.revision),
                    "raft_term": str(self.term),
                }
                rows = [_row(k, kv) for k, kv in found]
                return 200, {"header": header, "kvs": rows, "count": str(len(found))}
            case "/v3/kv/txn":
                return self._transact(body)
        return 404, {"error": "Not Found", "code": 5}

    def watch(self, address: str, body: Json, send: Callable[[bytes | None], None]) -> Watch:
        asked = body["create_request"]
        watch = Watch(_decoded(asked["key"]), _decoded(asked["range_end"]), send)
        self.watches[watch] = address
        send(_line({"created": True}))
        return watch

    def _transact(self, body: Json) -> tuple[int, Json]:
        if not all(map(self._holds, body.get("compare", []))):
            return 200, {}
        changes: list[tuple[str, bytes | None, int]] = []
        for one in body.get("success", []):
            if put := one.get("request_put"):
                lease = int(put["lease"])
                if lease and lease not in self.leases:
                    return NO_LEASE
                changes.append((_decoded(put["key"]).decode(), _decoded(put["value"]), lease))
            else:
                changes.append((_decoded(one["request_delete_range"]["key"]).decode(), None, 0))
        self._change(changes)
        self.writes += 1
        return 200, {"succeeded": True}

    def _holds(self, compare: Json) -> bool:
        kv = self.kvs.get(_decoded(compare["key"]).decode())
        if compare["target"] == "CREATE":
            return int(compare["create_revision"]) == (kv.created if kv else 0)
        return int(compare["mod_revision"]) == (kv.modified if kv else 0)

    def _change(self, changes: Iterable[tuple[str, bytes | None, int]]) -> None:
        self.revision += 1
        changed, made = [], []
        for key, value, lease in changes:
            old = self.kvs.pop(key, None)
            if old is not None and old.lease in self.leases:
                self.leases[old.lease].keys.pop(key, None)
            if value is not None:
                created, by = (old.created, old.by) if old else (self.revision, BY.get())
                kv = self.kvs[key] = Kv(value, created, self.revision, lease, by)
                if lease:
                    self.leases[lease].keys[key] = None
                if old is None:
                    made.append((key, kv))
            if old is not None or value is not None:
                changed.append(key)
        for watch in list(self.watches):
            seen = [key for key in changed if watch.start <= key.encode() < watch.end]
            if seen:
                watch.send(_line({"events": [{"kv": {"key": _coded(key.encode())}} for key in seen]}))
        for key, kv in made:
            for told in self.on_created:
                told(key, kv)

    # --- leases -------------------------------------------------------------------------------------

    def _arm(self, number: int) -> None:
        lease = self.leases[number]
        if lease.timer is not None:
            lease.timer.cancel()
        # Without a majority none can be taken away.
        lease.timer = (
            asyncio.get_running_loop().call_later(lease.ttl / self.pace, self._end, number)
            if self._there
            else None
        )

    def _end(self, number: int) -> bool:
        lease = self.leases.pop(number, None)
        if lease is None:
            return False
        if lease.timer is not None:
            lease.timer.cancel()
        if lease.keys:
            self._change([(key, None, 0) for key in list(lease.keys)])
        return True


def _row(key: str, kv: Kv) -> Json:
    return {
        "key": _coded(key.encode()),
        "value": _coded(kv.value),
        "create_revision": str(kv.created),
        "mod_revision": str(kv.modified),
    }


def _line(result: Json) -> bytes:
    return json.dumps({"result": result}).encode() + b"\n"


def _coded(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _decoded(text: str) -> bytes:
    return base64.b64decode(text)
