"""What LM Studio shows on the socket of its own SDKs, beside what it lists over HTTP: an addition, never the ground.

A connection per namespace is opened while listings go on, and opened anew, more and more rarely, while it fails.
Nobody waits for it: a listing gives it `GRACE`, a load goes by HTTP wherever it is not up. Whatever it does wrong
ends in `Sight.sdk`, and in nothing else.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from math import inf
from typing import Any, Final

from keepalive.core.errors import GivenUp, Refused, Unauthorized, Unexpected, UpstreamError
from keepalive.core.facts import Entry, Instance, Need, Sdk, Sight, fold_key
from keepalive.lmstudio import sdk, wire
from keepalive.lmstudio.line import Dial, Line

#: What a listing waits for it.
GRACE: Final = 0.5
#: One that has left a call unanswered for so long is given up, unless a load hangs on it.
DEAF: Final = 30.0
#: From one try to open it to the next.
RETRY_FIRST, RETRY_MAX = 5.0, 300.0
#: A token does not become right by asking again.
RETRY_REFUSED: Final = 60.0
#: A load of which nothing is said for so long may never have been heard of.
FIRST_WORD: Final = 30.0
#: After a load whose end was not told, the next ones go by HTTP.
DISTRUST: Final = 3600.0
#: How long an estimate may take, and how many models are estimated.
ESTIMATE: Final = 10.0
ESTIMATED: Final = 256
#: What does not fit is asked about again after this long: another program may have given back what it took.
ESTIMATED_ANEW: Final = 60.0
#: Of so many instances it is asked what they do; not again within this, while many models come one after another.
WATCHED: Final = 256
NEWS: Final = 0.5


class Eyes:
    """Those of one LM Studio. `close` them in the end."""

    def __init__(self, dial: Dial) -> None:
        self._eyes = {name: _Eye(name, dial) for name in sdk.NAMESPACES}
        self._wanted: Mapping[str, Mapping[str, Any]] = {}

    def configure(self, token: str | None) -> None:
        """Use this token from the next connection on."""
        for eye in self._eyes.values():
            eye.configure(token)

    def expect(self, wanted: Mapping[str, Mapping[str, Any]]) -> None:
        """Estimate what loads of these models take, by key, with the fields that their loads have."""
        self._wanted = {fold_key(key): fields for key, fields in wanted.items()}

    async def look(self, entries: Sequence[Entry]) -> tuple[Sight, list[Entry]]:
        """What is seen just now, and the entries with what is seen of them.

        Never raises, and takes `GRACE` twice at most.
        """
        resident = frozenset(instance.id for entry in entries for instance in entry.instances)
        eyes = self._eyes.values()
        looks = await asyncio.gather(*(eye.look(entries, self._wanted, resident) for eye in eyes))
        states = [eye.state for eye in eyes]
        worst = next((state for state in (Sdk.REFUSED, Sdk.ABSENT) if state in states), Sdk.UP)
        sight = Sight(
            worst,
            why=next((eye.why for eye in eyes if eye.state is worst), None),
            session=sum(eye.connections for eye in eyes) if worst is Sdk.UP else 0,
            hung_up=sum(eye.hung_up for eye in eyes),
            late=any(late for late, _ in looks),
        )
        seen = {key: entry for _, more in looks for key, entry in more.items()}
        return sight, [seen.get(entry.key, entry) for entry in entries]

    async def estimated(self) -> None:
        """Wait until what is being estimated is. Bounded by `ESTIMATE` for each model."""
        tasks = [eye.estimator for eye in self._eyes.values() if eye.estimator is not None]
        if tasks:
            await asyncio.wait(tasks)

    async def load(
        self, kind: str, key: str, fields: Mapping[str, Any], told: Callable[[float], None]
    ) -> wire.Loaded | None:
        """Load one more copy; None where it is not to be had here, and nothing was begun. Raises UpstreamError."""
        return await self._eyes[_namespace(kind)].load(key, fields, told)

    async def give_up(self, key: str) -> None:
        """Ask for the end of our load of it, where it goes this way. Never raises."""
        for eye in self._eyes.values():
            await eye.give_up(key)

    def shut(self) -> None:
        """End the connections, except under a load."""
        for eye in self._eyes.values():
            eye.shut()

    async def close(self) -> None:
        for eye in self._eyes.values():
            await eye.close()


_Seen = tuple[dict[str, Instance], dict[str, sdk.Work]]


class _Eye:
    """One namespace."""

    def __init__(self, namespace: str, dial: Dial) -> None:
        self._namespace = namespace
        self._dial = dial
        self._token: str | None = None
        self._line: Line | None = None
        self._life: asyncio.Task[None] | None = None
        self._tried = asyncio.Event()  # the try to open it is over
        self._tries = 0
        self._retry_at = -inf
        self._question: asyncio.Task[_Seen | None] | None = None
        self._asked_at = 0.0
        self._loads = 0  # under way
        self._by_http_until = -inf
        self._needs: dict[str, _Estimate] = {}
        self._works: dict[str, tuple[float, sdk.Work]] = {}  # by instance, with when that was asked
        self._resident: frozenset[str] = frozenset()  # as of the last look
        self.estimator: asyncio.Task[None] | None = None
        self.state = Sdk.ABSENT
        self.why: str | None = "it has not been tried yet"
        self.connections = 0
        self.hung_up = 0

    def configure(self, token: str | None) -> None:
        if token != self._token:
            self._token, self._retry_at = token, -inf
            self.shut()

    def shut(self) -> None:
        if self._loads == 0:
            self._give_up("it was closed here")

    async def close(self) -> None:
        tasks = [task for task in (self._question, self.estimator, self._life) if task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    # --- its connection -----------------------------------------------------------------------------

    def _wake(self) -> bool:
        """See to it that it is open, or being opened. True where a try has begun just now."""
        if (self._life is not None and not self._life.done()) or _now() < self._retry_at:
            return False
        self._tried.clear()
        self._life = asyncio.create_task(self._live())
        return True

    def _give_up(self, why: str) -> None:
        if self._life is not None and not self._life.done():
            self._line, self.state, self.why = None, Sdk.ABSENT, why
            self._life.cancel()

    async def _live(self) -> None:
        """One connection, from the try to open it to its end."""
        self._tries += 1
        wait = min(RETRY_FIRST * 2.0 ** min(self._tries - 1, 16), RETRY_MAX)
        self._retry_at = _now() + wait
        try:
            line = await Line.open(self._dial, self._namespace, self._token)
            self._line, self.state, self.why = line, Sdk.UP, None
            self.connections += 1
            self._needs.clear()
            self._works.clear()
            self._tried.set()
            began = _now()
            await line.run()
            self.hung_up += line.hung_up
            self.state, self.why = Sdk.ABSENT, line.ended
            if _now() >= began + RETRY_MAX:
                self._tries = 0  # a good one: it may be tried at once
            if self._tries <= 1:
                self._retry_at = _now()
        except Unauthorized as error:
            self.state, self.why = Sdk.REFUSED, str(error)
            self._retry_at = _now() + max(wait, RETRY_REFUSED)
        except UpstreamError as error:
            self.state, self.why = Sdk.ABSENT, str(error)
        except Exception as error:  # noqa: BLE001  # whatever a library makes of what it reads, HTTP goes on
            self.state, self.why = Sdk.ABSENT, f"it fails with {type(error).__name__}"
        finally:
            self._line = None
            self._tried.set()
            for task in (self.estimator, self._question):
                if task is not None:
                    task.cancel()

    # --- looking ------------------------------------------------------------------------------------

    async def look(
        self, entries: Sequence[Entry], wanted: Mapping[str, Mapping[str, Any]], resident: frozenset[str]
    ) -> tuple[bool, dict[str, Entry]]:
        """Whether it is late, and what it shows of the entries of its kind, by key. Never raises."""
        try:
            return await self._look(entries, wanted, resident)
        except Exception as error:  # noqa: BLE001  # whatever a library makes of what it reads, HTTP goes on
            self._give_up(f"it fails with {type(error).__name__}")
            return False, {}

    async def _look(
        self, entries: Sequence[Entry], wanted: Mapping[str, Mapping[str, Any]], resident: frozenset[str]
    ) -> tuple[bool, dict[str, Entry]]:
        mine = [entry for entry in entries if _namespace(entry.kind) == self._namespace]
        if self._wake():
            with suppress(TimeoutError):
                async with asyncio.timeout(GRACE):
                    await self._tried.wait()
        if self._line is None:
            return False, {}
        names = [instance.id for entry in mine for instance in entry.instances]
        late, (shown, works) = await self._seen(self._line, names[:WATCHED])
        self._estimate(mine, wanted, resident)
        return late, {
            entry.key: replace(
                entry,
                instances=tuple(sdk.seen(one, shown, works) for one in entry.instances),
                need=self._need(entry),
            )
            for entry in mine
        }

    async def _seen(self, line: Line, names: Sequence[str]) -> tuple[bool, _Seen]:
        nothing: _Seen = {}, {}
        if self._question is not None and not self._question.done():
            # An answer that comes is of then, and for nobody; nor does anybody wait for it a second time.
            deaf = _now() >= self._asked_at + DEAF
            if deaf and self._loads == 0:
                self._give_up(f"it has left a question unanswered for {DEAF:.0f} s")
            return not deaf, nothing
        now = self._asked_at = _now()
        fresh = {name: self._works[name] for name in names if name in self._works}
        fresh = {name: seen for name, seen in fresh.items() if now < seen[0] + NEWS}
        asked = [name for name in names if name not in fresh]
        question = self._question = asyncio.create_task(_ask(line, asked))
        await asyncio.wait([question], timeout=GRACE)
        if not question.done():
            return True, nothing
        answer = None if question.cancelled() else question.result()
        if answer is None:
            return False, nothing
        shown, works = answer
        self._works = {**fresh, **{name: (now, work) for name, work in works.items()}}
        return False, (shown, {name: work for name, (_, work) in self._works.items()})

    # --- what loads will take -----------------------------------------------------------------------

    def _need(self, entry: Entry) -> Need | None:
        known = self._needs.get(fold_key(entry.key))
        return known.need if known else None

    def _estimate(
        self, mine: Sequence[Entry], wanted: Mapping[str, Mapping[str, Any]], resident: frozenset[str]
    ) -> None:
        if self._line is None or (self.estimator is not None and not self.estimator.done()):
            return
        # While models come one after another, what fits beside them is not asked at each step.
        quiet, self._resident = resident == self._resident, resident
        due = []
        for entry in mine:
            name = next((n for n in (entry.key, *entry.variants) if fold_key(n) in wanted), None)
            if name is None:
                continue
            fields, known = wanted[fold_key(name)], self._needs.get(fold_key(entry.key))
            # What is there decides whether it fits beside that; what it takes does not hang on it.
            if known is None or known.fields != fields:
                due.append((entry.key, name, fields))
            elif known.need and not entry.instances:
                refuses = known.need.passes_guardrails is False
                if (quiet and known.resident != resident) or (
                    refuses and _now() >= known.at + ESTIMATED_ANEW
                ):
                    due.append((entry.key, name, fields))
        if due:
            self.estimator = asyncio.create_task(self._estimate_all(self._line, due[:ESTIMATED], resident))

    async def _estimate_all(
        self, line: Line, due: Sequence[tuple[str, str, Mapping[str, Any]]], resident: frozenset[str]
    ) -> None:
        """One after another: nobody knows what an estimate costs LM Studio."""
        for key, name, fields in due:
            need = None
            with suppress(Exception):  # what is not to be had is not known
                async with asyncio.timeout(ESTIMATE):
                    asked = sdk.load_asked(self._namespace, name, fields)
                    need = sdk.need(await line.call("estimateModelUsage", asked))
            self._needs[fold_key(key)] = _Estimate(fields, resident, need, _now())

    # --- loading ------------------------------------------------------------------------------------

    async def load(
        self, key: str, fields: Mapping[str, Any], told: Callable[[float], None]
    ) -> wire.Loaded | None:
        line = self._line
        if line is None or line.ended is not None or _now() < self._by_http_until:
            return None
        if not sdk.takes(self._namespace, fields):
            return None
        # Until its end is told, well or not.
        self._by_http_until = _now() + DISTRUST
        self._loads += 1
        try:
            asked = sdk.load_asked(self._namespace, key, fields)
            loaded = await line.load(asked, told, first_word=FIRST_WORD)
        except (Refused, GivenUp):
            self._by_http_until = -inf
            raise
        except UpstreamError:
            raise
        except Exception as error:
            raise Unexpected(f"the SDK socket fails with {type(error).__name__}") from error
        finally:
            self._loads -= 1
        if loaded is not None:
            self._by_http_until = -inf
        return loaded

    async def give_up(self, key: str) -> None:
        if self._line is not None:
            with suppress(UpstreamError):
                await self._line.give_up(key)


@dataclass(frozen=True, slots=True)
class _Estimate:
    fields: Mapping[str, Any]
    resident: frozenset[str]  # what was loaded
    need: Need | None  # None: it was not to be had
    at: float


async def _ask(line: Line, names: Sequence[str]) -> _Seen | None:
    """What is loaded, and what these instances do; None where the connection ends."""
    asked = [("getInstanceProcessingState", sdk.instance_asked(name)) for name in names]
    try:
        listed, *states = await line.calls([("listLoaded", None), *asked])
    except UpstreamError:
        return None
    works = {name: sdk.work(state) for name, state in zip(names, states, strict=True)}
    return sdk.listed(listed), {name: work for name, work in works.items() if work is not None}


def _namespace(kind: str) -> str:
    return "embedding" if kind == "embedding" else "llm"


def _now() -> float:
    return asyncio.get_running_loop().time()
