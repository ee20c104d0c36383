"""The native CPU kernels (csrc/cpu): choosing one, laying a matrix out for them, calling them."""

import ctypes
import functools
import logging
import math
import os
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from vllm_gqsa.format import TENSORS, GroupSparseMatrix
from vllm_gqsa.kernels import native

__all__ = ["PackedMatrix", "check_activations", "choose_kernel", "kernels", "linear_cpu", "partition", "usable"]

_logger = logging.getLogger(__name__)

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_BLOCK_BYTES = 64
"""Bytes of codes in a block of the layout, see csrc/cpu/kernel.h."""
_MAX_FEATURES = 2 * 0xFFFF
"""Columns that the kernels can number: they count pairs of them in 16 bits."""

_DENSE_FROM = {"portable": 2, "avx2": 8}
_DENSE_FROM_BFLOAT16 = {"avx512": 8, "avx512_bf16": 16, "avx512_vnni": 16}
"""Tokens times the share of kept groups from which expanding the weight and multiplying by it with oneDNN is faster
than each kernel; the second where the processor multiplies bfloat16 itself. Measured at 4096 x 4096 and SmolLM2's
shapes. Against AVX-512 oneDNN never was faster in float32, where it does twice the work, nor in float16."""

_CHUNK_BYTES = 1 << 20
"""Dense weight expanded at a time; it should stay in the second-level cache until it is multiplied."""


