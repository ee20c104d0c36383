"""The passes over a model: block after block, end to end, and the head. Each leaves shards, and does nothing twice.

Of several processes of ``torchrun`` the first makes all passes, the others train with it in those end to end.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import nn

from vllm_gqsa.format import read_json
from vllm_gqsa.offline import parallel
from vllm_gqsa.offline.arithmetic import fast_float32, reproducible, resolve_precision
from vllm_gqsa.offline.block import BlockContext, CompressedBlock, install, scale_of_errors
from vllm_gqsa.offline.e2e import EndToEndJob, train_end_to_end
from vllm_gqsa.offline.errors import InputError
from vllm_gqsa.offline.families import Family, family_of
from vllm_gqsa.offline.files import PARTIAL, write_json, write_tensors
from vllm_gqsa.offline.gradients import WINDOWS, Squares, mean_squares
from vllm_gqsa.offline.head import compress_head
from vllm_gqsa.offline.importance import curvature_importance
from vllm_gqsa.offline.mask import FLOOR, share_budget
from vllm_gqsa.offline.recipe import Recipe
from vllm_gqsa.offline.source import DenseModel
from vllm_gqsa.offline.stages import stages_of
from vllm_gqsa.offline.stream import BlockRunner, ModelStream, meta_model, watch_inputs
from vllm_gqsa.offline.writer import read_block, shard_paths, write_block, write_head

__all__ = ["MEMORY", "Progress", "Work", "follow", "run_passes"]

MEMORY = 8e9
"""Bytes of hidden states above which they are mapped from files, unless a job says otherwise."""
_JUDGES = 8
"""Calibration windows that errors are measured on after training."""
Progress = Callable[[str, int, int], None]
"""Called with the name of a phase, steps done and steps in all."""


@dataclass(frozen=True)
class Work:
    """What the passes share.

    Attributes:
        output: folder of the checkpoint.
        folder: folder in it for what is needed until the checkpoint is finished.
        model: the dense model.
        family: its description.
        recipe: the settings.
        shapes: ``(out_features, in_features)`` of every compressed linear.
        head: name of the head's matrix where it is compressed, else None.
        calibration: tokens ``[windows, context]`` for Hessians and BQPO.
        training: tokens ``[windows, context]`` for the end-to-end stages.
        batch: windows at a time.
        device: where to compute.
        memory: bytes of hidden states above which they are mapped from files.
        progress: called as it goes on.
    """

    output: Path
    folder: Path
    model: DenseModel
    family: Family
    recipe: Recipe
    shapes: dict[str, tuple[int, int]]
    head: str | None
    calibration: torch.Tensor
    training: torch.Tensor
    batch: int
    device: torch.device
    memory: float
    progress: Progress

    def to_tell(self) -> dict[str, Any]:
        """What other processes make theirs of, by :meth:`from_told`; it can be pickled."""
        own = {"model": self.model.folder, "device": self.device.type, "progress": None}
        return {name: own.get(name, value) for name, value in vars(self).items() if name != "family"}

    @classmethod
    def from_told(cls, told: dict[str, Any]) -> "Work":
        """The same on this process's own device, and silent."""
        model = DenseModel(str(told["model"]))
        device = parallel.own_device(told["device"])
        own = {"model": model, "family": family_of(model.config), "device": device, "progress": lambda *_: None}
        return cls(**{**told, **own})

    def tensor_names(self) -> list[list[str]]:
        """Full names of the dense tensors of every block."""
        blocks = meta_model(self.model.config).get_submodule(self.family.blocks)
        return [[f"{self.family.blocks}.{i}.{name}" for name in b.state_dict()] for i, b in enumerate(blocks)]

    def linears(self) -> list[list[str]]:
        """Full names of the compressed linears of every block."""
        count = len(self.tensor_names())
        groups = [self.family.linear_names(i, self.recipe.ignore) for i in range(count)]
        return [[name for group in block for name in group] for block in groups]

    def block(self, shard: Path) -> CompressedBlock:
        """What a shard holds."""
        return read_block(shard, self.shapes, self.recipe.group_size_of)

    def stream(self) -> ModelStream:
        """The model's other parts, and its blocks dense."""
        return ModelStream(self.model, self.model.config, self.family, self.device)

    def allocate(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Hidden states, float32, uninitialised; in a file that has no name any more where two of their size, such as
        the streams of the dense and of the compressed model, are larger than ``memory``.
        """
        count = torch.Size(shape).numel()
        if 2 * 4 * count <= self.memory:
            return torch.empty(shape)
        path = self.folder / f"{PARTIAL}hidden"
        try:
            with path.open("wb") as file:  # now, since a process that writes to a mapped file on a full disk is killed
                os.posix_fallocate(file.fileno(), 0, 4 * count)
        except OSError as error:
            path.unlink(missing_ok=True)
            raise InputError(
                f"{self.folder}: no room for {4e-9 * count:.1f} GB of hidden states ({error.strerror}); free some, or "
                "give fewer --samples, or a --memory that keeps them out of files"
            ) from error
        mapped = torch.from_file(str(path), shared=True, size=count).view(shape)
        path.unlink()
        return mapped


def run_passes(work: Work) -> list[Path]:
    """Make the shards of all blocks and of the head; returns the files of the checkpoint."""
    names = work.tensor_names()
    stages = work.recipe.whole_model_stages()
    # Each pass but the last leaves its shards in a folder of its own. Gradual pruning begins at the dense model.
    passes = list(stages) if "prune" in stages else ["blocks", *stages]
    folders = [*[work.folder / name for name in passes[:-1]], work.output]
    shards = [shard_paths(folder, len(names), head=work.head is not None) for folder in folders]
    blocks = [paths[: len(names)] for paths in shards]
    for folder in (work.folder, *folders):
        folder.mkdir(parents=True, exist_ok=True)
    done = [number for number, paths in enumerate(blocks) if all(path.exists() for path in paths)]
    for number in range(max(done, default=-1) + 1, len(passes)):
        if passes[number] == "blocks":
            _compress_blocks(work, blocks[0], names)
        else:
            _train(work, passes[number], names, blocks[number - 1] if number else None, blocks[number])
    # Single blocks are measured as they are made; of the linears only the last state counts.
    for name in stages or (["blocks"] if work.recipe.bqpo is not None else []):
        if not _facts(work, f"errors-{name}").exists():
            write_json(_facts(work, f"errors-{name}"), _errors(work, blocks[passes.index(name)]))
    if work.head is not None:
        _compress_head(work, work.head, blocks[-1], shards[-1][len(names)])
    return shards[-1]


def _compress_blocks(work: Work, shards: list[Path], names: list[list[str]]) -> None:
    """Each block is fed what the compressed model feeds it, and compared with the dense block in the dense model."""
    squares = _squares(work)
    densities = _densities(work, squares)
    stream = work.stream()
    if work.recipe.bqpo is not None:
        stream.prepare_training(resolve_precision(work.recipe.precision, work.device), work.calibration.shape[1])
    inputs = stream.embed(work.calibration, work.batch, work.allocate)
    dense = work.allocate(tuple(inputs.shape)).copy_(inputs)
    linears = [work.family.linear_names(i, work.recipe.ignore) for i in range(len(shards))]
    epochs = 0 if work.recipe.bqpo is None else work.recipe.bqpo.epochs
    steps = [sum(len(group) for group in groups) + epochs for groups in linears]
    done = 0

    def step(count: int) -> None:
        nonlocal done
        done += count
        work.progress("compressing", done, sum(steps))

    def logits(window: int, hidden: torch.Tensor) -> torch.Tensor:
        return stream.logits(work.calibration[window][None], hidden[None])[0]

    for index, shard in enumerate(shards):
        block = stream.block(index)
        update = block.advance(dense, work.batch, work.device)
        prefix = f"{work.family.blocks}.{index}."
        if shard.exists():
            step(steps[index])
        else:
            context = BlockContext(
                index, block, linears[index], prefix, inputs, dense, scale_of_errors(update, dense), work.recipe,
                work.batch, work.device, step, squares, densities, logits if index + 1 == len(shards) else None,
            )  # fmt: skip
            state, errors = CompressedBlock(), {}
            for name, stage in stages_of(work.recipe).items():
                state = stage(context, state)
                # As they are stored, so that what is measured is what is stored.
                state.tensors = {n: t.to(work.model.tensor(n).dtype).float() for n, t in state.tensors.items()}
                install(block.module, prefix, state)
                errors[name] = context.error()
            write_json(_facts(work, f"block-{index:05d}"), {"block": index, "errors": errors, **context.facts})
            write_block(shard, work.model, names[index], state)
        if index + 1 < len(shards):
            # Always from the file, so that a run that is continued feeds the next block the same numbers.
            install(block.module, prefix, work.block(shard))
            block.advance(inputs, work.batch, work.device)


def _squares(work: Work) -> dict[str, Squares]:
    """Those of all linears, where the mask depends on them."""
    if not work.recipe.compares_rows_by_gradients:
        return {}
    path, blocks = work.folder / "squares.safetensors", work.linears()
    if not path.exists():
        prefixes = [f"{work.family.blocks}.{index}." for index in range(len(blocks))]
        linears = [{n.removeprefix(p): n for n in names} for p, names in zip(prefixes, blocks, strict=True)]
        windows = work.calibration[:: -(-len(work.calibration) // WINDOWS)]
        with reproducible(work.device):
            found = mean_squares(work.stream(), windows, linears, work.allocate)
        write_tensors(path, {f"{n}.{kind}": t for n, each in found.items() for kind, t in each._asdict().items()})
    tensors = {name: tensor.to(work.device) for name, tensor in load_file(path).items()}
    names = [name for block in blocks for name in block]
    return {name: Squares(*(tensors[f"{name}.{kind}"] for kind in Squares._fields)) for name in names}


def _densities(work: Work, squares: dict[str, Squares]) -> dict[str, float]:
    """Of the linears that share a budget: each has the density that one mask for all of them would leave it."""
    if work.recipe.pattern != "model":
        return {}
    path = work.folder / "densities.json"
    if not path.exists():

        def importance(name: str) -> torch.Tensor:
            weight = work.model.tensor(f"{name}.weight").to(work.device, torch.float32)
            return curvature_importance(weight, *squares[name], work.recipe.group_size_of(name))

        densities: dict[str, float] = {}
        for names in work.recipe.budgets(squares):
            shares = share_budget(map(importance, names), work.recipe.sparsity, FLOOR)
            densities |= zip(names, shares, strict=True)
        write_json(path, densities)
    return cast("dict[str, float]", read_json(path))


def _train(work: Work, name: str, names: list[list[str]], before: list[Path] | None, after: list[Path]) -> None:
    parallel.tell((work.to_tell(), name, before))
    job = _job(work, name, before)
    blocks, facts = train_end_to_end(job)
    write_json(_facts(work, name), facts)
    for shard, tensors, block in zip(after, names, blocks, strict=True):
        write_block(shard, work.model, tensors, block)
    job.state.unlink()


def follow() -> None:
    """Train with the first process of ``torchrun`` whenever it trains, until it has finished."""
    while (told := parallel.told()) is not None:
        shared, name, before = told
        work = Work.from_told(shared)
        with fast_float32(work.device):
            train_end_to_end(_job(work, name, before))


def _job(work: Work, name: str, before: list[Path] | None) -> EndToEndJob:
    linears = work.linears()
    blocks = [CompressedBlock() for _ in linears] if before is None else [work.block(path) for path in before]
    stages = work.recipe.whole_model_stages()
    earlier = [stages[n] for n in list(stages)[: list(stages).index(name)]]
    return EndToEndJob(
        name=name, settings=stages[name], recipe=work.recipe, model=work.model, family=work.family, linears=linears,
        blocks=blocks, windows=work.training,
        first=sum(stage.steps(work.recipe.context) * stage.batch for stage in earlier), batch=work.batch,
        device=work.device, state=work.folder / f"{name}.state",
        progress=lambda done, total: work.progress(name, done, total),
    )  # fmt: skip


def _errors(work: Work, shards: list[Path]) -> dict[str, Any]:
    """Errors of the model whose blocks these are: of each block's output, see :func:`scale_of_errors`, and of each
    compressed linear's, see :func:`_advance`.
    """
    stream = work.stream()
    inputs = stream.embed(work.calibration[-_JUDGES:], work.batch)
    dense = inputs.clone()
    errors: list[float] = []
    modules: dict[str, float] = {}
    for index, path in enumerate(shards):
        block, prefix = stream.block(index), f"{work.family.blocks}.{index}."
        scale = scale_of_errors(block.advance(dense, work.batch, work.device), dense)
        modules |= _advance(work, block, prefix, work.block(path), inputs)
        errors.append(float(((inputs - dense).square().mean(-1) / scale).double().mean()))
    return {"errors": errors, "modules": modules}


def _advance(
    work: Work, block: BlockRunner, prefix: str, state: CompressedBlock, hidden: torch.Tensor
) -> dict[str, float]:
    """Run hidden states through a block once it has got its compressed weights.

    Returns:
        Of each compressed linear the squared error of its output, against the dense weight on the same inputs, relative
        to the square of that output.
    """
    module = block.module
    places = {name.removeprefix(prefix): name for name in state.matrices}
    weights = {name: module.get_parameter(f"{place}.weight").clone() for place, name in places.items()}
    install(module, prefix, state)
    changes = {name: module.get_parameter(f"{place}.weight") - weights[name] for place, name in places.items()}
    sums = {name: torch.zeros(2, dtype=torch.float64) for name in places.values()}

    def note(name: str, x: torch.Tensor) -> None:
        for i, weight in enumerate((changes[name], weights[name])):
            sums[name][i] += nn.functional.linear(x, weight).double().square().sum().cpu()

    hooks = watch_inputs(module, places, note)
    block.advance(hidden, work.batch, work.device)
    for hook in hooks:
        hook.remove()
    return {name: float(wrong / total) if total > 0 else 0.0 for name, (wrong, total) in sums.items()}


def _compress_head(work: Work, name: str, shards: list[Path], shard: Path) -> None:
    """The head comes last, and is fed what the compressed model feeds it. The embedding is the dense one, also where
    it is tied to the head.
    """
    if shard.exists():
        return
    stream = work.stream()
    hidden = stream.embed(work.calibration, work.batch, work.allocate)
    for index, path in enumerate(shards):
        block = stream.block(index)
        install(block.module, f"{work.family.blocks}.{index}.", work.block(path))
        block.advance(hidden, work.batch, work.device)
    inputs = stream.head_inputs(work.calibration, hidden, work.batch)
    matrix = compress_head(name, work.model.tensor(f"{name}.weight"), inputs, work.recipe, work.device)
    write_head(shard, name, matrix)
    work.progress("compressing the head", 1, 1)


def _facts(work: Work, name: str) -> Path:
    """What a report will say about a block or a stage; written before its shards."""
    return work.folder / f"{name}.json"
