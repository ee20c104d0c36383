"""What is said about a finished checkpoint: a report for programs, and a model card for people."""

import math
from pathlib import Path
from typing import Any

from vllm_gqsa.format import HEAD, GqsaConfig
from vllm_gqsa.offline.estimate import DENSE_INT4_BITS, module_bytes
from vllm_gqsa.offline.perplexity import Perplexity
from vllm_gqsa.offline.training_report import table

__all__ = ["REPORT_FILE", "make_report", "model_card"]

REPORT_FILE = "gqsa_report.json"


def make_report(  # noqa: PLR0913, PLR0917 - a report says all there is to say
    model: str,
    command: str,
    dense_bytes: int,
    folder: Path,
    config: GqsaConfig,
    shapes: dict[str, tuple[int, int]],
    dense: Perplexity,
    compressed: Perplexity,
    trained: dict[str, Any],
) -> dict[str, Any]:
    """Facts of a finished checkpoint, all counted or measured.

    Args:
        model: name of the dense model.
        command: the command that made the checkpoint.
        dense_bytes: size of the dense safetensors files.
        folder: the checkpoint, its shards written.
        config: its configuration.
        shapes: ``(out_features, in_features)`` of every compressed linear, the head among them.
        dense: perplexity of the dense model.
        compressed: perplexity of the checkpoint, on the same text.
        trained: what :func:`vllm_gqsa.offline.training_report.collect` gives.

    Returns:
        A JSON object. ``sparsity`` and ``bits_per_weight`` count the compressed linears alone, the head among them;
        ``bytes`` counts all safetensors files.
    """
    weights = sum(rows * columns for rows, columns in shapes.values())
    sizes = {name: (config.modules[name].nnz, config.group_size_of(name)) for name in shapes}
    stored = sum(module_bytes(*shape, *sizes[name]) for name, shape in shapes.items())
    return {
        "model": model,
        "command": command,
        "group_size": config.group_size,
        "group_sizes": config.group_sizes,
        "pattern": config.pattern,
        "modules": len(shapes),
        "target_sparsity": config.sparsity,
        "lm_head": None if config.head is None else _head_facts(config.head, shapes[config.head], config),
        "sparsity": 1 - sum(nnz * size for nnz, size in sizes.values()) / weights,
        "bits_per_weight": 8 * stored / weights,
        "compressed_weights": weights,
        "bytes": sum(path.stat().st_size for path in folder.glob("*.safetensors")),
        "dense_bytes": dense_bytes,
        "perplexity": compressed.to_json(),
        "dense_perplexity": dense.to_json(),
        "stages": table(trained),
        "worst_modules": trained["worst_modules"],
    }


def _head_facts(name: str, shape: tuple[int, int], config: GqsaConfig) -> dict[str, Any]:
    """Of the head alone: the name of its matrix, share of pruned groups, bits a weight."""
    weights, nnz, size = shape[0] * shape[1], config.modules[name].nnz, config.group_size_of(name)
    return {
        "name": name,
        "sparsity": 1 - nnz * size / weights,
        "bits_per_weight": 8 * module_bytes(*shape, nnz, size) / weights,
    }


_CARD = """\
---
library_name: vllm
tags: [gqsa, int4, group-sparse]
{base_model}---

# {name}, GQSA W4 S{target} G{group_sizes}

{model} with its linear layers compressed by vllm-gqsa: {percent} % of the groups of 1 x {group_sizes} weights are
pruned (pattern `{pattern}`), the others are INT4 with a scale and a zero point each. {head}

| | dense | this checkpoint |
| --- | --- | --- |
| safetensors files | {dense_mb:.1f} MB | {mb:.1f} MB |
| bits a weight in the {modules} compressed linears | as stored | {bits_per_weight:.2f} |
| perplexity ({windows} windows of {context} tokens, float32) | {dense_ppl} | {ppl} |

Perplexity was measured block by block while the checkpoint was made, on: {text}.{note}

## How it was made

{stages}

{worst}All blocks and steps: `gqsa_training.json`; drawn:

![errors of the blocks, losses of the steps](gqsa_training.png)

## Made by

```
{command}
```

The recipe with every setting: `gqsa_recipe.yaml`.

## Use

Install vllm-gqsa beside vLLM, then

```
vllm serve {folder} --quantization gqsa
```

(on a CPU with `VLLM_CPU_KVCACHE_SPACE=1` before it), or with plain transformers, where the first import is needed
(without it, transformers warns and returns random weights):

```python
import vllm_gqsa.hf
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{folder}")
```
"""


def model_card(report: dict[str, Any], folder: str = "path/to/this/folder") -> str:
    """The README.md of a checkpoint, from its report."""
    name = Path(report["model"]).name
    is_hub_name = report["model"].count("/") == 1 and not Path(report["model"]).exists()
    note = ""
    if report["bits_per_weight"] > DENSE_INT4_BITS:
        note = f" Dense INT4 with groups of 128 ({DENSE_INT4_BITS} bits a weight) would be smaller."
    return _CARD.format(
        base_model=f"base_model: {report['model']}\n" if is_hub_name else "",
        name=name,
        model=report["model"],
        target=round(100 * report["target_sparsity"]),
        percent=round(100 * report["sparsity"]),
        head=_head_sentence(report["lm_head"]),
        group_sizes="/".join(map(str, report["group_sizes"])),
        pattern=report["pattern"],
        modules=report["modules"],
        bits_per_weight=report["bits_per_weight"],
        mb=report["bytes"] / 1e6,
        dense_mb=report["dense_bytes"] / 1e6,
        windows=report["perplexity"]["windows"],
        context=report["perplexity"]["context"],
        text=report["perplexity"]["text"],
        ppl=_figure(report["perplexity"]["perplexity"]),
        dense_ppl=_figure(report["dense_perplexity"]["perplexity"]),
        command=report["command"],
        stages=report["stages"],
        worst=_worst_sentence(report["worst_modules"]),
        folder=folder,
        note=note,
    )


def _worst_sentence(worst: dict[str, float]) -> str:
    if not worst:
        return ""
    listed = ", ".join(f"`{name}` {error:.3g}" for name, error in worst.items())
    return f"Largest relative errors of a linear's output after the last stage: {listed}. "


def _head_sentence(head: dict[str, Any] | None) -> str:
    if head is None:
        return ""
    what = "the output head" if head["name"] == HEAD else "the embedding, whose one matrix is also the output head,"
    return f"Among them is {what} with {100 * head['sparsity']:.0f} % pruned. "


def _figure(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) and value < 1e5 else f"{value:.3g}"
