"""``y = x W^T`` with a group-sparse INT4 weight: importing this package registers the op ``gqsa::linear``.

Needs torch, not vLLM.
"""

from vllm_gqsa.kernels.layouts import Matrix, layout_of, prepare, rebuild, restore
from vllm_gqsa.kernels.ops import linear

__all__ = ["Matrix", "layout_of", "linear", "prepare", "rebuild", "restore"]
