"""The output head as one more thing to compress, together with the embedding where the two are tied.

A tied model has one matrix for both: it is compressed as a head, and the lookup takes its rows from what came out.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch

from vllm_gqsa.format import HEAD, GroupSparseMatrix, is_ignored
from vllm_gqsa.offline.errors import InputError
from vllm_gqsa.offline.families import Family
from vllm_gqsa.offline.importance import HessianSum, InverseHessian
from vllm_gqsa.offline.recipe import Recipe
from vllm_gqsa.offline.source import DenseModel
from vllm_gqsa.offline.sparsify import sparsify

__all__ = ["compress_head", "find_head", "head_name"]


def head_name(config: Any, family: Family, recipe: Recipe) -> str | None:  # noqa: ANN401 - transformers' class
    """Name of the matrix of the head: lm_head, or the embedding that it is tied to; None where it stays dense.

    Raises:
        InputError: a serving engine takes no compressed head of this family, or the recipe ignores the embedding.
    """
    if recipe.lm_head is None:
        return None
    if family.embedding is None:
        raise InputError(
            f"--lm-head: vLLM serves {config.model_type} models with a dense output head only; leave out --lm-head"
        )
    if not config.tie_word_embeddings:
        return HEAD
    if is_ignored(family.embedding, recipe.ignore):
        raise InputError(
            f"ignore takes {family.embedding}, which is tied to {HEAD}; give one of --lm-head and --ignore"
        )
    return family.embedding


def find_head(model: DenseModel, family: Family, recipe: Recipe) -> str | None:
    """:func:`head_name`, after looking at what the files of the model say about it.

    Raises:
        InputError: as above; or config.json ties the head to the embedding, and the files hold another one, which some
            programs would use and others not.
    """
    embedding = family.embedding
    tied = model.config.tie_word_embeddings and embedding is not None and f"{HEAD}.weight" in model
    if tied and not torch.equal(model.tensor(f"{HEAD}.weight"), model.tensor(f"{embedding}.weight")):
        raise InputError(
            f"{model.folder}: config.json ties {HEAD} to {embedding}, but {HEAD}.weight holds other values; set "
            "tie_word_embeddings to false in it"
        )
    return head_name(model.config, family, recipe)


def compress_head(
    name: str, weight: torch.Tensor, inputs: Iterable[torch.Tensor], recipe: Recipe, device: torch.device
) -> GroupSparseMatrix:
    """Compress the matrix of the head.

    Args:
        name: lm_head or the embedding, for messages.
        weight: ``[vocabulary, hidden_size]``, in any floating-point dtype.
        inputs: what the head gets on the calibration windows, ``[..., hidden_size]`` each.
        recipe: the settings.
        device: where to compute.

    Returns:
        The matrix, on the CPU.

    Raises:
        InputError: weight or inputs are not finite.
    """
    total = HessianSum(weight.shape[1], device)
    for part in inputs:
        total.add(part)
    try:
        inverse = InverseHessian.of(total.hessian(), recipe.damping)
        if name != HEAD:
            # An input that the head never sees stands in the embedding all the same.
            inverse = replace(inverse, dead=torch.zeros_like(inverse.dead))
        return sparsify(weight, inverse, recipe.for_head(name))
    except ValueError as error:
        raise InputError(f"{name}: {error}") from error
