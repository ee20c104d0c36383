"""The forms in which a matrix can lie in memory, by the names that the ops know them by."""

from collections.abc import Callable, Sequence

import torch

from vllm_gqsa.format import GroupSparseMatrix
from vllm_gqsa.kernels import cpu, cuda, native
from vllm_gqsa.kernels.cpu import PackedMatrix
from vllm_gqsa.kernels.slab import SlabMatrix

__all__ = ["Matrix", "check_use", "layout_of", "prepare", "rebuild", "restore"]

Matrix = GroupSparseMatrix | PackedMatrix | SlabMatrix

_LAYOUTS: dict[str, type[Matrix]] = {"checkpoint": GroupSparseMatrix, "cpu": PackedMatrix, "cuda": SlabMatrix}


def layout_of(weight: Matrix) -> str:
    """The name of its layout."""
    return next(name for name, kind in _LAYOUTS.items() if isinstance(weight, kind))


def rebuild(tensors: Sequence[torch.Tensor], layout: str, in_features: int, group_size: int) -> Matrix:
    """The matrix whose ``tensors()`` these are, in their order."""
    kind: Callable[..., Matrix] = _LAYOUTS[layout]
    return kind(*tensors, in_features, group_size)


def check_use(name: str, x: torch.Tensor, weight: Matrix) -> None:
    """Refuse what the native kernels, which trust pointers, would not notice.

    Args:
        name: of the op, for the message.
        x: what it is given to compute with.
        weight: the matrix.

    Raises:
        ValueError: ``x`` is on another device than ``weight``.
        RuntimeError: a gradient is wanted through a matrix that was prepared for a native kernel.
    """
    if x.device != weight.qweight.device:
        raise ValueError(f"{name}: x is on {x.device}, the weight on {weight.qweight.device}")
    if x.requires_grad and torch.is_grad_enabled() and not isinstance(weight, GroupSparseMatrix):
        raise RuntimeError(
            f"{name}: the native kernels have no gradients; call it under torch.no_grad(), or with the matrix as it "
            "was before vllm_gqsa.kernels.prepare"
        )


def prepare(weight: GroupSparseMatrix, device: torch.device | str | None = None) -> Matrix:
    """A matrix laid out for the fastest kernel of a device, and there: what to keep in place of ``weight``.

    Where the native kernels of the device were not built, or do not fit it, that is ``weight`` itself, for the torch
    reference, and a warning says so once.

    Args:
        weight: valid.
        device: where it is to be used; None for where it is.
    """
    device = weight.qweight.device if device is None else torch.device(device)
    if device.type == "cpu" and native.available() and cpu.usable(weight):
        return PackedMatrix.pack(weight.to(device))
    if device.type == "cuda" and native.available() and cuda.usable(device, weight):
        return SlabMatrix.pack(weight.to("cpu")).to(device)
    return weight if device == weight.qweight.device else weight.to(device)


def restore(weight: Matrix) -> GroupSparseMatrix:
    """The matrix that :func:`prepare` was given, on the device of ``weight``."""
    return weight if isinstance(weight, GroupSparseMatrix) else weight.unpack()
