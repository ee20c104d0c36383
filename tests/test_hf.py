import copy
import json
import shutil

import pytest
import torch

from tests.helpers import (
    FAMILIES,
    MIXTURES,
    VOCABULARY,
    compress_randomly,
    edit_json,
    edit_quantization,
    edit_tensors,
    make_dense,
)
from vllm_gqsa.format import FormatError

hf = pytest.importorskip("transformers", reason="needs transformers")
gqsa_hf = pytest.importorskip("vllm_gqsa.hf")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    return compress_randomly(make_dense(folder / "dense"), folder)


@pytest.fixture
def spoiled(llama, tmp_path):
    return shutil.copytree(llama.checkpoint, tmp_path / "copy")


def load(folder, **kwargs):
    return hf.AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float32, **kwargs})


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_the_twin_exactly(family, tied, tmp_path):
    pair = compress_randomly(make_dense(tmp_path / "dense", family, tie_word_embeddings=tied), tmp_path)
    tokens = torch.randint(3, VOCABULARY, (2, 17), generator=torch.Generator().manual_seed(1))
    model = load(pair.checkpoint)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, load(pair.twin)(tokens).logits)
    compressed = {name for name, module in model.named_modules() if isinstance(module, gqsa_hf.GqsaLinear)}
    assert compressed == set(pair.matrices)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES[:4])
def test_a_compressed_head_equals_the_twin_exactly(family, tied, tmp_path):
    dense = make_dense(tmp_path / "dense", family, tie_word_embeddings=tied, hidden_size=144)
    pair = compress_randomly(dense, tmp_path, head=True)
    tokens = torch.randint(3, VOCABULARY, (2, 17), generator=torch.Generator().manual_seed(1))
    model, loading = load(pair.checkpoint, output_loading_info=True)
    assert not any(loading.values())
    with torch.no_grad():
        expected = load(pair.twin)(tokens).logits
        assert torch.equal(model(tokens).logits, expected)
        model.tie_weights()
        assert torch.equal(model(tokens).logits, expected)
        assert torch.equal(copy.deepcopy(model)(tokens).logits, expected)
    kinds = (gqsa_hf.GqsaTiedHead, gqsa_hf.GqsaEmbedding) if tied else (gqsa_hf.GqsaLinear, torch.nn.Embedding)
    assert (type(model.lm_head), type(model.model.embed_tokens)) == kinds
    # The dense table is neither in the file nor in memory.
    large = {n for n, t in (*model.named_parameters(), *model.named_buffers()) if t.nbytes >= VOCABULARY * 144}
    assert large == (set() if tied else {"model.embed_tokens.weight"})
    model.save_pretrained(tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "again")(tokens).logits, expected)


OTHERS = {"down_proj": 64, "fc2": 64, "embed_tokens": 8, "lm_head": 8, "w2": 8}


@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("llama", True), ("opt", True), ("mixtral", False)])
def test_linears_with_a_group_size_of_their_own_equal_the_twin(family, tied, tmp_path):
    dense = make_dense(tmp_path / "dense", family, tie_word_embeddings=tied)
    ignore = ("lm_head", r"re:.*\.gate$")
    pair = compress_randomly(dense, tmp_path, others=OTHERS, ignore=ignore, head=family == "llama")
    assert {matrix.group_size for matrix in pair.matrices.values()} > {16}
    tokens = torch.arange(3, 40)[None]
    model = load(pair.checkpoint)
    with torch.no_grad():
        expected = load(pair.twin)(tokens).logits
        tolerance = 1e-4 if family == "mixtral" else 0
        torch.testing.assert_close(model(tokens).logits, expected, rtol=tolerance, atol=tolerance)
    model.save_pretrained(tmp_path / "again")
    configs = [json.loads((each / "config.json").read_text()) for each in (pair.checkpoint, tmp_path / "again")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "again")(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("experts", ["compressed", "dense"])
@pytest.mark.parametrize("family", MIXTURES)
def test_mixtures_of_experts_equal_the_twin(family, experts, tmp_path):
    ignore = ("lm_head", r"re:.*\.gate$", *([r"re:.*\.experts\."] if experts == "dense" else []))
    pair = compress_randomly(make_dense(tmp_path / "dense", family), tmp_path, ignore=ignore)
    tokens = torch.randint(3, VOCABULARY, (2, 17), generator=torch.Generator().manual_seed(1))
    model, loading = load(pair.checkpoint, output_loading_info=True)
    assert not any(loading.values())
    with torch.no_grad():
        # Not to the bit: transformers multiplies by gate and up at once.
        torch.testing.assert_close(model(tokens).logits, load(pair.twin)(tokens).logits, rtol=1e-4, atol=1e-4)
    assert sum(isinstance(module, gqsa_hf.GqsaLinear) for module in model.modules()) == len(pair.matrices)
    model.save_pretrained(tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "again")(tokens).logits, model(tokens).logits)


def test_a_mixture_without_an_expert(tmp_path):
    pair = compress_randomly(make_dense(tmp_path / "dense", "mixtral"), tmp_path, ignore=("lm_head", r"re:.*\.gate$"))
    edit_tensors(pair.checkpoint, remove=("model.layers.1.block_sparse_moe.experts.2.w3.scale_zero",))
    with pytest.raises(FormatError, match="experts.2.w3.scale_zero is missing, though config.json lists"):
        load(pair.checkpoint)


