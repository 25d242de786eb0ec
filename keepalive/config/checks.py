"""What no table can see by itself: tables that contradict each other.

Each check yields where a mistake stands and what to say. `wrong` holds the places that are reported already:
what is wrong by itself is not compared with others.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from typing import TypeVar
from urllib.parse import urlsplit

from keepalive.config.addresses import Address
from keepalive.config.mistakes import Key, dotted, nearest, one_of, shown
from keepalive.config.tables import AccessKey, Config, Defaults, Model, Table, Upstream, timing
from keepalive.config.values import written

T = TypeVar("T", bound=Table)
V = TypeVar("V")
Found = Iterator[tuple[Key, str]]


@dataclass(frozen=True, slots=True)
class Checks:
    config: Config
    wrong: Set[Key]

    def all(self) -> Found:
        yield from self._addresses()
        yield from self._upstreams()
        yield from self._models()
        yield from self._aliases()
        yield from self._primes()
        yield from self._default_model()
        yield from self._leases()
        yield from self._silences()
        yield from self._idle()
        yield from self._prompts()
        yield from self._auth()
        yield from self._notify()
        yield from self._cluster()

    def _addresses(self) -> Found:
        server = self.config.server
        ours = [name for name in ("listen", "admin_listen") if ("server", name) not in self.wrong]
        if len(ours) == 2 and _collide(server.listen, server.admin_listen):
            # At the one that was written down, where the other is a default.
            other, place = ours if "admin_listen" in server.model_fields_set else reversed(ours)
            taken = f'"{getattr(server, place)}" is taken by server.{other}'
            yield ("server", place), f"{taken}; write another port"
        for number, upstream in enumerate(self.config.upstreams):
            key = ("upstreams", number, "url")
            for name in ours:
                if key not in self.wrong and _collide(getattr(server, name), _address(upstream)):
                    loop = f'"{upstream.url}" is server.{name}, so keepalive would ask itself'
                    yield key, f"{loop}; write where LM Studio listens"

    def _upstreams(self) -> Found:
        yield from self._repeated(("upstreams",), "name", self.config.upstreams)
        # Two names for one server would load everything twice on it.
        yield from self._repeated(("upstreams",), "url", self.config.upstreams, _server)
        for number, upstream in enumerate(self.config.upstreams):
            if upstream.api_token_env and upstream.api_token_file:
                message = "stands beside api_token_env, and a token has one place; leave one of them out"
                yield ("upstreams", number, "api_token_file"), message

    def _repeated(
        self, section: Key, name: str, tables: Iterable[T], same: Callable[[T], object] | None = None
    ) -> Found:
        seen: dict[object, int] = {}
        for number, table in enumerate(tables):
            key, value = (*section, number, name), getattr(table, name)
            # As text, because 28 and "28" look the same in an address and in a log.
            identity = same(table) if same else str(value)
            first = number if key in self.wrong else seen.setdefault(identity, number)
            if first != number:
                other = dotted((*section, first))
                yield key, f"{shown(value)} is the {name} of {other} too; write another one"

    def _models(self) -> Found:
        names, sound = self._upstream_names()
        taken: dict[tuple[str, str], int] = {}
        for number, model in enumerate(self.config.models):
            place, key = ("models", number, "upstream"), ("models", number, "key")
            if place in self.wrong:
                continue
            if not model.upstream and len(set(names)) > 1:
                if sound:
                    yield (
                        place,
                        f"is missing, and there are several; write {one_of(names)}, or a list of them",
                    )
                continue
            for _, name in self._sound(place, model.upstream or names[:1]):
                if sound and name not in names:  # else it may be the one that is meant
                    near = nearest(name, names)
                    advice = shown(near) if near else one_of(names)
                    yield place, f"{shown(name)} is no upstream; write {advice}"
                # LM Studio finds a model by its key in any letter case.
                same = (name, model.key.lower())
                first = number if key in self.wrong else taken.setdefault(same, number)
                if first != number:
                    kept = f"{shown(model.key)} is already kept on {shown(name)} by models[{first}]"
                    yield key, f"{kept}; leave one of them out"

    def _sound(self, place: Key, values: Sequence[V]) -> list[tuple[int, V]]:
        """What a list says, each with its position; where one is wrong something else stands in its place."""
        return [(n, value) for n, value in enumerate(values) if (*place, n) not in self.wrong]

    def _upstream_names(self) -> tuple[list[str], bool]:
        """And whether they are all sound."""
        names = [upstream.name for upstream in self.config.upstreams]
        return names, not any(key[::2] == ("upstreams", "name") for key in self.wrong)

    def _aliases(self) -> Found:
        """A name means one model. On another upstream it may be that of another one, as a key may."""
        every = self._keys()
        keys = {key: number for number, key in reversed(every)}
        own_key = set(every)
        taken: dict[tuple[str, str], int] = {}
        for number, model in enumerate(self.config.models):
            own: set[str] = set()
            homes = self._homes(number, model) if model.aliases else ()
            every_alias: Key = ("models", number, "aliases")
            for position, alias in self._sound(every_alias, model.aliases):
                place, name, said = (*every_alias, position), alias.lower(), shown(alias)
                if (number, name) in own_key:
                    yield place, f"{said} is its key, by which it is found already; leave it out"
                elif name in keys:
                    yield place, f"{said} is the key of models[{keys[name]}], which comes first; leave it out"
                elif name in own:
                    yield place, f"{said} stands there twice; leave one of them out"
                else:
                    for home in homes:
                        first = taken.setdefault((home, name), number)
                        if first != number:
                            other = f"models[{first}] on {shown(home)}"
                            yield place, f"{said} is an alias of {other} too; leave one of them out"
                            break
                own.add(name)

    def _primes(self) -> Found:
        for number, model in enumerate(self.config.models):
            place = ("models", number, "prime")
            if model.prime and model.kind not in (None, "llm") and place[:2] not in self.wrong:
                yield place, f"is for models that chat, and kind is {shown(model.kind)}; leave it out"
            seen: set[str] = set()
            for position, name in self._sound(place, model.prime):
                if name in seen:
                    yield (*place, position), f"{shown(name)} stands there twice; leave one of them out"
                seen.add(name)

    def _keys(self) -> list[tuple[int, str]]:
        """The keys that are sound, in the letter case in which they are compared."""
        models = enumerate(self.config.models)
        return [(n, model.key.lower()) for n, model in models if ("models", n, "key") not in self.wrong]

    def _called(self) -> Iterator[tuple[str, str]]:
        """Each alias, with the key of its model."""
        for number, model in enumerate(self.config.models):
            for _, alias in self._sound(("models", number, "aliases"), model.aliases):
                yield alias, model.key

    def _homes(self, number: int, model: Model) -> list[str]:
        """The upstreams that keep it, as far as that is known."""
        names, sound = self._upstream_names()
        place = ("models", number, "upstream")
        if place in self.wrong:
            return []
        if not model.upstream:
            return names if len(names) == 1 else []
        return [name for _, name in self._sound(place, model.upstream) if name in names or not sound]

    def _default_model(self) -> Found:
        name, place = self.config.server.default_model, ("server", "default_model")
        models = self.config.models
        keys = {key for _, key in self._keys()}
        aliases = {alias.lower() for alias, _ in self._called()}
        if name is None or place in self.wrong or name.lower() in keys | aliases:
            return
        key, _, variant = name.lower().rpartition("@")
        if variant and key in keys:
            return
        known = [
            n
            for n in (*(m.key for m in models), *(a for a, _ in self._called()))
            if n.lower() in keys | aliases
        ]
        near = nearest(name, known) or nearest(name.rpartition("@")[0], known)
        # A model whose key or aliases are wrong may be the one that is meant.
        torn = any(key[:1] == ("models",) and key[2:3] in ((), ("key",), ("aliases",)) for key in self.wrong)
        if near or (known and not torn):
            advice = shown(near) if near else f"a key or an alias of one of them, such as {shown(known[0])}"
            yield place, f"{shown(name)} is none of [[models]]; write {advice}"

    def _silences(self) -> Found:
        """An answer is not given up before its caller was told even once that it has fallen silent."""
        heartbeat = self.config.server.heartbeat
        tables: dict[Key, Defaults | Model] = {("defaults",): self.config.defaults}
        tables |= {("models", number): model for number, model in enumerate(self.config.models)}
        for key, table in tables.items():
            place, silence = (*key, "stall_timeout"), table.stall_timeout
            # What nobody wrote is no mistake of anybody, also beside a heartbeat of an hour.
            said = "stall_timeout" in table.model_fields_set
            if not said or place in self.wrong or ("server", "heartbeat") in self.wrong:
                continue
            if isinstance(silence, float) and silence < heartbeat:
                least = f'write "{written(heartbeat)}" or more, or "off"'
                yield place, f'"{written(silence)}" is below server.heartbeat; {least}'

    def _leases(self) -> Found:
        """A lease that ends before the next ping lets go of the very model it was meant to hold."""
        names = ("lease", "ping_interval", "ping_timeout")
        tables: dict[Key, Model | None] = {("defaults",): None}
        tables |= {("models", number): model for number, model in enumerate(self.config.models)}
        defaults = self.config.defaults
        for key, model in tables.items():
            said = [name for name in names if name in (model or defaults).model_fields_set]
            time = timing(defaults, model)
            least = time["ping_interval"] + time["ping_timeout"]
            wrong = any((*table, name) in self.wrong for table in (key, ("defaults",)) for name in names)
            if said and not wrong and time["lease"] <= least:
                ends = f"a lease of {written(time['lease'])} ends within ping_interval and ping_timeout"
                yield (*key, said[0]), f'{ends}; write lease = "{written(2 * least)}"'

    def _idle(self) -> Found:
        for number, model in enumerate(self.config.models):
            place = ("models", number, "idle")
            if (
                model.idle is not None
                and model.keep == "always"
                and not {place, (*place[:2], "keep")} & self.wrong
            ):
                said = "is for models that are let go, and this one is always kept"
                yield place, f'{said}; leave it out, or write keep = "auto"'

    def _prompts(self) -> Found:
        yield from self._repeated(("prompts",), "id", self.config.prompts)
        models = enumerate(self.config.models)
        keys = [model.key for number, model in models if ("models", number, "key") not in self.wrong]
        called = {alias.lower(): key for alias, key in self._called()}
        for number, prompt in enumerate(self.config.prompts):
            key = ("prompts", number, "model")
            if prompt.model in keys or key in self.wrong:
                continue
            near, value = nearest(called.get(prompt.model.lower(), prompt.model), keys), shown(prompt.model)
            # A model whose key is wrong may be the one that is meant.
            if near or (keys and len(keys) == len(self.config.models)):
                advice = f"write {shown(near)}" if near else f"add [[models]] with key = {value}"
                yield key, f"{value} is no configured model; {advice}"

    def _auth(self) -> Found:
        for side in ("client_keys", "admin_keys"):
            keys: tuple[AccessKey, ...] = getattr(self.config.auth, side)
            yield from self._repeated(("auth", side), "name", keys)
            for number, access in enumerate(keys):
                key: Key = ("auth", side, number)
                places = [name for name in ("file", "env", "credential") if getattr(access, name) is not None]
                if len(places) != 1 and not any(place[:3] == key for place in self.wrong):
                    has = f"has {' and '.join(places)}" if places else "does not say where the key is"
                    yield key, f"{has}; write one of file, env or credential"

    def _notify(self) -> Found:
        notify, place = self.config.notify, ("notify", "urls_env")
        wrong = {key[1] for key in self.wrong if key[:1] == ("notify",) and len(key) > 1}
        places = [name for name in ("urls_env", "urls_file", "urls_credential") if getattr(notify, name)]
        if len(places) > 1:
            message = f"stands beside {places[0]}, and addresses have one place; leave one of them out"
            yield ("notify", places[1]), message
        elif (notify.model_fields_set or wrong) and not notify.on and wrong <= {"events", "after", "pause"}:
            # Else what is wrong may be meant as the address.
            yield place, 'is missing; write urls_env = "KEEPALIVE_TELL", the variable that holds where to'

    def _cluster(self) -> Found:
        cluster = self.config.cluster
        given = cluster.model_fields_set
        if given and not cluster.on and ("cluster", "etcd") not in self.wrong:
            yield ("cluster",), 'etcd is missing; write etcd = ["http://10.0.0.1:2379"], where it listens'
        if cluster.password_env and cluster.password_file:
            message = "stands beside password_env, and a password has one place; leave one of them out"
            yield ("cluster", "password_file"), message
        password = cluster.password_env or cluster.password_file
        if password and not cluster.user and ("cluster", "user") not in self.wrong:
            yield ("cluster",), 'user is missing, whose password that is; write user = "keepalive"'
        if (
            cluster.user
            and not password
            and not {("cluster", f"password_{p}") for p in ("env", "file")} & self.wrong
        ):
            yield ("cluster", "user"), 'has no password; write password_file = "/etc/keepalive/etcd_password"'
        for one, other in (("cert", "key"), ("key", "cert")):
            if getattr(cluster, one) and not getattr(cluster, other) and ("cluster", other) not in self.wrong:
                yield (
                    ("cluster", one),
                    f'is of no use without {other}; write {other} = "/etc/keepalive/etcd.pem"',
                )
        plain = [
            url for _, url in self._sound(("cluster", "etcd"), cluster.etcd) if not url.startswith("https://")
        ]
        for name in ("ca", "cert"):
            if plain and getattr(cluster, name):
                yield ("cluster", name), f"is of no use with {shown(plain[0])}; write https://… for etcd"


_HERE = "127.0.0.1"


def _address(upstream: Upstream) -> Address:
    parts = urlsplit(upstream.url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    return Address(_plain(parts.hostname or ""), port)


def _server(upstream: Upstream) -> object:
    # Under two paths of one host stand two servers; behind two addresses of this machine, with one port, stands one.
    address = _address(upstream)
    return (_HERE if address.host in ("", "::1") else address.host), address.port, urlsplit(upstream.url).path


def _collide(ours: Address, other: Address) -> bool:
    """Whether both would be the same socket, as far as the texts tell. Port 0 is any free one: never."""
    hosts = {_plain(ours.host), _plain(other.host)}
    same = len(hosts) == 1 or ("" in hosts and hosts < {"", "127.0.0.1", "::1"})
    return ours.port == other.port != 0 and same


def _plain(host: str) -> str:
    """One spelling for each; "" is every interface."""
    host = host.lower().rstrip(".")
    return {"localhost": _HERE, "0.0.0.0": "", "::": ""}.get(host, host)  # noqa: S104  # compared, not bound
