"""Tiny models for tests: dense ones of every family, compressed ones, and their dequantised dense twins."""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from vllm_gqsa.format import GqsaConfig, GroupSparseMatrix, is_ignored

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "opt")
MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe")
"""Mixtures of experts: 4 experts of 64 features, two a token; that of qwen2_moe also has a shared expert."""

VOCABULARY = 256
SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
GATED: dict[str, Any] = {
    **SIZES,
    "num_key_value_heads": 2,
    "intermediate_size": 256,
    "head_dim": 32,
    "tie_word_embeddings": False,
}


def quantization(modules: dict[str, int], **changes: Any) -> dict[str, Any]:
    """A ``quantization_config`` as in config.json; ``modules`` maps names to nnz, ``changes`` any other key."""
    return {
        "quant_method": "gqsa",
        "format_version": 1,
        "bits": 4,
        "group_size": 16,
        "sparsity": 0.5,
        "pattern": "row",
        "ignore": ["lm_head"],
        "modules": {name: {"nnz": nnz} for name, nnz in modules.items()},
        **changes,
    }


def dense_config(family: str, **changes: Any):
    """The transformers configuration of a tiny model; ``changes`` overrides any key."""
    import transformers as hf

    if family == "opt":
        sizes = {**SIZES, "ffn_dim": 256, "word_embed_proj_dim": 128, "init_std": 0.1, "dropout": 0.0}
        return hf.OPTConfig(**{**sizes, "activation_function": "relu", **changes})
    if family in MIXTURES:
        return mixture_config(family, **changes)
    classes = {
        "llama": hf.LlamaConfig,
        "mistral": hf.MistralConfig,
        "qwen2": hf.Qwen2Config,
        "qwen3": hf.Qwen3Config,
    }
    extra = {"sliding_window": None} if family == "mistral" else {}
    return classes[family](**{**GATED, "initializer_range": 0.1, **extra, **changes})


def mixture_config(family: str, **changes: Any):
    """The transformers configuration of a tiny mixture of experts."""
    import transformers as hf

    sizes = {**GATED, "initializer_range": 0.1, "num_experts_per_tok": 2, **changes}
    if family == "mixtral":
        return hf.MixtralConfig(**{**sizes, "num_local_experts": 4, "intermediate_size": 64, **changes})
    sizes |= {"num_experts": 4, "moe_intermediate_size": 64, "norm_topk_prob": family == "qwen3_moe"}
    if family == "qwen3_moe":
        return hf.Qwen3MoeConfig(**{**sizes, **changes})
    return hf.Qwen2MoeConfig(**{**sizes, "shared_expert_intermediate_size": 128, **changes})


