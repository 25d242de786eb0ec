"""Builds everything, wires it, runs it, stops it. The only place that sees the whole config."""

import asyncio
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AsyncExitStack
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from aiohttp import web

from keepalive import __version__, config
from keepalive.admin import status, words
from keepalive.admin.playground import Playground
from keepalive.admin.server import Access, Admin, server
from keepalive.config import Address, Config, ConfigError, Kept
from keepalive.core.errors import KeepaliveError
from keepalive.core.facts import (
    ClockJumped,
    DemandRecalled,
    LoadRemembered,
    LoadsRecalled,
    ModelId,
    OpeningsLearned,
    ReleaseAsked,
    WarmAsked,
    WindowClosed,
    WindowOpened,
    fold_key,
)
from keepalive.core.records import Policy, UpstreamState, is_loading
from keepalive.core.states import State
from keepalive.http1 import bind
from keepalive.http1.vanished import notice_vanished, socket_options
from keepalive.keeper.given import Alone, Keep, Server
from keepalive.keeper.keeper import Keeper
from keepalive.keeper.ledger import Ledger
from keepalive.keeper.schedule import Schedule
from keepalive.lmstudio.client import Client
from keepalive.observers import logs
from keepalive.observers.dates import Dates
from keepalive.observers.feed import Feed
from keepalive.observers.history import History, Past
from keepalive.observers.metrics import Metrics
from keepalive.observers.notify import Notify
from keepalive.observers.recent import Recent
from keepalive.service import membership, platform, systemd, tokens
from keepalive.service.front import Front, StartError, cannot_listen, is_loopback, url_of
from keepalive.service.openings import Openings

# The scheduler runs a job every second. Later than this, something is badly wrong.
SCHEDULER_LATE = 10.0
REPORTS_REMEMBERED = 100
# Models that nobody wrote down and that have series of their own; what comes after them is counted as "other".
ADOPTED_COUNTED = 100
# At the end, connections that were accepted but have not been asked anything yet get this long.
LAST_REQUESTS = 0.5


class Closable(Protocol):
    async def close(self) -> None: ...


