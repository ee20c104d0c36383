"""What was measured, as Markdown."""

from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.kernels.cases import GQSA, TAKING_PART
from benchmarks.tables import NONE, number, table

__all__ = ["CUBLAS", "cases", "fit", "layers", "limit_microseconds", "markdown", "share", "speedup"]

Row = dict[str, Any]
CUBLAS = "cuBLAS fp16"
_CASE = ("part", "model", "layer", "n", "k", "sparsity", "group_size", "rows", "m")
_ACTIVATION_BYTES = 2


def markdown(document: Row) -> str:
    """The whole report.

    Args:
        document: as written to JSON.
    """
    machine, effort = document["machine"], document["effort"]
    versions = (f"{name} {version}" for name, version in machine["versions"].items() if version)
    lines = [
        f"# GPU kernels: {machine['gpu']}",
        "",
        f"Measured {document['date']} in {document['seconds']:.0f} s, {effort['mode']} mode, activations of GQSA in "
        f"{effort['dtype']}; {', '.join(versions)}.",
        f"{machine['multiprocessors']} multiprocessors, second-level cache {machine['cache_bytes'] / (1 << 20):.0f} "
        f"MiB. It reads {machine['read_bytes_per_second'] / 1e12:.2f} TB/s ({machine['read_loop']}), multiplies fp16 "
        f"matrices at {machine['flops'] / 1e12:.0f} TFLOP/s (cuBLAS, 8192 x 8192 x 8192), and an empty kernel takes "
        f"{machine['launch_microseconds']:.2f} microseconds in a graph.",
        "",
        "Microseconds a call: medians of replays of CUDA graphs with at least 100 launches, which go round copies of "
        "the weight that fill the second-level cache four times. Every result was compared with a product by the dense "
        "weight first. The share is that of a limit: the bytes of weight, activations and result at the read speed, or "
        "a dense product at that of cuBLAS, whichever takes longer.",
    ]
    if document["left_out"]:
        lines += ["", f"**{document['left_out']} figures were left out: the time did not suffice.**"]
    lines += _section("Layers", layers(document))
    lines += _section("Division of work: gemv by records (as used) and by rows", _compare(document, "division"))
    lines += _section("Choice of kernel", _compare(document, "choice"))
    lines += _section("Sparsity", _compare(document, "sparsity"))
    lines += _section("Group size", _compare(document, "groups"))
    lines += _section("Fixed time and rate", _fits(document))
    lines += _section("Not measured", _failures(document))
    return "\n".join(lines).rstrip() + "\n"


def _section(title: str, body: Sequence[str]) -> list[str]:
    return ["", f"## {title}", "", *body] if body else []


def cases(document: Row, part: str) -> Iterator[tuple[Row, dict[str, Row]]]:
    """The cases of a part that have figures, each with its rows by contestant."""
    found: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in document["rows"]:
        if row["part"] == part and "failed" not in row:
            found.setdefault(tuple(row[key] for key in _CASE), {})[row["contestant"]] = row
    for key, rows in found.items():
        yield dict(zip(_CASE, key, strict=True)), rows


def _median(row: Row) -> float:
    median: float = row["microseconds"]["median"]
    return median


def limit_microseconds(row: Row, machine: Row) -> float:
    """The least that a call can take: its bytes at the read speed, or a dense product at that of cuBLAS."""
    moved = row["bytes"] + _ACTIVATION_BYTES * row["m"] * (row["n"] + row["k"])
    products = 2 * row["m"] * row["n"] * row["k"]
    return float(1e6 * max(moved / machine["read_bytes_per_second"], products / machine["flops"]))


def share(row: Row, machine: Row) -> float:
    """Of the limit, 0..1; more where the data was not cold, or 2:4 multiplies faster than a dense product."""
    return limit_microseconds(row, machine) / _median(row)


def speedup(rows: dict[str, Row], ours: str, other: str) -> float | None:
    """How many times as fast ours is; None where one of them has no figure."""
    if ours not in rows or other not in rows:
        return None
    return _median(rows[other]) / _median(rows[ours])


