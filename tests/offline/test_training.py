"""Both training stages on tiny models: they help, they keep to the format, and an interruption leaves no trace."""

import itertools
import json
import random
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import vllm_gqsa.hf  # noqa: F401 - registers with transformers
from tests.offline.test_pipeline import assert_same, compress_with_stops, job, silent
from vllm_gqsa.format import CheckpointReader, TensorFiles
from vllm_gqsa.offline import e2e
from vllm_gqsa.offline.block import scale_of_errors
from vllm_gqsa.offline.errors import InputError
from vllm_gqsa.offline.pipeline import compress
from vllm_gqsa.offline.recipe import BlockTraining, Distillation, EndToEnd, GradualPruning, Recipe
from vllm_gqsa.offline.text import choose_windows
from vllm_gqsa.offline.training import Optimizer, divergence, sample_order
from vllm_gqsa.offline.verify import verify_checkpoint

ALL = Recipe(
    sparsity=0.5,
    samples=16,
    context=48,
    precision="float32",
    bqpo=BlockTraining(epochs=3, batch=2, weight_lr=3e-3),
    distill=Distillation(tokens=3840, batch=2),
    oqp=EndToEnd(tokens=1920, batch=2),
)


def changed(stage, **settings):
    """:data:`ALL` with settings of one stage replaced."""
    return ALL.model_copy(update={stage: getattr(ALL, stage).model_copy(update=settings)})


def facts(output):
    return json.loads((output / "gqsa_training.json").read_text())


@pytest.fixture(scope="module")
def trained(dense, text, tmp_path_factory):
    """A checkpoint that went through all stages, and the report of making it."""
    output = tmp_path_factory.mktemp("trained") / "out"
    return output, compress(job(dense("llama"), text, output, ALL), silent)


# -- what training is for ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen2", "opt", "mixtral"])
def test_every_stage_lowers_its_loss(dense, text, tmp_path, family, trained):
    output = trained[0] if family == "llama" else tmp_path / "out"
    if family != "llama":
        compress(job(dense(family), text, output, ALL), silent)
    found = facts(output)
    errors = [block["errors"] for block in found["blocks"]]
    # A block of experts may keep the state it began with: which expert gets a token is no smooth function.
    assert all(e["bqpo"] <= e["one_shot"] for e in errors[:-1])
    assert sum(e["bqpo"] for e in errors[:-1]) < sum(e["one_shot"] for e in errors[:-1])
    curve = found["blocks"][-1]["curve"]  # of a divergence, not of its output's error
    assert min(curve) < curve[0] or family == "mixtral"
    for name in ("distill", "oqp"):
        assert found[name]["after"] < found[name]["before"]
        assert found[name]["kept"]
    assert found["oqp"]["before"] == pytest.approx(found["distill"]["after"], rel=0.01)
    verify_checkpoint(output, silent)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_what_was_measured_is_what_is_stored(trained, dense, text, tmp_path, stored):
    """KL divergence of the finished checkpoint from the dense model, by transformers, on the windows that judged."""
    output, model = trained[0], dense("llama")
    if stored != torch.float32:
        output, model = tmp_path / "out", tmp_path / "model"
        shutil.copytree(dense("llama"), model)
        AutoModelForCausalLM.from_pretrained(model, dtype=stored).save_pretrained(model)
        stage = EndToEnd(tokens=1920, batch=2, norm_lr=1e-2)
        compress(job(model, text, output, ALL.model_copy(update={"bqpo": None, "distill": None, "oqp": stage})), silent)
        norm = "model.layers.1.input_layernorm.weight"
        assert not torch.equal(TensorFiles(output).tensor(norm), TensorFiles(model).tensor(norm))
    judges = windows_of(text, output)[:-4][-8:]
    assert facts(output)["oqp"]["after"] == pytest.approx(divergence_of(output, model, judges), rel=1e-4)


def windows_of(text, model):
    """What is read of the text: windows to calibrate and train on, and four to measure the perplexity on."""
    tokens = AutoTokenizer.from_pretrained(model)(text.read_text(), return_tensors="pt").input_ids[0]
    return tokens[: len(tokens) // 48 * 48].view(-1, 48)[: 8 * ALL.samples + 4]


def divergence_of(ours, theirs, windows):
    """KL divergence, by transformers."""
    with torch.no_grad():
        a, b = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(windows).logits.log_softmax(-1)
            for folder in (ours, theirs)
        )
    return float(torch.nn.functional.kl_div(a, b, log_target=True, reduction="sum")) / windows.numel()


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_the_last_block_is_trained_against_the_logits(dense, text, tmp_path, family):
    recipe = ALL.model_copy(update={"distill": None, "oqp": None})
    compress(job(dense(family), text, tmp_path / "out", recipe), silent)
    judges = choose_windows(windows_of(text, tmp_path / "out")[:-4], recipe.samples, recipe.seed, "")[[7, 15]]
    curve = facts(tmp_path / "out")["blocks"][-1]["curve"]
    assert min(curve) < curve[0]
    assert min(curve) == pytest.approx(divergence_of(tmp_path / "out", dense(family), judges), rel=1e-4)


