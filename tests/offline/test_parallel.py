"""Training by several processes of torchrun: what one process would make, the same bytes each time, one message."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers import make_dense
from tests.offline.test_pipeline import assert_same, job, silent
from tests.offline.test_training import facts
from vllm_gqsa.offline import parallel
from vllm_gqsa.offline.errors import InputError
from vllm_gqsa.offline.pipeline import compress
from vllm_gqsa.offline.recipe import NAMED, Distillation, EndToEnd, GradualPruning, Recipe

SHARED = Recipe(
    pattern="matrix",
    samples=8,
    context=48,
    precision="float32",
    prune=GradualPruning(tokens=960, batch=4, interval=1, weight_lr=2e-3),
    oqp=EndToEnd(tokens=384, batch=4, checkpointing=True),
)
KILL = """
import os, signal
from vllm_gqsa.offline import e2e
e2e.SAVE_SECONDS, save, saves = 0, e2e._save, []
def stop(job, *rest):
    save(job, *rest)
    saves.append(job.name)
    if saves.count({name!r}) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
e2e._save = stop
"""
FAIL = """
from vllm_gqsa.offline import e2e, parallel
picked = e2e._picked
def fail(count, start, *rest):
    if start and parallel.is_first() == {first}:
        {how}
    return picked(count, start, *rest)
e2e._picked = fail
"""


def torchrun(count, dense, text, output, recipe, *options, planted=""):
    """Run ``gqsa compress`` in several processes, with ``planted`` before it."""
    script, settings = output.with_suffix(".py"), output.with_suffix(".yaml")
    script.write_text(f"{planted}\nfrom vllm_gqsa.offline.cli import main\nmain()\n")
    settings.write_text(recipe.to_yaml())
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", str(script)]
    command += ["compress", str(dense), str(output), "--calibration", str(text), "--recipe", str(settings)]
    command += ["--eval-windows", "4", "--batch", "1", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


def assert_close(ours, theirs):
    """The same masks, and losses that differ by the order of sums alone."""
    for name in ("prune", "oqp"):
        a, b = (facts(output)[name] for output in (ours, theirs))
        assert a["curve"] == pytest.approx(b["curve"], rel=1e-3, abs=1e-6)
        assert a["after"] == pytest.approx(b["after"], rel=1e-3)
    for path in theirs.glob("*.safetensors"):
        a, b = load_file(ours / path.name), load_file(path)
        for name in (n for n in b if n.endswith(("crow_indices", "group_bitmap"))):
            assert torch.equal(a[name], b[name]), name


def test_two_processes_make_what_one_makes(dense, text, tmp_path):
    """Each in two parts a step, of which the second alone exchanges gradients."""
    compress(job(dense("llama"), text, tmp_path / "one", SHARED, batch=1), silent)
    done = torchrun(2, dense("llama"), text, tmp_path / "two", SHARED, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)  # one object: one process printed it
    assert report["command"].startswith("torchrun --standalone --nproc-per-node=2 -m vllm_gqsa.offline compress")
    assert_close(tmp_path / "two", tmp_path / "one")
    with pytest.raises(InputError, match='was begun with device = "2 x cpu", now it is "cpu"'):
        compress(job(dense("llama"), text, tmp_path / "two", SHARED, batch=1), silent)


@pytest.mark.slow
def test_stopped_in_each_stage_three_processes_end_with_the_same_bytes(dense, text, tmp_path):
    """Three: the sum of two does not depend on their order."""
    recipe = SHARED.model_copy(
        update={
            "prune": SHARED.prune.model_copy(update={"batch": 3}),
            "oqp": SHARED.oqp.model_copy(update={"batch": 6, "tokens": 1152}),
        }
    )
    plain, again = tmp_path / "plain", tmp_path / "again"
    for name in ("prune", "oqp"):
        killed = torchrun(3, dense("llama"), text, again, recipe, planted=KILL.format(name=name))
        assert killed.returncode != 0
        assert (again / "gqsa_work" / f"{name}.state").exists(), killed.stderr
    for output in (plain, again):
        done = torchrun(3, dense("llama"), text, output, recipe)
        assert done.returncode == 0, done.stderr
    assert_same(again, plain)


@pytest.mark.slow
def test_experts_that_one_process_or_none_chose(tokenizer, text, tmp_path):
    """At most 16 places for tokens in 24 experts of each layer."""
    sizes = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 32, "head_dim": 16, "num_local_experts": 24}
    make_dense(tmp_path / "dense", "mixtral", **sizes)
    tokenizer.save_pretrained(tmp_path / "dense")
    changes = {name: getattr(SHARED, name).model_copy(update={"tokens": 80}) for name in ("prune", "oqp")}
    recipe = SHARED.model_copy(update={"context": 4, **changes})
    compress(job(tmp_path / "dense", text, tmp_path / "one", recipe, batch=1), silent)
    done = torchrun(2, tmp_path / "dense", text, tmp_path / "two", recipe)
    assert done.returncode == 0, done.stderr
    assert_close(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize(("first", "how", "says"), [
    (False, "raise RuntimeError('planted')", "RuntimeError: planted"),
    (False, "raise MemoryError('planted')", "MemoryError: planted"),
    (True, "raise OSError('planted')", "OSError: planted"),
    (False, "import os; os.kill(os.getpid(), 9)", "Signal 9 (SIGKILL)"),  # torchrun says it
])  # fmt: skip
def test_where_one_process_fails_all_end_with_its_message(dense, text, tmp_path, first, how, says):
    done = torchrun(2, dense("llama"), text, tmp_path / "out", SHARED, planted=FAIL.format(first=first, how=how))
    assert done.returncode != 0
    assert says in done.stderr
    assert "closed by peer" not in done.stderr
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.slow
def test_what_all_notice_is_said_once(dense, text, tmp_path):
    wild = SHARED.model_copy(update={"prune": None, "distill": Distillation(tokens=960, batch=2, weight_lr=1e38)})
    done = torchrun(2, dense("llama"), text, tmp_path / "out", wild)
    assert done.returncode != 0
    assert done.stderr.count("training has diverged") == 1
    done = torchrun(2, dense("llama"), text, tmp_path / "no", SHARED, "--no-such-option")
    assert done.stderr.count("No such option") == 1
    assert torchrun(2, dense("llama"), text, tmp_path / "no", SHARED, "--help").returncode == 0


def test_what_cannot_be_shared(monkeypatch):
    monkeypatch.setattr(parallel, "processes", lambda: 3)
    with pytest.raises(InputError, match="prune: 3 processes cannot share its batch of 4 windows a step evenly"):
        parallel.check_shares(SHARED)
    with pytest.raises(InputError, match="3 processes have no stage of the recipe to share"):
        parallel.check_shares(NAMED["blockwise"])
    parallel.check_shares(Recipe(oqp=EndToEnd(tokens=10, batch=6)))


def test_each_process_takes_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(parallel, "processes", lambda: 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert parallel.own_device("cpu").type == "cpu"
    with pytest.raises(InputError, match="torchrun started 2 processes for 1 GPUs; give --nproc-per-node 1 or less"):
        parallel.own_device("cuda")
    with pytest.raises(InputError, match="--device cuda:1: under torchrun give cpu, or cuda"):
        parallel.own_device("cuda:1")
