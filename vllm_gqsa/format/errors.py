"""The one error of the format."""

__all__ = ["FormatError"]


class FormatError(ValueError):
    """A GQSA checkpoint breaks the format; the message names the file, module and value at fault."""
