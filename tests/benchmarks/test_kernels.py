"""The GPU benchmark on the CPU: the CUDA kernels over the shim, everything else with stand-ins."""

import contextlib
import dataclasses
import json
import sys
import time

import pytest
import torch
import torch.nn.functional as F

from benchmarks.errors import BenchmarkError
from benchmarks.gptq import dequantize
from benchmarks.kernels import __main__ as command, contestants, external, report, timing, worker
from benchmarks.kernels.cases import CASES, QUICK_CASES, TAKING_PART, TOKENS, Case, Weight
from benchmarks.kernels.plot import plot
from benchmarks.kernels.timing import copies, measure
from tests.cuda.build import COMPILER, build_shim
from vllm_gqsa.kernels import cuda
from vllm_gqsa.kernels.slab import SlabMatrix

CPU = torch.device("cpu")


class FakeDevice:
    """Runs calls at once; its time only passes by ``cost`` seconds a launch."""

    torch_device = CPU

    def __init__(self, cost=1e-5, cache_bytes=1 << 16):
        self.cost, self.cache_bytes = cost, cache_bytes
        self.launches, self.replays, self._now = [], 0, 0.0

    def capture(self, calls):
        calls = list(calls)
        self.launches.append(len(calls))
        results = [call() for call in calls]

        def replay():
            self.replays += 1
            self._now += self.cost * len(calls)

        return replay, results[-1]

    def seconds(self, work):
        before = self._now
        work()
        return self._now - before


# -- timing ------------------------------------------------------------------------------------------------


