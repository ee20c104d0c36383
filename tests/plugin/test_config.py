"""Which layers are compressed, and what is said where a configuration fits no layer."""

import pickle
import shutil
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm", reason="needs vLLM")

from vllm.config import LoRAConfig, VllmConfig, set_current_vllm_config
from vllm.model_executor.layers import linear as vllm_linear, vocab_parallel_embedding as vllm_vocabulary
from vllm.model_executor.models.utils import WeightsMapper

from tests.helpers import GATED, compress_randomly, edit_tensors, make_dense, quantization
from vllm_gqsa.format import FormatError
from vllm_gqsa.plugin.config import GqsaQuantizationConfig
from vllm_gqsa.plugin.linear import GqsaLinearMethod, GqsaVocabularyMethod
from vllm_gqsa.plugin.matrix import _check_offload
from vllm_gqsa.plugin.report import LoadReport

Q, K, V = (f"model.layers.0.self_attn.{each}_proj" for each in "qkv")
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}


class Linear(vllm_linear.LinearBase):
    """A linear layer that asks for no method."""

    def __init__(self):
        torch.nn.Module.__init__(self)


@pytest.fixture(autouse=True)
def vllm_config(monkeypatch):
    monkeypatch.setattr(vllm_linear, "get_tensor_model_parallel_rank", lambda: 0)
    with set_current_vllm_config(VllmConfig()):
        yield


def make(modules=(Q, K, V), ignore=("lm_head",), **changes):
    nnz = {name: at for at, name in enumerate(modules)}
    config = GqsaQuantizationConfig.from_config(quantization(nnz, ignore=list(ignore), **changes))
    config.packed_modules_mapping = FUSED
    return config


def test_compressed_ignored_and_other_layers():
    config = make(ignore=("lm_head", "re:.*gate"))
    method = config.get_quant_method(Linear(), "model.layers.0.self_attn.qkv_proj")
    assert isinstance(method, GqsaLinearMethod)
    assert method.sources.names == (Q, K, V)
    assert method.sources.nnz == (0, 1, 2)
    dense = config.get_quant_method(Linear(), "model.layers.0.gate")
    assert isinstance(dense, vllm_linear.UnquantizedLinearMethod)
    assert config.get_quant_method(torch.nn.Module(), "model.layers.0.self_attn.attn") is None
    assert config.get_quant_method(torch.nn.Embedding(2, 2), "") is None


@pytest.mark.parametrize(
    ("modules", "ignore", "message"),
    [
        ((Q, K), (V,), "qkv_proj: .*q_proj, .*k_proj compressed but .*v_proj ignored"),
        ((Q, K), (), "qkv_proj: config.json neither lists .*v_proj in modules nor ignores it"),
        ((), (), "qkv_proj: config.json neither lists .*q_proj, .*k_proj, .*v_proj in modules"),
        ((Q, K, V), (V,), "v_proj: config.json lists it as compressed and ignores it too"),
    ],
)
def test_layers_that_fit_nothing(modules, ignore, message):
    with pytest.raises(ValueError, match=message):
        make(modules, ignore).get_quant_method(Linear(), "model.layers.0.self_attn.qkv_proj")


def test_compressed_layers_of_another_kind_are_refused():
    with pytest.raises(NotImplementedError, match="gate: is compressed, .*output heads only, not Embedding"):
        make(("gate",)).get_quant_method(torch.nn.Embedding(2, 2), "gate")


TABLE = "model.embed_tokens"


class Embedding(vllm_vocabulary.VocabParallelEmbedding):
    """An embedding that asks for no method."""

    def __init__(self):
        torch.nn.Module.__init__(self)


class Head(Embedding, vllm_vocabulary.ParallelLMHead):
    """An output head that asks for no method."""


@pytest.mark.parametrize(
    ("modules", "ignore", "head", "embedding", "unnamed"),
    [
        ((), ("lm_head",), None, None, None),
        (("lm_head",), (), "lm_head", None, None),
        ((TABLE,), (), TABLE, TABLE, TABLE),  # tied
        (("lm_head", TABLE), (), "lm_head", TABLE, TABLE),
    ],
)
def test_where_the_vocabulary_comes_from(modules, ignore, head, embedding, unnamed):
    config = make((*modules, Q), ignore)
    expected = {(Head, "lm_head"): head, (Embedding, TABLE): embedding, (Embedding, ""): unnamed}
    for (kind, prefix), name in expected.items():
        method = config.get_quant_method(kind(), prefix)
        assert isinstance(method, GqsaVocabularyMethod) == (name is not None)
        assert method is None or method.sources.names == (name,)


