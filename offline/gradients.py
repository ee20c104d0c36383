"""How steeply the loss of the dense model depends on what each linear puts out, and how large its inputs are."""

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn

from vllm_gqsa.offline.stream import Allocate, ModelStream

__all__ = ["WINDOWS", "Squares", "mean_squares"]

WINDOWS = 16
"""Calibration windows that gradients are measured on."""


class Squares(NamedTuple):
    """Mean squares at a linear.

    Attributes:
        inputs: float32 ``[in_features]``.
        gradients: float32 ``[out_features]``, of the loss with respect to the output.
    """

    inputs: torch.Tensor
    gradients: torch.Tensor


def mean_squares(
    stream: ModelStream, tokens: torch.Tensor, linears: Sequence[Mapping[str, str]], allocate: Allocate
) -> dict[str, Squares]:
    """Mean squares of the inputs of linears, and of the next-token loss's gradients with respect to their outputs.

    One pass forward and one back with one block in memory at a time: what goes into each block is kept, and the block
    runs again on the way back.

    Args:
        stream: the dense model.
        tokens: ``[windows, context]``.
        linears: of each block, full name by the name within the block.
        allocate: makes an uninitialised float32 tensor on the CPU from its shape.

    Returns:
        On the device, by full name. Of what no token came by, as an expert that was never chosen, zeros.
    """
    first = stream.embed(tokens, 1)
    hidden = allocate((len(stream) + 1, *first.shape))
    hidden[0] = first
    for index in range(len(stream)):
        hidden[index + 1] = hidden[index]
        stream.block(index).advance(hidden[index + 1], 1, stream.device)
    gradients = first  # its memory
    for window, states, gradient in zip(tokens, hidden[-1], gradients, strict=True):
        state = states.to(stream.device).requires_grad_()
        logits = stream.logits(window[None], state[None])[0, :-1]
        nn.functional.cross_entropy(logits.float(), window[1:].to(stream.device)).backward()
        assert state.grad is not None
        gradient.copy_(state.grad)
    found: dict[str, Squares] = {}
    for index in reversed(range(len(stream))):
        block = stream.block(index)
        sums = _watch(block.module, linears[index], stream.device)
        for states, gradient in zip(hidden[index], gradients, strict=True):
            state = states.to(stream.device).requires_grad_()
            block(state[None]).backward(gradient[None].to(stream.device))
            assert state.grad is not None
            gradient.copy_(state.grad)
        found |= {name: Squares(*(total / tokens.numel() for total in totals)) for name, totals in sums.items()}
    return found


def _watch(module: nn.Module, names: Mapping[str, str], device: torch.device) -> dict[str, Squares]:
    """Sums of squares, which grow when gradients come to the outputs of linears."""
    sums: dict[str, Squares] = {}

    def note(name: str, _module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        def add(total: torch.Tensor, values: torch.Tensor) -> None:
            # An OPT's feed-forward layer gets its inputs flattened.
            total += values.detach().flatten(0, -2).square().sum(0)

        add(sums[name].inputs, args[0])
        output.register_hook(functools.partial(add, sums[name].gradients))

    for local, name in names.items():
        rows, columns = module.get_parameter(f"{local}.weight").shape
        sums[name] = Squares(torch.zeros(columns, device=device), torch.zeros(rows, device=device))
        module.get_submodule(local).register_forward_hook(functools.partial(note, name))
    return sums
