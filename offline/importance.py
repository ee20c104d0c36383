"""Hessians of a linear's inputs, and what they say about the importance of a group of weights."""

from dataclasses import dataclass

import torch

from vllm_gqsa.offline.recipe import Importance

__all__ = ["HessianSum", "InverseHessian", "curvature_importance", "group_importance"]

_UNSEEN = 1e-15
"""Mean square of inputs and gradients that were never seen."""


class HessianSum:
    """Sums x x^T over calibration tokens.

    Attributes:
        total: float32 ``[in_features, in_features]``.
        tokens: how many tokens were summed.
    """

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.total = torch.zeros(in_features, in_features, device=device)
        self.tokens = 0

    def add(self, inputs: torch.Tensor) -> None:
        """Add inputs ``[..., in_features]``."""
        rows = inputs.reshape(-1, inputs.shape[-1]).float()
        self.total.addmm_(rows.T, rows)
        self.tokens += rows.shape[0]

    def hessian(self) -> torch.Tensor:
        """H = (2 / n) sum x x^T, float32 ``[in_features, in_features]``.

        Where no token came by, as at an expert that was never chosen, the identity: all inputs count alike.
        """
        if not self.tokens:
            return torch.eye(self.total.shape[0], device=self.total.device)
        return self.total * (2 / self.tokens)


@dataclass(frozen=True)
class InverseHessian:
    """What the formulas need of one Hessian; linears that share their input share it.

    Attributes:
        hessian_diagonal: float32 ``[K]``, before damping.
        dead: bool ``[K]``, inputs that were always 0: their weights are set to 0.
        inverse: float32 ``[K, K]``, of the damped Hessian.
        upper: float32 ``[K, K]``, upper Cholesky factor U of the inverse, inverse = U^T U.
    """

    hessian_diagonal: torch.Tensor
    dead: torch.Tensor
    inverse: torch.Tensor
    upper: torch.Tensor

    @classmethod
    def of(cls, hessian: torch.Tensor, damping: float) -> "InverseHessian":
        """Damp by ``damping`` times the mean diagonal and invert.

        Raises:
            ValueError: the Hessian is not finite, or still not positive definite at 100 times the damping.
        """
        if not torch.isfinite(hessian).all():
            raise ValueError("the Hessian is not finite: the model's activations overflow on this text")
        diagonal = hessian.diagonal().clone()
        dead = diagonal == 0
        damped = hessian + torch.diag(dead.float())
        mean = diagonal.mean().clamp(min=1e-12)
        for factor in (1, 10, 100):
            attempt = damped + torch.eye(len(diagonal), device=hessian.device) * (damping * factor * mean)
            # Backwards, the lower factor of H is an upper R with H = R R^T, and U = R^-1: one factorisation and one
            # triangular solve instead of an inverse and a second factorisation.
            backwards, failed = torch.linalg.cholesky_ex(attempt.flip(0, 1))
            if not failed:
                identity = torch.eye(len(diagonal), device=hessian.device)
                upper = torch.linalg.solve_triangular(backwards.flip(0, 1), identity, upper=True)
                return cls(diagonal, dead, upper.T @ upper, upper)
        raise ValueError(f"the Hessian is not positive definite, even damped by {damping * 100:g} of its mean diagonal")


def group_importance(
    weight: torch.Tensor,
    inverse: InverseHessian,
    group_size: int,
    formula: Importance,
    gradient_square: torch.Tensor | None = None,
) -> torch.Tensor:
    """Importance of every group of a weight.

    * ``obs``: sum of w^2 / [H^-1]_jj (optimal brain surgeon).
    * ``wanda``: sum of w^2 H_jj (Wanda with squares).
    * ``kfac``: that of ``obs`` times the mean square of the loss's gradient with respect to the row's output, by which
      groups of different rows compare (a Kronecker product for the loss's curvature, arXiv 1503.05671, of its factor
      for the outputs the diagonal).
    * ``block-obs``: w_Q^T ([H^-1]_QQ)^-1 w_Q, the loss of removing the group Q when all others may adapt.

    Args:
        weight: float32 ``[N, K]``.
        inverse: of the linear's input.
        group_size: G.
        formula: one of the above.
        gradient_square: float32 ``[N]`` for ``kfac``; None where only groups of a row are compared.

    Returns:
        float32 ``[N, K / G]``, not negative; larger is more important.
    """
    rows, columns = weight.shape
    groups = columns // group_size
    if formula == "block-obs":
        blocks = inverse.inverse.view(groups, group_size, groups, group_size)
        own = blocks[torch.arange(groups), :, torch.arange(groups), :]
        split = weight.view(rows, groups, group_size).permute(1, 2, 0)
        lower = torch.linalg.cholesky(own)
        return torch.linalg.solve_triangular(lower, split, upper=False).square().sum(1).T.contiguous()
    scale = inverse.hessian_diagonal if formula == "wanda" else inverse.inverse.diagonal().reciprocal()
    scores = (weight.square() * scale).view(rows, groups, group_size).sum(-1)
    return scores if gradient_square is None else scores * gradient_square[:, None]


def curvature_importance(
    weight: torch.Tensor, input_square: torch.Tensor, gradient_square: torch.Tensor, group_size: int
) -> torch.Tensor:
    """How much the loss would rise without a group, up to a factor that all linears have in common.

    To second order that is half the sum of w^2 times the diagonal of the loss's Hessian, and this diagonal is taken for
    the product of the two mean squares (the diagonal of K-FAC, arXiv 1503.05671).

    Args:
        weight: float32 ``[N, K]``.
        input_square: float32 ``[K]``, mean square of the input.
        gradient_square: float32 ``[N]``, mean square of the loss's gradient with respect to the output.
        group_size: G.

    Returns:
        Float32 ``[N, K / G]``.
    """
    # An expert that was never chosen has seen nothing: its weights count alike, and for less than all others.
    inputs, gradients = (s if s.any() else torch.full_like(s, _UNSEEN) for s in (input_square, gradient_square))
    return (weight.square() * (gradients[:, None] * inputs)).view(weight.shape[0], -1, group_size).sum(-1)
