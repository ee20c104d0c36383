"""One line of log a process when all compressed layers have been loaded."""

from dataclasses import dataclass, field

from vllm.logger import init_logger

from vllm_gqsa.format import GroupSparseMatrix
from vllm_gqsa.kernels.choice import EXPANDED_EXPERTS, Choice
from vllm_gqsa.plugin.shards import ShardPlan

__all__ = ["LoadReport"]

# Below vLLM's own logger, which alone has a handler and a level.
_logger = init_logger("vllm.gqsa")


@dataclass(frozen=True)
class _Layer:
    """What one layer came to on this rank; ``even`` is what it would keep if all ranks kept the same."""

    matrices: int
    weights: int
    bytes: int
    groups: int
    nnz: int
    even: float


@dataclass
class LoadReport:
    """Counts layers as they are loaded; when the last one is there, it says what this process holds."""

    expected: set[tuple[str, ...]] = field(default_factory=set)
    """The layers that the model was built of, by the matrices on disk; a head that is tied counts once."""
    _layers: dict[tuple[str, ...], _Layer] = field(default_factory=dict)
    _done: dict[tuple[str, ...], Choice] = field(default_factory=dict)
    """The kernels of the layers that are in place."""

    def expect(self, names: tuple[str, ...]) -> None:
        """A layer was built that will be loaded from the matrices ``names``."""
        self.expected.add(names)

    def take(self, plan: ShardPlan, matrix: GroupSparseMatrix) -> None:
        """A layer was read; ``matrix`` is this rank's part, in the order of the checkpoint."""
        rows = sum(shard.rows for shard in plan.shards.values())
        kept_rows = sum(shard.stop - shard.start for shard in plan.shards.values())
        self._layers[plan.sources.names] = _Layer(
            matrices=len(plan.sources.names),
            weights=kept_rows * plan.columns,
            bytes=matrix.nbytes,
            groups=kept_rows * plan.columns // plan.group_size,
            nnz=matrix.nnz,
            even=sum(plan.sources.nnz) * kept_rows * plan.columns / (rows * plan.in_features),
        )

    def done(self, plan: ShardPlan, kernel: Choice) -> None:
        """The layer is in place; says all of it where it was the last one."""
        self._done[plan.sources.names] = kernel
        if self.expected <= self._done.keys():
            kernels = dict.fromkeys(self._done.values())
            _logger.info("%s; kernel: %s", self.text(), ", ".join(map(str, kernels)))
            if EXPANDED_EXPERTS in kernels:  # of what else is slow those warn who look for kernels
                _logger.warning("GQSA: serving is slow: %s", EXPANDED_EXPERTS.why)
            self._layers.clear()  # a reload starts anew
            self._done.clear()

    def text(self) -> str:
        """Number of modules, density, bits a weight; and how even the split is where there is one."""
        layers = list(self._layers.values())
        weights, groups = sum(each.weights for each in layers), sum(each.groups for each in layers)
        nnz, even = sum(each.nnz for each in layers), sum(each.even for each in layers)
        said = (
            f"GQSA: {sum(each.matrices for each in layers)} modules in {len(layers)} layers, "
            f"{weights / 1e6:.1f} M weights, {100 * nnz / max(1, groups):.1f} % of groups kept, "
            f"{8 * sum(each.bytes for each in layers) / max(1, weights):.2f} bits a weight"
        )
        if all(each.even == each.nnz for each in layers):
            return said
        worst = max(each.nnz / each.even for each in layers if each.even)
        return f"{said}; this rank keeps {nnz / even:.3f} of an even share of groups, {worst:.3f} in its fullest layer"