def test_copies_fill_the_cache_four_times():
    assert copies(10, 1000) == 400
    assert copies(4096 * 4096 // 4, 60 << 20) * 4096 * 4096 // 4 >= 4 * (60 << 20)
    assert copies(1 << 30, 60 << 20) == 2


@pytest.mark.parametrize(("count", "launches"), [(1, 100), (7, 105), (60, 120), (130, 130)])
def test_every_copy_is_launched_equally_often(count, launches):
    called = []
    calls = [lambda i=i: called.append(i) or torch.zeros(1) for i in range(count)]
    device = FakeDevice()
    measure(device, calls, 1, 0.01, lambda result: None)
    assert device.launches == [launches]
    assert called == [i % count for i in range(launches)]


def test_a_figure_is_seconds_a_launch():
    device = FakeDevice(cost=2e-5)
    times = measure(device, [lambda: torch.zeros(1)], 4000, 0.021, lambda result: None)
    assert times.median == pytest.approx(2e-5)
    assert len(times.rounds) == 10  # of 2 ms each
    assert device.replays == 15 + 10  # 30 ms of warming up
    assert times.gigabytes_per_second == pytest.approx(0.2)


@pytest.mark.parametrize(("cost", "rounds"), [(1e-7, 50), (1e-3, 5), (1e-2, 3)])
def test_rounds_are_bounded(cost, rounds):
    times = measure(FakeDevice(cost), [lambda: torch.zeros(1)], 1, 0.02, lambda result: None)
    assert len(times.rounds) == rounds


def test_the_result_of_the_replay_is_checked():
    def wrong(result):
        raise BenchmarkError(f"got {result.item()}")

    with pytest.raises(BenchmarkError, match="got 3.0"):
        measure(FakeDevice(), [lambda: torch.tensor(3.0)], 1, 0.01, wrong)


# -- cases -------------------------------------------------------------------------------------------------


def test_cases_cover_what_was_asked_for():
    shapes = {(case.weight.n, case.weight.k): set() for case in CASES if case.part == "layers"}
    for case in CASES:
        if case.part == "layers":
            shapes[case.weight.n, case.weight.k].add(case.m)
    assert {(8192, 8192), (57344, 8192), (22016, 4096), (28672, 4096), (37888, 3584)} <= set(shapes)
    assert all(tokens == set(TOKENS) for tokens in shapes.values())
    assert {case.weight.sparsity for case in CASES if case.part == "sparsity"} == {0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8}
    assert {case.weight.rows for case in CASES if case.part == "division"} == {"even", "skewed"}
    for cases in (CASES, QUICK_CASES):
        assert len(set(cases)) == len(cases)
        assert {case.part for case in cases} == set(TAKING_PART)
        groups = [(group[0].part, group[0].weight) for group in command._shapes(cases)]
        assert len(set(groups)) == len(groups), "cases of one weight must stand together"


def test_every_contestant_has_a_builder():
    names = {name for names in TAKING_PART.values() for name in names}
    assert names == set(contestants.BUILDERS | external.BUILDERS)


# -- weights -----------------------------------------------------------------------------------------------


def test_random_matrices():
    even = contestants.synthesize(Weight(64, 512, 0.25), CPU)
    even.validate()
    assert even.nnz == 64 * 24
    skewed = contestants.synthesize(Weight(2048, 4096, rows="skewed"), CPU)
    skewed.validate()
    lengths = skewed.crow_indices.diff().float()
    assert lengths.mean() == pytest.approx(128, rel=0.03)
    assert lengths.std() == pytest.approx(0.3 * 128, rel=0.1)
    assert lengths.min() >= 1


def test_marlin_scales_are_in_the_order_of_vllm():
    pytest.importorskip("vllm")
    from vllm.model_executor.layers.quantization.utils.marlin_utils import marlin_permute_scales
    from vllm.scalar_type import scalar_types

    scales = torch.randn(3, 192)
    assert torch.equal(external.permute_scales(scales), marlin_permute_scales(scales, 384, 192, 128))
    assert scalar_types.uint4b8.id == external.UINT4B8


def test_marlin_is_called_by_the_names_of_its_arguments(monkeypatch):
    """vLLM 0.25 and 0.32 want different arguments; both get theirs."""
    with contextlib.ExitStack() as stack:
        library = stack.enter_context(torch.library._scoped_library("gqsa_test", "DEF"))
        library.define("old(Tensor b_q_weight, Tensor perm, SymInt size_k, SymInt size_n, Tensor? c_or_none) -> Tensor")
        library.define("new(Tensor b_q_weight, SymInt size_k) -> Tensor")
        library.define("newer(Tensor b_q_weight, int moon) -> Tensor")
        library.impl("old", lambda weight, perm, size_k, size_n, c: weight * size_k + size_n, "CPU")
        library.impl("new", lambda weight, size_k: weight * size_k, "CPU")
        values = {"b_q_weight": torch.ones(1), "perm": torch.ones(1), "size_k": 5, "size_n": 7, "c": None}
        assert external._call_by_name(torch.ops.gqsa_test.old, values).item() == 12
        assert external._call_by_name(torch.ops.gqsa_test.new, values).item() == 5
        with pytest.raises(BenchmarkError, match="has changed: it wants moon"):
            external._call_by_name(torch.ops.gqsa_test.newer, values)


def test_what_is_not_installed_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(external.importlib.util, "find_spec", lambda name: None)
    external._load_marlin.cache_clear()
    found = external.missing()
    assert set(found) == {"Marlin", "gemlite W4", "gemlite W2"}
    assert all(reason.startswith("not installed: ") for reason in found.values())
    broken = tmp_path / "library.so"
    broken.write_text("no library")
    for path, message in ((broken, "cannot be loaded"), (tmp_path / "missing.so", "is no file")):
        monkeypatch.setenv(external.MARLIN_LIBRARY, str(path))
        external._load_marlin.cache_clear()
        assert message in external.missing()["Marlin"]
    external._load_marlin.cache_clear()


# -- the worker --------------------------------------------------------------------------------------------


@pytest.fixture
def bench(monkeypatch):
    """A worker's bench on the CPU: the CUDA kernels run over the shim."""
    if COMPILER is None:
        pytest.skip("needs g++")
    monkeypatch.setattr(cuda, "_LIBRARY", build_shim())
    cuda._library.cache_clear()
    cuda.device_of.cache_clear()
    monkeypatch.setattr(timing, "LAUNCHES", 4)
    yield worker.Bench(FakeDevice(cache_bytes=1 << 12), 0.001, torch.float16)
    monkeypatch.undo()
    cuda._library.cache_clear()
    cuda.device_of.cache_clear()


def ask(bench, contestant, m=1, **weight):
    weight = dataclasses.asdict(Weight(**{"n": 96, "k": 256, **weight}))
    return json.loads(json.dumps(bench.answer({"contestant": contestant, "weight": weight, "m": m})))


@pytest.mark.parametrize(("contestant", "m", "kernel"), [
    ("GQSA", 1, "gemv"), ("GQSA", 16, "gemm"), ("GQSA", 70, "expand"), ("GQSA gemv", 9, "gemv"),
    ("GQSA gemv by rows", 2, "gemv"), ("GQSA gemm", 3, "gemm"), ("GQSA expand", 4, "expand"), ("cuBLAS fp16", 5, ""),
])  # fmt: skip
@pytest.mark.parametrize("rows", ["even", "skewed"])
def test_contestants_are_right(bench, contestant, m, kernel, rows):
    found = ask(bench, contestant, m, rows=rows)
    assert "failed" not in found
    assert found["kernel"] == kernel
    assert found["error"] < 1e-3
    assert found["microseconds"]["median"] == pytest.approx(10)


def test_bfloat16_is_of_ours_alone(bench):
    bench.dtype = torch.bfloat16
    assert 1e-4 < ask(bench, "GQSA")["error"] < 5e-3
    assert ask(bench, "cuBLAS fp16")["error"] < 1e-3


def test_bytes_are_those_of_the_tensors_that_a_kernel_reads(bench):
    weight = Weight(96, 256)
    packed = SlabMatrix.pack(contestants.synthesize(weight, CPU))
    unread = packed.crow_indices.nbytes + packed.lanes.nbytes + packed.counters.nbytes
    size = sum(tensor.nbytes for tensor in packed.tensors().values()) - unread
    found = ask(bench, "GQSA")
    assert found["bytes"] == size
    # Half of the groups, 10 bytes and a column each; heads, pointers and rows beside them.
    assert size == pytest.approx(96 * 8 * 11, rel=0.15)
    assert found["copies"] == copies(size, 1 << 12)
    assert ask(bench, "cuBLAS fp16")["bytes"] == 2 * 96 * 256


def test_a_wrong_result_is_a_row(bench, monkeypatch):
    monkeypatch.setattr(contestants, "linear_cuda", lambda x, *rest: F.pad(x, (0, 96 - 256)))
    found = ask(bench, "GQSA gemv")
    assert found["failed"].startswith("wrong result: relative error ")
    assert found["again"]
    assert not found["fatal"]
    monkeypatch.setattr(contestants, "linear_cuda", lambda x, *rest: torch.full((1, 96), torch.nan))
    assert "relative error nan" in ask(bench, "GQSA gemv")["failed"]


def test_a_kernel_that_is_not_there_is_a_row(bench):
    # A CPU build of torch has neither of these for tensors that are not on a GPU.
    for contestant in ("torch INT4", "torch 2:4", "Marlin"):
        found = ask(bench, contestant)
        assert found["failed"].startswith("making the weight: ")
        assert not found["again"]
    assert "microseconds" in ask(bench, "cuBLAS fp16")


def test_too_many_tokens_are_left_out(bench, monkeypatch):
    built = contestants.BUILDERS["cuBLAS fp16"]

    def builder(*arguments):
        return dataclasses.replace(built(*arguments), most_tokens=4)

    monkeypatch.setitem(contestants.BUILDERS, "cuBLAS fp16", builder)
    assert ask(bench, "cuBLAS fp16", 5)["failed"] == "left out: made for at most 4 tokens"
    assert "microseconds" in ask(bench, "cuBLAS fp16", 4)


def test_weights_are_made_once_for_all_tokens(bench, monkeypatch):
    made = []
    monkeypatch.setattr(contestants, "synthesize", lambda *arguments, f=contestants.synthesize: (
        made.append(1) or f(*arguments)))  # fmt: skip
    for m in (1, 2, 16):
        ask(bench, "GQSA", m)
    assert len(made) == 1
    ask(bench, "GQSA", 1, n=64)
    assert len(made) == 2


def test_limits(monkeypatch):
    monkeypatch.setattr(worker, "_MATRIX", 64)
    device = FakeDevice(cost=1e-3, cache_bytes=1 << 12)
    found = worker.limits(device, 0.01, chunk=1 << 12, matrix=64)
    assert found["read_bytes_per_second"] == pytest.approx((1 << 12) / 1e-3)
    assert found["read_loop"] in found["read_rates"]
    assert found["flops"] == pytest.approx(2 * 64**3 / 1e-3)
    assert found["launch_microseconds"] == pytest.approx(1000)


def test_torchs_int4_stands_for_its_weight():
    """By torch's own op for the CPU, which differs from that for GPUs in the packing alone."""
    codes, both, dense = contestants.torch_int4_weight(Weight(64, 256), CPU)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 2)
    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, contestants.INT4_GROUP, both)
    expected = F.linear(x.float(), dense)
    assert (found.float() - expected).norm() < worker.TOLERANCE[torch.bfloat16] * expected.norm()


