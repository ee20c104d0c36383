"""What is measured: shapes, tokens, sparsity, and who takes part. Standard library only."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

__all__ = ["CASES", "GQSA", "QUICK_CASES", "TAKING_PART", "TOKENS", "Case", "Weight"]

TOKENS = (1, 2, 4, 8, 16, 32, 64, 256, 2048)
GQSA = "GQSA"
TAKING_PART = {
    "layers": (GQSA, "cuBLAS fp16", "torch INT4", "torch 2:4", "Marlin", "gemlite W4", "gemlite W2"),
    "sparsity": (GQSA, "cuBLAS fp16"),
    "groups": (GQSA,),
    "division": ("GQSA gemv", "GQSA gemv by rows"),
    "choice": ("GQSA gemv", "GQSA gemm", "GQSA expand"),
}
"""Contestants, by the part that a case belongs to."""


@dataclass(frozen=True)
class Weight:
    """What decides the weights of every contestant.

    Attributes:
        n: outputs.
        k: inputs.
        sparsity: share of pruned groups.
        group_size: weights of a group; INT4 of others has its own.
        rows: "even" keeps the same number of groups in every row, "skewed" varies it by 30 % (standard deviation).
    """

    n: int
    k: int
    sparsity: float = 0.5
    group_size: int = 16
    rows: str = "even"


@dataclass(frozen=True)
class Case:
    """One line of the tables.

    Attributes:
        part: a key of :data:`TAKING_PART`.
        model: whose layer it is.
        layer: of that model; fused as vLLM fuses it.
        weight: its shape and sparsity.
        m: tokens of a call.
    """

    part: str
    model: str
    layer: str
    weight: Weight
    m: int = 1

    def __str__(self) -> str:
        weight = self.weight
        sparsity = f"S{100 * weight.sparsity:.0f} G{weight.group_size}"
        return f"{self.part}: {weight.n} x {weight.k}, {sparsity}, {weight.rows} rows, M = {self.m}"


_LAYERS = {
    ("Llama-3-8B", "qkv"): Weight(6144, 4096),
    ("Llama-2-7B, Llama-3-8B", "o"): Weight(4096, 4096),
    ("Llama-3-8B", "gate_up"): Weight(28672, 4096),
    ("Llama-3-8B", "down"): Weight(4096, 14336),
    ("Llama-70B", "o"): Weight(8192, 8192),
    ("Llama-70B", "gate_up"): Weight(57344, 8192),
    ("Llama-70B", "qkv"): Weight(10240, 8192),
    ("Llama-70B", "down"): Weight(8192, 28672),
    ("Llama-2-7B", "qkv"): Weight(12288, 4096),
    ("Llama-2-7B", "gate_up"): Weight(22016, 4096),
    ("Llama-2-7B", "down"): Weight(4096, 11008),
    ("Qwen2.5-7B", "qkv"): Weight(4608, 3584),
    ("Qwen2.5-7B", "o"): Weight(3584, 3584),
    ("Qwen2.5-7B", "gate_up"): Weight(37888, 3584),
    ("Qwen2.5-7B", "down"): Weight(3584, 18944),
}
_SQUARE, _SMALL, _WIDE = ("Llama-70B", "o"), ("Llama-2-7B, Llama-3-8B", "o"), ("Llama-3-8B", "gate_up")
_SPARSITIES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)


def _of(part: str, layer: tuple[str, str], tokens: Iterable[int], **changes: object) -> tuple[Case, ...]:
    """One case for every number of tokens; ``changes`` are those of the weight."""
    weight = replace(_LAYERS[layer], **changes)  # type: ignore[arg-type]
    return tuple(Case(part, *layer, weight, m) for m in tokens)


def _divisions(layers: Iterable[tuple[str, str]], tokens: Iterable[int]) -> tuple[Case, ...]:
    return tuple(
        case for layer in layers for rows in ("even", "skewed") for case in _of("division", layer, tokens, rows=rows)
    )


def _sweeps(layers: Iterable[tuple[str, str]], tokens: Iterable[int]) -> tuple[Case, ...]:
    return (
        *(case for at in layers for s in _SPARSITIES for case in _of("sparsity", at, tokens, sparsity=s)),
        *(case for size in (8, 16, 32, 64, 128) for case in _of("groups", _SQUARE, (1,), group_size=size)),
    )


_CROSSOVER = (1, 2, 4, 8, 16, 32, 64, 128, 256)

# The most telling come first: what the time does not suffice for is left out at the end.
CASES = (
    *(case for layer in _LAYERS for case in _of("layers", layer, TOKENS)),
    *_divisions(_LAYERS, (1, 2, 4, 8)),
    *(case for layer in (_SMALL, _SQUARE, _WIDE) for case in _of("choice", layer, _CROSSOVER)),
    *_sweeps((_SQUARE, *(layer for layer in _LAYERS if layer != _SQUARE)), (1, 16)),
)
QUICK_CASES = (
    *_of("layers", _SMALL, (1, 2, 4, 8, 16, 64, 256, 2048)),
    *_of("layers", _WIDE, (1, 8, 16, 64, 2048)),
    *_of("layers", _SQUARE, (1, 8, 16, 64)),
    *_of("layers", ("Llama-70B", "gate_up"), (1, 16)),
    *_divisions((_SMALL, _SQUARE), (1,)),
    *_of("choice", _WIDE, _CROSSOVER),
    *_sweeps((_SQUARE,), (1,)),
    *_of("layers", ("Llama-3-8B", "qkv"), (1, 16)),
    *_of("layers", ("Llama-3-8B", "down"), (1, 8, 16)),
)
