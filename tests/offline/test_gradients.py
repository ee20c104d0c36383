"""Gradients block by block are those of the whole model."""

import itertools
import shutil
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.helpers import edit_tensors
from tests.offline.test_pipeline import assert_same, compress_with_stops, job, silent
from vllm_gqsa.format import CheckpointReader
from vllm_gqsa.offline import passes
from vllm_gqsa.offline.errors import InputError
from vllm_gqsa.offline.families import family_of
from vllm_gqsa.offline.gradients import Squares, mean_squares
from vllm_gqsa.offline.importance import curvature_importance
from vllm_gqsa.offline.mask import FLOOR, choose_across
from vllm_gqsa.offline.pipeline import compress
from vllm_gqsa.offline.recipe import GradualPruning, Recipe
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
    found = mean_squares(stream, tokens, linears, torch.empty)

    model = AutoModelForCausalLM.from_pretrained(dense(family), dtype=torch.float32).eval()
    modules = dict(model.named_modules())
    outputs: dict[str, list[torch.Tensor]] = {name: [] for names in linears for name in names.values()}
    for name, own in outputs.items():
        if name in modules:  # transformers keeps experts in one tensor
            modules[name].register_forward_hook(lambda _module, args, output, own=own: own.extend((output, args[0])))
    logits = model(tokens).logits[:, :-1].flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten()) * len(tokens)  # means of windows, summed
    compared = {name: own[0] for name, own in outputs.items() if own}
    gradients = torch.autograd.grad(loss, list(compared.values()))
    assert len(compared) >= 4 * len(stream)
    for name, gradient in zip(compared, gradients, strict=True):
        pair = Squares(outputs[name][1], gradient)
        for square, values in zip(found[name], pair, strict=True):
            expected = values.detach().flatten(0, -2).square().sum(0) / tokens.numel()
            torch.testing.assert_close(square, expected, rtol=1e-3, atol=0.0, msg=name)
    assert all(bool((square > 0).any()) for squares in found.values() for square in squares)


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


def test_one_budget_for_all_linears(dense, text, tmp_path):
    """As many groups as sparsity says, spread as one mask would; a linear with a sparsity of its own keeps that."""
    own = "model.layers.0.mlp.down_proj"
    recipe = Recipe(
        samples=8, context=48, precision="float32", pattern="model", importance="kfac", overrides={own: 0.25}
    )
    seen = SimpleNamespace(squares=None)

    def noted(work, squares):
        seen.squares = squares
        return right(work, squares)

    right = passes._densities
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes, "_densities", noted)
        compress(job(dense("llama"), text, tmp_path / "out", recipe), silent)
    reader, model = CheckpointReader(tmp_path / "out"), DenseModel(str(dense("llama")))
    weights = {name: model.tensor(f"{name}.weight").float() for name in reader.config.modules}
    kept = {name: reader.matrix(name, tuple(weight.shape)).keep() for name, weight in weights.items()}
    assert kept.pop(own).float().mean() == 0.75
    names = list(kept)
    importances = [curvature_importance(weights[name], *seen.squares[name], 16) for name in names]
    masks = choose_across(importances, 0.5, FLOOR)
    assert abs(sum(int(k.sum()) for k in kept.values()) - sum(int(m.sum()) for m in masks)) <= len(names)
    assert len({round(float(k.float().mean()), 2) for k in kept.values()}) > 5
    for name, mask in zip(names, masks, strict=True):
        assert abs(float(kept[name].float().mean()) - float(mask.float().mean())) < 0.02, name


@pytest.mark.parametrize("settings", [
    {"pattern": "matrix", "importance": "kfac"},
    {"pattern": "model", "importance": "kfac"},
    {"pattern": "model", "prune": GradualPruning(tokens=96, batch=1)},
])  # fmt: skip
def test_a_weight_that_is_not_finite_is_named(dense, text, tmp_path, settings):
    name = "model.layers.1.mlp.up_proj.weight"
    broken = shutil.copytree(dense("llama"), tmp_path / "broken")
    weight = DenseModel(str(broken)).tensor(name).clone()
    weight[3, 4] = float("nan")
    edit_tensors(broken, **{name: weight})
    recipe = Recipe(samples=8, context=48, precision="float32", **settings)
    with pytest.raises(InputError, match="model.layers.1.mlp.up_proj.weight holds infinite or NaN values"):
        compress(job(broken, text, tmp_path / "out", recipe), silent)


@pytest.mark.parametrize("pattern", ["matrix", "model"])
def test_stopped_and_started_again_it_ends_with_the_same_bytes(dense, text, tmp_path, pattern):
    recipe = Recipe(samples=8, context=48, precision="float32", pattern=pattern, importance="kfac")
    compress(job(dense("llama"), text, tmp_path / "whole", recipe), silent)
    stops = itertools.count(1)
    compress_with_stops(lambda: job(dense("llama"), text, tmp_path / "parts", recipe), lambda: next(stops))
    assert_same(tmp_path / "whole", tmp_path / "parts")
