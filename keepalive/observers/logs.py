"""The log: one line per transition, one per load, none per ping that went well.

Event names are constant and dotted, what varies stands in fields. JSON, unless a terminal is watching, or the
journal, which people read, and which knows the time and is told the level in its own way. Lines go through a
bounded queue to a thread of their own: a full disk or a stopped pager must not stop the loop that carries
users' streams, nor its end. Other libraries' records pass too, from WARNING upwards, but only what was known
when the line was written: their tracebacks and second lines quote the input, and a secret may be among it.

Each request is a line, and there may be thousands of them in a second. So lines are written by the batch, and
that of a request, whose fields are always the same, is put together here: what the libraries need for any other
line would cost a small request as much as passing it on.
"""

import errno
import json
import logging
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TextIO

import structlog

from keepalive.core.callers import Outcome, Seen
from keepalive.core.facts import (
    ClockJumped,
    DrainStarted,
    Fact,
    HandLost,
    HandTaken,
    InstanceLost,
    LoadEnded,
    LoadOutcome,
    LoadRemembered,
    ModelFact,
    ModelId,
    PingEnded,
    PingOutcome,
    PrimeEnded,
    PrimeOutcome,
    UnloadCause,
    UnloadEnded,
)
from keepalive.core.primes import label
from keepalive.core.records import Model, Upstream, UpstreamState
from keepalive.core.states import State

# At 300 bytes a line about 3 MB, when nobody reads; three times that where all are requests.
LINES_WAITING = 10_000
# What comes within this time is written at once. A daemon that is killed takes so much of its log along.
GATHER = 0.1
# A longer write might still be under way when the end no longer waits for it.
WRITE_BYTES = 65_536
# Of requests that are alike but for their numbers: how many kinds are kept rendered.
FRAMES = 512
# There may be room again: somebody clears the disk, or cuts the file.
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
FULL_RETRY = 1.0
# Longer than this the end does not wait for somebody to take the last lines.
LAST_WORDS = 1.0
# One library can repeat itself 2,000 times in a second, as when no file can be opened any more.
FOREIGN_INTERVAL = 60.0
FOREIGN_MAX = 200
# syslog's numbers, which journald takes from the beginning of a line.
PRIORITIES = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}


