"""Arguments and options of the ``gqsa`` command line, as they are documented there."""

from pathlib import Path
from typing import Annotated

import typer

from vllm_gqsa.offline.errors import InputError
from vllm_gqsa.offline.recipe import Importance, Precision

__all__ = [
    "MOST",
    "Batch",
    "CheckpointArgument",
    "Column",
    "Compensate",
    "Context",
    "Damping",
    "Device",
    "GroupSize",
    "Ignore",
    "ImportanceOption",
    "Json",
    "LmHead",
    "ModelArgument",
    "Pattern",
    "PrecisionOption",
    "RecipeName",
    "Samples",
    "Seed",
    "Sparsity",
]

ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="Folder or hub name of a dense Hugging Face model.")
]
CheckpointArgument = Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="Folder of a GQSA checkpoint.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]


def _usable_device(name: str) -> str:
    import torch

    try:
        torch.empty(1, device=name).cpu()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--device {name}: torch cannot compute there ({reason}); try --device cpu") from error
    return name


MOST = 2**31 - 1
Device = Annotated[
    str, typer.Option(callback=_usable_device, help="torch device that computes, for example cpu or cuda.")
]
Batch = Annotated[int, typer.Option(min=1, max=MOST, help="Windows at a time through a block; less takes less memory.")]
Column = Annotated[str, typer.Option(help="Column of a .jsonl, .parquet or dataset that holds the text.")]
RecipeName = Annotated[
    str,
    typer.Option(
        "--recipe",
        help="What is done to the weights: one-shot (no training), blockwise (block by block, for large models), "
        "quick, default, best, or a YAML file such as the gqsa_recipe.yaml beside a checkpoint. The options below "
        "change single settings of it.",
    ),
]
Sparsity = Annotated[
    float | None,
    typer.Option(help="Share of groups to prune, 0 to below 1.  [named recipes: 0.5, or that of --pattern n:m]"),
]
LmHead = Annotated[
    float | None,
    typer.Option(
        "--lm-head",
        help="Compress the output head too (and the embedding, where the two are tied): the share of its groups to "
        "prune. 0, INT4 without pruning, is the advice.  [default: leave it dense]",
    ),
]
GroupSize = Annotated[
    int | None, typer.Option(help="Input features a group: 8, 16, 32, 64 or 128.  [named recipes: 16]")
]
Pattern = Annotated[
    str | None,
    typer.Option(
        help="Scope of the mask: row (every row keeps the same number), matrix, model (with prune or importance kfac), "
        "or n:m (n of m adjacent groups).  [named recipes: model, but blockwise: matrix]"
    ),
]
ImportanceOption = Annotated[
    Importance | None,
    typer.Option(
        help="How a group's importance is computed from the Hessian; kfac: and from the loss's gradients, for patterns "
        "matrix and model. Not with the stage prune (quick, default, best).  [one-shot, blockwise: kfac]"
    ),
]
Compensate = Annotated[
    bool | None,
    typer.Option(
        "--compensate/--no-compensate",
        help="Let later weights take up the error of pruning and rounding earlier ones. Not with the stage prune.  "
        "[one-shot, blockwise: yes]",
    ),
]
Damping = Annotated[
    float | None,
    typer.Option(
        help="Share of the Hessian's mean diagonal that is added to it. Not with the stage prune.  "
        "[one-shot, blockwise: 0.01]"
    ),
]
Samples = Annotated[int | None, typer.Option(min=1, help="Calibration windows.  [named recipes: 128]")]
Context = Annotated[int | None, typer.Option(min=2, help="Tokens a window.  [named recipes: 512]")]
Seed = Annotated[int | None, typer.Option(help="Chooses the calibration windows, and their order in training.")]
PrecisionOption = Annotated[
    Precision | None,
    typer.Option(
        help="Arithmetic of training; auto is bfloat16 where the device multiplies it.  [named recipes: auto]"
    ),
]
Ignore = Annotated[
    list[str] | None,
    typer.Option(
        help="Linear to leave dense: a full module name, or re: and a regular expression. May be given several times."
    ),
]
