"""What is done to the weights: every choice that changes the result stands here."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from vllm_gqsa.format import GROUP_SIZES, check_ignore, parse_pattern

__all__ = ["Importance", "Recipe"]

Importance = Literal["obs", "wanda", "block-obs"]


class Recipe(BaseModel):
    """Settings of one compression; together with the model and the text they determine the checkpoint."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sparsity: float = Field(default=0.5, ge=0, lt=1)
    """Share of groups that is pruned."""
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
    ignore: Annotated[tuple[str, ...], Field()] = ("lm_head",)
    """Modules left dense: names, or ``re:`` and a regular expression."""

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        if self.group_size not in GROUP_SIZES:
            raise ValueError(f"group_size {self.group_size} is not one of {', '.join(map(str, GROUP_SIZES))}")
        check_ignore(self.ignore)
        if self.pattern not in ("row", "matrix"):
            n, m = parse_pattern(self.pattern)
            if abs(self.sparsity - (1 - n / m)) > 1e-6:
                raise ValueError(
                    f"pattern {self.pattern} prunes {1 - n / m:g} of the groups, sparsity says {self.sparsity:g}"
                )
        return self
