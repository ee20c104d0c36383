"""What the stages did to the model: errors of every block, worst linears, loss curves; as JSON, table and picture."""

from pathlib import Path
from typing import Any

from vllm_gqsa.format import read_json

__all__ = ["TRAINING_FILE", "TRAINING_PICTURE", "collect", "plot", "table"]

TRAINING_FILE = "gqsa_training.json"
TRAINING_PICTURE = "gqsa_training.png"
_WORST = 5
_ENDS = ("prune", "distill", "oqp")
_TITLES = {
    "one_shot": "one-shot",
    "bqpo": "BQPO",
    "prune": "gradual pruning",
    "distill": "distillation",
    "oqp": "E2E-OQP",
    "final": "finished model",
}


def collect(folder: Path) -> dict[str, Any]:
    """Gather what the passes have noted.

    Args:
        folder: where they noted it, a folder in that of the checkpoint.

    Returns:
        A JSON object: ``blocks``, in order, each with its ``errors`` after each stage (mean squared error of the
        block's output relative to what the dense block adds to its input, over windows that blocks are not trained
        on; ``final``: in the finished model), its loss ``curve`` over the epochs of BQPO, and the relative squared
        output error of its ``modules`` after one-shot pruning; ``worst_modules``; ``prune``, ``distill`` and ``oqp``
        where they ran, with the loss ``before`` and ``after`` on windows not trained on, and its ``curve`` over the
        steps.
    """
    finished = folder.parent / TRAINING_FILE
    if finished.exists():  # what they noted is gone where a finished checkpoint has lost a file
        return read_json(finished)
    blocks = [read_json(path) for path in sorted(folder.glob("block-*.json"))]
    final = folder / "final.json"
    if final.exists():
        errors = read_json(final)["errors"]
        blocks = blocks or [{"block": index, "errors": {}, "modules": {}} for index in range(len(errors))]
        for block, error in zip(blocks, errors, strict=True):
            block["errors"]["final"] = error
    modules = {name: error for block in blocks for name, error in block["modules"].items()}
    worst = sorted(modules, key=lambda name: -modules[name])[:_WORST]
    ends = {name: read_json(folder / f"{name}.json") for name in _ENDS if (folder / f"{name}.json").exists()}
    return {"blocks": blocks, "worst_modules": {name: modules[name] for name in worst}, **ends}


def table(trained: dict[str, Any]) -> str:
    """The stages as a Markdown table: what each measured before and after."""
    lines = ["| stage | measure | before | after |", "| --- | --- | --- | --- |"]
    blocks = trained["blocks"]
    means = {name: sum(b["errors"][name] for b in blocks) / len(blocks) for name in blocks[0]["errors"]}
    measure, before = "relative error of a block's output, mean", ""
    for name in ("one_shot", "bqpo"):
        if name in means:
            lines.append(f"| {_TITLES[name]} | {measure} | {before} | {means[name]:.4g} |")
            before = f"{means[name]:.4g}"
    for name in _ENDS:
        if name in trained:
            facts = trained[name]
            text = f"{facts['loss']}, {facts['tokens']} tokens"
            if facts["distinct_tokens"] < facts["tokens"]:
                text += f" ({facts['distinct_tokens']} different ones)"
            if not facts["kept"]:
                text += ", worse, so not kept"
            lines.append(f"| {_TITLES[name]} | {text} | {facts['before']:.4g} | {facts['after']:.4g} |")
    if "final" in means:
        lines.append(f"| {_TITLES['final']} | {measure} | {before} | {means['final']:.4g} |")
    return "\n".join(lines)


def plot(trained: dict[str, Any], path: Path) -> None:
    """Draw errors over the blocks and, where there are any, loss curves, as a PNG."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - slow to import

    ends = [name for name in _ENDS if name in trained]
    figure = Figure(figsize=(9, 3.2 * (1 + len(ends))), layout="constrained")
    axes = figure.subplots(1 + len(ends), 1, squeeze=False)[:, 0]
    for name in trained["blocks"][0]["errors"]:
        axes[0].plot([block["errors"][name] for block in trained["blocks"]], marker=".", label=_TITLES[name])
    axes[0].set(xlabel="block", ylabel="relative error", title="output of the blocks")
    axes[0].set_ylim(bottom=0)
    axes[0].legend()
    for axis, name in zip(axes[1:], ends, strict=True):
        axis.plot(trained[name]["curve"], linewidth=0.8)
        axis.set(xlabel="step", ylabel=trained[name]["loss"], title=_TITLES[name])
    figure.savefig(path, dpi=110, format="png")
