"""What part of which matrix on disk a rank keeps: pure data, no vLLM, no layer."""

from collections.abc import Sequence
from dataclasses import dataclass

from vllm_gqsa.format import FormatError, GqsaConfig

__all__ = ["Shard", "ShardId", "ShardPlan", "Sources", "check_columns", "expert_shard"]

ShardId = str | int
"""How vLLM calls a part of a fused layer: "q", "k", "v", or its position."""


@dataclass(frozen=True)
class Sources:
    """The matrices on disk that one layer of the engine is made of.

    Attributes:
        layer: the layer's name in the engine, for messages.
        names: the unfused Hugging Face names, in the order in which the layer stacks them.
        nnz: how many groups config.json lists for each.
        group_size: G, of all of them.
    """

    layer: str
    names: tuple[str, ...]
    nnz: tuple[int, ...]
    group_size: int

    @classmethod
    def of(cls, layer: str, names: Sequence[str], config: GqsaConfig) -> "Sources":
        """Look up what the configuration lists for ``names``, all of which it must list.

        Raises:
            FormatError: they differ in their group size.
        """
        size = config.group_size_of(names[0])
        other = next((name for name in names if config.group_size_of(name) != size), None)
        if other is not None:
            raise FormatError(
                f"{layer}: {names[0]} has groups of {size}, {other} of {config.group_size_of(other)}; they are served "
                "as one fused layer, so compress again with the same group_size for both"
            )
        return cls(layer, tuple(names), tuple(config.modules[name].nnz for name in names), size)


@dataclass(frozen=True)
class Shard:
    """One part of a fused layer, or a whole unfused one."""

    rows: int
    """Rows on disk."""
    start: int
    """First row that this rank keeps."""
    stop: int
    """One past its last row."""
    padding: int = 0
    """Empty rows behind them, by which the engine rounds a vocabulary up."""


@dataclass(frozen=True)
class ShardPlan:
    """Everything the loader needs to know about one layer on one rank."""

    sources: Sources
    shards: dict[ShardId, Shard]
    """In the order in which the layer stacks them."""
    in_features: int
    """Columns on disk."""
    column_start: int
    column_stop: int

    @property
    def rows(self) -> int:
        """Rows of the layer on this rank."""
        return sum(shard.stop - shard.start + shard.padding for shard in self.shards.values())

    @property
    def group_size(self) -> int:
        """G of the layer."""
        return self.sources.group_size

    @property
    def columns(self) -> int:
        """Input features of the layer on this rank."""
        return self.column_stop - self.column_start

    def key(self, shard_id: ShardId | tuple[ShardId, ...] | None) -> tuple[ShardId, ...]:
        """The shards that one matrix on disk holds, stacked: one, several, or (None) all of them.

        Raises:
            FormatError: the layer has no such shard.
        """
        key = tuple(self.shards) if shard_id is None else shard_id if isinstance(shard_id, tuple) else (shard_id,)
        unknown = [each for each in key if each not in self.shards]
        if unknown or not key:
            raise FormatError(
                f"{self.sources.layer}: has no shard {shard_id!r}, only {', '.join(map(str, self.shards))}"
            )
        return key

    def source(self, key: tuple[ShardId, ...]) -> tuple[str, int | None]:
        """Name of the matrix that holds the shards ``key``, and its listed nnz.

        The nnz is None where the names do not match the shards one to one; the sum over the layer is checked in
        any case, see :meth:`Staging.finish`.
        """
        names, nnz = self.sources.names, self.sources.nnz
        if len(names) == 1 and len(key) == len(self.shards):
            return names[0], nnz[0]
        if len(names) == len(self.shards) and len(key) == 1:
            at = list(self.shards).index(key[0])
            return names[at], nnz[at]
        return f"{self.sources.layer} (shard {', '.join(map(str, key))})", None


def expert_shard(expert: int, part: str) -> ShardId:
    """Key of one linear of one routed expert: ``part`` is "w1" (gate), "w2" (down) or "w3" (up), as vLLM says."""
    return f"{expert}.{part}"


def check_columns(layer: str, in_features: int, tp_size: int, group_size: int) -> None:
    """Check that splitting the input features over ranks falls on groups.

    Raises:
        FormatError: it does not; names the layer, K, the number of ranks and G.
    """
    if in_features % (tp_size * group_size):
        fits = [tp for tp in range(tp_size - 1, 0, -1) if in_features % (tp * group_size) == 0]
        advice = f"use a tensor-parallel size of {fits[0]}" if fits else "this checkpoint cannot be served"
        raise FormatError(
            f"{layer}: in_features K = {in_features} split over {tp_size} tensor-parallel ranks gives "
            f"{in_features / tp_size:g} a rank, which is no multiple of the group size G = {group_size}; {advice}"
        )
