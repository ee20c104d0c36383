"""Which arithmetic a computation runs in: precision, speed, and equal bits."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from vllm_gqsa.offline.recipe import Precision

__all__ = ["fast_float32", "mixed", "reproducible", "resolve_precision"]

# Read when cuBLAS starts; without it torch cannot promise equal bits on CUDA.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def resolve_precision(wanted: Precision, device: torch.device) -> str:
    """``bfloat16`` or ``float32``; ``auto`` is bfloat16 where the device multiplies it in hardware."""
    if wanted != "auto":
        return wanted
    if device.type == "cpu":
        fast = torch.cpu._is_avx512_bf16_supported()
    else:  # what a GPU would need can be asked without one
        fast = not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if fast else "float32"


@contextmanager
def mixed(precision: str, device: torch.device) -> Iterator[None]:
    """Mixed precision, or float32 throughout."""
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16"):
        yield


@contextmanager
def reproducible(device: torch.device) -> Iterator[None]:
    """The same numbers in the same order give the same bits; on CUDA it costs some speed and memory.

    Operations that torch has no such algorithm for warn, since mixtures of experts count their tokens by one that is
    exact all the same. Attention kernels take no heed of that setting while it only warns, so plain products do.
    """
    if device.type == "cpu":
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@contextmanager
def fast_float32(device: torch.device) -> Iterator[None]:
    """Matrices of float32 are multiplied by oneDNN on a CPU, where that is as exact as MKL, torch's choice.

    On AMD processors MKL takes twice as long. torch leaves float32 to oneDNN only where less exact products are
    allowed, and with AMX they are less exact: so a product is tried out first.
    """
    before = torch.get_float32_matmul_precision()
    if device.type == "cpu":
        torch.set_float32_matmul_precision("medium")
        if not _is_exact():
            torch.set_float32_matmul_precision(before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@cache
def _is_exact() -> bool:
    a = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    exact = a.double() @ a.double().T
    return bool(((a @ a.T) - exact).norm() < 1e-6 * exact.norm())  # bfloat16: 2e-3
