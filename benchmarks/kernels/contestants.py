"""Ours and torch's: weights made on the device, what they stand for, and the call."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.errors import BenchmarkError
from benchmarks.kernels.cases import Weight
from vllm_gqsa import kernels
from vllm_gqsa.format import GroupSparseMatrix, round_scale
from vllm_gqsa.kernels.cuda import choose_kernel, device_of, linear_cuda
from vllm_gqsa.kernels.slab import SlabMatrix

__all__ = ["BUILDERS", "Built", "quantized", "synthesize", "torch_int4_weight"]

INT4_GROUP = 128
"""Group size of the dense INT4 contestants; that of most checkpoints."""
SKEW = 0.3
_INNER_TILES = 8
_STREAMED = ("qweight", "scale_zero", "columns", "heads", "slab_ptr", "rows")


@dataclass(frozen=True)
class Built:
    """A contestant's weight, ready to be multiplied by.

    Attributes:
        calls: one for every copy, from activations ``[M, K]`` to ``[M, N]``.
        dense: the weight that they stand for, float32 ``[N, K]``.
        nbytes: of one copy, as far as a call reads it.
        dtype: of the activations.
        most_tokens: more than these are no use of this kernel.
        kernel: the name of what serves M tokens, where there is a choice.
    """

    calls: Sequence[Callable[[torch.Tensor], torch.Tensor]]
    dense: torch.Tensor
    nbytes: int
    dtype: torch.dtype
    most_tokens: int = 1 << 30
    kernel: Callable[[int], str] = lambda m: ""


Builder = Callable[[Weight, torch.device, Callable[[int], int]], Built]
"""From a weight, a device, and the number of copies that a size in bytes needs."""


def _generator(device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(0)


def synthesize(weight: Weight, device: torch.device) -> GroupSparseMatrix:
    """A valid random matrix on the device; of skewed rows at least one group is kept in each."""
    generator = _generator(device)
    groups = weight.k // weight.group_size
    kept = torch.full((weight.n,), groups * (1 - weight.sparsity), device=device)
    if weight.rows == "skewed":
        kept *= 1 + SKEW * torch.randn(weight.n, generator=generator, device=device)
    kept = kept.round().clamp_(1, groups)
    keep = torch.rand(weight.n, groups, generator=generator, device=device).argsort(1) < kept[:, None]
    nnz = int(keep.sum())
    codes = torch.randint(0, 16, (nnz, weight.group_size), dtype=torch.uint8, generator=generator, device=device)
    scales = round_scale(torch.rand(nnz, generator=generator, device=device) * 0.004 + 0.002)
    zeros = torch.randint(5, 11, (nnz,), dtype=torch.uint8, generator=generator, device=device)
    return GroupSparseMatrix.from_codes(codes, scales, zeros, keep)


def _gqsa(
    weight: Weight,
    device: torch.device,
    copies: Callable[[int], int],
    *,
    dtype: torch.dtype = torch.float16,
    kernel: str | None = None,
    by_slab: bool = False,
) -> Built:
    matrix = synthesize(weight, device)
    packed = SlabMatrix.pack(matrix.to("cpu")).to(device)
    size = sum(tensor.nbytes for name, tensor in packed.tensors().items() if name in _STREAMED)
    clones = [packed, *(_clone(packed) for _ in range(copies(size) - 1))]
    found = device_of(device)
    if found is None:
        raise BenchmarkError(f"the CUDA kernels do not run on {device}; the log says why")

    def call(each: SlabMatrix, x: torch.Tensor) -> torch.Tensor:
        return kernels.linear(x, each) if kernel is None else linear_cuda(x, each, None, kernel, by_slab)

    return Built(
        calls=[functools.partial(call, each) for each in clones],
        dense=matrix.to_dense(torch.float32),
        nbytes=size,
        dtype=dtype,
        kernel=lambda m: kernel or choose_kernel(m, weight.k, found)[0],
    )


def _clone(packed: SlabMatrix) -> SlabMatrix:
    tensors = {name: tensor.clone() for name, tensor in packed.tensors().items()}
    return SlabMatrix(**tensors, in_features=packed.in_features, group_size=packed.group_size)


def _cublas(weight: Weight, device: torch.device, copies: Callable[[int], int]) -> Built:
    first = (torch.randn(weight.n, weight.k, generator=_generator(device), device=device) * 0.02).half()
    clones = [first, *(first.clone() for _ in range(copies(first.nbytes) - 1))]
    calls = [functools.partial(_linear, each) for each in clones]
    return Built(calls, first.float(), first.nbytes, torch.float16)


def _linear(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, weight)


def quantized(
    weight: Weight, bits: int, group_size: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random codes uint8 ``[N, K]`` and scales ``[N, K / group_size]`` of ``dtype``.

    Raises:
        BenchmarkError: the group size does not divide K.
    """
    if weight.k % group_size:
        raise BenchmarkError(f"groups of {group_size} do not divide {weight.k} inputs")
    generator = _generator(device)
    shape = (weight.n, weight.k)
    codes = torch.randint(0, 1 << bits, shape, dtype=torch.uint8, generator=generator, device=device)
    scales = torch.rand(weight.n, weight.k // group_size, generator=generator, device=device) * 0.004 + 0.002
    return codes, scales.to(dtype)


def torch_int4_weight(weight: Weight, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes uint8 ``[N, K]``, scales and zeros bfloat16 ``[K / 128, N, 2]``, and the float32 weight they stand for."""
    codes, scales = quantized(weight, 4, INT4_GROUP, torch.bfloat16, device)
    zeros = (torch.rand(scales.shape, generator=_generator(device), device=device) * 0.01 - 0.005).bfloat16()
    both = torch.stack((scales, zeros), 2).transpose(0, 1).contiguous()
    expand = functools.partial(torch.repeat_interleave, repeats=INT4_GROUP, dim=1)
    return codes, both, (codes.float() - 8) * expand(scales.float()) + expand(zeros.float())


def _torch_int4(weight: Weight, device: torch.device, copies: Callable[[int], int]) -> Built:
    """The tinygemm of torch; a byte holds two codes, the earlier one in its upper half."""
    codes, both, dense = torch_int4_weight(weight, device)
    packed = torch.ops.aten._convert_weight_to_int4pack(codes[:, ::2] << 4 | codes[:, 1::2], _INNER_TILES)
    size = packed.nbytes + both.nbytes
    clones = [(packed.clone(), both.clone()) for _ in range(copies(size))]

    def call(each: tuple[torch.Tensor, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = torch.ops.aten._weight_int4pack_mm(x, each[0], INT4_GROUP, each[1])
        return result

    # It takes 16 tokens at a time: with thousands a call lasts tens of milliseconds.
    return Built([functools.partial(call, each) for each in clones], dense, size, torch.bfloat16, most_tokens=256)


def _torch_2_of_4(weight: Weight, device: torch.device, copies: Callable[[int], int]) -> Built:
    """The 2:4 of torch, by cuSPARSELt where torch has it and CUTLASS where not."""
    generator = _generator(device)
    dense = torch.randn(weight.n, weight.k, generator=generator, device=device) * 0.02
    for rows in dense.split(4096):
        order = torch.rand(rows.shape[0], weight.k // 4, 4, generator=generator, device=device).argsort(2)
        rows.masked_fill_((order >= 2).view_as(rows), 0)
    half = dense.half()
    first = torch.sparse.to_sparse_semi_structured(half)
    parts: list[Any] = [getattr(first, name, None) for name in ("packed", "meta")]
    size = sum(part.nbytes for part in parts if part is not None)
    clones = [first, *(torch.sparse.to_sparse_semi_structured(half) for _ in range(copies(size) - 1))]
    name = type(first).__name__.removeprefix("SparseSemiStructuredTensor")
    calls = [functools.partial(_linear, each) for each in clones]
    return Built(calls, half.float(), size, torch.float16, kernel=lambda m: name)


BUILDERS: dict[str, Builder] = {
    "GQSA": _gqsa,
    "GQSA gemv": functools.partial(_gqsa, kernel="gemv"),
    "GQSA gemv by rows": functools.partial(_gqsa, kernel="gemv", by_slab=True),
    "GQSA gemm": functools.partial(_gqsa, kernel="gemm"),
    "GQSA expand": functools.partial(_gqsa, kernel="expand"),
    "cuBLAS fp16": _cublas,
    "torch INT4": _torch_int4,
    "torch 2:4": _torch_2_of_4,
}
