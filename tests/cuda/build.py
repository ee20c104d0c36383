"""The CUDA kernels as a library for the CPU: csrc/cuda compiled by g++ over shim.h."""

import hashlib
import shutil
import subprocess
from pathlib import Path

from filelock import FileLock

ROOT = Path(__file__).parents[2]
COMPILER = shutil.which("g++")  # clang++ has _Float16 on fewer machines
FLAGS = ("-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-w")


def sources(root: Path = ROOT) -> list[Path]:
    """Every file that the library is made of."""
    return sorted([*(root / "csrc/cuda").iterdir(), *(root / "csrc/common").iterdir(), ROOT / "tests/cuda/shim.h"])


def build_shim(root: Path = ROOT) -> Path:
    """Compile the kernels of a source tree, once for every state of it, and return the library.

    Args:
        root: holds csrc; the folder build below it gets the library.
    """
    state = hashlib.sha256(b"".join(path.read_bytes() for path in sources(root))).hexdigest()[:16]
    library = root / "build" / "cuda-shim" / f"{state}.so"
    library.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{library}.lock"):
        if not library.exists():
            new = library.with_suffix(".new")
            command = [COMPILER, "-x", "c++", *FLAGS, f"-I{ROOT}/tests/cuda", "-shared", "csrc/cuda/cuda.cu"]
            subprocess.run([*command, "-o", str(new)], cwd=root, check=True)
            new.replace(library)
    return library
