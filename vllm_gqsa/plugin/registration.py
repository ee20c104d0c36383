"""Registration with vLLM, in every process; see :func:`vllm_gqsa.register` for the promise that it keeps."""

import importlib
import logging
import multiprocessing
from typing import Any

from vllm_gqsa import TESTED_VLLM, is_tested_with

__all__ = ["register"]

logger = logging.getLogger(__name__)


class _State:
    registered = False


def register() -> None:
    """Register ``gqsa``, or a stand-in that says what is broken when a GQSA checkpoint is loaded.

    Raises:
        Exception: vLLM itself cannot be imported or has no registry; the caller logs it.
    """
    if _State.registered:
        return
    vllm_quantization = importlib.import_module("vllm.model_executor.layers.quantization")
    _warn_if_untested()
    try:
        config_class = importlib.import_module("vllm_gqsa.plugin.config").GqsaQuantizationConfig
    except Exception as error:  # noqa: BLE001 - whatever it is, it is said when the method is asked for
        config_class = _broken_config(error)
    vllm_quantization.register_quantization_config("gqsa")(config_class)
    _State.registered = True
    try:
        from vllm_gqsa.plugin.amx import request_amx  # noqa: PLC0415

        request_amx()
    except Exception:
        logger.warning("vllm-gqsa could not ask the kernel for AMX; bfloat16 may crash on this CPU", exc_info=True)


def _warn_if_untested() -> None:
    version = str(getattr(importlib.import_module("vllm"), "__version__", "unknown"))
    # Those that vLLM starts register too; once is enough.
    if multiprocessing.parent_process() is None and not is_tested_with(version):
        tested = " and ".join(TESTED_VLLM)
        logger.warning("vllm-gqsa is tested with vLLM %s; this is %s and may or may not work", tested, version)


def _broken_config(cause: Exception) -> type[Any]:
    """A config class that can be registered and listed, and whose every use says ``cause``."""
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig  # noqa: PLC0415

    message = (
        f"vllm-gqsa is installed but cannot be imported ({type(cause).__name__}: {cause}); "
        "reinstall vllm-gqsa to load GQSA checkpoints"
    )

    class BrokenGqsaConfig(QuantizationConfig):
        """Stands where the real config should be."""

        def __init__(self) -> None:
            raise ImportError(message) from cause

        @classmethod
        def from_config(cls, config: dict[str, Any]) -> "BrokenGqsaConfig":
            raise ImportError(message) from cause

        def get_name(self) -> str:
            return "gqsa"

        def get_supported_act_dtypes(self) -> list[Any]:
            return []

        @classmethod
        def get_min_capability(cls) -> int:
            return 0

        @staticmethod
        def get_config_filenames() -> list[str]:
            return []

        def get_quant_method(self, layer: Any, prefix: str) -> None:  # noqa: ANN401 - vLLM's type
            raise ImportError(message) from cause

    return BrokenGqsaConfig
