"""Which kernel computes a linear on this machine, and why: said when a model is loaded, and by ``gqsa doctor``."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from vllm_gqsa.kernels import cpu, cuda, native

__all__ = ["EXPANDED_EXPERTS", "Choice", "check_environment", "choose", "choose_for_experts"]


@dataclass(frozen=True)
class Choice:
    """A kernel.

    Attributes:
        kernel: its name.
        why: what it was chosen for, or what stands in the way of a better one.
        native: whether it multiplies by the compressed weights; what does not is slow.
    """

    kernel: str
    why: str
    native: bool = True

    def __str__(self) -> str:
        return f"{self.kernel} ({self.why})"


EXPANDED_EXPERTS = Choice(
    "expand", "experts have no decode kernel on a GPU: their weights are expanded in every step", native=False
)
"""What is chosen for the routed experts of a mixture on a GPU."""


def check_environment() -> None:
    """Check the environment variables that act inside the ops, before a model is loaded for them in vain.

    Raises:
        ValueError: ``GQSA_CPU_ACT`` is neither empty nor "int8".
    """
    cpu.check_activations(os.environ.get("GQSA_CPU_ACT", ""))


def choose(device: str, dtype: torch.dtype, group_size: int) -> Choice:
    """The kernel for a few tokens; with many, the CPU kernels hand over to oneDNN. What a GPU cannot run is logged.

    Args:
        device: type of a torch device, for example ``cpu`` or ``cuda``.
        dtype: of the activations.
        group_size: G.
    """
    unknown = Choice("torch reference", f"there is no kernel for {device}", native=False)
    return _CHOICES.get(device, lambda *_: unknown)(dtype, group_size)


def choose_for_experts(device: str, dtype: torch.dtype, group_size: int) -> Choice:
    """As :func:`choose`, for the routed experts of a mixture."""
    found = choose(device, dtype, group_size)
    return found if device == "cpu" or not found.native else EXPANDED_EXPERTS


def _on_cpu(dtype: torch.dtype, group_size: int) -> Choice:
    if not native.available():
        return Choice("torch reference", "installed without a C++ compiler", native=False)
    asked = os.environ.get("GQSA_CPU_ACT", "")
    name = cpu.choose_kernel(dtype, group_size, asked)
    if name == "avx512_vnni":
        return Choice(name, f"GQSA_CPU_ACT={asked}")
    return Choice(name, f"the fastest on this processor for {str(dtype).removeprefix('torch.')}, G = {group_size}")


def _on_cuda(dtype: torch.dtype, _group_size: int) -> Choice:
    if not native.available() or not cuda.available():
        return Choice("torch reference", "installed without nvcc or a C++ compiler", native=False)
    found = cuda.device_of(torch.device("cuda"))
    if found is None:
        return Choice("torch reference", "the CUDA kernels do not run on this GPU", native=False)
    if dtype == torch.float32:
        return Choice("expand", "float32 has no kernel of its own on a GPU")
    return Choice("gemv, gemm or expand", f"by the number of tokens; compute capability {found.capability / 10}")


_CHOICES: Mapping[str, Callable[[torch.dtype, int], Choice]] = {"cpu": _on_cpu, "cuda": _on_cuda}
