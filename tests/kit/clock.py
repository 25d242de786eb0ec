"""Real sockets, and a clock that nobody waits for: how long something takes is a number, whatever the machine does.

`@pytest.mark.clock_jumps` runs a test on such a loop. Work takes no time at all there. When nothing is left to do
and nothing more arrives, the clock jumps to the next timer: five heartbeats are five, not "four to seven", and an
hour of them costs a second. For what talks to itself through sockets, all in one thread of one process.
"""

import asyncio
import selectors
import socket
import time
from collections.abc import Callable
from typing import Any


class JumpingSelector(selectors.DefaultSelector):
    """Waits for what is really under way; any further waiting moves the clock."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        #: Threads that work for the loop. Nobody can tell what they will do, so the clock goes as all others do.
        self.threads = 0
        # The kernel delivers on the loopback in order: what was sent before the probe has come when the probe has.
        self._probe, self._echo = (socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2))
        self._echo.bind(("127.0.0.1", 0))
        self._echo.settimeout(1.0)
        self._probe.connect(self._echo.getsockname())

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            return super().select(None)
        if (ready := super().select(0)) or timeout <= 0:
            return ready
        if self.threads:
            began = time.monotonic()
            ready = super().select(timeout)
            self.now += min(timeout, time.monotonic() - began)
            return ready
        self._probe.send(b"?")
        self._echo.recv(1)
        if not (ready := super().select(0)):
            self.now += timeout
        return ready

    def close(self) -> None:
        self._probe.close()
        self._echo.close()
        super().close()


class JumpingLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._jumping = JumpingSelector()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:
        self._jumping.threads += 1
        future = super().run_in_executor(executor, func, *args)
        future.add_done_callback(self._back)
        return future

    def _back(self, _: object) -> None:
        self._jumping.threads -= 1

    async def leap(self, seconds: float) -> None:
        """As if the machine had slept: the clock moves at once, and what was due has then happened.

        Unlike `asyncio.sleep`, which stops at every timer on the way.
        """
        self._jumping.now += seconds
        await asyncio.sleep(0.001)
