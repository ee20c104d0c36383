"""Gradual pruning: the mask it ends with, what it is for, and that an interruption leaves no trace."""

import random

import pytest
import torch

from tests.offline.test_pipeline import assert_same, compress_with_stops, job, silent
from tests.offline.test_training import facts
from vllm_gqsa.format import CheckpointReader
from vllm_gqsa.offline import e2e
from vllm_gqsa.offline.errors import InputError
from vllm_gqsa.offline.inspect import inspect_checkpoint
from vllm_gqsa.offline.pipeline import compress
from vllm_gqsa.offline.quantizer import MaskedLinear
from vllm_gqsa.offline.recipe import Distillation, EndToEnd, GradualPruning, Recipe
from vllm_gqsa.offline.verify import verify_checkpoint

GRADUAL = Recipe(
    pattern="matrix",
    samples=8,
    context=48,
    precision="float32",
    prune=GradualPruning(tokens=2880, batch=2, weight_lr=2e-3),
    distill=Distillation(tokens=2880, batch=2, weight_lr=1e-3),
)


@pytest.fixture(scope="module")
def gradual(dense, text, tmp_path_factory):
    output = tmp_path_factory.mktemp("gradual") / "out"
    return output, compress(job(dense("llama"), text, output, GRADUAL), silent)


@pytest.mark.parametrize("family", ["llama", "qwen2", "opt", "qwen3_moe"])
def test_it_ends_at_the_sparsity_that_was_asked_for_and_distillation_helps(dense, text, tmp_path, family, gradual):
    output = gradual[0] if family == "llama" else tmp_path / "out"
    if family != "llama":
        compress(job(dense(family), text, output, GRADUAL), silent)
    verify_checkpoint(output, silent)
    for module in inspect_checkpoint(output).modules:
        assert module.sparsity == 0.5, module.name
    found = facts(output)
    assert found["prune"]["before"] == pytest.approx(0, abs=1e-5)  # it begins at the dense model
    assert found["distill"]["after"] < found["distill"]["before"]
    assert len(found["blocks"]) == 3
    assert all(list(block["errors"]) == ["prune", "distill"] for block in found["blocks"])
    assert all(block["errors"]["distill"] != block["errors"]["prune"] > 0 for block in found["blocks"])
    assert len(found["worst_modules"]) == 5


def test_training_makes_up_for_what_is_pruned(dense, text, tmp_path):
    after = []
    for rate in (1e-9, 2e-3):
        settings = GradualPruning(tokens=2880, batch=2, weight_lr=rate, norm_lr=0)
        recipe = GRADUAL.model_copy(update={"prune": settings, "distill": None})
        compress(job(dense("opt"), text, tmp_path / str(rate), recipe), silent)
        after.append(facts(tmp_path / str(rate))["prune"]["after"])
    assert after[1] < 0.9 * after[0]


def test_a_stage_that_trains_nothing_is_refused(dense, text, tmp_path):
    still = GRADUAL.model_copy(update={"prune": GradualPruning(tokens=960, weight_lr=0, norm_lr=0)})
    with pytest.raises(InputError, match="every learning rate of the stage is 0; leave the stage out of the recipe"):
        compress(job(dense("opt"), text, tmp_path / "out", still), silent)


def test_the_card_says_how_it_was_made(gradual):
    card = (gradual[0] / "README.md").read_text()
    for title in ("gradual pruning", "distillation"):
        assert f"| {title} | relative error of a block's output, mean |" in card
        assert f"| {title} | KL" in card
    assert "one-shot" not in card


