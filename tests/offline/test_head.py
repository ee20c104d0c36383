"""A compressed output head, tied to the embedding or not, from a dense folder to a finished checkpoint."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import vllm_gqsa.hf  # noqa: F401 - registers with transformers
from tests.helpers import edit_json
from tests.offline.test_pipeline import RECIPE, Killed, assert_same, job, silent
from vllm_gqsa.format import CheckpointReader
from vllm_gqsa.offline.errors import InputError
from vllm_gqsa.offline.head import compress_head
from vllm_gqsa.offline.inspect import inspect_checkpoint
from vllm_gqsa.offline.pipeline import compress
from vllm_gqsa.offline.recipe import GradualPruning, Recipe
from vllm_gqsa.offline.verify import compare, verify_checkpoint

HEAD, TABLE = "lm_head", "model.embed_tokens"
NAMES = {"llama": HEAD, "qwen2": TABLE}
"""In tests/offline/conftest.py Llama is untied and Qwen2 is tied."""
DENSE_HEAD = RECIPE.changed({"pattern": "row"})
HEAD_RECIPE = DENSE_HEAD.changed({"lm_head": 0.25})


@pytest.fixture(scope="module", params=NAMES)
def finished(request, dense, text, tmp_path_factory):
    """Family, checkpoint, and the report of making it."""
    output = tmp_path_factory.mktemp("head") / "out"
    return request.param, output, compress(job(dense(request.param), text, output, HEAD_RECIPE), silent)


def test_it_is_valid_and_computes_its_weights(finished, dense):
    family, output, report = finished
    assert verify_checkpoint(output, silent) == report["modules"] == 22
    assert compare(output, str(dense(family)), "abc def gh").twin_max_difference == 0


def test_the_dense_matrix_is_gone_and_everything_counts_the_compressed_one(finished):
    family, output, report = finished
    name = NAMES[family]
    reader = CheckpointReader(output)
    assert reader.config.ignore == ()
    assert reader.config.head == name
    assert not {f"{name}.weight", "lm_head.weight"} & set(reader.files.file_of)
    (module,) = [m for m in inspect_checkpoint(output).modules if m.name == name]
    assert (module.out_features, module.in_features, module.row_nnz_min, module.row_nnz_max) == (300, 64, 3, 3)
    assert report["lm_head"] == {
        "name": name, "sparsity": 0.25, "bits_per_weight": pytest.approx(module.bits_per_weight)
    }  # fmt: skip
    assert "embedding, whose one matrix is also" in (output / "README.md").read_text() or name == HEAD
    assert "with 25 % pruned." in (output / "README.md").read_text()
    assert "--lm-head 0.25" in report["command"]


def test_the_blocks_are_those_of_a_checkpoint_with_a_dense_head(finished, dense, text, tmp_path):
    family, output, report = finished
    compress(job(dense(family), text, tmp_path / "out", DENSE_HEAD), silent)
    ours, other = CheckpointReader(output), CheckpointReader(tmp_path / "out")
    assert other.config.ignore == (HEAD,)
    for name, file in other.files.file_of.items():
        if ".layers." in name or name == "model.norm.weight":
            assert torch.equal(ours.files.tensor(name), other.files.tensor(name)), (name, file)
    assert report["bytes"] < sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))


def test_compensation_lowers_the_error_of_the_logits(finished, dense):
    """The Hessian is that of the right inputs: the compressed model's final norm."""
    family, output, _ = finished
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(2, 300, (24, 48), generator=generator)
    model = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32).eval()
    weight = AutoModelForCausalLM.from_pretrained(dense(family), dtype=torch.float32).lm_head.weight
    with torch.no_grad():
        inputs = model.base_model(tokens).last_hidden_state
        errors = []
        for compensate in (False, True):
            recipe = HEAD_RECIPE.model_copy(update={"compensate": compensate})
            matrix = compress_head(NAMES[family], weight, inputs.split(4), recipe, torch.device("cpu"))
            errors.append(((matrix.to_dense() - weight) @ inputs.flatten(0, 1).T).square().mean().item())
    assert errors[1] < 0.95 * errors[0]


def test_stopped_before_during_and_after_the_head_it_ends_with_the_same_bytes(
    finished, dense, text, tmp_path, monkeypatch
):
    family, output, _ = finished
    again = tmp_path / "out"

    def stop_at(number):
        steps = iter(range(1, number))

        def progress(*_):
            if next(steps, None) is None:
                raise Killed

        return progress

    def killed(*_):
        raise Killed

    # A block that is read from its file is one step, one that is compressed is seven, the head is one; once all blocks
    # are there, they are no steps any more.
    for number, shards in ((10, 1), (10, 2), (100, 3), (1, 4)):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            if number == 100:
                patch.setattr("vllm_gqsa.offline.passes.write_head", killed)
            compress(job(dense(family), text, again, HEAD_RECIPE), stop_at(number))
        assert len(list(again.glob("model-*"))) == shards
    compress(job(dense(family), text, again, HEAD_RECIPE), silent)
    assert_same(again, output)


