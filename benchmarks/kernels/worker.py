"""The process that has the GPU: makes a contestant's weight, checks it, and times it, as it is asked."""

import os
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.errors import BenchmarkError
from benchmarks.kernels import contestants, external
from benchmarks.kernels.cases import Weight
from benchmarks.kernels.contestants import Built
from benchmarks.kernels.timing import Cuda, Device, copies, measure
from benchmarks.machine import processor, versions
from benchmarks.times import Times

__all__ = ["Bench", "limits", "prepare"]

TOLERANCE = {torch.float16: 3e-3, torch.bfloat16: 1.5e-2}
"""Relative error that rounding explains, of the norm of a result."""
_CHUNK = 1 << 30
_MATRIX = 8192


class Bench:
    """Builds one contestant at a time and times it.

    Attributes:
        device: that it runs on.
        seconds: of replays for one figure.
        dtype: of the activations of the group-sparse kernels.
    """

    def __init__(self, device: Device, seconds: float, dtype: torch.dtype) -> None:
        self.device = device
        self.seconds = seconds
        self.dtype = dtype
        self._key: tuple[str, Weight] | None = None
        self._built: Built | None = None

    def answer(self, question: dict[str, Any]) -> dict[str, Any]:
        """One figure.

        Args:
            question: ``contestant``; ``weight``, the fields of one; ``m``, tokens.

        Returns:
            microseconds (median, p10, p90), bytes of the weight, relative error, and kernel where there is a choice;
            or ``failed``, why not, with ``again`` false where other numbers of tokens would fail too, and ``fatal``
            where the device is of no more use to this process.
        """
        start = time.monotonic()
        name, weight, m = question["contestant"], Weight(**question["weight"]), question["m"]
        stage = "making the weight"
        try:
            built = self._weight(name, weight)
            stage = "running"
            found = self._figures(built, weight, m)
        except Exception as error:  # noqa: BLE001 - of others' kernels anything may come
            self._key = self._built = None
            text = str(error).strip() or type(error).__name__
            reason = text if isinstance(error, BenchmarkError) else f"{stage}: {text.splitlines()[0]}"
            found = {"failed": reason, "again": stage == "running", "fatal": self._lost()}
        return {**found, "seconds": time.monotonic() - start}

    def _weight(self, name: str, weight: Weight) -> Built:
        if self._key != (name, weight) or self._built is None:
            self._key = self._built = None  # the old one goes before the new one comes
            if self.device.torch_device.type == "cuda":
                torch.cuda.empty_cache()
            builder = (contestants.BUILDERS | external.BUILDERS)[name]
            settings = {"dtype": self.dtype} if name.startswith("GQSA") else {}

            def count(size: int) -> int:
                return copies(size, self.device.cache_bytes)

            self._built = builder(weight, self.device.torch_device, count, **settings)
            self._key = (name, weight)
        return self._built

    def _figures(self, built: Built, weight: Weight, m: int) -> dict[str, Any]:
        if m > built.most_tokens:
            raise BenchmarkError(f"left out: made for at most {built.most_tokens} tokens")
        generator = torch.Generator(self.device.torch_device).manual_seed(m)
        x = torch.randn(m, weight.k, generator=generator, device=self.device.torch_device).to(built.dtype)
        expected = F.linear(x.float(), built.dense)
        errors = []

        def check(result: torch.Tensor) -> None:
            error = float((result.float() - expected).norm() / expected.norm())
            # A comparison that NaN fails.
            if result.shape != expected.shape or not error <= TOLERANCE[built.dtype]:
                raise BenchmarkError(f"wrong result: relative error {error:.3g}, shape {tuple(result.shape)}")
            errors.append(error)

        for call in (built.calls[0], built.calls[-1]):
            check(call(x))
        calls = [lambda call=call: call(x) for call in built.calls]
        times = measure(self.device, calls, built.nbytes, self.seconds, check)
        return {
            "microseconds": _spread(times),
            "bytes": built.nbytes,
            "copies": len(calls),
            "error": max(errors),
            "kernel": built.kernel(m),
        }

    def _lost(self) -> bool:
        """Whether the device fails whatever comes: after a bad access a process gets nothing else from it."""
        if self.device.torch_device.type != "cuda":
            return False
        try:
            torch.cuda.synchronize()
            torch.zeros(1, device=self.device.torch_device).add_(1).item()
        except RuntimeError:
            return True
        return False


