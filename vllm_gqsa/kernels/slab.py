"""The layout of a matrix that the CUDA kernels read; it is made, and undone, on the CPU (csrc/common/slab.h)."""

import ctypes
import functools
from dataclasses import dataclass, fields

import torch

from vllm_gqsa.format import GroupSparseMatrix
from vllm_gqsa.kernels import native

__all__ = ["MAX_GROUPS", "MAX_ROWS", "SlabMatrix"]

MAX_ROWS = 32 << 16
"""Rows that the layout can number."""
MAX_GROUPS = 1 << 14
"""Groups of a row, kept or not, that the layout can number; a group of 128 counts as two."""

_LANES = 32
_RECORD_WEIGHTS = 64


class _Tensors(ctypes.Structure):
    """``gqsa::SlabTensors`` of csrc/common/slab.cpp."""

    _fields_ = tuple(
        (name, ctypes.c_void_p) for name in ("codes", "scale_zero", "columns", "heads", "slab_ptr", "rows")
    )


_INT32, _LONG, _POINTER = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p
_TENSORS = ctypes.POINTER(_Tensors)


@functools.cache
def _library() -> ctypes.CDLL:
    """The functions of csrc/common/slab.cpp."""
    matrix = (*(_POINTER,) * 4, _LONG, _LONG, _INT32, _INT32)
    return native.library(
        {
            "gqsa_slab_plan": (_POINTER, *matrix, _LONG, _POINTER),
            "gqsa_slab_records": (_LONG, _POINTER),
            "gqsa_slab_fill": (None, _POINTER, _TENSORS, _LONG, _POINTER),
            "gqsa_slab_free": (None, _POINTER),
            "gqsa_slab_unpack": (None, _TENSORS, _LONG, _POINTER, _LONG, _INT32, _INT32, *(_POINTER,) * 3),
        }
    )


@dataclass(frozen=True, eq=False)
class SlabMatrix:
    """A :class:`GroupSparseMatrix` in slabs of 32 rows, sorted by length: see csrc/common/slab.h.

    The kernels count in ``counters``: a matrix may be in use on one CUDA stream at a time.

    With R records, L slabs and g = 64 / min(G, 64) groups of each row in a record:

    Attributes:
        crow_indices: int32 ``[N + 1]``, as in the checkpoint.
        qweight: int32 ``[R, 2, 32, 4]``, eight codes a word.
        scale_zero: int16 ``[R, 32, g]``, 0 where a row has ended.
        columns: uint8 ``[R, 32, g]``, the group's number in its row, less the record's base.
        heads: int32 ``[R]``, slab and base of a record.
        slab_ptr: int32 ``[L + 1]``, first record of each slab.
        rows: int32 ``[L, 32]``, row of each lane, -1 for none.
        lanes: int32 ``[N]``, the inverse of ``rows``.
        counters: int32 ``[L]``, zero whenever no kernel runs; what blocks that share a slab count themselves with.
        in_features: K.
        group_size: G, as in the checkpoint.
    """

    crow_indices: torch.Tensor
    qweight: torch.Tensor
    scale_zero: torch.Tensor
    columns: torch.Tensor
    heads: torch.Tensor
    slab_ptr: torch.Tensor
    rows: torch.Tensor
    lanes: torch.Tensor
    counters: torch.Tensor
    in_features: int
    group_size: int

    @property
    def out_features(self) -> int:
        """Number of rows N."""
        return self.crow_indices.shape[0] - 1

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors by name, in the order of the constructor."""
        return {field.name: getattr(self, field.name) for field in fields(self)[:-2]}

    @classmethod
    def pack(cls, matrix: GroupSparseMatrix) -> "SlabMatrix":
        """Lay out a valid matrix on the CPU; the result is on the CPU too.

        Raises:
            ValueError: it has more rows, or more groups in a row, than the layout can number.
        """
        rows, size = matrix.out_features, min(matrix.group_size, _RECORD_WEIGHTS)
        if rows > MAX_ROWS or matrix.in_features // size > MAX_GROUPS:
            raise ValueError(
                f"a matrix [{rows}, {matrix.in_features}] with groups of {matrix.group_size} is too large for the "
                f"CUDA kernels: they number {MAX_ROWS} rows and {MAX_GROUPS} groups of up to 64 weights in a row"
            )
        source = [tensor.contiguous() for tensor in matrix.tensors().values()]
        threads = torch.get_num_threads(), native.parallel_for()
        library = _library()
        plan = library.gqsa_slab_plan(
            *(tensor.data_ptr() for tensor in source),
            *(rows, source[1].shape[1], matrix.groups_per_row, matrix.group_size),
            *threads,
        )
        try:
            with torch.device("cpu"):  # whatever the default is: the library writes there
                packed = cls._empty(matrix, library.gqsa_slab_records(plan))
            library.gqsa_slab_fill(plan, packed._pointers(), *threads)
        finally:
            library.gqsa_slab_free(plan)
        used = packed.rows.flatten() >= 0
        packed.lanes[packed.rows.flatten()[used].long()] = used.nonzero().flatten().int()
        return packed

    @classmethod
    def _empty(cls, matrix: GroupSparseMatrix, records: int) -> "SlabMatrix":
        slabs, groups = -(-matrix.out_features // _LANES), _RECORD_WEIGHTS // min(matrix.group_size, _RECORD_WEIGHTS)
        return cls(
            crow_indices=matrix.crow_indices.contiguous(),
            qweight=torch.empty(records, 2, _LANES, 4, dtype=torch.int32),
            scale_zero=torch.empty(records, _LANES, groups, dtype=torch.int16),
            columns=torch.empty(records, _LANES, groups, dtype=torch.uint8),
            heads=torch.empty(records, dtype=torch.int32),
            slab_ptr=torch.empty(slabs + 1, dtype=torch.int32),
            rows=torch.empty(slabs, _LANES, dtype=torch.int32),
            lanes=torch.empty(matrix.out_features, dtype=torch.int32),
            counters=torch.zeros(slabs, dtype=torch.int32),
            in_features=matrix.in_features,
            group_size=matrix.group_size,
        )

    def unpack(self) -> GroupSparseMatrix:
        """The matrix in the checkpoint's order, on the device of this one."""
        device, here = self.qweight.device, self.to("cpu")
        groups, nnz = self.in_features // self.group_size, int(here.crow_indices[-1])
        with torch.device("cpu"):
            matrix = GroupSparseMatrix(
                crow_indices=here.crow_indices,
                group_mask=torch.zeros(self.out_features, -(-groups // 8), dtype=torch.uint8),
                qweight=torch.empty(nnz, self.group_size // 2, dtype=torch.uint8),
                scale_zero=torch.empty(nnz, dtype=torch.int16),
                in_features=self.in_features,
                group_size=self.group_size,
            )
        _library().gqsa_slab_unpack(
            *(here._pointers(), here.rows.shape[0], here.crow_indices.data_ptr(), matrix.group_mask.shape[1]),
            *(groups, self.group_size),
            *(tensor.data_ptr() for tensor in (matrix.group_mask, matrix.qweight, matrix.scale_zero)),
        )
        return matrix.to(device)

    def to(self, device: torch.device | str) -> "SlabMatrix":
        """The same matrix on ``device``."""
        moved = {name: tensor.to(device) for name, tensor in self.tensors().items()}
        return SlabMatrix(**moved, in_features=self.in_features, group_size=self.group_size)

    def _pointers(self) -> _Tensors:
        tensors = (self.qweight, self.scale_zero, self.columns, self.heads, self.slab_ptr, self.rows)
        return _Tensors(*(tensor.data_ptr() for tensor in tensors))