def test_the_last_block_can_be_trained_like_the_others(dense, text, tmp_path):
    recipe = Recipe(samples=16, context=48, precision="float32", bqpo=BlockTraining(epochs=1, last_block="output"))
    compress(job(dense("llama"), text, tmp_path / "out", recipe), silent)
    for block in facts(tmp_path / "out")["blocks"]:
        assert block["errors"]["bqpo"] == pytest.approx(min(block["curve"]), rel=1e-3)


def test_massive_activations_count_as_much_as_the_rest():
    """A first position a thousand times as large, to which the block adds nothing, with an error that nothing mends."""
    generator = torch.Generator().manual_seed(0)
    inputs, update = torch.randn(6, 10, 32, generator=generator), torch.randn(6, 10, 32, generator=generator)
    inputs[:, 0] *= 1000
    update[:, 0] *= 0.01
    targets = inputs + update
    scale = scale_of_errors(update.square().mean(-1), targets)
    assert torch.equal(scale[:, 0], targets[:, 0].square().mean(-1))
    assert torch.equal(scale[:, 1:], update[:, 1:].square().mean(-1))
    errors = (0.1 * inputs).square().mean(-1) / scale
    assert float(errors[:, 0].max()) < float(errors[:, 1:].max())


def test_a_position_that_a_block_leaves_alone_does_not_count_for_all():
    update = torch.ones(4, 8)
    update[0, 3] = 0
    assert scale_of_errors(update, torch.ones(4, 8, 16))[0, 3] == pytest.approx(0.01)


def test_each_stage_is_reported(trained):
    output, report = trained
    card = (output / "README.md").read_text()
    for title in ("one-shot", "BQPO", "distillation", "E2E-OQP"):
        assert f"| {title} |" in card
    worst = next(iter(report["worst_modules"]))
    errors = facts(output)["modules"]
    assert len(errors) == 21
    assert errors[worst] == max(errors.values())
    assert worst in card
    assert (output / "gqsa_training.png").read_bytes().startswith(b"\x89PNG")
    assert len(facts(output)["distill"]["curve"]) == 3840 // 96
    assert len(facts(output)["blocks"]) == 3
    assert not (output / "gqsa_work").exists()


def test_norms_are_trained_unless_their_rate_is_zero(trained, dense, text, tmp_path):
    name = "model.layers.1.input_layernorm.weight"
    before = TensorFiles(dense("llama")).tensor(name)
    assert not torch.equal(CheckpointReader(trained[0]).files.tensor(name), before)
    still = Recipe(samples=8, context=48, bqpo=BlockTraining(epochs=1, norm_lr=0), precision="float32")
    compress(job(dense("llama"), text, tmp_path / "out", still), silent)
    assert torch.equal(CheckpointReader(tmp_path / "out").files.tensor(name), before)


def test_scales_alone_leave_codes_and_mask(dense, text, tmp_path):
    plain = Recipe(samples=8, context=48, precision="float32")
    settings = EndToEnd(tokens=960, batch=2, scale_lr=5e-3, zero_lr=0, norm_lr=0)
    compress(job(dense("llama"), text, tmp_path / "a", plain), silent)
    compress(job(dense("llama"), text, tmp_path / "b", plain.model_copy(update={"oqp": settings})), silent)
    name = "model-00002-of-00004.safetensors"
    a, b = load_file(tmp_path / "a" / name), load_file(tmp_path / "b" / name)
    different = {key.rpartition(".")[2] for key in a if not torch.equal(a[key], b[key])}
    assert different == {"scale_zero"}
    assert all(torch.equal(a[k] & 15, b[k] & 15) for k in a if k.endswith("scale_zero"))  # zero points


@pytest.mark.parametrize("loss", ["mse", "token"])
def test_other_losses_of_a_block_help_too(dense, text, tmp_path, loss):
    recipe = Recipe(samples=16, context=48, precision="float32", bqpo=BlockTraining(epochs=2, batch=2, loss=loss))
    compress(job(dense("llama"), text, tmp_path / "out", recipe), silent)
    for block in facts(tmp_path / "out")["blocks"]:
        assert block["curve"][-1] < block["curve"][0]


def test_cross_entropy_needs_no_teacher(dense, text, tmp_path, monkeypatch):
    monkeypatch.setattr(e2e, "_teacher", None)
    recipe = Recipe(samples=8, context=48, precision="float32", distill=Distillation(tokens=960, batch=2, loss="ce"))
    compress(job(dense("llama"), text, tmp_path / "out", recipe), silent)
    assert facts(tmp_path / "out")["distill"]["loss"] == "cross-entropy"