def _spread(times: Times) -> dict[str, float]:
    return {
        "median": 1e6 * times.median,
        "p10": 1e6 * times.quantile(0.1),
        "p90": 1e6 * times.quantile(0.9),
        "replays": len(times.rounds),
    }


def limits(device: Device, seconds: float, chunk: int = _CHUNK, matrix: int = _MATRIX) -> dict[str, Any]:
    """How fast the device reads, multiplies, and does nothing.

    Args:
        device: to measure.
        seconds: of replays for each.
        chunk: bytes of one read.
        matrix: rows and columns of the matrices whose product is timed.

    Returns:
        read_bytes_per_second, by the fastest of several loops that only read, and its name; flops, of an fp16 product
        by cuBLAS; launch_microseconds, of an empty kernel in a graph.
    """
    where = device.torch_device
    count = copies(chunk, device.cache_bytes)
    buffers = [torch.randn(chunk // 2 // _MATRIX, _MATRIX, device=where, dtype=torch.float16) for _ in range(count)]
    x = torch.randn(1, _MATRIX, device=where, dtype=torch.float16)
    loops: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "torch sum of float32": lambda each: each.view(torch.float32).sum(),
        "torch amax of float32": lambda each: each.view(torch.float32).amax(),
        "torch sum of int32": lambda each: each.view(torch.int32).sum(dtype=torch.int32),
        "cuBLAS fp16, M = 1": lambda each: F.linear(x, each),
    }
    rates = {}
    for name, loop in loops.items():
        calls = [lambda each=each, loop=loop: loop(each) for each in buffers]
        rates[name] = chunk / measure(device, calls, chunk, seconds, lambda _: None).median
    fastest = max(rates, key=lambda name: rates[name])
    left, right = (torch.randn(matrix, matrix, device=where).half() for _ in range(2))
    product = measure(device, [lambda: F.linear(left, right)], left.nbytes, seconds, lambda _: None)
    empty = measure(device, [lambda: _nothing(left)], 1, seconds, lambda _: None)
    return {
        "read_bytes_per_second": rates[fastest],
        "read_loop": fastest,
        "read_rates": rates,
        "flops": 2 * matrix**3 / product.median,
        "launch_microseconds": 1e6 * empty.median,
    }


def _nothing(anything: torch.Tensor) -> torch.Tensor:
    """Launch a kernel that does nothing."""
    if anything.is_cuda:
        torch.cuda._sleep(0)
    return anything


def prepare(settings: dict[str, Any]) -> tuple[dict[str, Any], Callable[[dict[str, Any]], dict[str, Any]]]:
    """Look at the device and measure its limits; see :func:`benchmarks.protocol.serve`.

    Args:
        settings: ``seconds``, ``dtype`` and ``marlin``, the path of its library or None.
    """
    if settings["marlin"]:
        os.environ[external.MARLIN_LIBRARY] = settings["marlin"]
    if not torch.cuda.is_available():
        raise BenchmarkError("torch sees no CUDA device")
    # Not inference_mode, in which torch's 2:4 tensors do not work.
    torch.set_grad_enabled(False)
    device = Cuda()
    properties = torch.cuda.get_device_properties(device.torch_device)
    if contestants.device_of(device.torch_device) is None:
        raise BenchmarkError("the CUDA kernels do not run here; the log says why")
    ready = {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "cache_bytes": device.cache_bytes,
        "memory_bytes": properties.total_memory,
        "processor": processor(),
        "versions": {**versions(), "CUDA of torch": torch.version.cuda, "Triton": _version("triton")},
        "missing": external.missing(),
        **limits(device, settings["seconds"]),
    }
    return ready, Bench(device, settings["seconds"], getattr(torch, settings["dtype"])).answer


def _version(module: str) -> str | None:
    try:
        return str(__import__(module).__version__)
    except ImportError:
        return None


if __name__ == "__main__":
    from benchmarks.protocol import serve

    serve(prepare)
