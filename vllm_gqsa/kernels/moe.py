"""The op ``gqsa::moe``: the routed experts of a mixture-of-experts layer.

The experts of a layer are two matrices: the gate and up projections of all experts stacked, ``[E * 2I, K]``, and their
down projections stacked, ``[E * K, I]``. An expert is a range of rows. Importing this file registers the op.
"""

import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from vllm_gqsa.kernels.cpu import PackedMatrix, linear_cpu
from vllm_gqsa.kernels.embedding import embedding
from vllm_gqsa.kernels.layouts import Matrix, check_use, layout_of, rebuild
from vllm_gqsa.kernels.native import batch_invariant
from vllm_gqsa.kernels.registry import register

__all__ = ["ACTIVATIONS", "moe"]

_NAME = "gqsa::moe"
_SCHEMA = (
    "(Tensor x, Tensor topk_weights, Tensor topk_ids, Tensor[] gate_up, Tensor[] down, str[] layouts, "
    "int[] group_sizes, str activation) -> Tensor"
)

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
}
"""What is done to the gate before it is multiplied by the up projection, by vLLM's names."""

_DENSE_BYTES = 64 << 20
"""Copies of experts' weights expanded at a time, or one where that is larger. vLLM measures how much memory a step
takes with many tokens, and so with one expert at a time; this should not take much more."""


def _moe(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    gate_up: list[torch.Tensor],
    down: list[torch.Tensor],
    layouts: list[str],
    group_sizes: list[int],
    activation: str,
) -> torch.Tensor:
    hidden = x.shape[-1]
    # crow_indices comes first in every layout, and has a row more than the matrix.
    experts = (down[0].shape[0] - 1) // hidden
    width = (gate_up[0].shape[0] - 1) // (2 * experts)
    first = rebuild(gate_up, layouts[0], hidden, group_sizes[0])
    second = rebuild(down, layouts[1], width, group_sizes[1])
    for stack in (first, second):
        check_use(_NAME, x, stack)
    tokens, weights = x.reshape(-1, hidden), topk_weights.float()
    act = ACTIVATIONS[activation]
    may_wait = _host_may_wait(x.device)
    if not may_wait and not batch_invariant() and topk_ids.numel() <= experts:
        out = _gathered(tokens, weights, topk_ids, first, second, act)
    else:
        out = torch.zeros(tokens.shape, dtype=torch.float32, device=x.device)
        assignments = (_chosen if may_wait else _everywhere)(topk_ids, weights, experts)
        for expert, chosen, share in assignments:
            gate, up = _expert(tokens[chosen], first, expert, 2 * width).chunk(2, dim=-1)
            result = _expert(act(gate) * up, second, expert, hidden)
            part = result.float() * share[:, None]
            if not may_wait:  # a token that did not choose the expert has share 0, and its result may have overflowed
                part.masked_fill_(share[:, None] == 0, 0)
            out[chosen] += part
    return out.to(x.dtype).view(x.shape)


def _host_may_wait(device: torch.device) -> bool:
    """Whether Python may look at who was chosen: on a GPU it would stall, and captured graphs forbid it."""
    return device.type == "cpu"


_Assignments = Iterator[tuple[int, torch.Tensor | slice, torch.Tensor]]
"""Expert, which tokens it works on, and with which weights ``[tokens]``."""


def _chosen(topk_ids: torch.Tensor, topk_weights: torch.Tensor, experts: int) -> _Assignments:
    """Only the experts that were chosen, with their tokens."""
    flat = topk_ids.flatten()
    order = flat.argsort(stable=True)
    order = order[int((flat < 0).sum()) :]  # experts of other ranks
    for part in order.split(torch.bincount(flat[order], minlength=experts).tolist()):
        if part.numel():
            yield int(flat[part[0]]), part // topk_ids.shape[1], topk_weights.flatten()[part]


def _everywhere(topk_ids: torch.Tensor, topk_weights: torch.Tensor, experts: int) -> _Assignments:
    """Every expert with all tokens, most of them weighted by 0."""
    for expert in range(experts):
        yield expert, slice(None), topk_weights.where(topk_ids == expert, 0).sum(1)


def _gathered(
    tokens: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    gate_up: Matrix,
    down: Matrix,
    act: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """A few tokens, each with a copy of its own of its experts' weights: ``[M, K]`` in float32."""
    ids = topk_ids.clamp(min=0).flatten()  # in place of experts of other ranks, any; what comes out is dropped

    def multiply(x: torch.Tensor, stack: Matrix, rows: int) -> torch.Tensor:
        step = max(1, _DENSE_BYTES // (rows * stack.in_features * x.element_size()))
        row = torch.arange(rows, device=ids.device)
        products = [
            torch.bmm(embedding(some[:, None] * rows + row, stack, x.dtype), part[..., None])
            for some, part in zip(ids.split(step), x.split(step), strict=True)
        ]
        return torch.cat(products)[..., 0]

    each = tokens.repeat_interleave(topk_ids.shape[1], 0)
    gate, up = multiply(each, gate_up, 2 * down.in_features).chunk(2, dim=-1)
    result = multiply(act(gate) * up, down, gate_up.in_features).float().view(*topk_ids.shape, -1)
    return (result * topk_weights[..., None]).masked_fill_((topk_ids < 0)[..., None], 0).sum(1)


def _expert(x: torch.Tensor, stack: Matrix, expert: int, rows: int) -> torch.Tensor:
    """``x W^T`` with the rows of one expert."""
    start, stop = expert * rows, (expert + 1) * rows
    if isinstance(stack, PackedMatrix):
        weights = stack.out_features * stack.in_features
        kept = stack.scale_zero.shape[0] * stack.group_size / weights
        return linear_cpu(x, stack.part(start, stop), kept=kept)
    return F.linear(x, embedding(torch.arange(start, stop, device=x.device), stack, x.dtype))


def _moe_fake(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    gate_up: list[torch.Tensor],
    down: list[torch.Tensor],
    layouts: list[str],
    group_sizes: list[int],
    activation: str,
) -> torch.Tensor:
    return x.new_empty(x.shape)


register(_NAME, _SCHEMA, _moe, _moe_fake)


def moe(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    gate_up: Matrix,
    down: Matrix,
    activation: str = "silu",
) -> torch.Tensor:
    """Call ``gqsa::moe`` with the tensors of two matrices.

    Args:
        x: float32, float16 or bfloat16 ``[..., K]``; M tokens in all, also none.
        topk_weights: floating point ``[M, k]``.
        topk_ids: integers ``[M, k]``: the experts of each token, all different; a negative one counts for nothing.
        gate_up: ``[E * 2I, K]``, for each expert its gate above its up projection; trusted.
        down: ``[E * K, I]``, trusted; its group size may be another.
        activation: one of :data:`ACTIVATIONS`.

    Returns:
        ``[..., K]`` in the dtype of ``x``: the sum over each token's experts of ``weight * down(activation(gate(x)) *
        up(x))``, summed in float32. On a GPU vLLM's ``VLLM_BATCH_INVARIANT=1`` keeps to one way of multiplying whatever
        the number of tokens.

    Raises:
        ValueError: ``x`` is on another device than the matrices.
        RuntimeError: a gradient is wanted through what :func:`vllm_gqsa.kernels.prepare` returned.
    """
    result: torch.Tensor = torch.ops.gqsa.moe(
        x,
        topk_weights,
        topk_ids,
        list(gate_up.tensors().values()),
        list(down.tensors().values()),
        [layout_of(gate_up), layout_of(down)],
        [gate_up.group_size, down.group_size],
        activation,
    )
    return result
