"""The methods that build, load and run one compressed layer of a vLLM model: a linear, or a vocabulary's table."""

from typing import Any

import torch
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    LinearMethodBase,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

import vllm_gqsa.kernels.embedding
import vllm_gqsa.kernels.ops  # noqa: F401 - registers gqsa::linear
from vllm_gqsa.format import GqsaConfig
from vllm_gqsa.plugin.matrix import LayerMatrix, process
from vllm_gqsa.plugin.report import LoadReport
from vllm_gqsa.plugin.shards import Shard, ShardId, ShardPlan, Sources, check_columns

__all__ = ["GqsaLinearMethod", "GqsaVocabularyMethod", "plan_shards"]


class GqsaLinearMethod(LinearMethodBase):
    """One object per layer; what has been loaded lies in its staging area until the layer is complete."""

    def __init__(self, config: GqsaConfig, sources: Sources, report: LoadReport | None = None) -> None:
        """Remember what to load.

        Args:
            config: the checkpoint's configuration.
            sources: the matrices on disk that the layer is made of.
            report: is told what was loaded.
        """
        self.config = config
        self._report = report or LoadReport()
        self.sources = sources
        self.in_features = 0
        self._matrix: LayerMatrix | None = None
        self._params_dtype = torch.float32

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,  # noqa: ANN401 - vLLM's signature
    ) -> None:
        """Register empty placeholders; the sizes are in the checkpoint.

        Raises:
            FormatError: the group size does not divide the input features of a rank.
            NotImplementedError: a kind of layer that is not known.
            ValueError: vLLM was told to read pickles.
        """
        plan = plan_shards(layer, self.sources, input_size_per_partition, output_partition_sizes)
        self._matrix = LayerMatrix(layer, plan, self._sparsity(plan), self._report)
        self._params_dtype = params_dtype
        self.in_features = plan.columns

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Put the loaded matrix in place of the placeholders; without anything new it does nothing.

        Raises:
            FormatError: the checkpoint lacks tensors of this layer, which vLLM does not notice by itself, or a
                reload brings a matrix of another size.
        """
        process(layer, [self._created()])

    def begin_loading(self) -> None:
        """Forget what a reload that failed has left."""
        if self._matrix is not None:
            self._matrix.begin_loading()

    def _created(self) -> LayerMatrix:
        if self._matrix is None:
            raise RuntimeError(f"{self.sources.layer}: create_weights was not called")
        return self._matrix

    def _sparsity(self, _plan: ShardPlan) -> float:
        """Sparsity of dummy weights."""
        return self.config.sparsity

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """``x W^T + bias``: ``[..., K]`` to ``[..., N]`` in the dtype of ``x``, K and N being this rank's."""
        result: torch.Tensor = torch.ops.gqsa.linear(
            x,
            *self._created().arguments(layer),
            self.in_features,
            self.sources.group_size,
            bias,
        )
        return result

    def dequantize_weight(self, layer: torch.nn.Module) -> torch.Tensor:
        """The dense weight ``[N, K]`` of this rank in the model's dtype, also between loading and processing.

        Raises:
            FormatError: the checkpoint lacks tensors of this layer.
        """
        return self._created().to_dense(layer, self._params_dtype)