class Daemon:
    """One daemon. `path` is the file that `reload` reads again; None: the config does not change."""

    def __init__(
        self,
        settings: Config,
        path: Path | None,
        environ: Mapping[str, str],
        *,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._path = path
        self._environ = environ
        self._wall = wall
        self._clock = _strictly_increasing(time.monotonic)
        self._dates = Dates(self._clock, wall)
        self._log = logs.logger()
        self._config = settings
        self._kept: dict[ModelId, Kept] = {}
        self._adopted: set[ModelId] = set()  # of these, those that the file does not name
        self._open: dict[ModelId, bool] = {}
        self._opens: dict[
            ModelId, float
        ] = {}  # of those that are closed, in Unix seconds, once somebody has asked
        self._clients: dict[str, Client] = {}
        self._tokens: dict[str, str | None] = {}
        self._closing: list[Closable] = []  # of upstreams that a reload removed; closed at the end
        self._mistakes: tuple[str, ...] = ()
        self._openings = Openings(self._clock, self._learned)
        self._reported: set[str] = set()
        self._started = wall()
        self._scraped: float | None = None
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self.started = asyncio.Event()
        self.url = ""
        self.admin_url = ""
        self._metrics = Metrics(lambda: self.keeper.snapshot(), self._dates)
        self._feed = Feed(self.status)
        self._admin = Admin(self, self._feed, Access())
        self._service = systemd.Service(self, words.summary, environ)
        self._sockets = systemd.listen_sockets(environ)
        self._passed = {
            name: [Address(*systemd.address(one)) for one in opened] for name, opened in self._sockets.items()
        }
        self._ledger = _ledger(settings, lambda: self._urls, wall)
        self._history = _history(settings, wall, self._report)
        self._notify = Notify(self._told)
        self._addresses: tuple[str, ...] = ()  # where messages go
        self.cluster = membership.member(settings, environ, lambda: self.keeper, self._clock)
        optional = (
            self._ledger,
            self._metrics,
            self._history,
            self._feed,
            logs.Log(),
            self._notify,
            self.cluster,
        )
        observers = [o for o in optional if o is not None]
        hand = self.cluster or Alone()
        self.keeper = Keeper(self._clock, observers, self._report, self._openings.look_up, hand)
        self._acts = hand.acts
        if self.cluster is not None:
            self._metrics.watch_cluster(self.cluster)
            self.cluster.changed = self._feed.changed
        self._schedule = Schedule(self._tick, self._clock_jumped, self._metrics.jobs_missed.inc, wall=wall)
        self._recent = Recent(wall)
        self._front = Front(
            settings, self.keeper, self._clock, self._metrics, self._openings, self._recent, self._history
        )
        self._playground = Playground()
        self._page_key = secrets.token_urlsafe(32)
        self._apply(settings)

    # --- its life -----------------------------------------------------------------------------------

    async def run(self) -> None:
        """Run until `stop`. Raises StartError when a port is taken."""
        async with AsyncExitStack() as stack:
            stack.callback(self._notify.close)
            if self.cluster is not None:
                # Last of all: until nothing is under way any more no other is to act.
                stack.push_async_callback(self.cluster.close)
            self._history.start(self._recall_past)
            stack.push_async_callback(self._history.close)
            stack.push_async_callback(self._playground.close)  # the admin address uses it to the end
            runner = server(self._admin)
            await runner.setup()
            stack.push_async_callback(self._end_admin, runner)
            self.admin_url = await self._listen(runner, self._config.server.admin_listen)
            stack.push_async_callback(self._close_clients)
            self.url = await self._front.listen(self._config.server.listen, self._sockets["client"])
            self._compare_sockets(self._config)
            stack.push_async_callback(self._front.close)
            self._playground.open(self.url)
            await self._history.read()
            self._adopt_ours()
            self._recall(self._kept)
            if self._path is None and not self._config.models:
                urls = [upstream.url for upstream in self._config.upstreams]
                self._log.info(
                    "config.none", upstreams=urls, reason="what is asked for is kept, nothing is pinned"
                )
            self._log.info(
                "daemon.started",
                version=__version__,
                listen=self.url,
                admin=self.admin_url,
                models=len(self._kept),
            )
            self._introduce()
            self.started.set()
            async with asyncio.TaskGroup() as tasks:
                parts = [self.keeper.run(), self._schedule.run(), self._feed.run(), self._service.run()]
                if self.cluster is not None:
                    parts.append(self.cluster.run())
                running = [tasks.create_task(part) for part in parts]
                await self._stop.wait()
                # Requests that are held still need their model: the keeper goes on until they are done.
                await self._front.drain(self._config.server.drain_timeout, self._hurry)
                for task in running:
                    task.cancel()
        self._log.info("daemon.stopped")

    def stop(self) -> None:
        """End in order: not ready from now on, open requests may finish, models stay loaded.

        The second time: at once.
        """
        if self._stop.is_set():
            self._hurry.set()
        self._stop.set()
        if self.cluster is not None:
            self.cluster.leaving = True
        self._feed.changed()

    @property
    def stopping(self) -> bool:
        return self._stop.is_set()

    def watch_signals(self) -> None:
        ends = dict.fromkeys(("SIGTERM", "SIGINT", "SIGBREAK"), self.stop)
        platform.watch_signals({**ends, "SIGHUP": self.reload})

    def reload(self) -> None:
        """Read the config again. A good one is applied as a difference; a bad one changes nothing."""
        with self._service.reloading():
            self._reload()

    def _reload(self) -> None:
        if self._path is None:
            self._log.info("config.unchanged", reason="it comes from the environment alone")
            return
        try:
            known, loading = self._kept.keys(), self._loading()
            self._apply(config.load(self._path, self._environ))
            self._adopt_ours()
            self._recall(self._kept.keys() - known)
            self._go_on(self._kept.keys() - known, loading)
        except KeepaliveError as error:
            mistakes = error.mistakes if isinstance(error, ConfigError) else (error,)
            self._mistakes = tuple(str(mistake) for mistake in mistakes)
            self._metrics.reload_ok.set(0)
            self._log.error("config.rejected", path=str(self._path), mistakes=list(self._mistakes))
        else:
            self._log.info("config.applied", path=str(self._path), models=len(self._kept))
        self._feed.changed()

    # --- what the admin address asks ----------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        document = status.document(
            self.keeper.snapshot(),
            self._dates,
            self._started,
            self._urls,
            self._mistakes,
            self._scraped,
            self._front.silences(),
            self._next_windows(),
        )
        source = {"path": str(self._path) if self._path else None, "unlisted": self._config.server.unlisted}
        document = {**document, "config": {**document["config"], **source}, "draining": self.stopping}
        return document if self.cluster is None else membership.shown(self.cluster, document)

    def states(self) -> list[dict[str, Any]]:
        return [status.state(model) for model in self.keeper.snapshot().models]

    def find(self, name: str) -> tuple[ModelId, ...]:
        return self.keeper.meanings.find(name)

    async def meant(self, name: str) -> tuple[ModelId, ...]:
        return await self.keeper.meanings.meant(
            name, max(upstream.list_timeout for upstream in self._config.upstreams)
        )

    def offered(self) -> list[str]:
        return self.keeper.meanings.offered()

    def metrics(self, accept: str) -> tuple[bytes, str]:
        self._scraped = self._wall()
        return self._metrics.render(accept)

    def history(self) -> Mapping[str, Any]:
        trouble = self._history.trouble
        return {"kept": trouble is None, "reason": trouble}

    def story(self, model: ModelId) -> Mapping[str, Any] | None:
        story = self._history.story(model)
        return None if story is None else status.story_document(model, story, self._wall())

    def requests(self) -> Mapping[str, Any]:
        # Whoever has not written a config yet may want to pin what is in memory, whoever has loaded it.
        loaded = self.keeper.meanings.loaded() if self._path is None else ()
        unnamed = self._recent.unnamed(self._kept, self._adopted, loaded)
        return status.requests_document(self._recent.requests(), unnamed)

    def alive(self) -> str | None:
        late = self._schedule.late()
        return None if late < SCHEDULER_LATE else f"the scheduler has not run for {late:.0f} s"

    def warm(self, model: ModelId, *, without_engine: bool = False) -> None:
        # Where etcd answers nobody has to decide instead of it.
        alone = without_engine and self.cluster is not None and not self.cluster.engine_up
        self.keeper.record(WarmAsked(self._clock(), model, alone))

    def release(self, model: ModelId) -> None:
        self.keeper.record(ReleaseAsked(self._clock(), model))

    def targets(self) -> list[Mapping[str, Any]]:
        return membership.targets(self.cluster, self.admin_url)

    async def forward(self, request: web.BaseRequest, headers: Mapping[str, str]) -> web.StreamResponse:
        return await self._playground.forward(request, headers)

    # --- its parts ----------------------------------------------------------------------------------

    @property
    def _urls(self) -> Mapping[str, str]:
        return {upstream.name: upstream.url for upstream in self._config.upstreams}

    def _apply(self, settings: Config) -> None:
        """Put a config into effect; raises TokenError or ConfigError before anything has changed."""
        openings, mistakes = config.read_openings(settings, self._path)
        if mistakes and self._clients:
            raise ConfigError(mistakes)
        for mistake in mistakes:
            # Without its opening a model is as good as ever. That it would not be served at all is no way to say so.
            self._log.warning("prime.unusable", reason=str(mistake))
        lm_tokens = {u.name: tokens.of_upstream(u, self._environ) for u in settings.upstreams}
        admin_keys = tokens.of_callers(settings.auth.admin_keys, self._environ, "auth.admin_keys")
        client_keys = tokens.of_callers(settings.auth.client_keys, self._environ, "auth.client_keys")
        told = tokens.of_notify(settings.notify, self._environ)
        old, self._config, self._mistakes = self._config, settings, ()
        self._openings.configure(openings, settings.kept)
        named = {ModelId(kept.upstream, kept.key): kept for kept in settings.kept}
        self._kept = named | self._adopted_still(settings, named)
        self._opens.clear()
        self._open = {model: self._is_open(kept) for model, kept in self._kept.items() if kept.window}
        self._admin.access = Access(settings.server.allowed_hosts, admin_keys)
        servers = []
        for upstream in settings.upstreams:
            client = self._clients.get(upstream.name)
            if client is None or client.url != upstream.url or self._lets_us_in(upstream.name, lm_tokens):
                client = self._clients[upstream.name] = Client(
                    upstream.name,
                    upstream.url,
                    socket_options=socket_options(),
                    mark=self._front.mark,
                    acts=partial(self._may_act, upstream.name),
                )
            client.configure(
                token=lm_tokens[upstream.name],
                connect_timeout=upstream.connect_timeout,
                list_timeout=upstream.list_timeout,
                sdk=upstream.sdk == "auto",
            )
            self._expect(upstream.name)
            pace = [kept.refresh_interval for kept in settings.kept if kept.upstream == upstream.name]
            servers.append(
                Server(
                    upstream.name,
                    client,
                    refresh_interval=min(pace, default=settings.defaults.refresh_interval),
                    max_loading=upstream.max_loading,
                    auto_evict=upstream.auto_evict,
                    memory=upstream.memory,
                )
            )
        self._metrics.configure(self._counted())
        self._history.configure({model: self._urls[model.upstream] for model in self._kept})
        self._addresses = told
        self._introduce()
        self._watch_for_messages()
        keeps = map(self._keep, self._kept.values())
        adopt = self._adopt if settings.server.unlisted == "auto" else None
        self._closing += self.keeper.configure(servers, keeps, settings.server.default_model, adopt)
        self._clients = {server.name: self._clients[server.name] for server in servers}
        self._tokens = lm_tokens
        self._playground.key = self._page_key if client_keys else None
        self._front.configure(settings, self._kept, lm_tokens, client_keys, self._playground.key)
        self._metrics.reload_ok.set(1)
        self._metrics.reloaded_at.set(self._wall())
        for name in ("listen", "admin_listen", "state_dir", "log_level", "log_format"):
            if getattr(old.server, name) != getattr(settings.server, name):
                self._log.warning("config.needs_restart", key=f"server.{name}")
        if old.cluster != settings.cluster:
            self._log.warning("config.needs_restart", key="cluster")
        if old.history.path != settings.history.path:
            self._log.warning("config.needs_restart", key="history.path")
        listeners = (("admin", "admin_listen", admin_keys), ("client", "listen", client_keys))
        for socket, name, keys in listeners:
            address = self._place(socket, getattr(settings.server, name))
            if not is_loopback(address.host) and not keys:
                reason = f"{address} can be reached from the network, and [auth] names no keys for it"
                self._log.warning("listener.open", key=f"server.{name}", reason=reason)

    def _may_act(self, upstream: str) -> bool:
        return self._acts(upstream) or self.keeper.alone(upstream)

    def _introduce(self) -> None:
        """Let the other daemons of the cluster know where this one is, and how it would load."""
        if self.cluster is not None:
            self.cluster.kept(self._kept)
            self.cluster.addresses = (self.admin_url, self.url)
            self.cluster.config = membership.settings_of(self._kept.values())
            self.cluster.places = membership.places_of(self._config.upstreams)

    def _lets_us_in(self, upstream: str, lm_tokens: Mapping[str, str | None]) -> bool:
        """Whether a new token may mend what is wrong: then how long we meant to hold off no longer counts."""
        if lm_tokens[upstream] == self._tokens[upstream]:
            return False
        snapshot = self.keeper.snapshot()
        states = [u.state for u in snapshot.upstreams if u.name == upstream]
        return UpstreamState.UNAUTHORIZED in states or any(
            model.state is State.BACKOFF for model in snapshot.of(upstream)
        )

    def _adopt(self, model: ModelId) -> Keep:
        """A model that the file does not name has been asked for: it is kept from now on."""
        kept = self._kept[model] = self._config.unlisted(model.upstream, model.key)
        self._adopted.add(model)
        self._expect(model.upstream)
        self._metrics.configure(self._counted())
        self._history.configure({model: self._urls[model.upstream] for model in self._kept})
        self._watch_for_messages()
        self._log.info("model.adopted", model=model.key, upstream=model.upstream)
        return self._keep(kept)

    def _watch_for_messages(self) -> None:
        self._notify.configure(
            self._addresses,
            self._config.notify.events,
            self._kept,
            self._urls,
            after=self._config.notify.after,
            pause=self._config.notify.pause,
        )

    def _expect(self, upstream: str) -> None:
        """LM Studio may be asked what loads of these will take."""
        wanted = {kept.key: kept.load_fields for kept in self._kept.values() if kept.upstream == upstream}
        self._clients[upstream].expect(wanted)

    def _adopted_still(self, settings: Config, named: Mapping[ModelId, Kept]) -> dict[ModelId, Kept]:
        """Models that were asked for and are not named: they stay what they are, with the defaults of this file."""
        upstreams = {u.name for u in settings.upstreams} if settings.server.unlisted == "auto" else set()
        self._adopted = {m for m in self._adopted if m.upstream in upstreams and m not in named}
        still = (m for m in self._kept if m in self._adopted)
        return {m: settings.unlisted(m.upstream, m.key) for m in still}

    def _counted(self) -> list[ModelId]:
        """The models that have series of their own: all that the file names, and no more than so many others."""
        adopted = [m for m in self._kept if m in self._adopted][:ADOPTED_COUNTED]
        return [m for m in self._kept if m not in self._adopted] + adopted

    def _adopt_ours(self) -> None:
        """What we have loaded, or were loading, is kept though nobody names it, where such models are kept at all."""
        for model in self._ledger.owned() if self._ledger else ():
            self.keeper.adopt(model)

    def _recall(self, models: Iterable[ModelId]) -> None:
        """Take note of loads that an earlier life began and did not see end."""
        for model in list(models):
            remembered = self._ledger.recall(model, self._clock()) if self._ledger else None
            if remembered:
                self.keeper.record(remembered)
            ours = self._ledger.recall_ours(model, self._clock()) if self._ledger else None
            if ours:
                self.keeper.record(ours)

    def _loading(self) -> dict[tuple[str, str], LoadRemembered]:
        """Our loads under way, by where LM Studio is and what it calls the model: names of ours may change."""
        return {
            (self._urls[m.id.upstream], fold_key(m.id.key)): LoadRemembered(
                self._clock(), m.id, m.loading_since, m.expected_load, m.tells_loading
            )
            for m in self.keeper.snapshot().models
            if m.loading_since is not None and is_loading(m)
        }

    def _go_on(self, models: Iterable[ModelId], loading: Mapping[tuple[str, str], LoadRemembered]) -> None:
        """What is loaded already under the name that it had is not to be loaded under its new one."""
        for model in list(models):
            load, known = (
                loading.get((self._urls[model.upstream], fold_key(model.key))),
                self.keeper.model(model),
            )
            if load is not None and known is not None and known.loading_since is None:
                self.keeper.record(replace(load, model=model))

    def _learned(self, model: ModelId, openings: tuple[str, ...]) -> None:
        self.keeper.record(OpeningsLearned(self._clock(), model, openings))

    def _recall_past(self, model: ModelId, past: Past) -> None:
        if past.loads:
            self.keeper.record(LoadsRecalled(self._clock(), model, past.loads))
        if past.asked:
            self.keeper.record(DemandRecalled(self._clock(), model, past.asked))

    def _keep(self, kept: Kept) -> Keep:
        model = ModelId(kept.upstream, kept.key)
        policy = Policy(
            kept.refresh_interval,
            kept.ping_interval,
            kept.ping_timeout,
            kept.load_timeout,
            kept.lease,
            pinged=kept.ping != "off",
            auto=kept.auto,
            idle=kept.idle,
            patience=kept.patience,
            memory=kept.memory,
        )
        own = None if isinstance(kept.ping, str) else (kept.ping.path, kept.ping.body)
        return Keep(
            model,
            policy,
            kind=kept.kind,
            load_fields=kept.load_fields,
            ping=own,
            windowed=kept.window is not None,
            window_open=self._open.get(model, True),
            aliases=kept.aliases,
            openings=self._openings.of(model),
            learns=config.LEARN in kept.prime,
        )

    def _is_open(self, kept: Kept) -> bool:
        now = datetime.fromtimestamp(self._wall(), UTC)
        return kept.window is None or kept.window.contains(now, self._config.zone)

    def _next_windows(self) -> dict[ModelId, float]:
        """When those that are closed open, in Unix seconds."""
        now = datetime.fromtimestamp(self._wall(), UTC)
        for model in [m for m, is_open in self._open.items() if not is_open and m not in self._opens]:
            window = self._kept[model].window
            opens = window.next_change(now, self._config.zone) if window else None
            if opens is not None:
                self._opens[model] = opens.timestamp()
        return self._opens

    def _tick(self) -> None:
        """A second has passed: windows may have opened or closed, something may be due."""
        self._dates.look()
        for model, was in self._open.items():
            is_open = self._is_open(self._kept[model])
            if is_open is not was:
                self._open[model] = is_open
                self._opens.pop(model, None)
                self.keeper.record((WindowOpened if is_open else WindowClosed)(self._clock(), model))
        self.keeper.tick()
        self._front.tick()
        self._notify.tick(self._clock())

    def _told(self, event: str, fields: Mapping[str, object]) -> None:
        """What became of a message, from a thread of its own."""
        tell = self._log.info if event in ("notify.sent", "notify.works_again") else self._log.warning
        tell(event, **fields)

    def _clock_jumped(self, seconds: float) -> None:
        self._dates.look()
        self._opens.clear()
        for upstream in self._config.upstreams:
            self.keeper.record(ClockJumped(self._clock(), upstream.name, seconds))

    def _report(self, error: BaseException) -> None:
        """Bookkeeping failed: say so once."""
        text = str(error) if isinstance(error, KeepaliveError) else f"{type(error).__name__}: {error}"
        if text not in self._reported and len(self._reported) < REPORTS_REMEMBERED:
            self._reported.add(text)
            self._log.warning("bookkeeping.failed", error=text)

    def _place(self, name: str, listen: Address) -> Address:
        """Where that listener is: systemd may have opened it, and elsewhere."""
        passed = self._passed[name]
        return listen if not passed or listen in passed else passed[0]

    def _compare_sockets(self, settings: Config) -> None:
        """The command line, and people, look where the config says."""
        for name, key in (("admin", "admin_listen"), ("client", "listen")):
            listen = getattr(settings.server, key)
            actual = self._place(name, listen)
            if actual != listen:
                self._log.warning(
                    "socket.differs", key=f"server.{key}", config=str(listen), socket=str(actual)
                )

    async def _listen(self, runner: web.ServerRunner, address: Address) -> str:
        try:
            for sock in self._sockets["admin"] or bind(address.host, address.port):
                notice_vanished(sock)  # whoever is accepted on it inherits that
                await web.SockSite(runner, sock, backlog=systemd.BACKLOG).start()
        except OSError as error:
            raise StartError(cannot_listen("server.admin_listen", address, error)) from error
        return url_of(runner.addresses[0])

    async def _end_admin(self, runner: web.ServerRunner) -> None:
        """Accept no more: where systemd holds the socket, what comes now waits for the next daemon, whole.

        Then answer what was accepted before.
        """
        for site in list(runner.sites):
            await site.stop()
        self._admin.closing = True
        end = self._clock() + LAST_REQUESTS
        while runner.server and runner.server.connections and self._clock() < end:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        await runner.cleanup()

    async def _close_clients(self) -> None:
        for client in [*self._closing, *self._clients.values()]:
            await client.close()


def _strictly_increasing(clock: Callable[[], float]) -> Callable[[], float]:
    """What was asked after something ended must be told from what was asked before."""
    last = clock()

    def tell() -> float:
        nonlocal last
        last = max(clock(), last + 1e-9)
        return last

    return tell


def _ledger(
    settings: Config, urls: Callable[[], Mapping[str, str]], wall: Callable[[], float]
) -> Ledger | None:
    folder, boot = settings.server.state_dir, platform.boot_id()

    def boot_of(url: str) -> str | None:
        return boot if is_loopback(urlsplit(url).hostname or "") else None

    return Ledger(folder, urls, wall, boot_of) if folder else None


def _history(settings: Config, wall: Callable[[], float], report: Callable[[BaseException], None]) -> History:
    path = settings.history.path
    if path:
        return History(wall, path, report=report)
    why_not = "history.path is false" if path is False else "neither history.path nor server.state_dir is set"
    return History(wall, why_not=why_not)
