"""Failovers without end, as processes, over a network that can be cut, and under traffic: `make chaos`.

A world is three daemons, each on a machine of its own (a network namespace), a real etcd of three members, and the
simulator as LM Studio. Again and again one fault of a kind befalls whoever acts, or another one; a model may be lost
meanwhile. Several worlds run beside each other. What is judged, by LM Studio's own log and by what callers got:

- no load ever begins beside another one or beside an instance, and nothing is unloaded;
- after each fault all is warm at every daemon within the lease, one load and 15 s; where a load was written down and
  LM Studio never heard of it, within what docs/cluster.md says of that;
- no stream breaks that has begun, but at the moment at which its model was lost or its daemon killed, or while that one
  was cut off from LM Studio;
- nobody is refused, but by what could do that, at whoever it befell, and while it did: a daemon that is killed or ended
  lets nobody in; one that is cut off from LM Studio cannot pass anything on; without etcd one refuses what it misses,
  saying so, and never what is warm there;
- no daemon spins.

Without root there are no other machines, and nothing is cut. A world in which a judge says no leaves its logs behind,
and another one takes its place; the end is then 1.
"""

import argparse
import base64
import contextlib
import http.client
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import count
from math import inf
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).parents[1]))

import pytest

from tests.cluster.test_member import member
from tests.kit import etcd as kit
from tests.kit.live import DaemonProcess, SimulatorProcess, ask, ending, settings
from tests.kit.machine import Machine, addresses, machine
from tests.kit.ports import reserved

MODELS = ("one", "two")
NAMES = ("a", "b", "c")
TTL = 3.0
LOAD = 1.0
# What is promised, and what of a load that was written down and never sent: twice its time and 45 s from then.
WITHIN = TTL + LOAD + 15.0
BELIEVED = 2 * LOAD + 45.0
# A stream has 20 words in 4 s; 0.3 s lie between two requests of a caller.
WORDS, WORD_SECONDS = 20, 0.2
# Of one processor, over a life of at least ten seconds.
SPINS = 0.6
# How soon a caller, or a daemon that passes him on, has seen that what answered is gone; no two clocks are compared.
SEEN = 2.0

KINDS = {
    "killed": 4,
    "stopped and woken": 4,
    "ended": 2,
    "cut off from etcd": 3,
    "hears nothing of etcd": 2,
    "cut off from some of etcd": 1,
    "cut off from LM Studio": 2,
    "hears nothing of LM Studio": 1,
    "cut off from both": 3,
    "leader of etcd killed": 1,
    "leader of etcd stopped": 1,
    "all of etcd killed": 1,
    "all of etcd stopped": 1,
    "all of etcd emptied": 1,
    "LM Studio restarted": 1,
}
# Somebody, or everybody, is without etcd.
ALONE = {
    kind
    for kind in KINDS
    if kind.endswith(("from etcd", "of etcd", "both")) or kind.startswith("all of etcd")
}
CUTS = {kind for kind in KINDS if kind.startswith(("cut", "hears"))}
DURING = ("at rest", "at rest", "a model lost before", "a model lost after", "a model lost at its end")


class Wrong(Exception):
    """A judge says no."""


@dataclass
class Stream:
    daemon: str
    model: str
    began: float
    ended: float = 0.0
    status: int = 0
    words: int = 0
    whole: bool = False
    said: str = ""
    shut: bool = False
    error: str = ""

    def failed(self) -> str:
        """How."""
        if self.shut:
            return NOT_LET_IN
        if self.words or (self.status == 200 and not self.said):
            return BROKEN
        if self.status == 0:
            return UNANSWERED
        return WITHOUT_ETCD if ENGINE in self.said else REFUSED


# How a request may fail: an answer breaks, nobody listens, the connection ends before an answer, and the answer is no.
BROKEN, NOT_LET_IN, UNANSWERED, REFUSED = "broken", "not let in", "unanswered", "refused"
WITHOUT_ETCD = "refused for want of etcd"
ENGINE = "nothing is loaded or unloaded, because"


