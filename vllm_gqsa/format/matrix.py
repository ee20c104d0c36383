"""One type for a group-sparse INT4 matrix: made, sliced, joined, checked and expanded here and nowhere else."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from vllm_gqsa.format.codecs import (
    decode_scale_zero,
    encode_scale_zero,
    pack_bitmap,
    pack_nibbles,
    round_scale,
    unpack_bitmap,
    unpack_nibbles,
)
from vllm_gqsa.format.errors import FormatError

__all__ = ["GROUP_SIZES", "TENSORS", "GroupSparseMatrix", "check_group_size", "choose_grid", "quantize_groups"]

GROUP_SIZES = (8, 16, 32, 64, 128)
TENSORS: dict[str, torch.dtype] = {
    "crow_indices": torch.int32,
    "group_mask": torch.uint8,
    "qweight": torch.uint8,
    "scale_zero": torch.int16,
}
"""The tensors of one compressed linear and their dtypes, by the suffix of their name in a checkpoint."""

_CHUNK = 1 << 20
"""Weights handled at a time where a whole matrix would leave the cache."""


def choose_grid(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point of groups, asymmetric, the range always including 0.

    Args:
        groups: float32 ``[nnz, G]``, finite.

    Returns:
        Scales float32 ``[nnz]`` on the format's grid, and zero points 0..15, float32 ``[nnz]``.
    """
    columns = groups.T.contiguous()  # on a CPU, reducing the first dimension is three times as fast
    low = columns.amin(0).clamp_(max=0)
    high = columns.amax(0).clamp_(min=0)
    scales = round_scale(high.sub_(low).div_(15))
    return scales, low.neg_().div_(scales).round_().clamp_(0, 15)