def test_marlins_weight_is_that_of_gptq():
    from benchmarks.gptq import gptq_tensors

    codes, scales = contestants.quantized(Weight(64, 256), 4, 128, torch.float16, CPU)
    packed = gptq_tensors(codes.t().int(), scales.t())["qweight"]
    unpacked = torch.stack([packed >> 4 * i & 15 for i in range(8)], 1).flatten(0, 1)
    assert torch.equal(unpacked.t(), codes.int())
    dense = (codes.float() - 8) * scales.float().repeat_interleave(128, 1)
    assert torch.equal(dense, dequantize(codes.t().int(), scales.t()))


# -- the race ----------------------------------------------------------------------------------------------


class FakeWorker:
    """Answers as told; ``cuBLAS fp16`` kills it."""

    def __init__(self, answers, log):
        self.ready = {"missing": {"Marlin": "not installed: no"}}
        self.answers, self.log, self.stopped = answers, log, False

    def ask(self, question, timeout):
        self.log.append((question["contestant"], question["m"]))
        answer = self.answers.get(question["contestant"], {"microseconds": {"median": 1.0}})
        if isinstance(answer, Exception):
            raise answer
        return answer

    def stop(self):
        self.stopped = True


def race(answers):
    log, made, said = [], [], []

    def start():
        made.append(FakeWorker(answers, log))
        return made[-1]

    return command.Race(start, said.append), made, log, said


