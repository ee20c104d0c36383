"""A process that answers questions, one JSON object a line: both its ends. Standard library only.

Every contestant lives in a process of its own, tied to one core, and waits for its turn. So the rounds of several
contestants can alternate, and what slows the machine down for a while hits all of them alike.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks.errors import BenchmarkError

__all__ = ["Worker", "serve"]

Message = dict[str, Any]
# vLLM takes its time to end; there is nothing it would lose.
_PATIENCE = 1


def serve(prepare: Callable[[Message], tuple[Message, Callable[[Message], Message]]]) -> None:
    """The worker's end: prepare, say so, then answer until the questions end.

    What anything else writes to standard output goes to standard error, so that it cannot get between the answers.

    Args:
        prepare: gets the object on the command line; returns what to report as ready, and the answering function.
    """
    settings = json.loads(sys.argv[1])
    if "core" in settings and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {settings["core"]})
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    ready, answer = prepare(settings)
    print(json.dumps(ready), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=answers, flush=True)


class Worker:
    """The other end, as a context manager: started inside the `with`, gone after it.

    Attributes:
        name: for messages.
        ready: what the worker reported when it was prepared.
    """

    def __init__(
        self,
        name: str,
        python: Path,
        module: str,
        settings: Message,
        log: Path,
        environment: dict[str, str],
    ) -> None:
        """Prepare; nothing starts before the `with`.

        Args:
            name: for messages.
            python: interpreter to run it with.
            module: that calls :func:`serve`.
            settings: for its `prepare`.
            log: file that gets everything it writes but its answers.
            environment: added to this process's own.
        """
        self.name = name
        self.ready: Message = {}
        self._command = [str(python), "-m", module, json.dumps(settings)]
        self._log = log
        self._environment = environment
        self._process: subprocess.Popen[str] | None = None

    def start(self, timeout: float) -> None:
        """Start, and wait until it is ready.

        Raises:
            BenchmarkError: it died or was not ready in time.
        """
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("w", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=Path(__file__).resolve().parents[1],
                env={**os.environ, **self._environment},
            )
        self.ready = self._read(timeout)

    def ask(self, question: Message, timeout: float = 600) -> Message:
        """Put a question and wait for the answer.

        Raises:
            BenchmarkError: it died or did not answer in time.
        """
        assert self._process is not None, "not started"
        assert self._process.stdin is not None
        try:
            print(json.dumps(question), file=self._process.stdin, flush=True)
        except BrokenPipeError as error:
            raise self._failure("died") from error
        return self._read(timeout)

    def _read(self, timeout: float) -> Message:
        assert self._process is not None
        assert self._process.stdout is not None
        deadline = time.monotonic() + timeout
        # An answer is one short line, written at once: when anything is readable, the line is.
        if not select.select([self._process.stdout], [], [], max(0, deadline - time.monotonic()))[0]:
            raise self._failure(f"said nothing for {timeout:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise self._failure(self._end())
        message: Message = json.loads(line)
        return message

    def _end(self) -> str:
        """How it ended: a signal, as where memory runs out, leaves no word of its own in the log."""
        assert self._process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_PATIENCE)
        status = self._process.returncode or 0
        return f"was killed by {signal.Signals(-status).name}; its last words" if status < 0 else "died"

    def _failure(self, what: str) -> BenchmarkError:
        lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        last = lines[-1].strip() if lines else "it wrote nothing"
        return BenchmarkError(f"{self.name} {what}: {last} (log: {self._log})")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End it: no more questions, then killed. Does nothing where none runs."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        try:
            process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