def make_dense(folder: Path, family: str = "llama", *, seed: int = 0, **changes: Any) -> Path:
    """Write a random float32 model of ``family`` to ``folder`` and return the folder.

    Biases and norms are random too: left at 0 and 1 they would hide mistakes.
    """
    import transformers as hf

    torch.manual_seed(seed)
    model = hf.AutoModelForCausalLM.from_config(dense_config(family, **changes), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return folder


def random_keep(rows: int, groups: int, density: float, generator: torch.Generator) -> torch.Tensor:
    """A mask with another number of groups in every row, among them an empty and a full row."""
    keep = torch.rand(rows, groups, generator=generator) < density
    keep[0] = False
    keep[-1] = True
    return keep


def random_matrix(
    rows: int, columns: int, group_size: int = 16, density: float = 0.5, seed: int = 0
) -> GroupSparseMatrix:
    """A matrix with random values and another number of groups in every row."""
    generator = torch.Generator().manual_seed(seed)
    keep = random_keep(rows, columns // group_size, density, generator)
    return GroupSparseMatrix.from_dense(torch.randn(rows, columns, generator=generator), keep, group_size)


def uneven_matrix(rows: int, columns: int, group_size: int, seed: int) -> GroupSparseMatrix:
    """Rows of every kind: empty, full, one group, and anything between."""
    generator = torch.Generator().manual_seed(seed)
    density = torch.rand(rows, 1, generator=generator).mul(3).sub(1).clamp(0, 1)
    keep = torch.rand(rows, columns // group_size, generator=generator) < density
    keep[:1, -1] = True
    return GroupSparseMatrix.from_dense(torch.randn(rows, columns, generator=generator) * 0.1, keep, group_size)


@dataclass
class Compressed:
    """A checkpoint, its dense twin, and what is in them."""

    checkpoint: Path
    twin: Path
    matrices: dict[str, GroupSparseMatrix] = field(default_factory=dict)


DENSITIES = {
    "q": 0.3,
    "k": 0.7,
    "v": 0.5,
    "o": 0.4,
    "g": 0.35,
    "u": 0.65,
    "d": 0.5,
    "f": 0.45,
    "l": 0.8,
    "e": 0.8,
    "w": 0.6,
}
"""By the first letter of a linear's name, so that the shards of a fused layer differ in nnz."""


def compress_randomly(
    dense: Path,
    folder: Path,
    *,
    group_size: int = 16,
    others: Mapping[str, int] = {},
    ignore: tuple[str, ...] = ("lm_head",),
    head: bool = False,
    seed: int = 0,
    scale: float = 1.0,
) -> Compressed:
    """Compress a dense folder by random masks, without any calibration.

    Args:
        dense: a folder with one model.safetensors.
        folder: gets ``checkpoint`` and ``twin``, the latter with the dequantised weights.
        group_size: G.
        others: the group size of linears that have one of their own, by the last part of their names.
        ignore: as in config.json; without lm_head where that is compressed.
        head: compress lm_head too, or the embedding that is tied to it.
        seed: of the masks; the same seed gives the same mask.
        scale: multiplies the weights first: another model with the same masks.
    """
    result = Compressed(folder / "checkpoint", folder / "twin")
    tied = json.loads((dense / "config.json").read_text())["tie_word_embeddings"]
    vocabulary = {"model.embed_tokens" if tied else "lm_head"} if head else set()
    ignore = tuple(name for name in ignore if name != "lm_head" or not head)
    generator = torch.Generator().manual_seed(seed)
    compressed: dict[str, torch.Tensor] = {}
    twin: dict[str, torch.Tensor] = {}
    for name, tensor in sorted(load_file(dense / "model.safetensors").items()):
        module = name.removesuffix(".weight")
        last = module.rpartition(".")[2]
        linear = last.endswith("_proj") or last in ("fc1", "fc2", "w1", "w2", "w3") or module in vocabulary
        if module == name or not linear or is_ignored(module, ignore):
            compressed[name] = twin[name] = tensor
            continue
        rows, columns = tensor.shape
        size = others.get(last, group_size)
        keep = random_keep(rows, columns // size, DENSITIES[last[0]], generator)
        matrix = GroupSparseMatrix.from_dense(tensor * scale, keep, size)
        result.matrices[module] = matrix
        compressed |= {f"{module}.{piece}": value for piece, value in matrix.tensors().items()}
        twin[name] = matrix.to_dense()
    config = GqsaConfig.model_validate(
        {
            "group_size": group_size,
            "sparsity": 0.5,
            "pattern": "matrix",
            "ignore": ignore,
            "modules": {
                name: {"nnz": matrix.nnz}
                | ({} if matrix.group_size == group_size else {"group_size": matrix.group_size})
                for name, matrix in result.matrices.items()
            },
        }
    )
    for path, tensors in ((result.checkpoint, compressed), (result.twin, twin)):
        path.mkdir(parents=True)
        for file in dense.iterdir():
            if file.suffix != ".safetensors":
                shutil.copy(file, path)
        save_file({n: t.contiguous() for n, t in tensors.items()}, path / "model.safetensors", {"format": "pt"})
    edit_json(result.checkpoint / "config.json", quantization_config=config.to_json())
    return result


def sparse_model(folder: Path, tensors: Mapping[str, torch.Tensor] | None = None) -> int:
    """Write a model.safetensors of 8 TB that takes no place on the disk; skip the test where it cannot be.

    Args:
        folder: where.
        tensors: what it holds before ``huge.weight``.

    Returns:
        Bytes of ``huge.weight``.
    """
    huge = 1 << 43
    path = folder / "model.safetensors"
    raw = save(dict(tensors or {}))
    length = int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    header["huge.weight"] = {"dtype": "BF16", "shape": [huge // 2], "data_offsets": [len(data), len(data) + huge]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    try:
        os.truncate(path, path.stat().st_size + huge)
    except OSError as error:
        pytest.skip(f"no file of 8 TB here: {error}")
    return huge


def edit_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON object in a file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_quantization(folder: Path, **changes: Any) -> None:
    """Set keys of ``quantization_config``."""
    path = folder / "config.json"
    edit_json(path, quantization_config={**json.loads(path.read_text())["quantization_config"], **changes})


def edit_tensors(folder: Path, remove: tuple[str, ...] = (), **changes: torch.Tensor) -> None:
    """Remove or set tensors of ``model.safetensors``."""
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items() if name not in remove}
    save_file({**tensors, **changes}, path, {"format": "pt"})
