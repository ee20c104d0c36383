"""The row lookup against ``F.embedding`` of the dense twin."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from tests.helpers import random_matrix
from vllm_gqsa.format import GroupSparseMatrix
from vllm_gqsa.kernels import embedding as module, prepare
from vllm_gqsa.kernels.embedding import embedding


@pytest.mark.parametrize("ids", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_equals_the_dense_lookup_bit_for_bit(dtype, ids):
    weight = random_matrix(24, 64)
    rows = torch.randint(24, (50,), dtype=ids)
    expected = F.embedding(rows, weight.to_dense(dtype))
    assert torch.equal(embedding(rows, weight, dtype), expected)
    assert torch.equal(embedding(rows, prepare(weight), dtype), expected)


@given(
    leading=st.lists(st.integers(0, 4), max_size=3),
    rows=st.integers(1, 9),
    groups=st.integers(1, 9),
    size=st.sampled_from([8, 16, 32]),
    density=st.sampled_from([0.0, 0.5, 1.0]),
    padding=st.integers(0, 2),
)
@settings(deadline=None, max_examples=60)
def test_any_shape(leading, rows, groups, size, density, padding):
    weight = random_matrix(rows, groups * size, size, density).pad_rows(padding)
    ids = torch.randint(rows + padding, leading)
    found = embedding(ids, weight)
    assert found.shape == (*leading, groups * size)
    assert torch.equal(found, F.embedding(ids, weight.to_dense()))
    assert torch.equal(embedding(ids, prepare(weight)), found)


def test_nothing_kept():
    weight = GroupSparseMatrix.from_dense(torch.ones(4, 32), torch.zeros(4, 2, dtype=torch.bool))
    assert torch.equal(embedding(torch.tensor([3, 0]), weight), torch.zeros(2, 32))


@pytest.mark.parametrize("layout", [prepare, lambda weight: weight])
@pytest.mark.parametrize("ids", [[-1], [-2], [3, 24]])
def test_ids_outside_of_the_table_are_refused(ids, layout):
    with pytest.raises(IndexError, match=rf"gqsa::embedding: ids {ids[0]}\.\.{ids[-1]} are outside 0\.\.23"):
        embedding(torch.tensor(ids), layout(random_matrix(24, 64)))


def test_where_nobody_waits_an_id_that_is_no_row_gives_nan():
    weight = random_matrix(24, 64)
    found = module._embedding_reference(torch.tensor([24, -1, 3]), weight, torch.float16)
    assert found[:2].isnan().all()
    assert torch.equal(found[2], weight.to_dense(torch.float16)[3])


@pytest.mark.parametrize("shape", [(5,), (2, 3), (), (0,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(shape, dtype):
    weight = random_matrix(24, 64)
    arguments = (torch.randint(24, shape), list(weight.tensors().values()), "checkpoint", 64, 16, dtype)
    torch.library.opcheck(torch.ops.gqsa.embedding.default, arguments)


def test_compiles_whole_for_any_number_of_tokens():
    weight = random_matrix(24, 64)
    compiled = torch.compile(lambda i: embedding(i, weight) + 1, fullgraph=True, dynamic=True, backend="eager")
    for tokens in (1, 2, 7, 33):
        ids = torch.randint(24, (tokens,))
        assert torch.equal(compiled(ids), embedding(ids, weight) + 1)


def test_importing_twice_is_harmless():
    importlib.reload(module)
    weight = random_matrix(24, 64)
    assert torch.equal(module.embedding(torch.tensor([5]), weight)[0], weight.to_dense()[5])