def test_pruned_groups_are_zero_and_the_least_important_ones():
    linear = MaskedLinear((8, 64), 16, None, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    linear.weight = torch.nn.Parameter(torch.randn(8, 64, generator=generator))
    linear.input_square += torch.rand(64, generator=generator)
    linear.gradient_square += torch.rand(8, generator=generator)
    linear.prune(0.75, "matrix")
    identity = torch.eye(64)
    used = linear(identity).T.view(8, 4, 16)
    assert (used[~linear.keep] == 0).all()
    assert torch.equal(used[linear.keep], linear.weight.view(8, 4, 16)[linear.keep])
    scores = linear.gradient_square[:, None, None] * (linear.weight.square() * linear.input_square).view(8, 4, 16)
    scores = scores.sum(-1)
    assert scores[linear.keep].min() >= scores[~linear.keep].max()
    assert int(linear.keep.sum()) == 8
    matrix = linear.matrix()
    matrix.validate()
    assert torch.equal(matrix.keep(), linear.keep)


def test_squares_of_inputs_and_of_gradients_are_noted():
    linear = MaskedLinear((8, 64), 16, None, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    linear.weight = torch.nn.Parameter(torch.randn(8, 64, generator=generator))
    pruning = e2e._Pruning.__new__(e2e._Pruning)
    pruning._weights = 0.1, 0.2
    linear.register_forward_hook(pruning._note)
    inputs = torch.randn(2, 5, 64, generator=generator)
    with torch.no_grad():
        linear(inputs)  # does not count
    for part in inputs:
        linear(part).sin().sum().backward()
    gradients = (inputs @ linear.weight.T).cos()
    torch.testing.assert_close(linear.input_square, 0.1 * inputs.square().sum((0, 1)))
    torch.testing.assert_close(linear.gradient_square, 0.2 * gradients.square().sum((0, 1)))


def test_once_rounded_it_trains_what_will_be_stored():
    linear = MaskedLinear((8, 64), 16, None, torch.device("cpu"))
    linear.weight = torch.nn.Parameter(torch.randn(8, 64, generator=torch.Generator().manual_seed(0)))
    linear.input_square += 1
    linear.gradient_square += 1
    linear.prune(0.5, "matrix")
    linear.rounded = True
    used = linear(torch.eye(64)).T
    assert torch.equal(used, linear.matrix().to_dense())
    used.backward(torch.ones(8, 64))
    assert torch.equal(linear.weight.grad.view(8, 4, 16), linear.keep[..., None].expand(8, 4, 16).float())


def test_the_loss_that_pruning_reports_is_that_of_the_stored_model(dense, text, tmp_path):
    recipe = GRADUAL.model_copy(update={"distill": GRADUAL.distill.model_copy(update={"weight_lr": 1e-9})})
    compress(job(dense("llama"), text, tmp_path / "out", recipe), silent)
    found = facts(tmp_path / "out")
    assert found["prune"]["after"] == pytest.approx(found["distill"]["before"], rel=1e-5)


def test_the_mask_is_chosen_anew_from_the_weights_of_the_moment():
    linear = MaskedLinear((4, 64), 16, None, torch.device("cpu"))
    linear.weight = torch.nn.Parameter(torch.ones(4, 64))
    linear.input_square += 1
    linear.gradient_square += 1
    with torch.no_grad():
        linear.weight[:, :16] = 0.1
    linear.prune(0.25, "row")
    assert not linear.keep[:, 0].any()
    with torch.no_grad():
        linear.weight[:, :16] = 1
        linear.weight[:, 48:] = 0.1
    linear.prune(0.25, "row")
    assert linear.keep[:, 0].all()
    assert not linear.keep[:, 3].any()


def test_overrides_give_some_linears_another_sparsity(dense, text, tmp_path):
    for name, recipe in (("a", GRADUAL), ("b", Recipe(samples=8, context=48))):
        changed = recipe.changed({"overrides": {"re:.*v_proj": 0.25, "re:.*layers.1.mlp": 0.75}})
        compress(job(dense("llama"), text, tmp_path / name, changed), silent)
        found = {m.name: m.sparsity for m in inspect_checkpoint(tmp_path / name).modules}
        assert found["model.layers.1.self_attn.v_proj"] == 0.25
        assert found["model.layers.1.mlp.gate_proj"] == 0.75
        assert found["model.layers.2.mlp.gate_proj"] == 0.5
        assert found["model.layers.1.self_attn.q_proj"] == 0.5


def test_overrides_stand_beside_the_shared_budget(dense, text, tmp_path):
    overrides = {"re:.*v_proj": 0.25, "re:.*down_proj": {"group_size": 32}}
    recipe = GRADUAL.changed({"overrides": overrides, "pattern": "model", "distill": None})
    compress(job(dense("llama"), text, tmp_path / "out", recipe), silent)
    assert verify_checkpoint(tmp_path / "out", silent) == 21
    modules = inspect_checkpoint(tmp_path / "out").modules
    shares = {m.name.rpartition(".")[2]: [n.sparsity for n in modules if n.name.endswith(m.name[-6:])] for m in modules}
    assert shares.pop("v_proj") == [0.25] * 3
    down = shares.pop("down_proj")
    assert sum(down) / 3 == pytest.approx(0.5, abs=0.01)  # equal shapes, a budget of their own
    assert len(set(down)) > 1
    assert len({share for found in shares.values() for share in found}) > 3


def test_stopped_after_every_few_steps_it_ends_with_the_same_bytes(gradual, dense, text, tmp_path, monkeypatch):
    monkeypatch.setattr(e2e, "SAVE_SECONDS", 0.0)
    again = tmp_path / "out"
    rng = random.Random(1)
    stops = compress_with_stops(lambda: job(dense("llama"), text, again, GRADUAL), lambda: rng.randint(5, 8))
    assert stops > 5
    compress(job(dense("llama"), text, again, GRADUAL), silent)
    assert_same(again, gradual[0])


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_one_budget_for_the_whole_model(dense, text, tmp_path, family, monkeypatch):
    recipe = GRADUAL.model_copy(update={"distill": None, "pattern": "model"})
    report = compress(job(dense(family), text, tmp_path / "out", recipe), silent)
    assert report["sparsity"] == pytest.approx(0.5, abs=1e-4)
    verify_checkpoint(tmp_path / "out", silent)
    shares = [module.sparsity for module in inspect_checkpoint(tmp_path / "out").modules]
    assert min(shares) < 0.45
    assert 0.55 < max(shares) < 0.81  # the floor: 0.4 of half
    if family == "llama":
        monkeypatch.setattr(e2e, "SAVE_SECONDS", 0.0)
        assert compress_with_stops(lambda: job(dense(family), text, tmp_path / "again", recipe), lambda: 9) > 2
        compress(job(dense(family), text, tmp_path / "again", recipe), silent)
        assert_same(tmp_path / "again", tmp_path / "out")


def test_an_expert_that_is_never_chosen_is_pruned_by_its_weights(dense, text, tmp_path, monkeypatch):
    monkeypatch.setattr(e2e._Pruning, "_note", lambda *_: None)  # nothing is observed, as at such an expert
    recipe = GRADUAL.model_copy(update={"prune": GradualPruning(tokens=96, batch=2), "distill": None, "pattern": "row"})
    compress(job(dense("llama"), text, tmp_path / "out", recipe), silent)
    keep = CheckpointReader(tmp_path / "out").matrix("model.layers.0.self_attn.q_proj", (64, 64)).keep()
    assert keep.any(0).all()  # each of the four places is kept in some row


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_recomputing_blocks_changes_nothing(dense, text, tmp_path, family):
    for name, checkpointing in (("kept", False), ("recomputed", True)):
        settings = GradualPruning(tokens=960, batch=2, checkpointing=checkpointing)
        recipe = GRADUAL.model_copy(update={"prune": settings, "distill": None, "pattern": "model"})
        compress(job(dense(family), text, tmp_path / name, recipe), silent)
    shards = sorted(path.name for path in (tmp_path / "kept").glob("*.safetensors"))
    assert len(shards) > 3
    for shard in shards:
        assert (tmp_path / "kept" / shard).read_bytes() == (tmp_path / "recomputed" / shard).read_bytes()


@pytest.mark.parametrize(("settings", "says"), [
    ({"bqpo": {"epochs": 1}}, "takes the place of one-shot pruning and bqpo"),
    ({"pattern": "2:4"}, "which pattern 2:4 cannot; choose row, matrix or model"),
    ({"pattern": "model", "prune": None}, "pattern model compares all linears, which takes"),
    ({"pattern": "1:2", "prune": None, "overrides": {"a": 0.5}}, "pattern 1:2 prunes the same share everywhere"),
    ({"overrides": {"re:(": 0.5}}, r"overrides 're:\(' is not a regular expression"),
    ({"prune": {"tokens": 10, "ramp": 1.0}}, "less than 1"),
])  # fmt: skip
def test_recipes_that_contradict_themselves(settings, says):
    with pytest.raises(ValueError, match=says):
        Recipe.model_validate({**GRADUAL.model_dump(), **settings})


def test_one_step_is_enough_for_a_mask(dense, text, tmp_path):
    one = GRADUAL.model_copy(update={"prune": GradualPruning(tokens=1, batch=1), "distill": None})
    report = compress(job(dense("llama"), text, tmp_path / "out", one), silent)
    assert report["sparsity"] == 0.5


def test_a_head_is_compressed_after_training(dense, text, tmp_path):
    recipe = GRADUAL.model_copy(update={"lm_head": 0.0, "distill": None, "oqp": EndToEnd(tokens=480, batch=2)})
    report = compress(job(dense("qwen2"), text, tmp_path / "out", recipe), silent)
    assert report["lm_head"]["name"] == "model.embed_tokens"
    assert verify_checkpoint(tmp_path / "out", silent) == 22
