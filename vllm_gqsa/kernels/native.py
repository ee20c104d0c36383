"""The library of native code that runs on the CPU (csrc/cpu, csrc/common): finding it, and torch's threads for it.

It has a plain C interface and is called through ctypes, so one build serves every version of torch and Python. It runs
on torch's own threads, which vLLM binds to cores, through ``torch_parallel_for`` of libtorch's stable C interface
(torch 2.10 on).
"""

import ctypes
import functools
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

__all__ = ["available", "batch_invariant", "library", "open_library", "parallel_for"]

Signatures = Mapping[str, tuple[Any, ...]]
"""Type of the result, then those of the arguments, by the name of a C function."""

_logger = logging.getLogger(__name__)

_LIBRARY = Path(__file__).with_name("_cpu.so")


def open_library(path: Path, signatures: Signatures) -> ctypes.CDLL:
    """Load a library of this package and tell ctypes the types of its functions.

    Raises:
        RuntimeError: it is broken, or belongs to another version or machine.
    """
    try:
        found = ctypes.CDLL(str(path))
        for name, (result, *arguments) in signatures.items():
            function = getattr(found, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise RuntimeError(
            f"{path}: does not fit this vllm-gqsa or this machine ({error}); install vllm-gqsa again to build it"
        ) from error
    return found


@functools.cache
def available() -> bool:
    """Whether the native kernels were built; says so once where they were not."""
    if not _LIBRARY.exists():
        _logger.warning(
            "vllm-gqsa was installed without its CPU kernels, because no C++ compiler was found then: every linear "
            "expands its whole weight on every call, which is slow. Install g++ or clang++ and vllm-gqsa again."
        )
        return False
    return True


def library(signatures: Signatures) -> ctypes.CDLL:
    """The library, with the functions that the caller needs.

    Raises:
        RuntimeError: it was not built, or does not fit.
    """
    if not available():
        raise RuntimeError("vllm-gqsa was installed without its CPU kernels")
    return open_library(_LIBRARY, signatures)


@functools.cache
def parallel_for() -> int | None:
    """Address of libtorch's ``torch_parallel_for``; None (one thread) in a build of torch that hides it."""
    libtorch = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    try:
        function = libtorch.torch_parallel_for
    except AttributeError:
        _logger.warning("torch %s has no torch_parallel_for: the CPU kernels run on one thread", torch.__version__)
        return None
    return ctypes.cast(function, ctypes.c_void_p).value


def batch_invariant() -> bool:
    """Whether a token's result must not depend on how many there are: vLLM's ``VLLM_BATCH_INVARIANT=1``."""
    return os.environ.get("VLLM_BATCH_INVARIANT") == "1"
