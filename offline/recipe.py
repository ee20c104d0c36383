"""What is done to the weights: every choice that changes the result stands here."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from vllm_gqsa.format import GROUP_SIZES, HEAD, check_ignore, is_ignored, parse_pattern

__all__ = ["Importance", "Recipe"]

Importance = Literal["obs", "wanda", "block-obs"]


class Recipe(BaseModel):
    """Settings of one compression; together with the model and the text they determine the checkpoint."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sparsity: float = Field(default=0.5, ge=0, lt=1)
    """Share of groups that is pruned."""
    lm_head: float | None = Field(default=None, ge=0, lt=1)
    """The same for the output head, and with it the embedding that is tied to it; None leaves both dense."""
    group_size: int = 16
    """Input features a group; one of 8, 16, 32, 64, 128."""
    pattern: str = "row"
    """Scope of the mask: ``row`` (every row keeps the same number), ``matrix``, or ``n:m`` (n of m adjacent groups)."""
    importance: Importance = "obs"
    """Formula of a group's importance, see :mod:`vllm_gqsa.offline.importance`."""
    compensate: bool = True
    """Whether later weights take up the error of earlier ones (GPTQ / SparseGPT order), or are rounded as they are."""
    damping: float = Field(default=0.01, gt=0)
    """Share of the Hessian's mean diagonal that is added to its diagonal."""
    samples: int = Field(default=128, ge=1)
    """Calibration windows."""
    context: int = Field(default=512, ge=2)
    """Tokens a window."""
    seed: int = 0
    """Chooses the calibration windows."""
    ignore: Annotated[tuple[str, ...], Field()] = ()
    """Linears left dense: names, or ``re:`` and a regular expression. The head is, unless ``lm_head`` is set."""

    @property
    def left_dense(self) -> tuple[str, ...]:
        """What config.json lists as ignored: ``ignore``, and the head where it stays dense."""
        return tuple(dict.fromkeys((HEAD, *self.ignore))) if self.lm_head is None else self.ignore

    def for_head(self) -> "Recipe":
        """The recipe of the head alone. An ``n:m`` pattern prunes a fixed share, so the head's scope is the row then.

        Raises:
            ValueError: the head stays dense.
        """
        if self.lm_head is None:
            raise ValueError("the recipe leaves the head dense")
        pattern = "row" if ":" in self.pattern else self.pattern
        return self.model_copy(update={"sparsity": self.lm_head, "pattern": pattern})

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        if self.group_size not in GROUP_SIZES:
            raise ValueError(f"group_size {self.group_size} is not one of {', '.join(map(str, GROUP_SIZES))}")
        check_ignore(self.ignore)
        if self.lm_head is not None and is_ignored(HEAD, self.ignore):
            raise ValueError(f"ignore takes {HEAD}, which is to be compressed; give one of --lm-head and --ignore")
        if self.pattern not in ("row", "matrix"):
            n, m = parse_pattern(self.pattern)
            if abs(self.sparsity - (1 - n / m)) > 1e-6:
                raise ValueError(
                    f"pattern {self.pattern} prunes {1 - n / m:g} of the groups, sparsity says {self.sparsity:g}"
                )
        return self
