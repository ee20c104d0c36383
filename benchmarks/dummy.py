"""Llamas without weights for vLLM's ``load_format="dummy"``: dense, GPTQ's INT4 and GQSA."""

import json
from pathlib import Path
from typing import Any

__all__ = [
    "GROUP_SIZE",
    "LINEARS",
    "SPARSITY",
    "bits_per_weight",
    "gptq_config",
    "linear_sizes",
    "vocabulary",
    "write_dummy",
]

SPARSITY = 0.5
GROUP_SIZE = 16
LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
EMBEDDING = "model.embed_tokens"


def gptq_config(group_size: int) -> dict[str, Any]:
    """``quantization_config`` of a symmetric GPTQ checkpoint; vLLM would look for the linears in the weights."""
    return {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": group_size,
        "desc_act": False,
        "sym": True,
        "lm_head": False,
        "modules_in_block_to_quantize": list(LINEARS),
    }


def linear_sizes(config: dict[str, Any]) -> tuple[tuple[int, int], ...]:
    """Outputs and inputs of :data:`LINEARS` in a Llama."""
    heads, kv_heads, head = (config[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    attention = ((heads * head, hidden), (kv_heads * head, hidden), (kv_heads * head, hidden), (hidden, heads * head))
    return (*attention, (inner, hidden), (inner, hidden), (hidden, inner))


def gqsa_config(config: dict[str, Any], *, head: bool) -> dict[str, Any]:
    """``quantization_config`` of a GQSA checkpoint of a Llama with tied embeddings.

    Args:
        config: of the dense model.
        head: whether the output layer is compressed too, nothing pruned.
    """
    modules = {
        f"model.layers.{i}.{name}": {"nnz": rows * round(columns // GROUP_SIZE * (1 - SPARSITY))}
        for i in range(config["num_hidden_layers"])
        for name, (rows, columns) in zip(LINEARS, linear_sizes(config), strict=True)
    }
    if head:
        modules[EMBEDDING] = {"nnz": config["vocab_size"] * config["hidden_size"] // GROUP_SIZE}
    return {
        "quant_method": "gqsa",
        "format_version": 1,
        "bits": 4,
        "group_size": GROUP_SIZE,
        "sparsity": SPARSITY,
        "pattern": "row",
        "ignore": [] if head else ["lm_head"],
        "modules": modules,
    }


def write_dummy(folder: Path, config: dict[str, Any]) -> dict[str, Path]:
    """Folders with nothing but a config.json, for ``load_format="dummy"``; returns them by form.

    The form with a compressed output layer is for models that tie it to their embedding.
    """
    quantization = {"dense": None, "int4": gptq_config(128), "gqsa": gqsa_config(config, head=False)}
    if config["tie_word_embeddings"]:
        quantization["gqsa_head"] = gqsa_config(config, head=True)
    folders = {}
    for form, each in quantization.items():
        folders[form] = folder / form
        folders[form].mkdir(parents=True, exist_ok=True)
        whole = config if each is None else {**config, "quantization_config": each}
        (folders[form] / "config.json").write_text(json.dumps(whole, indent=1), encoding="utf-8")
    return folders


def vocabulary(folder: Path) -> int:
    """How many tokens the model in a folder knows."""
    size: int = json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    return size


def bits_per_weight(folder: Path) -> float:
    """Bits that a weight of the linear layers takes on the average, scales and everything counted.

    Args:
        folder: dense, or what :func:`gptq_config` or GQSA describe.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    quantization = config.get("quantization_config")
    if quantization is None:
        return 16
    size = quantization["group_size"]
    if quantization["quant_method"] == "gptq":
        return 4 + 16 / size
    sizes = linear_sizes(config)
    nnz = sum(each["nnz"] for name, each in quantization["modules"].items() if name != EMBEDDING)
    layers = config["num_hidden_layers"]
    rows = layers * sum(n for n, _ in sizes)
    mask = layers * sum(n * -(-k // (8 * size)) for n, k in sizes)
    weights = layers * sum(n * k for n, k in sizes)
    return 8 * (nnz * (size / 2 + 2) + mask + 4 * (rows + layers * len(sizes))) / weights
