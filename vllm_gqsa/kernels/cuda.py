"""The CUDA kernels (csrc/cuda): whether a device can run them, and which one serves how many tokens.

The library has a plain C interface and is called through ctypes, so one build serves every version of torch and Python.
Nothing here waits for the device, and nothing that is allocated depends on data, so calls can be captured in a graph.
"""

import ctypes
import functools
import logging
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from vllm_gqsa.format import GroupSparseMatrix
from vllm_gqsa.kernels.native import batch_invariant, open_library
from vllm_gqsa.kernels.slab import MAX_GROUPS, MAX_ROWS, SlabMatrix

__all__ = ["Device", "available", "choose_kernel", "device_of", "linear_cuda", "look_up", "usable"]

_logger = logging.getLogger(__name__)

_LIBRARY = Path(__file__).with_name("_cuda.so")
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_CROSSOVER = {80: (8, 64), 86: (8, 64), 89: (8, 64), 90: (8, 64), 100: (8, 64), 120: (8, 64)}
"""Up to how many tokens gemv and gemm are used, by compute capability times ten: the most that each can take. Not yet
measured on a GPU."""

_DENSE_BYTES = 64 << 20
"""Dense weight expanded at a time for a prefill; it should stay in the second-level cache until it is multiplied."""

_LEAST_RECORDS = 8
"""Records that are worth a block."""

_SORT_ROWS = 1024  # kSortRows of csrc/common/slab.h: rows that the slabs keep together
_LANES = 32
_PANEL_ROWS = 64


class _Weight(ctypes.Structure):
    """``gqsa::cuda::Weight`` of csrc/cuda/arguments.h."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in ("codes", "scale_zero", "columns", "heads", "slab_ptr", "rows", "lanes", "counters")
        ),
        *((name, ctypes.c_int32) for name in ("records", "slabs", "out_features", "in_features", "group_size")),
    )


class _Product(ctypes.Structure):
    """``gqsa::cuda::Product`` of csrc/cuda/arguments.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "bias", "y", "workspace")),
        *((name, ctypes.c_int64) for name in ("x_stride", "y_stride")),
        *((name, ctypes.c_int32) for name in ("tokens", "dtype")),
    )


@dataclass(frozen=True)
class Device:
    """What of a device matters to the choice of a kernel.

    Attributes:
        capability: compute capability times ten that the code which runs there was made for.
        multiprocessors: their number, and that of the blocks of a launch.
        shared_bytes: shared memory that a block may use.
    """

    capability: int
    multiprocessors: int
    shared_bytes: int


@functools.cache
def _library() -> ctypes.CDLL:
    int32, pointer = ctypes.c_int32, ctypes.c_void_p
    weight, product = ctypes.POINTER(_Weight), ctypes.POINTER(_Product)
    number = ctypes.POINTER(int32)
    return open_library(
        _LIBRARY,
        {
            "gqsa_cuda_device": (int32, number, number, number),
            "gqsa_cuda_message": (ctypes.c_char_p, int32),
            "gqsa_cuda_gemv_shared": (int32, int32, int32),
            "gqsa_cuda_gemv": (int32, weight, product, int32, int32, int32, pointer),
            "gqsa_cuda_gemm": (int32, weight, product, int32, int32, pointer),
            "gqsa_cuda_expand": (int32, weight, int32, int32, int32, int32, pointer, pointer),
            "gqsa_cuda_look_up": (int32, weight, pointer, int32, int32, pointer, pointer),
        },
    )


def _current(device: torch.device) -> AbstractContextManager[object]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def available() -> bool:
    """Whether the kernels were built."""
    return _LIBRARY.exists()


@functools.cache
def device_of(device: torch.device) -> Device | None:
    """What the library says of a device; None, said once and with the reason, where it cannot run there."""
    if not available():
        reason = "it was installed without its CUDA kernels (no nvcc was found then, or GQSA_CUDA_ARCHS was empty)"
    else:
        numbers = [ctypes.c_int32() for _ in range(3)]
        with _current(device):
            error = _library().gqsa_cuda_device(*numbers)
        if not error:
            return Device(*(number.value for number in numbers))
        reason = f"its CUDA kernels do not run there ({_library().gqsa_cuda_message(error).decode()})"
    _logger.warning(
        "vllm-gqsa on %s: %s. Every linear expands its whole weight on every call, which is slow. Install vllm-gqsa "
        "again where nvcc is, or a wheel that covers this GPU; from sm_80 on one can.",
        *(device, reason),
    )
    return None


