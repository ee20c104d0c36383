"""From a dense folder to a finished checkpoint, interrupted or not."""

import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import vllm_gqsa.hf  # noqa: F401 - registers with transformers
from vllm_gqsa.experts import MIXTURES
from vllm_gqsa.format import CheckpointReader, FormatError, TensorFiles
from vllm_gqsa.offline.errors import InputError
from vllm_gqsa.offline.families import FAMILIES
from vllm_gqsa.offline.files import digest_files
from vllm_gqsa.offline.inspect import inspect_checkpoint
from vllm_gqsa.offline.mask import FLOOR
from vllm_gqsa.offline.perplexity import evaluate
from vllm_gqsa.offline.pipeline import Job, compress
from vllm_gqsa.offline.recipe import NAMED, Recipe
from vllm_gqsa.offline.text import TextSource
from vllm_gqsa.offline.verify import compare, verify_checkpoint

RECIPE = NAMED["one-shot"].changed({"samples": 6, "context": 48})


def job(dense, text, output, recipe=RECIPE, **changes):
    return Job(str(dense), output, recipe, TextSource(str(text)), **{"evaluation_windows": 4, "batch": 4, **changes})


def silent(*_):
    pass


def digests(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def finished(dense, text, tmp_path_factory):
    """A finished checkpoint, and the report of making it."""
    output = tmp_path_factory.mktemp("finished") / "out"
    return output, compress(job(dense("llama"), text, output), silent)


@pytest.mark.parametrize(
    ("family", "pattern"),
    [*((f, pattern) for f in FAMILIES for pattern in ("row", "model")), ("llama", "matrix"), ("opt", "1:2")],
)
def test_every_family_and_scope_gives_a_valid_checkpoint_that_computes_its_weights(
    dense, text, tmp_path, family, pattern
):
    recipe = RECIPE.model_copy(update={"pattern": pattern})
    report = compress(job(dense(family), text, tmp_path / "out", recipe), silent)
    assert verify_checkpoint(tmp_path / "out", silent) == report["modules"] == 3 * (6 if family == "opt" else 7)
    comparison = compare(tmp_path / "out", str(dense(family)), "abc def gh")
    assert comparison.twin_max_difference == 0
    assert comparison.dense_max_difference > 0
    assert report["sparsity"] == pytest.approx(0.5, abs=0.01)
    for module in inspect_checkpoint(tmp_path / "out").modules:
        if pattern == "model":
            assert module.sparsity < 1 - 0.5 * FLOOR + 0.01
        else:
            assert module.sparsity == pytest.approx(0.5, abs=0.13)  # 6 groups a row, 64 x 4 in all


@pytest.mark.parametrize("family", MIXTURES)
def test_every_expert_of_a_mixture_is_compressed(dense, text, tmp_path, family):
    report = compress(job(dense(family), text, tmp_path / "out"), silent)
    verify_checkpoint(tmp_path / "out", silent)
    config = CheckpointReader(tmp_path / "out").config
    experts = [name for name in config.modules if ".experts." in name]
    blocks = 3 if family == "mixtral" else 2  # the first block of the others has none
    assert len(experts) == blocks * 4 * 3
    assert report["modules"] == len(experts) + 3 * 4 + {"mixtral": 0, "qwen2_moe": 3 + 2 * 3, "qwen3_moe": 3}[family]
    assert r"re:.*\.(shared_expert_)?gate$" in config.ignore
    comparison = compare(tmp_path / "out", str(dense(family)), "abc def gh")
    assert comparison.twin_max_difference <= comparison.twin_may_differ < comparison.dense_max_difference


def test_the_streamed_perplexity_is_that_of_transformers(finished, text):
    output, report = finished
    tokens = AutoTokenizer.from_pretrained(output)(text.read_text(), return_tensors="pt").input_ids[0]
    read = tokens[: len(tokens) // 48 * 48].view(-1, 48)[: 8 * RECIPE.samples + 4]
    held_out = read[-4:]
    model = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(held_out).logits[:, :-1].flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, held_out[:, 1:].flatten())
    assert report["perplexity"]["perplexity"] == pytest.approx(loss.exp().item(), rel=1e-5)


def test_gqsa_eval_measures_dense_and_compressed_models(finished, dense, text):
    source = TextSource(str(text))
    for folder in (finished[0], dense("llama")):
        found = evaluate(
            str(folder), source, context=32, max_windows=3, engine="transformers", dtype="float32", device="cpu",
            progress=silent,
        )  # fmt: skip
        assert (found.windows, found.context, found.tokens) == (3, 32, 93)
        assert 200 < found.perplexity < 450  # random weights: about the size of the vocabulary


def test_everything_a_user_needs_is_in_the_folder(finished, dense):
    output, report = finished
    assert AutoConfig.from_pretrained(output).quantization_config["quant_method"] == "gqsa"
    assert AutoTokenizer.from_pretrained(output).chat_template
    assert GenerationConfig.from_pretrained(output) is not None
    card = (output / "README.md").read_text()
    assert report["command"] in card
    assert f"{report['bits_per_weight']:.2f}" in card
    assert "import vllm_gqsa.hf" in card
    assert json.loads((output / "gqsa_report.json").read_text()) == report
    assert not list(output.glob(".partial*"))
    assert report["bytes"] == sum(p.stat().st_size for p in output.glob("*.safetensors"))


def test_what_is_not_compressed_is_as_it_was(finished, dense):
    output, _ = finished
    reader, source = CheckpointReader(output), TensorFiles(dense("llama"))
    for name in source.file_of:
        if name.removesuffix(".weight") not in reader.config.modules:
            assert torch.equal(reader.files.tensor(name), source.tensor(name)), name


def test_nothing_pruned_is_close_to_the_dense_model(dense, text, tmp_path):
    report = compress(job(dense("llama"), text, tmp_path / "out", Recipe(sparsity=0, samples=6, context=48)), silent)
    assert report["perplexity"]["perplexity"] == pytest.approx(report["dense_perplexity"]["perplexity"], rel=0.02)


def test_ignored_linears_stay_dense(dense, text, tmp_path):
    recipe = RECIPE.model_copy(update={"ignore": ("lm_head", "re:.*down_proj", "model.layers.1.self_attn.o_proj")})
    compress(job(dense("llama"), text, tmp_path / "out", recipe), silent)
    reader = CheckpointReader(tmp_path / "out")
    assert len(reader.config.modules) == 21 - 4
    assert "model.layers.0.mlp.down_proj.weight" in reader.files
    assert verify_checkpoint(tmp_path / "out", silent) == 17


def test_a_half_ignored_fused_layer_is_refused(dense, text, tmp_path):
    recipe = RECIPE.model_copy(update={"ignore": ("re:.*k_proj",)})
    with pytest.raises(InputError, match=r"ignore takes model.layers.0.self_attn.k_proj but not all of"):
        compress(job(dense("llama"), text, tmp_path / "out", recipe), silent)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("changes", "says"), [
    ({"group_size": 64}, r"mlp.down_proj: group_size 64 does not divide its 96 input features"),
    ({"pattern": "2:4"}, r"mlp.down_proj: pattern 2:4 does not divide its 6 groups"),
    ({"samples": 5000}, "windows of 48 tokens leave none|are asked for"),
    ({"ignore": ("re:.*",)}, "nothing is left to compress"),
])  # fmt: skip
def test_recipes_that_do_not_fit_are_refused_before_anything_is_written(dense, text, tmp_path, changes, says):
    with pytest.raises(InputError, match=says):
        compress(job(dense("llama"), text, tmp_path / "out", RECIPE.model_copy(update=changes)), silent)
    assert not (tmp_path / "out").exists()


