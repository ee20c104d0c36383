"""The contestants of the kernel race on one weight shape: enough copies of each weight that no cache holds them."""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.cpu.int4 import Int4Linear
from benchmarks.cpu.machine import INT8
from benchmarks.cpu.timing import Contestant, environment
from benchmarks.errors import BenchmarkError
from benchmarks.gptq import dequantize
from vllm_gqsa.format import GroupSparseMatrix
from vllm_gqsa.kernels import linear, prepare

__all__ = ["COLD", "Baselines", "gqsa_contestants", "int8_activations"]

COLD = 4
"""How many times the last-level cache the copies of one contestant fill at least."""
INT4_GROUPS = (128, 64, 32)
"""Group sizes of vLLM's INT4, of which the first that divides the inputs is taken; most checkpoints have 128."""
FLOAT32_TOKENS = 64
"""Most tokens of a call that torch multiplies in float32, which takes a second with 512."""


def int8_activations() -> bool:
    """Whether 8-bit activations change anything: without a kernel for them the variable is not read."""
    matrix = prepare(GroupSparseMatrix.synthesize(64, 256, generator=torch.Generator().manual_seed(0)))
    x = activations(1, 256)
    exact = linear(x, matrix)
    with environment(INT8):
        return not torch.equal(linear(x, matrix), exact)


def activations(m: int, k: int) -> torch.Tensor:
    """Random activations float32 ``[M, K]``."""
    return torch.randn(m, k, generator=torch.Generator().manual_seed(0))


def gqsa_contestants(
    n: int, k: int, sparsity: float, group_size: int, cache_bytes: int
) -> Callable[[int, torch.dtype, bool], list[Contestant]]:
    """The group-sparse kernel on one shape.

    Args:
        n: outputs.
        k: inputs.
        sparsity: share of pruned groups.
        group_size: weights of a group.
        cache_bytes: of the last-level cache.

    Returns:
        A function of the number of tokens, the dtype of the activations, and whether there is a kernel with 8-bit
        activations to race too.
    """
    first = GroupSparseMatrix.synthesize(n, k, group_size, sparsity, torch.Generator().manual_seed(0))
    matrices = _copies(prepare(first), first.nbytes, cache_bytes, lambda _: prepare(first))

    def contestants(m: int, dtype: torch.dtype, int8: bool) -> list[Contestant]:
        x = activations(m, k).to(dtype)
        calls = [functools.partial(linear, x, matrix) for matrix in matrices]
        found = [Contestant("GQSA", calls, first.nbytes)]
        return [*found, Contestant("GQSA int8", calls, first.nbytes, INT8)] if int8 else found

    return contestants


class Baselines:
    """What the group-sparse kernel is compared with on one shape: torch, and vLLM's own dense and INT4 linears.

    Weights are random and differ between them; no kernel's time depends on the values.

    Attributes:
        facts: about vLLM's INT4: its kernel, group size and error.
    """

    def __init__(self, n: int, k: int, cache_bytes: int) -> None:
        """Make the weights.

        Args:
            n: outputs.
            k: inputs.
            cache_bytes: of the last-level cache.

        Raises:
            BenchmarkError: vLLM has no INT4 kernel, or it does not compute what it should.
        """
        self._k = k
        self._size = n * k
        generator = torch.Generator().manual_seed(0)
        dense = torch.empty(n, k).uniform_(-0.05, 0.05, generator=generator)
        half = dense.bfloat16()
        self._float32 = _copies(dense, 4 * self._size, cache_bytes, torch.clone)
        self._bfloat16 = _copies(half, 2 * self._size, cache_bytes, torch.clone)
        self._vllm = _copies(vllm_linear(half), 2 * self._size, cache_bytes, lambda _: vllm_linear(half))
        size = next((size for size in INT4_GROUPS if k % size == 0), None)
        if size is None:
            raise BenchmarkError(f"vLLM's INT4 needs inputs that are a multiple of {min(INT4_GROUPS)}, not {k}")
        codes = torch.randint(0, 16, (k, n), dtype=torch.int32, generator=generator)
        scales = (torch.rand(k // size, n, generator=generator) * 0.004 + 0.002).bfloat16()
        first = Int4Linear(codes, scales)
        error = first.check(dequantize(codes, scales))
        self._int4 = _copies(first, first.nbytes, cache_bytes, Int4Linear.clone)
        self.facts = {"int4_kernel": first.kernel_name, "int4_group_size": size, "int4_error": round(error, 5)}

    def contestants(self, m: int) -> list[Contestant]:
        """All of them for ``m`` tokens a call; activations are bfloat16, for torch float32 also that."""
        x = activations(m, self._k)
        half = x.bfloat16()
        found = [
            Contestant("torch bf16", [functools.partial(F.linear, half, w) for w in self._bfloat16], 2 * self._size),
            Contestant("vLLM bf16", [functools.partial(call, half) for call in self._vllm], 2 * self._size),
            Contestant("vLLM INT4", [functools.partial(call, half) for call in self._int4], self._int4[0].nbytes),
        ]
        if m <= FLOAT32_TOKENS:
            calls = [functools.partial(F.linear, x, weight) for weight in self._float32]
            found.append(Contestant("torch fp32", calls, 4 * self._size))
        return found


def vllm_linear(weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """The dense linear of vLLM on a CPU, which packs the weight beforehand (by oneDNN, on most machines).

    Raises:
        BenchmarkError: vLLM has changed.
    """
    try:
        from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm  # noqa: PLC0415
    except ImportError as error:
        raise BenchmarkError(f"vLLM's dense linear is not where vLLM 0.32 has it: {error}") from error
    layer: Any = torch.nn.Module()
    layer.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
    layer.bias = None
    dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
    return lambda x: layer.cpu_linear(x, layer.weight, None)


def _copies(first: Any, size: int, cache_bytes: int, clone: Callable[[Any], Any]) -> list[Any]:  # noqa: ANN401
    return [first, *(clone(first) for _ in range(COLD * cache_bytes // size))]
