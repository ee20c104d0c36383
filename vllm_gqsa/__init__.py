"""Group-sparse INT4 language models (GQSA) for vLLM and transformers.

vLLM finds :func:`register` through the entry point group ``vllm.general_plugins``. Nothing heavy is imported here.
"""

import logging

__all__ = ["TESTED_VLLM", "__version__", "is_tested_with", "register"]

__version__ = "0.1.0"

TESTED_VLLM = ("0.29", "0.32")
"""The versions of vLLM that this package is tested with; see docs/compatibility.md."""


def is_tested_with(vllm: str) -> bool:
    """Whether a version of vLLM, for example 0.32.0+cpu, is one of :data:`TESTED_VLLM`."""
    return vllm.startswith(tuple(f"{version}." for version in TESTED_VLLM))


def register() -> None:
    """Make the quantization method ``gqsa`` known to vLLM, in every process that vLLM starts.

    Called again it does nothing. It never raises, since an exception here would stop every vLLM command in the
    environment, for any model: what fails is kept and said when a GQSA checkpoint is loaded.
    """
    try:
        from vllm_gqsa.plugin import registration  # noqa: PLC0415 - importing the package must stay cheap

        registration.register()
    except Exception:
        logging.getLogger(__name__).warning(
            "vllm-gqsa could not register with vLLM; GQSA checkpoints will not load", exc_info=True
        )
