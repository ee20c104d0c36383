"""Gradients block by block are those of the whole model."""

import itertools

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.offline.test_pipeline import assert_same, compress_with_stops, job, silent
from vllm_gqsa.format import CheckpointReader
from vllm_gqsa.offline.families import family_of
from vllm_gqsa.offline.gradients import gradient_squares
from vllm_gqsa.offline.pipeline import compress
from vllm_gqsa.offline.recipe import Recipe
from vllm_gqsa.offline.source import DenseModel
from vllm_gqsa.offline.stream import ModelStream


@pytest.mark.parametrize("family", ["llama", "qwen2", "opt", "mixtral"])
def test_they_are_those_of_autograd_through_the_whole_model(dense, family):
    source = DenseModel(str(dense(family)))
    described = family_of(source.config)
    stream = ModelStream(source, source.config, described, torch.device("cpu"))
    tokens = torch.randint(0, 300, (3, 40), generator=torch.Generator().manual_seed(0))
    prefixes = [f"{described.blocks}.{index}." for index in range(len(stream))]
    linears = [
        {name.removeprefix(prefix): name for group in described.linear_names(index) for name in group}
        for index, prefix in enumerate(prefixes)
    ]
    found = gradient_squares(stream, tokens, linears, torch.empty)

    model = AutoModelForCausalLM.from_pretrained(dense(family), dtype=torch.float32).eval()
    modules = dict(model.named_modules())
    outputs: dict[str, list[torch.Tensor]] = {name: [] for names in linears for name in names.values()}
    for name, own in outputs.items():
        if name in modules:  # transformers keeps experts in one tensor
            modules[name].register_forward_hook(lambda _module, _args, output, own=own: own.append(output))
    logits = model(tokens).logits[:, :-1].flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten()) * len(tokens)  # means of windows, summed
    compared = {name: own[0] for name, own in outputs.items() if own}
    gradients = torch.autograd.grad(loss, list(compared.values()))
    assert len(compared) >= 4 * len(stream)
    for name, gradient in zip(compared, gradients, strict=True):
        expected = gradient.flatten(0, -2).square().sum(0) / tokens.numel()
        torch.testing.assert_close(found[name], expected, rtol=1e-3, atol=0.0, msg=name)
    assert all(bool((square > 0).any()) for square in found.values())


def test_rows_whose_outputs_count_more_keep_more(dense, text, tmp_path):
    """Against the same without: what is kept moves to rows with steep gradients, its number stays."""
    recipe = Recipe(samples=8, context=48, precision="float32", pattern="matrix")
    for name, importance in (("plain", "obs"), ("steep", "kfac")):
        chosen = recipe.model_copy(update={"importance": importance})
        compress(job(dense("llama"), text, tmp_path / name, chosen), silent)
    name, shape = "model.layers.0.mlp.up_proj", (96, 64)
    plain, steep = (CheckpointReader(tmp_path / n).matrix(name, shape).keep().sum(1) for n in ("plain", "steep"))
    assert plain.sum() == steep.sum()
    assert not torch.equal(plain, steep)
    model = AutoModelForCausalLM.from_pretrained(dense("llama"), dtype=torch.float32)
    down = model.get_submodule("model.layers.0.mlp.down_proj").weight
    reach = down.detach().square().sum(0)  # how far an output of up_proj gets
    gained = (steep - plain).float()
    assert torch.corrcoef(torch.stack([gained, reach.log()]))[0, 1] > 0


def test_stopped_and_started_again_it_ends_with_the_same_bytes(dense, text, tmp_path):
    recipe = Recipe(samples=8, context=48, precision="float32", pattern="matrix", importance="kfac")
    compress(job(dense("llama"), text, tmp_path / "whole", recipe), silent)
    stops = itertools.count(1)
    compress_with_stops(lambda: job(dense("llama"), text, tmp_path / "parts", recipe), lambda: next(stops))
    assert_same(tmp_path / "whole", tmp_path / "parts")
