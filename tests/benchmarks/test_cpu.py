"""The CPU benchmarks' own parts: statistics, packing, processes, report; on shapes that take no time."""

import dataclasses
import itertools
import json
import os
import sys
import time
import types

import pytest
import torch

from benchmarks import dummy
from benchmarks.cpu import __main__ as command, engines, kernels, llamacpp, machine, models, report, timing, vllm_worker
from benchmarks.cpu.int4 import Int4Linear
from benchmarks.cpu.timing import Contestant
from benchmarks.errors import BenchmarkError
from benchmarks.gptq import dequantize, gptq_tensors, round_to_nearest
from benchmarks.machine import processor, slug, versions
from benchmarks.protocol import Worker
from benchmarks.times import Times
from tests.helpers import make_dense
from vllm_gqsa.format import GqsaConfig, GroupSparseMatrix

TINY = {**models.ONE_B, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 32}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}


# -- timing ------------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    """A clock that only moves when a contestant works; returns the maker of such contestants and what was called."""
    now = [0.0]
    called = []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def contestant(name, seconds, copies=3, **settings):
        def work(copy):
            called.append((name, copy, os.environ.get("GQSA_CPU_ACT")))
            now[0] += seconds

        calls = [lambda copy=copy: work(copy) for copy in range(copies)]
        return Contestant(name, calls, 1000, **settings)

    return contestant, called


def test_contestants_take_turns_and_every_copy_is_used(clock):
    contestant, called = clock
    times = timing.race([contestant("fast", 0.001, 5), contestant("slow", 0.004)], 1.0)
    assert times["fast"].rounds == pytest.approx([0.001] * len(times["fast"].rounds))
    assert timing.ratio(times["fast"], times["slow"]) == pytest.approx(4)
    # Of a burst: two calls of the fast one, one of the slow one; a second holds 166 such rounds.
    assert len(times["fast"].rounds) == len(times["slow"].rounds) == 166
    raced = [(name, copy) for name, copy, _ in called[-3 * 166 :]]
    assert raced[:9] == [
        *(("fast", 0), ("fast", 1), ("slow", 0)),
        *(("fast", 2), ("fast", 3), ("slow", 1)),
        *(("fast", 4), ("fast", 0), ("slow", 2)),
    ]


def test_slow_contestants_get_few_rounds(clock):
    contestant, called = clock
    times = timing.race([contestant("slow", 3.0), contestant("fast", 0.01)], 1.0)
    assert len(times["slow"].rounds) == timing.SLOW_ROUNDS
    assert sum(name == "slow" for name, *_ in called) == timing.SLOW_ROUNDS + 2


def test_environment_holds_in_its_own_turn_only(clock, monkeypatch):
    monkeypatch.setenv("GQSA_CPU_ACT", "before")
    contestant, called = clock
    timing.race([contestant("plain", 0.5), contestant("int8", 0.5, environment=machine.INT8)], 0.0)
    assert {(name, value) for name, _, value in called} == {("plain", "before"), ("int8", "int8")}
    assert os.environ["GQSA_CPU_ACT"] == "before"


def test_statistics():
    ours, other = Times((1.0, 2.0, 10.0), 4_000_000_000), Times((3.0, 4.0, 10.0), 1)
    assert ours.median == 2
    assert (ours.quantile(0.1), ours.quantile(0.9), ours.quantile(1)) == (1, 10, 10)
    assert ours.gigabytes_per_second == 2
    assert timing.ratio(ours, other) == 2  # of 3, 2 and 1, not of the medians' quotient by chance
    assert timing.ratio(Times((1.0, 1.0, 4.0), 1), Times((5.0, 5.0, 1.0), 1)) == 5


# -- machine -----------------------------------------------------------------------------------------------


