"""A table of what a checkpoint holds."""

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from vllm_gqsa.format import CheckpointReader, FormatError, check_layer_count
from vllm_gqsa.offline.errors import InputError
from vllm_gqsa.offline.source import load_config
from vllm_gqsa.offline.stream import meta_model

__all__ = ["Inspection", "ModuleFacts", "inspect_checkpoint", "module_shapes", "plot"]


@dataclass(frozen=True)
class ModuleFacts:
    """One compressed linear.

    Attributes:
        name: unfused Hugging Face name.
        out_features: rows N.
        in_features: columns K.
        group_size: G.
        nnz: kept groups.
        sparsity: share of pruned groups.
        bits_per_weight: of this linear.
        bytes: of its four tensors.
        row_nnz_min: kept groups of the emptiest row.
        row_nnz_max: kept groups of the fullest row.
    """

    name: str
    out_features: int
    in_features: int
    group_size: int
    nnz: int
    sparsity: float
    bits_per_weight: float
    bytes: int
    row_nnz_min: int
    row_nnz_max: int


@dataclass(frozen=True)
class Inspection:
    """A checkpoint: its compressed linears, and totals.

    Attributes:
        modules: one entry a compressed linear.
        group_size: G of all linears that have none of their own.
        group_sizes: of all linears, each once.
        pattern: scope the mask was chosen in.
        compressed_weights: weights of the dense twin in the compressed linears.
        sparsity: share of pruned weights over all.
        bits_per_weight: over all compressed linears.
        compressed_bytes: of their tensors.
        bytes: of all safetensors files.
    """

    modules: list[ModuleFacts]
    group_size: int
    group_sizes: list[int]
    pattern: str
    compressed_weights: int
    sparsity: float
    bits_per_weight: float
    compressed_bytes: int
    bytes: int

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary."""
        return asdict(self)


def module_shapes(reader: CheckpointReader) -> dict[str, tuple[int, int]]:
    """Shapes ``(out_features, in_features)`` that the model of config.json asks for, by compressed linear.

    An embedding that is tied to the head counts as that: vocabulary x hidden size.

    Raises:
        FormatError: config.json lists a module that the model does not have, or that is neither of these.
    """
    config = load_config(reader.folder)
    check_layer_count(config, len(reader.files.file_of), reader.folder)
    skeleton = dict(meta_model(config).named_modules())
    shapes = {}
    for name in reader.config.modules:
        module = skeleton.get(name)
        if not isinstance(module, (torch.nn.Linear, torch.nn.Embedding)):
            raise FormatError(
                f"{reader.folder}/config.json: modules lists {name}, which is no linear or embedding of this model"
            )
        rows, columns = module.weight.shape
        shapes[name] = (rows, columns)
    return shapes


def inspect_checkpoint(folder: Path) -> Inspection:
    """Read and validate every compressed linear of a checkpoint.

    Raises:
        FormatError: the checkpoint breaks the format.
    """
    reader = CheckpointReader(folder)
    modules = []
    for name, shape in module_shapes(reader).items():
        matrix = reader.matrix(name, shape)
        rows = matrix.crow_indices.diff()
        modules.append(
            ModuleFacts(
                name,
                *shape,
                matrix.group_size,
                matrix.nnz,
                matrix.sparsity,
                matrix.bits_per_weight,
                matrix.nbytes,
                int(rows.min()) if rows.numel() else 0,
                int(rows.max()) if rows.numel() else 0,
            )
        )
    weights = sum(m.out_features * m.in_features for m in modules)
    size = sum(m.bytes for m in modules)
    return Inspection(
        modules=modules,
        group_size=reader.config.group_size,
        group_sizes=reader.config.group_sizes,
        pattern=reader.config.pattern,
        compressed_weights=weights,
        sparsity=1 - sum(m.nnz * m.group_size for m in modules) / max(1, weights),
        bits_per_weight=8 * size / max(1, weights),
        compressed_bytes=size,
        bytes=sum(path.stat().st_size for path in set(reader.files.file_of.values())),
    )


def plot(inspection: Inspection, path: Path) -> None:
    """Draw sparsity and bits a weight of every block's compressed linears, one line a kind, over the blocks."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - only for --plot

    kinds: dict[str, list[ModuleFacts]] = {}
    for module in inspection.modules:
        if re.search(r"\.\d+\.", module.name):  # the head stands in no block
            kinds.setdefault(module.name.rpartition(".")[2], []).append(module)
    figure = Figure(figsize=(9, 6), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    for kind, members in kinds.items():
        top.plot([100 * m.sparsity for m in members], marker=".", label=kind)
        bottom.plot([m.bits_per_weight for m in members], marker=".", label=kind)
    top.set_ylabel("pruned groups, %")
    bottom.set_ylabel("bits a weight")
    bottom.set_xlabel("block")
    top.legend(ncols=4, fontsize="small")
    figure.suptitle(
        f"{inspection.bits_per_weight:.2f} bits a weight, {100 * inspection.sparsity:.1f} % of groups of "
        f"{'/'.join(map(str, inspection.group_sizes))} pruned"
    )
    try:
        figure.savefig(path, dpi=120, format="png")
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error}") from error
