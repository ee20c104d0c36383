"""Tables and figures in Markdown."""

from collections.abc import Iterable, Sequence

__all__ = ["NONE", "number", "table"]

NONE = "–"


def table(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> list[str]:
    """A Markdown table, its first ``left`` columns set left, the others right."""
    rule = [":--" if i < left else "--:" for i in range(len(header))]
    return [f"| {' | '.join(cells)} |" for cells in (header, rule, *rows)]


def number(value: float | None, digits: int = 2, unit: str = "") -> str:
    """A figure, or a dash where there is none."""
    return NONE if value is None else f"{value:.{digits}f}{unit}"
