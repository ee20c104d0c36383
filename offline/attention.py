"""Attention in bfloat16 on a CPU, where torch's own takes three times as long (torch 2.13, 512 tokens, Zen 5)."""

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.masking_utils import eager_mask

__all__ = ["use_plain_attention"]

_NAME = "gqsa_plain"
_LONGEST = 1024
"""Tokens up to which the scores of all heads are held; beyond, their square outgrows all other activations."""


def use_plain_attention(model: PreTrainedModel, device: torch.device, precision: str, context: int) -> None:
    """Let a model of transformers compute attention by two plain products where that is faster.

    Args:
        model: of transformers; models that do not let their attention be chosen stay as they are.
        device: where it computes.
        precision: ``bfloat16`` or ``float32``.
        context: tokens of the windows it will see.
    """
    if model._supports_attention_backend and device.type == "cpu" and precision == "bfloat16" and context <= _LONGEST:
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
    keys, values = repeat_kv(key, repeats), repeat_kv(value, repeats)
    scores = (query * scaling) @ keys.transpose(2, 3)
    if attention_mask is not None:
        scores = scores + attention_mask.to(scores.dtype)
    outputs = scores.softmax(-1) @ values
    return outputs.transpose(1, 2).contiguous(), None


AttentionInterface.register(_NAME, _plain_attention)
AttentionMaskInterface.register(_NAME, eager_mask)
