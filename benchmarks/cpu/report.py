"""What was measured, as Markdown: targets first, then ratios, then the figures behind them."""

from collections.abc import Sequence
from typing import Any

from benchmarks.tables import NONE, number, table

__all__ = ["DENSE", "GQSA", "INT4", "markdown", "ratio_to", "targets"]

GQSA, GQSA_HEAD, INT4, DENSE = "GQSA S50", "GQSA S50, INT4 head", "vLLM INT4", "dense bf16"
Row = dict[str, Any]


def markdown(document: Row) -> str:
    """The whole report.

    Args:
        document: as written to JSON; any of its parts may be missing.
    """
    machine, parts = document["machine"], document["parts"]
    cache = machine["last_level_cache_bytes"] / (1 << 20)
    lines = [
        f"# CPU benchmarks: {machine['processor']}",
        "",
        f"{' '.join(machine['features'])}; last-level cache {cache:.0f} MiB. One thread on one core throughout. "
        "Contestants take turns; figures are medians.",
        "",
        *(f"* {name}: {_circumstances(part)}" for name, part in parts.items()),
    ]
    lines += _section("Targets", _target_table(document))
    lines += _section("Kernels, data not in any cache", _kernel_tables(parts.get("kernels")))
    lines += _section("Decoding, whole models", _engine_table(document))
    return "\n".join(lines).rstrip() + "\n"


def _circumstances(part: Row) -> str:
    """When a part was measured, for how long, on how busy a machine, and what with."""
    versions = (f"{name} {version}" for name, version in part.get("versions", {}).items())
    load = f"load before {number(part.get('load_before'), 1)}"
    eager = part.get("effort", {}).get("eager")
    mode = [] if eager is None else ["without compilation" if eager else "compiled"]
    return ", ".join((part["date"], f"{part['seconds']:.0f} s", load, *mode, *versions))


def _section(title: str, body: Sequence[str]) -> list[str]:
    return ["", f"## {title}", "", *body] if body else []


# -- targets -----------------------------------------------------------------------------------------------


def targets(document: Row) -> list[tuple[str, float, float | None]]:
    """What was aimed at: a description, the least value, and what was measured (None where it was not)."""
    found = []
    for n, k in ((4096, 4096), (14336, 4096)):
        row = kernel_row(document, n, k, 1)
        shape = f"M = 1, {n} x {k}"
        found += [
            (f"{shape}: times as fast as torch bf16", 3.0, speedup(row, "GQSA", "torch bf16")),
            (f"{shape}: times as fast as vLLM INT4", 1.3, speedup(row, "GQSA", "vLLM INT4")),
            (f"{shape}: share of the read bandwidth", 0.7, row["read_share"]["GQSA"] if row else None),
            (f"{shape}, int8 activations: times as fast as torch bf16", 4.5, speedup(row, "GQSA int8", "torch bf16")),
        ]
        for m, least in ((4, 2.0), (8, 2.0), (512, 1 / 1.15)):
            value = speedup(kernel_row(document, n, k, m), "GQSA", "torch bf16")
            found.append((f"M = {m}, {n} x {k}: times as fast as torch bf16", least, value))
    engines = (
        ("1B shape", GQSA, DENSE, 2.2), ("1B shape", GQSA_HEAD, DENSE, 2.2), ("1B shape", GQSA, INT4, 1.2),
        ("SmolLM2-135M", GQSA, DENSE, 1.0),
    )  # fmt: skip
    for model, ours, other, least in engines:
        value = ratio_to(document, model, 1, ours, other)
        found.append((f"{model} in vLLM, one request: {ours} times the tokens/s of {other}", least, value))
    return found


def _target_table(document: Row) -> list[str]:
    rows = []
    for what, least, value in targets(document):
        verdict = NONE if value is None else "yes" if value >= least else "no"
        rows.append((what, number(least), number(value), verdict))
    return table(("what", "target", "measured", "met"), rows)


# -- kernels -----------------------------------------------------------------------------------------------


def kernel_row(document: Row, n: int, k: int, m: int) -> Row | None:
    """The case of one shape and number of tokens, at 50 % and groups of 16, bfloat16."""
    wanted = {"n": n, "k": k, "m": m, "sparsity": 0.5, "group_size": 16, "dtype": "bfloat16"}
    rows = document["parts"].get("kernels", {}).get("rows", [])
    return next((row for row in rows if wanted.items() <= row.items()), None)


