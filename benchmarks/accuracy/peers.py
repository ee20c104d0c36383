"""Other methods of about the same bits a weight, each by its own package, in an environment of their own.

What a peer leaves is an ordinary dense model of the weights that it would compute with, so that one evaluation scores
them all. Standard library only: the environment's own Python runs a part of this module.
"""

import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from benchmarks.demo.install import TORCH, install_torch, installed, kept_requirements, pip
from benchmarks.errors import BenchmarkError
from benchmarks.protocol import Worker

__all__ = ["PEERS", "VERSIONS", "Peer", "compress", "install", "install_packages"]

# 0.12.0.2 is the last llm-compressor whose GPTQ keeps pruned weights at zero, without which there is no 2:4 with INT4.
VERSIONS = {"llmcompressor": "0.12.0.2", "auto-round": "0.16.1"}
ROOT = Path(__file__).resolve().parents[2]
WORKER = "benchmarks.accuracy.peer_worker"
# Training a model block by block takes hours on a CPU.
_TIMEOUT = 48 * 3600


@dataclass(frozen=True)
class Peer:
    """A method with its settings; what it compresses are the linears inside the blocks.

    Attributes:
        title: for people.
        method: of the worker: sparsegpt, gptq or autoround.
        package: that does it, a key of :data:`VERSIONS`.
        bits: of a code.
        group_size: neighbouring inputs that share a scale and a zero point, counting pruned ones.
        kept: weights of each four that are not pruned.
    """

    title: str
    method: str
    package: str
    bits: int
    group_size: int = 64
    kept: int = 4

    @property
    def bits_per_weight(self) -> float:
        """Bits a weight of the compressed linears, the pruned weights counted as weights.

        A code for each kept weight, with its place among four (2 bits) where some are pruned; and for each group a
        float16 scale and a zero point as wide as a code, which is how both packages store them:

        * 2:4 + INT4: (2 * (4 + 2)) / 4 + (16 + 4) / 64 = 3.3125
        * W3: 3 + (16 + 3) / 64 = 3.297
        * W2: 2 + (16 + 2) / 64 = 2.281
        """
        place = 2 if self.kept < 4 else 0
        return self.kept * (self.bits + place) / 4 + (16 + self.bits) / self.group_size


PEERS = {
    "sparsegpt-2of4-int4": Peer("SparseGPT 2:4 + GPTQ INT4", "sparsegpt", "llmcompressor", bits=4, kept=2),
    "gptq-w3": Peer("GPTQ W3", "gptq", "llmcompressor", bits=3),
    "gptq-w2": Peer("GPTQ W2", "gptq", "llmcompressor", bits=2),
    "autoround-w3": Peer("AutoRound W3", "autoround", "auto-round", bits=3),
    "autoround-w2": Peer("AutoRound W2", "autoround", "auto-round", bits=2),
}
"""By name; all of them asymmetric, in groups of 64."""


def install(folder: Path, say: Callable[[str], None]) -> Path:
    """Make one environment for both packages unless it is there; returns its Python.

    Args:
        folder: of the environment; takes 1.5 GB.
        say: is told how long the first time takes.

    Raises:
        BenchmarkError: it cannot be made here.
    """
    python = folder.absolute() / "bin" / "python"
    check = [str(python), "-c", f"from {__name__} import complete; raise SystemExit(not complete())"]
    if python.exists() and subprocess.call(check, stderr=subprocess.DEVNULL, cwd=ROOT) == 0:
        return python
    names = " and ".join(f"{name} {version}" for name, version in VERSIONS.items())
    say(f"installing {names} in {folder}; some minutes, the first time only")
    start = time.monotonic()
    log = folder.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as output:
        for command in (
            [sys.executable, "-m", "venv", "--clear", str(folder)],
            [str(python), "-c", f"from {__name__} import install_packages; install_packages()"],
            check,
        ):
            if subprocess.call(command, stdout=output, stderr=output, cwd=ROOT) != 0:
                raise BenchmarkError(f"{names} cannot be installed here; see {log}")
    say(f"installed in {time.monotonic() - start:.0f} s")
    return python


def install_packages() -> None:
    """Install torch for CPU and both packages into the environment whose Python runs this.

    Without their own requirements first: llm-compressor caps torch and auto-round below what is pinned here, and any
    torch but this one would bring gigabytes of CUDA libraries.

    Raises:
        SetupError: a download or an installation failed three times.
    """
    install_torch()
    pip("--no-deps", *(f"{name}=={version}" for name, version in VERSIONS.items()))
    needed = [line for name in VERSIONS for line in kept_requirements(metadata.requires(name) or [])]
    pip(f"torch=={TORCH}", *(line for line in needed if not re.match(r"auto[-_]round\b", line)))


def complete() -> bool:
    """Whether the environment whose Python runs this has both packages in their versions."""
    versions = {name: installed(name) for name in VERSIONS}
    return versions == VERSIONS and (installed("torch") or "").split("+")[0] == TORCH


def compress(python: Path, peer: str, model: Path, windows: Path, output: Path, *, iterations: int = 200) -> float:
    """Compress a dense model by one of the peers; what is left is a dense model in float32 again.

    Args:
        python: of :func:`install`.
        peer: a key of :data:`PEERS`.
        model: folder of the dense model with its tokenizer, as transformers writes it.
        windows: safetensors file with ``tokens`` int64 ``[windows, context]``: all of the calibration text there is.
        output: folder for the result; must not be there yet. ``output.log`` gets what the package says.
        iterations: of AutoRound's training in each block; 200 are its own default. The others do not train.

    Returns:
        Seconds that the method took, without loading and saving.

    Raises:
        BenchmarkError: unknown peer, missing files, or the package failed.
    """
    if peer not in PEERS:
        raise BenchmarkError(f"there is no peer {peer}; those there are: {', '.join(PEERS)}")
    for path in (model / "config.json", windows):
        if not path.is_file():
            raise BenchmarkError(f"{path} is not there")
    if output.exists():
        raise BenchmarkError(f"{output} is there already; remove it to make it again")
    spec = PEERS[peer]
    settings = {
        "method": spec.method,
        "bits": spec.bits,
        "group_size": spec.group_size,
        "kept": spec.kept,
        "model": str(model.absolute()),
        "windows": str(windows.absolute()),
        "output": str(output.absolute()),
        "iterations": iterations,
    }
    environment = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(ROOT)}
    log = output.with_name(f"{output.name}.log")
    with Worker(spec.title, python, WORKER, settings, log, environment) as worker:
        worker.start(_TIMEOUT)
        return float(worker.ready["seconds"])
