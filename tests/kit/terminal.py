"""A command as somebody sees it who sits in front of it."""

import os
import pty
import select
import subprocess
from pathlib import Path

from tests.kit.live import KEEPALIVE, environment, wait_until


class Terminal:
    """A command in a pseudo-terminal, and all that it has shown."""

    def __init__(self, *words: str, cwd: Path, columns: int = 80, **environ: str) -> None:
        self._ours, theirs = pty.openpty()
        size = {"COLUMNS": str(columns), "LINES": "24", "TERM": "xterm-256color"}
        self.process = subprocess.Popen(
            [*KEEPALIVE, *words],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            cwd=cwd,
            env=environment(**size, **environ),
            start_new_session=True,
        )
        os.close(theirs)
        self.text = ""

    def shows(self, text: str) -> str:
        wait_until(lambda: text in self._look(), f"{text!r} on the terminal")
        return self.text

    def _look(self) -> str:
        while select.select([self._ours], [], [], 0)[0]:
            try:
                piece = os.read(self._ours, 65_536)
            except OSError:
                break
            if not piece:
                break
            self.text += piece.decode(errors="replace")
        return self.text

    def types(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def ended(self) -> int:
        def over() -> bool:
            self._look()
            return self.process.poll() is not None

        wait_until(over)
        self._look()
        os.close(self._ours)
        return self.process.returncode

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
