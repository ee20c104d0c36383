"""Data-parallel training by the processes of ``torchrun``, through torch's DistributedDataParallel.

The first process runs the command as it would alone: it alone reads the command line, holds the output folder, prints
and writes. The others wait until it tells them what to train with it; then each takes its share of every step's
windows. torchrun ends all of them when one has failed.
"""

import os
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from vllm_gqsa.offline.errors import InputError
from vllm_gqsa.offline.recipe import Recipe

__all__ = [
    "apart",
    "average",
    "check_shares",
    "is_first",
    "mean",
    "own_device",
    "processes",
    "run",
    "share",
    "tell",
    "told",
    "warm_up",
    "wrap",
]

_PATIENCE = timedelta(days=30)
"""The others wait while the first works on blocks; that it is alive is torchrun's business."""
_GRACE = 60.0
"""Seconds in which torchrun, which looks ten times a second, ends this process if another one has failed. Python may
take a few to exit."""
_CPU = torch.device("cpu")


def processes() -> int:
    """How many processes train together; 1 without ``torchrun``."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this process is the one that writes and prints, as it is without ``torchrun``."""
    return not dist.is_initialized() or dist.get_rank() == 0


def run(command: Callable[[], None], follow: Callable[[], None]) -> None:
    """Run ``command`` in the first process of ``torchrun`` and ``follow`` in all others.

    Args:
        command: may end by SystemExit.
        follow: returns when :func:`told` gives None, which it does when ``command`` has succeeded.
    """
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=_PATIENCE)
    try:
        if is_first():
            _to_the_end(command)
            tell(None)
        else:
            follow()
    except Exception as error:
        # One failure, one message. While they wait here, torchrun ends those that lost the connection to the one that
        # failed, and where all fail alike those that are not the first.
        if not is_first() or "gloo" in str(error):
            time.sleep(_GRACE)
        raise
    dist.destroy_process_group()


def _to_the_end(command: Callable[[], None]) -> None:
    try:
        command()
    except SystemExit as end:
        if end.code:
            raise


def tell(task: object) -> None:
    """Hand ``task``, anything that can be pickled, to the processes that wait in :func:`told`; alone, do nothing."""
    if processes() > 1:
        dist.broadcast_object_list([task], src=0, device=_CPU)


def told() -> Any:  # noqa: ANN401 - whatever the first process tells
    """Wait for what the first process tells."""
    received: list[Any] = [None]
    dist.broadcast_object_list(received, src=0, device=_CPU)
    return received[0]


def check_shares(recipe: Recipe) -> None:
    """Check that the processes can share the work.

    Raises:
        InputError: there is no stage to share, or a step's windows cannot be divided.
    """
    count, stages = processes(), recipe.whole_model_stages()
    if count > 1 and not stages:
        raise InputError(
            f"{count} processes have no stage of the recipe to share (prune, distill, oqp); start gqsa without torchrun"
        )
    for name, stage in stages.items():
        if stage.batch % count:
            raise InputError(
                f"{name}: {count} processes cannot share its batch of {stage.batch} windows a step evenly; give a "
                f"recipe file in which it is a multiple of {count}, or start another number of processes"
            )


def own_device(name: str) -> torch.device:
    """The device of this process: of several on GPUs each takes its own.

    Args:
        name: as given to all of them.

    Raises:
        InputError: it names one GPU for all, or there are fewer GPUs than processes.
    """
    device = torch.device(name)
    if processes() == 1 or name == "cpu":
        return device
    if name != "cuda":
        raise InputError(f"--device {name}: under torchrun give cpu, or cuda for a GPU of its own for each process")
    wanted, count = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
    if wanted > count:
        raise InputError(f"torchrun started {wanted} processes for {count} GPUs; give --nproc-per-node {count} or less")
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return torch.device("cuda", torch.cuda.current_device())


def wrap(model: nn.Module, *, may_skip: bool) -> nn.Module:
    """The model whose backward pass leaves the mean of all processes' gradients; alone, the model itself.

    Args:
        model: with the same values in every process.
        may_skip: whether a parameter may take no part in a step, as in an expert that no token chose.
    """
    if processes() == 1:
        return model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch 2.13 renames broadcast_buffers, 2.10 knows no other name
        return DistributedDataParallel(
            model,
            broadcast_buffers=False,
            bucket_cap_mb=0,  # one for every parameter, see warm_up()
            gradient_as_bucket_view=True,
            find_unused_parameters=may_skip,
        )


def warm_up(model: nn.Module, backward: Callable[[], object]) -> None:
    """Call before the first step, so that a run that goes on after a stop sums as one that was never stopped.

    A number's place in its bucket decides in which order the processes' are summed, and torch forms the buckets that it
    was asked for only after a first backward pass.

    Args:
        model: of :func:`wrap`.
        backward: any backward pass; the gradients are thrown away.
    """
    if isinstance(model, DistributedDataParallel):
        backward()
        model.zero_grad(set_to_none=True)


def apart(model: nn.Module) -> AbstractContextManager[None]:
    """While it lasts, the gradients of a model of :func:`wrap` add up without being exchanged."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


def share(numbers: torch.Tensor) -> torch.Tensor:
    """What this process takes of a step's windows, as many as every other one."""
    return numbers.chunk(processes())[dist.get_rank()] if processes() > 1 else numbers


def mean(value: float) -> float:
    """Mean over the processes, to the bit the same in all."""
    if processes() == 1:
        return value
    total = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(total)
    return float(total) / processes()


def average(tensors: Sequence[torch.Tensor]) -> None:
    """Replace tensors, of one dtype and device, by their means over the processes, to the bit the same in all."""
    if processes() > 1 and tensors:
        together = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(together)
        together /= processes()
        for tensor, values in zip(tensors, together.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(values.view_as(tensor))
