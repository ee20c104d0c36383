"""Permission to use AMX tiles, which Linux grants to a process only when it asks."""

import logging

import torch

__all__ = ["request_amx"]

logger = logging.getLogger(__name__)


def request_amx() -> bool:
    """Ask for AMX in this process where vLLM runs on a CPU that has it.

    vLLM 0.32 picks AMX kernels by what the CPU can do, without asking; in bfloat16 the process then dies with
    SIGILL unless some other library asked before. Torch asks when told to.

    Returns:
        Whether AMX was asked for and granted.
    """
    from vllm.platforms import current_platform  # noqa: PLC0415 - torch-only users import this package too

    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
    init = getattr(torch.cpu, "_init_amx", None)
    if not current_platform.is_cpu() or supported is None or init is None or not supported():
        return False
    granted = bool(init())
    if not granted:
        logger.warning("this CPU has AMX but the kernel refused it; bfloat16 may crash in vLLM's AMX kernels")
    return granted