class GqsaVocabularyMethod(GqsaLinearMethod):
    """The method of an output head, and of an input embedding that is tied to one: one matrix serves both."""

    def embedding(self, layer: torch.nn.Module, input_: torch.Tensor) -> torch.Tensor:
        """Rows ``[..., K]`` of this rank's table for token ids ``[...]``, in the model's dtype."""
        result: torch.Tensor = torch.ops.gqsa.embedding(
            input_,
            *self._created().arguments(layer),
            self.in_features,
            self.sources.group_size,
            self._params_dtype,
        )
        return result

    def tie_weights(self, layer: torch.nn.Module, embed_tokens: torch.nn.Module) -> torch.nn.Module:
        """The layer that the model takes as its head: the embedding itself, so that it is loaded and kept once.

        Raises:
            ValueError: the embedding is dense.
        """
        if not isinstance(embed_tokens.quant_method, GqsaVocabularyMethod):
            raise ValueError(
                f"{self.sources.names[0]}: is compressed, but config.json ties it to a dense embedding; "
                "set tie_word_embeddings to false in config.json"
            )
        return embed_tokens

    def _sparsity(self, plan: ShardPlan) -> float:
        # The head has a sparsity of its own, which only its nnz tells.
        groups = sum(shard.rows for shard in plan.shards.values()) * (plan.in_features // plan.group_size)
        return 1 - sum(self.sources.nnz) / groups


def plan_shards(
    layer: torch.nn.Module,
    sources: Sources,
    in_features: int,
    out_features: list[int],
) -> ShardPlan:
    """What this rank keeps of the matrices on disk.

    Args:
        layer: a linear layer, embedding or output head of vLLM, of which sizes and ranks are read and nothing is kept.
        sources: the matrices on disk.
        in_features: input features on this rank.
        out_features: rows on this rank, for each part of a fused layer.

    Raises:
        FormatError: G does not divide the input features of a rank.
        NotImplementedError: a kind of layer that is not known.
    """
    total = getattr(layer, "input_size", in_features)
    start = 0
    if isinstance(layer, QKVParallelLinear):
        shards = _qkv_shards(layer, out_features, sources.layer)
    elif isinstance(layer, ColumnParallelLinear):
        rank, size = layer.tp_rank, layer.tp_size
        shards = {i: Shard(n * size, rank * n, (rank + 1) * n) for i, n in enumerate(out_features)}
    elif isinstance(layer, VocabParallelEmbedding):
        shards = {0: _vocabulary_shard(layer, sources.layer)}
    elif isinstance(layer, (RowParallelLinear, ReplicatedLinear)):
        shards = {i: Shard(n, 0, n) for i, n in enumerate(out_features)}
        if isinstance(layer, RowParallelLinear):
            check_columns(sources.layer, total, layer.tp_size, sources.group_size)
            start = layer.tp_rank * in_features
    else:
        raise _unknown(layer, sources.layer)
    check_columns(sources.layer, total, 1, sources.group_size)
    return ShardPlan(sources, shards, total, start, start + in_features)


def _qkv_shards(layer: QKVParallelLinear, out_features: list[int], name: str) -> dict[ShardId, Shard]:
    if len(out_features) != 3:
        raise _unknown(layer, name)
    value_size = getattr(layer, "v_head_size", layer.head_size)
    rows = (
        layer.total_num_heads * layer.head_size,
        layer.total_num_kv_heads * layer.head_size,
        layer.total_num_kv_heads * value_size,
    )
    # With more ranks than KV heads, neighbouring ranks hold copies of the same head.
    kv_rank = layer.tp_rank // layer.num_kv_head_replicas
    ranks = (layer.tp_rank, kv_rank, kv_rank)
    return {
        each: Shard(total, rank * n, (rank + 1) * n)
        for each, total, rank, n in zip(("q", "k", "v"), rows, ranks, out_features, strict=True)
    }


def _vocabulary_shard(layer: VocabParallelEmbedding, name: str) -> Shard:
    if layer.num_embeddings != layer.org_vocab_size:
        raise NotImplementedError(
            f"{name}: holds {layer.num_embeddings - layer.org_vocab_size} tokens more than the checkpoint, which "
            "vllm-gqsa cannot add to a compressed vocabulary; compress again without --lm-head"
        )
    start, stop = layer.shard_indices.org_vocab_start_index, layer.shard_indices.org_vocab_end_index
    return Shard(layer.org_vocab_size, start, stop, layer.num_embeddings_per_partition - (stop - start))


def _unknown(layer: torch.nn.Module, name: str) -> NotImplementedError:
    kind = type(layer).__name__
    known = isinstance(layer, LinearBase)
    return NotImplementedError(
        f"{name}: vllm-gqsa does not know how to load a {kind}"
        + ("" if known else ", which is no linear layer and no vocabulary")
    )
