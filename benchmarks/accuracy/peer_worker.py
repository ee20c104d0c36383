"""A process that compresses a model by another method. Runs in the peers' own environment."""

import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.protocol import serve

__all__ = ["check_weight", "prepare", "read_windows"]

_HEAD = "lm_head"
# AutoRound's own default.
_BATCH = 8


def prepare(settings: dict[str, Any]) -> tuple[dict[str, Any], Callable[[dict[str, Any]], dict[str, Any]]]:
    """Do all of it; see :func:`benchmarks.protocol.serve`.

    Args:
        settings: as :func:`benchmarks.accuracy.peers.compress` makes them.
    """
    tokens = read_windows(Path(settings["windows"]))
    from transformers import AutoModelForCausalLM  # noqa: PLC0415

    source, output = Path(settings["model"]), Path(settings["output"])
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    start = time.monotonic()
    method = _autoround if settings["method"] == "autoround" else _llm_compressor
    weights = method(model, tokens, settings)
    seconds = time.monotonic() - start
    for name, weight in weights.items():
        check_weight(name, weight, settings["bits"], settings["group_size"], settings["kept"])
    # Whatever else the packages did to the model stays behind.
    fresh = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.no_grad():
        for name, weight in weights.items():
            fresh.get_submodule(name).weight.copy_(weight)
    _save(fresh, source, output)
    return {"seconds": seconds, "linears": len(weights)}, lambda question: question


def read_windows(path: Path) -> torch.Tensor:
    """The calibration text, int64 ``[windows, context]``.

    Raises:
        ValueError: the file holds something else.
    """
    from safetensors.torch import load_file  # noqa: PLC0415

    tokens = load_file(path).get("tokens")
    if tokens is None or tokens.dtype != torch.int64 or tokens.dim() != 2:
        raise ValueError(f"{path} must hold one tensor `tokens`, int64 [windows, context]")
    return tokens


def check_weight(name: str, weight: torch.Tensor, bits: int, group_size: int, kept: int) -> None:
    """See that a dequantised weight is what the bits a weight are counted for.

    Args:
        name: of the linear.
        weight: floating point ``[N, K]``.
        bits: a group has at most 2 ** bits values, among them the zero of pruned weights.
        group_size: divides K.
        kept: of each four weights, at most so many are not zero.

    Raises:
        ValueError: it is something else, or not finite.
    """
    if not weight.isfinite().all():
        raise ValueError(f"{name} has weights that are not finite")
    most = int((weight.reshape(-1, 4) != 0).sum(1).max())
    if most > kept:
        raise ValueError(f"{name} keeps {most} of four weights, not {kept}")
    ordered = weight.reshape(-1, group_size).sort(1).values
    values = 1 + int((ordered.diff(dim=1) != 0).sum(1).max())
    if values > 2**bits:
        raise ValueError(f"{name} has {values} values in a group of {group_size}, more than {bits} bits hold")


def _linears(model: torch.nn.Module) -> dict[str, Any]:
    """The linears inside the blocks, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.rpartition(".")[2] != _HEAD
    }


def _llm_compressor(model: torch.nn.Module, tokens: torch.Tensor, settings: dict[str, Any]) -> dict[str, torch.Tensor]:
    """GPTQ, after SparseGPT where weights are pruned; returns dequantised weights by the linear's name."""
    from compressed_tensors.quantization import fake_quantize  # noqa: PLC0415
    from llmcompressor import oneshot  # noqa: PLC0415
    from llmcompressor.modifiers.pruning import SparseGPTModifier  # noqa: PLC0415
    from llmcompressor.modifiers.quantization import GPTQModifier  # noqa: PLC0415
    from loguru import logger  # noqa: PLC0415

    which = {"targets": ["Linear"], "ignore": [f"re:.*{_HEAD}"]}
    form = {"num_bits": settings["bits"], "type": "int", "symmetric": False}
    form |= {"strategy": "group", "group_size": settings["group_size"]}
    recipe = [GPTQModifier(**which, config_groups={"group_0": {"targets": ["Linear"], "weights": form}})]
    if settings["method"] == "sparsegpt":
        recipe.insert(0, SparseGPTModifier(**which, sparsity=0.5, mask_structure=f"{settings['kept']}:4"))
    # On a Hessian that cannot be inverted it only warns, and rounds to nearest or prunes by magnitude.
    failures: list[str] = []
    logger.add(failures.append, filter=lambda record: "Failed to invert" in record["message"])
    rows = [{"input_ids": row[None]} for row in tokens]
    # Each method with a pass of its own; a loader without batches keeps the windows and their order as they are.
    oneshot(
        model=model,
        recipe=recipe,
        dataset=torch.utils.data.DataLoader(rows, batch_size=None),  # type: ignore[arg-type]
        pipeline="independent",
    )
    if failures:
        raise ValueError(f"{len(failures)} Hessians cannot be inverted; calibrate on more windows")
    # It computed with float32 scales; what it stores for a half-precision model, and what is counted, is float16.
    return {
        name: fake_quantize(
            module.weight.detach(),
            module.weight_scale.half().float(),
            module.weight_zero_point,
            module.quantization_scheme.weights,
        )
        for name, module in _linears(model).items()
    }


def _autoround(model: torch.nn.Module, tokens: torch.Tensor, settings: dict[str, Any]) -> dict[str, torch.Tensor]:
    """AutoRound with its default recipe, which computes in bfloat16; its scales are float16.

    Returns:
        Dequantised weights by the linear's name, rounded to bfloat16, as it leaves them.
    """
    from auto_round import AutoRound  # noqa: PLC0415
    from transformers import AutoTokenizer  # noqa: PLC0415

    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    # It leaves tokens that look like padding out of the loss, and the windows have none.
    tokenizer.pad_token = None
    batch = math.gcd(_BATCH, len(tokens))
    quantizer = AutoRound(
        model,
        tokenizer,
        scheme="W4A16",
        bits=settings["bits"],
        group_size=settings["group_size"],
        sym=False,
        dataset=[{"input_ids": rows, "attention_mask": torch.ones_like(rows)} for rows in tokens.split(batch)],
        seqlen=tokens.shape[1],
        nsamples=len(tokens),
        batch_size=batch,
        iters=settings["iterations"],
        device_map="cpu",
        enable_torch_compile=False,
    )
    quantized, _ = quantizer.quantize()
    return {name: module.weight.detach().float() for name, module in _linears(quantized).items()}


def _save(model: Any, source: Path, output: Path) -> None:  # noqa: ANN401 - transformers
    """The weights, and the tokenizer's files as they are; `output` appears when it is complete."""
    partial = output.with_name(f"{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    for path in source.iterdir():
        if path.is_file() and ".safetensors" not in path.name and not (partial / path.name).exists():
            shutil.copy(path, partial)
    partial.rename(output)


if __name__ == "__main__":
    serve(prepare)
