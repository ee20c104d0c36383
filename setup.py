"""Which folders are which packages, and how the CPU kernels are built; all else is in pyproject.toml.

``offline/`` lies at the top of the repository and installs as ``vllm_gqsa.offline``. Listing its subpackages needs
a line of code, which pyproject.toml cannot hold.

An editable install (``pip install -e .``) maps both folders through the import hook that setuptools makes for such
layouts, so Python and pytest see every change at once. mypy knows no import hooks: ``make types`` shows it the same
tree through symbolic links in build/types. A link committed as vllm_gqsa/offline would serve both, but breaks on
file systems and archives without links.

csrc/cpu becomes one shared library with a plain C interface. It needs a C++17 compiler (g++ 10 or clang++ 14 on, or
what CXX says) and no header of Python or torch, so one wheel serves every version of both. Without a compiler the
package installs without it, and says so when it is used.
"""

import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"]
# Each file is compiled for the processors that it is chosen on at run time, and for no others.
SOURCES = {"csrc/common/slab.cpp": [], "csrc/cpu/cpu.cpp": [], "csrc/cpu/portable.cpp": []}
if platform.machine() == "x86_64":
    SOURCES |= {
        "csrc/cpu/avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
        "csrc/cpu/avx512.cpp": AVX512,
        "csrc/cpu/avx512_bf16.cpp": [*AVX512, "-mavx512vbmi", "-mavx512bf16"],
        "csrc/cpu/avx512_vnni.cpp": [*AVX512, "-mavx512vbmi", "-mavx512vnni"],
    }
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-w"]


class BuildNative(build_ext):
    """Compiles :data:`SOURCES` into vllm_gqsa/kernels/_cpu.so."""

    def get_ext_filename(self, name: str) -> str:
        # Not tied to a version of Python, as the usual name would be.
        return name.replace(".", "/") + ".so"

    def build_extension(self, ext: Extension) -> None:
        wanted = os.environ.get("CXX")
        compiler = shutil.which(wanted) if wanted else shutil.which("g++") or shutil.which("clang++")
        if compiler is None and wanted:
            raise SystemExit(f"CXX={wanted}: there is no such command; set CXX to a C++ compiler or unset it")
        if compiler is None:
            self.warn("no C++ compiler (g++, clang++ or CXX): vllm-gqsa installs without its CPU kernels")
            return
        target = Path(self.get_ext_fullpath(ext.name))
        objects = Path(self.build_temp) / "cpu"
        for folder in (target.parent, objects):
            folder.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            outputs = list(pool.map(lambda item: self.compile(compiler, *item, objects), SOURCES.items()))
        # Written beside and moved: a process that has the old library open keeps it whole.
        new = target.with_suffix(".new")
        subprocess.run([compiler, "-shared", *outputs, "-o", new], check=True)
        new.replace(target)

    @staticmethod
    def compile(compiler: str, source: str, flags: list[str], folder: Path) -> str:
        output = folder / Path(source).with_suffix(".o").name
        subprocess.run([compiler, *FLAGS, *flags, "-c", source, "-o", output], check=True)
        return str(output)


class Wheel(bdist_wheel):
    """Tags the wheel for every Python 3 on this platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


if __name__ == "__main__":  # the tests read the recipe above
    setup(
        packages=[
            *find_packages(include=["vllm_gqsa", "vllm_gqsa.*"]),
            "vllm_gqsa.offline",
            *(f"vllm_gqsa.offline.{name}" for name in find_packages("offline")),
        ],
        package_dir={"vllm_gqsa": "vllm_gqsa", "vllm_gqsa.offline": "offline"},
        package_data={"vllm_gqsa": ["py.typed"], "vllm_gqsa.offline": ["py.typed"]},
        # Optional: that it is not there without a compiler is no error. One that a compiler finds still is.
        ext_modules=[Extension("vllm_gqsa.kernels._cpu", list(SOURCES), optional=True)],
        cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel},
    )
