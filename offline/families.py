"""Model families, described by data: a further family is a further entry of :data:`FAMILIES`."""

from collections.abc import Mapping
from dataclasses import dataclass

from vllm_gqsa.format import is_ignored
from vllm_gqsa.offline.errors import InputError

__all__ = ["FAMILIES", "Family", "family_of"]


@dataclass(frozen=True)
class Family:
    """Where a causal language model of transformers keeps what is compressed."""

    blocks: str
    """Dotted name of the list of transformer blocks."""
    linears: tuple[tuple[str, ...], ...]
    """The linears of a block in order of execution; those that read the same input stand together."""
    fused: tuple[tuple[str, ...], ...]
    """Linears that a serving engine joins into one: compressed all or none."""
    embedding: str | None = None
    """Dotted name of the input embedding; None where a serving engine takes neither it nor the head compressed."""

    def linear_names(self, block: int, ignore: tuple[str, ...] = ()) -> list[list[str]]:
        """Full names of the linears of one block that are compressed, grouped by their input.

        Raises:
            InputError: ``ignore`` takes some but not all linears of a fused layer.
        """
        prefix = f"{self.blocks}.{block}."
        for names in self.fused:
            taken = [name for name in names if is_ignored(prefix + name, ignore)]
            if taken and len(taken) < len(names):
                raise InputError(
                    f"ignore takes {prefix}{taken[0]} but not all of {', '.join(names)}, which are served as one "
                    "fused layer: ignore all of them or none"
                )
        groups = [[prefix + n for n in names if not is_ignored(prefix + n, ignore)] for names in self.linears]
        return [group for group in groups if group]


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
_GATED = Family(
    blocks="model.layers",
    linears=(_QKV, ("self_attn.o_proj",), _GATE_UP, ("mlp.down_proj",)),
    fused=(_QKV, _GATE_UP),
    embedding="model.embed_tokens",
)

FAMILIES: Mapping[str, Family] = {
    "llama": _GATED,
    "mistral": _GATED,
    "qwen2": _GATED,
    "qwen3": _GATED,
    # vLLM's OPT passes no quant_config to its embedding and its head.
    "opt": Family(
        blocks="model.decoder.layers",
        linears=(_QKV, ("self_attn.out_proj",), ("fc1",), ("fc2",)),
        fused=(_QKV,),
    ),
}
"""Families by the ``model_type`` of config.json."""


def family_of(model_type: str) -> Family:
    """The description of a family.

    Raises:
        InputError: the family is not supported; the message lists those that are.
    """
    if model_type not in FAMILIES:
        raise InputError(f"model_type {model_type!r} is not supported; supported are {', '.join(sorted(FAMILIES))}")
    return FAMILIES[model_type]
