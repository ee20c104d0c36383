"""The picture of the report."""

from pathlib import Path
from typing import Any

from benchmarks.kernels.cases import GQSA, TAKING_PART
from benchmarks.kernels.report import CUBLAS, cases, speedup

__all__ = ["plot"]


def plot(document: dict[str, Any], path: Path) -> bool:
    """Write a picture of how many times as fast as cuBLAS all are: by layer, by tokens, by sparsity.

    Args:
        document: as written to JSON.
        path: PNG.

    Returns:
        Whether there is matplotlib to draw it.
    """
    try:
        import matplotlib as mpl  # noqa: PLC0415 - slow to import, and not needed to measure
    except ImportError:
        return False
    mpl.use("Agg")
    import matplotlib.pyplot as plt  # noqa: PLC0415

    figure, axes = plt.subplots(1, 3, figsize=(19, 6))
    _by_layer(axes[0], document)
    _by_tokens(axes[1], document)
    _by_sparsity(axes[2], document)
    for axis in axes:
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7)
    figure.suptitle(f"{document['machine']['gpu']}: times as fast as {CUBLAS}")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True


def _by_layer(axis: Any, document: dict[str, Any]) -> None:  # noqa: ANN401 - matplotlib's
    part = [(case, rows) for case, rows in cases(document, "layers") if case["m"] == 1]
    names = TAKING_PART["layers"]
    for i, name in enumerate(names):
        places = [j + 0.8 * (i / len(names) - 0.4) for j in range(len(part))]
        heights = [speedup(rows, name, CUBLAS) or 0 for _, rows in part]
        if any(heights):
            axis.barh(places, heights, 0.8 / len(names), label=name, color=f"C{i}")
    axis.set_yticks(range(len(part)), [f"{case['layer']} {case['n']}x{case['k']}" for case, _ in part], fontsize=7)
    axis.invert_yaxis()
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set_title("M = 1, GQSA at 50 %, groups of 16", fontsize=9)


def _by_tokens(axis: Any, document: dict[str, Any]) -> None:  # noqa: ANN401
    for shape, style in (((4096, 4096), "-o"), ((28672, 4096), "--s")):
        part = [(case, rows) for case, rows in cases(document, "layers") if (case["n"], case["k"]) == shape]
        for i, name in enumerate(TAKING_PART["layers"]):
            points = [(case["m"], speedup(rows, name, CUBLAS)) for case, rows in part]
            points = sorted((m, value) for m, value in points if value is not None)
            if points and name != CUBLAS:
                label = f"{name}, {shape[0]} x {shape[1]}"
                axis.plot(*zip(*points, strict=True), style, color=f"C{i}", label=label)
    axis.set_xscale("log", base=2)
    axis.set_xlabel("tokens a call")
    axis.axhline(1, color="black", linewidth=0.8)
    axis.set_title("by tokens", fontsize=9)


def _by_sparsity(axis: Any, document: dict[str, Any]) -> None:  # noqa: ANN401
    part = list(cases(document, "sparsity"))
    for m in sorted({case["m"] for case, _ in part}):
        points = [(100 * case["sparsity"], speedup(rows, GQSA, CUBLAS)) for case, rows in part if case["m"] == m]
        points = [(x, value) for x, value in points if value is not None]
        if points:
            axis.plot(*zip(*points, strict=True), "-o", label=f"M = {m}")
    axis.set_xlabel("groups pruned, %")
    axis.axhline(1, color="black", linewidth=0.8)
    axis.set_title("8192 x 8192 by sparsity", fontsize=9)
