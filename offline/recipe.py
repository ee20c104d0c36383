"""What is done to the weights: every choice that changes the result stands here."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_serializer, model_validator

from vllm_gqsa.format import GROUP_SIZES, HEAD, check_ignore, is_ignored, parse_pattern
from vllm_gqsa.offline.errors import InputError
from vllm_gqsa.offline.mask import FLOOR

__all__ = [
    "NAMED",
    "BlockTraining",
    "Distillation",
    "EndToEnd",
    "GradualPruning",
    "Importance",
    "Override",
    "Precision",
    "Recipe",
    "Training",
    "WholeModel",
]

Importance = Literal["obs", "wanda", "block-obs", "kfac"]
Precision = Literal["auto", "bfloat16", "float32"]


class Settings(BaseModel):
    """Values by name; a name that is not there is an error, which lists those that are."""

    model_config = ConfigDict(frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _known(cls, values: Any) -> Any:  # noqa: ANN401 - whatever stands in the file
        unknown = [name for name in values if name not in cls.model_fields] if isinstance(values, Mapping) else []
        if unknown:
            raise ValueError(f"{unknown[0]} is not a setting; there are {', '.join(cls.model_fields)}")
        return values


class Training(Settings):
    """What the settings of all training stages have in common: AdamW, warm-up, cosine, clipped gradients."""

    norm_lr: float = Field(default=1e-4, ge=0)
    """Learning rate of norms and biases; 0 leaves them as they are."""
    batch: int = Field(default=1, ge=1)
    """Windows a step. Twice as many are half as many steps, which is worse as long as there are few of them."""
    warmup: float = Field(default=0.05, ge=0, lt=1)
    """Share of the steps in which the learning rates rise to their peak."""
    final_lr: float = Field(default=0.05, ge=0, le=1)
    """What the cosine leaves of the learning rates at the end, as a share of their peak."""
    clip: float = Field(default=1.0, gt=0)
    """Largest norm of a step's gradient."""


class BlockTraining(Training):
    """BQPO: kept weights, scales and zero points of one block at a time."""

    scale_lr: float = Field(default=1e-3, ge=0)
    """Learning rate of the scales' logarithms: 1e-3 is about 0.1 % a step. 0 leaves the scales as they are."""
    zero_lr: float = Field(default=1e-3, ge=0)
    """Learning rate of the zero points, as shares of their range 0..15; 0 leaves them as they are."""
    weight_lr: float = Field(default=1e-3, ge=0)
    """Learning rate of the kept weights."""
    epochs: int = Field(default=4, ge=1)
    """How often the calibration windows are gone through."""
    loss: Literal["update", "token", "mse"] = "update"
    """Squared error of the block's output: ``mse`` as it is, so that the few massive activations of a sequence's first
    positions outweigh all else; ``token`` relative to the output, ``update`` relative to what the block adds to its
    input, position by position, so that each counts the same."""
    last_block: Literal["kl", "output"] = "kl"
    """What the last block is trained against: ``kl`` the dense model's next-token distributions, ``output`` the dense
    block's output, like all others."""
    patience: int = Field(default=2, ge=1)
    """Epochs without a better state after which a block is done; its best state counts, by one window in eight that is
    not trained on."""


