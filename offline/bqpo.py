"""BQPO: kept weights, scales and zero points of one block, trained against the dense block's output.

The block is fed what the compressed model feeds it and is to give what the dense block gives on what the dense model
feeds that one, so each block also makes up for errors of those before it. The last one is trained against the dense
model's next-token distributions: what errors are left do not all count alike there. On the device are one block's
weights, gradients and optimiser state, and what stands outside the blocks; both streams of hidden states stay where
they are.
"""

import torch
from torch import nn

from vllm_gqsa.offline.arithmetic import mixed, reproducible, resolve_precision
from vllm_gqsa.offline.block import BlockContext, CompressedBlock, Logits
from vllm_gqsa.offline.errors import InputError
from vllm_gqsa.offline.quantizer import GroupSparseLinear
from vllm_gqsa.offline.recipe import BlockTraining
from vllm_gqsa.offline.training import Optimizer, divergence, replace_linears, sample_order

__all__ = ["bqpo"]


def bqpo(context: BlockContext, state: CompressedBlock) -> CompressedBlock:
    """Train one block; its best state by the judging windows counts, the one it began with among them.

    Raises:
        InputError: the loss is not finite, or there is only one calibration window.
    """
    settings = context.recipe.bqpo
    if settings is None:
        raise ValueError("the recipe has no bqpo")
    if not state.matrices:  # every linear of the block is left dense
        context.step(settings.epochs)
        return state
    module = context.block.module
    dense = {local: module.get_submodule(local) for local in context.local.values()}
    linears = {
        context.local[name]: GroupSparseLinear(matrix, dense[context.local[name]].bias, context.device)  # type: ignore[arg-type]
        for name, matrix in state.matrices.items()
    }
    kinds = replace_linears(module, linears, settings)
    others = {id(p): name for name, p in module.named_parameters()}
    changed = {others[id(p)]: p for p in kinds.get("norm_lr", [])}
    with reproducible(context.device):
        _train(context, settings, kinds)
    for local, linear in dense.items():
        module.set_submodule(local, linear)
    module.requires_grad_(requires_grad=False)
    return CompressedBlock(
        {name: linears[context.local[name]].matrix() for name in state.matrices},
        {context.prefix + name: p.detach().cpu().clone() for name, p in changed.items()},
    )


def _train(context: BlockContext, settings: BlockTraining, kinds: dict[str, list[nn.Parameter]]) -> None:
    windows, judges = context.windows
    if not len(windows):
        raise InputError(f"block {context.index}: BQPO needs two calibration windows or more; give more --samples")
    precision = resolve_precision(context.recipe.precision, context.device)
    steps = -(-len(windows) // settings.batch)
    optimizer = Optimizer(kinds, settings, settings.epochs * steps)
    parameters = [p for group in kinds.values() for p in group]
    best = _loss(context, settings, precision, judges)
    curve, kept, idle = [best], _copy(parameters), 0
    for epoch in range(settings.epochs):
        order = windows[sample_order(len(windows), epoch, context.recipe.seed)]
        for number, part in enumerate(order.split(settings.batch)):
            loss = _loss(context, settings, precision, part, backward=True)
            optimizer.step(epoch * steps + number, loss, f"BQPO of block {context.index}")
        curve.append(_loss(context, settings, precision, judges))
        if curve[-1] < best:
            best, kept, idle = curve[-1], _copy(parameters), 0
        else:
            idle += 1
        context.step(1)
        if idle == settings.patience:
            context.step(settings.epochs - epoch - 1)
            break
    with torch.no_grad():
        for parameter, value in zip(parameters, kept, strict=True):
            parameter.copy_(value)
    context.facts["curve"] = curve


def _copy(parameters: list[nn.Parameter]) -> list[torch.Tensor]:
    return [p.detach().cpu().clone() for p in parameters]


def _loss(
    context: BlockContext, settings: BlockTraining, precision: str, windows: torch.Tensor, *, backward: bool = False
) -> float:
    """Mean loss over all positions of some windows; with ``backward`` its gradients are added up too."""
    total = 0.0
    for part in context.batches(windows):
        targets = context.targets[part].to(context.device)
        with torch.set_grad_enabled(backward), mixed(precision, context.device):
            out = context.block(context.inputs[part].to(context.device)).float()
        if context.logits is not None and settings.last_block == "kl":
            losses = _divergences(context.logits, precision, part, out, targets)
        else:
            squares = (out - targets).square().mean(-1)
            if settings.loss == "token":
                squares = squares / targets.square().mean(-1)
            elif settings.loss == "update":
                squares = squares / context.error_scale[part].to(context.device)
            losses = squares.mean(-1)
        loss = losses.sum() / len(windows)
        if backward:
            loss.backward()
        total += float(loss.detach())
    return total


def _divergences(
    head: Logits, precision: str, windows: torch.Tensor, out: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """KL divergences from the dense model's next-token distributions, ``[windows]``; one window at a time, since a
    vocabulary is wide.
    """
    pieces = []
    for window, ours, theirs in zip(windows.tolist(), out, targets, strict=True):
        with mixed(precision, out.device):
            logits, wanted = head(window, ours), head(window, theirs)
        pieces.append(divergence(logits, wanted))
    return torch.stack(pieces)
