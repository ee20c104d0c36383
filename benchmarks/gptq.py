"""INT4 in GPTQ's packing."""

import torch

__all__ = ["MIDDLE", "dequantize", "gptq_tensors", "round_to_nearest"]

MIDDLE = 8
"""The code that stands for zero: codes are symmetric about it."""
# Each nibble of GPTQ's zero points holds the zero point minus one.
_ZEROS = 0x77777777


def round_to_nearest(weight: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise symmetrically to 4 bits.

    Args:
        weight: floating point ``[N, K]``.
        group_size: neighbouring inputs that share a scale; divides K.

    Returns:
        Codes int32 ``[K, N]``, 0..15, and scales float32 ``[K / group_size, N]``; the weight is about
        ``(codes - 8) * scales``.
    """
    rows, columns = weight.shape
    groups = weight.float().t().reshape(columns // group_size, group_size, rows)
    scales = groups.abs().amax(1).div_(MIDDLE - 1).clamp_(min=1e-8)
    codes = (groups / scales[:, None]).round_().add_(MIDDLE).clamp_(0, 15)
    return codes.reshape(columns, rows).int(), scales


def dequantize(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The weight float32 ``[N, K]`` that codes and scales stand for."""
    size = codes.shape[0] // scales.shape[0]
    return ((codes - MIDDLE) * scales.float().repeat_interleave(size, 0)).t()


def gptq_tensors(codes: torch.Tensor, scales: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors of one linear in a GPTQ checkpoint.

    Args:
        codes: int32 ``[K, N]``, 0..15.
        scales: ``[K / group_size, N]``, in the dtype they are to have.

    Returns:
        qweight int32 ``[K / 8, N]``, nibble i of row r being the code of input 8 r + i; scales as they are; qzeros
        int32 ``[K / group_size, N / 8]``.
    """
    inputs, outputs = codes.shape
    nibbles = codes.view(inputs // 8, 8, outputs)
    qweight = torch.zeros(inputs // 8, outputs, dtype=torch.int32, device=codes.device)
    for i in range(8):
        qweight |= nibbles[:, i] << 4 * i
    qzeros = torch.full((scales.shape[0], outputs // 8), _ZEROS, dtype=torch.int32, device=codes.device)
    return {"qweight": qweight, "scales": scales, "qzeros": qzeros}
