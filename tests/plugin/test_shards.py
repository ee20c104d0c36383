"""The loader for every kind of layer and every rank of a pretended tensor-parallel group, without processes."""

import pytest
import torch

pytest.importorskip("vllm", reason="needs vLLM")

from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers import linear as vllm_linear, vocab_parallel_embedding as vllm_vocabulary

from tests.helpers import random_matrix
from tests.plugin.layers import (
    DENSE,
    HEAD,
    HEADS,
    KV_HEADS,
    MATRICES,
    RANKS,
    VOCABULARY,
    WIDE,
    K,
    config_for,
    down,
    gate_up,
    load,
    pretend,
    qkv,
)
from vllm_gqsa.format import TENSORS, FormatError, GroupSparseMatrix
from vllm_gqsa.kernels import rebuild, restore


@pytest.fixture(autouse=True)
def vllm_config(monkeypatch):
    pretend(monkeypatch, 0, 1)
    with set_current_vllm_config(VllmConfig()):
        yield


@pytest.fixture(params=RANKS, ids=lambda r: f"rank{r[0]}of{r[1]}")
def tp(request, monkeypatch):
    pretend(monkeypatch, *request.param)
    return request.param


def finished(layer):
    """The dense weight that the layer multiplies by, seen through the op itself."""
    layer.quant_method.process_weights_after_loading(layer)
    columns = layer.quant_method.in_features
    assert not any(type(getattr(layer, name)) is not torch.nn.Parameter for name in TENSORS)
    weight = layer.quant_method.dequantize_weight(layer)
    torch.testing.assert_close(layer.quant_method.apply(layer, torch.eye(columns)).t(), weight)
    return weight


def qkv_rows(rank, size, heads=HEADS, kv_heads=KV_HEADS, dense=DENSE):
    rows, kv_rows = heads * HEAD // size, max(1, kv_heads // size) * HEAD
    start = rank // max(1, size // kv_heads) * kv_rows
    kv = slice(start, start + kv_rows)
    return torch.cat([dense["a.q_proj"][rank * rows :][:rows], dense["a.k_proj"][kv], dense["a.v_proj"][kv]])


def part(rank, size):
    return slice(rank * WIDE // size, (rank + 1) * WIDE // size)


@pytest.mark.parametrize("seed", range(3))
def test_qkv(tp, seed):
    layer = qkv(config_for(MATRICES))
    load(layer, [(each, MATRICES[f"a.{each}_proj"]) for each in "qkv"], seed)
    assert torch.equal(finished(layer), qkv_rows(*tp))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size"), [(3, 3, 3), (6, 1, 2), (6, 3, 3), (14, 2, 2), (10, 5, 5), (6, 3, 6)]
)
def test_odd_head_counts(monkeypatch, heads, kv_heads, size):
    sizes = {"q": heads, "k": kv_heads, "v": kv_heads}
    matrices = {f"a.{each}_proj": random_matrix(n * HEAD, K, seed=at) for at, (each, n) in enumerate(sizes.items())}
    dense = {name: matrix.to_dense() for name, matrix in matrices.items()}
    for rank in range(size):
        pretend(monkeypatch, rank, size)
        layer = qkv(config_for(matrices), heads, kv_heads)
        load(layer, [(each, matrices[f"a.{each}_proj"]) for each in "qkv"])
        assert torch.equal(finished(layer), qkv_rows(rank, size, heads, kv_heads, dense))


def test_qkv_joined_on_disk(tp):
    joined = GroupSparseMatrix.concat([MATRICES[f"a.{each}_proj"] for each in "qkv"])
    layer = qkv(config_for({"a.qkv_proj": joined}))
    load(layer, [(None, joined)])
    assert torch.equal(finished(layer), qkv_rows(*tp))


@pytest.mark.parametrize("seed", range(3))
def test_merged_columns(tp, seed):
    layer = gate_up(config_for(MATRICES))
    load(layer, [(0, MATRICES["m.gate_proj"]), (1, MATRICES["m.up_proj"])], seed)
    rows = part(*tp)
    assert torch.equal(finished(layer), torch.cat([DENSE["m.gate_proj"][rows], DENSE["m.up_proj"][rows]]))


@pytest.mark.parametrize("shard", [None, (0, 1)])
def test_merged_columns_joined_on_disk(tp, shard):
    joined = GroupSparseMatrix.concat([MATRICES["m.gate_proj"], MATRICES["m.up_proj"]])
    layer = gate_up(config_for({"m.gate_up_proj": joined}))
    load(layer, [(shard, joined)])
    rows = part(*tp)
    assert torch.equal(finished(layer), torch.cat([DENSE["m.gate_proj"][rows], DENSE["m.up_proj"][rows]]))


