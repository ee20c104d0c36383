"""The picture of the report."""

from pathlib import Path
from typing import Any

from benchmarks.cpu.report import DENSE, engine_rows, ratio_to, speedup

__all__ = ["plot"]

_COLOURS = {"GQSA": "tab:blue", "GQSA int8": "tab:cyan", "vLLM INT4": "tab:orange", "vLLM bf16": "tab:green"}
_ENGINE_COLOURS = {
    "dense bf16": "tab:green",
    "vLLM INT4": "tab:orange",
    "GQSA S50": "tab:blue",
    "GQSA S50 int8": "tab:cyan",
    "llama.cpp Q4_0": "tab:gray",
    "llama.cpp Q2_K": "silver",
}


def plot(document: dict[str, Any], path: Path) -> None:
    """Write a picture of the ratios: kernels by shape, kernels by tokens, whole models.

    Args:
        document: as written to JSON; of a part that is missing there is no panel.
        path: PNG.
    """
    import matplotlib as mpl  # noqa: PLC0415 - slow to import

    mpl.use("Agg")
    import matplotlib.pyplot as plt  # noqa: PLC0415

    rows = document["parts"].get("kernels", {}).get("rows", [])
    models = list(dict.fromkeys(row["model"] for row in engine_rows(document)))
    panels = 2 * bool(rows) + len(models)
    figure, axes = plt.subplots(1, max(1, panels), figsize=(6 * max(1, panels), 5), squeeze=False)
    remaining = list(axes[0])
    if rows:
        _by_shape(remaining.pop(0), [row for row in rows if _plain(row) and row["m"] == 1])
        _by_tokens(remaining.pop(0), [row for row in rows if _plain(row) and row["model"] == "Llama-3-8B"])
    for model in models:
        _by_batch(remaining.pop(0), document, model)
    figure.suptitle(f"{document['machine']['processor']}, one thread")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _plain(row: dict[str, Any]) -> bool:
    return (row["sparsity"], row["group_size"], row["dtype"]) == (0.5, 16, "bfloat16")


def _times_as_fast(row: dict[str, Any], name: str) -> float:
    """How many times as fast as torch bf16 a contestant is."""
    ours = speedup(row, name, "torch bf16")
    if ours is not None:
        return ours
    times: dict[str, dict[str, float]] = row["microseconds"]
    return times["torch bf16"]["median"] / times[name]["median"]


def _by_shape(axis: Any, rows: list[dict[str, Any]]) -> None:  # noqa: ANN401 - matplotlib's
    names = [name for name in _COLOURS if any(name in row["microseconds"] for row in rows)]
    for i, name in enumerate(names):
        places = [j + 0.8 * (i / len(names) - 0.4) for j in range(len(rows))]
        heights = [_times_as_fast(row, name) for row in rows]
        axis.barh(places, heights, 0.8 / len(names), label=name, color=_COLOURS[name])
    axis.set_yticks(range(len(rows)), [f"{row['model']}\n{row['layer']} {row['n']}x{row['k']}" for row in rows])
    axis.invert_yaxis()
    axis.tick_params(axis="y", labelsize=7)
    _finish(axis.axvline, axis, "times as fast as torch bf16, M = 1, S50 G16, cold")


def _by_tokens(axis: Any, rows: list[dict[str, Any]]) -> None:  # noqa: ANN401
    for n, style in ((4096, "-o"), (14336, "--s")):
        series = sorted((row for row in rows if (row["n"], row["k"]) == (n, 4096)), key=lambda row: row["m"])
        for name, colour in _COLOURS.items():
            points = [(row["m"], _times_as_fast(row, name)) for row in series if name in row["microseconds"]]
            if points:
                axis.plot(*zip(*points, strict=True), style, color=colour, label=f"{name}, {n} x 4096")
    axis.set_xscale("log", base=2)
    axis.set_xlabel("tokens a call")
    _finish(axis.axhline, axis, "times as fast as torch bf16, S50 G16, cold")


def _by_batch(axis: Any, document: dict[str, Any], model: str) -> None:  # noqa: ANN401
    rows = [row for row in engine_rows(document) if row["model"] == model]
    batches = sorted({row["batch"] for row in rows})
    names = list(dict.fromkeys(row["contestant"] for row in rows))
    for i, name in enumerate(names):
        values = [ratio_to(document, model, batch, name, DENSE) or 0 for batch in batches]
        places = [j + 0.8 * (i / len(names) - 0.4) for j in range(len(batches))]
        axis.bar(places, values, 0.8 / len(names), label=name, color=_ENGINE_COLOURS.get(name))
    axis.set_xticks(range(len(batches)), [f"batch {batch}" for batch in batches])
    _finish(axis.axhline, axis, f"{model}: tokens/s over {DENSE} in vLLM")


def _finish(line: Any, axis: Any, title: str) -> None:  # noqa: ANN401
    line(1, color="black", linewidth=0.8)
    axis.set_title(title, fontsize=9)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=7)
