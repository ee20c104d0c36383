"""What is logged when a model has been loaded."""

import pytest
import torch

pytest.importorskip("vllm", reason="needs vLLM")

from tests.helpers import quantization, random_matrix
from vllm_gqsa.format import GqsaConfig
from vllm_gqsa.kernels import choice
from vllm_gqsa.kernels.choice import Choice, check_environment, choose, choose_for_experts
from vllm_gqsa.plugin import report
from vllm_gqsa.plugin.config import GqsaQuantizationConfig
from vllm_gqsa.plugin.shards import Shard, ShardPlan, Sources


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr(report._logger, "info", lambda text, *values: lines.append(text % values))
    return lines


def plan(name, matrix, start, stop):
    config = GqsaConfig.model_validate(quantization({name: matrix.nnz}, group_size=matrix.group_size))
    shard = Shard(matrix.out_features, start, stop)
    return ShardPlan(Sources.of(name, [name], config), {0: shard}, matrix.in_features, 0, matrix.in_features)


def load(counts, name, matrix, start, stop):
    counts.take(plan(name, matrix, start, stop), matrix.slice_rows(start, stop))
    counts.done(plan(name, matrix, start, stop), choose("cpu", torch.float32, matrix.group_size))


def test_one_line_when_the_last_layer_is_there_and_again_after_a_reload(said):
    counts, matrices = report.LoadReport(), {name: random_matrix(64, 128, seed=at) for at, name in enumerate("ab")}
    for name in (*matrices, "a"):  # a tied head asks twice
        counts.expect((name,))
    for _ in range(2):
        load(counts, "a", matrices["a"], 0, 64)
        load(counts, "b", matrices["b"], 0, 64)
    assert len(said) == 2
    nnz, size = sum(m.nnz for m in matrices.values()), sum(m.nbytes for m in matrices.values())
    assert (
        said[0]
        == said[1]
        == (
            f"GQSA: 2 modules in 2 layers, 0.0 M weights, {100 * nnz / 1024:.1f} % of groups kept, "
            f"{8 * size / 16384:.2f} bits a weight; kernel: {choose('cpu', torch.float32, 16)}"
        )
    )


def test_how_even_the_split_is(said):
    counts, matrix = report.LoadReport({("a",)}), random_matrix(64, 128)
    load(counts, "a", matrix, 0, 32)
    share = matrix.slice_rows(0, 32).nnz / (matrix.nnz / 2)
    assert f"this rank keeps {share:.3f} of an even share of groups, {share:.3f} in its fullest layer" in said[0]


def test_a_kernel_for_each_group_size(said):
    counts = report.LoadReport({("a",), ("b",)})
    for name, size in (("a", 32), ("b", 8)):
        load(counts, name, random_matrix(64, 128, size), 0, 64)
    kernels = [str(choose("cpu", torch.float32, size)) for size in (32, 8)]
    assert said[0].endswith("kernel: " + ", ".join(dict.fromkeys(kernels)))


def test_a_warning_where_experts_are_expanded(said, monkeypatch):
    warnings = []
    monkeypatch.setitem(choice._CHOICES, "cuda", lambda *_: Choice("gemv", "a GPU"))
    monkeypatch.setattr(report._logger, "warning", lambda text, *values: warnings.append(text % values))
    counts, matrix = report.LoadReport({("a",), ("b",)}), random_matrix(64, 128)
    for name, kernel in (("a", choose), ("b", choose_for_experts)):
        counts.take(plan(name, matrix, 0, 64), matrix)
        counts.done(plan(name, matrix, 0, 64), kernel("cuda", torch.float16, 16))
    why = "experts have no decode kernel on a GPU: their weights are expanded in every step"
    assert said[0].endswith(f"kernel: gemv (a GPU), expand ({why})")
    assert warnings == [f"GQSA: serving is slow: {why}"]
    counts.done(plan("a", matrix, 0, 64), choose("tpu", torch.float16, 16))
    counts.done(plan("b", matrix, 0, 64), choose("tpu", torch.float16, 16))
    assert len(warnings) == 1, "of missing kernels somebody else has warned"
    assert choose_for_experts("cpu", torch.float32, 16) == choose("cpu", torch.float32, 16)


def test_the_kernel_and_why(monkeypatch):
    monkeypatch.setattr("vllm_gqsa.kernels.cuda.available", lambda: False)
    assert choose("cuda", torch.float16, 16).why == "installed without nvcc or a C++ compiler"
    assert choose("tpu", torch.float16, 16).why == "there is no kernel for tpu"
    monkeypatch.setattr("vllm_gqsa.kernels.native.available", lambda: False)
    assert not choose("cpu", torch.float32, 16).native


def test_an_unknown_environment_is_refused_before_anything_is_loaded(monkeypatch):
    monkeypatch.setenv("GQSA_CPU_ACT", "int4")
    for ask in (check_environment, lambda: GqsaQuantizationConfig.from_config(quantization({"a": 1}))):
        with pytest.raises(ValueError, match="GQSA_CPU_ACT=int4: is not known; set it to int8 or leave it out"):
            ask()