def test_a_compressed_embedding_gives_the_dtype_of_the_model(tmp_path):
    pair = compress_randomly(make_dense(tmp_path / "dense", tie_word_embeddings=True), tmp_path, head=True)
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        loaded = [load(each, dtype=torch.bfloat16)(tokens).logits for each in (pair.checkpoint, pair.twin)]
        cast = [load(each).to(torch.bfloat16)(tokens).logits for each in (pair.checkpoint, pair.twin)]
    assert torch.equal(*loaded)
    assert torch.equal(*cast)


def test_a_head_that_is_compressed_and_tied_to_a_dense_embedding(tmp_path):
    pair = compress_randomly(make_dense(tmp_path / "dense"), tmp_path, head=True)
    edit_json(pair.checkpoint / "config.json", tie_word_embeddings=True)
    with pytest.raises(FormatError, match=r"lists lm_head, and ties it to model.embed_tokens.weight; set tie_word"):
        load(pair.checkpoint)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_equals_the_twin_exactly(llama, dtype):
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        expected = load(llama.twin, dtype=dtype)(tokens).logits
        model = load(llama.checkpoint, dtype=dtype)
        assert torch.equal(model(tokens).logits, expected)
    assert model.get_submodule("model.layers.0.mlp.up_proj").scale_zero.dtype == torch.int16


def test_generates_the_tokens_of_the_twin(llama):
    tokens = torch.arange(3, 9)[None]
    both = [load(each).generate(tokens, max_new_tokens=8, do_sample=False) for each in (llama.checkpoint, llama.twin)]
    assert torch.equal(*both)


def test_saved_again_it_is_the_same_checkpoint(llama, tmp_path):
    load(llama.checkpoint).save_pretrained(tmp_path / "again")
    config = json.loads((tmp_path / "again/config.json").read_text())["quantization_config"]
    assert config == json.loads((llama.checkpoint / "config.json").read_text())["quantization_config"]
    tokens = torch.arange(3, 9)[None]
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "again")(tokens).logits, load(llama.checkpoint)(tokens).logits)


def test_prints_shape_and_size(llama):
    text = str(load(llama.checkpoint))
    assert "in_features=128, out_features=256, bias=False, group_size=16, nnz=" in text


Q = "model.layers.0.self_attn.q_proj"


def drop_tensor(folder):
    edit_tensors(folder, remove=(f"{Q}.scale_zero",))


def drop_module(folder):
    edit_tensors(folder, remove=tuple(f"{Q}.{p}" for p in ("crow_indices", "group_mask", "qweight", "scale_zero")))


def add_tensor(folder):
    edit_tensors(folder, **{"model.layers.0.mlp.gate.qweight": torch.zeros(1, 8, dtype=torch.uint8)})


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def corrupt(folder):
    edit_tensors(folder, **{f"{Q}.scale_zero": torch.zeros_like(_tensor(folder, f"{Q}.scale_zero"))})


def wrong_dtype(folder):
    edit_tensors(folder, **{f"{Q}.scale_zero": _tensor(folder, f"{Q}.scale_zero").int()})


def lie(folder):
    modules = json.loads((folder / "config.json").read_text())["quantization_config"]["modules"]
    modules[Q]["nnz"] += 1
    edit_quantization(folder, modules=modules)


def other_group_size(folder):
    modules = json.loads((folder / "config.json").read_text())["quantization_config"]["modules"]
    modules[Q]["group_size"] = 32
    edit_quantization(folder, modules=modules)


def unknown_version(folder):
    edit_quantization(folder, format_version=9)


def unknown_module(folder):
    edit_json(folder / "config.json", num_hidden_layers=1)


def drop_dense(folder):
    edit_tensors(folder, remove=("lm_head.weight",))


def _tensor(folder, name):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")[name]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (drop_tensor, f"{Q}.scale_zero is missing"),
        (drop_module, f"{Q}.crow_indices is missing"),
        (add_tensor, "model.layers.0.mlp.gate, which config.json does not list"),
        (truncate, "model.safetensors: is not a complete safetensors file"),
        (corrupt, rf"model.safetensors: {Q}: scale_zero\[0\] holds the scale 0.0"),
        (wrong_dtype, f"{Q}: scale_zero is torch.int32, expected torch.int16"),
        (lie, f"model.safetensors: {Q}: holds nnz = [0-9]+ groups, config.json says [0-9]+"),
        (
            other_group_size,
            f"config.json: .*modules: .*k_proj has groups of 16, {Q} of 32; they are served as one fused",
        ),
        (unknown_version, "format_version 9 is unknown"),
        (unknown_module, "config.json lists model.layers.1.*which LlamaForCausalLM does not have"),
        (drop_dense, "lm_head.weight is missing"),
    ],
)
def test_bad_checkpoints_end_in_one_sentence(spoiled, spoil, message):
    spoil(spoiled)
    with pytest.raises(FormatError, match=message):
        load(spoiled)
