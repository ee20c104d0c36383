"""The one error a person can mend: said in one sentence, shown without a traceback by the command line."""

__all__ = ["InputError"]


class InputError(ValueError):
    """What was asked for cannot be done; the message names the file or value and says what to do."""
