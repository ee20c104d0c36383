"""Whole folders: what is missing, truncated or lying is refused; a thousand mutations give no wrong weight."""

import json
import random
import shutil
import struct

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file as numpy_load
from safetensors.torch import load_file, save_file

from vllm_gqsa.format import CheckpointReader, FormatError, GqsaConfig, GroupSparseMatrix, ModuleEntry

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


@pytest.mark.parametrize("file", ["../one.safetensors", "/etc/passwd", "one.bin", 3])
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


# -- mutations ---------------------------------------------------------------------------------------------


def literal(folder):
    """Decode the compressed tensors as the format's documentation says, in numpy, trusting nothing of ours."""
    tensors = {}
    for file in set(SHARD.values()):
        tensors.update(numpy_load(folder / file))
    decoded = {}
    for name, (rows, columns) in SHAPES.items():
        if f"{name}.qweight" not in tensors:
            continue
        mask = np.unpackbits(tensors[f"{name}.group_mask"], axis=1, bitorder="little")[:, : columns // 16].astype(bool)
        packed = tensors[f"{name}.qweight"]
        codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), 16)
        words = tensors[f"{name}.scale_zero"].view(np.uint16)
        scales = ((words & 0xFFF0) >> 1).view(np.float16).astype(np.float32)
        dense = np.zeros((rows, columns // 16, 16), np.float32)
        dense[mask] = scales[:, None] * (codes.astype(np.float32) - (words & 15)[:, None])
        decoded[name] = dense.reshape(rows, columns)
    return decoded


def mutate_bytes(rng, folder):
    path = folder / rng.choice(["one.safetensors", "two.safetensors", "config.json", "model.safetensors.index.json"])
    data = bytearray(path.read_bytes())
    kind = rng.randrange(5)
    at = rng.randrange(len(data))
    if kind == 0:
        data[at] ^= 1 << rng.randrange(8)
    elif kind == 1:
        data[at : at + rng.randrange(1, 9)] = rng.randbytes(rng.randrange(9))
    elif kind == 2:
        del data[at:]
    elif kind == 3:
        data[at:at] = rng.randbytes(rng.randrange(1, 20))
    else:  # the length of the header, or whatever starts the file
        data[:8] = struct.pack("<Q", rng.choice([0, 1, len(data), 2**40, 2**63, rng.getrandbits(64)]))
    path.write_bytes(bytes(data))


def mutate_header(rng, folder):
    """Change one number or name in a safetensors header, its length kept right."""
    path = folder / rng.choice(["one.safetensors", "two.safetensors"])
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    name = rng.choice([n for n in header if n != "__metadata__"])
    entry = header[name]
    kind = rng.randrange(4)
    if kind == 0:
        entry["dtype"] = rng.choice(["U8", "I8", "I16", "F16", "BF16", "I32", "F64", "BOOL"])
    elif kind == 1:
        entry["shape"] = [rng.choice([0, 1, d, d + 1, 2 * d, 2**62]) for d in entry["shape"]]
    elif kind == 2:
        entry["data_offsets"][rng.randrange(2)] += rng.choice([-8, -1, 1, 8, 2**40])
    else:
        header[rng.choice([name + "x", "c.up_proj.weight", "../" + name])] = header.pop(name)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def mutate_tensor(rng, folder):
    """Change one tensor's values, swap two tensors, or drop one: files stay well formed."""

    def change(tensors):
        name = rng.choice(list(tensors))
        kind = rng.randrange(3)
        if kind == 0 and tensors[name].numel():
            flat = tensors[name].view(-1)
            flat[rng.randrange(flat.numel())] = rng.choice(
                [0, 1, -1, 127, -(2**15) if flat.dtype == torch.int16 else 3]
            )
        elif kind == 1:
            other = rng.choice(list(tensors))
            tensors[name], tensors[other] = tensors[other].clone(), tensors[name].clone()
        else:
            del tensors[name]

    edit_shard(folder, rng.choice(["one.safetensors", "two.safetensors"]), change)


def mutate_config(rng, folder):
    raw = json.loads((folder / "config.json").read_text())["quantization_config"]
    key = rng.choice(list(raw))
    values = [
        None,
        0,
        -1,
        8,
        16,
        1e308,
        "x",
        [],
        {},
        [1],
        {"a": {}},
        {"a.q_proj": {"nnz": 3}},
        "2:4",
        2**70,
        True,
    ]
    edit_config(folder, **{rng.choice([key, key, key + "_"]): rng.choice(values)})


def test_a_thousand_mutations_load_exactly_or_say_why(checkpoint, tmp_path):
    rng = random.Random(0)
    loaded = refused = 0
    for case in range(1000):
        folder = tmp_path / "mutated"
        shutil.copytree(checkpoint, folder)
        rng.choice([mutate_bytes, mutate_header, mutate_tensor, mutate_config])(rng, folder)
        try:
            weights = read(folder)
        except FormatError as error:
            says = str(error)
        else:
            says = ""
        if says:
            assert len(says) > 20, case
            assert "\n" not in says, case
            refused += 1
        else:
            expected = literal(folder)
            for name, weight in weights.items():
                assert np.array_equal(weight.numpy(), expected[name]), (case, name)
            loaded += 1
        shutil.rmtree(folder)
    assert loaded > 50, "hardly any mutation is harmless: the test tests nothing"
    assert refused > 500