def quantize_groups(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Round groups to INT4 on the grid of :func:`choose_grid`, to nearest.

    Args:
        groups: float32 ``[nnz, G]``, finite.

    Returns:
        Codes uint8 ``[nnz, G]``, scales float32 ``[nnz]`` on the format's grid, zero points uint8 ``[nnz]``;
        ``groups`` is about ``scales * (codes - zeros)``.
    """
    scales, zeros = choose_grid(groups)
    codes = (groups / scales[:, None]).round_().add_(zeros[:, None]).clamp_(0, 15)
    return codes.to(torch.uint8), scales, zeros.to(torch.uint8)


@dataclass(frozen=True, eq=False)
class GroupSparseMatrix:
    """A weight ``[out_features, in_features]`` as block-sparse rows of 1 x G INT4 groups (format version 1).

    With N = out_features, K = in_features, G = group_size, S = K / G:

    Attributes:
        crow_indices: int32 ``[N + 1]``, row pointers into the kept groups.
        group_mask: uint8 ``[N, ceil(S / 8)]``, bit j of row r is 1 where group j is kept.
        qweight: uint8 ``[nnz, G / 2]``, 4-bit codes of the kept groups, row-major.
        scale_zero: int16 ``[nnz]``, scale (12 bits) and zero point (4 bits).
        in_features: K.
        group_size: G, one of :data:`GROUP_SIZES`.
    """

    crow_indices: torch.Tensor
    group_mask: torch.Tensor
    qweight: torch.Tensor
    scale_zero: torch.Tensor
    in_features: int
    group_size: int

    # -- facts ---------------------------------------------------------------------------------------------

    @property
    def out_features(self) -> int:
        """Number of rows N."""
        return self.crow_indices.numel() - 1

    @property
    def groups_per_row(self) -> int:
        """Number of groups S in a row, kept or not."""
        return self.in_features // self.group_size

    @property
    def nnz(self) -> int:
        """Number of kept groups."""
        return self.qweight.shape[0]

    @property
    def sparsity(self) -> float:
        """Share of pruned groups, 0..1."""
        return 1 - self.nnz / max(1, self.out_features * self.groups_per_row)

    @property
    def nbytes(self) -> int:
        """Bytes of the four tensors."""
        return sum(t.nbytes for t in self.tensors().values())

    @property
    def bits_per_weight(self) -> float:
        """Bits stored for each weight of the dense matrix, everything counted."""
        return 8 * self.nbytes / max(1, self.out_features * self.in_features)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The four tensors under the names of :data:`TENSORS`."""
        return {name: getattr(self, name) for name in TENSORS}

    def keep(self) -> torch.Tensor:
        """The mask, bool ``[N, S]``, true where a group is kept."""
        return unpack_bitmap(self.group_mask)[:, : self.groups_per_row]

    # -- making --------------------------------------------------------------------------------------------

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, torch.Tensor], in_features: int, group_size: int
    ) -> "GroupSparseMatrix":
        """Wrap the four tensors of a checkpoint as they are; call :meth:`validate` on what is not trusted."""
        return cls(**{name: tensors[name] for name in TENSORS}, in_features=in_features, group_size=group_size)

    @classmethod
    def from_codes(
        cls, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, keep: torch.Tensor
    ) -> "GroupSparseMatrix":
        """Pack groups that are quantised already.

        Args:
            codes: uint8 ``[nnz, G]``, 0..15, the kept groups in row-major order.
            scales: floating point ``[nnz]``, on the grid of :func:`round_scale`.
            zeros: ``[nnz]``, integers 0..15.
            keep: bool ``[N, S]`` with nnz true entries.

        Raises:
            ValueError: counts disagree, or a scale or zero point cannot be stored.
        """
        rows, groups = keep.shape
        if int(keep.sum()) != codes.shape[0]:
            raise ValueError(f"keep has {int(keep.sum())} groups, codes have {codes.shape[0]}")
        crow_indices = torch.zeros(rows + 1, dtype=torch.int32, device=keep.device)
        crow_indices[1:] = keep.sum(1).cumsum(0)
        return cls(
            crow_indices=crow_indices,
            group_mask=pack_bitmap(keep),
            qweight=pack_nibbles(codes),
            scale_zero=encode_scale_zero(scales, zeros),
            in_features=groups * codes.shape[1],
            group_size=codes.shape[1],
        )

    @classmethod
    def from_dense(cls, weight: torch.Tensor, keep: torch.Tensor, group_size: int = 16) -> "GroupSparseMatrix":
        """Prune and quantise a dense weight by rounding to nearest (see :func:`quantize_groups`).

        Args:
            weight: floating point ``[N, K]``, finite where kept.
            keep: bool ``[N, K / G]``, true where a group stays.
            group_size: G.

        Raises:
            ValueError: G is not supported or does not divide K, shapes disagree, or a kept weight is not finite.
        """
        rows, columns = weight.shape
        check_group_size(group_size, columns, "weight")
        if keep.shape != (rows, columns // group_size):
            raise ValueError(f"keep is {tuple(keep.shape)}, expected {(rows, columns // group_size)}")
        blocks = weight.reshape(rows, columns // group_size, group_size)
        step = max(1, _CHUNK // max(1, columns))
        parts = []
        for r in range(0, rows, step):
            groups = blocks[r : r + step][keep[r : r + step]].float()
            if not torch.isfinite(groups).all():
                raise ValueError("a kept weight is infinite or NaN")
            parts.append(quantize_groups(groups))
        if not parts:
            parts = [quantize_groups(weight.new_empty(0, group_size).float())]
        codes, scales, zeros = (torch.cat(column) for column in zip(*parts, strict=True))
        return cls.from_codes(codes, scales, zeros, keep)

    @classmethod
    def synthesize(
        cls,
        out_features: int,
        in_features: int,
        group_size: int = 16,
        sparsity: float = 0.5,
        generator: torch.Generator | None = None,
    ) -> "GroupSparseMatrix":
        """A valid random matrix: every row keeps the same number of groups at random places.

        Values are small (standard deviation about 0.02), so that a model made of such matrices stays finite.
        """
        check_group_size(group_size, in_features, "synthesize")
        groups = in_features // group_size
        kept = round(groups * (1 - sparsity))
        order = torch.rand(out_features, groups, generator=generator).argsort(1)
        keep = order < kept
        nnz = out_features * kept
        codes = torch.randint(0, 16, (nnz, group_size), dtype=torch.uint8, generator=generator)
        scales = round_scale(torch.rand(nnz, generator=generator) * 0.004 + 0.002)
        return cls.from_codes(codes, scales, torch.full((nnz,), 8, dtype=torch.uint8), keep)

    # -- using ---------------------------------------------------------------------------------------------

    def dequantize_groups(self) -> torch.Tensor:
        """The kept groups, float32 ``[nnz, G]``, exact: a product of 8 and 4 significant bits."""
        scales, zeros = decode_scale_zero(self.scale_zero)
        codes = unpack_nibbles(self.qweight).float()
        return codes.sub_(zeros.float()[:, None]).mul_(scales.float()[:, None])

    def to_dense(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The dense weight ``[N, K]``, computed in float32 (exact) and rounded once to ``dtype``."""
        if self.nnz == 0:
            return torch.zeros(self.out_features, self.in_features, dtype=dtype, device=self.qweight.device)
        keep = self.keep().flatten()
        # Every place takes the last kept group so far, and pruned ones are blanked. Not dense[keep] = ..., which
        # waits for the device to count the mask, nor masked_scatter_, which is six times slower on a CPU.
        source = keep.cumsum(0).sub_(1).clamp_(min=0)
        dense = self.dequantize_groups().to(dtype).index_select(0, source)
        return dense.masked_fill_(~keep[:, None], 0).view(self.out_features, self.in_features)

    def to(self, device: torch.device | str) -> "GroupSparseMatrix":
        """The same matrix on ``device``."""
        moved = {name: t.to(device) for name, t in self.tensors().items()}
        return self.from_tensors(moved, self.in_features, self.group_size)

    def slice_rows(self, start: int, stop: int) -> "GroupSparseMatrix":
        """Rows ``start:stop`` as a copy that does not hold the whole matrix in memory."""
        if not 0 <= start <= stop <= self.out_features:
            raise ValueError(f"rows {start}:{stop} are outside 0:{self.out_features}")
        pointers = self.crow_indices[start : stop + 1]
        first, last = int(pointers[0]), int(pointers[-1])
        return GroupSparseMatrix(
            crow_indices=pointers - first,
            group_mask=self.group_mask[start:stop].clone(),
            qweight=self.qweight[first:last].clone(),
            scale_zero=self.scale_zero[first:last].clone(),
            in_features=self.in_features,
            group_size=self.group_size,
        )

    def slice_columns(self, start: int, stop: int) -> "GroupSparseMatrix":
        """Input features ``start:stop`` as a copy; both must be multiples of G.

        Raises:
            ValueError: out of range, or not a multiple of the group size.
        """
        size = self.group_size
        if not 0 <= start <= stop <= self.in_features:
            raise ValueError(f"columns {start}:{stop} are outside 0:{self.in_features}")
        if start % size or stop % size:
            raise ValueError(f"columns {start}:{stop} do not fall on groups of {size}")
        keep = self.keep()
        inside = torch.zeros_like(keep)
        inside[:, start // size : stop // size] = True
        chosen = inside[keep]
        kept = keep[:, start // size : stop // size]
        crow_indices = torch.zeros_like(self.crow_indices)
        crow_indices[1:] = kept.sum(1).cumsum(0)
        return GroupSparseMatrix(
            crow_indices=crow_indices,
            group_mask=pack_bitmap(kept),
            qweight=self.qweight[chosen],
            scale_zero=self.scale_zero[chosen],
            in_features=stop - start,
            group_size=size,
        )

    def pad_rows(self, count: int) -> "GroupSparseMatrix":
        """The same matrix with ``count`` empty rows behind; without any it is the matrix itself."""
        if not count:
            return self
        return replace(
            self,
            crow_indices=torch.cat([self.crow_indices, self.crow_indices[-1:].expand(count)]),
            group_mask=torch.cat([self.group_mask, self.group_mask.new_zeros(count, self.group_mask.shape[1])]),
        )

    @staticmethod
    def concat(parts: Sequence["GroupSparseMatrix"]) -> "GroupSparseMatrix":
        """Stack matrices of equal in_features and group size on top of each other (fused layers)."""
        if not parts:
            raise ValueError("nothing to concatenate")
        if len({(p.in_features, p.group_size) for p in parts}) != 1:
            raise ValueError("parts differ in in_features or group_size")
        return GroupSparseMatrix(
            crow_indices=torch.cat(list(_shifted_pointers(parts))),
            group_mask=torch.cat([p.group_mask for p in parts]),
            qweight=torch.cat([p.qweight for p in parts]),
            scale_zero=torch.cat([p.scale_zero for p in parts]),
            in_features=parts[0].in_features,
            group_size=parts[0].group_size,
        )

    # -- checking ------------------------------------------------------------------------------------------

    def validate(self, where: str = "matrix", expect: tuple[int, int] | None = None) -> None:
        """Check everything the format promises.

        Args:
            where: file and module, put in front of the message.
            expect: shape ``(out_features, in_features)`` the model asks for.

        Raises:
            FormatError: naming ``where``, the tensor and the value at fault.
        """
        _check_shapes(self, where, expect)
        _check_pointers_and_mask(self, where)
        scales, _ = decode_scale_zero(self.scale_zero)
        bad = ~((scales > 0) & torch.isfinite(scales))
        if bad.any():
            at = int(bad.nonzero()[0])
            raise FormatError(
                f"{where}: scale_zero[{at}] holds the scale {scales[at].item()}; scales are positive and finite"
            )


def check_group_size(group_size: int, in_features: int, where: str) -> None:
    """Raise ValueError unless the group size is supported and divides in_features."""
    if group_size not in GROUP_SIZES:
        raise FormatError(f"{where}: group_size {group_size} is not one of {', '.join(map(str, GROUP_SIZES))}")
    if in_features % group_size:
        raise FormatError(f"{where}: group_size {group_size} does not divide in_features {in_features}")


def _shifted_pointers(parts: Sequence[GroupSparseMatrix]) -> Iterator[torch.Tensor]:
    yield parts[0].crow_indices[:1]
    offset = 0
    for part in parts:
        yield part.crow_indices[1:] + offset
        offset += part.nnz


def _check_shapes(m: GroupSparseMatrix, where: str, expect: tuple[int, int] | None) -> None:
    check_group_size(m.group_size, m.in_features, where)
    for name, dtype in TENSORS.items():
        if getattr(m, name).dtype != dtype:
            raise FormatError(f"{where}: {name} is {getattr(m, name).dtype}, expected {dtype}")
    if m.crow_indices.dim() != 1 or m.crow_indices.numel() < 1:
        raise FormatError(f"{where}: crow_indices has shape {tuple(m.crow_indices.shape)}, expected [out_features + 1]")
    if m.qweight.dim() != 2:
        raise FormatError(f"{where}: qweight has shape {tuple(m.qweight.shape)}, expected [nnz, group_size / 2]")
    rows = m.out_features if expect is None else expect[0]
    shapes = {
        "crow_indices": (rows + 1,),
        "group_mask": (rows, -(-m.groups_per_row // 8)),
        "qweight": (m.nnz, m.group_size // 2),
        "scale_zero": (m.nnz,),
    }
    for name, shape in shapes.items():
        if tuple(getattr(m, name).shape) != shape:
            raise FormatError(f"{where}: {name} has shape {tuple(getattr(m, name).shape)}, expected {shape}")
    if expect is not None and m.in_features != expect[1]:
        raise FormatError(f"{where}: in_features is {m.in_features}, the model needs {expect[1]}")


def _check_pointers_and_mask(m: GroupSparseMatrix, where: str) -> None:
    counts = m.crow_indices.diff()
    if int(m.crow_indices[0]) != 0:
        raise FormatError(f"{where}: crow_indices starts at {int(m.crow_indices[0])}, expected 0")
    # Compared as neighbours, not by their difference, which wraps round in int32.
    if (m.crow_indices[1:] < m.crow_indices[:-1]).any():
        row = int((m.crow_indices[1:] < m.crow_indices[:-1]).nonzero()[0])
        raise FormatError(f"{where}: crow_indices falls after row {row}")
    if int(m.crow_indices[-1]) != m.nnz:
        raise FormatError(f"{where}: crow_indices ends at {int(m.crow_indices[-1])}, but nnz is {m.nnz}")
    bits = unpack_bitmap(m.group_mask)
    if bits[:, m.groups_per_row :].any():
        row = int(bits[:, m.groups_per_row :].any(1).nonzero()[0])
        raise FormatError(f"{where}: group_mask row {row} has padding bits set")
    wrong = bits.sum(1) != counts
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise FormatError(
            f"{where}: group_mask row {row} keeps {int(bits[row].sum())} groups, crow_indices says {int(counts[row])}"
        )