# -- stopping ----------------------------------------------------------------------------------------------------


def test_a_block_that_gets_worse_keeps_its_best_state(dense, text, tmp_path):
    wild = Recipe(samples=8, context=48, precision="float32", bqpo=BlockTraining(epochs=9, patience=2, weight_lr=3.0))
    compress(job(dense("llama"), text, tmp_path / "out", wild), silent)
    for block in facts(tmp_path / "out")["blocks"]:
        assert len(block["curve"]) < 10  # it stopped early
    for block in facts(tmp_path / "out")["blocks"][:-1]:
        assert block["errors"]["bqpo"] == pytest.approx(min(block["curve"]), rel=1e-3)
        assert block["errors"]["bqpo"] <= block["errors"]["one_shot"] * (1 + 1e-6)


def test_end_to_end_training_that_makes_it_worse_is_not_kept(dense, text, tmp_path):
    plain = Recipe(samples=8, context=48, precision="float32")
    wild = plain.model_copy(update={"distill": Distillation(tokens=960, batch=2, weight_lr=3.0)})
    compress(job(dense("llama"), text, tmp_path / "a", plain), silent)
    report = compress(job(dense("llama"), text, tmp_path / "b", wild), silent)
    assert "worse, so not kept" in report["stages"]
    for name in ("model-00001-of-00004.safetensors", "model-00003-of-00004.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_loss_that_is_not_finite_stops_with_advice():
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = Optimizer({"weight_lr": [parameter]}, Distillation(tokens=1), 10)
    for loss, gradient in ((float("nan"), 1.0), (1.0, float("inf"))):
        parameter.grad = torch.full((3,), gradient)
        with pytest.raises(InputError, match=r"block 3: loss .* in step 5: training has diverged; lower the learning"):
            optimizer.step(4, loss, "BQPO of block 3")
    assert torch.equal(parameter.detach(), torch.ones(3))


def test_a_block_without_a_compressed_linear_is_left_alone(dense, text, tmp_path):
    recipe = ALL.model_copy(update={"ignore": (r"re:.*layers\.0\..*",), "distill": None, "oqp": None})
    compress(job(dense("llama"), text, tmp_path / "out", recipe), silent)
    blocks = facts(tmp_path / "out")["blocks"]
    assert ["curve" in block for block in blocks] == [False] + [True] * (len(blocks) - 1)
    assert set(blocks[0]["errors"].values()) == {0.0}


@pytest.mark.parametrize("stage", ["bqpo", "distill", "oqp"])
def test_divergence_of_a_real_run_names_the_stage(dense, text, tmp_path, stage, monkeypatch):
    clip = torch.nn.utils.clip_grad_norm_
    bad = "bqpo" if stage == "bqpo" else "model"
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *a, **k: clip(*a, **k) * float("nan"))
    recipe = ALL.model_copy(update={other: None for other in ("bqpo", "distill", "oqp") if other != stage})
    says = "BQPO of block 0" if bad == "bqpo" else stage
    with pytest.raises(InputError, match=rf"{says}: loss .* training has diverged"):
        compress(job(dense("llama"), text, tmp_path / "out", recipe), silent)
    assert not (tmp_path / "out" / "config.json").exists()


# -- the same bytes ----------------------------------------------------------------------------------------------


def test_stopped_after_every_few_steps_it_ends_with_the_same_bytes(trained, dense, text, tmp_path, monkeypatch):
    monkeypatch.setattr(e2e, "SAVE_SECONDS", 0.0)
    again = tmp_path / "out"
    rng = random.Random(0)
    stops = compress_with_stops(lambda: job(dense("llama"), text, again, ALL), lambda: rng.randint(10, 14))
    assert stops > 5
    compress(job(dense("llama"), text, again, ALL), silent)
    assert_same(again, trained[0])


@pytest.mark.slow
@pytest.mark.parametrize("stages", [
    {"distill": Distillation(tokens=19200, batch=2)},
    {"pattern": "model", "bqpo": None, "prune": GradualPruning(tokens=19200, batch=2), "distill": None},
])  # fmt: skip
def test_killed_at_random_moments_of_training_it_ends_with_the_same_bytes(dense, text, tmp_path, stages):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(ALL.model_copy(update=stages).to_yaml())
    code = "import vllm_gqsa.offline.e2e as e; e.SAVE_SECONDS = 0.1; import vllm_gqsa.offline.cli as c; c.main()"

    def start(name):
        options = ["--calibration", str(text), "--recipe", str(recipe), "--eval-windows", "4", "--batch", "4"]
        command = [sys.executable, "-c", code, "compress", str(dense("llama")), str(tmp_path / name), *options]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    assert start("whole").wait() == 0
    rng = random.Random(0)
    kills = runs = 0
    while kills < 20:  # in as many runs as there is time for so many
        process = start(f"stopped{runs}")
        try:
            assert process.wait(timeout=rng.uniform(4, 12)) == 0
            assert_same(tmp_path / f"stopped{runs}", tmp_path / "whole")
            runs += 1
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
    assert start(f"stopped{runs}").wait() == 0
    assert_same(tmp_path / f"stopped{runs}", tmp_path / "whole")


