"""A causal language model run block by block, so that one transformer block is in memory at a time."""

import copy
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from vllm_gqsa.experts import empty_model, fused_experts, is_text_model
from vllm_gqsa.offline.attention import use_plain_attention
from vllm_gqsa.offline.errors import InputError
from vllm_gqsa.offline.families import Family

__all__ = ["Allocate", "BlockRunner", "ModelStream", "TensorSource", "load_weights", "meta_model", "watch_inputs"]


Allocate = Callable[[tuple[int, ...]], torch.Tensor]


class TensorSource(Protocol):
    """Anything that hands out dense tensors by their name in the causal language model."""

    def __contains__(self, name: str) -> bool: ...
    def tensor(self, name: str) -> torch.Tensor:
        """The tensor, on the CPU, in any floating-point dtype."""
        ...


def meta_model(config: Any) -> Any:  # noqa: ANN401 - transformers chooses the class
    """The model of a transformers config without any memory for weights; its tensors have the names they have in files.

    Raises:
        InputError: transformers has no causal language model for it or cannot build it, or it has unknown experts.
    """
    if not is_text_model(config):
        raise InputError(
            f"model_type {config.model_type!r} is no causal language model of text alone, and gqsa reads no others; "
            "vLLM may serve its checkpoints all the same"
        )
    try:
        # A copy: models keep the very object, and what one is set to do would be done by all of them.
        model = empty_model(AutoModelForCausalLM, copy.deepcopy(config), dtype=torch.float32)
    except (ImportError, ValueError) as error:
        raise InputError(f"transformers cannot build a causal language model from config.json: {error}") from error
    if fused_experts(model):
        raise InputError(f"model_type {config.model_type!r}: the names of its experts in files are not known")
    return model.eval()


def load_weights(
    module: nn.Module,
    source: TensorSource,
    config: Any,  # noqa: ANN401 - a transformers configuration
    device: torch.device,
    *,
    prefix: str = "",
    dtype: torch.dtype = torch.float32,
) -> None:
    """Give every meta parameter and buffer under ``module`` its value, and leave all others alone.

    Args:
        module: of :func:`meta_model`, or a part of it.
        source: of the values.
        config: of the model.
        device: of the values.
        prefix: what stands before the module's names in the model, with a dot at the end.
        dtype: of the parameters; buffers stay float32.

    Raises:
        FormatError: a tensor is missing.
        InputError: a tensor has another shape than the config says, or is not finite.
    """
    for name, child in list(module.named_modules()):
        if any(b.is_meta for b in child.buffers(recurse=False)):
            # Buffers that no checkpoint holds (rotary frequencies): made anew from the configuration.
            fresh = type(child)(config=config).to(device)
            module.set_submodule(name, fresh)
    for name, parameter in list(module.named_parameters()):
        if not parameter.is_meta:
            continue
        if config.tie_word_embeddings and prefix + name == "lm_head.weight" and prefix + name not in source:
            continue
        value = source.tensor(prefix + name)
        if value.shape != parameter.shape:
            raise InputError(
                f"{prefix}{name} has shape {tuple(value.shape)}, config.json asks for {tuple(parameter.shape)}"
            )
        if not torch.isfinite(value).all():
            raise InputError(f"{prefix}{name} holds infinite or NaN values: the model is broken; fetch it again")
        owner, _, leaf = name.rpartition(".")
        # A copy: tensors read from a file share its memory, and stages write to the weights of a block.
        value = value.to(device, dtype, copy=True)
        setattr(module.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))
    if not prefix and config.tie_word_embeddings:
        module.tie_weights()  # type: ignore[operator]


class _Recorder(nn.Module):
    """Stands in for a block: notes what it is called with and hands the hidden states on."""

    def __init__(self) -> None:
        super().__init__()
        self.kwargs: dict[str, Any] = {}
        self.hidden: torch.Tensor | None = None
        self.replacement: torch.Tensor | None = None

    def forward(self, hidden: torch.Tensor, **kwargs: Any) -> torch.Tensor:  # noqa: ANN401
        self.kwargs, self.hidden = kwargs, hidden
        return hidden if self.replacement is None else self.replacement


