"""The contestants of the kernel race on one weight shape: enough copies of each weight that no cache holds them."""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.cpu.int4 import Int4Linear, dequantize
from benchmarks.cpu.timing import Contestant
from vllm_gqsa.format import GroupSparseMatrix
from vllm_gqsa.kernels import linear

__all__ = ["COLD", "INT8", "Weights", "int8_activations"]

COLD = 4
"""How many times the last-level cache the copies of one contestant fill at least."""
INT8 = {"GQSA_CPU_ACT": "int8"}
"""Asks for the kernel with 8-bit activations; read at every call."""
INT4_GROUPS = (128, 64, 32)
"""Group sizes of vLLM's INT4, the first that divides the inputs is taken; 128 is what most checkpoints have."""

Call = Callable[[torch.Tensor], object]


def int8_activations() -> bool:
    """Whether 8-bit activations change anything: without a kernel for them the variable is not read."""
    import os  # noqa: PLC0415

    matrix = GroupSparseMatrix.synthesize(64, 256, generator=torch.Generator().manual_seed(0))
    x = torch.randn(1, 256, generator=torch.Generator().manual_seed(0))
    exact = linear(x, matrix)
    before = os.environ.get("GQSA_CPU_ACT")
    os.environ.update(INT8)
    try:
        return not torch.equal(linear(x, matrix), exact)
    finally:
        if before is None:
            del os.environ["GQSA_CPU_ACT"]
        else:
            os.environ["GQSA_CPU_ACT"] = before


class Weights:
    """One shape's weights in every form, each in as many copies as it takes to stay cold.

    Values differ between the forms, which no kernel's time depends on.

    Attributes:
        facts: about vLLM's INT4: its kernel, group size and error.
    """

    def __init__(self, n: int, k: int, sparsity: float, group_size: int, cache_bytes: int) -> None:
        """Make them.

        Args:
            n: outputs.
            k: inputs.
            sparsity: of the group-sparse matrix.
            group_size: of the group-sparse matrix.
            cache_bytes: of the last-level cache.

        Raises:
            BenchmarkError: vLLM has no INT4 kernel, or it does not compute what it should.
        """
        generator = torch.Generator().manual_seed(0)
        self._cold = COLD * cache_bytes
        self.facts: dict[str, Any] = {}
        matrix = GroupSparseMatrix.synthesize(n, k, group_size, sparsity, generator)
        self._gqsa = self._copies(matrix, matrix.nbytes, lambda m: m.from_tensors(_clones(m), k, group_size))
        dense = torch.empty(n, k).uniform_(-0.05, 0.05, generator=generator)
        self._dense = {
            dtype: self._copies(dense.to(dtype), n * k * dtype.itemsize, torch.clone)
            for dtype in (torch.bfloat16, torch.float32)
        }
        self._int4 = self._make_int4(n, k, generator)

    def _make_int4(self, n: int, k: int, generator: torch.Generator) -> tuple[list[Int4Linear], int]:
        size = next(size for size in INT4_GROUPS if k % size == 0)
        codes = torch.randint(0, 16, (k, n), dtype=torch.int32, generator=generator)
        scales = (torch.rand(k // size, n, generator=generator) * 0.004 + 0.002).bfloat16()
        first = Int4Linear(codes, scales)
        error = first.check(dequantize(codes, scales))
        self.facts = {"int4_kernel": first.kernel_name, "int4_group_size": size, "int4_error": round(error, 5)}
        return self._copies(first, first.nbytes, Int4Linear.clone)

    def _copies(self, first: Any, size: int, clone: Callable[[Any], Any]) -> tuple[list[Any], int]:  # noqa: ANN401
        return [first, *(clone(first) for _ in range(self._cold // size))], size

    def contestants(self, m: int, dtype: torch.dtype, *, int8: bool) -> list[Contestant]:
        """The race for one number of tokens.

        Args:
            m: tokens of a call.
            dtype: of the activations of the group-sparse kernel; torch runs in both dtypes in any case, and vLLM's
                INT4 always in bfloat16, having no other but float16.
            int8: whether there is a kernel with 8-bit activations.
        """
        matrices, size = self._gqsa
        x = torch.randn(m, matrices[0].in_features, generator=torch.Generator().manual_seed(0))
        ours = [functools.partial(linear, x.to(dtype), matrix) for matrix in matrices]
        found = [Contestant("GQSA", ours, size)]
        if int8:
            found.append(Contestant("GQSA int8", ours, size, INT8))
        for each, (weights, each_size) in self._dense.items():
            calls = [functools.partial(F.linear, x.to(each), weight) for weight in weights]
            found.append(Contestant(f"torch {str(each).removeprefix('torch.')}", calls, each_size))
        layers, layer_size = self._int4
        half = x.bfloat16()
        found.append(Contestant("vLLM INT4", [functools.partial(layer, half) for layer in layers], layer_size))
        return found


def _clones(matrix: GroupSparseMatrix) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in matrix.tensors().items()}