def layers(document: Row) -> list[str]:
    """The table of all contestants: time and share of the limit, and how many times as fast GQSA is."""
    machine, part = document["machine"], list(cases(document, "layers"))
    if not part:
        return []
    others = [name for name in TAKING_PART["layers"][1:] if any(name in rows for _, rows in part)]
    body = []
    for case, rows in part:
        cells = [case["model"], case["layer"], f"{case['n']} x {case['k']}", str(case["m"])]
        ours = rows.get(GQSA)
        cells += [ours["kernel"], _megabytes(ours)] if ours else [NONE, NONE]
        cells.append(_cell(ours, machine))
        for name in others:
            cells += [_cell(rows.get(name), machine), number(speedup(rows, GQSA, name))]
        body.append(cells)
    header = ["model", "layer", "N x K", "M", "kernel", "MB", GQSA]
    for name in others:
        header += [name, "x"]
    kinds = sorted({row["kernel"] for _, rows in part for row in rows.values() if row["contestant"] == "torch 2:4"})
    sizes = {name: _bits(part, name) for name in (GQSA, *others)}
    notes = [
        "Microseconds (share of the limit); x: how many times as fast as this GQSA is. GQSA at 50 %, groups of 16; MB: "
        "its weight. Bits a weight of the dense matrix: "
        + ", ".join(f"{name} {number(bits)}" for name, bits in sizes.items())
        + (f". torch 2:4 by {', '.join(kinds)}." if kinds else "."),
        "",
    ]
    return [*notes, *table(header, body, 3)]


def _bits(part: Sequence[tuple[Row, dict[str, Row]]], name: str) -> float | None:
    rows = [rows[name] for _, rows in part if name in rows]
    return 8 * sum(row["bytes"] for row in rows) / sum(row["n"] * row["k"] for row in rows) if rows else None


def _megabytes(row: Row) -> str:
    return number(row["bytes"] / 1e6, 1)


def _cell(row: Row | None, machine: Row) -> str:
    return NONE if row is None else f"{number(_median(row), 1)} ({number(100 * share(row, machine), 0)} %)"


def _compare(document: Row, part: str) -> list[str]:
    """The table of one of the smaller parts: all its contestants side by side, and who was fastest."""
    machine, found = document["machine"], list(cases(document, part))
    if not found:
        return []
    names = [name for name in TAKING_PART[part] if any(name in rows for _, rows in found)]
    body = []
    for case, rows in found:
        cells = [f"{case['n']} x {case['k']}", case["rows"], str(case["m"])]
        cells += [number(100 * case["sparsity"], 0, " %"), str(case["group_size"])]
        for name in names:
            cells += [_cell(rows.get(name), machine), _megabytes(rows[name]) if name in rows else NONE]
        cells.append(min(rows, key=lambda name: _median(rows[name])))
        body.append(cells)
    header = ["N x K", "rows", "M", "S", "G"]
    for name in names:
        header += [name, "MB"]
    return table([*header, "fastest"], body, 2)


def fit(points: Sequence[tuple[float, float]]) -> tuple[float, float] | None:
    """Least squares: intercept and slope; None for fewer than three distinct places."""
    if len({x for x, _ in points}) < 3:
        return None
    mean_x, mean_y = (sum(each) / len(points) for each in zip(*points, strict=True))
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)
    return mean_y - slope * mean_x, slope


def _fits(document: Row) -> list[str]:
    part = [(case, rows) for case, rows in cases(document, "layers") if case["m"] == 1]
    body = []
    for name in TAKING_PART["layers"]:
        points = [(rows[name]["bytes"], _median(rows[name])) for _, rows in part if name in rows]
        found = fit(points)
        if found is not None:
            fixed, slope = found
            rate = 1 / slope / 1e6 if slope > 0 else None
            body.append((name, str(len(points)), number(fixed, 1), number(rate)))
    if not body:
        return []
    note = "M = 1 over all layers, by least squares: time = fixed + bytes of the weight / rate."
    return [note, "", *table(("contestant", "layers", "fixed, microseconds", "rate, TB/s"), body)]


def _failures(document: Row) -> list[str]:
    """One line for every contestant and reason, with the first case and how many there were."""
    found: dict[tuple[str, str], list[str]] = {}
    for name, reason in document["machine"]["missing"].items():
        found[name, reason] = ["all"]
    for row in document["rows"]:
        if "failed" in row:
            case = f"{row['n']} x {row['k']}, M = {row['m']}"
            found.setdefault((row["contestant"], row["failed"]), []).append(case)
    body = []
    for (name, reason), where in found.items():
        more = f" and {len(where) - 1} more" if len(where) > 1 else ""
        body.append((name, reason.replace("|", "/"), f"{where[0]}{more}"))
    return table(("contestant", "why", "where"), body, 3) if body else []
