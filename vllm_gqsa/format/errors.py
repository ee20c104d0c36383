"""The one error of the format, and what messages are made of."""

from collections.abc import Sequence

__all__ = ["FormatError", "few"]


class FormatError(ValueError):
    """A GQSA checkpoint breaks the format; the message names the file, module and value at fault.

    In vLLM, which hands tensors out without saying what file they are from, the layer in place of the file.
    """


def few(names: Sequence[str]) -> str:
    """The first three of many names, and how many there are besides: "a, b, c and 9 more"."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
