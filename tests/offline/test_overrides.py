"""Overrides of a recipe: other sparsities and group sizes for some linears, from the file to the checkpoint."""

import json
import random

import pytest

from tests.offline.test_cli import run
from tests.offline.test_pipeline import assert_same, compress_with_stops, job, silent
from vllm_gqsa.format import FUSED, CheckpointReader
from vllm_gqsa.offline import doctor
from vllm_gqsa.offline.errors import InputError
from vllm_gqsa.offline.families import FAMILIES
from vllm_gqsa.offline.inspect import inspect_checkpoint
from vllm_gqsa.offline.pipeline import compress
from vllm_gqsa.offline.recipe import BlockTraining, Distillation, EndToEnd, GradualPruning, Recipe
from vllm_gqsa.offline.verify import compare, verify_checkpoint

DOWN = r"re:.*mlp\.down_proj$"
MIXED = Recipe(
    samples=6,
    context=48,
    precision="float32",
    overrides={DOWN: {"group_size": 32}, r"re:.*\.1\.mlp": {"sparsity": 0.25}},
)
STAGES = {
    "one-shot": {},
    "blockwise": {"bqpo": BlockTraining(epochs=1), "oqp": EndToEnd(tokens=192, batch=2)},
    "gradual": {"prune": GradualPruning(tokens=192, batch=2), "distill": Distillation(tokens=192, batch=2)},
}


@pytest.fixture(scope="module")
def mixed(dense, text, tmp_path_factory):
    """A finished checkpoint, and the report of making it."""
    output = tmp_path_factory.mktemp("mixed") / "out"
    return output, compress(job(dense("llama"), text, output, MIXED), silent)


# -- recipes ---------------------------------------------------------------------------------------------------