@dataclass
class Blow:
    """What makes requests fail that it befalls: all of a daemon, or all of a model; None: of whichever."""

    what: str
    fails: tuple[str, ...]  # in which ways
    began: float
    ended: float = inf
    daemon: str | None = None
    model: str | None = None

    def befell(self, stream: Stream, model: str) -> bool:
        """Whether that one could fail by this when it did; `model` is what answered it."""
        return (
            self.daemon in (None, stream.daemon)
            and self.model in (None, model)
            # An answer had begun by then; who came a moment later is refused by it, too.
            and stream.began <= self.ended + (0.0 if stream.failed() == BROKEN else SEEN)
            and self.began <= stream.ended <= self.ended + SEEN
        )


@dataclass
class Tally:
    """What all worlds have come to."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    faults: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    recoveries: list[float] = field(default_factory=list)
    late: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    failovers: int = 0

    def add(self, **counts: int) -> None:
        with self.lock:
            self.counts.update(counts)

    def shown(self) -> str:
        took = sorted(self.recoveries) or [0.0]
        lines = [f"{self.failovers} failovers by {sum(self.faults.values())} faults"]
        lines += [f"  {count:4} {kind}" for kind, count in sorted(self.faults.items())]
        lines += [f"{count:6} {what.replace('_', ' ')}" for what, count in sorted(self.counts.items())]
        lines.append(
            f"warm again after {took[len(took) // 2]:.1f} s (half), {took[len(took) * 95 // 100]:.1f} s (95 %), "
            f"{took[-1]:.1f} s (all); {WITHIN:.0f} s are promised"
        )
        lines += [f"{len(self.late)} times later than that", *self.late]
        return "\n".join([*lines, f"{len(self.wrong)} times a judge said no", *self.wrong])


def got(url: str, body: Any = None) -> Any:
    """JSON, or None where nobody answers: whoever is stopped or cut off does not."""
    place = urlsplit(url)
    connection = http.client.HTTPConnection(place.netloc, timeout=2.0)
    with contextlib.suppress(OSError, ValueError, http.client.HTTPException), contextlib.closing(connection):
        connection.request("POST" if body else "GET", place.path, json.dumps(body) if body else None)
        return json.loads(connection.getresponse().read())
    return None


class World:
    def __init__(self, folder: Path, number: int, seed: str, factor: float, tally: Tally) -> None:
        self.folder, self.number, self.factor, self.tally = folder, number, factor, tally
        self.chance = random.Random(seed)
        self.machines: dict[str, Machine] = {}
        self.daemons: dict[str, DaemonProcess] = {}
        self.urls: dict[str, str] = {}
        self.born: dict[str, float] = {}
        self.over = threading.Event()
        self.blows: list[Blow] = []
        # What is missing from when until all is well again.
        self.missing: list[Blow] = []
        self.streams: list[Stream] = []
        self.events: list[dict[str, Any]] = []
        self.seen = 0
        self.lease = ""

    # --- its making ---------------------------------------------------------------------------------

    def run(self, go_on: Callable[[], bool]) -> None:
        with contextlib.ExitStack() as stack:
            self._make(stack)
            for n in range(2 * len(NAMES)):
                thread = threading.Thread(target=self.traffic, args=(n,), daemon=True)
                thread.start()
                stack.callback(thread.join, 30)
            stack.callback(self.over.set)
            self.recovers("the beginning", time.monotonic(), within=120.0)
            self.lease = self.held_by()[1]
            while go_on():
                self.round()

    def _make(self, stack: contextlib.ExitStack) -> None:
        hosts = ["127.0.0.1"] * 4
        if can_cut():
            net = f"10.{100 + os.getpid() % 90}.{os.getpid() // 90 % 250}"
            hosts = [f"{net}.{self.number % 50 * 4 + n}" for n in range(4)]
            stack.enter_context(addresses(*hosts))
            self.machines = {name: stack.enter_context(machine(self.folder)) for name in NAMES}
        self.hosts = hosts
        self.lm_studio = SimulatorProcess(self.folder, *MODELS, host=hosts[0])
        stack.enter_context(ending(self.lm_studio))
        # What a caller has LM Studio load on demand, who comes a moment after a loss and before the next listing, is no
        # daemon's load.
        self.lm_studio.faults(load_seconds=LOAD, token_seconds=WORD_SECONDS, jit=False)
        self.etcd = stack.enter_context(kit.three(self.folder, hosts[1:]))
        self.ports = stack.enter_context(reserved(2 * len(NAMES)))
        stack.callback(lambda: [d.kill() for d in self.daemons.values() if d.process.poll() is None])
        for name in NAMES:
            self.start(name)

    def start(self, name: str) -> None:
        n = NAMES.index(name)
        host = self.machines[name].there if self.machines else "127.0.0.1"
        client, admin = self.ports[2 * n : 2 * n + 2]
        state = f'state_dir = "{self.folder / name}"\nlog_format = "json"'
        upstream = 'connect_timeout = "2s"\nlist_timeout = "2s"'
        text = settings(self.lm_studio.url, *MODELS, server=state, upstream=upstream)
        text = text.replace('"100ms"', '"500ms"')
        for port in (client, admin):
            text = text.replace('127.0.0.1:0"', f'{host}:{port}"', 1)
        text += member(", ".join(one.url for one in self.etcd), "chaos", name, f"{TTL:.0f}s")
        on = ["ip", "netns", "exec", self.machines[name].name] if self.machines else []
        known = self.daemons.get(name)
        if known is not None:
            with (self.folder / f"{name}.log").open("a") as log:
                log.write(known.err.read_text())
        self.daemons[name] = DaemonProcess(self.folder, text, name, on=on)
        self.urls[name] = f"http://{host}:{client}"
        self.born[name] = time.monotonic()

    # --- what happens -------------------------------------------------------------------------------

    def round(self) -> None:
        kinds = {k: w for k, w in KINDS.items() if self.machines or k not in CUTS}
        [kind] = self.chance.choices(list(kinds), list(kinds.values()))
        during = self.chance.choice(DURING)
        holder = self.held_by()[0]
        name = holder if holder in NAMES and self.chance.random() < 0.9 else self.chance.choice(NAMES)
        seconds = self.chance.choice((0.1, TTL / 2, 1.5 * TTL, 1.5 * TTL, 1.5 * TTL, 2.5 * TTL))
        if kind.endswith("LM Studio") and self.chance.random() < 0.5:
            seconds = 25.0  # whoever does not see it lets go
        elif kind in ALONE and self.chance.random() < 0.4:
            seconds = 5 * TTL  # whoever waits is sent away
        self.forgive()
        what = f"{name}{' (acts)' if name == holder else ''} {kind} for {seconds:.1f} s, {during}"
        lost = self.chance.choice(MODELS)
        if during == "a model lost before":
            self.lose(lost)
            time.sleep(self.chance.uniform(0, 1.5 * LOAD))
        with self.befalls(kind, name, seconds):
            if during == "a model lost after":
                time.sleep(self.chance.uniform(0, 0.3))
                self.lose(lost)
            time.sleep(seconds)
            if during == "a model lost at its end":
                self.lose(lost)
        healed = time.monotonic()
        took = self.recovers(what, healed)
        self.judge(what)
        lease = self.held_by()[1]
        with self.tally.lock:
            self.tally.faults[kind] += 1
            self.tally.recoveries.append(took)
            self.tally.failovers += lease != self.lease
            total = self.tally.failovers
        self.lease = lease
        print(f"{total:4} world {self.number}: {what}: warm after {took:.1f} s", flush=True)

    def forgive(self) -> None:
        """As a person would: what is lost so often is left alone for longer and longer."""
        url = self.daemons[self.chance.choice(NAMES)].url
        for key in MODELS:
            ask(f"{url}/api/models/{key}/warm", "POST")

    @contextlib.contextmanager
    def befalls(self, kind: str, name: str, seconds: float) -> Iterator[None]:
        daemon, there = self.daemons[name], self.machines.get(name)
        lm_studio, *etcd = self.hosts
        some = self.chance.sample(etcd, self.chance.choice((1, 1, 2)))
        leader = next((one for one in self.etcd if leads(one)), self.etcd[0])
        began = time.monotonic()
        match kind:
            case "killed" | "ended":
                daemon.signal(signal.SIGKILL if kind == "killed" else signal.SIGTERM)
            case "stopped and woken":
                daemon.signal(signal.SIGSTOP)
            case "cut off from etcd" | "hears nothing of etcd":
                there.loses_sight_of(*etcd, sends=kind.startswith("hears"))
            case "cut off from some of etcd":
                there.loses_sight_of(*some)
            case "cut off from LM Studio" | "hears nothing of LM Studio":
                there.loses_sight_of(lm_studio, sends=kind.startswith("hears"))
            case "cut off from both":
                there.loses_sight_of(*self.hosts)
            case "leader of etcd killed":
                leader.kill()
            case "leader of etcd stopped":
                leader.signal(signal.SIGSTOP)
            case "all of etcd killed" | "all of etcd emptied":
                for one in self.etcd:
                    one.kill()
            case "all of etcd stopped":
                for one in self.etcd:
                    one.signal(signal.SIGSTOP)
            case "LM Studio restarted":
                self.all_lost()
                ask(f"{self.lm_studio.url}/simulator/restart", "POST", {"down_seconds": seconds})
        done = time.monotonic()
        if "etcd" in kind or kind == "cut off from both":
            here = name if kind in CUTS else None
            self.blows.append(Blow(kind, (WITHOUT_ETCD,), began, daemon=here))  # until all is well again
            if here and "etcd" not in kind:
                self.missing.append(Blow(kind, (), began, daemon=here))  # it cannot see what is there
        yield
        match kind:
            case "killed" | "ended":
                daemon.ended()
                self.spins(name)
                self.start(name)
            case "stopped and woken":
                daemon.signal(signal.SIGCONT)
            case "leader of etcd killed":
                leader.start(wait=False)
            case "leader of etcd stopped":
                leader.signal(signal.SIGCONT)
            case "all of etcd killed" | "all of etcd emptied":
                for one in self.etcd:
                    if kind.endswith("emptied"):
                        one.empty()
                    one.start(wait=False)
            case "all of etcd stopped":
                for one in self.etcd:
                    one.signal(signal.SIGCONT)
            case _ if there is not None and kind in CUTS:
                there.sees_all()
            case "LM Studio restarted":
                wait(lambda: got(f"{self.lm_studio.url}/simulator/state"), 60.0)
        now = time.monotonic()
        if kind == "LM Studio restarted":
            self.blows.append(Blow(kind, (BROKEN, REFUSED), began, done))
        elif kind == "killed":
            self.blows.append(Blow(kind, (BROKEN, UNANSWERED), began, done, name))
            self.blows.append(Blow(kind, (NOT_LET_IN,), began, now, name))
        elif kind == "ended":
            self.blows.append(Blow(kind, (NOT_LET_IN, REFUSED), began, now, name))
        elif kind in CUTS and not kind.endswith("etcd"):
            # What was not received is sent again after as long again at the latest, and may be refused then.
            self.blows.append(Blow(kind, (BROKEN, REFUSED), began, now + (now - began), name))
        elif kind == "stopped and woken":
            # What was lost meanwhile is seen when it wakes.
            late = [blow for blow in self.blows if blow.model and blow.ended + SEEN >= began]
            self.blows += [replace(blow, ended=now, daemon=name) for blow in late]

    def all_lost(self) -> None:
        self.missing += [Blow("a model lost", (), time.monotonic(), model=key) for key in MODELS]

    def lose(self, key: str) -> None:
        began = time.monotonic()
        self.missing.append(Blow("a model lost", (), began, model=key))
        # It may not be there to be lost, nor LM Studio to lose it.
        with contextlib.suppress(OSError):
            ask(f"{self.lm_studio.url}/simulator/evict", "POST", {"model": key})
        self.blows.append(Blow("a model lost", (BROKEN, REFUSED), began, time.monotonic(), model=key))

    def is_well(self) -> None:
        now = time.monotonic()
        for blow in (*self.blows, *self.missing):
            if blow.ended == inf:
                blow.ended = now

    def held_by(self) -> tuple[str, str]:
        """Who acts, and of which life, as etcd has it."""
        key = base64.b64encode(b"/keepalive/chaos/holders/local").decode()
        for one in self.etcd:
            said = got(f"{one.url}/v3/kv/range", {"key": key}) or {}
            for kv in said.get("kvs", []):
                value = json.loads(base64.b64decode(kv["value"]))
                return value["instance"], value["life"]
        return "", ""

    # --- who judges ---------------------------------------------------------------------------------

    def well(self) -> bool:
        """Whether all is there and warm at every daemon, and each of them sees what it is to see."""
        # What was lost a moment ago is warm for everybody until the next listing.
        state = got(f"{self.lm_studio.url}/simulator/state")
        if state is None or not all(m["instances"] for m in state["models"]):
            return False
        for process in self.daemons.values():
            status = got(f"{process.url}/api/status")
            if status is None or not all(m["state"] == "warm" for m in status["models"]):
                return False
            if not status["cluster"]["engine"]["up"] or any(u["state"] != "up" for u in status["upstreams"]):
                return False
        return True

    def recovers(self, what: str, since: float, within: float = WITHIN) -> float:
        """In how many seconds all is warm again."""
        within *= self.factor
        if not wait(self.well, within):
            believed = self.believed()
            self.tally.late.append(
                f"world {self.number}: {what}{', a load is believed in' if believed else ''}"
            )
            if not believed or not wait(self.well, BELIEVED * self.factor):
                shown = {name: got(f"{one.url}/api/status") for name, one in self.daemons.items()}
                (self.folder / "status.json").write_text(json.dumps(shown, indent=1))
                raise Wrong(f"{what}: not well within {time.monotonic() - since:.0f} s")
        self.is_well()
        return time.monotonic() - since

    def believed(self) -> bool:
        """Whether some daemon takes a load for under way that LM Studio knows nothing of."""
        state = got(f"{self.lm_studio.url}/simulator/state")
        loads = {m["key"] for m in state["models"] if m["loads"] or m["instances"]} if state else set()
        for process in self.daemons.values():
            status = got(f"{process.url}/api/status")
            if status and any(m["load"] and m["key"] not in loads for m in status["models"]):
                return True
        return False

    def judge(self, what: str) -> None:
        new = self.lm_studio.log(self.seen)
        with (self.folder / "lm_studio.jsonl").open("a") as log:
            log.writelines(json.dumps(event) + "\n" for event in new)
        self.seen = max((e["n"] for e in new), default=self.seen)
        loads = [e for e in new if e["kind"] == "load.started"]
        self.tally.add(loads=len(loads))
        if wrong := [e for e in loads if e["copies"]]:
            raise Wrong(f"{what}: loads beside others: {wrong}")
        if wrong := [e for e in new if e["kind"] == "unloaded"]:
            raise Wrong(f"{what}: unloaded: {wrong}")
        # Streams of the last seconds may just have broken by something that is yet to be counted.
        done, self.streams = self.streams, []
        for stream in done:
            self._judge(what, stream)
        for name in NAMES:
            self.spins(name)

    def _judge(self, what: str, stream: Stream) -> None:
        if stream.whole:
            self.tally.add(answers_whole=1)
            return
        how = stream.failed()
        missing = any(blow.befell(stream, stream.model) for blow in self.missing)
        # Where his own was gone, LM Studio may have answered by another one.
        answering = MODELS if missing else (stream.model,)
        could = [b for b in self.blows if how in b.fails]
        blow = next((b for b in could for model in answering if b.befell(stream, model)), None)
        if blow is None or (how == WITHOUT_ETCD and not missing):
            raise Wrong(
                f"{what}: {how}, and nothing had befallen it: {stream}; {self.blows[-8:]}; {self.missing[-4:]}"
            )
        self.tally.add(**{f"{how} by: {blow.what}": 1})

    def spins(self, name: str) -> None:
        process, lived = self.daemons[name].process, time.monotonic() - self.born[name]
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
            used = (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")
            if lived > 10 and used - 5 > SPINS * lived:
                raise Wrong(f"{name} spins: {used:.0f} s of processor in {lived:.0f} s")

    # --- who calls ----------------------------------------------------------------------------------

    def traffic(self, n: int) -> None:
        chance = random.Random(n)
        while not self.over.is_set():
            name = NAMES[n % len(NAMES)]
            stream = Stream(name, chance.choice(MODELS), time.monotonic())
            try:
                self.call(stream, WORDS if n < len(NAMES) else 1)
            except ConnectionRefusedError:
                stream.shut = True
            except (OSError, http.client.HTTPException) as error:
                stream.error = repr(error)
            stream.ended = time.monotonic()
            self.streams.append(stream)
            self.over.wait(0.3)

    def call(self, stream: Stream, words: int) -> None:
        connection = http.client.HTTPConnection(urlsplit(self.urls[stream.daemon]).netloc, timeout=90.0)
        body = {
            "model": stream.model,
            "messages": [{"role": "user", "content": "x"}],
            "max_tokens": words,
            "stream": True,
        }
        with contextlib.closing(connection):
            connection.request("POST", "/v1/chat/completions", json.dumps(body))
            answer = connection.getresponse()
            stream.status = answer.status
            while line := answer.readline():
                text = line.decode()
                if stream.status != 200:
                    stream.said += text[:300]
                stream.words += '"content"' in text
                if '"error"' in text:
                    stream.said = text[:300]
                if text.startswith("data: [DONE]"):
                    stream.whole = answer.status == 200 and not stream.said


def leads(one: kit.Etcd) -> bool:
    with contextlib.suppress(OSError, KeyError, ValueError):
        return one.leads()
    return False


def wait(condition: Callable[[], Any], within: float) -> bool:
    end = time.monotonic() + within
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True


def can_cut() -> bool:
    return sys.platform == "linux" and os.geteuid() == 0 and all(map(shutil.which, ("ip", "iptables")))


def main(words: argparse.Namespace) -> int:
    if kit.ETCD is None:
        print("this needs etcd (Debian: etcd-server)")
        return 1
    print(
        f"{words.failovers} failovers in {words.worlds} worlds, seed {words.seed}; bounds times {words.factor:g}"
        + ("" if can_cut() else "; nothing is cut, which takes root, ip and iptables")
    )
    tally, numbers, began = Tally(), count(), time.monotonic()
    kept = Path(tempfile.mkdtemp(prefix="chaos-"))

    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())

    def go_on() -> bool:
        return tally.failovers < words.failovers and not ended.is_set()

    def worlds() -> None:
        while go_on():
            number = next(numbers)
            folder = kept / f"world-{number}"
            folder.mkdir()
            world = World(folder, number, f"{words.seed}/{number}", words.factor, tally)
            try:
                world.run(go_on)
            except (Exception, pytest.skip.Exception) as error:  # noqa: BLE001  # it is told, and the others go on
                said = str(error) if isinstance(error, Wrong) else traceback.format_exc()
                with tally.lock:
                    tally.wrong.append(f"world {number}, {folder}: {said}")
                print(f"NO, world {number}, {folder}: {said}", flush=True)
            else:
                shutil.rmtree(folder)

    threads = [threading.Thread(target=worlds) for _ in range(words.worlds)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(tally.shown())
    print(f"{(time.monotonic() - began) / 60:.0f} minutes")
    return 1 if tally.wrong else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("failovers", nargs="?", type=int, default=500)
    parser.add_argument("seed", nargs="?", default="0")
    parser.add_argument("--worlds", type=int, default=3)
    parser.add_argument(
        "--factor", type=float, default=1.0, help="what bounds are multiplied by on a slow machine"
    )
    sys.exit(main(parser.parse_args()))
