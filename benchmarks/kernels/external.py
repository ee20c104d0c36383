"""Contestants that torch does not bring: vLLM's Marlin and gemlite's Triton kernels, where they are installed."""

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.errors import BenchmarkError
from benchmarks.gptq import gptq_tensors
from benchmarks.kernels.cases import Weight
from benchmarks.kernels.contestants import INT4_GROUP, Builder, Built, quantized

__all__ = ["BUILDERS", "MARLIN_LIBRARY", "UINT4B8", "missing", "permute_scales"]

MARLIN_LIBRARY = "GQSA_BENCH_MARLIN"
"""Environment variable: path of vLLM's ``_C_stable_libtorch.abi3.so``, which does without the rest of vLLM."""
UINT4B8 = 1125899907892224
"""vLLM's number of the type uint4 with a bias of 8, ``scalar_types.uint4b8.id``."""
_GEMLITE_GROUPS = {4: INT4_GROUP, 2: 64}
_BLOCKS_PER_MULTIPROCESSOR = 4  # that Marlin has locks for; never more than it uses


def missing() -> dict[str, str]:
    """Contestants that cannot take part here, and why."""
    found = {}
    reason = _load_marlin()
    if reason is not None:
        found["Marlin"] = reason
    if importlib.util.find_spec("gemlite") is None:
        found |= dict.fromkeys(("gemlite W4", "gemlite W2"), "not installed: there is no package gemlite")
    return found


@functools.cache
def _load_marlin() -> str | None:
    """Make torch know Marlin; why it does not, or None."""
    library = os.environ.get(MARLIN_LIBRARY)
    if library and not Path(library).is_file():
        return f"not installed: {MARLIN_LIBRARY}={library} is no file"
    try:
        if library:
            torch.ops.load_library(library)
        elif importlib.util.find_spec("vllm") is not None:
            importlib.import_module("vllm._custom_ops")
        else:
            return f"not installed: there is no package vllm, and {MARLIN_LIBRARY} names no library of it"
    except (ImportError, OSError, RuntimeError) as error:
        return f"not installed: vLLM's library cannot be loaded ({str(error).splitlines()[0]})"
    if not hasattr(torch.ops._C, "marlin_gemm"):
        return "not installed: this vLLM was built without Marlin"
    return None


def _call_by_name(op: Any, values: dict[str, Any]) -> torch.Tensor:  # noqa: ANN401 - an op of torch.ops
    """Call an op with the arguments that it has in this version of vLLM.

    Raises:
        BenchmarkError: it has one that is not known here.
    """
    names = [argument.name.removesuffix("_or_none") for argument in op.default._schema.arguments]
    unknown = [name for name in names if name not in values]
    if unknown:
        raise BenchmarkError(f"vLLM's {op} has changed: it wants {', '.join(unknown)}")
    result: torch.Tensor = op(*(values[name] for name in names))
    return result


def permute_scales(scales: torch.Tensor) -> torch.Tensor:
    """Scales ``[K / G, N]`` in the order that Marlin's threads read them, N a multiple of 64."""
    order = [i + 8 * j for i in range(8) for j in range(8)]
    return scales.reshape(-1, len(order))[:, order].reshape(scales.shape).contiguous()


def _marlin(weight: Weight, device: torch.device, copies: Callable[[int], int]) -> Built:
    codes, scales = quantized(weight, 4, INT4_GROUP, torch.float16, device)
    packed = gptq_tensors(codes.t().int(), scales.t())["qweight"]
    size_k, size_n = weight.k, weight.n
    sizes = {"size_k": size_k, "size_n": size_n}
    empty = torch.empty(0, dtype=torch.int32, device=device)
    first = _call_by_name(
        torch.ops._C.gptq_marlin_repack,
        {**sizes, "b_q_weight": packed, "perm": empty, "num_bits": 4, "is_a_8bit": False},
    )
    permuted = permute_scales(scales.t())
    nbytes = first.nbytes + permuted.nbytes
    clones = [(first.clone(), permuted.clone()) for _ in range(copies(nbytes))]
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    locks = torch.zeros(processors * _BLOCKS_PER_MULTIPROCESSOR, dtype=torch.int32, device=device)
    names = ("c", "b_bias", "a_scales", "global_scale", "b_zeros", "g_idx", "perm")
    settings: dict[str, Any] = {
        **dict.fromkeys(names),
        **sizes,
        **{"b_q_type_id": UINT4B8, "b_type_id": UINT4B8, "workspace": locks, "is_k_full": True},
        **{"use_atomic_add": False, "use_fp32_reduce": True, "is_zp_float": False},
    }

    def call(each: tuple[torch.Tensor, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        values = {**settings, "a": x, "b_q_weight": each[0], "b_scales": each[1], "size_m": x.shape[0]}
        return _call_by_name(torch.ops._C.marlin_gemm, values)

    dense = (codes.float() - 8) * scales.float().repeat_interleave(INT4_GROUP, 1)
    return Built([functools.partial(call, each) for each in clones], dense, nbytes, torch.float16)


def _gemlite(weight: Weight, device: torch.device, copies: Callable[[int], int], *, bits: int) -> Built:
    from gemlite.helper import A16W2_HQQ_INT, A16W4_HQQ_INT  # noqa: PLC0415 - slow, and often not there

    group_size = _GEMLITE_GROUPS[bits]
    codes, scales = quantized(weight, bits, group_size, torch.float16, device)
    zeros = torch.full_like(scales, 1 << (bits - 1))
    kind = A16W4_HQQ_INT if bits == 4 else A16W2_HQQ_INT

    def make() -> Any:  # noqa: ANN401
        return kind(device=str(device), dtype=torch.float16).from_weights(codes, scales.clone(), zeros.clone())

    first = make()
    size = sum(each.nbytes for each in (first.W_q, first.scales, first.zeros) if isinstance(each, torch.Tensor))
    clones = [first, *(make() for _ in range(copies(size) - 1))]
    dense = (codes.float() - (1 << (bits - 1))) * scales.float().repeat_interleave(group_size, 1)
    return Built(clones, dense, size, torch.float16)


BUILDERS: dict[str, Builder] = {
    "Marlin": _marlin,
    "gemlite W4": functools.partial(_gemlite, bits=4),
    "gemlite W2": functools.partial(_gemlite, bits=2),
}
