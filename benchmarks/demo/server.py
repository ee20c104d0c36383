"""A `vllm serve` process: started, watched until it is ready, and always stopped."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from benchmarks.demo.errors import DemoError

__all__ = ["Server", "free_port", "tail"]

# Where VLLM_CPU_KVCACHE_SPACE is not set vLLM asks for most of the memory, which fails on a shared machine.
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}
# Seconds that workers get to end after their server has.
WORKER_PATIENCE = 5


def free_port() -> int:
    """A TCP port of this machine that nothing uses now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def tail(path: Path, lines: int = 30) -> str:
    """The last lines of a text file."""
    return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


class Server:
    """One `vllm serve`, as a context manager: ready inside the `with`, gone with all its processes after it.

    Attributes:
        url: of the OpenAI API.
        command: what was started.
        seconds_to_ready: from start to the first healthy answer.
    """

    def __init__(
        self,
        command: list[str],
        log: Path,
        say: Callable[[str], None],
        *,
        port: int | None = None,
        timeout: float = 300,
        progress_every: float = 10,
    ) -> None:
        """Prepare; nothing starts before the `with`.

        Args:
            command: the server's command line; `--host` and `--port` are added.
            log: file that gets what the server writes.
            say: is told what happens, a line at a time.
            port: TCP port; a free one if None.
            timeout: seconds to wait until it is ready.
            progress_every: seconds between lines about waiting.
        """
        self.port = port or free_port()
        self.command = [*command, "--host", "127.0.0.1", "--port", str(self.port)]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        self.seconds_to_ready = 0.0
        self._say = say
        self._timeout = timeout
        self._progress_every = progress_every
        self._process: subprocess.Popen[bytes] | None = None

    @classmethod
    def vllm(cls, model: Path, log: Path, say: Callable[[str], None], *options: str) -> Self:
        """`vllm serve MODEL` from the environment whose Python runs this; in bfloat16 unless `options` say other.

        Without compilation, which would need a C++ compiler that a bare machine may lack.
        """
        vllm = Path(sys.executable).with_name("vllm")
        if not vllm.exists():
            raise DemoError(f"{vllm} is not there; run `make setup` and start this with its Python")
        settings = ("--dtype", "bfloat16", "--max-model-len", "1024", "--max-num-seqs", "4", "--enforce-eager")
        return cls([str(vllm), "serve", str(model), *settings, *options], log, say)

    def __enter__(self) -> Self:
        """Start, and wait until it answers.

        Raises:
            DemoError: it ended by itself, or was not ready in time; the end of its log has been shown.
        """
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as log:
            # A session of its own: Ctrl-C reaches us alone, and one signal to its group ends all that is left.
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **ENVIRONMENT},
                start_new_session=True,
            )
        try:
            self._wait_until_ready(self._process)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop, whatever happened."""
        self.stop()

    def _wait_until_ready(self, process: subprocess.Popen[bytes]) -> None:
        start = time.monotonic()
        next_line = self._progress_every
        while not self._healthy():
            waited = time.monotonic() - start
            if process.poll() is not None:
                self._say(f"the last lines of {self.log}:\n{tail(self.log)}")
                raise DemoError(f"the server ended with status {process.returncode} before it was ready")
            if waited > self._timeout:
                self._say(f"the last lines of {self.log}:\n{tail(self.log)}")
                raise DemoError(f"the server was not ready after {self._timeout:.0f} s")
            if waited >= next_line:
                self._say(f"  {waited:.0f} s, not ready yet")
                next_line += self._progress_every
            time.sleep(0.25)
        self.seconds_to_ready = time.monotonic() - start

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=2) as answer:  # noqa: S310 - our own address
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    @property
    def group(self) -> int:
        """Process id of the running server, and of the process group that its workers are in.

        Raises:
            DemoError: it does not run.
        """
        if self._process is None:
            raise DemoError("the server does not run")
        return self._process.pid

    def poll(self) -> int | None:
        """Exit status of the server, None while it runs."""
        return None if self._process is None else self._process.poll()

    def stop(self, patience: float = 20) -> None:
        """End the server and its workers: asked first, then killed. Does nothing where none runs."""
        process, self._process = self._process, None
        if process is None:
            return
        # The server alone, which ends its workers in order; a signal to all at once fills the log with errors.
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(patience)
            # Workers may outlive their parent for a moment; the group is ours alone.
            deadline = time.monotonic() + WORKER_PATIENCE
            while _signal_group(process.pid, 0) and time.monotonic() < deadline:
                time.sleep(0.1)
        except subprocess.TimeoutExpired:
            pass
        finally:
            _signal_group(process.pid, signal.SIGKILL)
            process.wait()


def _signal_group(group: int, number: int) -> bool:
    """Send a signal (0: none) to a process group; returns whether any of it was there."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)
        return True
    return False