def test_the_largest_cache_counts(tmp_path):
    for i, size in enumerate(("48K", "1024K", "32M")):
        (tmp_path / f"index{i}").mkdir()
        (tmp_path / f"index{i}" / "size").write_text(f"{size}\n")
    assert machine.cache_bytes(tmp_path) == 32 << 20
    assert machine.cache_bytes(tmp_path / "none") == machine.DEFAULT_CACHE


def test_processor_becomes_part_of_a_file_name():
    assert slug("Intel(R) Xeon(R) Gold 6338 CPU @ 2.00GHz") == "intel-xeon-gold-6338-cpu-2-00ghz"
    assert slug("AMD EPYC") == "amd-epyc"


def test_facts_are_json_and_name_the_processor():
    facts = json.loads(json.dumps(machine.facts()))
    assert facts["processor"] == processor()
    assert facts["memory_bytes"] > 1 << 28
    assert versions()["torch"].startswith(torch.__version__.split("+")[0])


# -- vLLM's INT4 -------------------------------------------------------------------------------------------


def test_rounding_is_within_half_a_step():
    weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(1))
    codes, scales = round_to_nearest(weight, 64)
    assert codes.shape == (128, 32)
    assert scales.shape == (2, 32)
    steps = scales.repeat_interleave(64, 0).t()
    assert ((dequantize(codes, scales) - weight).abs() <= steps / 2 + 1e-6).all()


