"""Plain attention against torch's own, in the models of transformers that training uses it in."""

import copy

import pytest
import torch
import transformers as hf

from tests.helpers import FAMILIES, VOCABULARY, dense_config
from vllm_gqsa.offline import attention
from vllm_gqsa.offline.attention import use_plain_attention
from vllm_gqsa.offline.stream import meta_model

CPU = torch.device("cpu")


def model_of(family, **changes):
    torch.manual_seed(0)
    return hf.AutoModelForCausalLM.from_config(dense_config(family, **changes), dtype=torch.bfloat16).eval()


@pytest.mark.parametrize("queries", [20, 256])
@pytest.mark.parametrize("family", [*FAMILIES, "mixtral", "windowed"])
def test_it_is_as_close_to_float32_as_torchs_attention(family, queries, monkeypatch):
    monkeypatch.setattr(attention, "_QUERIES", queries)  # 20: two whole blocks and a part
    model = model_of("mistral", sliding_window=7) if family == "windowed" else model_of(family)
    tokens = torch.randint(3, VOCABULARY, (2, 48), generator=torch.Generator().manual_seed(1))

    def run(model):
        logits = model(tokens, use_cache=False).logits.float()
        logits.square().mean().backward()
        found = {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return {"logits": logits.detach(), **found}

    exact = run(copy.deepcopy(model).float())
    torchs = run(model)
    before = model.config._attn_implementation
    use_plain_attention(model, CPU, "bfloat16")
    assert model.config._attn_implementation != before
    ours = run(model)
    assert ours.keys() == torchs.keys() == exact.keys()
    assert not torch.equal(ours["logits"], torchs["logits"])  # another order of rounding: it was used
    for name, value in exact.items():
        assert (ours[name] - value).norm() < 1.5 * (torchs[name] - value).norm() + 1e-3 * value.norm(), name


@pytest.mark.parametrize(
    ("device", "precision", "context"),
    [(torch.device("cuda"), "bfloat16", 48), (CPU, "float32", 48), (CPU, "bfloat16", 2048)],
)
def test_elsewhere_torchs_own_stays(device, precision, context):
    model = model_of("llama")
    before = model.config._attn_implementation
    use_plain_attention(model, device, precision, context)
    assert model.config._attn_implementation == before


def test_keys_behind_a_query_are_seen_where_attention_is_not_causal():
    """As in an encoder: the mask says what is hidden, whatever stands behind."""
    query, key, value = torch.randn(3, 1, 2, 5, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    mask = torch.zeros(1, 1, 5, 5)
    module = torch.nn.Module()
    module.is_causal = False
    ours = attention._plain_attention(module, query, key, value, mask, 8**-0.5)[0]
    torchs = torch.nn.functional.scaled_dot_product_attention(query.float(), key.float(), value.float())
    assert torch.allclose(ours.float(), torchs.transpose(1, 2), atol=0.02)


def test_families_that_are_not_known_keep_their_own_attention():
    """gpt-oss adds sinks to the softmax, which two plain products would leave out."""
    config = hf.GptOssConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, num_local_experts=2, num_experts_per_tok=1, pad_token_id=0,
    )  # fmt: skip
    model = hf.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    before = model.config._attn_implementation
    use_plain_attention(model, CPU, "bfloat16")
    assert model.config._attn_implementation == before


def test_a_model_does_not_change_the_attention_of_another():
    config = dense_config("llama")
    use_plain_attention(meta_model(config), CPU, "bfloat16")
    assert meta_model(config).config._attn_implementation == "sdpa"
