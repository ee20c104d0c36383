"""Model families, described by data: a further family is a further entry of :data:`FAMILIES`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vllm_gqsa.experts import MIXTURES, Mixture
from vllm_gqsa.format import few, is_ignored
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
    always_dense: tuple[str, ...] = ()
    """Linears that are always left dense, as ``re:`` expressions: outside of the blocks, or choosing experts."""
    unmixed: "Family | None" = None
    """The blocks of a mixture of experts that have none."""
    is_unmixed: Callable[[int], bool] = lambda _: False
    """Whether a block is one of those."""

    def linear_names(self, block: int, ignore: tuple[str, ...] = ()) -> list[list[str]]:
        """Full names of the linears of one block that are compressed, grouped by their input.

        Raises:
            InputError: ``ignore`` takes some but not all linears of a fused layer.
        """
        if self.unmixed is not None and self.is_unmixed(block):
            return self.unmixed.linear_names(block, ignore)
        prefix = f"{self.blocks}.{block}."
        for names in self.fused:
            taken = [name for name in names if is_ignored(prefix + name, ignore)]
            if taken and len(taken) < len(names):
                raise InputError(
                    f"ignore takes {prefix}{taken[0]} but not all of {few(names)}, which are served as one "
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
        always_dense=(r"re:.*\.project_(in|out)$",),  # where embeddings are narrower than the blocks
    ),
}
"""Families by the ``model_type`` of config.json, but for mixtures of experts: see :func:`family_of`."""


_SHARED = ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj")


def _mixture(config: Any, names: Mixture) -> Family:  # noqa: ANN401 - a transformers configuration
    """The family of a mixture of experts: attention, every expert, and the expert that all tokens share, if any."""
    count = config.num_local_experts if hasattr(config, "num_local_experts") else config.num_experts
    experts = [f"{names.block}.experts.{number}." for number in range(count)]
    pairs = [((each + names.gate, each + names.up), (each + names.down,)) for each in experts]
    routed = tuple(group for pair in pairs for group in pair)
    is_shared = bool(getattr(config, "shared_expert_intermediate_size", 0))
    # Qwen's mixtures may have blocks without experts.
    plain = frozenset(getattr(config, "mlp_only_layers", None) or ())
    step = getattr(config, "decoder_sparse_step", 1)
    return Family(
        blocks=_GATED.blocks,
        linears=(
            *(_QKV, ("self_attn.o_proj",), *routed),
            *((_SHARED, ("mlp.shared_expert.down_proj",)) if is_shared else ()),
        ),
        fused=(_QKV, tuple(name for group in routed for name in group), *((_SHARED,) if is_shared else ())),
        always_dense=(r"re:.*\.(shared_expert_)?gate$",),
        unmixed=_GATED,
        is_unmixed=lambda block: block in plain or (block + 1) % step != 0,
    )


def family_of(config: Any) -> Family:  # noqa: ANN401 - a transformers configuration
    """The description of the family of a model.

    Raises:
        InputError: the family is not supported; the message lists those that are.
    """
    kind = config.model_type
    if kind in MIXTURES:
        return _mixture(config, MIXTURES[kind])
    if kind not in FAMILIES:
        supported = ", ".join(sorted([*FAMILIES, *MIXTURES]))
        raise InputError(f"model_type {kind!r} is not supported; supported are {supported}")
    return FAMILIES[kind]
