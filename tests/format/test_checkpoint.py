"""Whole folders: what is missing, truncated or lying is refused. Random mutations are in tests/fuzz."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers import random_matrix, sparse_model
from vllm_gqsa.format import (
    CheckpointReader,
    FormatError,
    GqsaConfig,
    GroupSparseMatrix,
    ModuleEntry,
    TensorFiles,
    check_layer_count,
    is_ignored,
)

SHAPES = {"a.q_proj": (12, 64), "b.down_proj": (7, 144), "c.up_proj": (3, 16)}
SHARD = {"a.q_proj": "one.safetensors", "b.down_proj": "one.safetensors", "c.up_proj": "two.safetensors"}


def write(folder):
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    files, modules = {}, {}
    for name, (rows, columns) in SHAPES.items():
        keep = torch.rand(rows, columns // 16, generator=generator) < 0.6
        matrix = GroupSparseMatrix.from_dense(torch.randn(rows, columns, generator=generator), keep)
        modules[name] = ModuleEntry(nnz=matrix.nnz)
        files.setdefault(SHARD[name], {}).update({f"{name}.{k}": t for k, t in matrix.tensors().items()})
    files["two.safetensors"]["norm.weight"] = torch.ones(16)
    weight_map = {name: file for file, tensors in files.items() for name in tensors}
    for file, tensors in files.items():
        save_file(tensors, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = GqsaConfig(group_size=16, sparsity=0.4, pattern="matrix", modules=modules)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": config.to_json()}))
    return folder


@pytest.fixture
def checkpoint(tmp_path):
    return write(tmp_path / "checkpoint")


def read(folder):
    reader = CheckpointReader(folder)
    unknown = set(reader.config.modules) - set(SHAPES)
    if unknown:  # what a reader that knows the model says, see module_shapes()
        raise FormatError(f"{folder}/config.json: modules lists {unknown}, which the model has not")
    return {name: reader.matrix(name, SHAPES[name]).to_dense() for name in reader.config.modules}


def named(module, matrix):
    return {f"{module}.{piece}": tensor for piece, tensor in matrix.tensors().items()}


def edit_config(folder, **changes):
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    raw["quantization_config"].update(changes)
    path.write_text(json.dumps(raw))


def edit_shard(folder, file, change):
    """Rewrite a shard after ``change(tensors)``, and the index with it."""
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file)
    index = folder / "model.safetensors.index.json"
    weight_map = {n: f for n, f in json.loads(index.read_text())["weight_map"].items() if f != file}
    index.write_text(json.dumps({"weight_map": {**weight_map, **dict.fromkeys(tensors, file)}}))


def test_a_good_checkpoint_reads(checkpoint):
    assert {name: t.shape for name, t in read(checkpoint).items()} == SHAPES


def test_a_missing_tensor(checkpoint):
    edit_shard(checkpoint, "one.safetensors", lambda t: t.pop("a.q_proj.group_mask"))
    with pytest.raises(FormatError, match="a.q_proj.group_mask is missing, though config.json lists a.q_proj"):
        read(checkpoint)


def test_a_tensor_the_index_lists_in_vain(checkpoint):
    tensors = load_file(checkpoint / "one.safetensors")
    del tensors["a.q_proj.qweight"]
    save_file(tensors, checkpoint / "one.safetensors")
    with pytest.raises(FormatError, match=r"lists a.q_proj.qweight in one.safetensors, which does not hold it"):
        read(checkpoint)


def test_a_missing_shard(checkpoint):
    (checkpoint / "two.safetensors").unlink()
    with pytest.raises(FormatError, match=r"two.safetensors: no such file"):
        read(checkpoint)


@pytest.mark.parametrize("keep", [0, 5, 100, 900, -1])
def test_a_truncated_shard(checkpoint, keep):
    path = checkpoint / "one.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(FormatError, match=r"one.safetensors: is not a complete safetensors file"):
        read(checkpoint)


def test_a_wrong_dtype(checkpoint):
    edit_shard(
        checkpoint,
        "one.safetensors",
        lambda t: t.update({"a.q_proj.scale_zero": t["a.q_proj.scale_zero"].half()}),
    )
    with pytest.raises(
        FormatError, match=r"one.safetensors: a.q_proj: scale_zero is torch.float16, expected torch.int16"
    ):
        read(checkpoint)


def test_a_lying_nnz(checkpoint):
    listed = json.loads((checkpoint / "config.json").read_text())["quantization_config"]["modules"]
    edit_config(checkpoint, modules={**listed, "c.up_proj": {"nnz": 1000}})
    with pytest.raises(FormatError, match="c.up_proj: holds nnz = .* config.json says 1000"):
        read(checkpoint)


def test_a_module_with_a_group_size_of_its_own(checkpoint):
    matrix = random_matrix(7, 160, group_size=32)
    edit_shard(checkpoint, "one.safetensors", lambda t: t.update(named("b.down_proj", matrix)))
    listed = json.loads((checkpoint / "config.json").read_text())["quantization_config"]["modules"]
    entry = {"nnz": matrix.nnz, "group_size": 32}
    edit_config(checkpoint, modules={**listed, "b.down_proj": entry})
    reader = CheckpointReader(checkpoint)
    assert torch.equal(reader.matrix("b.down_proj", (7, 160)).to_dense(), matrix.to_dense())
    assert reader.matrix("a.q_proj", SHAPES["a.q_proj"]).group_size == 16


@pytest.mark.parametrize(("size", "says"), [
    (8, r"b.down_proj: group_mask has shape \(7, 2\), expected \(7, 3\)"),
    (32, "b.down_proj: group_size 32 does not divide in_features 144"),
    (128, "b.down_proj: group_size 128 does not divide"),
])  # fmt: skip
def test_a_group_size_that_does_not_fit_the_tensors(checkpoint, size, says):
    listed = json.loads((checkpoint / "config.json").read_text())["quantization_config"]["modules"]
    edit_config(checkpoint, modules={**listed, "b.down_proj": {**listed["b.down_proj"], "group_size": size}})
    with pytest.raises(FormatError, match=f"one.safetensors: {says}"):
        read(checkpoint)


def test_codes_of_another_group_size(checkpoint):
    """A bitmap of one byte a row is as long for groups of 8 as for groups of 16."""
    listed = json.loads((checkpoint / "config.json").read_text())["quantization_config"]["modules"]
    edit_config(checkpoint, modules={**listed, "a.q_proj": {**listed["a.q_proj"], "group_size": 8}})
    with pytest.raises(FormatError, match=r"a.q_proj: qweight has shape \(\d+, 8\), expected \(\d+, 4\)"):
        read(checkpoint)


def test_an_unlisted_module(checkpoint):
    edit_config(checkpoint, modules={"a.q_proj": {"nnz": 1}})
    with pytest.raises(FormatError, match="belongs to b.down_proj, which config.json does not list"):
        read(checkpoint)


def test_a_dense_weight_beside_a_compressed_one(checkpoint):
    edit_shard(checkpoint, "two.safetensors", lambda t: t.update({"c.up_proj.weight": torch.zeros(3, 16)}))
    with pytest.raises(FormatError, match="c.up_proj has a dense weight beside"):
        read(checkpoint)


def test_a_plain_model(checkpoint):
    (checkpoint / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(FormatError, match="this is not a GQSA checkpoint"):
        read(checkpoint)


@pytest.mark.parametrize("file", ["../one.safetensors", "/etc/passwd", "one.bin", 3, "\ud800.safetensors"])
def test_an_index_that_leaves_the_folder(checkpoint, file):
    index = checkpoint / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a.q_proj.qweight": file}}))
    with pytest.raises(FormatError, match="is not the name of a safetensors file"):
        read(checkpoint)


@pytest.mark.parametrize("text", ["", "{", "[]", "\0", '{"weight_map": []}', "[" * 100_000])
def test_json_files_that_are_none(checkpoint, text):
    for name in ("config.json", "model.safetensors.index.json"):
        saved = (checkpoint / name).read_text()
        (checkpoint / name).write_text(text)
        with pytest.raises(FormatError, match=name):
            read(checkpoint)
        (checkpoint / name).write_text(saved)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "one.safetensors"])
def test_what_never_ends_is_not_read(checkpoint, name):
    """A pipe nobody writes to, and a device: opening or reading either takes for ever."""
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
        (checkpoint / name).unlink()
        make(checkpoint / name)
        with pytest.raises(FormatError, match=f"{name}: is not an ordinary file"):
            read(checkpoint)


def test_an_ignore_entry_that_takes_exponential_time_elsewhere():
    assert not is_ignored("model.layers.0.mlp.gate_proj", (r"re:(([a-z_.0-9])+)+!",))
    with pytest.raises(ValueError, match="ignore 're:.*' is not a regular expression that RE2 knows: invalid perl"):
        is_ignored("x", ("re:(?!lm_head).*",))


def test_a_module_that_is_listed_and_ignored(checkpoint):
    edit_config(checkpoint, ignore=["lm_head", r"re:.*up_proj"])
    with pytest.raises(FormatError, match="config.json: lists c.up_proj in modules, and ignores it too"):
        read(checkpoint)


@pytest.mark.parametrize(("name", "indexed"), [("extra.safetensors", False), ("consolidated.safetensors", True)])
def test_weights_that_vllm_would_read_beside_ours(checkpoint, name, indexed):
    if not indexed:
        tensors = {n: t for file in ("one", "two") for n, t in load_file(checkpoint / f"{file}.safetensors").items()}
        for path in (*checkpoint.glob("*.safetensors"), checkpoint / "model.safetensors.index.json"):
            path.unlink()
        save_file(tensors, checkpoint / "model.safetensors")
    read(checkpoint)
    shutil.copy(next(checkpoint.glob("*.safetensors")), checkpoint / name)
    with pytest.raises(FormatError, match=f"{name}: is no part of the checkpoint, and vLLM would load it; remove it"):
        read(checkpoint)


def test_a_file_larger_than_the_memory(tmp_path):
    """Its header can be read; its data can be, or one sentence says why not."""
    size = sparse_model(tmp_path)
    files = TensorFiles(tmp_path)
    assert (files.shape("huge.weight"), files.nbytes("huge.weight")) == ((size // 2,), size)
    if Path("/proc/sys/vm/overcommit_memory").read_text().strip() == "1":
        pytest.skip("this system maps files of any size")
    with pytest.raises(FormatError, match=r"model.safetensors: cannot be mapped into memory .* max_shard_size"):
        files.tensor("huge.weight")


def test_more_layers_than_tensors(checkpoint):
    class Config:
        num_hidden_layers = 2**31

    with pytest.raises(FormatError, match="num_hidden_layers is 2147483648, but there are only 13 tensors"):
        check_layer_count(Config(), 13, checkpoint)
