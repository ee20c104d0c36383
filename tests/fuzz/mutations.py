"""What is done to a good checkpoint: each function changes a folder by a random generator and says what it did."""

import json
import math
import os
import pickle
import random
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

INDEX = "model.safetensors.index.json"
CANARY = "canary"
"""Appears beside the folder if anything from a checkpoint was executed."""
SPARSE_BYTES = 3 << 30
HOSTILE_NAMES = (
    "", ".", "..", "../model.safetensors", "/etc/passwd", "/dev/zero", "a/b.safetensors", "model.safetensors\0",
    "model.bin", INDEX, "config.json", "x" * 5000 + ".safetensors", "\ud800.safetensors", "~/x.safetensors",
    "con.safetensors",
)  # fmt: skip
HOSTILE_VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 1, 3, 8, 2**31, 2**62, 2**70, 0.5, -0.0, 1e308, math.nan, math.inf, "", "x", "2:4", "0:0", "\0",
    [], {}, [1], ["re:("], ["re:.*"], ["lm_head", "re:(([a-z_.0-9])+)+!"], {"a": {}}, {"": {"nnz": 1}}, [[[[]]]],
)  # fmt: skip


def shards(folder: Path) -> list[Path]:
    """The safetensors files of an unspoilt folder."""
    return sorted(folder.glob("model*.safetensors"))