def usable(device: torch.device, weight: GroupSparseMatrix) -> bool:
    """Whether the kernels can multiply by ``weight`` on ``device``; where not, a warning says why."""
    rows, columns = weight.out_features, weight.in_features
    if rows > MAX_ROWS or columns // min(weight.group_size, 64) > MAX_GROUPS:
        _logger.warning("a matrix [%d, %d] is too large for the CUDA kernels; torch computes it, slowly", rows, columns)
        return False
    return device_of(device) is not None


@functools.cache
def _gemv_tokens(in_features: int, shared_bytes: int) -> int:
    """How many tokens gemv can take at a time; 0 where not even one fits into shared memory."""
    needed = _library().gqsa_cuda_gemv_shared
    return next((m for m in (8, 4, 2, 1) if needed(m, in_features) <= shared_bytes), 0)


def choose_kernel(tokens: int, in_features: int, device: Device, invariant: bool = False) -> tuple[str, int]:
    """The kernel for a number of tokens, and how many of them it takes at a time.

    Args:
        tokens: M, at least 1.
        in_features: K; the activations of gemv must fit into shared memory.
        device: from :func:`device_of`.
        invariant: whether a token's result must not depend on how many there are.

    Returns:
        "gemv" (1 to 8 tokens), "gemm" (1 to 64) or "expand" (any number).
    """
    fits = _gemv_tokens(in_features, device.shared_bytes)
    if invariant:
        return ("gemv", fits) if fits else ("gemm", 64)
    known = max((c for c in _CROSSOVER if c <= device.capability), default=80)
    gemv_until, gemm_until = _CROSSOVER[known]
    if tokens <= min(gemv_until, fits):
        return "gemv", fits
    return ("gemm", 64) if tokens <= gemm_until else ("expand", tokens)


def linear_cuda(
    x: torch.Tensor,
    weight: SlabMatrix,
    bias: torch.Tensor | None = None,
    kernel: str | None = None,
    by_slab: bool = False,
) -> torch.Tensor:
    """Multiply by a weight in slabs on its device.

    vLLM's environment variable ``VLLM_BATCH_INVARIANT=1`` keeps to one kernel whatever the number of tokens.

    Args:
        x: float32, float16 or bfloat16 ``[..., K]``, any strides; float32 is always expanded.
        weight: ``[N, K]`` on the device of ``x``, trusted.
        bias: ``[N]`` in the dtype of ``x``.
        kernel: "gemv", "gemm" or "expand", to be used for any number of tokens; None chooses.
        by_slab: divide gemv's work by rows (data-centric), not evenly (task-centric); for comparisons.

    Returns:
        ``[..., N]`` in the dtype of ``x``. Sums are float32, within 16 weights float16 in gemv; gemm and expand round
        each weight to the dtype of ``x`` first, as a dense model does.

    Raises:
        TypeError: ``x`` has another dtype.
        RuntimeError: a launch failed.
    """
    if x.dtype not in _DTYPES:
        raise TypeError(f"gqsa::linear: x is {x.dtype}; it must be float32, float16 or bfloat16")
    flat = x.reshape(-1, weight.in_features)
    tokens = flat.shape[0]
    out = torch.empty(tokens, weight.out_features, dtype=x.dtype, device=x.device)
    if tokens:
        device = device_of(x.device)
        if device is None:
            raise RuntimeError(f"gqsa::linear: the CUDA kernels cannot run on {x.device}")
        step = {"gemv": 8, "gemm": 64}.get(kernel or "", tokens)
        if x.dtype == torch.float32:
            kernel = "expand"
        elif kernel is None:
            kernel, step = choose_kernel(tokens, weight.in_features, device, batch_invariant())
        with _current(x.device):
            if kernel == "expand":
                _expand_and_multiply(flat, weight, bias, out)
            else:
                flat, bias = _aligned(flat), None if bias is None else bias.contiguous()
                for start in range(0, tokens, step):
                    part = slice(start, start + step)
                    _multiply(flat[part], weight, bias, out[part], kernel, by_slab, device)
    return out.view(*x.shape[:-1], weight.out_features)


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """``x`` or a copy whose rows are contiguous and begin at multiples of 16 bytes."""
    if x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _multiply(
    x: torch.Tensor,
    weight: SlabMatrix,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    kernel: str,
    by_slab: bool,
    device: Device,
) -> None:
    tokens = x.shape[0]
    sizes, rows = ((1, 2, 4, 8), _LANES) if kernel == "gemv" else ((16, 32, 64), _PANEL_ROWS)
    blocks = _count_blocks(weight, rows, device.multiprocessors)
    padded = next(size for size in sizes if size >= tokens)
    workspace = torch.empty(blocks * 2 * rows * padded, dtype=torch.float32, device=x.device)
    product = _Product(
        *(x.data_ptr(), None if bias is None else bias.data_ptr(), out.data_ptr(), workspace.data_ptr()),
        *(x.stride(0), out.stride(0), tokens, _DTYPES[x.dtype]),
    )
    overlap = device.capability >= 90
    extra = (by_slab, overlap) if kernel == "gemv" else (overlap,)
    function = getattr(_library(), f"gqsa_cuda_{kernel}")
    _check(function(_weight(weight), product, blocks, *extra, _stream(x.device)))


