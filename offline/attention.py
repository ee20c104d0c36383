"""Attention in bfloat16 on a CPU, where torch's own takes up to three times as long (torch 2.13, Zen 5)."""

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.masking_utils import eager_mask

from vllm_gqsa.experts import MIXTURES
from vllm_gqsa.offline.families import FAMILIES

__all__ = ["use_plain_attention"]

_NAME = "gqsa_plain"
_LONGEST = 1024
"""Tokens up to which scores are held for a backward pass; beyond, their square outgrows all other activations."""
_QUERIES = 256
"""Queries at a time: they need no keys behind their own, which saves nearly half of long windows."""


def use_plain_attention(
    model: PreTrainedModel, device: torch.device, precision: str, trained_on: int | None = None
) -> None:
    """Let a model of transformers compute attention by two plain products where that is faster.

    Args:
        model: of transformers; what is no supported family stays as it is: its attention may have more to it.
        device: where it computes.
        precision: what it computes in, a torch dtype's name.
        trained_on: tokens of the windows it is trained on; None where there is no backward pass.
    """
    known = model._supports_attention_backend and model.config.model_type in {**FAMILIES, **MIXTURES}
    short = trained_on is None or trained_on <= _LONGEST
    if known and short and device.type == "cpu" and precision == "bfloat16":
        model.set_attn_implementation(_NAME)


def _plain_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **_options: Any,  # noqa: ANN401
) -> tuple[torch.Tensor, None]:
    """``softmax(query key^T scaling + mask) value``; of tensors ``[batch, heads, tokens, size]``, as transformers asks.

    The softmax reads and writes bfloat16 and computes in float32; spelled as such it would be three times as slow.
    """
    repeats = query.shape[1] // key.shape[1]
    keys, values = repeat_kv(key, repeats).transpose(2, 3), repeat_kv(value, repeats)
    count = query.shape[2]
    # Such a mask leaves queries nothing behind them; a module that says nothing of itself is asked about all keys.
    causal = getattr(module, "is_causal", False) and attention_mask is not None and keys.shape[3] == count
    pieces = []
    for begin in range(0, count, _QUERIES):
        end = min(begin + _QUERIES, count)
        seen = end if causal else keys.shape[3]
        scores = (query[:, :, begin:end] * scaling) @ keys[..., :seen]
        if attention_mask is not None:
            scores = scores + attention_mask[:, :, begin:end, :seen].to(scores.dtype)
        pieces.append(scores.softmax(-1) @ values[:, :, :seen])
    return torch.cat(pieces, dim=2).transpose(1, 2).contiguous(), None


AttentionInterface.register(_NAME, _plain_attention)
AttentionMaskInterface.register(_NAME, eager_mask)
