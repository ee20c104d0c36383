"""A few hundred cases of the fuzzer on every run, and that the fuzzer itself notices what it is there for."""

import os
import time

import pytest

from tests.fuzz import targets
from tests.fuzz.__main__ import fuzz
from tests.fuzz.base import build
from tests.fuzz.worker import run_case
from vllm_gqsa.format import CheckpointReader
from vllm_gqsa.kernels.cpu import PackedMatrix


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return list(build(tmp_path_factory.mktemp("fuzz") / "good"))


def assert_telling(outcomes, least):
    """All ended well, and enough of them each way."""
    assert [each for each in outcomes if each.failed] == []
    results = [each.result for each in outcomes]
    assert min(results.count("loaded"), results.count("refused")) > least, "mutations that prove nothing"


@pytest.mark.parametrize(("target", "cases"), [("read", 300), ("verify", 60)])
def test_a_slice_of_the_fuzzer(bases, tmp_path, target, cases):
    assert_telling(fuzz(target, 0, cases, bases, tmp_path), cases / 10)


@pytest.mark.slow
@pytest.mark.parametrize(("target", "cases"), [("transformers", 60), ("vllm", 20)])
def test_a_slice_of_the_fuzzer_through_the_engines(bases, tmp_path, target, cases):
    assert_telling(fuzz(target, 1, cases, bases, tmp_path), cases / 20)


def test_a_case_is_the_same_every_time(bases, tmp_path):
    first, again = (run_case("read", 0, 7, bases, tmp_path) for _ in range(2))
    assert (first.did, first.result, first.says) == (again.did, again.result, again.says)


def spoil(monkeypatch, bases, tmp_path, change):
    """How the unspoilt checkpoint ends where the product is broken by ``change(reader)``."""
    monkeypatch.setattr(
        targets, "TARGETS", {"read": lambda folder, shapes: change(folder) or targets.read(folder, shapes)}
    )
    return run_case("read", 0, -1, bases, tmp_path)


def test_the_fuzzer_notices_a_wrong_weight(monkeypatch, bases, tmp_path):
    right = CheckpointReader.matrix

    def wrong(self, module, expect):
        matrix = right(self, module, expect)
        matrix.qweight[0, 0] ^= 1
        return matrix

    monkeypatch.setattr(CheckpointReader, "matrix", wrong)
    outcome = run_case("read", 0, -1, bases, tmp_path)
    assert outcome.failed
    assert "differs from what the file holds" in outcome.says


def test_the_fuzzer_notices_an_unclear_error(monkeypatch, bases, tmp_path):
    outcome = spoil(monkeypatch, bases, tmp_path, lambda _: {}["key"])
    assert (outcome.failed, outcome.result) == (True, "KeyError")


def test_the_fuzzer_notices_what_is_executed(monkeypatch, bases, tmp_path):
    outcome = spoil(monkeypatch, bases, tmp_path, lambda _: (tmp_path / "canary").mkdir())
    assert (outcome.failed, outcome.result) == (True, "EXECUTED")


def test_the_fuzzer_notices_a_broken_matrix_on_its_way_to_the_kernels(monkeypatch, bases, tmp_path):
    def pack(folder):
        matrix = CheckpointReader(folder).matrix("model.layers.0.mlp.up_proj", (96, 64))
        matrix.crow_indices[-1] += 1
        PackedMatrix.pack(matrix)

    outcome = spoil(monkeypatch, bases, tmp_path, pack)
    assert outcome.failed
    assert "a broken matrix reached the native kernels" in outcome.says


def test_the_fuzzer_notices_memory(monkeypatch, bases, tmp_path):
    outcome = spoil(monkeypatch, bases, tmp_path, lambda _: len(bytearray(os.urandom(1 << 20) * 100)) == 0)
    assert outcome.memory > 90 << 20


@pytest.mark.parametrize(
    ("does", "says"), [("os.abort()", "crash: exit code -6"), ("time.sleep(60)", "hangs: nothing")]
)
def test_the_fuzzer_notices_crashes_and_hangs(monkeypatch, tmp_path, does, says):
    body = f"connection.send({GOOD!r}); connection.recv(); {does}"
    source = f"import os, time\ndef serve(connection, *_):\n    {body}\n"
    (tmp_path / "broken_worker.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    import broken_worker

    monkeypatch.setattr("tests.fuzz.__main__.serve", broken_worker.serve)
    monkeypatch.setattr("tests.fuzz.__main__.SECONDS", {"read": 1.0})
    start = time.monotonic()
    (outcome,) = fuzz("read", 0, 1, [], tmp_path)
    assert outcome.failed
    assert outcome.case == 0
    assert outcome.result.startswith(says)
    assert time.monotonic() - start < 30


GOOD = {"case": -2, "did": "nothing", "result": "loaded"}
