import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from vllm_gqsa.format import GROUP_SIZES, FormatError, GroupSparseMatrix


@st.composite
def matrices(draw):
    """A random matrix of any mask, with the dense weight and mask it was made from."""
    size = draw(st.sampled_from(GROUP_SIZES))
    rows, groups = draw(st.integers(1, 9)), draw(st.integers(1, 19))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    keep = torch.rand(rows, groups, generator=generator) < draw(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]))
    spread = 10.0 ** draw(st.integers(-5, 3))
    weight = torch.randn(rows, groups * size, generator=generator) * spread
    return GroupSparseMatrix.from_dense(weight, keep, size), weight, keep


def decode(m):
    """The format's documentation, read literally, element by element."""
    dense = np.zeros((m.crow_indices.numel() - 1, m.in_features), dtype=np.float64)
    mask, codes = m.group_mask.numpy(), m.qweight.numpy()
    words = m.scale_zero.numpy().view(np.uint16)
    for row in range(dense.shape[0]):
        at = int(m.crow_indices[row])
        for j in range(m.in_features // m.group_size):
            if mask[row, j // 8] >> (j % 8) & 1:
                scale = np.uint16((words[at] & 0xFFF0) >> 1).view(np.float16).astype(np.float64)
                zero = int(words[at]) & 15
                for i in range(m.group_size):
                    code = int(codes[at, i // 2]) >> (4 * (i % 2)) & 15
                    dense[row, j * m.group_size + i] = scale * (code - zero)
                at += 1
        assert at == int(m.crow_indices[row + 1])
    return dense


@given(matrices())
@settings(max_examples=60, deadline=None)
def test_to_dense_is_what_the_documentation_says_exactly(made):
    matrix, _, _ = made
    matrix.validate()
    assert np.array_equal(matrix.to_dense(torch.float64).numpy(), decode(matrix))
    assert np.array_equal(matrix.to_dense().double().numpy(), decode(matrix))


@given(matrices())
@settings(max_examples=60, deadline=None)
def test_from_dense_keeps_the_mask_and_stays_within_a_step(made):
    matrix, weight, keep = made
    assert torch.equal(matrix.keep(), keep)
    dense = matrix.to_dense().view(*keep.shape, -1)
    assert not dense[~keep].any()
    groups = weight.view_as(dense)[keep]
    step = (groups.amax(-1).clamp(min=0) - groups.amin(-1).clamp(max=0)) / 15
    # Half a step for rounding, what a scale that is rounded itself clips at the ends, and
    # that again for tiny groups, where the grid of scales has steps of 2^-21.
    assert (torch.abs(dense[keep] - groups).amax(-1) <= 1.1 * step + 15 * 2.0**-22).all()


@given(matrices(), st.data())
@settings(max_examples=60, deadline=None)
def test_slices_and_concatenation_equal_those_of_the_dense_weight(made, data):
    matrix, _, _ = made
    dense = matrix.to_dense()
    cut = data.draw(st.integers(0, matrix.out_features))
    top, bottom = matrix.slice_rows(0, cut), matrix.slice_rows(cut, matrix.out_features)
    group = data.draw(st.integers(0, matrix.groups_per_row)) * matrix.group_size
    for part, expected in [
        (top, dense[:cut]), (bottom, dense[cut:]), (GroupSparseMatrix.concat([top, bottom]), dense),
        (matrix.slice_columns(group, matrix.in_features), dense[:, group:]),
        (matrix.slice_columns(0, group), dense[:, :group]),
    ]:  # fmt: skip
        part.validate()
        assert torch.equal(part.to_dense(), expected)


@given(matrices(), st.integers(0, 5))
@settings(max_examples=30, deadline=None)
def test_padding_adds_empty_rows(made, count):
    matrix, _, _ = made
    padded = matrix.pad_rows(count)
    padded.validate("padded", (matrix.out_features + count, matrix.in_features))
    expected = torch.nn.functional.pad(matrix.to_dense(), (0, 0, 0, count))
    assert torch.equal(padded.to_dense(), expected)


def test_a_slice_does_not_keep_the_whole_matrix_alive():
    matrix = GroupSparseMatrix.synthesize(64, 256)
    part = matrix.slice_rows(0, 2)
    assert part.qweight.untyped_storage().nbytes() == part.qweight.nbytes


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.95])
def test_synthesized_matrices_are_valid_and_as_sparse_as_asked(group_size, sparsity):
    matrix = GroupSparseMatrix.synthesize(32, 20 * group_size, group_size, sparsity)
    matrix.validate()
    assert matrix.sparsity == pytest.approx(sparsity)
    assert matrix.crow_indices.diff().unique().numel() == 1


def test_bits_a_weight_are_those_of_the_design():
    # 50 % of groups of 16: 8 bytes of codes and 2 of scale and zero a kept group, a bit a group, a pointer a row.
    matrix = GroupSparseMatrix.synthesize(64, 4096, 16, 0.5)
    assert matrix.bits_per_weight == pytest.approx(0.5 * 80 / 16 + 1 / 16 + 32 / 4096 + 32 / (64 * 4096))


def test_constant_and_zero_groups_are_exact():
    weight = torch.tensor([[0.0] * 16 + [1.5] * 16 + [-3.0] * 16])
    dense = GroupSparseMatrix.from_dense(weight, torch.ones(1, 3, dtype=torch.bool)).to_dense()
    assert torch.allclose(dense, weight, rtol=2**-7)
    assert not dense[:, :16].any()


def corrupt(matrix, name, change):
    tensor = getattr(matrix, name).clone()
    return replace(matrix, **{name: change(tensor)})


def setting(index, value):
    def change(tensor):
        tensor[index] = value
        return tensor

    return change


@pytest.mark.parametrize(("name", "change", "says"), [
    ("crow_indices", lambda t: t.long(), "crow_indices is torch.int64"),
    ("qweight", lambda t: t.to(torch.int8), "qweight is torch.int8"),
    ("crow_indices", lambda t: t[:-1], "crow_indices has shape .*, expected \\(5,\\)"),
    ("group_mask", lambda t: t[:, :1], "group_mask has shape"),
    ("qweight", lambda t: t[:, :4], "qweight has shape"),
    ("scale_zero", lambda t: t[:-1], "scale_zero has shape"),
    ("crow_indices", setting(0, 1), "starts at 1"),
    ("crow_indices", setting(2, 1000), "falls after row 2"),
    ("crow_indices", setting(2, -(2**31)), "falls after row 1"),
    ("crow_indices", setting(-1, 21), "ends at 21, but nnz is 20"),
    ("crow_indices", setting(1, 4), "row 0 keeps 5 groups, crow_indices says 4"),
    ("group_mask", setting((1, 1), 0x80), "row 1 has padding bits"),
    ("scale_zero", setting(3, 5), "scale_zero\\[3\\] holds the scale 0.0"),
    ("scale_zero", setting(3, (0x7C00 << 1) - 2**16), "scale_zero\\[3\\] holds the scale inf"),
    ("scale_zero", setting(3, (0x7E00 << 1) - 2**16), "scale_zero\\[3\\] holds the scale nan"),
])  # fmt: skip
def test_validation_names_the_place_and_the_value(name, change, says):
    matrix = GroupSparseMatrix.synthesize(4, 160, 16, 0.5)
    with pytest.raises(FormatError, match="^shard: layer: .*" + says):
        corrupt(matrix, name, change).validate("shard: layer", (4, 160))


def test_validation_compares_with_the_shape_the_model_needs():
    matrix = GroupSparseMatrix.synthesize(4, 160, 16, 0.5)
    with pytest.raises(FormatError, match="expected \\(9,\\)"):
        matrix.validate("x", (8, 160))
    with pytest.raises(FormatError, match="in_features is 160, the model needs 176"):
        matrix.validate("x", (4, 176))


def test_group_sizes_that_do_not_fit_are_refused():
    with pytest.raises(FormatError, match="group_size 12 is not one of 8, 16"):
        GroupSparseMatrix.synthesize(4, 48, 12)
    with pytest.raises(FormatError, match="group_size 32 does not divide in_features 48"):
        GroupSparseMatrix.from_dense(torch.zeros(2, 48), torch.ones(2, 1, dtype=torch.bool), 32)
    matrix = GroupSparseMatrix.synthesize(4, 64)
    with pytest.raises(ValueError, match="columns 0:8 do not fall on groups of 16"):
        matrix.slice_columns(0, 8)


def test_weights_that_are_not_finite_are_refused():
    weight = torch.zeros(2, 16)
    weight[1, 3] = float("nan")
    with pytest.raises(ValueError, match="infinite or NaN"):
        GroupSparseMatrix.from_dense(weight, torch.ones(2, 1, dtype=torch.bool))


@pytest.mark.slow
def test_packing_a_large_matrix_takes_under_a_second_on_one_core():
    weight = torch.randn(14336, 4096)
    keep = torch.rand(14336, 256) < 0.5
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times = []
        for _ in range(5):
            begin = time.perf_counter()
            GroupSparseMatrix.from_dense(weight, keep)
            times.append(time.perf_counter() - begin)
    finally:
        torch.set_num_threads(threads)
    assert min(times) < 1
