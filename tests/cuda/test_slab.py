"""The layout: csrc/common/slab.h says what is checked here."""

import time

import pytest
import torch

from tests.helpers import random_matrix
from vllm_gqsa.format import GROUP_SIZES, GroupSparseMatrix
from vllm_gqsa.kernels.slab import MAX_GROUPS, SlabMatrix

CODE_BITS = (0, 16, 4, 20, 8, 24, 12, 28)


def columns_of(packed):
    """Column of every group, [records, 32, groups], -1 where there is none."""
    base = (packed.heads.long() & 0xFFFFFFFF) >> 2 & 0x3FFF
    return torch.where(packed.scale_zero != 0, packed.columns.long() + base[:, None, None], -1)


def conflicts(packed):
    """How often lanes that read shared memory together meet in a bank: passes over those that are needed."""
    columns = columns_of(packed).view(-1, 4, 8, packed.columns.shape[2])  # [record, phase, lane, group]
    same = torch.stack([((columns % 8 == bank) & (columns >= 0)).sum(2) for bank in range(8)]).amax(0)
    return float(same.sum() / (columns >= 0).any(2).sum())


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("rows", [1, 31, 32, 33, 64, 65, 97, 1100])
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_packing_is_undone_exactly(group_size, rows, density):
    weight = random_matrix(rows, 640, group_size, density, seed=rows)
    for name, tensor in SlabMatrix.pack(weight).unpack().tensors().items():
        assert torch.equal(tensor, weight.tensors()[name]), name


def test_it_lies_on_the_cpu_whatever_the_default_device_is():
    weight = random_matrix(33, 640, 16, 0.3)
    with torch.device("meta"):
        packed = SlabMatrix.pack(weight)
        assert torch.equal(packed.unpack().qweight, weight.qweight)
    assert {tensor.device.type for tensor in packed.tensors().values()} == {"cpu"}


@pytest.mark.parametrize("columns", [16, 48, 16 * 300, 16 * 2000])
def test_rows_wider_than_a_window(columns):
    weight = random_matrix(70, columns, 16, 0.2)
    assert torch.equal(SlabMatrix.pack(weight).unpack().qweight, weight.qweight)


def test_bits_of_a_word():
    keep = torch.zeros(1, 2, dtype=torch.bool)
    keep[0, 1] = True
    codes = torch.arange(16, dtype=torch.uint8)[None]
    weight = GroupSparseMatrix.from_codes(codes, torch.tensor([0.5]), torch.tensor([3]), keep)
    packed = SlabMatrix.pack(weight)
    words = packed.qweight[0, 0, 0].tolist()
    for word, first in zip(words[:2], (0, 8), strict=True):
        assert [(word >> bit) & 15 for bit in CODE_BITS] == list(range(first, first + 8))
    assert words[2:] == [0, 0]
    assert columns_of(packed)[0, 0].tolist() == [1, -1, -1, -1]
    assert packed.scale_zero[0, 0, 0] == weight.scale_zero[0]


def test_a_group_of_128_is_stored_as_two_of_64():
    packed = SlabMatrix.pack(random_matrix(32, 512, 128, 1.0))
    assert packed.columns.shape == (8, 32, 1)
    assert sorted(columns_of(packed)[:, 3, 0].tolist()) == list(range(8))


@pytest.mark.parametrize("rows", [40, 2100])
def test_slabs_and_heads(rows):
    weight = random_matrix(rows, 640, 16, 0.5)
    packed = SlabMatrix.pack(weight)
    heads = packed.heads.long() & 0xFFFFFFFF
    slab = heads >> 16
    starts = packed.slab_ptr.long()
    assert torch.equal(torch.bincount(slab, minlength=len(starts) - 1), starts.diff())
    assert torch.equal((heads & 1).nonzero().flatten(), starts[:-1])
    assert torch.equal((heads >> 1 & 1).nonzero().flatten(), starts[1:] - 1)
    # Both slabs of a panel have the same bases, which never fall.
    for first in range(0, len(starts) - 2, 2):
        bases = [(heads[starts[s] : starts[s + 1]] >> 2) & 0x3FFF for s in (first, first + 1)]
        assert torch.equal(*bases)
        assert (bases[0].diff() >= 0).all()
    used = packed.rows.flatten()
    assert torch.equal(used[used >= 0].sort().values, torch.arange(rows, dtype=torch.int32))
    assert torch.equal(used[packed.lanes.long()], torch.arange(rows, dtype=torch.int32))
    # Sorted by length within 1,024 rows, and not beyond.
    lengths = weight.crow_indices.diff()
    for start in range(0, rows, 1024):
        mine = used[start : min(start + 1024, len(used))]
        mine = mine[mine >= 0].long()
        assert ((mine >= start) & (mine < start + 1024)).all()
        assert (lengths[mine].diff() <= 0).all()


def test_little_is_added_and_banks_rarely_meet():
    generator = torch.Generator().manual_seed(0)
    keep = torch.rand(1024, 256, generator=generator) < 0.5
    weight = GroupSparseMatrix.from_dense(torch.randn(1024, 4096, generator=generator), keep)
    packed = SlabMatrix.pack(weight)
    assert (packed.scale_zero == 0).float().mean() < 0.03  # 0.14 with rows unsorted
    assert conflicts(packed) < 1.25  # 2.5 in random order


def test_a_matrix_of_an_8b_model_takes_less_than_two_seconds():
    weight = GroupSparseMatrix.synthesize(28672, 4096)
    start = time.process_time()
    SlabMatrix.pack(weight)
    assert time.process_time() - start < 2


def test_number_of_threads_does_not_matter():
    weight, threads = random_matrix(500, 640), torch.get_num_threads()
    packed = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            packed.append(SlabMatrix.pack(weight).tensors())
    finally:
        torch.set_num_threads(threads)
    for name, tensor in packed[0].items():
        assert torch.equal(tensor, packed[1][name]), name


def test_too_wide_is_refused():
    weight = GroupSparseMatrix.synthesize(1, 8 * (MAX_GROUPS + 1), 8)
    with pytest.raises(ValueError, match=r"too large for the CUDA kernels: they number 2097152 rows and 16384 groups"):
        SlabMatrix.pack(weight)
