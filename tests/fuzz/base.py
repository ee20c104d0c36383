"""The good checkpoint that is spoilt, and a reader of our own format that shares nothing with the product."""

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np

from tests.fuzz.mutations import INDEX, join, split

NUMPY = {
    "F32": "<f4",
    "F16": "<f2",
    "U8": "u1",
    "I8": "i1",
    "I16": "<i2",
    "I32": "<i4",
    "I64": "<i8",
    "F64": "<f8",
    "BOOL": "?",
}
GROUP = 16


def build(folder: Path) -> tuple[Path, Path, Path]:
    """Write a tiny Llama, compressed, as one file and as two with an index, and one with a compressed tied head."""
    from tests.helpers import compress_randomly, make_dense

    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    sizes |= {"intermediate_size": 96, "vocab_size": 64, "max_position_embeddings": 64}
    single = compress_randomly(make_dense(folder / "dense", **sizes), folder).checkpoint
    tied = make_dense(folder / "tied", **sizes, tie_word_embeddings=True)
    head = compress_randomly(tied, folder / "head", head=True).checkpoint
    sharded = shutil.copytree(single, folder / "sharded")
    path = sharded / "model.safetensors"
    entries, data = split(path)
    entries.pop("__metadata__")
    weight_map = {}
    for number, chosen in enumerate(([n for n in entries if "mlp" in n], [n for n in entries if "mlp" not in n]), 1):
        shard = sharded / f"model-0000{number}-of-00002.safetensors"
        laid_out: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        raw = b""
        for name in chosen:
            part = data[slice(*entries[name]["data_offsets"])]
            laid_out[name] = {**entries[name], "data_offsets": [len(raw), len(raw) + len(part)]}
            raw += part
            weight_map[name] = shard.name
        join(shard, laid_out, raw)
    path.unlink()
    (sharded / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return single, sharded, head


def shapes(folder: Path) -> dict[str, tuple[int, int]]:
    """Shapes of the compressed linears of the unspoilt checkpoint: what a model would ask for."""
    modules = json.loads((folder / "config.json").read_text())["quantization_config"]["modules"]
    stored = stored_tensors(folder)
    size = {"o_proj": 64, "down_proj": 96}
    return {m: (len(stored[f"{m}.crow_indices"]) - 1, size.get(m.rpartition(".")[2], 64)) for m in modules}


def stored_tensors(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a folder, read by their header alone."""
    index = folder / INDEX
    files = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
    found = {}
    for file in files:
        with (folder / file).open("rb") as handle:
            (size,) = struct.unpack("<Q", handle.read(8))
            entries = json.loads(handle.read(size))
            data = handle.read()
        for name, entry in entries.items():
            if name != "__metadata__":
                raw = data[slice(*entry["data_offsets"])]
                kind = NUMPY.get(entry["dtype"])
                found[name] = np.frombuffer(raw, kind or "u1").reshape(entry["shape"] if kind else -1)
    return found


def expanded(stored: dict[str, np.ndarray], module: str, shape: tuple[int, int]) -> np.ndarray:
    """One compressed linear as the format's documentation says, float32."""
    rows, columns = shape
    mask = np.unpackbits(stored[f"{module}.group_mask"], axis=1, bitorder="little")[:, : columns // GROUP].astype(bool)
    packed = stored[f"{module}.qweight"]
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), GROUP)
    words = stored[f"{module}.scale_zero"].view(np.uint16)
    scales = ((words & 0xFFF0) >> 1).view(np.float16).astype(np.float32)
    dense = np.zeros((rows, columns // GROUP, GROUP), np.float32)
    dense[mask] = scales[:, None] * (codes.astype(np.float32) - (words & 15)[:, None].astype(np.float32))
    return dense.reshape(rows, columns)