@pytest.mark.parametrize("ignored", ["lm_head", TABLE])
def test_a_vocabulary_that_is_compressed_and_ignored(ignored):
    with pytest.raises(ValueError, match=f"{ignored}: config.json ignores it, and lists {TABLE}"):
        make((TABLE,), (ignored,)).get_quant_method(Head(), "lm_head")


@pytest.mark.parametrize(("targets", "refused"), [(None, True), (["lm_head", "q_proj"], True), (["q_proj"], False)])
def test_lora_on_a_compressed_head(targets, refused):
    config = VllmConfig()
    config.lora_config = LoRAConfig(target_modules=targets)
    with set_current_vllm_config(config):
        if not refused:
            assert make((TABLE,), ()).get_quant_method(Head(), "lm_head") is not None
            return
        with pytest.raises(NotImplementedError, match=f"{TABLE}: is compressed, and vLLM's LoRA layers need its dense"):
            make((TABLE,), ()).get_quant_method(Head(), "lm_head")
        assert make().get_quant_method(Head(), "lm_head") is None


@pytest.mark.parametrize(("targets", "refused"), [(None, True), (["experts"], True), (["q_proj"], False)])
def test_lora_on_compressed_experts(targets, refused, monkeypatch):
    prefix = "model.layers.0.mlp.experts"
    experts = [f"{prefix}.{each}.{name}_proj" for each in range(2) for name in ("gate", "up", "down")]
    monkeypatch.setattr("vllm_gqsa.plugin.config._is_routed_experts", lambda _: True)
    layer = torch.nn.Module()
    layer.moe_config = SimpleNamespace(num_experts=2)
    config = VllmConfig()
    config.lora_config = LoRAConfig(target_modules=targets)
    with set_current_vllm_config(config):
        assert make(ignore=("re:.*experts.*",)).get_quant_method(layer, prefix) is None
        if refused:
            with pytest.raises(NotImplementedError, match=rf"{prefix}: is compressed.* or compress again with the exp"):
                make(tuple(experts)).get_quant_method(layer, prefix)
        else:
            assert make(tuple(experts)).get_quant_method(layer, prefix) is not None


@pytest.mark.parametrize("on_cpu", [True, False])
@pytest.mark.parametrize(("option", "value"), [("cpu_offload_gb", 1), ("offload_group_size", 2)])
def test_offloading_is_refused_on_a_gpu(on_cpu, option, value, monkeypatch):
    monkeypatch.setattr("vllm_gqsa.plugin.matrix.current_platform", SimpleNamespace(is_cpu=lambda: on_cpu))
    config = VllmConfig()
    part = config.offload_config.uva if hasattr(config.offload_config.uva, option) else config.offload_config.prefetch
    _check_offload(config)
    monkeypatch.setattr(part, option, value)
    if on_cpu:
        _check_offload(config)
        return
    with pytest.raises(NotImplementedError, match="do not work with quantization gqsa"):
        _check_offload(config)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_model_class_that_never_asks(monkeypatch, ranks):
    monkeypatch.setattr("vllm.distributed.get_pp_group", lambda: SimpleNamespace(world_size=ranks))
    make().get_cache_scale_mapper()
    asked = make(("lm_head",), ())
    asked.get_quant_method(Head(), "lm_head")
    asked.get_cache_scale_mapper()
    if ranks > 1:  # another rank may have asked
        make(("lm_head",), ()).get_cache_scale_mapper()
        return
    with pytest.raises(NotImplementedError, match="lm_head: is compressed, but vLLM's class .* no quant_config"):
        make(("lm_head",), ()).get_cache_scale_mapper()


def test_names_follow_the_model_class():
    config = make(("decoder.q_proj",), ("decoder.fc1", "re:.*fc2"))
    config.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix={"decoder.": "model.decoder."}))
    assert set(config.config.modules) == {"model.decoder.q_proj"}
    assert config.config.ignore == ("model.decoder.fc1", "re:.*fc2")


def test_names_follow_rules_for_weights():
    """Many vision-language classes say "lm_head.", which no module's name begins with."""
    config = make(("lm_head", "model.q_proj"), ("model.fc1",))
    rules = {"lm_head.": "language_model.lm_head.", "model.": "language_model.model."}
    config.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix=rules))
    assert set(config.config.modules) == {"language_model.lm_head", "language_model.model.q_proj"}
    assert config.config.ignore == ("language_model.model.fc1",)