class _Weight(ctypes.Structure):
    """``gqsa::cpu::Weight`` of csrc/cpu/kernel.h."""

    _fields_ = (
        ("crow_indices", ctypes.c_void_p),
        ("group_mask", ctypes.c_void_p),
        ("words", ctypes.c_void_p),
        ("scale_zero", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("in_features", ctypes.c_int64),
        ("mask_stride", ctypes.c_int64),
        ("group_size", ctypes.c_int32),
    )


_INT32, _LONG, _POINTER = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p
_WEIGHT, _THREADS = ctypes.POINTER(_Weight), (_LONG, _POINTER)


@functools.cache
def _library() -> ctypes.CDLL:
    """The functions of csrc/cpu/cpu.cpp."""
    return native.library(
        {
            "gqsa_cpu_kernel": (ctypes.c_char_p, _INT32),
            "gqsa_cpu_supported": (_INT32, _INT32),
            "gqsa_cpu_linear": (
                *(None, _INT32, _WEIGHT, _POINTER, _LONG, _LONG, _INT32, _POINTER, _POINTER),
                *_THREADS,
            ),
            "gqsa_cpu_dequantize": (None, _INT32, _WEIGHT, _LONG, _LONG, _INT32, _POINTER, *_THREADS),
            "gqsa_cpu_look_up": (None, _INT32, _WEIGHT, _POINTER, _LONG, _INT32, _POINTER, *_THREADS),
            "gqsa_cpu_pack": (None, _WEIGHT, _POINTER, _POINTER, _POINTER, *_THREADS),
            "gqsa_cpu_unpack": (None, _POINTER, _LONG, _POINTER),
            "gqsa_cpu_partition": (None, _POINTER, _LONG, _LONG, _POINTER),
        }
    )


@functools.cache
def kernels() -> dict[str, int]:
    """The kernels that this processor can run, by name, each faster than the one before; with their C indices."""
    library = _library()
    found: dict[str, int] = {}
    index = 0
    while (name := library.gqsa_cpu_kernel(index)) is not None:
        if library.gqsa_cpu_supported(index):
            found[name.decode()] = index
        index += 1
    return found


def check_activations(activations: str) -> None:
    """Check the environment variable ``GQSA_CPU_ACT``.

    Raises:
        ValueError: it is neither empty nor "int8".
    """
    if activations not in ("", "int8"):
        raise ValueError(f"GQSA_CPU_ACT={activations}: is not known; set it to int8 or leave it out")


@functools.cache
def choose_kernel(dtype: torch.dtype, group_size: int, activations: str = "") -> str:
    """The fastest kernel for activations of ``dtype``.

    Args:
        dtype: of the activations.
        group_size: G.
        activations: the environment variable ``GQSA_CPU_ACT``: "int8" allows activations to be rounded to int8.

    Raises:
        ValueError: ``activations`` is neither empty nor "int8".
    """
    check_activations(activations)
    names = kernels()
    if activations == "int8":
        if "avx512_vnni" in names and group_size >= 16:
            return "avx512_vnni"
        reason = "group_size 8" if group_size < 16 else "a processor without AVX-512 VNNI, VBMI and VBMI2"
        _logger.warning("GQSA_CPU_ACT=int8 has no effect with %s; activations keep their dtype", reason)
    if dtype == torch.bfloat16 and "avx512_bf16" in names and group_size >= 16:
        return "avx512_bf16"
    return next(name for name in ("avx512", "avx2", "portable") if name in names)


@functools.cache
def _dense_from(kernel: str, dtype: torch.dtype) -> float:
    in_hardware = dtype == torch.bfloat16 and "avx512_bf16" in kernels()
    return (_DENSE_FROM | (_DENSE_FROM_BFLOAT16 if in_hardware else {})).get(kernel, math.inf)


@dataclass(frozen=True, eq=False)
class PackedMatrix:
    """A :class:`GroupSparseMatrix` with its codes in the order of the CPU kernels; all else is as it was.

    The order is a permutation of the bytes of ``qweight`` within blocks of 64: see csrc/cpu/kernel.h. Ops
    are told the order by its name, see :mod:`vllm_gqsa.kernels.layouts`.

    Attributes:
        crow_indices: int32 ``[N + 1]``.
        group_mask: uint8 ``[N, ceil(S / 8)]``.
        qweight: int16 ``[blocks, 2, 16]``, blocks = ceil(nnz * G / 128).
        scale_zero: int16 ``[nnz]``.
        in_features: K.
        group_size: G.
    """

    crow_indices: torch.Tensor
    group_mask: torch.Tensor
    qweight: torch.Tensor
    scale_zero: torch.Tensor
    in_features: int
    group_size: int

    @property
    def out_features(self) -> int:
        """Number of rows N."""
        return self.crow_indices.shape[0] - 1

    def tensors(self) -> dict[str, torch.Tensor]:
        """The four tensors, by the names of :data:`vllm_gqsa.format.TENSORS`."""
        return {name: getattr(self, name) for name in TENSORS}

    @classmethod
    def pack(cls, matrix: GroupSparseMatrix) -> "PackedMatrix":
        """Copy a valid matrix on the CPU; every thread writes what it will read, for machines with NUMA.

        It must be :func:`usable`.
        """
        blocks = -(-matrix.qweight.numel() // _BLOCK_BYTES)
        packed = cls(
            crow_indices=matrix.crow_indices.contiguous(),
            group_mask=torch.empty_like(matrix.group_mask, memory_format=torch.contiguous_format),
            qweight=torch.empty(blocks, 2, 16, dtype=torch.int16),
            scale_zero=torch.empty_like(matrix.scale_zero, memory_format=torch.contiguous_format),
            in_features=matrix.in_features,
            group_size=matrix.group_size,
        )
        sources = [t.contiguous() for t in (matrix.group_mask, matrix.qweight, matrix.scale_zero)]
        _library().gqsa_cpu_pack(
            packed._weight(), *(t.data_ptr() for t in sources), torch.get_num_threads(), native.parallel_for()
        )
        return packed

    def unpack(self) -> GroupSparseMatrix:
        """The matrix in the checkpoint's order; mask and scales are shared, codes copied."""
        nnz = self.scale_zero.numel()
        qweight = torch.empty(nnz, self.group_size // 2, dtype=torch.uint8)
        _library().gqsa_cpu_unpack(self.qweight.data_ptr(), qweight.numel(), qweight.data_ptr())
        return GroupSparseMatrix.from_tensors(self.tensors() | {"qweight": qweight}, self.in_features, self.group_size)

    def part(self, start: int, stop: int) -> "PackedMatrix":
        """Rows ``start:stop`` as a view. Its pointers do not start at 0: codes and scales are those of all rows."""
        return replace(self, crow_indices=self.crow_indices[start : stop + 1], group_mask=self.group_mask[start:stop])

    def to_dense(self, start: int, stop: int, dtype: torch.dtype, kernel: str | None = None) -> torch.Tensor:
        """Rows ``start:stop`` of the dense weight, computed in float32 (exact) and rounded once to ``dtype``."""
        out = torch.empty(stop - start, self.in_features, dtype=dtype)
        _library().gqsa_cpu_dequantize(
            kernels()[kernel or choose_kernel(dtype, self.group_size)],
            *(self._weight(), start, stop, _DTYPES[dtype], out.data_ptr()),
            *(torch.get_num_threads(), native.parallel_for()),
        )
        return out

    def look_up(self, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Rows ``ids`` (int32 or int64, any shape) of the dense weight, rounded once to ``dtype``: ``[*ids.shape, K]``.

        That each of them is a row is trusted.
        """
        ids = ids.to(torch.int64).contiguous()
        out = torch.empty(*ids.shape, self.in_features, dtype=dtype)
        _library().gqsa_cpu_look_up(
            kernels()[choose_kernel(dtype, self.group_size)],
            *(self._weight(), ids.data_ptr(), ids.numel(), _DTYPES[dtype], out.data_ptr()),
            *(torch.get_num_threads(), native.parallel_for()),
        )
        return out

    def _weight(self) -> _Weight:
        return _Weight(
            self.crow_indices.data_ptr(),
            self.group_mask.data_ptr(),
            self.qweight.data_ptr(),
            self.scale_zero.data_ptr(),
            self.out_features,
            self.in_features,
            self.group_mask.shape[1],
            self.group_size,
        )


def usable(weight: GroupSparseMatrix) -> bool:
    """Whether the kernels can multiply by ``weight``; where not, a warning says why."""
    if weight.in_features > _MAX_FEATURES:
        _logger.warning(
            "a matrix [%d, %d] is too wide for the CPU kernels, which number %d columns; torch computes it, slowly",
            *(weight.out_features, weight.in_features, _MAX_FEATURES),
        )
        return False
    return True


def linear_cpu(
    x: torch.Tensor,
    weight: PackedMatrix,
    bias: torch.Tensor | None = None,
    kernel: str | None = None,
    kept: float | None = None,
) -> torch.Tensor:
    """Multiply by a packed weight on the CPU.

    Two environment variables act on it: ``GQSA_CPU_ACT=int8`` rounds activations to int8 where the processor can
    use that, and vLLM's ``VLLM_BATCH_INVARIANT=1`` keeps to one kernel whatever the number of tokens.

    Args:
        x: float32, float16 or bfloat16 ``[..., K]``, any strides.
        weight: ``[N, K]``, trusted.
        bias: ``[N]`` in the dtype of ``x``.
        kernel: one of :func:`kernels`, to be used for any number of tokens; None chooses.
        kept: share of kept groups, for a part of a larger matrix, of which only the pointers tell it.

    Returns:
        ``[..., N]`` in the dtype of ``x``. With the exact kernels (all but avx512_vnni), sums are float32 and a
        token's result depends neither on the other tokens nor on the number of threads, as long as there are fewer
        tokens than the crossover to oneDNN.

    Raises:
        TypeError: ``x`` has another dtype.
    """
    if x.dtype not in _DTYPES:
        raise TypeError(f"gqsa::linear: x is {x.dtype}; it must be float32, float16 or bfloat16")
    rows = weight.out_features
    flat = x.reshape(-1, weight.in_features)
    bias = None if bias is None else bias.contiguous()
    tokens = flat.shape[0]
    chosen = kernel or choose_kernel(x.dtype, weight.group_size, os.environ.get("GQSA_CPU_ACT", ""))
    invariant = kernel is not None or native.batch_invariant()
    if kept is None:
        kept = weight.scale_zero.shape[0] * weight.group_size / (rows * weight.in_features)
    if tokens * kept >= _dense_from(chosen, x.dtype) and not invariant:
        out = _linear_dense(flat, weight, bias, chosen)
    else:
        if flat.stride(-1) != 1:
            flat = flat.contiguous()
        out = torch.empty(tokens, rows, dtype=x.dtype)
        _library().gqsa_cpu_linear(
            kernels()[chosen],
            weight._weight(),
            flat.data_ptr(),
            flat.stride(0),
            tokens,
            _DTYPES[x.dtype],
            None if bias is None else bias.data_ptr(),
            out.data_ptr(),
            torch.get_num_threads(),
            native.parallel_for(),
        )
    return out.view(*x.shape[:-1], rows)


def _linear_dense(x: torch.Tensor, weight: PackedMatrix, bias: torch.Tensor | None, kernel: str) -> torch.Tensor:
    rows = weight.out_features
    step = max(32, _CHUNK_BYTES // (weight.in_features * x.element_size()))
    out = torch.empty(x.shape[0], rows, dtype=x.dtype)
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        dense = weight.to_dense(start, stop, x.dtype, kernel)
        out[:, start:stop] = F.linear(x, dense, None if bias is None else bias[start:stop])
    return out


def partition(crow_indices: torch.Tensor, shares: int) -> list[int]:
    """First row of each thread's share, and N: rows are cut so that all keep about the same number of groups.

    The kernels cut them by the same code themselves; this shows it, to the tests.

    Args:
        crow_indices: int32 ``[N + 1]`` on the CPU.
        shares: number of threads.
    """
    rows = torch.empty(shares + 1, dtype=torch.int64)
    _library().gqsa_cpu_partition(crow_indices.data_ptr(), crow_indices.numel() - 1, shares, rows.data_ptr())
    return rows.tolist()
