"""Plain attention against torch's own, in the models of transformers that training uses it in."""

import copy

import pytest
import torch
import transformers as hf

from tests.helpers import FAMILIES, VOCABULARY, dense_config
from vllm_gqsa.offline.attention import use_plain_attention

CPU = torch.device("cpu")


def model_of(family, **changes):
    torch.manual_seed(0)
    return hf.AutoModelForCausalLM.from_config(dense_config(family, **changes), dtype=torch.bfloat16).eval()


@pytest.mark.parametrize("family", [*FAMILIES, "mixtral", "windowed"])
def test_it_is_as_close_to_float32_as_torchs_attention(family):
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
    use_plain_attention(model, CPU, "bfloat16", 48)
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