def test_a_run_without_its_head_makes_only_the_head_again(finished, dense, text, tmp_path):
    family, output, _ = finished
    again = shutil.copytree(output, tmp_path / "out")
    for name in ("config.json", "model-00004-of-00005.safetensors", "model-00005-of-00005.safetensors"):
        (again / name).unlink()
    stamps = {p: p.stat().st_mtime_ns for p in again.glob("model-0000[123]-*")}
    compress(job(dense(family), text, again, HEAD_RECIPE), silent)
    assert stamps == {p: p.stat().st_mtime_ns for p in stamps}
    assert_same(again, output)


def test_the_heads_scope():
    stage = GradualPruning(tokens=1)
    scopes = {"row": "row", "matrix": "matrix", "model": "matrix"}
    for pattern, scope in scopes.items():
        recipe = Recipe(pattern=pattern, lm_head=0.25, prune=stage).for_head("lm_head")
        assert (recipe.pattern, recipe.sparsity) == (scope, 0.25)


def test_a_pattern_n_m_leaves_the_head_its_own_sparsity(dense, text, tmp_path):
    recipe = Recipe(sparsity=0.5, pattern="1:2", lm_head=0, samples=6, context=48)
    compress(job(dense("llama"), text, tmp_path / "out", recipe), silent)
    modules = {m.name: m.sparsity for m in inspect_checkpoint(tmp_path / "out").modules}
    assert modules.pop(HEAD) == 0
    assert set(modules.values()) == {0.5}


def test_the_head_alone(dense, text, tmp_path):
    recipe = Recipe(lm_head=0, ignore=("re:model.layers",), samples=6, context=48)
    report = compress(job(dense("qwen2"), text, tmp_path / "out", recipe), silent)
    assert verify_checkpoint(tmp_path / "out", silent) == report["modules"] == 1
    assert report["perplexity"]["perplexity"] == pytest.approx(report["dense_perplexity"]["perplexity"], rel=0.02)


def test_inputs_that_only_the_lookup_sees_keep_their_weights():
    weight = torch.randn(40, 32, generator=torch.Generator().manual_seed(0))
    inputs = torch.randn(100, 32, generator=torch.Generator().manual_seed(1))
    inputs[:, 3] = 0
    for name, lost in ((TABLE, False), (HEAD, True)):
        matrix = compress_head(name, weight, [inputs], HEAD_RECIPE.model_copy(update={"lm_head": 0.0}), inputs.device)
        assert bool((matrix.to_dense()[:, 3] == 0).all()) == lost


# -- refusals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "changes", "says"), [
    ("opt", {}, "--lm-head: vLLM serves opt models with a dense output head only"),
    ("qwen2", {"ignore": ("re:.*embed",)}, "ignore takes model.embed_tokens, which is tied to lm_head"),
    ("llama", {"group_size": 128, "ignore": ("re:model",)}, "lm_head: group_size 128 does not divide its 64 input"),
])  # fmt: skip
def test_heads_that_cannot_be_compressed(dense, text, tmp_path, family, changes, says):
    with pytest.raises(InputError, match=says):
        compress(job(dense(family), text, tmp_path / "out", HEAD_RECIPE.model_copy(update=changes)), silent)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("same", "recipe"), [(True, HEAD_RECIPE), (False, HEAD_RECIPE), (False, RECIPE)])
def test_files_that_hold_a_head_though_config_json_ties_it(dense, text, tmp_path, same, recipe):
    folder = shutil.copytree(dense("qwen2"), tmp_path / "dense")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    if not same:
        tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    if not same:
        with pytest.raises(InputError, match="config.json ties lm_head to model.embed_tokens, but lm_head.weight"):
            compress(job(folder, text, tmp_path / "out", recipe), silent)
        return
    compress(job(folder, text, tmp_path / "out", recipe), silent)
    assert "lm_head.weight" not in CheckpointReader(tmp_path / "out").files
    assert verify_checkpoint(tmp_path / "out", silent) == 22


def test_a_head_in_a_folder_begun_without_one(dense, text, tmp_path):
    compress(job(dense("llama"), text, tmp_path / "out"), silent)
    with pytest.raises(InputError, match=r"recipe.lm_head = null, now it is 0.25"):
        compress(job(dense("llama"), text, tmp_path / "out", HEAD_RECIPE), silent)


def test_a_recipe_that_ignores_the_head_it_compresses():
    with pytest.raises(ValueError, match="ignore takes lm_head, which is to be compressed"):
        Recipe(lm_head=0, ignore=("re:lm",))
    assert Recipe(ignore=("lm_head", "a")).left_dense == ("lm_head", "a")
    with pytest.raises(ValueError, match="leaves the head dense"):
        Recipe().for_head(HEAD)


def test_verify_notices_a_damaged_table(finished, tmp_path):
    family, output, _ = finished
    copy = shutil.copytree(output, tmp_path / "copy")
    name = NAMES[family]
    modules = json.loads((copy / "config.json").read_text())["quantization_config"]
    modules["modules"][name]["nnz"] += 1
    edit_json(copy / "config.json", quantization_config=modules)
    with pytest.raises(ValueError, match=f"{name}: holds nnz = 900 groups, config.json says 901"):
        verify_checkpoint(copy, silent)