def test_the_saved_recipe_makes_the_same_bytes(trained, dense, text, tmp_path):
    output, _ = trained
    recipe = Recipe.read(str(output / "gqsa_recipe.yaml"))
    assert recipe == ALL
    compress(job(dense("llama"), text, tmp_path / "out", recipe), silent)
    assert_same(tmp_path / "out", output)


@pytest.mark.parametrize(("streams", "mapped"), [(1.9, True), (2.0, False)])
def test_activations_in_files_give_the_same_bytes(trained, dense, text, tmp_path, monkeypatch, streams, mapped):
    files = []
    from_file = torch.from_file
    monkeypatch.setattr(torch, "from_file", lambda *a, **k: files.append(k["size"]) or from_file(*a, **k))
    size = 4 * ALL.samples * ALL.context * 64
    compress(job(dense("llama"), text, tmp_path / "out", ALL, memory=streams * size), silent)
    assert files == ([size // 4] * 2 if mapped else [])  # the dense model's and the compressed one's
    assert_same(tmp_path / "out", trained[0])


def test_checkpointing_changes_memory_not_gradients(trained, dense, text, tmp_path):
    compress(job(dense("llama"), text, tmp_path / "out", changed("distill", checkpointing=True)), silent)
    ours, theirs = facts(tmp_path / "out")["distill"], facts(trained[0])["distill"]
    assert ours["curve"] == pytest.approx(theirs["curve"], rel=1e-4)


def test_half_precision_trains_too(dense, text, tmp_path):
    recipe = ALL.model_copy(update={"precision": "bfloat16"})
    compress(job(dense("llama"), text, tmp_path / "out", recipe), silent)
    assert facts(tmp_path / "out")["distill"]["after"] < facts(tmp_path / "out")["distill"]["before"]


def test_an_epoch_holds_every_window_once_in_an_order_of_its_own():
    count = 7
    seen = torch.cat([e2e._picked(count, start, 3, seed=0) for start in range(0, 21, 3)])
    for epoch in seen.split(count):
        assert sorted(epoch.tolist()) == list(range(count))
    assert not torch.equal(seen[:count], seen[count : 2 * count])
    assert torch.equal(sample_order(9, 2, 1), sample_order(9, 2, 1))
    assert not torch.equal(sample_order(9, 2, 1), sample_order(9, 2, 2))
    for seed in (2**63 - 1, -(2**63)):  # as a recipe may have them
        assert sorted(sample_order(9, 2, seed).tolist()) == list(range(9))


def test_learning_rates_rise_and_fall():
    settings = Distillation(tokens=1, warmup=0.1, final_lr=0.1, weight_lr=2.0)
    optimizer = Optimizer({"weight_lr": [torch.nn.Parameter(torch.ones(1))]}, settings, 100)
    factors = [optimizer.factor(step) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == factors[10] == 1
    assert all(a > b for a, b in itertools.pairwise(factors[10:]))
    assert factors[-1] == pytest.approx(0.1, abs=0.001)


def test_each_stage_goes_on_in_the_text_where_the_one_before_stopped(dense, text, tmp_path, monkeypatch):
    seen = []
    picked = e2e._picked
    monkeypatch.setattr(e2e, "_picked", lambda *a: seen.append(picked(*a)) or seen[-1])
    recipe = Recipe(
        samples=16,
        context=48,
        precision="float32",
        distill=Distillation(tokens=480, batch=2),
        oqp=EndToEnd(tokens=960, batch=4),
    )
    compress(job(dense("llama"), text, tmp_path / "out", recipe), silent)
    windows = torch.cat(seen).tolist()
    assert len(windows) == 5 * 2 + 5 * 4
    assert len(set(windows)) == len(windows)


def test_divergence_and_its_gradient_are_torchs():
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(7, 50, generator=generator, dtype=torch.float32) * 3).requires_grad_()
    wanted = torch.randn(7, 50, generator=generator) * 3
    ours = divergence(logits, wanted)
    (2 * ours).backward()
    gradient, logits.grad = logits.grad, None
    log = torch.nn.functional.log_softmax
    theirs = torch.nn.functional.kl_div(log(logits, -1), log(wanted, -1), log_target=True, reduction="batchmean")
    (2 * theirs).backward()
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradient, logits.grad)
