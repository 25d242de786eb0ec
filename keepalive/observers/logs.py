"""The log: one line per transition, one per load, none per ping that went well.

Event names are constant and dotted, what varies stands in fields. JSON, unless a terminal is watching, or the
journal, which people read, and which knows the time and is told the level in its own way. Lines go through a
bounded queue to a thread of their own: a full disk or a stopped pager must not stop the loop that carries
users' streams, nor its end. Other libraries' records pass too, from WARNING upwards, but only what was known
when the line was written: their tracebacks and second lines quote the input, and a secret may be among it.
"""

import logging
import os
import queue
import select
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TextIO

import structlog

from keepalive.core.facts import (
    ClockJumped,
    Fact,
    InstanceLost,
    LoadEnded,
    LoadOutcome,
    LoadRemembered,
    ModelFact,
    PingEnded,
    PingOutcome,
    PrimeEnded,
    PrimeOutcome,
    UnloadEnded,
)
from keepalive.core.primes import label
from keepalive.core.records import Model, Upstream, UpstreamState
from keepalive.core.states import State

# At 300 bytes a line about 3 MB, when nobody reads.
LINES_WAITING = 10_000
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
    and not that of `sys.stderr`. Lines that do not fit are dropped: the alternative is to wait.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._file = stream.fileno()
        self._lines: queue.Queue[bytes | None] = queue.Queue(LINES_WAITING)
        self._over = False
        self._thread = threading.Thread(target=self._write, name="log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        # Whatever cannot be rendered or does not fit: a lost line is better than a lost request.
        with suppress(Exception):
            self._lines.put_nowait(self.format(record).encode(errors="backslashreplace") + b"\n")

    def end(self) -> None:
        with suppress(queue.Full):
            self._lines.put(None, timeout=LAST_WORDS)
        self._thread.join(LAST_WORDS)
        # What is left is lost: the file may soon be somebody else's.
        self._over = True

    def _write(self) -> None:
        while (line := self._lines.get()) is not None and not self._over:
            # Nobody is there to be told: a terminal that was closed, a full disk.
            with suppress(OSError):
                _write_all(self._file, line)


def _write_all(file: int, line: bytes) -> None:
    while line:
        try:
            line = line[os.write(file, line) :]
        except BlockingIOError:
            # Somebody who shares the terminal has made it non-blocking.
            select.select([], [file], [])


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
    """Log to `stream` from now on; returns what ends it.

    `as_json` None: unless `stream` is a terminal or the journal. `stream` None: nothing is written, by anybody.
    """
    journal = stream is not None and _is_journal(stream)
    root, own = logging.getLogger(), logging.getLogger("keepalive")
    root.handlers[:] = [handler := logging.NullHandler() if stream is None else _Output(stream)]
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

    def stop() -> None:
        root.handlers.remove(handler)
        if isinstance(handler, _Output):
            handler.end()

    return stop


def _renderer(stream: TextIO, *, as_json: bool | None) -> structlog.typing.Processor:
    if as_json or (as_json is None and not stream.isatty()):
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
            log.info("model.unloaded", instance=fact.instance_id)
        case UnloadEnded():
            log.warning("model.unload_failed", instance=fact.instance_id, reason=fact.message)
        case InstanceLost():
            log.warning("model.lost", reason=fact.message)
    if after.evictions > before.evictions:
        cause = after.last_eviction.cause.value if after.last_eviction else None
        log.warning("model.evicted", cause=cause, evictions=after.evictions, **_in(after.retry_at, fact.at))
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