def split(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def join(path: Path, header: Any, data: bytes) -> None:
    """Write a safetensors file with any header, its length kept right."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode("utf-8", "surrogatepass")
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a JSON object in a file."""
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def flip(rng: random.Random, folder: Path) -> str:
    """Bits, bytes, lengths: what a bad disk, a bad copy or a bad line does."""
    path = rng.choice([*shards(folder), *shards(folder), *folder.glob("*.json")])
    data = bytearray(path.read_bytes())
    at = rng.randrange(len(data)) if rng.random() < 0.5 else rng.randrange(min(len(data), 600))
    kind = rng.randrange(6)
    if kind == 0:
        data[at] ^= 1 << rng.randrange(8)
    elif kind == 1:
        data[at : at + rng.randrange(1, 9)] = rng.randbytes(rng.randrange(9))
    elif kind == 2:
        del data[at:]
    elif kind == 3:
        data[at:at] = rng.randbytes(rng.randrange(1, 20))
    elif kind == 4:
        data[:8] = struct.pack("<Q", rng.choice([0, 1, len(data), 2**40, 2**63, rng.getrandbits(64)]))
    else:
        data[at : at + 512] = bytes(512)
    path.write_bytes(bytes(data))
    return f"{path.name}: kind {kind} at {at}"


def header(rng: random.Random, folder: Path) -> str:
    """One entry of a safetensors header, or its whole text."""
    path = rng.choice(shards(folder))
    entries, data = split(path)
    name = rng.choice([n for n in entries if n != "__metadata__"])
    entry = entries[name]
    kind = rng.choice(["dtype", "shape", "offsets", "name", "metadata", "text", "alias", "value"])
    what: Any = None
    if kind == "dtype":
        what = entry["dtype"] = rng.choice(
            ["U8", "I8", "I16", "F16", "BF16", "I32", "I64", "F64", "BOOL", "F8_E4M3", "F4", "Q4", "", 3, None]
        )
    elif kind == "shape":
        what = rng.choice([[0, 1, 2, -1, 2**31, 2**62, 2**64, 1.5, "2", None]])
        entry["shape"] = [rng.choice([d, d, d + 1, 2 * d, d // 2, *what]) for d in entry["shape"]] * rng.randint(0, 2)
    elif kind == "offsets":
        what = rng.choice([-8, -1, 1, 8, 2**40, 2**63, -(2**40)])
        entry["data_offsets"][rng.randrange(2)] += what
    elif kind == "name":
        what = rng.choice(
            [name + "x", "model.norm.weight.weight", "../" + name, "", "\0", "n" * 100_000, "__metadata__"]
        )
        entries[what] = entries.pop(name)
    elif kind == "metadata":
        what = rng.choice(HOSTILE_VALUES)
        entries["__metadata__"] = what
    elif kind == "text":
        text = json.dumps(entries).encode()
        what = rng.choice(["deep", "twice", "spaces", "utf8", "list", "long"])
        raw = {
            "deep": b'{"a":' * 50_000, "twice": text[:-1] + b"," + text[1:], "spaces": text + b" " * 4096,
            "utf8": text.replace(b"model", b"mod\xff\xfe"), "list": b"[" + text + b"]", "long": b" " * (1 << 20) + text,
        }[what]  # fmt: skip
        join(path, raw, data)
        return f"{path.name}: header text {what}"
    elif kind == "alias":  # two tensors share bytes
        what = rng.choice([n for n in entries if n != "__metadata__"])
        entry["data_offsets"] = entries[what]["data_offsets"]
    else:
        what = rng.choice(HOSTILE_VALUES)
        entries[name] = what
    join(path, entries, data)
    return f"{path.name}: header {name} {kind} {str(what)[:60]}"


def values(rng: random.Random, folder: Path) -> str:
    """Values of one compressed tensor; files and headers stay well formed."""
    path = rng.choice(shards(folder))
    entries, data = split(path)
    suffix, words = rng.choice(
        [
            ("crow_indices", [0, 1, -1, 7, 2**31 - 1, -(2**31), 100]),
            ("group_mask", [0, 1, 0x80, 0xFF, 0xF0]),
            ("scale_zero", [0, 15, 0x7C00 << 1, 0xFFFF, 0xFC0F, 0xF810, 16, 0x8000]),  # NaN, infinite, zero, odd ones
            ("qweight", [0, 0xFF, 0x5A]),
        ]
    )
    names = [name for name in entries if name.endswith("." + suffix)]
    if not names:
        return "nothing"
    name = rng.choice(names)
    begin, end = entries[name]["data_offsets"]
    size = {"crow_indices": 4, "scale_zero": 2}.get(suffix, 1)
    raw = bytearray(data)
    word = rng.choice(words)
    for _ in range(rng.choice([1, 1, 1, 5, (end - begin) // size])):
        at = begin + size * rng.randrange(max(1, (end - begin) // size))
        raw[at : at + size] = (word & (256**size - 1)).to_bytes(size, "little")
    join(path, entries, bytes(raw))
    return f"{path.name}: {name} = {word}"


def tensors(rng: random.Random, folder: Path) -> str:
    """Tensors swapped, dropped, added or reshaped: files and headers stay well formed, the index is kept in step."""
    path = rng.choice(shards(folder))
    entries, data = split(path)
    entries.pop("__metadata__", None)
    parts = {n: (e["dtype"], e["shape"], data[slice(*e["data_offsets"])]) for n, e in entries.items()}
    name, other = rng.choice(list(parts)), rng.choice(list(parts))
    stem = name.rpartition(".")[0]
    kind = rng.choice(
        ["swap", "swap values", "drop", "drop module", "dense beside", "stranger", "flat", "empty", "halve"]
    )
    dtype, shape, raw = parts[name]
    if kind == "swap":
        parts[name], parts[other] = parts[other], parts[name]
    elif kind == "swap values" and len(raw) == len(parts[other][2]):
        parts[name], parts[other] = (dtype, shape, parts[other][2]), (*parts[other][:2], raw)
    elif kind == "drop":
        del parts[name]
    elif kind == "drop module":
        parts = {n: part for n, part in parts.items() if not n.startswith(stem)}
    elif kind == "dense beside":
        parts[f"{stem}.weight"] = ("F32", [2, 2], bytes(16))
    elif kind == "stranger":
        parts[rng.choice(["x.qweight", "x", "model.layers.9.mlp.up_proj.weight"])] = ("U8", [4], bytes(4))
    elif kind == "flat":
        parts[name] = (dtype, [math.prod(shape)], raw)
    elif kind == "empty":
        parts[name] = (dtype, [0, *shape[1:]], b"")
    elif kind == "halve" and shape and shape[0] % 2 == 0:
        parts[name] = (dtype, [shape[0] // 2, *shape[1:]], raw[: len(raw) // 2])
    laid_out: dict[str, Any] = {}
    offset = 0
    for each, (kind_of, size, part) in parts.items():
        laid_out[each] = {"dtype": kind_of, "shape": size, "data_offsets": [offset, offset + len(part)]}
        offset += len(part)
    join(path, laid_out, b"".join(part for *_, part in parts.values()))
    index = folder / INDEX
    if index.exists() and rng.random() < 0.9:
        kept = {n: f for n, f in json.loads(index.read_text())["weight_map"].items() if f != path.name}
        weight_map = {**kept, **dict.fromkeys(parts, path.name)}
        index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return f"{path.name}: {kind} {name}, {other}"


def quantization(rng: random.Random, folder: Path) -> str:
    """Keys of ``quantization_config``."""
    said = ""

    def change(config: dict[str, Any]) -> None:
        nonlocal said
        raw = config["quantization_config"]
        key = rng.choice([*raw, "modules", "modules", "modules"])
        value = rng.choice(HOSTILE_VALUES)
        if key == "modules" and rng.random() < 0.8:
            name = rng.choice(list(raw["modules"]))
            kind = rng.choice(["nnz", "group_size", "drop", "rename", "ignore"])
            if kind == "nnz":
                raw["modules"][name] = {"nnz": rng.choice([value, raw["modules"][name]["nnz"] + 1, 2**40])}
            elif kind == "group_size":
                raw["modules"][name]["group_size"] = rng.choice([value, 8, 16, 32, 128])
            elif kind == "drop":
                del raw["modules"][name]
            elif kind == "rename":
                raw["modules"][rng.choice([name + "x", "model", "", "model.norm", "lm_head"])] = raw["modules"].pop(
                    name
                )
            else:
                raw["ignore"] = [*raw["ignore"], rng.choice([name, "re:" + re.escape(name), "re:.*"])]
            said = f"modules {name} {kind}"
        elif rng.random() < 0.1:
            config["quantization_config"] = value
            said = "all of it"
        else:
            raw[rng.choice([key, key, key, key + "_"])] = value
            said = f"{key} = {value!r}"

    edit(folder / "config.json", change)
    return said


def model_config(rng: random.Random, folder: Path) -> str:
    """Keys of config.json that say what the model is."""
    said = ""

    def change(config: dict[str, Any]) -> None:
        nonlocal said
        key = rng.choice([k for k in config if k != "quantization_config"])
        old = config[key]
        choices: list[Any] = list(HOSTILE_VALUES)
        if isinstance(old, int):
            choices += [old + 1, 2 * old, old // 2, old - 1] * 4
        config[key] = rng.choice(choices)
        said = f"{key} = {config[key]!r}"
        if rng.random() < 0.1:
            del config[key]
            said = f"{key} dropped"

    edit(folder / "config.json", change)
    return said


def index(rng: random.Random, folder: Path) -> str:
    """The index: names that leave the folder, cycles, what it forgets, what it invents."""
    path = folder / INDEX
    if not path.exists():
        entries, _ = split(folder / "model.safetensors")
        names = [name for name in entries if name != "__metadata__"]
        path.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, "model.safetensors")}))
    weight_map = json.loads(path.read_text())["weight_map"]
    name = rng.choice(list(weight_map))
    kind = rng.choice(["file", "file", "file", "drop", "add", "cross", "value", "all", "text", "all to one"])
    what: Any = None
    if kind in ("file", "all to one"):
        what = rng.choice([*HOSTILE_NAMES, *HOSTILE_VALUES])
        weight_map = dict.fromkeys(weight_map, what) if kind == "all to one" else {**weight_map, name: what}
    elif kind == "drop":
        del weight_map[name]
    elif kind == "add":
        weight_map["no.such.tensor"] = weight_map[name]
    elif kind == "cross":
        weight_map[name] = rng.choice(sorted(set(weight_map.values())))
    elif kind == "value":
        weight_map = rng.choice(HOSTILE_VALUES)
    text = json.dumps(rng.choice(HOSTILE_VALUES) if kind == "all" else {"metadata": {}, "weight_map": weight_map})
    if kind == "text":
        what = rng.choice(
            ["", "\0", "{" * 1000, "[" * 100_000, text + text, text[: len(text) // 2], '{"a":' + "9" * 9999]
        )
        text = what
    path.write_text(text)
    return f"{kind} {name} {str(what)[:60]!r}"


class _Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.canary),)


def _sparse(rng: random.Random, path: Path) -> None:
    """Make one tensor three gigabytes long, all zeros, which take no room on the disk."""
    entries, _ = split(path)
    name = rng.choice([n for n in entries if n.endswith((".qweight", ".group_mask"))])
    columns = entries[name]["shape"][1]
    shape = [SPARSE_BYTES // columns, columns]
    laid_out = {name: {"dtype": "U8", "shape": shape, "data_offsets": [0, SPARSE_BYTES]}}
    offset = SPARSE_BYTES
    for each, entry in entries.items():
        if each not in (name, "__metadata__"):
            begin, end = entry["data_offsets"]
            laid_out[each] = {**entry, "data_offsets": [offset, offset + end - begin]}
            offset += end - begin
    join(path, laid_out, b"")
    os.truncate(path, path.stat().st_size + offset)


def _code(rng: random.Random, folder: Path) -> None:
    """Bring Python along, and a config.json that asks for it."""
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(folder.parent / CANARY)!r})\nclass Evil: pass\n")
    shutil.copy(folder / "evil.py", folder / "__init__.py")
    auto = dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer"), "evil.Evil")
    kinds: list[dict[str, Any]] = [{}, {"model_type": "evil"}, {"model_type": "evil", "architectures": ["Evil"]}]
    changes = {"auto_map": auto} | rng.choice(kinds)
    edit(folder / "config.json", lambda config: config.update(changes))


def _stranger(rng: random.Random, folder: Path) -> None:
    """A file with the same names and other values."""
    entries, data = split(shards(folder)[0])
    flipped = (np.frombuffer(data, np.uint8) ^ 1).tobytes()
    join(folder / rng.choice(["zzz.safetensors", "aaa.safetensors"]), entries, flipped)


def _pickle(rng: random.Random, folder: Path) -> None:
    """Nothing but pickles."""
    for each in (*shards(folder), folder / INDEX):
        each.unlink(missing_ok=True)
    (folder / rng.choice(["pytorch_model.bin", "model.pt"])).write_bytes(pickle.dumps(_Bomb(folder.parent / CANARY)))


def _pickle_beside(_rng: random.Random, folder: Path) -> None:
    for each in ("pytorch_model.bin", "model.pt", "training_args.bin"):
        (folder / each).write_bytes(pickle.dumps(_Bomb(folder.parent / CANARY)))


def _consolidated(_rng: random.Random, folder: Path) -> None:
    shutil.copy(shards(folder)[0], folder / "consolidated.safetensors")


def files(rng: random.Random, folder: Path) -> str:
    """Other things where files should be, and files that should not be there."""
    strange: list[Callable[[Path], object]] = [
        Path.mkdir,
        lambda path: path.symlink_to(path.name),
        lambda path: path.symlink_to("nowhere"),
        lambda path: path.write_bytes(b""),
        lambda path: None,
    ]
    endless: list[Callable[[Path], object]] = [os.mkfifo, lambda path: path.symlink_to("/dev/zero")]
    added = [_code, _stranger, _pickle, _pickle_beside, _consolidated]
    kind = rng.randrange(14)
    if kind == 0:
        path = rng.choice(shards(folder))
        _sparse(rng, path)
        return f"{path.name}: sparse"
    if kind < 6:
        added[kind - 1](rng, folder)
        return added[kind - 1].__name__
    # A config.json that never ends hangs transformers and vLLM before anything here is asked.
    places = shards(folder) if kind < 8 else [*shards(folder), folder / "config.json", folder / INDEX]
    path = rng.choice(places)
    path.unlink(missing_ok=True)
    chosen = kind - 6 if kind < 8 else rng.randrange(len(strange))
    (endless if kind < 8 else strange)[chosen](path)
    return f"{path.name}: {'endless' if kind < 8 else 'strange'} {chosen}"


MUTATIONS: tuple[Callable[[random.Random, Path], str], ...] = (
    flip, header, values, tensors, quantization, model_config, index, files,
)  # fmt: skip


def mutate(rng: random.Random, folder: Path) -> str:
    """One mutation, now and then two; returns what was done."""
    said = []
    chosen = rng.choices(MUTATIONS, k=1 if rng.random() < 0.85 else 2)
    # What files() leaves, a device or a pipe, no other mutation can read.
    for function in sorted(dict.fromkeys(chosen), key=lambda each: each is files):
        try:
            said.append(f"{function.__name__}: {function(rng, folder)}")
        except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, struct.error, RecursionError):
            # The second mutation need not understand what the first left.
            if not said:
                raise
            said.append(f"{function.__name__}: impossible")
    return "; ".join(said)