def test_packing_is_that_of_gptq():
    codes = torch.randint(0, 16, (64, 32), dtype=torch.int32, generator=torch.Generator().manual_seed(2))
    packed = gptq_tensors(codes, torch.ones(2, 32))
    assert packed["qweight"].shape == (8, 32)
    for i in range(64):
        assert torch.equal(packed["qweight"][i // 8] >> 4 * (i % 8) & 15, codes[i])
    assert (packed["qzeros"] == 0x77777777).all()
    assert packed["qzeros"].shape == (2, 4)


@pytest.fixture
def int4():
    pytest.importorskip("vllm")
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(3)) * 0.02
    codes, scales = round_to_nearest(weight, 64)
    scales = scales.bfloat16()
    return Int4Linear(codes, scales), dequantize(codes, scales)


def test_vllm_computes_what_the_packed_weight_stands_for(int4):
    layer, weight = int4
    copy = layer.clone()
    assert layer.check(weight) < 0.01
    assert copy.check(weight) == layer.check(weight)
    # Codes take half a byte each, scales two bytes for 64 of them.
    assert layer.nbytes >= 64 * 128 * (0.5 + 2 / 64)


def test_another_weight_is_noticed(int4):
    layer, weight = int4
    wrong = weight.clone()
    wrong[:, ::8] = weight[:, 1::8]
    with pytest.raises(BenchmarkError, match="packing has changed"):
        layer.check(wrong)


# -- kernels -----------------------------------------------------------------------------------------------


def test_a_row_of_the_kernel_race(monkeypatch):
    pytest.importorskip("vllm")
    from benchmarks.cpu import bandwidth

    monkeypatch.setattr(bandwidth.read_contestant, "__defaults__", (0.01, 1 << 16))
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    ready, answer = kernels.prepare({"cache_bytes": 1 << 16, "seconds": 0.01})
    case = kernels.Case("tiny", "o", 64, 128, m=2, dtype="float32")
    row = json.loads(json.dumps(answer(dataclasses.asdict(case))))
    assert ready["read_loop"] in bandwidth.LOOPS
    others = {"torch bf16", "torch fp32", "vLLM bf16", "vLLM INT4"}
    assert others | {"GQSA"} <= set(row["microseconds"])
    assert row["speedup"]["GQSA"]["GQSA"] == 1
    assert all(row["speedup"]["GQSA"][name] > 0 for name in others)
    assert row["int4_group_size"] == 128
    assert row["microseconds"]["GQSA"]["bytes"] == GroupSparseMatrix.synthesize(64, 128).nbytes
    assert row["microseconds"]["torch fp32"]["bytes"] == 4 * 64 * 128


def test_copies_fill_the_cache_four_times():
    from benchmarks.cpu.contestants import gqsa_contestants

    size = GroupSparseMatrix.synthesize(64, 128).nbytes
    exact, int8 = gqsa_contestants(64, 128, 0.5, 16, 10 * size)(1, torch.float32, True)
    assert len(exact.calls) * exact.bytes > 4 * 10 * size
    storages = {call.args[1].qweight.data_ptr() for call in exact.calls}
    assert len(storages) == len(exact.calls)
    assert int8.environment == machine.INT8


def test_cases_cover_the_three_models_and_all_targets():
    assert {case.model for case in kernels.CASES} == {"SmolLM2-135M", "Qwen2.5-1.5B", "Llama-3-8B"}
    assert len(set(kernels.CASES)) == len(kernels.CASES)
    shapes = [(case.n, case.k) for case in kernels.CASES]
    changes = sum(left != right for left, right in itertools.pairwise(shapes))
    assert changes + 1 == len(set(shapes)), "cases of one shape must stand together"
    document = {"parts": {"kernels": {"rows": [kernel_row(case) for case in kernels.CASES]}}}
    missing = [what for what, _, value in report.targets(document) if value is None and "int8" not in what]
    assert all("in vLLM" in what for what in missing)


# -- models ------------------------------------------------------------------------------------------------


def test_dummy_folders_are_valid_configurations(tmp_path):
    folders = dummy.write_dummy(tmp_path, TINY)
    assert set(folders) == set(models.FORMS)
    config = json.loads((folders["gqsa"] / "config.json").read_text())
    parsed = GqsaConfig.parse(config["quantization_config"], "config.json")
    assert len(parsed.modules) == 2 * len(dummy.LINEARS)
    assert parsed.modules["model.layers.1.self_attn.k_proj"].nnz == GroupSparseMatrix.synthesize(32, 64).nnz
    assert dummy.vocabulary(folders["dense"]) == 32


def test_bits_are_those_of_the_matrices(tmp_path):
    folders = dummy.write_dummy(tmp_path, TINY)
    matrices = [GroupSparseMatrix.synthesize(n, k) for n, k in dummy.linear_sizes(TINY)]
    weights = sum(n * k for n, k in dummy.linear_sizes(TINY))
    assert dummy.bits_per_weight(folders["gqsa"]) == pytest.approx(8 * sum(m.nbytes for m in matrices) / weights)
    assert dummy.bits_per_weight(folders["int4"]) == 4.125
    assert dummy.bits_per_weight(folders["dense"]) == 16


def test_gptq_folder_holds_the_rounded_weights(tmp_path):
    from safetensors.torch import load_file

    dense = make_dense(tmp_path / "dense")
    models.write_gptq(dense, tmp_path / "int4", 64)
    found, weights = load_file(tmp_path / "int4" / "model.safetensors"), load_file(dense / "model.safetensors")
    name = "model.layers.1.mlp.down_proj"
    codes = torch.stack([found[f"{name}.qweight"] >> 4 * i & 15 for i in range(8)], 1).flatten(0, 1)
    error = dequantize(codes, found[f"{name}.scales"]) - weights[f"{name}.weight"]
    assert error.norm() < 0.15 * weights[f"{name}.weight"].norm()
    assert f"{name}.weight" not in found
    assert torch.equal(found["model.embed_tokens.weight"], weights["model.embed_tokens.weight"])
    config = json.loads((tmp_path / "int4" / "config.json").read_text())
    assert config["quantization_config"]["group_size"] == 64


def test_failed_compression_names_its_log(tmp_path, monkeypatch):
    monkeypatch.setattr(models.subprocess, "call", lambda command, **settings: 3)
    with pytest.raises(BenchmarkError, match=r"status 3; see .*compress.log"):
        models._compress(tmp_path, tmp_path, tmp_path, tmp_path / "compress.log")


# -- processes ---------------------------------------------------------------------------------------------


@pytest.fixture
def worker(tmp_path):
    """Make a worker from the body of its ``prepare``; ended after the test."""
    made = []

    def make(body):
        (tmp_path / "worker_under_test.py").write_text(
            "import os, sys, time\nfrom benchmarks.protocol import serve\n"
            f"def prepare(settings):\n    {body}\nserve(prepare)\n"
        )
        environment = {"PYTHONPATH": str(tmp_path)}
        made.append(
            Worker("it", sys.executable, "worker_under_test", {"core": machine.core()}, tmp_path / "log", environment)
        )
        return made[-1]

    yield make
    for each in made:
        each.stop()


def test_questions_are_answered_whatever_else_is_printed(worker):
    it = worker(
        "print('noise'); cores = len(os.sched_getaffinity(0))\n"
        "    return {'cores': cores}, lambda q: print('more') or {'twice': 2 * q['x']}"
    )
    it.start(60)
    assert it.ready == {"cores": 1}
    assert it.ask({"x": 4}) == {"twice": 8}
    assert it.ask({"x": "a"}) == {"twice": "aa"}


def test_death_is_one_sentence_with_the_last_line_of_the_log(worker):
    it = worker("return {}, lambda q: sys.exit('no memory left')")
    it.start(60)
    with pytest.raises(BenchmarkError, match=r"^it died: no memory left \(log: .*log\)$"):
        it.ask({})
    failing = worker("raise RuntimeError('cannot start')")
    with pytest.raises(BenchmarkError, match="it died: RuntimeError: cannot start"):
        failing.start(60)
    killed = worker("print('at work', flush=True); os.kill(os.getpid(), 9)")
    with pytest.raises(BenchmarkError, match="it was killed by SIGKILL; its last words: at work"):
        killed.start(60)


def test_silence_ends(worker):
    it = worker("return {}, lambda q: time.sleep(60)")
    it.start(60)
    with pytest.raises(BenchmarkError, match="said nothing for 0 s"):
        it.ask({}, timeout=0.2)
    process = it._process
    start = time.monotonic()
    it.stop()
    assert process.poll() is not None
    assert time.monotonic() - start < 30


# -- engines -----------------------------------------------------------------------------------------------


class FakeWorker:
    """Takes ``step`` seconds a token."""

    name = "fake"

    def __init__(self, step, asked, watched=None):
        self.step, self.asked, self.watched = step, asked, watched

    def ask(self, question):
        self.asked.append((self.step, question["batch"], question["tokens"], question["environment"]))
        steps = question["tokens"] - 1
        watched = steps - 1 if self.watched is None else self.watched
        inside = {"linears": watched * self.step / 2, "lm_head": watched * self.step / 4, "watched": watched}
        return {"prefill": 0.5, "decode": steps * self.step, "steps": steps, **inside}


def test_engines_take_turns():
    asked = []
    entrants = [
        engines.Entrant("dense bf16", "vLLM", FakeWorker(0.1, asked), 16),
        engines.Entrant("GQSA S50 int8", "vLLM", FakeWorker(0.05, asked), 2.6, machine.INT8),
        engines.Entrant("llama.cpp Q4_0", "llama.cpp", FakeWorker(0.2, asked), 5.0),
    ]
    effort = engines.Effort(batches=(4,), rounds=2, seconds=1.0)
    rows = engines.race("m", entrants, effort, lambda text: None)
    assert [step for step, *_ in asked[-6:]] == [0.1, 0.05, 0.2] * 2
    assert [tokens for _, _, tokens, _ in asked[-3:]] == [11, 21, 6]
    assert {str(environment) for step, _, _, environment in asked if step == 0.05} == {str(machine.INT8)}
    assert [row["tokens_per_second"] for row in rows] == pytest.approx([40, 80, 20])
    assert rows[0]["step_ms"] == pytest.approx(100)
    assert (rows[0]["linears_ms"], rows[0]["lm_head_ms"]) == pytest.approx((50, 25))
    assert rows[2]["linears_ms"] is None
    assert json.loads(json.dumps(rows))[0]["prefill_ms"] == 500


def test_slow_steps_are_measured_once_and_few():
    asked = []
    entrant = engines.Entrant("GQSA S50", "vLLM", FakeWorker(5.0, asked), 2.6)
    engines.race("m", [entrant], engines.Effort(batches=(1,)), lambda text: None)
    assert [tokens for _, _, tokens, _ in asked] == [6, 3]


@pytest.mark.parametrize(("prefill", "rounds"), [(0.1, 3), (3.0, 2), (60.0, 1)])
def test_a_long_prefill_costs_rounds(prefill, rounds):
    warm_up = {"prefill": prefill, "decode": 0.5, "steps": 5}
    assert engines.plan(warm_up, engines.Effort(rounds=3, seconds=1.0, most=9.0)) == (11, rounds)


def test_requests_out_of_step_are_noticed():
    entrant = engines.Entrant("dense bf16", "vLLM", FakeWorker(0.1, [], watched=7), 16)
    with pytest.raises(BenchmarkError, match="7 steps were timed, 4 expected"):
        engines.race("m", [entrant], engines.Effort(), lambda text: None)


def test_stopwatch_leaves_prefill_out():
    watch = vllm_worker.Stopwatch(batch=2)
    linear, output = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    watch._hooks += watch._pair(linear, watch._linear) + watch._pair(output, watch._output)
    for step, tokens in enumerate((64, 2, 2, 2)):
        output(linear(torch.zeros(tokens, 4))[:2])
        assert (watch.seconds["linears"] > 0) == (watch.seconds["lm_head"] > 0) == (step >= 2)
    assert watch.steps == 2
    before = dict(watch.seconds)
    watch.remove()
    output(linear(torch.zeros(2, 4)))
    assert watch.seconds == before


def test_prefill_and_decoding_are_told_apart():
    stats = [(10.0, 11.0, 14.0), (10.5, 12.0, 15.0)]
    names = ("scheduled_ts", "first_token_ts", "last_token_ts")
    metrics = [types.SimpleNamespace(**dict(zip(names, each, strict=True))) for each in stats]
    assert vllm_worker._times(metrics, 5) == {"prefill": 2.0, "decode": 3.0, "steps": 4}


# -- llama.cpp ---------------------------------------------------------------------------------------------


def test_random_gguf_has_the_shape_asked_for(tmp_path):
    gguf = pytest.importorskip("gguf")
    llamacpp.write_random_gguf(tmp_path / "tiny.gguf", TINY)
    reader = gguf.GGUFReader(tmp_path / "tiny.gguf")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert len(tensors) == 2 + 9 * 2
    assert list(tensors["blk.1.ffn_down.weight"].shape) == [128, 64]
    weight = gguf.dequantize(tensors["blk.0.attn_k.weight"].data, gguf.GGMLQuantizationType.Q8_0)
    assert weight.shape == (32, 64)
    assert 0.01 < weight.std() < 0.05


def test_llama_cpp_that_cannot_be_built_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(llamacpp.subprocess, "call", lambda *arguments, **settings: 1)
    with pytest.raises(BenchmarkError, match=r"cannot be built here; see .*venv.log"):
        llamacpp.install(tmp_path / "venv", lambda text: None)


def test_models_of_llama_cpp_are_made_once(tmp_path):
    for name in llamacpp.FORMATS:
        (tmp_path / f"dummy-2x64-{name}.gguf").touch()
    files = llamacpp.dummy_files(tmp_path / "no-python", tmp_path, TINY, lambda text: None)
    assert set(files) == {"Q4_0", "Q2_K"}


# -- report and command line -------------------------------------------------------------------------------


def kernel_row(case, factor=2.0):
    medians = {"GQSA": 100.0, "torch bf16": 100 * factor, "vLLM bf16": 120.0, "vLLM INT4": 300.0, "torch fp32": 400.0}
    return {
        **dataclasses.asdict(case),
        "int4_kernel": "CPUWNA16LinearKernel",
        "speedup": {"GQSA": {name: value / 100 for name, value in medians.items()}},
        "read_share": {"GQSA": 0.75},
        "read_gb_per_s": 30.0,
        "microseconds": {name: {"median": value, "bytes": 1} for name, value in medians.items()},
    }


def engine_row(contestant, speed, model="1B shape", engine="vLLM"):
    figures = {"tokens_per_second": speed, "step_ms": 1000 / speed, "linears_ms": 4.5, "lm_head_ms": None}
    names = {"model": model, "contestant": contestant, "engine": engine, "batch": 1}
    return {**names, **figures, "prefill_ms": 80.0, "bits_per_weight": 2.58}


@pytest.fixture
def document():
    cases = (kernels.Case("Llama-3-8B", "o", 4096, 4096), kernels.Case("Llama-3-8B", "o", 4096, 4096, m=4))
    speeds = (("dense bf16", 10.0), ("vLLM INT4", 8.0), ("GQSA S50", 25.0))
    return {
        "format": 1,
        "machine": {"processor": "Some CPU", "features": ["avx2"], "last_level_cache_bytes": 32 << 20},
        "parts": {
            "kernels": {
                "date": "d1", "seconds": 10.0, "read_loop": "torch sum", "versions": {"torch": "2.13.0"},
                "rows": [kernel_row(case) for case in cases],
            },
            "engines": {"date": "d1", "seconds": 10.0, "rows": [engine_row(*each) for each in speeds]},
            "llamacpp": {
                "date": "d2", "seconds": 10.0, "rows": [engine_row("llama.cpp Q4_0", 30.0, engine="llama.cpp")],
            },
        },
    }  # fmt: skip


def test_targets_are_judged(document):
    judged = {what: (least, value) for what, least, value in report.targets(document)}
    assert judged["M = 1, 4096 x 4096: times as fast as torch bf16"] == (3.0, 2.0)
    assert judged["M = 1, 4096 x 4096: share of the read bandwidth"] == (0.7, 0.75)
    assert judged["M = 1, 14336 x 4096: times as fast as vLLM INT4"] == (1.3, None)
    assert judged["1B shape in vLLM, one request: GQSA S50 times the tokens/s of dense bf16"] == (2.2, 2.5)
    text = report.markdown(document)
    assert "| M = 1, 4096 x 4096: times as fast as torch bf16 | 3.00 | 2.00 | no |" in text
    assert "| M = 1, 4096 x 4096: share of the read bandwidth | 0.70 | 0.75 | yes |" in text
    assert "| M = 1, 14336 x 4096: times as fast as vLLM INT4 | 1.30 | – | – |" in text


def test_tables_hold_the_figures(document):
    lines = report.markdown(document).splitlines()
    kernel = next(line for line in lines if line.startswith("| Llama-3-8B"))
    assert kernel == "| Llama-3-8B | o | 4096 x 4096 | 1 | 50 % | 16 | bf16 | 2.00 | 1.20 | 3.00 | 4.00 | 75 % |"
    ours = next(line for line in lines if line.startswith("| 1B shape | GQSA S50"))
    assert ours == "| 1B shape | GQSA S50 | 1 | 2.50 | 3.12 | 25.0 | 40.0 | 4.5 | – | 80 | 2.58 |"


def test_runs_of_different_days_are_not_compared(document):
    assert report.ratio_to(document, "1B shape", 1, "llama.cpp Q4_0", "dense bf16") is None
    document["parts"]["llamacpp"]["date"] = "d1"
    assert report.ratio_to(document, "1B shape", 1, "llama.cpp Q4_0", "dense bf16") == 3


def test_eight_bit_activations_have_their_column(document):
    row = document["parts"]["kernels"]["rows"][0]
    row["speedup"]["GQSA int8"] = {"torch bf16": 5.25}
    row["microseconds"]["GQSA int8"] = {"median": 40.0, "bytes": 1}
    judged = {what: value for what, _, value in report.targets(document)}
    assert judged["M = 1, 4096 x 4096, int8 activations: times as fast as torch bf16"] == 5.25
    assert "| 5.25 |" in report.markdown(document)


@pytest.mark.parametrize("parts", [(), ("kernels",), ("llamacpp",), ("kernels", "engines", "llamacpp")])
def test_any_part_alone_makes_a_report_and_a_picture(document, tmp_path, parts):
    document["parts"] = {name: part for name, part in document["parts"].items() if name in parts}
    path = tmp_path / "cpu-some-cpu.json"
    path.write_text(json.dumps(document))
    text = command.publish(path)
    assert ("## Kernels" in text) == ("kernels" in parts)
    assert ("llama.cpp Q4_0" in text) == ("llamacpp" in parts)
    assert path.with_suffix(".md").read_text() == text
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_a_part_run_alone_leaves_the_others(tmp_path):
    path = tmp_path / "results" / "cpu.json"
    command.write(path, {"engines": {"rows": [1]}})
    command.write(path, {"kernels": {"rows": [2]}})
    command.write(path, {"engines": {"rows": [3]}})
    document = json.loads(path.read_text())
    assert document["parts"] == {"kernels": {"rows": [2]}, "engines": {"rows": [3]}}
    assert document["machine"]["processor"] == processor()


def test_report_without_results_is_one_sentence(tmp_path, capsys):
    assert command.main(["report", "--results", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith(f"bench-cpu: {tmp_path}")


def test_without_llama_cpp_the_rest_is_measured(tmp_path, monkeypatch, capsys):
    def refuse(folder, say):
        raise BenchmarkError("no compiler")

    monkeypatch.setattr(command.llamacpp, "install", refuse)
    monkeypatch.setattr(command.models, "write_smollm2", lambda folder, say: {"dense": folder})
    sources, llama = command.prepare(("engines", "llamacpp"), tmp_path, TINY)
    assert llama is None
    assert all(set(each) == {"vllm"} for each in sources.values())
    assert "llama.cpp is left out: no compiler" in capsys.readouterr().err
    with pytest.raises(BenchmarkError, match="no compiler"):
        command.prepare(("llamacpp",), tmp_path, TINY)


def test_all_parts_are_written(tmp_path, monkeypatch, capsys, document):
    rows = [*document["parts"]["engines"]["rows"], *document["parts"]["llamacpp"]["rows"]]
    monkeypatch.setattr(command, "prepare", lambda *arguments: ({"1B shape": {}}, None))
    monkeypatch.setattr(command, "run_kernels", lambda *arguments: document["parts"]["kernels"])
    monkeypatch.setattr(command, "run_engines", lambda *arguments: rows)
    monkeypatch.setenv("GQSA_CPU_ACT", "int8")
    assert command.main(["--results", str(tmp_path), "--folder", str(tmp_path)]) == 0
    assert "GQSA_CPU_ACT" not in os.environ
    text = capsys.readouterr().out
    # Measured in one run, so llama.cpp is compared too.
    assert "| 1B shape | llama.cpp Q4_0 | 1 | 3.00 | 3.75 |" in text
    written = json.loads((tmp_path / f"cpu-{slug(processor())}.json").read_text())
    assert set(written["parts"]) == {"kernels", "engines", "llamacpp"}
    assert written["parts"]["engines"]["effort"]["batches"] == [1, 4, 16]
    assert "without compilation" in next(line for line in text.splitlines() if line.startswith("* engines"))