def test_survives_pickling():
    config = pickle.loads(pickle.dumps(make()))
    assert config.config == make().config


def test_bad_config_is_one_sentence():
    with pytest.raises(FormatError, match="config.json: format_version 2 is unknown"):
        make(format_version=2)
    with pytest.raises(FormatError, match="config.json: quantization_config.group_size: .*must be one of"):
        make(group_size=12)


def test_plain_model():
    config = GqsaQuantizationConfig()
    with pytest.raises(ValueError, match="/tmp/plain is not a GQSA checkpoint .* `gqsa compress`"):
        config.maybe_update_config("/tmp/plain", hf_config=None, revision=None)
    with pytest.raises(ValueError, match="no GQSA quantization_config"):
        config.get_quant_method(Linear(), "a")


def test_folder_is_checked_before_workers_start(tmp_path):
    pair = compress_randomly(make_dense(tmp_path / "dense"), tmp_path)
    config = make(tuple(pair.matrices))
    config.maybe_update_config(str(pair.checkpoint))
    edit_tensors(pair.checkpoint, remove=(f"{Q}.qweight",))
    with pytest.raises(FormatError, match=f"{Q}.qweight is missing"):
        config.maybe_update_config(str(pair.checkpoint))
    (pair.checkpoint / "model.safetensors").unlink()
    config.maybe_update_config(str(pair.checkpoint))
    config.maybe_update_config("some/hub-name")


def test_a_vision_language_model_that_counts_as_causal(tmp_path):
    """The names of its files are not those that transformers gives its modules."""
    import transformers as hf

    tower = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    sizes = {"image_size": 28, "patch_size": 14}
    text = {**GATED, "query_pre_attn_scalar": 32}
    config = hf.Gemma3Config(
        vision_config={**tower, **sizes}, text_config=text, mm_tokens_per_image=4, tie_word_embeddings=True
    )
    hf.Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path / "dense")
    pair = compress_randomly(tmp_path / "dense", tmp_path, ignore=(r"re:.*vision_tower\.",))
    ours = GqsaQuantizationConfig.from_config(hf.AutoConfig.from_pretrained(pair.checkpoint).quantization_config)
    config = hf.AutoConfig.from_pretrained(pair.checkpoint)
    ours.maybe_update_config(str(pair.checkpoint), config)
    for name in ("language_model.model.norm.weight", "multi_modal_projector.mm_input_projection_weight"):
        broken = shutil.copytree(pair.checkpoint, tmp_path / name)
        edit_tensors(broken, remove=(name,))
        with pytest.raises(FormatError, match=f"tensor model.*{name.rpartition('model.')[2]} .* is missing"):
            ours.maybe_update_config(str(broken), config)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickled_weights_are_refused_before_anything_reads_them(tmp_path, name):
    (tmp_path / name).write_bytes(pickle.dumps({}))
    with pytest.raises(FormatError, match=f"{name}: pickled weights are never read"):
        make().maybe_update_config(str(tmp_path))


@pytest.mark.parametrize("load_format", ["pt", "npcache"])
def test_load_formats_of_pickles_are_refused(load_format):
    from vllm.config import LoadConfig

    from vllm_gqsa.plugin.matrix import LayerMatrix

    with (
        set_current_vllm_config(VllmConfig(load_config=LoadConfig(load_format=load_format))),
        pytest.raises(ValueError, match=f"--load-format {load_format} reads pickles"),
    ):
        LayerMatrix(Linear(), None, 0.5, LoadReport())


def test_nonsense_in_config_json_is_said_before_a_worker_starts(tmp_path):
    from transformers import AutoConfig

    folder = compress_randomly(make_dense(tmp_path / "dense"), tmp_path).checkpoint
    config = AutoConfig.from_pretrained(folder)
    ours = GqsaQuantizationConfig.from_config(config.quantization_config)
    ours.maybe_update_config(str(folder), config)
    for key, value, says in (
        ("num_hidden_layers", 10**9, "num_hidden_layers is 1000000000, but there are only"),
        ("hidden_act", "nonsense", "describes no model that can be built"),
        ("vocab_size", 512, r"model.embed_tokens.weight has shape \(256, 128\), the model needs \(512, 128\)"),
    ):
        right = getattr(config, key)
        setattr(config, key, value)
        with pytest.raises(FormatError, match=says):
            ours.maybe_update_config(str(folder), config)
        setattr(config, key, right)
