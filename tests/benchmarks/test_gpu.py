"""`make gpu` without a GPU: its steps are stand-ins, or fail as they should."""

import subprocess
import sys

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu import Step, run, run_step, steps


def python(name, code, timeout=60, **settings):
    return Step(name, [sys.executable, "-c", code], timeout, **settings)


def test_the_last_line_is_reported(tmp_path):
    result = run_step(python("some", "print('one'); print('=== 3 passed ===')"), tmp_path)
    assert (result.name, result.passed, result.what) == ("some", True, "3 passed")
    assert (tmp_path / "some.log").read_text() == "one\n=== 3 passed ===\n"
    failed = run_step(python("some", "import sys; sys.exit('no such thing')"), tmp_path)
    assert (failed.passed, failed.what) == (False, "status 1: no such thing")
    assert run_step(python("some", "pass"), tmp_path).what == "it wrote nothing"


def test_a_step_and_all_it_started_end_in_time(tmp_path):
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(100)'])"
    result = run_step(python("slow", code, timeout=1), tmp_path)
    assert not result.passed
    assert result.what.startswith("not done after 1 s")
    assert result.seconds < 30


def test_what_was_not_made_anew_is_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    (tmp_path / "old.so").write_text("old")
    result = run_step(python("build", "open('new.so', 'w').close()", makes=("old.so", "new.so")), tmp_path)
    assert (result.passed, result.what) == (False, "old.so was not built; the log says why")
    assert run_step(python("build", "open('old.so', 'w').close()", makes=("old.so",)), tmp_path).passed


def test_packages_are_found_beside_the_checkout(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "SITE", tmp_path)
    (tmp_path / "only_there.py").write_text("")
    assert run_step(python("some", "import only_there, benchmarks.gpu, vllm_gqsa"), tmp_path).passed


def test_a_gate_stops_what_follows_and_a_test_does_not(tmp_path):
    good, bad = python("good", "pass"), python("bad", "raise SystemExit(1)")
    results = run([[good], [bad, good], [good]], tmp_path)
    assert [each.passed for each in results] == [True, False, True, True]
    gate = python("gate", "raise SystemExit(1)", gate=True)
    results = run([[gate], [good, good]], tmp_path)
    assert [each.what for each in results[1:]] == ["not run", "not run"]
    assert not any(each.passed for each in results)


def test_steps():
    stages = steps("python3", "/bin/compute-sanitizer")
    assert [[step.name for step in stage] for stage in stages] == [
        ["check"], ["build"], ["test", "memcheck", "racecheck", "synccheck"], ["kernels"],
    ]  # fmt: skip
    # Under ten minutes, whatever hangs.
    assert sum(max(step.timeout for step in stage) for stage in stages) <= 600
    for step in stages[2][1:]:
        assert step.command[:3] == ["/bin/compute-sanitizer", "--tool", step.name]
        assert "--error-exitcode" in step.command
    stages[0][0].command[2].encode()
    compile(stages[0][0].command[2], "check", "exec")


def test_a_missing_sanitizer_is_a_failure(tmp_path):
    step = steps(sys.executable, None)[2][1]
    assert run_step(step, tmp_path).what == "status 1: no compute-sanitizer on PATH or in /usr/local/cuda/bin"


def test_the_selection_finds_every_kernel():
    """For the sanitizers: by pytest itself, on the tests as they are."""
    command = [sys.executable, *gpu.PYTEST, "--collect-only", "-k", gpu.SELECTION]
    found = subprocess.run(command, check=True, capture_output=True, text=True, cwd=gpu.ROOT).stdout
    for name in (
        "test_kernels[gpu-gemv-8-16",
        "test_kernels[gpu-gemm-64-16",
        "test_kernels[gpu-expand-5-16",
        "test_uneven_rows[gpu-gemv-16",
        "test_embedding[gpu-dtype1-16",
        "test_division_by_rows_gives_the_same_result[gpu",
    ):
        assert name in found
    assert 10 < found.count("::") < 40
    assert "[shim" not in found


def test_what_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "NEEDED", ("torch", "no_such_package"))
    result = run_step(steps(sys.executable, None)[0][0], tmp_path)
    assert "status 1: not installed: no_such_package; install them, or" in result.what
    assert "make gpu-site" in result.what


def test_without_a_gpu_nothing_is_built(tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert gpu.main(["--folder", str(tmp_path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("| check | FAILED |")
    assert "sees no CUDA device" in lines[2]
    assert all("| not run |" in line for line in lines[3:9])
    assert (tmp_path / "summary.md").read_text().splitlines() == lines[:9]