def speedup(row: Row | None, ours: str, other: str) -> float | None:
    """How many times faster ours was in one case; None where one of them did not take part."""
    return None if row is None else row["speedup"].get(ours, {}).get(other)


def _kernel_tables(part: Row | None) -> list[str]:
    if part is None:
        return []
    names = _names(part["rows"])
    others = [name for name in names if not name.startswith("GQSA")]
    int8 = "GQSA int8" in names
    what = ("model", "layer", "N x K", "M", "S", "G", "x in")
    header = (*what, *(f"x {name}" for name in others), "of read speed", *(["int8: x torch bf16"] if int8 else []))
    ratios, times = [], []
    for row in part["rows"]:
        label = _label(row)
        cells = [number(speedup(row, "GQSA", other)) for other in others]
        share = number(100 * row["read_share"]["GQSA"], 0, " %")
        ratios.append((*label, *cells, share, *([number(speedup(row, "GQSA int8", "torch bf16"))] if int8 else [])))
        medians = {name: each["median"] for name, each in row["microseconds"].items()}
        times.append((*label, *(number(medians.get(name), 0) for name in names), number(row["read_gb_per_s"], 1)))
    return [
        "How many times as fast as each other GQSA is; and which share of the speed at which one thread reads "
        f"memory ({part['read_loop']}) it reads its weight at. torch: F.linear. vLLM bf16: its own dense linear, the "
        f"weight packed beforehand. vLLM INT4: {part['rows'][0]['int4_kernel']}.",
        "",
        *table(header, ratios, 3),
        "",
        "Microseconds a call:",
        "",
        *table((*what, *names, "read GB/s"), times, 3),
    ]


def _names(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row["microseconds"]))


def _label(row: Row) -> tuple[str, ...]:
    dtype = {"bfloat16": "bf16", "float32": "fp32"}[row["dtype"]]
    sizes = (str(row["m"]), f"{100 * row['sparsity']:.0f} %", str(row["group_size"]))
    return (row["model"], row["layer"], f"{row['n']} x {row['k']}", *sizes, dtype)


# -- engines -----------------------------------------------------------------------------------------------


def engine_rows(document: Row) -> list[Row]:
    """Rows of vLLM and of llama.cpp; each knows the date of its run."""
    parts = [document["parts"][name] for name in ("engines", "llamacpp") if name in document["parts"]]
    rows = [{**row, "date": part["date"]} for part in parts for row in part["rows"]]
    return sorted(rows, key=lambda row: (row["model"], row["batch"]))


def ratio_to(document: Row, model: str, batch: int, ours: str, other: str) -> float | None:
    """Tokens a second over those of another contestant, None unless both were measured in one run."""
    rows = {row["contestant"]: row for row in engine_rows(document) if (row["model"], row["batch"]) == (model, batch)}
    if ours not in rows or other not in rows or rows[ours]["date"] != rows[other]["date"]:
        return None
    value: float = rows[ours]["tokens_per_second"] / rows[other]["tokens_per_second"]
    return value


def _engine_table(document: Row) -> list[str]:
    rows = engine_rows(document)
    if not rows:
        return []
    cells = []
    for row in rows:
        ratios = [ratio_to(document, row["model"], row["batch"], row["contestant"], other) for other in (DENSE, INT4)]
        cells.append(
            (
                row["model"],
                row["contestant"],
                str(row["batch"]),
                *map(number, ratios),
                number(row["tokens_per_second"], 1),
                number(row["step_ms"], 1),
                number(row["linears_ms"], 1),
                number(row["lm_head_ms"], 1),
                number(row["prefill_ms"], 0),
                number(row["bits_per_weight"]),
            )
        )
    header = ("model", "contestant", "batch", f"x {DENSE}", f"x {INT4}", "tokens/s", "ms a step")
    inside = ("of it linears", "of it output layer", "ms prefill", "bits a weight")
    return [
        "Tokens a second of all requests together after their first tokens; prompts of 32 tokens. The output layer "
        "is dense bf16 in vLLM but where it says INT4 head, and quantised in llama.cpp. Bits a weight: in vLLM of the "
        "linear layers, in llama.cpp of the whole model.",
        "",
        *table((*header, *inside), cells, 2),
    ]