GROUP = [Case("layers", "some", "o", Weight(64, 256), m) for m in (1, 2)]


def test_one_contestant_after_the_other():
    running, made, log, _ = race({})
    assert running.run(GROUP, time.monotonic() + 60) == 0
    names = [name for name in TAKING_PART["layers"] if name != "Marlin"]
    assert log == [(name, m) for name in names for m in (1, 2)]
    assert len(made) == 1
    assert {"n", "k", "m", "model", "part", "contestant", "microseconds"} <= set(running.rows[0])
    assert "weight" not in running.rows[0]


def test_a_process_that_dies_is_replaced_and_the_rest_goes_on():
    running, made, log, said = race({"cuBLAS fp16": BenchmarkError("the GPU died: illegal access")})
    running.run(GROUP, time.monotonic() + 60)
    assert [each.stopped for each in made] == [True, False]
    assert log.count(("cuBLAS fp16", 2)) == 0
    rows = {(row["contestant"], row["m"]): row for row in running.rows}
    for m in (1, 2):
        assert rows["cuBLAS fp16", m]["failed"] == "the GPU died: illegal access"
        assert "microseconds" in rows["torch 2:4", m]
    assert "illegal access" in said[0]


def test_a_lost_device_needs_a_new_process():
    lost = {"failed": "running: illegal memory access", "again": True, "fatal": True}
    _, made, log, _ = running = race({"torch INT4": lost})
    running[0].run(GROUP, time.monotonic() + 60)
    assert len(made) == 3
    assert log.count(("torch INT4", 2)) == 1