class WholeModel(Training):
    """What the stages that train the whole model have in common."""

    tokens: int = Field(ge=1)
    """Tokens to train on; a text that has fewer is gone through several times."""
    loss: Literal["kl", "ce"] = "kl"
    """``kl``: Kullback-Leibler divergence from the dense model's next-token distribution; ``ce``: next-token
    cross-entropy, which needs no dense model in memory."""
    checkpointing: bool = False
    """Recompute each block in the backward pass: less memory, about a third more time."""

    def steps(self, context: int) -> int:
        """Steps that these tokens take, in windows of ``context`` tokens."""
        return -(-self.tokens // (self.batch * context))


class GradualPruning(WholeModel):
    """Pruning while the whole model is trained, in place of pruning at one stroke.

    The share of pruned groups rises from none, fast at first (1 - (1 - t)^3, Zhu and Gupta, arXiv 1710.01878), and each
    choice is made anew from the weights as they are by then: w^2 times the mean square of the input, times that of the
    loss's gradient with respect to the output, both measured in the dense model on next tokens and then followed from
    step to step. Once the last choice is made, the kept weights are rounded to INT4 in every step, gradients passing
    straight through.
    """

    weight_lr: float = Field(default=4e-4, ge=0)
    """Learning rate of the weights."""
    ramp: float = Field(default=0.6, ge=0, lt=1)
    """Share of the steps in which the share of pruned groups rises."""
    interval: int = Field(default=4, ge=1)
    """Steps between two choices."""
    floor: float = Field(default=FLOOR, gt=0, le=1)
    """With pattern ``model``: share of the mean density that each linear keeps at least."""


class EndToEnd(WholeModel):
    """E2E-OQP: scales (and zero points) of the whole model, the INT4 codes and the mask frozen."""

    scale_lr: float = Field(default=1e-3, ge=0)
    """Learning rate of the scales' logarithms: 1e-3 is about 0.1 % a step. 0 leaves the scales as they are."""
    zero_lr: float = Field(default=1e-3, ge=0)
    """Learning rate of the zero points, as shares of their range 0..15; 0 leaves them as they are."""


class Distillation(EndToEnd):
    """The same with the kept weights trained too, through the fake quantiser."""

    weight_lr: float = Field(default=1e-3, ge=0)
    """Learning rate of the kept weights."""


class Override(Settings):
    """What is other for some linears; a number alone is a sparsity."""

    sparsity: float | None = Field(default=None, ge=0, lt=1)
    """Share of groups that is pruned."""
    group_size: int | None = None
    """Input features a group. A serving engine joins q, k and v, gate and up, and the experts of a mixture: the same
    for all of them."""

    @model_validator(mode="before")
    @classmethod
    def _number(cls, value: Any) -> Any:  # noqa: ANN401 - whatever stands in the file
        return value if isinstance(value, (Mapping, cls)) else {"sparsity": value}

    @model_validator(mode="after")
    def _says_something(self) -> "Override":
        if self.sparsity is None and self.group_size is None:
            raise ValueError("gives neither sparsity nor group_size")
        if self.group_size is not None:
            _check_group_size(self.group_size)
        return self

    @model_serializer
    def _short(self) -> float | dict[str, float | int] | None:
        if self.group_size is None:
            return self.sparsity
        return {name: value for name, value in self if value is not None}


class Recipe(Settings):
    """Settings of one compression; together with the model and the text they determine the checkpoint."""

    sparsity: float = Field(default=0.5, ge=0, lt=1)
    """Share of groups that is pruned."""
    lm_head: float | None = Field(default=None, ge=0, lt=1)
    """The same for the output head, and with it the embedding that is tied to it; None leaves both dense."""
    group_size: int = 16
    """Input features a group; one of 8, 16, 32, 64, 128."""
    pattern: str = "row"
    """Scope of the mask: ``row`` (every row keeps the same number), ``matrix``, ``model`` (one budget for all linears
    of a group size but those that have a sparsity of their own; with ``prune``, or with importance ``kfac``), or
    ``n:m`` (n of m adjacent groups)."""
    importance: Importance = "obs"
    """Formula of a group's importance, see :mod:`vllm_gqsa.offline.importance`; ``kfac`` is ``obs`` but with patterns
    ``matrix`` and ``model``. ``prune`` has its own."""
    compensate: bool = True
    """Whether later weights take up the error of earlier ones (GPTQ / SparseGPT order), or are rounded as they are."""
    damping: float = Field(default=0.01, gt=0)
    """Share of the Hessian's mean diagonal that is added to its diagonal."""
    samples: int = Field(default=128, ge=1, lt=2**31)
    """Calibration windows."""
    context: int = Field(default=512, ge=2, lt=2**31)
    """Tokens a window."""
    seed: int = Field(default=0, ge=-(2**63), lt=2**63)
    """Chooses the calibration windows."""
    ignore: Annotated[tuple[str, ...], Field()] = ()
    """Linears left dense: names, or ``re:`` and a regular expression. The head is, unless ``lm_head`` is set."""
    overrides: Mapping[str, Override] = {}
    """Other sparsities and group sizes: a name, or ``re:`` and a regular expression, and what is other there. The first
    that fits and gives a sparsity counts for it, and so with the group size. The head has its sparsity from ``lm_head``
    alone."""
    precision: Precision = "auto"
    """Arithmetic of the training stages; parameters are float32 always. ``auto``: bfloat16 where the device multiplies
    it in hardware."""
    prune: GradualPruning | None = None
    """Pruning in the course of end-to-end training, in place of pruning at one stroke; None leaves it out."""
    bqpo: BlockTraining | None = None
    """Block by block training; None leaves it out."""
    distill: Distillation | None = None
    """End-to-end training of kept weights, scales and zero points; None leaves it out."""
    oqp: EndToEnd | None = None
    """End-to-end training of scales and zero points, the last stage; None leaves it out."""

    def whole_model_stages(self) -> dict[str, WholeModel]:
        """The stages that train the whole model, in order."""
        stages = {"prune": self.prune, "distill": self.distill, "oqp": self.oqp}
        return {name: stage for name, stage in stages.items() if stage is not None}

    @property
    def compares_rows_by_gradients(self) -> bool:
        """Whether the mask depends on gradients of the dense model's loss."""
        return self.importance == "kfac" and self.pattern in ("matrix", "model") and self.prune is None

    def sparsity_of(self, name: str) -> float:
        """Share of groups to prune in the linear ``name`` (the head has its own, see :meth:`for_head`)."""
        shares = (each.sparsity for each in self._overrides_of(name))
        return next((share for share in shares if share is not None), self.sparsity)

    def shares_budget(self, name: str) -> bool:
        """Whether the linear ``name`` is pruned by a budget that it shares with others."""
        return self.pattern == "model" and all(each.sparsity is None for each in self._overrides_of(name))

    def budgets(self, names: Iterable[str]) -> list[list[str]]:
        """Those of the linears that share a budget, for each budget."""
        found: dict[int, list[str]] = {}
        for name in filter(self.shares_budget, names):
            found.setdefault(self.group_size_of(name), []).append(name)
        return list(found.values())

    def group_size_of(self, name: str) -> int:
        """Input features a group of the linear ``name``, or of the head's matrix."""
        return next((each.group_size for each in self._overrides_of(name) if each.group_size), self.group_size)

    def _overrides_of(self, name: str) -> Iterator[Override]:
        return (override for entry, override in self.overrides.items() if is_ignored(name, (entry,)))

    @property
    def left_dense(self) -> tuple[str, ...]:
        """What config.json lists as ignored: ``ignore``, and the head where it stays dense."""
        return tuple(dict.fromkeys((HEAD, *self.ignore))) if self.lm_head is None else self.ignore

    def for_linear(self, name: str) -> "Recipe":
        """The recipe of one linear, its overrides applied; in place of the model its scope is the matrix."""
        pattern = "matrix" if self.pattern == "model" else self.pattern
        changes = {"sparsity": self.sparsity_of(name), "group_size": self.group_size_of(name), "pattern": pattern}
        return self.model_copy(update=changes)

    def for_head(self, name: str) -> "Recipe":
        """The recipe of the head alone. An ``n:m`` pattern prunes a fixed share, so the head's scope is the row then;
        in place of the model it is the matrix.

        Args:
            name: of the head's matrix: its own, or that of the embedding that it is tied to.

        Raises:
            ValueError: the head stays dense.
        """
        if self.lm_head is None:
            raise ValueError("the recipe leaves the head dense")
        pattern = "row" if ":" in self.pattern else "matrix" if self.pattern == "model" else self.pattern
        changes = {"sparsity": self.lm_head, "pattern": pattern, "group_size": self.group_size_of(name)}
        return self.model_copy(update=changes)

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        _check_group_size(self.group_size)
        check_ignore(self.ignore)
        try:
            check_ignore(tuple(self.overrides))
        except ValueError as error:
            raise ValueError(str(error).replace("ignore", "overrides", 1)) from error
        if self.pattern not in ("row", "matrix", "model"):
            n, m = parse_pattern(self.pattern)
            if abs(self.sparsity - (1 - n / m)) > 1e-6:
                raise ValueError(
                    f"pattern {self.pattern} prunes {1 - n / m:g} of the groups, sparsity says {self.sparsity:g}"
                )
        if self.prune is not None and self.bqpo is not None:
            raise ValueError("prune takes the place of one-shot pruning and bqpo, which follows it; leave out one")
        if self.prune is not None and ":" in self.pattern:
            raise ValueError(
                f"prune raises the share of pruned groups step by step, which pattern {self.pattern} cannot; choose "
                "row, matrix or model, or a recipe without prune"
            )
        if self.prune is not None and self.lm_head is None:
            for name in ("importance", "compensate", "damping"):
                if (value := getattr(self, name)) != Recipe.model_fields[name].default:
                    raise ValueError(
                        f"{name} {value} has no effect with prune, which chooses and trains by rules of its own; leave "
                        "it out, or choose a recipe without prune, such as one-shot or blockwise"
                    )
        if self.prune is None and self.pattern == "model" and self.importance != "kfac":
            raise ValueError(
                "pattern model compares all linears, which takes the stage prune or importance kfac; give one of them, "
                "or choose row or matrix"
            )
        if ":" in self.pattern and any(o.sparsity is not None for o in self.overrides.values()):
            raise ValueError(
                f"pattern {self.pattern} prunes the same share everywhere; leave out sparsities of overrides"
            )
        if self.lm_head is not None and is_ignored(HEAD, self.ignore):
            raise ValueError(f"ignore takes {HEAD}, which is to be compressed; give one of --lm-head and --ignore")
        return self

    @classmethod
    def read(cls, name: str) -> "Recipe":
        """A recipe by its name in :data:`NAMED`, or from a YAML file.

        Raises:
            InputError: neither, or the file breaks the rules above.
        """
        if name in NAMED:
            return NAMED[name]
        path = Path(name)
        if not path.is_file():
            raise InputError(f"--recipe {name}: is neither one of {', '.join(NAMED)} nor a file")
        try:
            return cls.model_validate(yaml.safe_load(path.read_text("utf-8")) or {})
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: is not YAML: {error}") from error
        except ValidationError as error:
            raise InputError(f"{path}: {_first_error(error)}") from error

    def changed(self, settings: Mapping[str, Any]) -> "Recipe":
        """The recipe with some settings replaced.

        Raises:
            InputError: a value is not allowed; the message begins with its option on the command line.
        """
        try:
            return Recipe.model_validate({**self.model_dump(), **settings})
        except ValidationError as error:
            place, _, problem = _first_error(error).rpartition(": ")
            option = f"--{place.replace('_', '-')}: " if place in Recipe.model_fields else ""
            raise InputError(option + (problem if option else _first_error(error))) from error

    def to_yaml(self) -> str:
        """As :meth:`read` takes it from a file, every setting written out."""
        return str(yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False))


def _check_group_size(value: int) -> None:
    if value not in GROUP_SIZES:
        raise ValueError(f"group_size {value} is not one of {', '.join(map(str, GROUP_SIZES))}")


def _first_error(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    place = ".".join(str(part) for part in first["loc"])
    return (f"{place}: " if place else "") + first["msg"].removeprefix("Value error, ")


NAMED: Mapping[str, Recipe] = {
    "one-shot": Recipe(pattern="model", importance="kfac"),
    "quick": Recipe(pattern="model", prune=GradualPruning(tokens=110_000, batch=1)),
    "default": Recipe(pattern="model", prune=GradualPruning(tokens=550_000, batch=1)),
    # With two windows a step the smaller rate of the others was no better (docs/accuracy.md).
    "best": Recipe(pattern="model", prune=GradualPruning(tokens=3_000_000, batch=2, weight_lr=1e-3)),
    "blockwise": Recipe(pattern="matrix", importance="kfac", bqpo=BlockTraining()),
}
"""Recipes by name. ``blockwise`` is for models too large to be trained as a whole."""