class BlockRunner:
    """One block with its weights, and the arguments the model calls it with."""

    def __init__(self, module: nn.Module, kwargs: dict[str, Any]) -> None:
        self.module = module
        self._kwargs = kwargs

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states ``[batch, context, hidden_size]`` through the block."""
        out = self.module(hidden, **self._kwargs)
        return out[0] if isinstance(out, tuple) else out

    @torch.no_grad()
    def advance(self, hidden: torch.Tensor, batch: int, device: torch.device) -> torch.Tensor:
        """Replace hidden states ``[windows, context, hidden_size]`` by the block's output, in place.

        Returns:
            Mean square of the change at every position, float32 ``[windows, context]``.
        """
        changes = []
        for part in hidden.split(batch):
            before = part.to(device)
            after = self(before)
            changes.append((after - before).square().mean(-1).cpu())
            part.copy_(after)
        return torch.cat(changes)


class ModelStream:
    """Everything of a model but its blocks stays loaded; blocks come one at a time. Computes in float32."""

    def __init__(self, source: TensorSource, config: Any, family: Family, device: torch.device) -> None:  # noqa: ANN401
        """Load what stands outside the blocks.

        Raises:
            FormatError: a tensor is missing.
            InputError: a tensor has another shape than the config says.
        """
        self._source = source
        self._family = family
        self.device = device
        self._model = meta_model(config)
        self._model.config.use_cache = False
        self._blocks: nn.ModuleList = self._model.get_submodule(family.blocks)
        self._recorders = [_Recorder() for _ in self._blocks]
        parent, _, attribute = family.blocks.rpartition(".")
        setattr(self._model.get_submodule(parent), attribute, nn.ModuleList(self._recorders))
        load_weights(self._model, source, self._model.config, device)

    def __len__(self) -> int:
        return len(self._blocks)

    def prepare_training(self, precision: str, context: int) -> None:
        """Let blocks be trained in ``precision`` on windows of ``context`` tokens; call before :meth:`embed`."""
        use_plain_attention(self._model, self.device, precision, context)

    @torch.no_grad()
    def embed(self, tokens: torch.Tensor, batch: int, allocate: Allocate = torch.empty) -> torch.Tensor:
        """Token windows ``[windows, context]`` to the hidden states ``[windows, context, hidden_size]`` of block 0.

        Args:
            tokens: the windows.
            batch: windows at a time.
            allocate: makes the result, an uninitialised float32 tensor on the CPU, from its shape.
        """
        self._forward(tokens[:1])
        hidden = allocate((*tokens.shape, self._first().shape[-1]))
        for windows, states in zip(tokens.split(batch), hidden.split(batch), strict=True):
            self._forward(windows)
            states.copy_(self._first())
        self._forward(tokens[:1])  # leaves each block's arguments for one window, which broadcast over a batch
        return hidden

    def _first(self) -> torch.Tensor:
        hidden = self._recorders[0].hidden
        if hidden is None:
            raise RuntimeError("the model did not call its first block")
        return hidden

    def _forward(self, tokens: torch.Tensor) -> torch.Tensor:
        # The hidden states count, not the logits: one position's logits are enough.
        logits: torch.Tensor = self._model(tokens.to(self.device), use_cache=False, logits_to_keep=1).logits
        return logits

    def block(self, index: int) -> BlockRunner:
        """Load block ``index``; call :meth:`embed` before. The memory is free again when the result is dropped.

        Raises:
            FormatError: a tensor is missing.
            InputError: a tensor has another shape than the config says.
        """
        module = copy.deepcopy(self._blocks[index])
        prefix = f"{self._family.blocks}.{index}."
        load_weights(module, self._source, self._model.config, self.device, prefix=prefix)
        return BlockRunner(module, self._recorders[index].kwargs)

    @torch.no_grad()
    def head_inputs(self, tokens: torch.Tensor, hidden: torch.Tensor, batch: int) -> Iterator[torch.Tensor]:
        """What the output head gets: the last block's output after the final norm.

        Args:
            tokens: ``[windows, context]``.
            hidden: ``[windows, context, hidden_size]``, output of the last block.
            batch: windows at a time.

        Yields:
            ``[batch, context, hidden_size]``.
        """
        for part, states in zip(tokens.split(batch), hidden.split(batch), strict=True):
            self._recorders[-1].replacement = states.to(self.device)
            yield self._model.base_model(part.to(self.device), use_cache=False).last_hidden_state
        self._recorders[-1].replacement = None

    @torch.no_grad()
    def losses(self, tokens: torch.Tensor, hidden: torch.Tensor) -> Iterator[torch.Tensor]:
        """Next-token losses of each window from the last block's output.

        Args:
            tokens: ``[windows, context]``.
            hidden: ``[windows, context, hidden_size]``, output of the last block.

        Yields:
            float32 ``[context - 1]``, natural logarithm, one a window.
        """
        for window, state in zip(tokens, hidden, strict=True):
            logits = self.logits(window[None], state[None].to(self.device))[0, :-1]
            yield nn.functional.cross_entropy(logits.float(), window[1:].to(self.device), reduction="none").cpu()

    def logits(self, tokens: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Logits ``[windows, context, vocabulary]`` from the last block's output; gradients go back to it.

        Args:
            tokens: ``[windows, context]``.
            hidden: ``[windows, context, hidden_size]``, output of the last block, on the device.
        """
        self._recorders[-1].replacement = hidden
        logits: torch.Tensor = self._model(tokens.to(self.device), use_cache=False).logits
        self._recorders[-1].replacement = None
        return logits


def watch_inputs(
    module: nn.Module, names: dict[str, str], note: Callable[[str, torch.Tensor], None]
) -> list[torch.utils.hooks.RemovableHandle]:
    """Call ``note(label, input)`` whenever a submodule runs.

    Args:
        module: the block.
        names: submodule name to label.
        note: gets the label and the submodule's input ``[..., in_features]``.

    Returns:
        Handles to remove the hooks with.
    """

    def hook(label: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda _module, args: note(label, args[0])

    return [module.get_submodule(name).register_forward_pre_hook(hook(label)) for name, label in names.items()]
