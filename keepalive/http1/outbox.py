"""What is written in one turn of the loop leaves together.

A write wakes whoever reads it, and to wake somebody costs more than the write itself. Where many streams have
something to say in one turn, the readers of all of them are nearly always the same process: woken by the first of
these writes, it is still awake when the others come, if those come one right after the other. So the first write of a
turn leaves at once, since it is nearly always the only one, and what is written after it leaves when the turn is over.
"""

import asyncio
import logging
from typing import cast

log = logging.getLogger("keepalive.http1")

#: More than this of one connection does not wait: it costs more to copy than to send.
TOGETHER_BYTES = 65_536


class Outbox:
    """The writes of some connections of a loop."""

    __slots__ = ("busy", "later", "loop")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        #: Somebody has written in this turn.
        self.busy = False
        self.later: list[Sender] = []

    def begin(self) -> None:
        """The first write of a turn."""
        self.busy = True
        self.loop.call_soon(self._end)

    def _end(self) -> None:
        self.busy = False
        later, self.later = self.later, []
        for sender in later:
            data, sender.unsent = sender.unsent, b""
            try:
                if data and not sender.transport.is_closing():
                    sender.transport.write(data)
            except Exception as error:  # noqa: BLE001  one bad connection must not keep what others have to say
                log.error("http1.write_failed", extra={"error": type(error).__name__})


class Sender(asyncio.Protocol):
    """A connection that writes by way of an outbox. Whoever ends its transport flushes it before."""

    __slots__ = ("_outbox", "transport", "unsent")

    transport: asyncio.Transport

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox
        #: What leaves when this turn of the loop is over.
        self.unsent = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def write(self, data: bytes) -> None:
        outbox = self._outbox
        if len(data) > TOGETHER_BYTES:
            self.flush()
            self.transport.write(data)
        elif self.unsent:
            self.unsent += data
            if len(self.unsent) > TOGETHER_BYTES:
                self.flush()
        elif not outbox.busy:
            outbox.begin()
            self.transport.write(data)
        else:
            self.unsent = data
            outbox.later.append(self)

    def flush(self) -> None:
        data, self.unsent = self.unsent, b""
        if data and not self.transport.is_closing():
            self.transport.write(data)