def test_columns(tp):
    layer = vllm_linear.ColumnParallelLinear(K, WIDE, bias=False, quant_config=config_for(MATRICES), prefix="m.up_proj")
    load(layer, [(None, MATRICES["m.up_proj"])])
    assert torch.equal(finished(layer), DENSE["m.up_proj"][part(*tp)])


def test_rows(tp):
    layer = down(config_for(MATRICES))
    load(layer, [(None, MATRICES["m.down_proj"])])
    assert torch.equal(finished(layer), DENSE["m.down_proj"][:, part(*tp)])


def test_replicated(tp):
    layer = vllm_linear.ReplicatedLinear(K, WIDE, bias=False, quant_config=config_for(MATRICES), prefix="m.up_proj")
    load(layer, [(None, MATRICES["m.up_proj"])])
    assert torch.equal(finished(layer), DENSE["m.up_proj"])


@pytest.mark.parametrize("kind", ["ColumnParallelLinear", "RowParallelLinear"])
def test_tensor_parallelism_switched_off(tp, kind):
    name = "m.up_proj" if kind.startswith("Column") else "m.down_proj"
    rows, columns = DENSE[name].shape
    make = getattr(vllm_linear, kind)
    layer = make(columns, rows, bias=False, quant_config=config_for(MATRICES), prefix=name, disable_tp=True)
    load(layer, [(None, MATRICES[name])])
    assert torch.equal(finished(layer), DENSE[name])


# -- embedding and output head -------------------------------------------------------------------------------


def head(config, vocabulary=VOCABULARY, **changes):
    return vllm_vocabulary.ParallelLMHead(vocabulary, K, quant_config=config, prefix="lm_head", **changes)


def tied(config, prefix="m.embed_tokens"):
    """The head of a tied model, made as vLLM's model classes make it."""
    embedding = vllm_vocabulary.VocabParallelEmbedding(VOCABULARY, K, quant_config=config, prefix=prefix)
    return head(config).tie_weights(embedding), embedding


