"""Which layers are compressed, and what is said where a configuration fits no layer."""

import pickle

import pytest
import torch

pytest.importorskip("vllm", reason="needs vLLM")

from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers import linear as vllm_linear
from vllm.model_executor.models.utils import WeightsMapper

from tests.helpers import compress_randomly, edit_tensors, make_dense, quantization
from vllm_gqsa.format import FormatError
from vllm_gqsa.plugin.config import GqsaQuantizationConfig
from vllm_gqsa.plugin.linear import GqsaLinearMethod

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


def test_compressed_output_head_is_refused():
    with pytest.raises(NotImplementedError, match="lm_head: is compressed, .*linear layers only, not Embedding"):
        make(("lm_head",)).get_quant_method(torch.nn.Embedding(2, 2), "lm_head")


def test_mixture_of_experts_is_refused():
    from vllm.model_executor.layers import fused_moe

    kind = getattr(fused_moe, "RoutedExperts", None) or fused_moe.FusedMoE
    with pytest.raises(NotImplementedError, match="experts: this is a mixture-of-experts model"):
        make().get_quant_method(kind.__new__(kind), "model.layers.0.mlp.experts")


def test_names_follow_the_model_class():
    config = make(("decoder.q_proj",), ("decoder.fc1", "re:.*fc2"))
    config.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix={"decoder.": "model.decoder."}))
    assert set(config.config.modules) == {"model.decoder.q_proj"}
    assert config.config.ignore == ("model.decoder.fc1", "re:.*fc2")


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
