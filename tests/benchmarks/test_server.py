"""Starting, watching and stopping a server, with a small HTTP server in vLLM's place."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from benchmarks.demo.errors import DemoError
from benchmarks.demo.server import Server, free_port, tail

# Healthy after a moment; starts a worker that ignores SIGTERM, and writes both process ids to a file.
FAKE = """
import http.server, os, subprocess, sys, time
worker = subprocess.Popen([sys.executable, "-c", "import signal, time; "
    "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"])
open(sys.argv[1], "w").write(f"{os.getpid()} {worker.pid}")
time.sleep(0.5)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(b"{}")
http.server.HTTPServer(("127.0.0.1", int(sys.argv[-1])), Handler).serve_forever()
"""


def is_running(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        return state != "Z"
    except OSError:
        return False


def wait_gone(processes: list[int]) -> bool:
    for _ in range(100):
        if not any(map(is_running, processes)):
            return True
        time.sleep(0.05)
    return False


def make(tmp_path, code, **settings):
    said = []
    command = [sys.executable, "-c", code, str(tmp_path / "ids")]
    return Server(command, tmp_path / "log" / "server.log", said.append, **settings), said


def test_ready_inside_and_gone_after(tmp_path):
    server, said = make(tmp_path, FAKE, progress_every=0.1)
    with server:
        processes = [int(word) for word in (tmp_path / "ids").read_text().split()]
        assert server.seconds_to_ready > 0
        assert all(map(is_running, processes))
    assert wait_gone(processes)
    assert any("not ready yet" in line for line in said)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_gone_after_an_error_inside(tmp_path, error):
    server, _ = make(tmp_path, FAKE)
    with pytest.raises(error), server:
        processes = [int(word) for word in (tmp_path / "ids").read_text().split()]
        raise error
    assert wait_gone(processes)


def test_a_server_that_dies_shows_its_last_words(tmp_path):
    server, said = make(tmp_path, "print('out of luck'); raise SystemExit(7)")
    with pytest.raises(DemoError, match="ended with status 7 before it was ready"), server:
        pytest.fail("must not be entered")
    assert "out of luck" in said[-1]


def test_a_server_that_hangs_is_given_up_and_stopped(tmp_path):
    code = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(600)"
    server, _ = make(tmp_path, code, timeout=1.5)
    with pytest.raises(DemoError, match="not ready after"), server:
        pytest.fail("must not be entered")
    assert wait_gone([int((tmp_path / "ids").read_text())])


def test_environment_of_the_server(tmp_path, monkeypatch):
    monkeypatch.setenv("SOMETHING_OF_MINE", "kept")
    code = (
        "import os; print(os.environ['VLLM_CPU_KVCACHE_SPACE'], os.environ['HF_HUB_OFFLINE'], "
        "os.environ['SOMETHING_OF_MINE'])"
    )
    server, _ = make(tmp_path, code)
    with pytest.raises(DemoError), server:
        pass
    assert tail(server.log) == "1 1 kept"


def test_stop_without_start_does_nothing(tmp_path):
    server, _ = make(tmp_path, FAKE)
    server.stop()


def test_own_process_is_not_in_the_group(tmp_path):
    server, _ = make(tmp_path, FAKE)
    with server:
        process = int((tmp_path / "ids").read_text().split()[0])
        assert os.getpgid(process) != os.getpgid(0)
        os.kill(process, signal.SIGKILL)
    assert wait_gone([process])


def test_free_port_and_tail(tmp_path):
    assert 1024 <= free_port() < 65536
    (tmp_path / "log").write_text("\n".join(map(str, range(100))))
    assert tail(tmp_path / "log", 2) == "98\n99"
