"""What was measured, as Markdown and as a picture of perplexity against bits."""

from pathlib import Path
from typing import Any

from benchmarks.accuracy.methods import ABLATIONS
from benchmarks.tables import NONE, number, table

__all__ = ["markdown", "plot"]

Row = dict[str, Any]


def markdown(document: Row) -> str:
    """The whole report.

    Args:
        document: as written to JSON.
    """
    budget = document["budget"]
    lines = [
        f"# Accuracy: {document['model']}",
        "",
        f"Every method had {budget['samples']} windows of {budget['context']} tokens to calibrate on, the same ones; "
        f"those that train end to end saw {budget['tokens']:,} tokens of the same text, or as many as their row says. "
        "Bits are those of the compressed linears, scales, zero points and indices included; head and embedding are "
        "dense in all rows. Minutes: to make the model, on the machine named in the JSON, whatever else ran on it; of "
        "what begins with another row's model the training alone.",
        "",
        f"{document['date']}; " + ", ".join(f"{name} {version}" for name, version in document["versions"].items()),
    ]
    for name in ("main", *ABLATIONS):
        rows = _methods(document, name)
        if len(rows) > (name != "main"):  # an ablation of one row says nothing
            lines += ["", f"## {name.capitalize()}", "", *_table(rows)]
    return "\n".join(lines) + "\n"


def _methods(document: Row, table: str) -> list[Row]:
    """One row a method, with its ``scores`` and ``tasks``, of those that stand in a table."""
    found: dict[str, Row] = {}
    for kind, key in (("scores", "rows"), ("tasks", "tasks")):
        for row in document[key]:
            if table in row["tables"]:
                found.setdefault(row["method"], row | {"scores": [], "tasks": []})[kind].append(row)
    return list(found.values())


def _table(rows: list[Row]) -> list[str]:
    scores = list(dict.fromkeys(_label(score) for row in rows for score in row["scores"]))
    tasks = list(dict.fromkeys(_task_label(task) for row in rows for task in row["tasks"]))
    body = []
    for row in rows:
        found = {_label(score): score["perplexity"] for score in row["scores"]}
        accuracy = {_task_label(task): _accuracy(task) for task in row["tasks"]}
        body.append([
            row["method"], number(row["bits_per_weight"]),
            *(number(found.get(score), 1) for score in scores), *(accuracy.get(task, NONE) for task in tasks),
            f"{row['tokens_trained']:,}", number(row["minutes"], 0),
        ])  # fmt: skip
    return table(["method", "bits a weight", *scores, *tasks, "tokens trained on", "minutes"], body)


def _label(score: Row) -> str:
    return f"{score['text']}, context {score['context']} ({score['tokens']:,} tokens, {score['dtype']})"


def _task_label(task: Row) -> str:
    return f"{task['task']} ({task['items']:,} items)"


def _accuracy(task: Row) -> str:
    # Length-normalised where there are choices of different lengths, as is usual for these sets.
    value = task.get("acc_norm", task.get("acc"))
    return number(None if value is None else 100 * value, 1, " %")


def plot(document: Row, path: Path) -> None:
    """Write a picture of the main rows: perplexity, on the text that most of them have, against bits a weight.

    Args:
        document: as written to JSON.
        path: PNG.
    """
    import matplotlib as mpl  # noqa: PLC0415 - slow to import

    mpl.use("Agg")
    import matplotlib.pyplot as plt  # noqa: PLC0415

    figure, axis = plt.subplots(figsize=(9, 6))
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
        near = any(abs(bits - b) < 0.1 and 0.8 < perplexity / p < 1.25 for b, p in at_right)
        axis.annotate(row["method"], (bits, perplexity), xytext=(-4 if near else 4, 4),
                      ha="right" if near else "left", textcoords="offset points", fontsize=8)  # fmt: skip
        if not near:
            at_right.append((bits, perplexity))
    axis.margins(x=0.15)
    axis.set(xlabel="bits a weight, all included", ylabel="perplexity", yscale="log")
    axis.set_title(f"{document['model']}: {text}")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
