"""The one error a person can mend: said in one sentence, shown without a traceback by the command line."""

__all__ = ["InputError", "missing_extra"]


class InputError(ValueError):
    """What was asked for cannot be done; the message names the file or value and says what to do."""


def missing_extra(error: ModuleNotFoundError) -> InputError:
    """What to say where a package of the extra ``offline`` is not installed.

    Raises:
        ModuleNotFoundError: what is missing is a part of this package, which no extra would bring.
    """
    package = (error.name or "vllm_gqsa").partition(".")[0]
    if package == "vllm_gqsa":
        raise error
    return InputError(f"{package} is not installed; in a clone of vllm-gqsa: pip install '.[offline]'")
