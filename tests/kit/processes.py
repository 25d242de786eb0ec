"""Several processes in one virtual loop, each of which may be stopped while time goes on for the others.

What runs for a process carries it in its context, as every task and timer that it begins inherits. While it is stopped
whatever comes due for it is put aside, in its order, and runs when it is woken: so a SIGSTOP looks from within.
What lies outside of all processes, a network or a server, runs as `outside` has it.
"""

import asyncio
import contextvars
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any

from tests.kit.world import VirtualLoop

PROCESS: contextvars.ContextVar["Process | None"] = contextvars.ContextVar("process", default=None)


class Process:
    """`slept`: how long its machine was suspended, which its monotonic clock does not count."""

    def __init__(self) -> None:
        self.stopped = False
        self.dead = False
        self.slept = 0.0
        self._since = 0.0
        self._put_aside: list[asyncio.Handle] = []

    def stop(self) -> None:
        if not self.stopped and not self.dead:
            self.stopped = True
            loop = asyncio.get_running_loop()
            self._since = loop.time()
            loop.sift = True  # type: ignore[attr-defined]

    def wake(self, *, suspended: bool = False) -> None:
        if not self.stopped:
            return
        self.stopped = False
        loop = asyncio.get_running_loop()
        if suspended:
            self.slept += loop.time() - self._since
        aside, self._put_aside = self._put_aside, []
        for handle in aside:
            loop._ready.append(handle)  # type: ignore[attr-defined]

    def kill(self) -> None:
        """What was under way is not to be heard of any more: whoever sends anything looks at `dead`."""
        self.dead = True
        self.wake()

    def put_aside(self, handle: asyncio.Handle) -> bool:
        if self.stopped:
            self._put_aside.append(handle)
        return self.stopped

    def run(self, make: Callable[[], Any]) -> Any:
        """Call it as this process."""
        context = contextvars.copy_context()
        context.run(PROCESS.set, self)
        return context.run(make)


class Ready(deque[asyncio.Handle]):
    """What the loop runs next; `_run_once` and `call_soon` append to it, and nothing else does."""

    def append(self, handle: asyncio.Handle) -> None:
        process = handle._context.get(PROCESS)  # type: ignore[attr-defined]
        if process is None or not process.put_aside(handle):
            super().append(handle)


class ProcessLoop(VirtualLoop):
    def __init__(self) -> None:
        super().__init__()
        self._ready = Ready(self._ready)  # type: ignore[has-type]
        self.sift = False

    def _run_once(self) -> None:
        if self.sift:
            # Who was stopped in the last step has something in this one.
            self.sift = False
            for _ in range(len(self._ready)):
                self._ready.append(self._ready.popleft())
        super()._run_once()


def outside(work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    """Begin something that goes on though whoever asked for it is stopped."""
    context = contextvars.copy_context()
    context.run(PROCESS.set, None)
    return asyncio.get_running_loop().create_task(work, context=context)
