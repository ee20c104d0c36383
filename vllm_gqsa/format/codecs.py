"""Bit packing: 4-bit codes, the bitmap of kept groups, and the 16-bit word of a scale and a zero point.

All functions are pure, vectorised torch and keep the device of their input.
"""

import torch

__all__ = [
    "SCALE_MAX",
    "SCALE_MIN",
    "decode_scale_zero",
    "encode_scale_zero",
    "pack_bitmap",
    "pack_nibbles",
    "round_scale",
    "unpack_bitmap",
    "unpack_nibbles",
]

SCALE_MIN = 2.0**-21
"""Smallest positive scale of the grid (binary16 bits 0x0008)."""
SCALE_MAX = 65280.0
"""Largest finite scale of the grid (binary16 bits 0x7BF8)."""
_SMALLEST_NORMAL = 2.0**-14


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Pack 4-bit codes two to a byte, element 2i in the low nibble of byte i.

    Args:
        codes: uint8 ``[..., G]``, values 0..15, G even.

    Returns:
        uint8 ``[..., G / 2]``.
    """
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """Undo :func:`pack_nibbles`: uint8 ``[..., G / 2]`` to uint8 ``[..., G]``."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def pack_bitmap(keep: torch.Tensor) -> torch.Tensor:
    """Pack booleans eight to a byte, least significant bit first, padding bits 0.

    Args:
        keep: bool ``[N, S]``.

    Returns:
        uint8 ``[N, ceil(S / 8)]``.
    """
    rows, groups = keep.shape
    padded = torch.nn.functional.pad(keep.to(torch.uint8), (0, -groups % 8))
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=keep.device)
    return (padded.view(rows, padded.shape[1] // 8, 8) * weights).sum(-1, dtype=torch.uint8)


def unpack_bitmap(bitmap: torch.Tensor) -> torch.Tensor:
    """Undo :func:`pack_bitmap` with its padding: uint8 ``[N, B]`` to bool ``[N, 8 * B]``."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bitmap.device)
    return ((bitmap[..., None] >> shifts) & 1).flatten(-2).bool()


def round_scale(scales: torch.Tensor) -> torch.Tensor:
    """Round positive scales to the grid of the format: 5 exponent and 7 mantissa bits, ties to even.

    Args:
        scales: floating point, any shape, positive; values outside
            [:data:`SCALE_MIN`, :data:`SCALE_MAX`] are clamped.

    Returns:
        float32, same shape, every value exactly a binary16 without its last three mantissa bits.

    Raises:
        ValueError: a scale is NaN.
    """
    if torch.isnan(scales).any():
        raise ValueError("a scale is NaN")
    wide = scales.float().clamp(SCALE_MIN, SCALE_MAX)
    # Seven mantissa bits are bfloat16's; below binary16's normal range the grid has one fixed step.
    return torch.where(wide < _SMALLEST_NORMAL, (wide / SCALE_MIN).round() * SCALE_MIN, wide.bfloat16().float())


def encode_scale_zero(scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    """Pack scales and zero points into the format's 16-bit words.

    Args:
        scales: floating point ``[nnz]`` on the grid (see :func:`round_scale`).
        zeros: integer or integral floating point ``[nnz]``, values 0..15.

    Returns:
        int16 ``[nnz]``: scale in bits 15..4, zero point in bits 3..0.

    Raises:
        ValueError: a scale is off the grid or not positive, or a zero point is not an integer 0..15.
    """
    half = scales.half()
    bits = half.view(torch.int16).to(torch.int32)
    on_grid = (half.float() == scales.float()) & (bits & 7 == 0) & (bits > 0) & (bits < 0x7C00)
    if not on_grid.all():
        raise ValueError(f"scale {scales[~on_grid][0].item()} is not on the 12-bit grid")
    legal = (zeros >= 0) & (zeros <= 15) & (zeros == zeros.to(torch.int32))
    if not legal.all():
        raise ValueError(f"zero point {zeros[~legal][0].item()} is not an integer 0..15")
    return ((bits << 1) | zeros.to(torch.int32)).to(torch.int16)


def decode_scale_zero(words: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Undo :func:`encode_scale_zero`.

    Args:
        words: int16 ``[nnz]``.

    Returns:
        Scales, float16 ``[nnz]``, and zero points, uint8 ``[nnz]``. Words that are not valid give
        scales that are zero, infinite or NaN; :meth:`GroupSparseMatrix.validate` rejects them.
    """
    wide = words.to(torch.int32) & 0xFFFF
    scales = ((wide & 0xFFF0) >> 1).to(torch.int16).view(torch.float16)
    return scales, (wide & 15).to(torch.uint8)