def test_the_time_ends_it():
    running, _, log, _ = race({})
    assert running.run(GROUP, time.monotonic() - 1) == 2 * 6
    assert log == []


# -- the report --------------------------------------------------------------------------------------------

MACHINE = {
    "gpu": "Some GPU", "capability": "9.0", "multiprocessors": 132, "cache_bytes": 60 << 20, "processor": "Some CPU",
    "versions": {"torch": "2.11.0", "Triton": None}, "read_bytes_per_second": 4e12, "read_loop": "sum",
    "flops": 8e14, "launch_microseconds": 1.5, "missing": {"Marlin": "not installed: there is no package vllm"},
}  # fmt: skip


def row(case, contestant, microseconds, size, kernel=""):
    fields = dataclasses.asdict(case)
    times = {"median": microseconds, "p10": microseconds, "p90": microseconds, "replays": 5}
    return {
        **fields.pop("weight"), **fields, "contestant": contestant,
        "microseconds": times, "bytes": size, "kernel": kernel, "error": 1e-4,
    }  # fmt: skip


def document(rows):
    effort = {"mode": "quick", "dtype": "float16"}
    whole = {"format": 1, "date": "today", "seconds": 60.0, "effort": effort, "left_out": 0, "machine": MACHINE}
    return {**whole, "rows": rows}


def full_document():
    rows = []
    for case in QUICK_CASES:
        for name in TAKING_PART[case.part]:
            size = case.weight.n * case.weight.k * (2 if name == "cuBLAS fp16" else 0.34)
            kernel = {"GQSA": "gemv", "torch 2:4": "CUSPARSELT"}.get(name, "")
            rows.append(row(case, name, 3 + 1e6 * size / 2e12, size, kernel))
    failed = {**rows[2], "failed": "running: out of | memory"}
    del failed["microseconds"]
    return document([*rows[:2], failed, *rows[3:]])


def test_the_limit_is_bytes_or_products():
    case = Case("layers", "some", "o", Weight(4096, 4096), 1)
    few = row(case, "GQSA", 10.0, 4_000_000)
    assert report.limit_microseconds(few, MACHINE) == pytest.approx(1e6 * (4_000_000 + 2 * 8192) / 4e12)
    assert report.share(few, MACHINE) == pytest.approx(0.1, rel=0.01)
    many = row(dataclasses.replace(case, m=2048), "GQSA", 100.0, 4_000_000)
    assert report.limit_microseconds(many, MACHINE) == pytest.approx(1e6 * 2 * 2048 * 4096**2 / 8e14)


def test_report():
    text = report.markdown(full_document())
    assert "| Llama-3-8B | gate_up | 28672 x 4096 | 1 | gemv |" in text
    assert "GQSA 2.72, cuBLAS fp16 16.00" in text
    assert "torch 2:4 by CUSPARSELT" in text
    assert "| torch INT4 | running: out of / memory | 4096 x 4096, M = 1 |" in text
    assert "| Marlin | not installed: there is no package vllm | all |" in text
    # 3 microseconds and 2 TB/s went in.
    assert "| GQSA | 6 | 3.0 | 2.00 |" in text
    for title in ("Layers", "Division", "Choice", "Sparsity", "Group size", "Fixed time", "Not measured"):
        assert f"## {title}" in text
    assert "left out" not in text
    assert "**7 figures were left out" in report.markdown({**full_document(), "left_out": 7})


