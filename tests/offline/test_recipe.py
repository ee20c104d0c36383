"""Recipes: by name, from YAML, changed by options; and what `gqsa estimate` says about their training."""

import json
import shlex

import pytest

from tests.offline.test_cli import run
from vllm_gqsa.offline.errors import InputError
from vllm_gqsa.offline.estimate_training import training_costs
from vllm_gqsa.offline.pipeline import Job
from vllm_gqsa.offline.recipe import NAMED, BlockTraining, Distillation, EndToEnd, GradualPruning, Recipe
from vllm_gqsa.offline.source import DenseModel
from vllm_gqsa.offline.stream import meta_model
from vllm_gqsa.offline.text import TextSource


@pytest.mark.parametrize("name", NAMED)
def test_a_recipe_written_to_a_file_is_the_same_recipe(name, tmp_path):
    assert Recipe.read(name) == NAMED[name]
    path = tmp_path / "recipe.yaml"
    path.write_text(NAMED[name].to_yaml())
    assert Recipe.read(str(path)) == NAMED[name]


def test_what_a_file_leaves_out_is_as_in_one_shot(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("sparsity: 0.25\noqp: {tokens: 1000}\n")
    expected = Recipe(sparsity=0.25, oqp=EndToEnd(tokens=1000))
    assert Recipe.read(str(path)) == expected
    path.write_text("")
    assert Recipe.read(str(path)) == Recipe()


@pytest.mark.parametrize(("text", "says"), [
    ("sparsety: 0.5", r"r.yaml: sparsety is not a setting; there are sparsity, lm_head, group_size"),
    ("1: 0.5", r"r.yaml: 1 is not a setting; there are sparsity"),
    ("prune: {tokens: 9, weigt_lr: 1}", r"r.yaml: prune: weigt_lr is not a setting; there are norm_lr, .*weight_lr"),
    ("distill: {tokens: 0}", r"r.yaml: distill.tokens: Input should be greater than or equal to 1"),
    ("bqpo: {loss: huber}", r"r.yaml: bqpo.loss: Input should be"),
    ("group_size: 12", r"r.yaml: group_size 12 is not one of"),
    ("a: [", r"r.yaml: is not YAML"),
    ("- 1", r"r.yaml: Input should be"),
    ("{importance: wanda, prune: {tokens: 9}}", r"r.yaml: importance wanda has no effect with prune.*one-shot or"),
    ("{compensate: false, prune: {tokens: 9}}", r"r.yaml: compensate False has no effect with prune"),
])  # fmt: skip
def test_files_that_break_the_rules(text, says, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=says):
        Recipe.read(str(path))


def test_a_head_beside_prune_has_settings_of_its_own():
    assert Recipe(prune=GradualPruning(tokens=9), lm_head=0, damping=0.1).damping == 0.1
    with pytest.raises(InputError, match=r"damping 0.1 has no effect with prune"):
        NAMED["quick"].changed({"damping": 0.1})


def test_a_recipe_that_is_not_there():
    with pytest.raises(InputError, match="--recipe fast: is neither one of one-shot, quick, default, best, blockwise"):
        Recipe.read("fast")


@pytest.mark.parametrize(("recipe", "expected"), [
    (NAMED["default"], []),
    (NAMED["quick"].changed({"seed": 3, "sparsity": 0.25}),
     ["--recipe", "quick", "--sparsity", "0.25", "--seed", "3"]),
    (NAMED["blockwise"].changed({"compensate": False, "ignore": ("a",)}),
     ["--recipe", "blockwise", "--no-compensate", "--ignore", "a"]),
    (NAMED["quick"].changed({"pattern": "matrix", "overrides": {"a": 0.1}}),
     ["--recipe", "out/gqsa_recipe.yaml"]),
    (Recipe(bqpo=BlockTraining(epochs=1)), ["--recipe", "out/gqsa_recipe.yaml"]),
])  # fmt: skip
def test_the_recorded_command_says_all_of_the_recipe(recipe, expected, tmp_path):
    words = shlex.split(Job("m", tmp_path / "out", recipe, TextSource("t.txt")).command())
    words = [word.replace(f"{tmp_path}/", "") for word in words]
    assert sorted(words) == sorted(["gqsa", "compress", "m", "out", *expected, "--calibration", "t.txt"])


def test_the_recorded_command_names_all_texts(tmp_path):
    command = Job("m", tmp_path, NAMED["default"], TextSource("a.txt", more=("b c.txt",))).command()
    assert command.endswith("--calibration a.txt --calibration 'b c.txt'")


def test_options_change_a_recipe_from_a_file(dense, text, tmp_path, monkeypatch, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text("samples: 8\ncontext: 48\nprecision: float32\noqp: {tokens: 480, batch: 2}\n")
    arguments = ["--calibration", text, "--recipe", path, "--sparsity", "0.25", "--eval-windows", "2", "--json"]
    code, out, _ = run(monkeypatch, capsys, "compress", dense("llama"), tmp_path / "out", *arguments)
    report = json.loads(out)
    assert code == 0
    assert report["sparsity"] == pytest.approx(0.25, abs=0.05)
    assert "E2E-OQP" in report["stages"]
    saved = Recipe.read(str(tmp_path / "out" / "gqsa_recipe.yaml"))
    assert saved == Recipe.read(str(path)).changed({"sparsity": 0.25})
    again = shlex.split(report["command"])[1:]
    assert run(monkeypatch, capsys, *again)[0] == 0  # recognised as the same run


def test_estimate_covers_the_training_stages(dense, monkeypatch, capsys, tmp_path):
    found = {}
    path = tmp_path / "all.yaml"
    stage = {"tokens": 1000}
    path.write_text(Recipe(prune=stage, distill=stage, oqp=stage).to_yaml())
    for recipe in ("one-shot", "default", "best", "blockwise", path):
        _, out, _ = run(monkeypatch, capsys, "estimate", dense("llama"), "--recipe", recipe, "--context", 48, "--json")
        found[recipe] = json.loads(out)
    assert set(found["one-shot"]["training"]) == set()
    assert set(found["default"]["training"]) == set(found["best"]["training"]) == {"prune"}
    assert set(found[path]["training"]) == {"prune", "distill", "oqp"}
    assert set(found["blockwise"]["training"]) == {"bqpo"}
    assert found["best"]["disk_bytes"] > found["one-shot"]["disk_bytes"]
    _, out, _ = run(monkeypatch, capsys, "estimate", dense("llama"), "--recipe", "best", "--context", 48)
    assert "of it in prune" in out


def test_estimated_costs_grow_with_what_causes_them(dense):
    model = DenseModel(str(dense("llama")))
    skeleton = meta_model(model.config)
    blocks = skeleton.get_submodule("model.layers")
    inside = {name: p.numel() for name, p in blocks.named_parameters() if p.dim() == 2}
    weights = sum(inside.values())

    def cost(precision="float32", batch=8, **settings):
        recipe = Recipe(**settings)
        (name,) = {"prune", "bqpo", "distill", "oqp"} & settings.keys()
        return training_costs(skeleton, blocks, inside, recipe, batch, precision)[name]

    distill = cost(distill=Distillation(tokens=1000, batch=4))
    assert distill.operations == 8 * (weights + 300 * 64) * 1000
    assert cost(distill=Distillation(tokens=1000, batch=4, loss="ce")).operations == pytest.approx(
        distill.operations * 6 / 8
    )
    assert cost(distill=Distillation(tokens=1000, batch=4, checkpointing=True)).memory_bytes < distill.memory_bytes
    assert cost(distill=Distillation(tokens=1000, batch=4), precision="bfloat16").memory_bytes < distill.memory_bytes
    assert cost(distill=Distillation(tokens=1000, batch=4), batch=1).memory_bytes < distill.memory_bytes
    # The fake quantiser and the optimiser go through the weights once a step, however many windows are in it.
    assert cost(distill=Distillation(tokens=4096, batch=1)).moved_bytes == 8 * 500 * weights
    assert cost(distill=Distillation(tokens=4096, batch=4)).moved_bytes == 2 * 500 * weights
    # All weights are trained while they are pruned, the kept half after, and of those the scales at last.
    prune = cost(prune=GradualPruning(tokens=1000))
    scales = cost(oqp=EndToEnd(tokens=1000))
    assert prune.state_bytes == 12 * weights
    assert prune.state_bytes > distill.state_bytes > 4 * scales.state_bytes
    block = cost(bqpo=BlockTraining(epochs=3, last_block="output"), samples=10, context=100)
    assert block.operations == 6 * weights * 3 * 1000
    with_head = cost(bqpo=BlockTraining(epochs=3), samples=10, context=100)
    assert with_head.operations == 6 * (weights + 300 * 64) * 3 * 1000
    assert with_head.memory_bytes > block.memory_bytes
    assert cost(bqpo=BlockTraining(epochs=3, batch=4), samples=10).moved_bytes == 9 * 500 * weights
