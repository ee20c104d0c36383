"""The rows of the table: what is done to the model in each."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm_gqsa.offline.recipe import NAMED, BlockTraining, Distillation, EndToEnd, Recipe

__all__ = ["ABLATIONS", "DENSE", "Budget", "Method", "methods", "select"]

DENSE = "dense"
ABLATIONS = ("recipes", "sparsity", "stages", "group size", "scope", "importance")
"""Tables beside the main one."""


@dataclass(frozen=True)
class Budget:
    """What every method is given.

    Attributes:
        tokens: to train on end to end, in all stages together.
        samples: calibration windows, for Hessians and block-wise training.
        context: tokens a window.
    """

    tokens: int
    samples: int
    context: int


@dataclass(frozen=True)
class Method:
    """One way to compress the model.

    Attributes:
        name: unique; the row's label, and as a slug its folder's name.
        tables: where it stands: ``main``, or of :data:`ABLATIONS`.
        recipe: what `gqsa compress` is given, or what a rival trains by; None where nothing of ours is run.
        peer: key of :data:`benchmarks.accuracy.peers.PEERS`: the package that compresses, or where training begins.
    """

    name: str
    tables: tuple[str, ...]
    recipe: Recipe | None = field(default=None, repr=False)
    peer: str | None = None

    @property
    def slug(self) -> str:
        """The name as a file name."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")

    @property
    def is_peers(self) -> bool:
        """Whether the model is as a peer's package leaves it."""
        return self.peer is not None and self.recipe is None

    @property
    def tokens(self) -> int:
        """Tokens that the model sees in end-to-end training."""
        if self.recipe is None:
            return 0
        stages = self.recipe.whole_model_stages().values()
        return sum(s.steps(self.recipe.context) * s.batch for s in stages) * self.recipe.context


def methods(budget: Budget) -> list[Method]:
    """All rows, the most telling first, so that a run cut short has those."""

    def ours(**settings: Any) -> Recipe:  # noqa: ANN401
        given = {"samples": budget.samples, "context": budget.context, "pattern": "matrix"}
        return Recipe.model_validate(given | settings)

    trained = {"pattern": NAMED["default"].pattern, **_stages(NAMED["default"], budget.tokens)}
    # The one stage that any format can go through.
    rival = ours(distill=Distillation(tokens=budget.tokens, batch=1))
    blockwise = ours(importance="kfac", bqpo=BlockTraining())
    alike, oqp = BlockTraining(last_block="output"), EndToEnd(tokens=max(1, budget.tokens // 4), batch=1)
    on_text = oqp.model_copy(update={"loss": "ce"})
    whole = ours(pattern="model", importance="kfac")
    scopes, shares = ("row", "2:4"), (50, 20, 30, 40)
    formulas = ("kfac", "wanda", "block-obs")
    main = ("main",)
    return [
        Method(DENSE, main),
        Method("W4S50 G16", ("main", "sparsity", "stages", "group size", "scope"), ours(**trained)),
        Method("SparseGPT 2:4 + INT4 g64", main, peer="sparsegpt-2of4-int4"),
        Method("GPTQ W2 g64", main, peer="gptq-w2"),
        Method("GPTQ W3 g64", main, peer="gptq-w3"),
        Method("AutoRound W2 g64", main, peer="autoround-w2"),
        Method("AutoRound W3 g64", main, peer="autoround-w3"),
        Method("W4S30 G16", ("main", "sparsity"), ours(sparsity=0.3, **trained)),
        Method("W4S50 one-shot + distillation", ("main", "stages", "scope"), rival),
        Method("2:4 + INT4 g64 + distillation", main, rival, "sparsegpt-2of4-int4"),
        Method("W2 g64 + distillation", main, rival, "gptq-w2"),
        Method("W3 g64 + distillation", main, rival, "gptq-w3"),
        *(Method(f"GQSA, recipe {name}", ("main", "recipes"), NAMED[name]) for name in ("quick", "default", "best")),
        Method("GQSA, recipe default, 30 %", ("main", "recipes"), NAMED["default"].changed({"sparsity": 0.3})),
        Method("W4S50 one-shot", ("sparsity", "stages", "importance"), ours()),
        *(Method(f"W4S{p} one-shot", ("sparsity",), ours(sparsity=p / 100)) for p in (0, 20, 30, 40)),
        *(Method(f"W4S{p} G16", ("sparsity",), ours(sparsity=p / 100, **trained)) for p in (20, 40)),
        *(Method(f"W4S{p} BQPO", ("stages",), blockwise.changed({"sparsity": p / 100})) for p in shares),
        *(
            Method(f"W4S{p} BQPO + E2E-OQP", ("stages",), blockwise.changed({"sparsity": p / 100, "oqp": oqp}))
            for p in shares
        ),
        Method("W4S50 BQPO + E2E-OQP on cross-entropy", ("stages",), blockwise.changed({"oqp": on_text})),
        Method("W4S50 BQPO, importance obs", ("stages",), blockwise.changed({"importance": "obs"})),
        Method("W4S50 BQPO, last block like the others", ("stages",), blockwise.changed({"bqpo": alike})),
        Method("W4S50 BQPO, not compensated before", ("stages",), blockwise.changed({"compensate": False})),
        Method("W4S50 G16 + E2E-OQP", ("stages",), ours(oqp=oqp, **trained)),
        *(Method(f"W4S50 G{g}", ("group size",), ours(group_size=g, **trained)) for g in (32, 64)),
        *(Method(f"W4S50 {p} scope", ("scope",), ours(**trained | {"pattern": p})) for p in ("matrix", "row")),
        *(Method(f"W4S50 {p} one-shot + distillation", ("scope",), rival.changed({"pattern": p})) for p in scopes),
        *(Method(f"W4S50 one-shot, {i}", ("importance",), ours(importance=i)) for i in formulas),
        *(
            Method(f"W4S{p} one-shot, one budget", ("importance",), whole.changed({"sparsity": p / 100}))
            for p in (50, 20)
        ),
    ]


def _stages(recipe: Recipe, tokens: int) -> dict[str, Any]:
    """The training stages of a recipe, their tokens scaled so that they come to ``tokens``."""
    stages = {name: stage.model_dump() for name, stage in recipe.whole_model_stages().items()}
    share = tokens / sum(stage["tokens"] for stage in stages.values())
    return {name: {**stage, "tokens": max(1, round(stage["tokens"] * share))} for name, stage in stages.items()}


def select(rows: Sequence[Method], pattern: str) -> list[Method]:
    """The rows whose name a regular expression matches whole."""
    return [row for row in rows if re.fullmatch(pattern, row.name)]
