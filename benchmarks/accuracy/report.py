"""What was measured, as Markdown and as a picture of perplexity against bits."""

from pathlib import Path
from typing import Any

from benchmarks.accuracy.methods import ABLATIONS
from benchmarks.tables import NONE, number, table

__all__ = ["markdown", "plot"]

Row = dict[str, Any]
_MARK = "†"


def markdown(document: Row) -> str:
    """The whole report.

    Args:
        document: as written to JSON.
    """
    budget = document["budget"]
    lines = [
        f"# Accuracy: {document['model']}",
        "",
        f"Every method had {budget['samples']} windows of {budget['context']} tokens to calibrate on, the same ones, "
        "but for the named recipes, which take as many as they say; "
        f"those that train end to end saw {budget['tokens']:,} tokens of the same text, or as many as their row says. "
        "Bits are those of the compressed linears, scales, zero points and indices included; head and embedding are "
        "dense in all rows. Minutes: to make the model, on the machine named in the JSON, whatever else ran on it; of "
        "what begins with another row's model the training alone.",
        "",
        f"{document['date']}; " + ", ".join(f"{name} {version}" for name, version in document["versions"].items()),
    ]
    if any(_is_other(row, document) for row in document["rows"]):
        lines += ["", f"{_MARK} Not known to be made from the same text as the rest, in the same order."]
    for name in ("main", *ABLATIONS):
        rows = _methods(document, name)
        if len(rows) > (name != "main"):  # an ablation of one row says nothing
            lines += ["", f"## {name.capitalize()}", "", *_table(rows)]
        if name == "main" and any(row["tasks"] for row in rows):
            lines += ["", "## Tasks", "", "Right answers in percent, ± standard error.", ""]
            lines += _tasks([row for row in rows if row["tasks"]])
    return "\n".join(lines) + "\n"


def _methods(document: Row, table: str) -> list[Row]:
    """One row a method, with its ``label``, ``scores`` and ``tasks``, of those that stand in a table."""
    found: dict[str, Row] = {}
    for kind, key in (("scores", "rows"), ("tasks", "tasks")):
        for row in document[key]:
            if table in row["tables"]:
                label = row["method"] + (f" {_MARK}" if _is_other(row, document) else "")
                found.setdefault(row["method"], row | {"label": label, "scores": [], "tasks": []})[kind].append(row)
    return list(found.values())


def _is_other(row: Row, document: Row) -> bool:
    """Whether a row's calibration text is another than that of the rows measured last."""
    return row["calibration"] not in (None, document["calibration"])


def _table(rows: list[Row]) -> list[str]:
    scores = list(dict.fromkeys(_label(score) for row in rows for score in row["scores"]))
    body = []
    for row in rows:
        found = {_label(score): score["perplexity"] for score in row["scores"]}
        body.append([
            row["label"], number(row["bits_per_weight"]),
            *(number(found.get(score), 1) for score in scores),
            f"{row['tokens_trained']:,}", number(row["minutes"], 0),
        ])  # fmt: skip
    return table(["method", "bits a weight", *scores, "tokens trained on", "minutes"], body)


def _label(score: Row) -> str:
    return f"{score['text']}, context {score['context']} ({score['tokens']:,} tokens, {score['dtype']})"


def _tasks(rows: list[Row]) -> list[str]:
    def label(task: Row) -> str:
        return f"{task['task']} ({task['items']:,} items, {task['dtype']})"

    def accuracy(task: Row) -> str:
        # Length-normalised where there are choices of different lengths, as is usual for these sets.
        name = "acc_norm" if "acc_norm" in task else "acc"
        error = task.get(f"{name}_stderr")
        return number(100 * task[name], 1) + ("" if error is None else f" ± {100 * error:.1f}")

    tasks = list(dict.fromkeys(label(task) for row in rows for task in row["tasks"]))
    body = []
    for row in rows:
        found = {label(task): accuracy(task) for task in row["tasks"]}
        body.append([row["label"], number(row["bits_per_weight"]), *(found.get(task, NONE) for task in tasks)])
    return table(["method", "bits a weight", *tasks], body)


def plot(document: Row, path: Path) -> None:
    """Write a picture of the main rows: perplexity, on the text that most of them have, against bits a weight.

    Args:
        document: as written to JSON.
        path: PNG.
    """
    import matplotlib as mpl  # noqa: PLC0415 - slow to import

    mpl.use("Agg")
    import matplotlib.pyplot as plt  # noqa: PLC0415

    figure, axis = plt.subplots(figsize=(9, 9))
    rows = _methods(document, "main")
    labels = [_label(score) for row in rows for score in row["scores"]]
    text = max(labels, key=labels.count, default="")
    found = [(row, score["perplexity"]) for row in rows for score in row["scores"] if _label(score) == text]
    at_right: list[tuple[float, float]] = []
    for row, perplexity in found:
        bits = row["bits_per_weight"]
        if bits == 16:
            axis.axhline(perplexity, color="gray", linestyle=":")
            axis.annotate("dense", (0, perplexity), xycoords=("axes fraction", "data"), xytext=(4, 4),
                          textcoords="offset points", fontsize=8)  # fmt: skip
            continue
        ours = row["method"].startswith(("W4S", "GQSA"))
        axis.scatter(bits, perplexity, color="tab:blue" if ours else "tab:orange")
        # Of two points side by side one has its name at the left.
        near = any(abs(bits - b) < 0.1 and 0.87 < perplexity / p < 1.15 for b, p in at_right)
        axis.annotate(row["method"], (bits, perplexity), xytext=(-4 if near else 4, 4),
                      ha="right" if near else "left", textcoords="offset points", fontsize=8)  # fmt: skip
        if not near:
            at_right.append((bits, perplexity))
    axis.margins(x=0.35)
    axis.set(xlabel="bits a weight, all included", ylabel="perplexity", yscale="log")
    axis.set_title(f"{document['model']}: {text}")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
