"""Group-sparse INT4 language models (GQSA) for vLLM and transformers.

vLLM finds :func:`register` through the entry point group ``vllm.general_plugins``. Nothing heavy is imported here.
"""

import logging

__all__ = ["__version__", "register"]

__version__ = "0.1.0"


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
