"""Training of the whole model: gradual pruning, distillation of the kept weights, and E2E-OQP (scales alone).

Each reads the shards of the stage before it (pruning, the first, the dense model) and writes shards of the same kind.
The state of the training is saved every few minutes; a run that was killed goes on from there and ends with the same
bytes. Under ``torchrun`` several processes share the windows of each step, see :mod:`vllm_gqsa.offline.parallel`.
"""

import functools
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from vllm_gqsa.experts import MIXTURES
from vllm_gqsa.format import GroupSparseMatrix
from vllm_gqsa.offline import parallel
from vllm_gqsa.offline.arithmetic import mixed, reproducible, resolve_precision
from vllm_gqsa.offline.attention import use_plain_attention
from vllm_gqsa.offline.block import CompressedBlock
from vllm_gqsa.offline.errors import InputError
from vllm_gqsa.offline.families import Family
from vllm_gqsa.offline.files import write_atomically
from vllm_gqsa.offline.mask import choose_across
from vllm_gqsa.offline.quantizer import GroupSparseLinear, MaskedLinear, TrainedLinear
from vllm_gqsa.offline.recipe import Distillation, GradualPruning, Recipe, WholeModel
from vllm_gqsa.offline.source import DenseModel
from vllm_gqsa.offline.stream import load_weights, meta_model
from vllm_gqsa.offline.training import Optimizer, divergence, replace_linears, sample_order

__all__ = ["SAVE_SECONDS", "EndToEndJob", "train_end_to_end"]

SAVE_SECONDS = 300.0
"""Time between two saves of the state of the training."""
_LONG_SAVE = 15.0
"""Seconds; of a save that takes longer, the next comes later by as many times."""
_JUDGES = 8
"""At most this many windows judge the model before and after."""
_OBSERVED = 16
"""Windows that say how large a linear's inputs and gradients are at first."""
_MEMORY = 0.9
"""What a step leaves of the weight that the steps before it have in these means."""


@dataclass(frozen=True)
class EndToEndJob:
    """What a stage works on.

    Attributes:
        name: of the stage, for messages.
        settings: of the stage.
        recipe: the whole recipe.
        model: the dense model.
        family: its description.
        linears: full names of the linears to compress, one list a block.
        blocks: what the stage before made, one a block; empty ones begin at the dense model.
        windows: tokens to train on, ``[windows, context]``; all but the last :data:`_JUDGES` (or an eighth).
        first: windows that the stages before have used; training goes on behind them.
        batch: windows at a time through the model, in each process.
        device: where to compute.
        state: file for the state of the training.
        progress: called with steps done and steps in all.
    """

    name: str
    settings: WholeModel
    recipe: Recipe
    model: DenseModel
    family: Family
    linears: list[list[str]]
    blocks: list[CompressedBlock]
    windows: torch.Tensor
    first: int
    batch: int
    device: torch.device
    state: Path
    progress: Callable[[int, int], None]

    @property
    def precision(self) -> str:
        """``bfloat16`` or ``float32``: what matrix products are computed in."""
        return resolve_precision(self.recipe.precision, self.device)

    def linear(self, name: str, dense: Any, matrix: GroupSparseMatrix | None) -> TrainedLinear:  # noqa: ANN401
        """What a linear of the model is while it is trained.

        Args:
            name: its full name.
            dense: the linear, without weights.
            matrix: what the stage before made of it; None before pruning.
        """
        if matrix is None:
            shape = (dense.out_features, dense.in_features)
            return MaskedLinear(shape, self.recipe.group_size_of(name), dense.bias, self.device)
        frozen = not isinstance(self.settings, Distillation)
        return GroupSparseLinear(matrix, dense.bias, self.device, frozen_codes=frozen)


def train_end_to_end(job: EndToEndJob) -> tuple[list[CompressedBlock], dict[str, Any]]:
    """Train, or go on training.

    Returns:
        The blocks, and facts for the report: loss on the judging windows before and after, losses of the steps, tokens
        trained on, and how many of them are different. Where training has made the loss on the judging windows worse
        (but for pruning, which always does), the blocks are those it began with, and ``kept`` is false.

    Raises:
        InputError: the loss is not finite.
    """
    gc.collect()  # the model of a stage before, which holds itself where its blocks are recomputed
    with reproducible(job.device):
        student = _Student(job)
        teacher = _teacher(job) if job.settings.loss == "kl" else None
        facts = _train(job, student, teacher)
    facts["kept"] = isinstance(job.settings, GradualPruning) or facts["after"] <= facts["before"]
    return (student.blocks() if facts["kept"] else job.blocks), facts


