import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as hnp

from vllm_gqsa.format import (
    decode_scale_zero,
    encode_scale_zero,
    pack_bitmap,
    pack_nibbles,
    round_scale,
    unpack_bitmap,
    unpack_nibbles,
)
from vllm_gqsa.format.codecs import SCALE_MAX, SCALE_MIN

# Every positive binary16 whose last three mantissa bits are 0: the whole grid, 3,967 values.
GRID = np.arange(8, 0x7C00, 8, dtype=np.uint16).view(np.float16).astype(np.float64)


@given(
    hnp.arrays(
        np.uint8,
        hnp.array_shapes(min_dims=2, max_dims=2).map(lambda s: (s[0], 2 * s[1])),
        elements=st.integers(0, 15),
    )
)
def test_nibbles_low_first_and_back(codes):
    packed = pack_nibbles(torch.from_numpy(codes))
    assert np.array_equal(packed.numpy(), codes[:, 0::2] + 16 * codes[:, 1::2])
    assert np.array_equal(unpack_nibbles(packed).numpy(), codes)


@given(hnp.arrays(np.bool_, hnp.array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=40)))
def test_bitmap_is_numpys_little_endian_packbits(keep):
    packed = pack_bitmap(torch.from_numpy(keep))
    assert np.array_equal(packed.numpy(), np.packbits(keep, axis=1, bitorder="little"))
    assert np.array_equal(unpack_bitmap(packed).numpy()[:, : keep.shape[1]], keep)


@given(st.floats(min_value=2.0**-22, max_value=1e5))
def test_scales_round_to_the_nearest_of_the_grid(value):
    rounded = round_scale(torch.tensor([value])).item()
    assert rounded in GRID
    assert abs(rounded - np.float32(value)) == np.abs(GRID - np.float64(np.float32(value))).min()


def test_every_word_of_the_format_survives():
    bits = torch.arange(8, 0x7C00, 8, dtype=torch.int32)
    scales = bits.to(torch.int16).view(torch.float16).repeat_interleave(16)
    zeros = torch.arange(16, dtype=torch.uint8).repeat(bits.numel())
    words = encode_scale_zero(scales, zeros)
    assert words.unique().numel() == words.numel() == GRID.size * 16
    back_scales, back_zeros = decode_scale_zero(words)
    assert torch.equal(back_scales, scales)
    assert torch.equal(back_zeros, zeros)
    assert torch.equal(round_scale(scales), scales.float())


def test_a_word_is_laid_out_as_documented():
    # 1.5 is 0x3E00 in binary16; shifted left by one, the zero point 9 goes into the low four bits.
    word = encode_scale_zero(torch.tensor([1.5]), torch.tensor([9]))
    assert word.item() & 0xFFFF == (0x3E00 << 1) | 9


def test_the_ends_of_the_grid():
    assert GRID.min() == SCALE_MIN
    assert GRID.max() == SCALE_MAX
    assert round_scale(torch.tensor([0.0, 1e30])).tolist() == [SCALE_MIN, SCALE_MAX]


@pytest.mark.parametrize(("scale", "zero", "says"), [
    (1.0001, 0, "scale 1.0001.* grid"), (0.0, 0, "scale 0"), (-1.0, 0, "scale -1"), (float("inf"), 0, "scale inf"),
    (1.0, 16, "zero point 16"), (1.0, -1, "zero point -1"), (1.0, 2.5, "zero point 2.5"),
])  # fmt: skip
def test_what_cannot_be_stored_is_refused(scale, zero, says):
    with pytest.raises(ValueError, match=says):
        encode_scale_zero(torch.tensor([scale]), torch.tensor([zero]))


def test_nan_scales_are_refused():
    with pytest.raises(ValueError, match="NaN"):
        round_scale(torch.tensor([1.0, float("nan")]))