def _count_blocks(weight: SlabMatrix, rows: int, most: int) -> int:
    """Blocks to divide the records of a matrix by; ``rows`` is what a block stores at a time.

    With as many as there are multiprocessors all of them work. With somewhat fewer, if rows are equally long, no two
    blocks may have to share a slab, and nothing need be added up between them.
    """
    units = -(-weight.out_features // rows)
    each = -(-units // most)
    if each * most <= 1.08 * units:
        return -(-units // each)
    return max(1, min(most, weight.heads.shape[0] // _LEAST_RECORDS))


def _expand_and_multiply(x: torch.Tensor, weight: SlabMatrix, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    step = max(1, _DENSE_BYTES // (weight.in_features * x.element_size() * _SORT_ROWS)) * _SORT_ROWS
    for start in range(0, weight.out_features, step):
        stop = min(weight.out_features, start + step)
        dense = _expand(weight, start, stop, x.dtype).t()
        if bias is None:
            torch.mm(x, dense, out=out[:, start:stop])
        else:
            torch.addmm(bias[start:stop], x, dense, out=out[:, start:stop])


def _expand(weight: SlabMatrix, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows of the dense weight; ``start`` and ``stop`` are multiples of 1024, or N."""
    out = torch.zeros(stop - start, weight.in_features, dtype=dtype, device=weight.qweight.device)
    first, count = start // _LANES, -(-(stop - start) // _LANES)
    _check(
        _library().gqsa_cuda_expand(
            *(_weight(weight), first, count, start, _DTYPES[dtype], out.data_ptr()), _stream(out.device)
        )
    )
    return out


def look_up(ids: torch.Tensor, weight: SlabMatrix, dtype: torch.dtype) -> torch.Tensor:
    """Rows ``ids`` (int32 or int64, any shape) of the dense weight, rounded once to ``dtype``: ``[*ids.shape, K]``.

    An id that is no row gives NaN: it cannot be noticed without waiting for the device.
    """
    out = torch.zeros(*ids.shape, weight.in_features, dtype=dtype, device=ids.device)
    if ids.numel():
        ids = ids.to(torch.int64).contiguous()
        with _current(ids.device):
            _check(
                _library().gqsa_cuda_look_up(
                    *(_weight(weight), ids.data_ptr(), ids.numel(), _DTYPES[dtype], out.data_ptr()),
                    _stream(ids.device),
                )
            )
    return out


def _weight(weight: SlabMatrix) -> _Weight:
    tensors = (
        *(weight.qweight, weight.scale_zero, weight.columns, weight.heads),
        *(weight.slab_ptr, weight.rows, weight.lanes, weight.counters),
    )
    return _Weight(
        *(tensor.data_ptr() for tensor in tensors),
        *(weight.heads.shape[0], weight.rows.shape[0], weight.out_features, weight.in_features),
        min(weight.group_size, 64),
    )


def _stream(device: torch.device) -> int | None:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None


def _check(error: int) -> None:
    if error:
        raise RuntimeError(f"gqsa: a CUDA launch failed: {_library().gqsa_cuda_message(error).decode()}")