def _teacher(job: EndToEndJob) -> nn.Module:
    """The dense model, in the arithmetic of the training."""
    model: PreTrainedModel = meta_model(job.model.config)
    load_weights(model, job.model, job.model.config, job.device, dtype=getattr(torch, job.precision))
    use_plain_attention(model, job.device, job.precision)
    return model


class _Student:
    """The compressed model in training."""

    def __init__(self, job: EndToEndJob) -> None:
        self._job = job
        self.model = meta_model(job.model.config)
        self.model.config.use_cache = False
        self.linears: dict[str, TrainedLinear] = {}
        for names, block in zip(job.linears, job.blocks, strict=True):
            for name in names:
                self.linears[name] = job.linear(name, self.model.get_submodule(name), block.matrices.get(name))
                self.model.set_submodule(name, self.linears[name])
        load_weights(self.model, job.model, job.model.config, job.device)
        with torch.no_grad():
            for block in job.blocks:
                for name, tensor in block.tensors.items():
                    self.model.get_parameter(name).copy_(tensor)
        use_plain_attention(self.model, job.device, job.precision, job.windows.shape[1])
        # Only now, since the biases have not had their values before. What stands outside the blocks stays as it is.
        self._prefix = job.family.blocks + "."
        local = {name.removeprefix(self._prefix): linear for name, linear in self.linears.items()}
        blocks = self.model.get_submodule(job.family.blocks)
        self.kinds = replace_linears(blocks, local, job.settings)
        if job.settings.checkpointing:
            for block in blocks:
                block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for parameters in self.kinds.values() for p in parameters]

    @torch.no_grad()
    def round_norms(self) -> None:
        """Round norms and biases to the dtype that they are stored in."""
        for name, parameter in self._norms().items():
            parameter.copy_(parameter.to(self._job.model.tensor(name).dtype))

    def _norms(self) -> dict[str, nn.Parameter]:
        names = {id(p): name for name, p in self.model.named_parameters()}
        return {names[id(p)]: p for p in self.kinds.get("norm_lr", [])}

    def blocks(self) -> list[CompressedBlock]:
        """What is stored."""
        changed = {name: p.detach().cpu().clone() for name, p in self._norms().items()}
        done = []
        for index, (linears, block) in enumerate(zip(self._job.linears, self._job.blocks, strict=True)):
            own = f"{self._prefix}{index}."
            tensors = {name: t for name, t in changed.items() if name.startswith(own)}
            matrices = {name: self.linears[name].matrix() for name in linears}
            done.append(CompressedBlock(matrices, {**block.tensors, **tensors}))
        return done


