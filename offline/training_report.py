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
}


def collect(folder: Path) -> dict[str, Any]:
    """Gather what the passes have noted.

    Args:
        folder: where they noted it, a folder in that of the checkpoint.

    Returns:
        A JSON object: ``blocks``, in order, each with its ``errors`` after each stage (mean squared error of the
        block's output relative to what the dense block adds to its input) and its loss ``curve`` over the epochs of
        BQPO; ``modules``, the relative squared error of each compressed linear's output after the last stage, and the
        ``worst_modules`` of them; ``prune``, ``distill`` and ``oqp`` where they ran, with the loss ``before`` and
        ``after`` on windows not trained on, and its ``curve`` over the steps.
    """
    finished = folder.parent / TRAINING_FILE
    if finished.exists():  # what they noted is gone where a finished checkpoint has lost a file
        return read_json(finished)
    blocks = [read_json(path) for path in sorted(folder.glob("block-*.json"))]
    modules = {name: error for block in blocks for name, error in block.pop("modules").items()}
    for stage in ("blocks", *_ENDS):
        path = folder / f"errors-{stage}.json"
        if path.exists():
            measured = read_json(path)
            modules = measured["modules"]
            blocks = blocks or [{"block": index, "errors": {}} for index in range(len(measured["errors"]))]
            if stage != "blocks":  # these have their errors already
                for block, error in zip(blocks, measured["errors"], strict=True):
                    block["errors"][stage] = error
    worst = sorted(modules, key=lambda name: -modules[name])[:_WORST]
    ends = {name: read_json(folder / f"{name}.json") for name in _ENDS if (folder / f"{name}.json").exists()}
    return {"blocks": blocks, "modules": modules, "worst_modules": {name: modules[name] for name in worst}, **ends}


def table(trained: dict[str, Any]) -> str:
    """The stages as a Markdown table: what each measured before and after."""
    lines = ["| stage | measure | before | after |", "| --- | --- | --- | --- |"]
    blocks = trained["blocks"]
    means = {name: sum(b["errors"][name] for b in blocks) / len(blocks) for name in blocks[0]["errors"]}
    before = ""
    for name, mean in means.items():
        lines.append(f"| {_TITLES[name]} | relative error of a block's output, mean | {before} | {mean:.4g} |")
        before = f"{mean:.4g}"
        if name in trained:
            facts = trained[name]
            text = f"{facts['loss']}, {facts['tokens']} tokens"
            if facts["distinct_tokens"] < facts["tokens"]:
                text += f" ({facts['distinct_tokens']} different ones)"
            if not facts["kept"]:
                text += ", worse, so not kept"
            lines.append(f"| {_TITLES[name]} | {text} | {facts['before']:.4g} | {facts['after']:.4g} |")
    return "\n".join(lines)


def plot(trained: dict[str, Any], path: Path) -> None:
    """Draw errors over the blocks and, where there are any, loss curves, as a PNG."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - slow to import

    ends = [name for name in _ENDS if name in trained]
    curves = [block["curve"] for block in trained["blocks"] if "curve" in block]
    count = 1 + bool(curves) + len(ends)
    figure = Figure(figsize=(9, 3.2 * count), layout="constrained")
    axes = figure.subplots(count, 1, squeeze=False)[:, 0]
    for name in trained["blocks"][0]["errors"]:
        axes[0].plot([block["errors"][name] for block in trained["blocks"]], marker=".", label=_TITLES[name])
    axes[0].set(xlabel="block", ylabel="relative error", title="output of the blocks")
    axes[0].set_ylim(bottom=0)
    axes[0].legend()
    for curve in curves:
        axes[1].plot([loss / (curve[0] or 1) for loss in curve], linewidth=0.8)
    if curves:
        axes[1].set(xlabel="epoch", ylabel="loss of a block, of that at first", title=_TITLES["bqpo"])
    for axis, name in zip(axes[count - len(ends) :], ends, strict=True):
        axis.plot(trained[name]["curve"], linewidth=0.8)
        axis.set(xlabel="step", ylabel=trained[name]["loss"], title=_TITLES[name])
    figure.savefig(path, dpi=110, format="png")
