"""``y = x W^T`` with a group-sparse INT4 weight: importing this package registers the op ``gqsa::linear``.

Needs torch, not vLLM.
"""

from vllm_gqsa.kernels.ops import linear, prepare, restore

__all__ = ["linear", "prepare", "restore"]
