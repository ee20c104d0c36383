"""Real vLLM engines on the CPU with tiny models: what they generate, and how they refuse bad checkpoints."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("vllm", reason="needs vLLM")

from tests.helpers import (
    FAMILIES,
    compress_randomly,
    edit_quantization,
    edit_tensors,
    make_dense,
)

PROMPTS = [[5, 17, 33], [9], [100, 101, 102, 103, 104, 105, 106], [200, 3, 77, 12]]
OTHERS = {"down_proj": 32}
"""Group sizes of their own."""
ENGINE = Path(__file__).with_name("engine.py")
ENVIRONMENT = {
    **os.environ,
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


def engines(folder, jobs, *, own_process=False, timeout=600, **environment):
    """Run jobs one after another in one process; see engine.py. What it prints is in the file ``log``."""
    folder.mkdir(exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    env = {**ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "1" if own_process else "0", **environment}
    done = subprocess.run(
        [sys.executable, ENGINE, folder / "jobs.json", folder / "results.json"],
        env=env,
        timeout=timeout,
        capture_output=True,
        text=True,
        check=False,
    )
    (folder / "log").write_text(done.stdout + done.stderr)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    return compress_randomly(make_dense(folder / "dense"), folder, others=OTHERS)


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    return with_head(tmp_path_factory.mktemp("tied"), "llama", tied=True)


def with_head(folder, family, tied):
    """A model whose head is compressed: 300 tokens, which vLLM pads to 320; twelve groups of 16 a row."""
    changes = {"tie_word_embeddings": tied, "vocab_size": 300, "hidden_size": 192, "num_attention_heads": 6}
    return compress_randomly(make_dense(folder / "dense", family, **changes), folder, head=True)


@pytest.fixture(scope="module")
def served(llama, tied, tmp_path_factory):
    """Tokens of the compressed model and its twin, of dummy weights, and of a reload to B and back to A.

    Both come after reloads that failed. Then of the twin of a model with one matrix for embedding and head, and of
    that model compressed.
    """
    folder = tmp_path_factory.mktemp("served")
    other = compress_randomly(llama.checkpoint.parent / "dense", folder / "other", others=OTHERS, scale=1.5)
    broken = [shutil.copytree(other.checkpoint, folder / spoil.__name__) for spoil in (missing_module, wrong_dtype)]
    missing_module(broken[0])
    wrong_dtype(broken[1])
    pickled = shutil.copytree(llama.twin, folder / "pickled")
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    jobs = [
        {"model": str(llama.twin), "prompts": PROMPTS},
        {"model": str(other.twin), "prompts": PROMPTS},
        {
            "model": str(llama.checkpoint),
            "prompts": PROMPTS,
            "reload": [str(each) for each in (*broken, other.checkpoint, *broken, llama.checkpoint, pickled)],
            "options": {"quantization": "gqsa"},
        },
        {"model": str(llama.checkpoint), "prompts": PROMPTS, "options": {"load_format": "dummy"}},
        *({"model": str(each), "prompts": PROMPTS} for each in (tied.twin, tied.checkpoint)),
    ]
    return engines(folder, jobs)


def test_tokens_equal_the_twin(served):
    twin, _, compressed = served[:3]
    assert compressed["tokens"] == twin["tokens"]
    assert len({tuple(tokens) for tokens in twin["tokens"]}) == len(PROMPTS)


def test_reload_to_other_weights_and_back(served):
    twin, other, compressed = served[:3]
    assert [compressed["after"][at] for at in (2, 5)] == [other["tokens"], twin["tokens"]]
    assert other["tokens"] != twin["tokens"]


def test_reloads_that_fail_end_in_one_sentence(served):
    for at in (0, 3):
        assert f"{UP}.* missing from the checkpoint" in served[2]["after"][at]
        assert f"{UP}: qweight is torch.int32" in served[2]["after"][at + 1]


def test_a_reload_reads_no_pickle(served):
    assert "Cannot find any model weights" in served[2]["after"][6]


def test_dummy_weights_run(served):
    assert all(len(tokens) == 12 for tokens in served[3]["tokens"])


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    folder = tmp_path_factory.mktemp("families")
    jobs = []
    for family in FAMILIES[1:]:
        made = compress_randomly(make_dense(folder / family / "dense", family), folder / family)
        jobs += [{"model": str(each), "prompts": PROMPTS} for each in (made.twin, made.checkpoint)]
    results = engines(folder, jobs)
    return {family: results[2 * at : 2 * at + 2] for at, family in enumerate(FAMILIES[1:])}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES[1:])
def test_every_family_equals_its_twin(families, family):
    twin, compressed = families[family]
    assert "tokens" in compressed, compressed
    assert compressed["tokens"] == twin["tokens"]


@pytest.mark.slow
def test_two_ranks_equal_one(served, llama, tmp_path):
    # Two KV heads on two ranks, and every row-parallel layer cut in two.
    jobs = [{"model": str(llama.checkpoint), "prompts": PROMPTS, "options": {"tensor_parallel_size": 2}}]
    (result,) = engines(tmp_path / "two", jobs, own_process=True, VLLM_LOGGING_LEVEL="INFO")
    assert result.get("tokens") == served[0]["tokens"], result
    said = [line for line in (tmp_path / "two" / "log").read_text().splitlines() if "GQSA: " in line]
    assert len(said) == 2, "a line of each rank"
    assert all("14 modules in 8 layers" in line and "this rank keeps" in line for line in said)


# -- a compressed output head ----------------------------------------------------------------------------------


def head_jobs(folder, family, tied, **options):
    """The twin, and the checkpoint with a reload to other weights and back; and the twin of the other weights."""
    made = with_head(folder, family, tied)
    other = compress_randomly(folder / "dense", folder / "other", head=True, scale=1.5)
    reload = [str(other.checkpoint), str(made.checkpoint)]
    return [
        {"model": str(made.twin), "prompts": PROMPTS, "options": options},
        {"model": str(other.twin), "prompts": PROMPTS, "options": options},
        {"model": str(made.checkpoint), "prompts": PROMPTS, "reload": reload, "options": options},
    ]


def assert_equal(results):
    twin, other, compressed = results
    assert compressed.get("tokens") == twin.get("tokens") != other.get("tokens"), results
    assert compressed["after"] == [other["tokens"], twin["tokens"]]


def test_one_compressed_matrix_for_embedding_and_head(served):
    twin, compressed = served[4:]
    assert compressed.get("tokens") == twin["tokens"], compressed
    assert len({tuple(tokens) for tokens in twin["tokens"]}) == len(PROMPTS)


@pytest.mark.slow
def test_every_family_with_a_compressed_head(tmp_path):
    cases = [(family, tied) for family in FAMILIES[:4] for tied in (False, True)]
    jobs = [head_jobs(tmp_path / f"{family}-{tied}", family, tied) for family, tied in cases]
    dummy = {**jobs[-1][-1], "reload": [], "options": {"load_format": "dummy"}}
    *results, last = engines(tmp_path / "run", [job for each in jobs for job in each] + [dummy], timeout=900)
    for at in range(len(cases)):
        assert_equal(results[3 * at : 3 * at + 3])
    assert all(len(tokens) == 12 for tokens in last["tokens"])


@pytest.mark.slow
def test_compressed_head_in_a_compiled_model(tmp_path):
    assert_equal(engines(tmp_path / "run", head_jobs(tmp_path, "llama", tied=True, enforce_eager=False), timeout=600))


@pytest.mark.slow
@pytest.mark.parametrize("is_tied", [True, False])
def test_compressed_head_on_two_ranks(served, tied, tmp_path, is_tied):
    made, twin = tied, served[4]
    if not is_tied:
        made = with_head(tmp_path, "llama", tied=False)
        (twin,) = engines(tmp_path / "one", [{"model": str(made.twin), "prompts": PROMPTS}])
    jobs = [{"model": str(made.checkpoint), "prompts": PROMPTS, "options": {"tensor_parallel_size": 2}}]
    (result,) = engines(tmp_path / "two", jobs, own_process=True)
    assert result.get("tokens") == twin["tokens"], result


# -- bad checkpoints -------------------------------------------------------------------------------------------

UP = "model.layers.1.mlp.up_proj"
PIECES = ("crow_indices", "group_mask", "qweight", "scale_zero")


def missing_tensor(folder):
    edit_tensors(folder, remove=(f"{UP}.scale_zero",))


def missing_module(folder):
    edit_tensors(folder, remove=tuple(f"{UP}.{piece}" for piece in PIECES))


def missing_norm(folder):
    edit_tensors(folder, remove=("model.layers.1.input_layernorm.weight",))


def truncated(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5000])


def wrong_dtype(folder):
    wide = load_file(folder / "model.safetensors")[f"{UP}.qweight"].int()
    edit_tensors(folder, **{f"{UP}.qweight": wide})


def lying_nnz(folder):
    modules = json.loads((folder / "config.json").read_text())["quantization_config"]["modules"]
    modules[UP]["nnz"] -= 1
    edit_quantization(folder, modules=modules)


def unknown_version(folder):
    edit_quantization(folder, format_version=2)


def half_ignored(folder):
    modules = json.loads((folder / "config.json").read_text())["quantization_config"]["modules"]
    del modules[UP]
    edit_quantization(folder, modules=modules, ignore=["lm_head", UP])
    edit_tensors(folder, remove=tuple(f"{UP}.{p}" for p in PIECES), **{f"{UP}.weight": torch.zeros(256, 128)})


BAD = {
    missing_tensor: f"{UP}.scale_zero is missing, though config.json lists {UP}",
    missing_module: f"{UP}.crow_indices is missing, though config.json lists {UP}",
    missing_norm: "tensor model.layers.1.input_layernorm.weight, which the model needs, is missing",
    truncated: "model.safetensors: is not a complete safetensors file",
    wrong_dtype: f"{UP}: qweight is torch.int32, expected torch.uint8",
    lying_nnz: f"{UP}: holds nnz = ",
    unknown_version: "config.json: format_version 2 is unknown",
    half_ignored: f"model.layers.1.mlp.gate_up_proj: model.layers.1.mlp.gate_proj compressed but {UP} ignored",
}


@pytest.fixture(scope="module")
def refusals(llama, tied, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    jobs = []
    for spoil in BAD:
        copy = shutil.copytree(llama.checkpoint, folder / spoil.__name__)
        spoil(copy)
        jobs.append({"model": str(copy), "prompts": PROMPTS})
    jobs.append({"model": str(llama.twin), "prompts": PROMPTS, "options": {"quantization": "gqsa"}})
    jobs.append({"model": str(tied.checkpoint), "prompts": PROMPTS, "options": {"enable_lora": True}})
    dense = make_dense(folder / "opt" / "dense", "opt", tie_word_embeddings=False)
    opt = compress_randomly(dense, folder / "opt", head=True)
    jobs.append({"model": str(opt.checkpoint), "prompts": PROMPTS})
    names = [*(spoil.__name__ for spoil in BAD), "plain", "lora", "opt"]
    return dict(zip(names, engines(folder, jobs), strict=True))


@pytest.mark.parametrize("spoil", BAD, ids=lambda spoil: spoil.__name__)
def test_bad_checkpoints_end_in_one_sentence(refusals, spoil):
    assert BAD[spoil] in refusals[spoil.__name__].get("error", "no error")


def test_plain_model_ends_in_one_sentence(refusals, llama):
    expected = f"{llama.twin} is not a GQSA checkpoint (its config.json has no quantization_config): compress it with"
    assert expected in refusals["plain"].get("error", "no error")


def test_lora_on_a_compressed_head_ends_in_one_sentence(refusals):
    expected = "model.embed_tokens: is compressed, and vLLM's LoRA layers need its dense weight; name other modules"
    assert expected in refusals["lora"].get("error", "no error")


def test_a_head_that_vllm_cannot_serve_compressed_ends_in_one_sentence(refusals):
    expected = "lm_head: is compressed, but vLLM's class for this model passes no quant_config to it"
    assert expected in refusals["opt"].get("error", "no error")


@pytest.mark.parametrize("case", [pytest.param("group size under two ranks", marks=pytest.mark.slow), "missing tensor"])
def test_server_exits_with_an_error(case, llama, tmp_path):
    options = []
    if case == "missing tensor":
        folder = shutil.copytree(llama.checkpoint, tmp_path / "copy")
        missing_tensor(folder)
        sentence = BAD[missing_tensor]
    else:
        folder = compress_randomly(llama.checkpoint.parent / "dense", tmp_path, group_size=128).checkpoint
        options = ["--tensor-parallel-size", "2"]
        sentence = "o_proj: in_features K = 128 split over 2 tensor-parallel ranks gives 64 a rank"
    server = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--port", "0"]
    done = subprocess.run(
        [*server, "--skip-tokenizer-init", "--dtype", "float32", "--enforce-eager", "--max-model-len", "64", *options],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode != 0
    assert sentence in done.stdout + done.stderr
