"""What was measured, as Markdown."""

from typing import Any

from benchmarks.serving.models import FORMS
from benchmarks.tables import NONE, number, table

__all__ = ["markdown"]

Row = dict[str, Any]


def markdown(document: Row) -> str:
    """The whole report.

    Args:
        document: as written to JSON.
    """
    effort, versions = document["effort"], document["versions"]
    lines = [
        f"# Serving: {document['device']}",
        "",
        f"Measured {document['date']} with {', '.join(f'{name} {version}' for name, version in versions.items())}.",
        "",
        f"`vllm bench latency`: one batch, {effort['input_len']} tokens in and {effort['output_len']} out, mean of "
        f"{effort['iterations']} iterations after {effort['warm_up']} to warm up; ms a token: all of that over the "
        f"tokens out. `vllm bench throughput`: {effort['prompts']} random requests of these lengths at once. Weights "
        "are random (`--load-format dummy`); those of INT4 are what lay in memory, which no kernel's time depends on "
        "but through power. GiB: what vLLM says that loading the model took; not said on CPUs.",
        "",
        *table(
            ("model", "form", "measured", "batch", "seconds", "ms a token", "tokens/s", "x FP16", "x INT4", "GiB"),
            [_cells(row, document["rows"]) for row in document["rows"] if "failed" not in row],
            3,
        ),
    ]
    failed = [row for row in document["rows"] if "failed" in row]
    if failed:
        cells = [
            (row["model"], FORMS[row["form"]], _what(row), row["failed"].replace("|", "/"))
            for row in failed
        ]  # fmt: skip
        lines += ["", "## Not measured", "", *table(("model", "form", "what", "why"), cells, 4)]
    return "\n".join(lines) + "\n"


def _what(row: Row) -> str:
    return row["measured"] + (f", batch {row['batch']}" if row["batch"] else "")


def _cells(row: Row, rows: list[Row]) -> list[str]:
    ratios = []
    for form in ("dense", "int4"):
        wanted = {key: row[key] for key in ("model", "measured", "batch")} | {"form": form}
        other = next((each for each in rows if wanted.items() <= each.items() and "failed" not in each), None)
        ratios.append(number(row["tokens_per_second"] / other["tokens_per_second"]) if other else NONE)
    return [
        row["model"],
        FORMS[row["form"]],
        row["measured"],
        str(row["batch"] or NONE),
        number(row["seconds"]),
        number(row["ms_a_token"]),
        number(row["tokens_per_second"], 1),
        *ratios,
        number(row["gib"]),
    ]
