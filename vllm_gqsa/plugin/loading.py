"""From tensors that arrive one by one, in any order, to the matrix of one layer on one rank.

vLLM sizes parameters when it builds a layer and fills them later. Sizes here depend on the data, so a layer starts
with empty placeholders; their loader collects the four tensors of each matrix on disk, slices as soon as they are
complete and lets the full copy go, so that the peak is one matrix.
"""

from collections.abc import Callable, Iterable

import torch

from vllm_gqsa.format import TENSORS, FormatError, GroupSparseMatrix
from vllm_gqsa.plugin.shards import ShardId, ShardPlan, expert_shard

__all__ = ["Placeholder", "Staging", "load_expert_piece", "load_piece"]


class Staging:
    """What has arrived of one layer."""

    def __init__(self, plan: ShardPlan) -> None:
        self.plan = plan
        self.loaded = False
        """Whether the layer has weights, so that what arrives now is a reload."""
        self._raw: dict[tuple[ShardId, ...], dict[str, torch.Tensor]] = {}
        self._parts: dict[ShardId, GroupSparseMatrix] = {}
        self._nnz: dict[tuple[ShardId, ...], int] = {}

    @property
    def empty(self) -> bool:
        """Whether nothing has arrived since the last :meth:`clear`."""
        return not self._raw and not self._parts

    def clear(self) -> None:
        """Forget everything."""
        self._raw.clear()
        self._parts.clear()
        self._nnz.clear()

    def add(self, piece: str, tensor: torch.Tensor, shard_id: ShardId | tuple[ShardId, ...] | None) -> None:
        """Take one tensor of a checkpoint.

        Args:
            piece: which of the four, a key of :data:`vllm_gqsa.format.TENSORS`.
            tensor: its value; kept until its matrix is complete.
            shard_id: the part of a fused layer that it belongs to; None where the layer is not fused, or fused
                on disk too.

        Raises:
            FormatError: the matrix is complete and breaks the format, or has another shape or nnz than expected.
        """
        key = self.plan.key(shard_id)
        pieces = self._raw.setdefault(key, {})
        pieces[piece] = tensor
        if len(pieces) < len(TENSORS):
            return
        del self._raw[key]
        try:
            self._slice(key, pieces)
        except FormatError:
            self.clear()
            raise

    def check_size(self, piece: str, tensor: torch.Tensor, shard_id: ShardId | tuple[ShardId, ...] | None) -> None:
        """Check a tensor's length before it is copied: a file may say any.

        Raises:
            FormatError: it has more or fewer rows or groups than expected.
        """
        plan = self.plan
        key = plan.key(shard_id)
        name, listed = plan.source(key)
        rows = sum(plan.shards[each].rows for each in key)
        if piece in ("qweight", "scale_zero"):
            found = tensor.shape[0] if tensor.dim() else 0
            if listed is not None and found != listed:
                raise FormatError(f"{name}: holds nnz = {found} groups, config.json says {listed}")
            return
        expected = (rows + 1,) if piece == "crow_indices" else (rows, -(-plan.in_features // plan.group_size // 8))
        if tuple(tensor.shape) != expected:
            raise FormatError(f"{name}: {piece} has shape {tuple(tensor.shape)}, expected {expected}")

    def _slice(self, key: tuple[ShardId, ...], pieces: dict[str, torch.Tensor]) -> None:
        plan = self.plan
        name, listed = plan.source(key)
        matrix = GroupSparseMatrix.from_tensors(pieces, plan.in_features, plan.group_size)
        matrix.validate(name, (sum(plan.shards[each].rows for each in key), plan.in_features))
        if listed is not None and matrix.nnz != listed:
            raise FormatError(f"{name}: holds nnz = {matrix.nnz} groups, config.json says {listed}")
        self._nnz[key] = matrix.nnz
        offset = 0
        for each in key:
            shard = plan.shards[each]
            part = matrix.slice_rows(offset + shard.start, offset + shard.stop)
            if plan.columns != plan.in_features:
                part = part.slice_columns(plan.column_start, plan.column_stop)
            self._parts[each] = part.pad_rows(shard.padding)
            offset += shard.rows

    def finish(self) -> GroupSparseMatrix:
        """The layer's matrix on this rank; call :meth:`clear` when it is in use.

        Raises:
            FormatError: a tensor is missing, or the layer holds another nnz in all than config.json lists.
        """
        missing = list(self._missing())
        if missing:
            raise FormatError(
                f"{self.plan.sources.layer}: {', '.join(missing)} missing from the checkpoint, though config.json "
                "lists it; the checkpoint is incomplete"
            )
        listed = sum(self.plan.sources.nnz)
        if sum(self._nnz.values()) != listed:
            raise FormatError(
                f"{self.plan.sources.layer}: holds nnz = {sum(self._nnz.values())} groups, config.json says {listed}"
            )
        return GroupSparseMatrix.concat([self._parts[each] for each in self.plan.shards])

    def _missing(self) -> Iterable[str]:
        begun = {each for key in self._raw for each in key}
        for key, pieces in self._raw.items():
            name, _ = self.plan.source(key)
            yield from (f"{name}.{piece}" for piece in TENSORS if piece not in pieces)
        absent = tuple(each for each in self.plan.shards if each not in self._parts and each not in begun)
        if len(absent) == len(self.plan.shards):
            yield from (f"{name}.*" for name in self.plan.sources.names)
        else:
            yield from (f"{self.plan.source((each,))[0]}.*" for each in absent)


class Placeholder(torch.nn.Parameter):
    """An empty parameter that stands for one of the four tensors until the layer is complete.

    Not ``UninitializedParameter``: vLLM's reload cannot copy one. It holds no reference to its layer, which reload
    would have to take out.

    Attributes:
        piece: which of the four tensors it stands for.
        staging: shared by the four placeholders of a layer.
        weight_loader: what vLLM calls with each tensor of the checkpoint.
    """

    def __new__(cls, piece: str, *_: object, device: str | None = None) -> "Placeholder":
        """An empty tensor of the dtype of ``piece`` on ``device`` or the default device."""
        empty = torch.empty(0, dtype=TENSORS[piece], device=device)
        self: Placeholder = super().__new__(cls, empty, requires_grad=False)
        return self

    def __init__(self, piece: str, staging: Staging, loader: Callable[..., object], device: str | None = None) -> None:
        self.piece = piece
        self.staging = staging
        self.weight_loader = loader

    def numel(self) -> int:
        """On the meta device, how many elements vLLM's reload waits for.

        More than will ever come, so that it processes the layer when the checkpoint ends and not before.
        """
        return 1 << 60 if self.is_meta else super().numel()

    def on_meta(self) -> "Placeholder":
        """The same on the meta device."""
        return Placeholder(self.piece, self.staging, self.weight_loader, device="meta")


def load_piece(
    param: Placeholder,
    loaded_weight: torch.Tensor,
    loaded_shard_id: ShardId | tuple[ShardId, ...] | None = None,
) -> None:
    """VLLM's ``weight_loader`` of a placeholder; the names of the arguments are vLLM's.

    A reload calls it twice with each tensor: with a placeholder on the meta device as the tensor arrives, and with
    one on the real device when the checkpoint has ended; then also with what an earlier reload brought that failed.
    Only the first counts.

    Raises:
        FormatError: see :meth:`Staging.check_size` and :meth:`Staging.add`.
    """
    if param.staging.loaded and not param.is_meta:
        return
    param.staging.check_size(param.piece, loaded_weight, loaded_shard_id)
    # A copy, because loaded_weight may be a view of a file or of a buffer that vLLM uses again; by copy_, because
    # reload notices by it that something was loaded.
    copy = torch.empty_like(loaded_weight, device="cpu", memory_format=torch.contiguous_format)
    copy.copy_(loaded_weight)
    param.staging.add(param.piece, copy, loaded_shard_id)


def load_expert_piece(
    param: Placeholder,
    loaded_weight: torch.Tensor,
    weight_name: str,
    shard_id: str,
    expert_id: int,
    return_success: bool = False,
) -> bool | None:
    """The ``weight_loader`` of a placeholder of routed experts; see :func:`load_piece`.

    Args:
        param: the placeholder.
        loaded_weight: one tensor of one expert's linear.
        weight_name: of no use here.
        shard_id: "w1" (gate), "w2" (down) or "w3" (up).
        expert_id: number of the expert in the model; one of another rank is passed over.
        return_success: whether vLLM wants to know that the expert was this rank's.
    """
    shard = expert_shard(expert_id, shard_id)
    mine = shard in param.staging.plan.shards
    if mine:
        load_piece(param, loaded_weight, shard)
    return mine if return_success else None