def test_they_are_written_as_they_were_read(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(
        "overrides: {a: 0.25, b: {group_size: 32}, 're:c': {sparsity: 0.0, group_size: 8}, d: {sparsity: 0.5}}"
    )
    recipe = Recipe.read(str(path))
    assert recipe.model_dump(mode="json")["overrides"] == {
        "a": 0.25, "b": {"group_size": 32}, "re:c": {"sparsity": 0.0, "group_size": 8}, "d": 0.5
    }  # fmt: skip
    path.write_text(recipe.to_yaml())
    assert Recipe.read(str(path)) == recipe
    assert recipe.changed({"seed": 1}).overrides == recipe.overrides


def test_the_first_entry_that_gives_a_setting_counts_for_it():
    recipe = Recipe(overrides={"re:a": {"group_size": 32}, "re:ab": {"sparsity": 0.25, "group_size": 64}, "re:.": 0.75})
    found = {name: (recipe.for_linear(name).sparsity, recipe.for_linear(name).group_size) for name in ("a", "ab", "c")}
    assert found == {"a": (0.75, 32), "ab": (0.25, 32), "c": (0.75, 16)}


@pytest.mark.parametrize(("override", "says"), [
    ("{group_size: 12}", "overrides.re:x: group_size 12 is not one of 8, 16, 32, 64, 128"),
    ("{group_size: big}", "overrides.re:x.group_size: Input should be a valid integer"),
    ("{sparsity: 1.5}", "overrides.re:x.sparsity: Input should be less than 1"),
    ("1.5", "overrides.re:x.sparsity: Input should be less than 1"),
    ("[1]", "overrides.re:x.sparsity: Input should be a valid number"),
    ("{}", "overrides.re:x: gives neither sparsity nor group_size"),
    ("", "overrides.re:x: gives neither sparsity nor group_size"),
    ("{bits: 3}", "overrides.re:x: bits is not a setting; there are sparsity, group_size"),
])  # fmt: skip
def test_entries_that_break_the_rules(override, says, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(f"overrides:\n  're:x': {override}\n")
    with pytest.raises(InputError, match=says):
        Recipe.read(str(path))


def test_the_entry_is_printed_as_it_stands_in_the_file(tmp_path, monkeypatch, capsys):
    path = tmp_path / "r.yaml"
    path.write_text("overrides: {'re:x': {bits: 3}}\n")
    arguments = ["compress", "model", tmp_path / "out", "--recipe", path, "--calibration", "text.txt"]
    code, _, err = run(monkeypatch, capsys, *arguments)
    assert (code, err) == (2, f"error: {path}: overrides.re:x: bits is not a setting; there are sparsity, group_size\n")
    assert not (tmp_path / "out").exists()


def test_patterns_of_n_m_take_other_group_sizes_but_no_other_sparsities():
    Recipe(pattern="1:2", overrides={"a": {"group_size": 32}})
    with pytest.raises(ValueError, match="pattern 1:2 prunes the same share everywhere; leave out sparsities"):
        Recipe(pattern="1:2", overrides={"a": {"group_size": 32, "sparsity": 0.5}})


@pytest.mark.parametrize("family", FAMILIES)
def test_the_format_knows_what_every_family_fuses(family):
    """The format goes by names, a family by its own list."""
    for names in FAMILIES[family].fused:
        assert tuple(name.rpartition(".")[2] for name in names) in FUSED.values()


# -- checkpoints -----------------------------------------------------------------------------------------------


def test_only_what_differs_is_written(mixed):
    listed = json.loads((mixed[0] / "config.json").read_text())["quantization_config"]
    assert listed["group_size"] == 16
    assert {name for name, entry in listed["modules"].items() if "group_size" in entry} == {
        f"model.layers.{index}.mlp.down_proj" for index in range(3)
    }
    assert {entry.get("group_size", 32) for entry in listed["modules"].values()} == {32}


@pytest.mark.parametrize("stages", STAGES)
def test_every_stage_keeps_to_them(dense, text, tmp_path, mixed, stages):
    output = mixed[0] if stages == "one-shot" else tmp_path / "out"
    if stages != "one-shot":
        compress(job(dense("llama"), text, output, MIXED.changed(STAGES[stages])), silent)
    verify_checkpoint(output, silent)
    assert compare(output, str(dense("llama")), "abc def gh").twin_max_difference == 0
    for module in inspect_checkpoint(output).modules:
        is_down = module.name.endswith("down_proj")
        assert module.group_size == (32 if is_down else 16), module.name
        share = 0.25 if ".1.mlp" in module.name else 0.5
        groups = module.in_features // module.group_size
        assert module.row_nnz_max == module.row_nnz_min == round(groups * (1 - share)), module.name


def test_everything_that_counts_counts_them(mixed, dense, monkeypatch, capsys):
    output, report = mixed
    found = inspect_checkpoint(output)
    reader = CheckpointReader(output)
    shapes = {m.name: (m.out_features, m.in_features) for m in found.modules}
    zeros = sum(
        int((reader.matrix(name, shape).keep() == 0).sum()) * reader.config.group_size_of(name)
        for name, shape in shapes.items()
    )
    assert report["sparsity"] == found.sparsity == zeros / found.compressed_weights
    assert report["bits_per_weight"] == found.bits_per_weight
    assert report["group_sizes"] == found.group_sizes == [16, 32]
    assert "groups of 1 x 16/32 weights are" in (output / "README.md").read_text()
    assert "groups of 16/32 kept" in doctor.diagnose(output).facts["checkpoint"]
    code, out, _ = run(monkeypatch, capsys, "inspect", output)
    assert code == 0
    assert "groups of 16/32, pattern row" in out
    recipe = output / "gqsa_recipe.yaml"
    _, out, _ = run(monkeypatch, capsys, "estimate", dense("llama"), "--recipe", recipe, "--json")
    costs = json.loads(out)
    assert costs["bits_per_weight"] == pytest.approx(found.bits_per_weight, rel=1e-6)
    assert costs["output_bytes"] == pytest.approx(found.bytes, rel=0.05)


def test_the_cost_of_training_counts_them(dense, monkeypatch, capsys, tmp_path):
    states = []
    for size in (16, 32):
        path = tmp_path / f"{size}.yaml"
        path.write_text(f"oqp: {{tokens: 1000}}\noverrides: {{'re:.*': {{group_size: {size}}}}}")
        _, out, _ = run(monkeypatch, capsys, "estimate", dense("llama"), "--recipe", path, "--context", 48, "--json")
        states.append(json.loads(out)["disk_bytes"])
    assert states[1] < states[0]


def test_the_head_has_one_too(dense, text, tmp_path):
    recipe = Recipe(lm_head=0, samples=6, context=48, overrides={"model.embed_tokens": {"group_size": 32}})
    report = compress(job(dense("qwen2"), text, tmp_path / "out", recipe), silent)
    found = {m.name: m for m in inspect_checkpoint(tmp_path / "out").modules}
    head = found.pop("model.embed_tokens")
    assert head.group_size == 32
    assert {module.group_size for module in found.values()} == {16}
    assert report["lm_head"]["bits_per_weight"] == head.bits_per_weight < 5.2  # 5.6 with groups of 16
    assert compare(tmp_path / "out", str(dense("qwen2")), "abc def gh").twin_max_difference == 0


def test_an_expert_differs_from_no_other_expert(dense, text, tmp_path):
    recipe = Recipe(samples=6, context=48, overrides={r"re:.*experts\.2\.w2$": {"group_size": 32}})
    says = "experts.0.w2 has groups of 16, .*experts.2.w2 of 32; they are served as one fused layer"
    with pytest.raises(InputError, match=says):
        compress(job(dense("mixtral"), text, tmp_path / "out", recipe), silent)


@pytest.mark.parametrize(("changes", "says"), [
    ({"overrides": {"re:.*k_proj": {"group_size": 32}}},
     "overrides: model.layers.0.self_attn.q_proj has groups of 16, model.layers.0.self_attn.k_proj of 32; they are"),
    ({"overrides": {"re:.*up_proj": {"group_size": 8}}}, "mlp.gate_proj has groups of 16, .*mlp.up_proj of 8"),
    ({"overrides": {"re:.*down_proj": {"group_size": 64}}},
     "mlp.down_proj: group_size 64 does not divide its 96 input features; choose another one in overrides or"),
    ({"overrides": {"re:.*down_proj": {"group_size": 32}}, "pattern": "1:2"},
     "mlp.down_proj: pattern 1:2 does not divide its 3 groups a row"),
    ({"overrides": {"re:.*dwon_proj": {"group_size": 32}}},
     "overrides re:.*dwon_proj: matches no linear that is compressed; their names are like model.layers.0.self_attn"),
    ({"overrides": {"lm_head": {"group_size": 32}}}, "overrides lm_head: matches no linear that is compressed"),
    ({"overrides": {"lm_head": 0.25}, "lm_head": 0.0}, "overrides lm_head: is the head, which has its sparsity from"),
    ({"overrides": {"lm_head": {"sparsity": 0.5, "group_size": 32}}, "lm_head": 0.0}, "overrides lm_head: is the head"),
])  # fmt: skip
def test_what_does_not_fit_is_refused_before_anything_is_written(dense, text, tmp_path, changes, says):
    with pytest.raises(InputError, match=says):
        compress(job(dense("llama"), text, tmp_path / "out", Recipe(samples=6, context=48).changed(changes)), silent)
    assert not (tmp_path / "out").exists()


def test_stopped_again_and_again_it_ends_with_the_same_bytes(mixed, dense, text, tmp_path):
    again, rng = tmp_path / "out", random.Random(2)
    assert compress_with_stops(lambda: job(dense("llama"), text, again, MIXED), lambda: rng.randint(8, 12)) > 1
    compress(job(dense("llama"), text, again, MIXED), silent)
    assert_same(again, mixed[0])


def test_going_on_with_other_group_sizes_is_refused(mixed, dense, text):
    other = MIXED.changed({"overrides": {DOWN: {"group_size": 8}}})
    with pytest.raises(InputError, match="begun with recipe.overrides"):
        compress(job(dense("llama"), text, mixed[0], other), silent)
