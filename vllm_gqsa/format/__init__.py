"""The checkpoint format, version 1: schema, bit packing, validation, slicing. Needs torch, not vLLM."""

from vllm_gqsa.format.checkpoint import (
    CheckpointReader,
    TensorFiles,
    check_dense,
    check_layer_count,
    check_tensor_names,
    missing_dense,
    read_config,
    read_json,
)
from vllm_gqsa.format.codecs import (
    decode_scale_zero,
    encode_scale_zero,
    pack_bitmap,
    pack_nibbles,
    round_scale,
    unpack_bitmap,
    unpack_nibbles,
)
from vllm_gqsa.format.errors import FormatError, few
from vllm_gqsa.format.matrix import GROUP_SIZES, TENSORS, GroupSparseMatrix, check_group_size, quantize_groups
from vllm_gqsa.format.schema import (
    EMBEDDING,
    FORMAT_VERSION,
    HEAD,
    GqsaConfig,
    ModuleEntry,
    check_ignore,
    is_ignored,
    parse_pattern,
)

__all__ = [
    "EMBEDDING",
    "FORMAT_VERSION",
    "GROUP_SIZES",
    "HEAD",
    "TENSORS",
    "CheckpointReader",
    "FormatError",
    "GqsaConfig",
    "GroupSparseMatrix",
    "ModuleEntry",
    "TensorFiles",
    "check_dense",
    "check_group_size",
    "check_ignore",
    "check_layer_count",
    "check_tensor_names",
    "decode_scale_zero",
    "encode_scale_zero",
    "few",
    "is_ignored",
    "missing_dense",
    "pack_bitmap",
    "pack_nibbles",
    "parse_pattern",
    "quantize_groups",
    "read_config",
    "read_json",
    "round_scale",
    "unpack_bitmap",
    "unpack_nibbles",
]
