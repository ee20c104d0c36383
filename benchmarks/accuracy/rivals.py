"""Other formats through our own training, so that a comparison with them is one of formats and not of training."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from benchmarks.accuracy.peers import Peer
from vllm_gqsa.format import GroupSparseMatrix
from vllm_gqsa.offline.block import CompressedBlock
from vllm_gqsa.offline.e2e import EndToEndJob, train_end_to_end
from vllm_gqsa.offline.families import family_of
from vllm_gqsa.offline.quantizer import TrainedLinear
from vllm_gqsa.offline.recipe import Recipe
from vllm_gqsa.offline.source import DenseModel

__all__ = ["GroupQuantizedLinear", "train_rival"]


class GroupQuantizedLinear(nn.Module):
    """A linear whose groups of a row have a scale and a zero point each, in training; zeros may stay zero.

    Attributes:
        weight: float32 ``[out_features, in_features]``, before rounding.
        log_scale: float32 ``[out_features, groups]``, natural logarithm.
        zero: float32 ``[out_features, groups]``, zero point as a share of its range, before rounding.
        bias: as in the dense linear, or None.
    """

    keep: torch.Tensor | None

    def __init__(self, weight: torch.Tensor, bias: nn.Parameter | None, peer: Peer) -> None:
        """Begin at a weight that another method has compressed, on a grid from the least to the greatest of a group.

        Where a group does not use its lowest or highest code that grid is finer than its own, and some weights begin
        between two codes. Weights at the middle of their codes were trained less well, see docs/accuracy.md.

        Args:
            weight: ``[out_features, in_features]``; the group size divides ``in_features``.
            bias: of the dense linear.
            peer: the format: bits, group size, and whether some of each four weights stay 0.
        """
        super().__init__()
        self._top = 2**peer.bits - 1
        self._groups = (weight.shape[0], weight.shape[1] // peer.group_size, peer.group_size)
        weight = weight.float()
        groups = weight.view(self._groups)
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scale = ((high - low) / self._top).clamp(min=1e-8)
        self.weight = nn.Parameter(weight.clone())
        self.log_scale = nn.Parameter(scale.log())
        self.zero = nn.Parameter((-low / scale).round() / self._top)
        self.register_buffer("keep", weight != 0 if peer.kept < 4 else None, persistent=False)
        self.bias = bias

    def kinds(self) -> dict[str, nn.Parameter]:
        """Parameters by the setting that holds their learning rate."""
        return {"weight_lr": self.weight, "scale_lr": self.log_scale, "zero_lr": self.zero}

    def dense(self) -> torch.Tensor:
        """The weight ``[out_features, in_features]`` as the format holds it; gradients pass through the roundings."""
        scale = self.log_scale.exp()[..., None]
        zero = _round(self.zero * self._top).clamp(0, self._top)[..., None]
        codes = (_round(self.weight.view(self._groups) / scale) + zero).clamp(0, self._top)
        weight = ((codes - zero) * scale).view_as(self.weight)
        return weight if self.keep is None else weight * self.keep

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """``[..., in_features]`` to ``[..., out_features]``."""
        return nn.functional.linear(inputs, self.dense(), self.bias)

    @torch.no_grad()
    def matrix(self) -> torch.Tensor:
        """What the format holds, dense."""
        return self.dense().cpu()


def _round(values: torch.Tensor) -> torch.Tensor:
    return values + (values.round() - values).detach()


@dataclass(frozen=True)
class _RivalJob(EndToEndJob):
    """Training that begins at another method's weights."""

    begin: DenseModel
    peer: Peer

    def linear(self, name: str, dense: Any, _matrix: GroupSparseMatrix | None) -> TrainedLinear:  # noqa: ANN401
        weight = self.begin.tensor(f"{name}.weight").to(self.device)
        return cast("TrainedLinear", GroupQuantizedLinear(weight, dense.bias, self.peer))


def train_rival(
    peer: Peer,
    folders: tuple[Path, Path, Path],
    recipe: Recipe,
    windows: torch.Tensor,
    device: str,
    progress: Callable[[int, int], None],
) -> None:
    """Distil the dense model into another format, and write what comes out as a dense folder.

    Args:
        peer: the format.
        folders: the dense model; the weights to begin with, as the peer left them; and the one to write, beside which
            the state of a training that is cut short is kept.
        recipe: with the stage ``distill``.
        windows: tokens ``[windows, context]``.
        device: torch device.
        progress: called with steps done and steps in all.
    """
    model, begin, output = folders
    assert recipe.distill is not None
    dense = DenseModel(str(model))
    family = family_of(dense.config)
    count = dense.config.num_hidden_layers
    linears = [[n for group in family.linear_names(i, recipe.ignore) for n in group] for i in range(count)]
    job = _RivalJob(
        name="distill", settings=recipe.distill, recipe=recipe, model=dense, family=family, linears=linears,
        blocks=[CompressedBlock() for _ in linears], windows=windows, first=0, batch=8, device=torch.device(device),
        state=output.with_suffix(".state"), progress=progress,
        begin=DenseModel(str(begin)), peer=peer,
    )  # fmt: skip
    blocks, _ = train_end_to_end(job)
    _write(begin, output, blocks)
    job.state.unlink()


def _write(begin: Path, output: Path, blocks: list[CompressedBlock]) -> None:
    """The folder ``begin`` with other weights in the blocks."""
    output.mkdir(parents=True, exist_ok=True)
    changed = {name: tensor for block in blocks for name, tensor in block.tensors.items()}
    for block in blocks:
        changed |= {f"{name}.weight": cast("Any", matrix) for name, matrix in block.matrices.items()}
    for path in sorted(begin.iterdir()):
        if path.suffix == ".safetensors":
            tensors = {name: changed.get(name, tensor).contiguous() for name, tensor in load_file(path).items()}
            save_file(tensors, output / path.name, metadata={"format": "pt"})
        elif path.is_file():
            (output / path.name).write_bytes(path.read_bytes())
