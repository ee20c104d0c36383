"""The files of a checkpoint: one shard a block, one for a compressed head, one for all else, index, tokenizer."""

import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from vllm_gqsa.format import HEAD, TENSORS, CheckpointReader, GqsaConfig, GroupSparseMatrix, ModuleEntry
from vllm_gqsa.offline.block import CompressedBlock
from vllm_gqsa.offline.families import Family
from vllm_gqsa.offline.files import write_json, write_tensors
from vllm_gqsa.offline.recipe import Recipe
from vllm_gqsa.offline.source import DenseModel
from vllm_gqsa.offline.stream import meta_model

__all__ = ["CompressedSource", "read_block", "shard_paths", "write_block", "write_head", "write_rest"]


def shard_paths(output: Path, blocks: int, *, head: bool) -> list[Path]:
    """The files of the checkpoint: one a block, one for the head where it is compressed, one for everything else."""
    count = blocks + head + 1
    return [output / f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def write_block(shard: Path, model: DenseModel, names: Iterable[str], state: CompressedBlock) -> None:
    """Write the shard of one block: compressed linears, and everything else of the block in its stored dtype.

    Args:
        shard: the file.
        model: the dense model.
        names: full names of the block's dense tensors.
        state: what has been made of it.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name in names:
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and module in state.matrices:
            tensors.update({f"{module}.{suffix}": t for suffix, t in state.matrices[module].tensors().items()})
        else:
            value = model.tensor(name)
            tensors[name] = state.tensors.get(name, value).to(value.dtype)
    write_tensors(shard, tensors)


def read_block(
    shard: Path, shapes: Mapping[str, tuple[int, int]], group_size_of: Callable[[str], int]
) -> CompressedBlock:
    """Read the shard of one block.

    Args:
        shard: the file.
        shapes: ``(out_features, in_features)`` of compressed linears by full name, those of other blocks too.
        group_size_of: G of a compressed linear, by its full name.

    Raises:
        FormatError: a linear breaks the format.
    """
    tensors = load_file(shard)
    state = CompressedBlock()
    for name in [n.removesuffix(".qweight") for n in tensors if n.endswith(".qweight")]:
        parts = {suffix: tensors.pop(f"{name}.{suffix}") for suffix in TENSORS}
        state.matrices[name] = GroupSparseMatrix.from_tensors(parts, shapes[name][1], group_size_of(name))
        state.matrices[name].validate(f"{shard}: {name}", shapes[name])
    state.tensors = tensors
    return state


def write_head(shard: Path, name: str, matrix: GroupSparseMatrix) -> None:
    """Write the shard of a compressed head; ``name`` is its own, or that of the embedding that it is tied to."""
    write_tensors(shard, {f"{name}.{suffix}": tensor for suffix, tensor in matrix.tensors().items()})


def write_rest(
    shards: list[Path], recipe: Recipe, model: DenseModel, family: Family, shapes: dict[str, tuple[int, int]]
) -> GqsaConfig:
    """Write all but the blocks' shards and config.json, and return the configuration that goes into the latter.

    Args:
        shards: the files of the checkpoint, all but the last written.
        recipe: the settings.
        model: the dense model.
        family: its description.
        shapes: the compressed linears.
    """
    output = shards[0].parent
    compressed = {f"{name}.weight" for name in shapes}
    if family.embedding in shapes:
        compressed.add(f"{HEAD}.weight")  # tied, and yet some files hold a copy
    names = (n for n in meta_model(model.config).state_dict() if not n.startswith(family.blocks + "."))
    outside = [name for name in names if name in model and name not in compressed]
    write_tensors(shards[-1], {name: model.tensor(name) for name in outside})
    weight_map: dict[str, str] = {}
    kept: dict[str, int] = {}
    for shard in shards:
        with safe_open(shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                weight_map[name] = shard.name
                module, _, suffix = name.rpartition(".")
                if suffix == "scale_zero":
                    (kept[module],) = file.get_slice(name).get_shape()
    index = {
        "metadata": {"total_size": sum(map(_data_bytes, shards))},
        "weight_map": dict(sorted(weight_map.items())),
    }
    write_json(output / "model.safetensors.index.json", index)
    model.tokenizer().save_pretrained(output)
    generation = model.folder / "generation_config.json"
    if generation.exists():
        (output / generation.name).write_bytes(generation.read_bytes())
    return GqsaConfig(
        group_size=recipe.group_size,
        sparsity=recipe.sparsity,
        pattern=recipe.pattern,
        ignore=(*recipe.left_dense, *family.always_dense),
        modules={name: _entry(kept[name], recipe.group_size_of(name), recipe) for name in shapes},
    )


def _entry(nnz: int, group_size: int, recipe: Recipe) -> ModuleEntry:
    return ModuleEntry(nnz=nnz) if group_size == recipe.group_size else ModuleEntry(nnz=nnz, group_size=group_size)


def _data_bytes(shard: Path) -> int:
    """Bytes of a safetensors file behind its header, whose length its first eight bytes say."""
    with shard.open("rb") as file:
        (header,) = struct.unpack("<Q", file.read(8))
    return shard.stat().st_size - 8 - int(header)


class CompressedSource:
    """A checkpoint as a source of dense tensors: ``P.weight`` of a compressed linear is expanded when asked for."""

    def __init__(self, folder: Path, shapes: dict[str, tuple[int, int]], config: GqsaConfig | None = None) -> None:
        self._reader = CheckpointReader(folder, config)
        self._shapes = shapes

    def __contains__(self, name: str) -> bool:
        return name.removesuffix(".weight") in self._shapes or name in self._reader.files

    def tensor(self, name: str) -> torch.Tensor:
        """A dense tensor, float32 where it was compressed."""
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and module in self._shapes:
            return self._reader.matrix(module, self._shapes[module]).to_dense()
        return self._reader.files.tensor(name)
