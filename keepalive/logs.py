"""The log: one line per transition, one per load, none per ping that went well.

Event names are constant and dotted, what varies stands in fields. JSON, unless a terminal is watching. Lines
go through a bounded queue to a thread of their own: a full disk or a stopped pager must not stop the loop
that carries users' streams. Other libraries' records pass too, from WARNING upwards and without tracebacks
that quote their input.
"""

import logging
import os
import queue
import sys
from collections.abc import Callable, Mapping
from logging.handlers import QueueHandler, QueueListener
from typing import TextIO

import structlog

from keepalive.facts import (
    ClockJumped,
    Fact,
    InstanceLost,
    LoadEnded,
    LoadOutcome,
    LoadRemembered,
    ModelFact,
    PingEnded,
    PingOutcome,
    UnloadEnded,
)
from keepalive.lifecycle import Model, State, Upstream, UpstreamState

# At 300 bytes a line about 3 MB, when nobody reads.
LINES_WAITING = 10_000


# syslog's numbers, which journald takes from the beginning of a line.
PRIORITIES = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}


class _Prioritized(structlog.stdlib.ProcessorFormatter):
    """On every line, since journald makes an entry of each."""

    def format(self, record: logging.LogRecord) -> str:
        priority = PRIORITIES.get(record.levelno, 5)
        return "\n".join(f"<{priority}>{line}" for line in super().format(record).splitlines())


class _Queue(QueueHandler):
    """Drops lines that do not fit: the alternative is to wait."""

    def handleError(self, record: logging.LogRecord) -> None:  # the library's name
        return None


class _QuietServer(logging.Filter):
    """aiohttp logs a malformed request with its bytes, and a secret may be among them."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.exc_info = record.exc_text = None
        record.msg, record.args = "a request could not be handled", ()
        return True


def start(*, level: str, as_json: bool | None, stream: TextIO = sys.stderr) -> Callable[[], None]:
    """Log to `stream` from now on; returns what ends it. `as_json` None: unless `stream` is a terminal or
    the journal.

    The journal knows the time, and is told the level in its own way.
    """
    journal = _is_journal(stream)
    if as_json is None:
        as_json = not stream.isatty() and not journal
    shared: list[structlog.typing.Processor] = [structlog.stdlib.add_log_level]
    if not journal:
        shared.append(structlog.processors.TimeStamper(fmt="iso", utc=True))
    render: list[structlog.typing.Processor]
    if as_json:
        render = [structlog.processors.dict_tracebacks, structlog.processors.JSONRenderer()]
    elif journal:
        render = [structlog.processors.format_exc_info, _plain]
    else:
        colors = stream.isatty()
        render = [structlog.dev.ConsoleRenderer(colors=colors, pad_event_to=18, sort_keys=False)]
    formatter = (_Prioritized if journal else structlog.stdlib.ProcessorFormatter)(
        foreign_pre_chain=[*shared, structlog.stdlib.add_logger_name],
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *render],
    )
    output = logging.StreamHandler(stream)
    output.setFormatter(formatter)
    waiting: queue.Queue[logging.LogRecord] = queue.Queue(LINES_WAITING)
    handler = _Queue(waiting)
    # The record is handed over as it is: both ends are this process, and the formatter wants its fields.
    handler.prepare = lambda record: record  # type: ignore[method-assign]  # the documented hook
    listener = QueueListener(waiting, output)
    logging.raiseExceptions = False  # a broken stderr is no reason to write to stderr
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("keepalive").setLevel(level.upper())
    logging.getLogger("aiohttp.server").addFilter(_QuietServer())
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
    listener.start()

    def stop() -> None:
        listener.stop()
        root.handlers[:] = []

    return stop


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
        case PingEnded(outcome=outcome) if outcome not in (PingOutcome.OK, PingOutcome.SKIPPED):
            log.warning(
                "model.ping_failed",
                outcome=outcome.value,
                seconds=round(fact.seconds, 3),
                reason=fact.message,
            )
        case UnloadEnded(message=None):
            log.info("model.unloaded", instance=fact.instance_id)
        case UnloadEnded():
            log.warning("model.unload_failed", instance=fact.instance_id, reason=fact.message)
        case InstanceLost():
            log.warning("model.lost", reason=fact.message)
    if after.evictions > before.evictions:
        log.warning("model.evicted", evictions=after.evictions, **_in(after.retry_at, fact.at))
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