def vocabulary_rows(name, rank, size):
    """What vLLM itself keeps of a dense table on a rank, padding included."""
    dense = vllm_vocabulary.ParallelLMHead(VOCABULARY, K, params_dtype=torch.float32)
    dense.weight.weight_loader(dense.weight, DENSE[name])
    assert dense.weight.shape == (320 // size, K)
    return dense.weight.data


def test_head(tp):
    layer = head(config_for({"lm_head": MATRICES["lm_head"]}))
    load(layer, [(None, MATRICES["lm_head"])])
    assert torch.equal(finished(layer), vocabulary_rows("lm_head", *tp))


@pytest.mark.parametrize("vocabulary", [10, 64])
def test_ranks_without_a_token(tp, vocabulary):
    matrix = random_matrix(vocabulary, K, seed=9)
    layer = head(config_for({"lm_head": matrix}), vocabulary)
    load(layer, [(None, matrix)])
    rank, size = tp
    padded = torch.zeros(64, K)
    padded[:vocabulary] = matrix.to_dense()
    assert torch.equal(finished(layer), padded[rank * 64 // size : (rank + 1) * 64 // size])


@pytest.mark.parametrize("prefix", ["m.embed_tokens", ""])
def test_tied_embedding_and_head_are_one(tp, prefix):
    """Llama and Mistral give their embedding no name."""
    layer, embedding = tied(config_for({"m.embed_tokens": MATRICES["m.embed_tokens"]}), prefix)
    assert layer is embedding
    load(layer, [(None, MATRICES["m.embed_tokens"])])
    expected = vocabulary_rows("m.embed_tokens", *tp)
    assert torch.equal(finished(layer), expected)
    ids = torch.randint(len(expected), (3, 5))
    assert torch.equal(layer.quant_method.embedding(layer, ids), expected[ids])
    assert layer.quant_method.embedding(layer, ids[:0]).shape == (0, 5, K)


def test_lookup_over_all_ranks(monkeypatch):
    """Every rank gives its own tokens and zeros for those of others; vLLM adds them up."""
    monkeypatch.setattr(vllm_vocabulary, "tensor_model_parallel_all_reduce", lambda part: part)
    ids, total = torch.arange(VOCABULARY), 0
    for rank in range(4):
        pretend(monkeypatch, rank, 4)
        layer, _ = tied(config_for({"m.embed_tokens": MATRICES["m.embed_tokens"]}))
        load(layer, [(None, MATRICES["m.embed_tokens"])])
        layer.quant_method.process_weights_after_loading(layer)
        total = total + layer(ids)
    assert torch.equal(total, DENSE["m.embed_tokens"])


def test_lookup_in_half_precision():
    config = config_for({"m.embed_tokens": MATRICES["m.embed_tokens"]})
    layer = vllm_vocabulary.VocabParallelEmbedding(VOCABULARY, K, torch.bfloat16, quant_config=config)
    load(layer, [(None, MATRICES["m.embed_tokens"])])
    layer.quant_method.process_weights_after_loading(layer)
    assert torch.equal(layer(torch.arange(VOCABULARY)), DENSE["m.embed_tokens"].bfloat16())


def test_an_untied_head_leaves_the_embedding_dense():
    config = config_for({"lm_head": MATRICES["lm_head"]})
    for prefix in ("m.embed_tokens", ""):
        layer = vllm_vocabulary.VocabParallelEmbedding(VOCABULARY, K, quant_config=config, prefix=prefix)
        assert isinstance(layer.quant_method, vllm_vocabulary.UnquantizedEmbeddingMethod)
    with pytest.raises(ValueError, match="lm_head: is compressed, but config.json ties it to a dense embedding"):
        head(config).tie_weights(layer)


def test_a_head_of_another_vocabulary():
    layer = head(config_for({"lm_head": MATRICES["lm_head"]}), VOCABULARY + 1)
    with pytest.raises(FormatError, match=r"lm_head: crow_indices has shape \(301,\), expected \(302,\)"):
        load(layer, [(None, MATRICES["lm_head"])])


def test_added_tokens_are_refused():
    with pytest.raises(NotImplementedError, match="lm_head: holds 4 tokens more than the checkpoint"):
        head(config_for({"lm_head": MATRICES["lm_head"]}), VOCABULARY + 4, org_num_embeddings=VOCABULARY)


def test_a_head_that_never_comes():
    layer, _ = tied(config_for({"m.embed_tokens": MATRICES["m.embed_tokens"]}))
    with pytest.raises(FormatError, match=r"m.embed_tokens.\* missing from the checkpoint"):
        layer.quant_method.process_weights_after_loading(layer)


def test_dummy_head_has_the_listed_sparsity(tp):
    config = VllmConfig()
    config.load_config.load_format = "dummy"
    with set_current_vllm_config(config):
        layer = head(config_for({"lm_head": GroupSparseMatrix.synthesize(VOCABULARY, K, sparsity=0)}, sparsity=0.25))
    layer.quant_method.process_weights_after_loading(layer)
    assert layer.scale_zero.numel() == 320 // tp[1] * K // 16


def test_bias_is_added():
    layer = vllm_linear.ReplicatedLinear(K, WIDE, quant_config=config_for(MATRICES), prefix="m.up_proj")
    load(layer, [(None, MATRICES["m.up_proj"])])
    layer.quant_method.process_weights_after_loading(layer)
    torch.nn.init.normal_(layer.bias)
    x = torch.randn(3, K)
    expected = torch.nn.functional.linear(x, DENSE["m.up_proj"], layer.bias)
    torch.testing.assert_close(layer(x)[0], expected)


def test_dequantize_before_processing():
    layer = down(config_for(MATRICES))
    load(layer, [(None, MATRICES["m.down_proj"])])
    assert torch.equal(layer.quant_method.dequantize_weight(layer), DENSE["m.down_proj"])
    assert torch.equal(finished(layer), DENSE["m.down_proj"])


def test_full_copy_is_dropped_at_once(monkeypatch):
    pretend(monkeypatch, 1, 4)
    layer = down(config_for(MATRICES))
    staging = layer.qweight.staging
    load(layer, [(None, MATRICES["m.down_proj"])])
    (kept,) = staging._parts.values()
    assert not staging._raw
    assert kept.qweight.untyped_storage().nbytes() == kept.qweight.nbytes < MATRICES["m.down_proj"].qweight.nbytes


def test_processing_twice_changes_nothing():
    layer = down(config_for(MATRICES))
    load(layer, [(None, MATRICES["m.down_proj"])])
    finished(layer)
    before = layer.qweight
    layer.quant_method.process_weights_after_loading(layer)
    assert layer.qweight is before


def test_dummy_weights_are_a_valid_matrix(tp):
    config = VllmConfig()
    config.load_config.load_format = "dummy"
    with set_current_vllm_config(config):
        layer = down(config_for({"m.down_proj": random_matrix(K, WIDE, group_size=8)}, sparsity=0.5))
    layer.quant_method.process_weights_after_loading(layer)
    columns = WIDE // tp[1]
    tensors = [getattr(layer, name).data for name in TENSORS]
    matrix = restore(rebuild(tensors, "cpu", columns, 8))
    matrix.validate("dummy", (K, columns))
    assert matrix.sparsity == 0.5


# -- rejections ----------------------------------------------------------------------------------------------


def test_missing_shard():
    layer = qkv(config_for(MATRICES))
    load(layer, [("q", MATRICES["a.q_proj"]), ("v", MATRICES["a.v_proj"])])
    with pytest.raises(FormatError, match=r"a.qkv_proj: a.k_proj.\* missing from the checkpoint"):
        layer.quant_method.process_weights_after_loading(layer)


def test_missing_layer():
    layer = gate_up(config_for(MATRICES))
    with pytest.raises(FormatError, match=r"m.gate_proj.\*, m.up_proj.\* missing from the checkpoint"):
        layer.quant_method.process_weights_after_loading(layer)


def test_missing_tensor():
    layer = gate_up(config_for(MATRICES))
    load(layer, [(0, MATRICES["m.gate_proj"])])
    for name in ("crow_indices", "qweight", "scale_zero"):
        parameter = getattr(layer, name)
        parameter.weight_loader(parameter, MATRICES["m.up_proj"].tensors()[name], 1)
    with pytest.raises(FormatError, match="m.up_proj.group_mask missing from the checkpoint"):
        layer.quant_method.process_weights_after_loading(layer)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale_zero": MATRICES["m.up_proj"].scale_zero.int()}, "m.up_proj: scale_zero is torch.int32"),
        ({"qweight": MATRICES["m.up_proj"].qweight[:-1]}, "m.up_proj: holds nnz = 1399 groups, config.json says"),
        ({"crow_indices": MATRICES["m.up_proj"].crow_indices[:-1]}, "m.up_proj: crow_indices has shape"),
        ({"scale_zero": MATRICES["m.up_proj"].scale_zero * 0}, "m.up_proj: scale_zero.* holds the scale 0.0"),
    ],
)
def test_broken_matrix(changes, message):
    layer = gate_up(config_for(MATRICES))
    matrix = GroupSparseMatrix.from_tensors({**MATRICES["m.up_proj"].tensors(), **changes}, K, 16)
    with pytest.raises(FormatError, match=message):
        load(layer, [(1, matrix)])


def test_lying_nnz():
    lied = {**MATRICES, "m.up_proj": MATRICES["m.gate_proj"]}
    layer = gate_up(config_for(lied))
    with pytest.raises(FormatError, match="m.up_proj: holds nnz = [0-9]+ groups, config.json says [0-9]+"):
        load(layer, [(1, MATRICES["m.up_proj"])])


def test_lying_nnz_of_parts_joined_on_disk():
    joined = GroupSparseMatrix.concat([MATRICES["m.gate_proj"], MATRICES["m.up_proj"]])
    layer = gate_up(config_for({**MATRICES, "m.up_proj": MATRICES["m.gate_proj"]}))
    load(layer, [((0, 1), joined)])
    with pytest.raises(FormatError, match="m.gate_up_proj: holds nnz = [0-9]+ groups, config.json says [0-9]+"):
        layer.quant_method.process_weights_after_loading(layer)


def test_unknown_shard():
    layer = qkv(config_for(MATRICES))
    with pytest.raises(FormatError, match="a.qkv_proj: has no shard 'w', only q, k, v"):
        layer.qweight.weight_loader(layer.qweight, MATRICES["a.q_proj"].qweight, "w")


def test_group_size_that_does_not_divide_a_rank(monkeypatch):
    pretend(monkeypatch, 0, 4)
    matrix = random_matrix(K, WIDE, group_size=128)
    config = config_for({"m.down_proj": matrix}, group_size=128)
    expected = "m.down_proj: in_features K = 256 split over 4 .* 64 a rank, .* G = 128; use .* size of 2"
    with pytest.raises(FormatError, match=expected):
        down(config)


def test_a_group_size_of_its_own_that_does_not_divide_a_rank(monkeypatch):
    pretend(monkeypatch, 0, 8)
    config = config_for({**MATRICES, "m.down_proj": random_matrix(K, WIDE, group_size=64)})
    gate_up(config)
    with pytest.raises(FormatError, match="m.down_proj: in_features K = 256 split over 8 .* 32 a rank, .* G = 64"):
        down(config)


def test_a_fused_layer_of_two_group_sizes():
    """Of a model class that joins what no other does; the usual names are refused before."""
    names = {"m.left_proj": "m.gate_proj", "m.right_proj": "m.down_proj"}
    config = config_for({name: MATRICES[source] for name, source in names.items()})
    config.packed_modules_mapping = {"both_proj": ["left_proj", "right_proj"]}
    expected = "m.both_proj: m.left_proj has groups of 16, m.right_proj of 32; they are served as one fused layer"
    with pytest.raises(FormatError, match=expected):
        vllm_linear.MergedColumnParallelLinear(K, [WIDE, WIDE], quant_config=config, prefix="m.both_proj")
