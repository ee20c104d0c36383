"""The method of the routed experts of a mixture-of-experts layer: two matrices, one call of ``gqsa::moe``."""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase
from vllm.platforms import current_platform

from vllm_gqsa.format import GqsaConfig, is_ignored
from vllm_gqsa.kernels.choice import choose_for_experts
from vllm_gqsa.kernels.moe import ACTIVATIONS
from vllm_gqsa.plugin.loading import load_expert_piece
from vllm_gqsa.plugin.matrix import LayerMatrix, process
from vllm_gqsa.plugin.report import LoadReport
from vllm_gqsa.plugin.shards import Shard, ShardPlan, Sources, check_columns, expert_shard

__all__ = ["GqsaMoEMethod", "expert_names"]

_NAMES = (
    {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"},
    {"w1": "w1", "w3": "w3", "w2": "w2"},  # Mixtral
)
"""What checkpoints call the linears of an expert, by vLLM's names for them."""


def expert_names(prefix: str, experts: int, config: GqsaConfig) -> list[dict[str, str]]:
    """Names on disk of the linears of every expert, each by vLLM's name for it: "w1" (gate), "w3" (up), "w2" (down).

    Args:
        prefix: name of the layer.
        experts: how many it has.
        config: tells which of the usual names the checkpoint uses.
    """

    def full(names: dict[str, str], expert: int) -> dict[str, str]:
        return {part: f"{prefix}.{expert}.{name}" for part, name in names.items()}

    def known(name: str) -> bool:
        return name in config.modules or is_ignored(name, config.ignore)

    chosen = next((each for each in _NAMES if any(map(known, full(each, 0).values()))), _NAMES[0])
    return [full(chosen, expert) for expert in range(experts)]


class GqsaMoEMethod(FusedMoEMethodBase):
    """One object per layer."""

    def __init__(
        self,
        moe: Any,  # noqa: ANN401 - vLLM's FusedMoEConfig
        config: GqsaConfig,
        names: list[dict[str, str]],
        report: LoadReport | None = None,
    ) -> None:
        """Remember what to load.

        Args:
            moe: vLLM's FusedMoEConfig.
            config: the checkpoint's configuration.
            names: see :func:`expert_names`.
            report: is told what was loaded.
        """
        super().__init__(moe)
        self.config = config
        self._report = report or LoadReport()
        self._names = names
        self._matrices: list[LayerMatrix] = []
        self._activation = ""
        self._select_experts = _routing_within_experts()

    def create_weights(
        self,
        layer: Any,  # noqa: ANN401 - vLLM's RoutedExperts
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,  # noqa: ANN401 - vLLM's signature
    ) -> None:
        """Register empty placeholders; the sizes are in the checkpoint.

        Raises:
            FormatError: the group size does not divide the input features of a rank.
            NotImplementedError: the experts have biases, another activation than SiLU or GELU, or get the router's
                weights with their input.
        """
        name = layer.layer_name
        self._activation = str(getattr(layer.activation, "value", layer.activation))
        if self._activation not in ACTIVATIONS or self.moe.has_bias or layer.apply_router_weight_on_input:
            raise NotImplementedError(
                f"{name}: vllm-gqsa serves compressed experts with {', '.join(ACTIVATIONS)}, without biases, and "
                f"weighted after they ran; this model has other ones (activation {self._activation}); "
                "put its experts on the ignore list"
            )
        size, rank = self.moe.moe_parallel_config.tp_size, self.moe.moe_parallel_config.tp_rank
        width = intermediate_size_per_partition
        mine = _local_experts(layer.expert_map, num_experts)
        rows = Shard(width * size, rank * width, (rank + 1) * width)
        gate_up = self._plan(name, mine, {"w1": rows, "w3": rows}, (hidden_size, 0, hidden_size))
        columns = (width * size, rank * width, (rank + 1) * width)
        down = self._plan(name, mine, {"w2": Shard(hidden_size, 0, hidden_size)}, columns)
        check_columns(name, hidden_size, 1, gate_up.group_size)
        check_columns(name, width * size, size, down.group_size)
        self._matrices = [
            LayerMatrix(layer, plan, self.config.sparsity, self._report, prefix, load_expert_piece, choose_for_experts)
            for plan, prefix in ((gate_up, "w13_"), (down, "w2_"))
        ]

    def _plan(
        self, layer: str, experts: list[int], parts: dict[str, Shard], columns: tuple[int, int, int]
    ) -> ShardPlan:
        names = [self._names[expert][part] for expert in experts for part in parts]
        shards = {expert_shard(expert, part): shard for expert in experts for part, shard in parts.items()}
        return ShardPlan(Sources.of(layer, names, self.config), shards, *columns)

    def begin_loading(self) -> None:
        """Forget what a reload that failed has left."""
        for matrix in self._matrices:
            matrix.begin_loading()

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Put the loaded matrices in place of the placeholders; without anything new it does nothing.

        Raises:
            FormatError: see :func:`vllm_gqsa.plugin.matrix.process`.
        """
        process(layer, self._matrices)

    def get_fused_moe_quant_config(self, layer: torch.nn.Module) -> None:
        """None: vLLM's own kernels are not used."""

    @property
    def is_monolithic(self) -> bool:
        """Whether vLLM leaves it to this method to choose the experts."""
        return self._select_experts is not None

    def apply_monolithic(
        self,
        layer: Any,  # noqa: ANN401 - vLLM's RoutedExperts
        x: torch.Tensor,
        router_logits: torch.Tensor,
        *_: object,
        **__: object,
    ) -> torch.Tensor:
        """As :meth:`apply`, from the router's logits ``[M, E]``."""
        if self._select_experts is None:
            raise RuntimeError("vLLM chooses the experts itself")
        weights, ids = self._select_experts(
            hidden_states=x,
            router_logits=router_logits,
            top_k=layer.top_k,
            use_grouped_topk=layer.use_grouped_topk,
            renormalize=layer.renormalize,
            topk_group=layer.topk_group,
            num_expert_group=layer.num_expert_group,
            custom_routing_function=layer.custom_routing_function,
            scoring_func=layer.scoring_func,
            routed_scaling_factor=layer.routed_scaling_factor,
            e_score_correction_bias=layer.e_score_correction_bias,
        )
        return self.apply(layer, x, weights, ids)

    def apply(
        self,
        layer: Any,  # noqa: ANN401 - vLLM's RoutedExperts
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        *_: object,
        **__: object,
    ) -> torch.Tensor:
        """The weighted sum over each token's experts, ``[M, K]``; with tensor parallelism this rank's part of it."""
        if layer.expert_map is not None:
            topk_ids = layer.expert_map[topk_ids.long()]
        stacks, layouts = zip(*(matrix.arguments(layer) for matrix in self._matrices), strict=True)
        group_sizes = [matrix.plan.group_size for matrix in self._matrices]
        result: torch.Tensor = torch.ops.gqsa.moe(
            x, topk_weights, topk_ids, *stacks, list(layouts), group_sizes, self._activation
        )
        return result


def _routing_within_experts() -> Callable[..., tuple[torch.Tensor, torch.Tensor]] | None:
    """How vLLM for CPU chooses experts in versions where that is a part of running them, as in 0.29; else None."""
    if not current_platform.is_cpu():
        return None
    try:
        module = importlib.import_module("vllm.model_executor.layers.fused_moe.experts.cpu_moe")
    except ImportError:
        return None
    return getattr(module, "select_experts", None)


def _local_experts(expert_map: torch.Tensor | None, count: int) -> list[int]:
    """Numbers of this rank's experts in the model, in the order of their places on this rank.

    Args:
        expert_map: for every expert of the model its place on this rank, -1 for those of others; None where this rank
            has them all.
        count: experts of this rank.
    """
    if expert_map is None:
        return list(range(count))
    places = {place: expert for expert, place in enumerate(expert_map.tolist()) if place >= 0}
    return [places[place] for place in range(count)]
