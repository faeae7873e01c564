"""A side of a comparison in a process of its own, which answers a line with a line.

What it needs, what it allocates and what its libraries are set to then leaves the other side alone.
The process says "ready" once it is.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from types import TracebackType


class Worker:
    """A process that is asked; it ends with the block.

    Args:
        name: whose process it is, for messages.
        command: what starts it.
    """

    def __init__(self, name: str, command: Sequence[str]) -> None:
        self.name = name
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)

    def __enter__(self) -> Worker:
        if self._answer() != "ready":
            raise SystemExit(f"{self.name} does not start; its message stands above")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def ask(self, line: str) -> str:
        """Send a line and return the answer."""
        print(line, file=self._process.stdin, flush=True)
        answer = self._answer()
        if not answer:
            raise SystemExit(f"the process of {self.name} ended; its message stands above")
        return answer

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()