class _Output(logging.Handler):
    """Renders where the line was written, and writes in a thread that nobody has to wait for.

    The thread takes no lock that others need: not this handler's, which the interpreter takes when it ends,
    and not that of `sys.stderr`. While a disk is full lines wait for room on it. Those that do not fit are dropped,
    since the alternative is to have callers wait; once there is room again, a line says how many they were.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._file = stream.fileno()
        self._dropped = 0
        self._lines: deque[str | Callable[[], str]] = deque()
        self._woken = threading.Event()
        self._ending = threading.Event()
        self._over = False
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        # Whatever cannot be rendered: a lost line is better than a lost request.
        with suppress(Exception):
            self.put(self.format(record))

    def put(self, line: str | Callable[[], str]) -> None:
        """Writes a line soon, or what is returned in the thread by what gives it."""
        if len(self._lines) >= LINES_WAITING:
            self._dropped += 1
            return
        if self._dropped:
            dropped, self._dropped = self._dropped, 0
            logger().warning("log.lines_lost", lines=dropped)
        self._lines.append(line)
        if not self._woken.is_set():  # waking a thread costs more than writing a line down
            self._woken.set()

    @property
    def idle(self) -> bool:
        """All of it has been taken to be written."""
        return not self._lines

    def end(self) -> None:
        self._ending.set()
        self._woken.set()
        self._thread.join(LAST_WORDS)
        # What is left is lost: the file may soon be somebody else's.
        self._over = True

    def _run(self) -> None:
        while not (self._ending.is_set() and not self._lines):
            self._woken.wait()
            self._ending.wait(GATHER)
            self._woken.clear()
            while self._lines and not self._over:
                self._write(self._batch())

    def _batch(self) -> bytes:
        lines: list[bytes] = []
        size = 0
        while self._lines and size < WRITE_BYTES:
            line = self._lines.popleft()
            if not isinstance(line, str):
                try:
                    line = line()
                except Exception:  # noqa: BLE001, S112  one line is lost, as in `emit`, and not all that come after it
                    continue
            lines.append(line.encode(errors="backslashreplace"))
            size += len(lines[-1]) + 1
        return b"\n".join([*lines, b""])

    def _write(self, batch: bytes) -> None:
        while batch and not self._over:
            try:
                batch = batch[os.write(self._file, batch) :]
            except BlockingIOError:
                # Somebody who shares the terminal has made it non-blocking.
                select.select([], [self._file], [])
            except OSError as error:
                if error.errno not in FULL:
                    return  # nobody is there to be told: a terminal that was closed, a reader who left
                if not self._ending.wait(FULL_RETRY):
                    continue
                time.sleep(GATHER)  # the end waits for this thread, and not for long


class _Prioritized(structlog.stdlib.ProcessorFormatter):
    """For the journal, which makes an entry of each line."""

    def format(self, record: logging.LogRecord) -> str:
        priority = PRIORITIES.get(record.levelno, 5)
        return "\n".join(f"<{priority}>{line}" for line in super().format(record).splitlines())


class _Foreign(logging.Filter):
    """Other libraries' records: the first line, what failed by its type and place, and not too often."""

    def __init__(self) -> None:
        super().__init__()
        self._said_at: dict[tuple[str, str], float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        if record.name == "keepalive":
            return True
        template, now = (record.name, str(record.msg).split("\n")[0]), time.monotonic()
        if now - self._said_at.get(template, -FOREIGN_INTERVAL) < FOREIGN_INTERVAL:
            return False
        if len(self._said_at) >= LINES_WAITING:
            self._said_at.clear()
        self._said_at[template] = now
        message = record.getMessage().split("\n")[0][:FOREIGN_MAX]
        record.msg, record.args = f"{message}{_where(record)}", ()
        record.exc_info = record.exc_text = record.stack_info = None
        return True


def _where(record: logging.LogRecord) -> str:
    error = record.exc_info[1] if record.exc_info else None
    if error is None:
        return ""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    place = f" at {Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}" if trace else ""
    return f" ({type(error).__name__}{place})"


def start(*, level: str, as_json: bool | None, stream: TextIO | None) -> Callable[[], None]:
    """Log to `stream` from now on; returns what puts all back as it was.

    `as_json` None: unless `stream` is a terminal or the journal. `stream` None: nothing is written, by anybody.
    """
    journal = stream is not None and _is_journal(stream)
    root, own = logging.getLogger(), logging.getLogger("keepalive")
    before, handlers, levels = structlog.get_config(), root.handlers[:], (root.level, own.level)
    handler = logging.NullHandler() if stream is None else _Output(stream)
    root.handlers[:] = [handler]
    root.setLevel(max(logging.WARNING, logging.getLevelName(level.upper())))
    own.setLevel(level.upper())
    shared: list[structlog.typing.Processor] = [structlog.stdlib.add_log_level]
    if not journal:
        shared.append(structlog.processors.TimeStamper(fmt="iso", utc=True))
    if stream is not None:
        handler.addFilter(_Foreign())
        handler.setFormatter(
            (_Prioritized if journal else structlog.stdlib.ProcessorFormatter)(
                foreign_pre_chain=[*shared, structlog.stdlib.add_logger_name],
                processors=[
                    structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                    _plain if journal and not as_json else _renderer(stream, as_json=as_json),
                ],
            )
        )
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
    global _requests
    _requests = _tell_request
    if isinstance(handler, _Output) and (journal or _is_json(stream, as_json)):
        _requests = _Requests(handler, own.level, journal=journal, as_json=not journal or bool(as_json))

    def stop() -> None:
        global _requests
        _requests = _tell_request
        structlog.configure(**before)
        root.handlers[:] = handlers
        root.setLevel(levels[0])
        own.setLevel(levels[1])
        if isinstance(handler, _Output):
            handler.end()

    return stop


def _is_json(stream: TextIO | None, as_json: bool | None) -> bool:
    return stream is not None and (bool(as_json) or (as_json is None and not stream.isatty()))


def _renderer(stream: TextIO, *, as_json: bool | None) -> structlog.typing.Processor:
    if _is_json(stream, as_json):
        return structlog.processors.JSONRenderer()
    colors = stream.isatty() and not os.environ.get("NO_COLOR")
    return structlog.dev.ConsoleRenderer(colors=colors, pad_event_to=18, sort_keys=False)


def _is_journal(stream: TextIO) -> bool:
    """Whether systemd connected this very stream to the journal."""
    try:
        at = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{at.st_dev}:{at.st_ino}"


_fields = structlog.processors.LogfmtRenderer(bool_as_flag=False)


def _plain(logger: object, name: str, event: structlog.typing.EventDict) -> str:
    """`model.loaded model=medicine-llm seconds=12.1`"""
    text = str(event.pop("event"))
    event.pop("level", None)
    for key, value in event.items():
        if isinstance(value, list):
            event[key] = "; ".join(map(str, value))
    return f"{text} {_fields(logger, name, event)}".rstrip()


def logger() -> structlog.stdlib.BoundLogger:
    log: structlog.stdlib.BoundLogger = structlog.get_logger("keepalive")
    return log


# --- requests ---------------------------------------------------------------------------------------


def request(seen: Seen) -> None:
    """One request is over: a line, with nothing in it that was said."""
    _requests(seen, "info" if seen.outcome in _WELL else "warning")


_WELL = (Outcome.OK, Outcome.CLIENT_GONE)


def _tell_request(seen: Seen, level: str) -> None:
    """As any other line is written; what follows here says the same in less time."""
    model = seen.model
    logger().log(
        logging.INFO if level == "info" else logging.WARNING,
        "proxy.request",
        route=seen.route,
        model=model.key if model else None,
        upstream=model.upstream if model else None,
        outcome=seen.outcome.value,
        status=seen.status,
        start=seen.start,
        waited=round(seen.wait_seconds, 3),
        first_token=None if seen.first_token_seconds is None else round(seen.first_token_seconds, 3),
        seconds=round(seen.seconds, 3),
        bytes=seen.bytes,
        events=seen.events,
        key=seen.key,
        error=seen.error,
    )


_requests: Callable[[Seen, str], None] = _tell_request


class _Requests:
    """Writes what `_tell_request` does, byte for byte, where a line is JSON or the journal's.

    What is the same in many requests is rendered once; numbers are alike in both formats. The line is put together
    in the thread that writes it, many of them one after the other.
    """

    def __init__(self, output: _Output, threshold: int, *, journal: bool, as_json: bool) -> None:
        self._output = output
        self._said = {
            name: f"<{PRIORITIES[level]}>" if journal else ""
            for name, level in (("info", logging.INFO), ("warning", logging.WARNING))
            if level >= threshold
        }
        self._as_json = as_json
        self._dated = not journal
        self._frames: dict[tuple[object, ...], tuple[str, str]] = {}
        self._second = 0
        self._date = ""

    def __call__(self, seen: Seen, level: str) -> None:
        begin = self._said.get(level)
        if begin is not None:
            self._output.put(partial(self._line, seen, level, begin, time.time_ns() if self._dated else 0))

    def _line(self, seen: Seen, level: str, begin: str, at: int) -> str:
        first = None if seen.first_token_seconds is None else round(seen.first_token_seconds, 3)
        waited, seconds = round(seen.wait_seconds, 3), round(seen.seconds, 3)
        known = seen.route, seen.model, seen.outcome, seen.status, seen.start, seen.key, seen.error, level
        frame = self._frames.get(known)
        if frame is None:
            if len(self._frames) >= FRAMES:
                self._frames.clear()
            frame = self._frames[known] = _frame(*known, as_json=self._as_json)
        before, after = frame
        if self._as_json:
            line = (
                f'{before}, "waited": {waited}, "first_token": {"null" if first is None else first}, '
                f'"seconds": {seconds}, "bytes": {seen.bytes}, "events": {seen.events}, {after}'
            )
            end = f', "timestamp": "{self._date_of(at)}"}}' if self._dated else "}"
        else:
            line = (
                f"{before} waited={waited} first_token={'' if first is None else first} "
                f"seconds={seconds} bytes={seen.bytes} events={seen.events} {after}"
            )
            end = ""
        return f"{begin}{line}{end}"

    def _date_of(self, at: int) -> str:
        second, rest = divmod(at, 1_000_000_000)
        if second != self._second:
            self._second = second
            self._date = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
        return f"{self._date}.{rest // 1000:06}Z"


def _frame(
    route: str,
    model: ModelId | None,
    outcome: Outcome,
    status: int,
    start: str | None,
    key: str | None,
    error: str | None,
    level: str,
    *,
    as_json: bool,
) -> tuple[str, str]:
    """What stands before the numbers of a request, and behind them."""
    before = {
        "route": route,
        "model": model.key if model else None,
        "upstream": model.upstream if model else None,
        "outcome": outcome.value,
        "status": status,
        "start": start,
    }
    if not as_json:
        return f"proxy.request {_fields(None, '', before)}", _fields(None, "", {"key": key, "error": error})
    after = {"key": key, "error": error, "event": "proxy.request", "level": level}
    return json.dumps(before)[:-1], json.dumps(after)[1:-1]


class Log:
    """The observer that writes."""

    def observe(self, fact: Fact, before: Model | Upstream, after: Model | Upstream) -> None:
        if isinstance(before, Upstream) and isinstance(after, Upstream):
            _upstream(fact, before, after)
        elif isinstance(before, Model) and isinstance(after, Model):
            _model(fact, before, after)


def _upstream(fact: Fact, before: Upstream, after: Upstream) -> None:
    log = logger().bind(upstream=after.name)
    if isinstance(fact, ClockJumped):
        log.warning("clock.jumped", seconds=round(fact.seconds, 1))
    elif isinstance(fact, HandTaken):
        log.info("cluster.took_over")
    elif isinstance(fact, HandLost) and before.acts and before.tier is not None:
        log.warning("cluster.gave_up", reason="another daemon acts there, or none while etcd is away")
    if (after.state, after.tier) != (before.state, before.tier):
        well = after.state is UpstreamState.UP
        tell = log.info if well else log.warning
        tell(
            "upstream.state",
            state=after.state.value,
            was=before.state.value,
            **_given(tier=after.tier, error=after.error),
        )
    elif after.error and after.error != before.error:
        log.warning("upstream.error", error=after.error)
    if after.sight.sdk is not before.sight.sdk:
        log.info("upstream.sdk", sdk=after.sight.sdk.value, **_given(reason=after.sight.why))
    if after.evicts and not before.evicts:
        log.warning("upstream.evicts", reason="a load on demand pushes out the model before it")


def _model(fact: Fact, before: Model, after: Model) -> None:
    log = logger().bind(model=after.id.key, upstream=after.id.upstream)
    match fact:
        case LoadEnded(outcome=LoadOutcome.OK):
            log.info(
                "model.loaded",
                seconds=round(after.recent_loads[-1], 3),
                elapsed=round(fact.elapsed, 3),
                instance=fact.instance_id,
            )
        case LoadEnded(outcome=LoadOutcome.GIVEN_UP):
            log.info("model.load_given_up", elapsed=round(fact.elapsed, 3))
        case LoadEnded():
            log.warning(
                "model.load_failed",
                outcome=fact.outcome.value,
                elapsed=round(fact.elapsed, 3),
                reason=fact.message,
                **_in(after.retry_at, fact.at),
            )
        case LoadRemembered():
            log.info("model.load_remembered", seconds_ago=round(fact.at - fact.started, 1))
        case PingEnded(outcome=PingOutcome.REFUSED):
            if before.refused != after.refused:  # else it says the same every few minutes
                log.warning("model.ping_refused", reason=fact.message)
        case PingEnded(outcome=outcome) if outcome not in (PingOutcome.OK, PingOutcome.SKIPPED):
            log.warning(
                "model.ping_failed",
                outcome=outcome.value,
                seconds=round(fact.seconds, 3),
                reason=fact.message,
            )
        case PrimeEnded(outcome=PrimeOutcome.OK):
            # What is replayed in the place of a ping is as little worth a line as that.
            if not any(primed.opening == fact.opening for primed in before.priming.done):
                log.info(
                    "model.primed",
                    opening=label(fact.opening),
                    seconds=round(fact.seconds, 3),
                    **_given(tokens=fact.tokens),
                )
        case PrimeEnded(outcome=outcome) if outcome is not PrimeOutcome.GIVEN_UP:
            log.warning(
                "model.prime_failed", opening=label(fact.opening), outcome=outcome.value, reason=fact.message
            )
        case UnloadEnded(message=None):
            why = before.letting_go.value if before.letting_go else None
            log.info("model.unloaded", instance=fact.instance_id, **_given(cause=why))
        case UnloadEnded(in_use=False):
            log.warning("model.unload_failed", instance=fact.instance_id, reason=fact.message)
        case DrainStarted():
            log.info("model.draining", in_flight=after.in_flight)
        case InstanceLost():
            log.warning("model.lost", reason=fact.message)
    if after.made_way > before.made_way:
        log.info("model.unloaded", instance=before.instance_id, cause=UnloadCause.ROOM.value)
    if after.evictions > before.evictions:
        cause = after.last_eviction.cause.value if after.last_eviction else None
        log.warning("model.evicted", cause=cause, evictions=after.evictions, **_in(after.retry_at, fact.at))
    if after.priming.useless and not before.priming.useless:
        log.warning("model.priming_stopped", reason=after.priming.useless)
    if after.doubled_at != before.doubled_at:
        log.warning("model.loaded_by_others", reason="a copy came while ours was being loaded")
    if len(after.instances) > max(1, len(before.instances)):
        log.warning("model.copies", instances=len(after.instances))
    if after.wanted is not before.wanted:
        log.info("model.wanted" if after.wanted else "model.released")
    if after.state is not before.state:
        good = after.state in (State.WARM, State.LOADING, State.COLD) or not isinstance(fact, ModelFact)
        tell = log.info if good and after.state is not State.BACKOFF else log.warning
        tell("model.state", state=after.state.value, was=before.state.value, **_given(reason=after.reason))


def _given(**fields: object) -> Mapping[str, object]:
    return {name: value for name, value in fields.items() if value is not None}


def _in(moment: float | None, now: float) -> Mapping[str, object]:
    return {} if moment is None else {"retry_in": round(moment - now, 1)}
