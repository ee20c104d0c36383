"""The model run block by block computes what transformers computes."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from vllm_gqsa.experts import MIXTURES
from vllm_gqsa.offline.families import FAMILIES, family_of
from vllm_gqsa.offline.source import DenseModel
from vllm_gqsa.offline.stream import ModelStream, meta_model


@pytest.mark.parametrize("family", [*FAMILIES, *MIXTURES])
def test_losses_equal_those_of_transformers(dense, family):
    folder = dense(family)
    tokens = torch.randint(2, 300, (5, 40), generator=torch.Generator().manual_seed(0))
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = model(tokens).logits[:, :-1].transpose(1, 2)
    expected = torch.nn.functional.cross_entropy(logits, tokens[:, 1:], reduction="none")

    source = DenseModel(str(folder))
    stream = ModelStream(source, source.config, family_of(source.config), torch.device("cpu"))
    hidden = stream.embed(tokens, 2)
    for index in range(len(stream)):
        stream.block(index).advance(hidden, 2, torch.device("cpu"))
    assert torch.allclose(torch.stack(list(stream.losses(tokens, hidden))), expected, atol=1e-5)


@pytest.mark.parametrize("family", [family for family, described in FAMILIES.items() if described.embedding])
def test_the_inputs_of_the_head_are_those_of_transformers(dense, family):
    tokens = torch.randint(2, 300, (5, 40), generator=torch.Generator().manual_seed(0))
    model = AutoModelForCausalLM.from_pretrained(dense(family)).eval()
    seen = []
    model.lm_head.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    with torch.no_grad():
        model(tokens)

    source = DenseModel(str(dense(family)))
    stream = ModelStream(source, source.config, family_of(source.config), torch.device("cpu"))
    hidden = stream.embed(tokens, 2)
    for index in range(len(stream)):
        stream.block(index).advance(hidden, 2, torch.device("cpu"))
    parts = list(stream.head_inputs(tokens, hidden, 2))
    assert [len(part) for part in parts] == [2, 2, 1]
    torch.testing.assert_close(torch.cat(parts), *seen)


@pytest.mark.parametrize("family", [*FAMILIES, *MIXTURES])
def test_the_description_of_a_family_names_every_linear_of_its_blocks(dense, family):
    source = DenseModel(str(dense(family)))
    found = {n for n, m in meta_model(source.config).named_modules() if isinstance(m, torch.nn.Linear)}
    found = {name for name in found if ".layers." in name and not name.endswith("shared_expert_gate")}
    assert all(f"{name}.weight" in source for name in found)
    described = [n for i in range(3) for group in family_of(source.config).linear_names(i) for n in group]
    assert found == set(described)
    assert len(described) == len(found)


def test_writing_to_a_block_does_not_change_the_model_it_came_from(dense):
    source = DenseModel(str(dense("llama")))
    stream = ModelStream(source, source.config, family_of(source.config), torch.device("cpu"))
    stream.embed(torch.zeros(1, 4, dtype=torch.long), 1)
    before = source.tensor("model.layers.0.mlp.up_proj.weight").clone()
    stream.block(0).module.mlp.up_proj.weight.zero_()
    assert torch.equal(source.tensor("model.layers.0.mlp.up_proj.weight"), before)