class _Pruning:
    """Chooses the mask anew every few steps; does nothing in stages that leave the mask as it is."""

    def __init__(self, job: EndToEndJob, student: _Student, steps: int) -> None:
        self._job = job
        self._linears = {n: linear for n, linear in student.linears.items() if isinstance(linear, MaskedLinear)}
        settings = job.settings
        self._last = min(round(settings.ramp * steps), steps - 1) if isinstance(settings, GradualPruning) else -1
        self._interval = settings.interval if isinstance(settings, GradualPruning) else 1
        self._weights = 0.0, 0.0
        self._hooks = [linear.register_forward_hook(self._note) for linear in self._linears.values()]

    def observe(self, losses: "_Losses", windows: torch.Tensor) -> None:
        """Measure how large inputs and gradients are in the model while it is still dense.

        Args:
            losses: next-token losses of the model; from itself it does not diverge.
            windows: tokens ``[windows, context]``.
        """
        if not self._linears:
            return
        self._weights = 1 / windows.numel(), 1 / windows.numel()
        for part in windows.split(self._job.settings.batch):  # no more memory than a step takes
            losses.of(part, backward=True)
        self._weights = 0.0, 0.0
        losses.student.zero_grad(set_to_none=True)
        self.after_gradients()  # the processes may multiply in other orders; the first masks must be the same

    def before_step(self, step: int) -> None:
        """Choose, if it is time to; once the last choice is made, train what will be stored."""
        for linear in self._linears.values():
            linear.rounded = step >= self._last
        if step > self._last:
            for hook in self._hooks:
                hook.remove()
            return
        if step % self._interval == 0 or step == self._last:
            rest = 1 - step / self._last if self._last else 0.0
            self._choose(1 - rest**3)
        # Each process sees a share of the tokens, and gradients of the mean over that share; the means are averaged.
        weight = (1 - _MEMORY) / (self._job.settings.batch * self._job.windows.shape[1])
        self._weights = weight * parallel.processes(), weight / parallel.processes()
        for square in self._squares():
            square.mul_(_MEMORY)

    def after_gradients(self) -> None:
        """Bring together what the processes have seen."""
        parallel.average(self._squares())

    def _squares(self) -> list[torch.Tensor]:
        return [square for linear in self._linears.values() for square in linear.squares()]

    def _choose(self, progress: float) -> None:
        recipe = self._job.recipe
        assert recipe.prune is not None
        for name, linear in self._linears.items():
            if not recipe.shares_budget(name):
                own = recipe.for_linear(name)
                linear.prune(own.sparsity * progress, own.pattern)
        for names in recipe.budgets(self._linears):
            linears = [self._linears[name] for name in names]
            importances = [linear.importance() for linear in linears]
            masks = choose_across(importances, recipe.sparsity * progress, recipe.prune.floor)
            for linear, keep in zip(linears, masks, strict=True):
                linear.keep = keep

    def _note(self, linear: MaskedLinear, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        """Forward hook that adds the squares of a linear's inputs and of the gradients of its outputs.

        Both when the gradient comes: a block that is recomputed in the backward pass sees its inputs twice, but only
        its first outputs get gradients.
        """

        def squares(values: torch.Tensor) -> torch.Tensor:
            # An OPT's feed-forward layer gets its inputs flattened.
            return values.detach().float().flatten(0, -2).square().sum(0)

        def add(of_inputs: torch.Tensor, gradient: torch.Tensor) -> None:
            linear.input_square.add_(of_inputs, alpha=weights[0])
            linear.gradient_square.add_(squares(gradient), alpha=weights[1])

        if output.requires_grad:
            weights = self._weights
            output.register_hook(functools.partial(add, squares(args[0])))

    def state(self) -> list[tuple[torch.Tensor, ...]]:
        """What the choices depend on and have led to."""
        return [(linear.keep, *linear.squares()) for linear in self._linears.values()]

    def restore(self, state: list[tuple[torch.Tensor, ...]]) -> None:
        """Set all to what :meth:`state` gave."""
        for linear, (keep, *squares) in zip(self._linears.values(), state, strict=True):
            linear.keep = keep
            linear.input_square, linear.gradient_square = squares


class _Losses:
    """The loss of some windows, and its gradients."""

    def __init__(self, job: EndToEndJob, student: nn.Module, teacher: nn.Module | None) -> None:
        self._job = job
        self.student, self._teacher = student, teacher

    def of(self, windows: torch.Tensor, *, backward: bool = False) -> float:
        """Mean loss over all positions; with ``backward`` its gradients are added up too.

        Args:
            windows: tokens ``[windows, context]``.
            backward: add up gradients.
        """
        *parts, last = windows.split(self._job.batch)
        total = 0.0
        with parallel.apart(self.student):
            for part in parts:
                total += self._of_part(part, len(part) / len(windows), backward=backward)
        return total + self._of_part(last, len(last) / len(windows), backward=backward)

    def _of_part(self, part: torch.Tensor, weight: float, *, backward: bool) -> float:
        tokens = part.to(self._job.device)
        with torch.no_grad():
            wanted = None if self._teacher is None else self._teacher(tokens, use_cache=False).logits
        with torch.set_grad_enabled(backward), mixed(self._job.precision, self._job.device):
            logits = self.student(tokens, use_cache=False).logits
        with torch.set_grad_enabled(backward):
            loss = self._of_logits(logits, wanted, tokens) * weight
        if backward:
            loss.backward()
        return float(loss.detach())

    def _of_logits(self, logits: torch.Tensor, wanted: torch.Tensor | None, tokens: torch.Tensor) -> torch.Tensor:
        pieces = []
        for i in range(len(tokens)):  # a vocabulary is wide: the float32 logits of one window at a time
            if wanted is not None:
                pieces.append(divergence(logits[i], wanted[i]))
            else:
                pieces.append(checkpoint(_cross_entropy, logits[i, :-1], tokens[i, 1:], use_reentrant=False))
        return torch.stack(pieces).mean()


def _cross_entropy(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(logits.float(), tokens)


def _train(job: EndToEndJob, student: _Student, teacher: nn.Module | None) -> dict[str, Any]:
    held = max(1, min(_JUDGES, len(job.windows) // 8))
    windows, judges = job.windows[:-held], job.windows[-held:]
    if not len(windows):
        raise InputError(f"{job.name}: needs two windows of text or more; give more text")
    steps = job.settings.steps(windows.shape[1])
    tokens = steps * job.settings.batch * windows.shape[1]
    optimizer = Optimizer(student.kinds, job.settings, steps)
    pruning = _Pruning(job, student, steps)
    pruning.observe(_Losses(job, student.model, teacher=None), windows[:_OBSERVED])
    model = parallel.wrap(student.model, may_skip=job.model.config.model_type in MIXTURES)
    losses = _Losses(job, model, teacher)
    parallel.warm_up(model, lambda: losses.of(windows[:1], backward=True))
    state = _resume(job, student, optimizer, pruning) or {"step": 0, "curve": [], "before": losses.of(judges)}
    saved, pause = time.monotonic(), SAVE_SECONDS
    for step in range(state["step"], steps):
        pruning.before_step(step)
        start = job.first + step * job.settings.batch
        picked = _picked(len(windows), start, job.settings.batch, job.recipe.seed)
        loss = parallel.mean(losses.of(windows[parallel.share(picked)], backward=True))
        pruning.after_gradients()
        optimizer.step(step, loss, job.name)
        state["curve"].append(loss)
        state["step"] = step + 1
        if parallel.is_first() and (time.monotonic() - saved >= pause or step + 1 == steps):
            begun = time.monotonic()
            _save(job, student, optimizer, {**state, "pruning": pruning.state()})
            saved = time.monotonic()
            pause = SAVE_SECONDS * max(1.0, (saved - begun) / _LONG_SAVE)
        job.progress(step + 1, steps)
    # What is judged is what will be stored; a run that had only the end left has no rounded weights yet.
    pruning.before_step(steps)
    student.round_norms()
    return {
        "loss": {"kl": "KL divergence from the dense model", "ce": "cross-entropy"}[job.settings.loss],
        "before": state["before"],
        "after": losses.of(judges),
        "curve": state["curve"],
        "tokens": tokens,
        "distinct_tokens": min(tokens, windows.numel()),
    }


def _picked(count: int, start: int, batch: int, seed: int) -> torch.Tensor:
    """Numbers of the windows of a step: epoch after epoch, each in its own order."""
    places = range(start, start + batch)
    orders = {epoch: sample_order(count, epoch, seed) for epoch in {place // count for place in places}}
    return torch.stack([orders[place // count][place % count] for place in places])


def _save(job: EndToEndJob, student: _Student, optimizer: Optimizer, state: dict[str, Any]) -> None:
    whole = {**state, "parameters": [p.detach() for p in student.parameters], "adam": optimizer.adam.state_dict()}
    write_atomically(job.state, lambda path: torch.save(whole, path))


def _resume(job: EndToEndJob, student: _Student, optimizer: Optimizer, pruning: _Pruning) -> dict[str, Any] | None:
    """Set model, masks and optimiser to the state that was saved last, if one was."""
    if not job.state.exists():
        return None
    state: dict[str, Any] = torch.load(job.state, map_location=job.device, weights_only=True)
    with torch.no_grad():
        for parameter, value in zip(student.parameters, state.pop("parameters"), strict=True):
            parameter.copy_(value)
    optimizer.adam.load_state_dict(state.pop("adam"))
    pruning.restore(state.pop("pruning"))
    return state
