"""vLLM's own INT4 linear on a CPU: the weight in GPTQ's packing, and the kernel that vLLM picks for it.

vLLM 0.32 gives AWQ and GPTQ checkpoints to the same class on a CPU, CPUWNA16LinearKernel. It repacks the weight and
calls ``torch.ops._C.cpu_gemm_wna16``, on CPUs with AMX ``int4_scaled_mm_cpu`` instead. Here vLLM is asked to choose,
repack and call, as its linear layers do, so that the figures are those of the path a checkpoint would take.
"""

import copy
from typing import Any

import torch

from benchmarks.errors import BenchmarkError
from benchmarks.gptq import gptq_tensors

__all__ = ["Int4Linear"]

# bfloat16 keeps 8 bits; on CPUs with AMX vLLM rounds activations to 8 bits too.
_TOLERANCE = 0.03


class Int4Linear:
    """One weight, repacked by vLLM; a call multiplies by it."""

    def __init__(self, codes: torch.Tensor, scales: torch.Tensor) -> None:
        """Let vLLM choose its kernel and repack.

        Args:
            codes: int32 ``[K, N]``, 0..15.
            scales: bfloat16 or float16 ``[K / group_size, N]``; activations are of the same dtype.

        Raises:
            BenchmarkError: vLLM is not there, or has no INT4 kernel for this shape.
        """
        inputs, outputs = codes.shape
        kernel_type, config = _choose(inputs, outputs, inputs // scales.shape[0], scales.dtype)
        self.kernel_name: str = kernel_type.__name__
        self._kernel: Any = kernel_type(config, "qweight", "scales", "qzeros")
        self._layer = _layer(gptq_tensors(codes, scales))
        self._kernel.process_weights_after_loading(self._layer)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """``x W^T``: ``[M, K]`` to ``[M, N]``."""
        result: torch.Tensor = self._kernel.apply_weights(self._layer, x)
        return result

    @property
    def nbytes(self) -> int:
        """Bytes of the repacked tensors."""
        return sum(parameter.nbytes for parameter in self._layer.parameters())

    def clone(self) -> "Int4Linear":
        """The same weight elsewhere in memory."""
        other = copy.copy(self)
        other._layer = copy.deepcopy(self._layer)
        return other

    def check(self, weight: torch.Tensor) -> float:
        """Compare with a multiplication by the dequantised weight.

        Returns:
            The relative error.

        Raises:
            BenchmarkError: it is larger than rounding explains.
        """
        x = torch.randn(4, weight.shape[1], generator=torch.Generator().manual_seed(0))
        x = x.to(self._layer.get_parameter("scales").dtype)
        expected = x.float() @ weight.float().t()
        error = float((self(x).float() - expected).norm() / expected.norm())
        if not error < _TOLERANCE:
            raise BenchmarkError(f"vLLM's {self.kernel_name} is off by {error:.3f}: its packing has changed")
        return error


def _choose(inputs: int, outputs: int, group_size: int, dtype: torch.dtype) -> tuple[Any, Any]:
    """The kernel class and its configuration, as vLLM's AutoGPTQLinearMethod asks for them."""
    try:
        from vllm.model_executor.kernels.linear import (  # noqa: PLC0415 - slow, and the packing does without vLLM
            MPLinearLayerConfig,
            choose_mp_linear_kernel,
        )
        from vllm.scalar_type import scalar_types  # noqa: PLC0415

        from vllm_gqsa.plugin.amx import request_amx  # noqa: PLC0415

        request_amx()
        config = MPLinearLayerConfig(
            full_weight_shape=(inputs, outputs),
            partition_weight_shape=(inputs, outputs),
            weight_type=scalar_types.uint4b8,
            act_type=dtype,
            group_size=group_size,
            zero_points=False,
        )
        return choose_mp_linear_kernel(config), config
    except (ImportError, TypeError, ValueError) as error:
        raise BenchmarkError(f"vLLM offers no INT4 kernel for {outputs} x {inputs}: {error}") from error


def _layer(tensors: dict[str, torch.Tensor]) -> torch.nn.Module:
    """A module with the attributes that the kernel looks for in a vLLM layer."""
    layer = torch.nn.Module()
    for name, tensor in tensors.items():
        parameter: Any = torch.nn.Parameter(tensor.contiguous(), requires_grad=False)
        parameter.input_dim, parameter.output_dim, parameter.packed_dim = 0, 1, 0
        layer.register_parameter(name, parameter)
    layer.register_parameter("bias", None)
    return layer
