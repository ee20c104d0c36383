"""How steeply the loss of the dense model depends on what each linear puts out."""

import functools
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from vllm_gqsa.offline.stream import Allocate, ModelStream

__all__ = ["WINDOWS", "gradient_squares"]

WINDOWS = 16
"""Calibration windows that gradients are measured on."""


def gradient_squares(
    stream: ModelStream, tokens: torch.Tensor, linears: Sequence[Mapping[str, str]], allocate: Allocate
) -> dict[str, torch.Tensor]:
    """Mean squares of the next-token loss's gradients with respect to the outputs of linears.

    One pass forward and one back with one block in memory at a time: what goes into each block is kept, and the block
    runs again on the way back.

    Args:
        stream: the dense model.
        tokens: ``[windows, context]``.
        linears: of each block, full name by the name within the block.
        allocate: makes an uninitialised float32 tensor on the CPU from its shape.

    Returns:
        Float32 ``[out_features]`` on the device, by full name. Of what no token came by, as an expert that was never
        chosen, ones: its outputs count alike.
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
    found: dict[str, torch.Tensor] = {}
    for index in reversed(range(len(stream))):
        block = stream.block(index)
        sums = _watch_gradients(block.module, linears[index], stream.device)
        for states, gradient in zip(hidden[index], gradients, strict=True):
            state = states.to(stream.device).requires_grad_()
            block(state[None]).backward(gradient[None].to(stream.device))
            assert state.grad is not None
            gradient.copy_(state.grad)
        found |= {
            name: total / tokens.numel() if total.any() else torch.ones_like(total) for name, total in sums.items()
        }
    return found


def _watch_gradients(module: nn.Module, names: Mapping[str, str], device: torch.device) -> dict[str, torch.Tensor]:
    """Sums of squares, which grow when gradients come to the outputs of linears."""
    sums: dict[str, torch.Tensor] = {}

    def note(name: str, _module: nn.Module, _args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        def add(gradient: torch.Tensor) -> None:
            # An OPT's feed-forward layer gets its inputs flattened.
            sums[name] += gradient.flatten(0, -2).square().sum(0)

        output.register_hook(add)

    for local, name in names.items():
        sums[name] = torch.zeros(module.get_parameter(f"{local}.weight").shape[0], device=device)
        module.get_submodule(local).register_forward_hook(functools.partial(note, name))
    return sums