def test_speedups_are_of_one_case():
    case = Case("layers", "some", "o", Weight(64, 256))
    found = document([row(case, "GQSA", 5.0, 10), row(case, "cuBLAS fp16", 20.0, 10)])
    ((_, rows),) = report.cases(found, "layers")
    assert report.speedup(rows, "GQSA", "cuBLAS fp16") == 4
    assert report.speedup(rows, "GQSA", "Marlin") is None
    assert "| 20.0 (0 %) | 4.00 |" in report.markdown(found)


def test_fit():
    assert report.fit([(1, 5), (2, 7), (4, 11)]) == pytest.approx((3, 2))
    assert report.fit([(1, 5), (1, 6), (2, 7)]) is None


@pytest.mark.parametrize("whole", [True, False])
def test_picture(tmp_path, whole):
    pytest.importorskip("matplotlib")
    assert plot(full_document() if whole else document([]), tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_without_matplotlib_there_is_no_picture(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert not plot(full_document(), tmp_path / "picture.png")


# -- the command -------------------------------------------------------------------------------------------


def test_report_of_a_file(tmp_path, capsys):
    path = tmp_path / "gpu-some.json"
    command.write(full_document(), path)
    assert command.main(["--report", str(path)]) == 0
    assert "| Llama-3-8B | gate_up |" in capsys.readouterr().out
    assert path.with_suffix(".md").read_text().startswith("# GPU kernels: Some GPU\n")
    assert not path.with_suffix(".partial").exists()


@pytest.mark.parametrize("content", [None, "no json", "{}", '{"format": 1, "machine": {}}', "[]"])
def test_a_file_that_is_none(tmp_path, capsys, content):
    path = tmp_path / "some.json"
    if content is not None:
        path.write_text(content)
    assert command.main(["--report", str(path)]) == 1
    assert str(path) in capsys.readouterr().err


def test_bad_arguments(tmp_path, capsys):
    with pytest.raises(SystemExit):
        command.main(["--dtype", "float64"])
    assert command.main(["--marlin", str(tmp_path / "none.so")]) == 1
    assert "none.so: there is no such file" in capsys.readouterr().err


def test_without_a_gpu_it_says_so(tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    log = tmp_path / "log"
    assert command.main(["--quick", "--results", str(tmp_path), "--log", str(log)]) == 1
    assert "torch sees no CUDA device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [log]


def test_a_run(tmp_path, monkeypatch, capsys):
    """All of the command with a stand-in for the process that has the GPU."""
    answers = {"GQSA": {"microseconds": {"median": 2.0}, "bytes": 1000, "kernel": "gemv"}}
    hopeless = {"failed": "making the weight: no", "again": False}
    answers |= {"torch INT4": hopeless, "torch 2:4": hopeless}

    class Ready(FakeWorker):
        def __init__(self, *arguments):
            super().__init__(answers, [])
            self.answers = {"cuBLAS fp16": {**answers["GQSA"], "kernel": ""}, **answers}
            self.ready = {**MACHINE, "missing": dict.fromkeys(("Marlin", "gemlite W4", "gemlite W2"), "not installed")}

        def start(self, timeout): ...

    monkeypatch.setattr(command, "Worker", Ready)
    monkeypatch.setattr(command, "QUICK_CASES", (*GROUP, Case("sparsity", "some", "o", Weight(64, 256))))
    monkeypatch.setattr(command, "_BEGIN", time.monotonic())  # of the command, not of pytest
    assert command.main(["--quick", "--results", str(tmp_path)]) == 0
    written = json.loads((tmp_path / "gpu-some-gpu.json").read_text())
    assert len(written["rows"]) == 2 * 4 + 2
    assert written["left_out"] == 0
    assert "gpu-some-gpu.md" in capsys.readouterr().out
    assert "| Marlin | not installed | all |" in (tmp_path / "gpu-some-gpu.md").read_text()
    monkeypatch.setattr(command, "_BEGIN", time.monotonic() - 1000)
    assert command.main(["--quick", "--results", str(tmp_path)]) == 1
    assert "nothing could be measured" in capsys.readouterr().err