def test_models_that_cannot_be_compressed_are_refused(dense, text, tmp_path, finished):
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(InputError, match=r"has no config.json"):
        compress(job(other, text, tmp_path / "out"), silent)
    (other / "config.json").write_text('{"model_type": "gpt2"}')
    (other / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(InputError, match=r"pickled weights \(.bin\), which are never read"):
        compress(job(other, text, tmp_path / "out"), silent)
    with pytest.raises(InputError, match="is quantised already"):
        compress(job(finished[0], text, tmp_path / "out"), silent)


def test_a_folder_that_is_not_ours_is_left_alone(dense, text, tmp_path):
    (tmp_path / "precious").write_text("x")
    for restart in (False, True):
        with pytest.raises(InputError, match="was not begun by gqsa compress"):
            compress(job(dense("llama"), text, tmp_path, restart=restart), silent)
    assert (tmp_path / "precious").read_text() == "x"


def test_going_on_with_another_recipe_model_or_text_is_refused(finished, dense, text, tmp_path):
    output, report = finished
    before = digests(output)
    for change, says in [
        (
            job(dense("llama"), text, output, RECIPE.model_copy(update={"sparsity": 0.25})),
            r"recipe.sparsity = 0.5, now",
        ),
        (job(dense("qwen2"), text, output), "begun with model."),
        (job(dense("llama"), text, output, RECIPE.model_copy(update={"seed": 1})), "begun with"),
    ]:
        with pytest.raises(InputError, match=says):
            compress(change, silent)
    assert compress(job(dense("llama"), text, output), silent) == report
    assert digests(output) == before


def test_restart_begins_anew(dense, text, tmp_path):
    compress(job(dense("llama"), text, tmp_path / "out"), silent)
    quarter = RECIPE.model_copy(update={"sparsity": 0.25})
    report = compress(job(dense("llama"), text, tmp_path / "out", quarter, restart=True), silent)
    assert report["sparsity"] == pytest.approx(0.25, abs=0.05)


def test_a_finished_folder_that_has_lost_a_file_is_not_called_finished(dense, text, tmp_path):
    compress(job(dense("llama"), text, tmp_path / "out"), silent)
    (tmp_path / "out" / "model-00002-of-00004.safetensors").unlink()
    with pytest.raises(FormatError, match=r"model-00002-of-00004.safetensors: no such file"):
        compress(job(dense("llama"), text, tmp_path / "out"), silent)


def test_models_that_differ_anywhere_are_told_apart(tmp_path):
    one, two = tmp_path / "one" / "w", tmp_path / "two" / "w"
    data = bytearray(3 << 20)
    for path in (one, two):
        path.parent.mkdir()
        path.write_bytes(data)
        data[len(data) // 2] = 1
    assert digest_files([one]) != digest_files([two])


class Killed(BaseException):
    pass


def compress_with_stops(make_job, steps):
    """Compress, stopped after ``steps()`` steps and begun again until it ends, or 100 times; returns how often."""

    def stop_after(number):
        left = iter(range(number))

        def progress(*_):
            if next(left, None) is None:
                raise Killed

        return progress

    for stops in range(100):
        with contextlib.suppress(Killed):
            compress(make_job(), stop_after(steps()))
            return stops
    return 100


def test_stopped_after_every_step_it_ends_with_the_same_bytes(finished, dense, text, tmp_path):
    """The output path is part of the recorded command, so both runs write to a folder of the same name."""
    output, _ = finished
    again = tmp_path / "out"
    # 21 linears and twice 3 blocks of perplexity: finishing at all takes going on where it stopped.
    assert compress_with_stops(lambda: job(dense("llama"), text, again), lambda: 4) > 1
    compress(job(dense("llama"), text, again), silent)
    assert_same(again, output)


def assert_same(one, two):
    """Byte for byte, but for the name of the output folder in the recorded command."""
    assert {p.name for p in one.iterdir()} == {p.name for p in two.iterdir()}
    for path in one.iterdir():
        expected = (two / path.name).read_bytes().replace(str(two).encode(), str(one).encode())
        assert path.read_bytes() == expected, path.name


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_bytes(finished, dense, text, tmp_path):
    output, _ = finished
    again = tmp_path / "out"
    command = [
        sys.executable, "-m", "vllm_gqsa.offline.cli", "compress", str(dense("llama")), str(again),
        "--recipe", "one-shot", "--calibration", str(text),
        "--samples", "6", "--context", "48", "--eval-windows", "4", "--batch", "4",
    ]  # fmt: skip
    rng = random.Random(0)
    kills = 0
    for _ in range(20):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(timeout=rng.uniform(2.5, 7))
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
        time.sleep(0.1)
    subprocess.run(command, check=True)
    assert kills > 5
    assert_same(again, output)
