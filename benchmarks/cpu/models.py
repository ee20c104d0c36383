"""The folders that vLLM serves: a 1B-shaped model without weights, and SmolLM2-135M, in several forms."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.cpu.errors import BenchmarkError
from benchmarks.demo.errors import DemoError
from benchmarks.demo.model import find_gguf, write_dense_model, write_texts

__all__ = ["FORMS", "LINEARS", "ONE_B", "bits_per_weight", "vocabulary", "write_dummy", "write_smollm2"]

FORMS = ("dense", "int4", "gqsa", "gqsa_head")
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
ONE_B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "bfloat16",
}
"""Shape of Llama-3.2-1B."""
# Seconds that nobody waits for in vain: speed does not depend on how well the groups were chosen.
_SAMPLES = 4
_CONTEXT = 256


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
    """Folders with nothing but a config.json, for ``load_format="dummy"``; returns them by form."""
    quantization = {
        "dense": None,
        "int4": gptq_config(128),
        "gqsa": gqsa_config(config, head=False),
        "gqsa_head": gqsa_config(config, head=True),
    }
    folders = {}
    for form, each in quantization.items():
        folders[form] = folder / form
        folders[form].mkdir(parents=True, exist_ok=True)
        whole = config if each is None else {**config, "quantization_config": each}
        (folders[form] / "config.json").write_text(json.dumps(whole, indent=1), encoding="utf-8")
    return folders


def write_smollm2(folder: Path, say: Callable[[str], None]) -> dict[str, Path]:
    """SmolLM2-135M dense, as GPTQ and twice as GQSA; what is there already is kept. Returns the folders by form.

    The quantised forms are made for speed alone: rounding to nearest, and a one-shot compression of few samples.

    Raises:
        BenchmarkError: the model is not there, or could not be converted.
    """
    folders = {form: folder / form for form in FORMS}
    folder.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    try:
        write_dense_model(find_gguf(), folders["dense"])
        if not (folders["int4"] / "config.json").exists():
            write_gptq(folders["dense"], folders["int4"], group_size=64)
        for form, options in (("gqsa", ()), ("gqsa_head", ("--lm-head", "0"))):
            if not (folders[form] / "config.json").exists():
                write_texts(folder / "calibration.txt", folder / "eval.txt")
                calibration, log = folder / "calibration.txt", folder / "compress.log"
                _compress(folders["dense"], folders[form], calibration, log, *options)
    except DemoError as error:
        raise BenchmarkError(str(error)) from error
    if time.monotonic() - start > 1:
        say(f"SmolLM2-135M made in {folder}, {time.monotonic() - start:.0f} s; the next run uses it again")
    return folders


def write_gptq(dense: Path, folder: Path, group_size: int) -> None:
    """Round a dense folder to a GPTQ checkpoint; it appears whole or not at all.

    Args:
        dense: with one ``model.safetensors``.
        folder: to write.
        group_size: divides the inputs of every linear.
    """
    import torch  # noqa: PLC0415 - slow to import, and not needed where the folder is there
    from safetensors.torch import load_file, save_file  # noqa: PLC0415

    from benchmarks.cpu.int4 import gptq_tensors, round_to_nearest  # noqa: PLC0415

    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(dense / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if not module.endswith(LINEARS):
            tensors[name] = tensor
            continue
        codes, scales = round_to_nearest(tensor, group_size)
        for piece, value in gptq_tensors(codes, scales.bfloat16()).items():
            tensors[f"{module}.{piece}"] = value.contiguous()
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(dense, partial, ignore=shutil.ignore_patterns("*.safetensors"))
    save_file(tensors, partial / "model.safetensors", {"format": "pt"})
    config = json.loads((partial / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = gptq_config(group_size)
    (partial / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def _compress(dense: Path, folder: Path, calibration: Path, log: Path, *options: str) -> None:
    command = [
        str(Path(sys.executable).with_name("gqsa")), "compress", str(dense), str(folder), "--recipe", "one-shot",
        "--sparsity", str(SPARSITY), "--group-size", str(GROUP_SIZE),
        "--calibration", str(calibration), "--samples", str(_SAMPLES), "--context", str(_CONTEXT), *options,
    ]  # fmt: skip
    with log.open("w", encoding="utf-8") as output:
        status = subprocess.call(command, stdout=output, stderr=subprocess.STDOUT)
    if status != 0:
        raise BenchmarkError(f"gqsa compress failed with status {status}; see {log}")


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
