"""Which folders are which packages, and how the native kernels are built; all else is in pyproject.toml.

``offline/`` lies at the top of the repository and installs as ``vllm_gqsa.offline``. Listing its subpackages needs
a line of code, which pyproject.toml cannot hold.

An editable install (``pip install -e .``) maps both folders through the import hook that setuptools makes for such
layouts, so Python and pytest see every change at once. mypy knows no import hooks: ``make types`` shows it the same
tree through symbolic links in build/types. A link committed as vllm_gqsa/offline would serve both, but breaks on
file systems and archives without links.

csrc becomes two shared libraries with plain C interfaces, without any header of Python or torch, so that one wheel
serves every version of both. The CPU's needs a C++17 compiler (g++ 10 or clang++ 14 on, or what CXX says), the one for
GPUs nvcc 12.4 or later: from CUDA_HOME, the PATH or /usr/local/cuda. It is built for the GPUs of this machine or, where
there are none, for all that are supported; GQSA_CUDA_ARCHS says otherwise ("80;90", or nothing for no CUDA kernels).
Without a compiler the package installs without its library, and says so when it is used.
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
VBMI = [*AVX512, "-mavx512vbmi", "-mavx512vbmi2", "-mbmi2"]
# Each file is compiled for the processors that it is chosen on at run time, and for no others.
SOURCES = {"csrc/common/slab.cpp": [], "csrc/cpu/cpu.cpp": [], "csrc/cpu/portable.cpp": []}
if platform.machine() == "x86_64":
    SOURCES |= {
        "csrc/cpu/avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
        "csrc/cpu/avx512.cpp": AVX512,
        "csrc/cpu/avx512_bf16.cpp": [*VBMI, "-mavx512bf16"],
        "csrc/cpu/avx512_vnni.cpp": [*VBMI, "-mavx512vnni"],
    }
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-w"]

CUDA_SOURCE = "csrc/cuda/cuda.cu"
CUDA_ARCHS = ("80", "86", "89", "90", "100", "120")
# The CUDA runtime goes into the library: torch may bring another version of it.
CUDA_FLAGS = ["-std=c++17", "-O3", "-shared", "-cudart", "static", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-w"]


def find_nvcc() -> str | None:
    """The CUDA compiler."""
    home = os.environ.get("CUDA_HOME")
    if home:
        return shutil.which(f"{home}/bin/nvcc")
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def cuda_archs(nvcc: str) -> list[str]:
    """Compute capabilities to build for, times ten: those asked for, those of this machine, or all that nvcc knows.

    A GPU that is newer than nvcc gets code from the PTX, by its driver.
    """
    wanted = os.environ.get("GQSA_CUDA_ARCHS")
    if wanted is not None:
        archs = wanted.replace(",", " ").replace(";", " ").replace(".", "").split()
        if not all(arch.isdigit() for arch in archs):
            raise SystemExit(f'GQSA_CUDA_ARCHS={wanted}: is not a list of compute capabilities such as "80;90"')
        return archs
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    known = {name.removeprefix("compute_") for name in listed}
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    if shutil.which(query[0]):
        found = subprocess.run(query, capture_output=True, text=True, check=False).stdout.replace(".", "").split()
        if found and all(each in known and int(each) >= int(CUDA_ARCHS[0]) for each in found):
            return sorted(set(found))
    return [arch for arch in CUDA_ARCHS if arch in known]


def cuda_command(nvcc: str, archs: list[str], output: Path) -> list[str]:
    """What builds the library: code for every architecture, and PTX of the oldest for all that come later."""
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    oldest = min(archs, key=int)
    ptx = f"-gencode=arch=compute_{oldest},code=compute_{oldest}"
    return [nvcc, *CUDA_FLAGS, "--threads", "0", *targets, ptx, CUDA_SOURCE, "-o", str(output)]


class BuildNative(build_ext):
    """Compiles vllm_gqsa/kernels/_cpu.so from :data:`SOURCES` and _cuda.so from :data:`CUDA_SOURCE`."""

    def get_ext_filename(self, name: str) -> str:
        # Not tied to a version of Python, as the usual name would be.
        return name.replace(".", "/") + ".so"

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        # Written beside and moved: a process that has the old library open keeps it whole.
        new = target.with_suffix(".new")
        if (self.build_cuda if target.stem == "_cuda" else self.build_cpu)(new):
            new.replace(target)

    def build_cuda(self, output: Path) -> bool:
        nvcc = find_nvcc()
        if nvcc is None:
            self.warn("no nvcc (CUDA_HOME, PATH or /usr/local/cuda): vllm-gqsa installs without its CUDA kernels")
            return False
        try:
            archs = cuda_archs(nvcc)
            if not archs:
                self.warn("GQSA_CUDA_ARCHS is empty: vllm-gqsa installs without its CUDA kernels")
                return False
            subprocess.run(cuda_command(nvcc, archs, output), check=True)
        except subprocess.CalledProcessError as error:
            raise SystemExit(
                f"{nvcc} could not build the CUDA kernels; it must be 12.4 or later. GQSA_CUDA_ARCHS names the compute "
                'capabilities to build for ("80;90"); GQSA_CUDA_ARCHS= with nothing behind it installs without them'
            ) from error
        return True

    def build_cpu(self, output: Path) -> bool:
        wanted = os.environ.get("CXX")
        compiler = shutil.which(wanted) if wanted else shutil.which("g++") or shutil.which("clang++")
        if compiler is None and wanted:
            raise SystemExit(f"CXX={wanted}: there is no such command; set CXX to a C++ compiler or unset it")
        if compiler is None:
            self.warn("no C++ compiler (g++, clang++ or CXX): vllm-gqsa installs without its CPU kernels")
            return False
        objects = Path(self.build_temp) / "cpu"
        objects.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            outputs = list(pool.map(lambda item: self.compile(compiler, *item, objects), SOURCES.items()))
        subprocess.run([compiler, "-shared", *outputs, "-o", output], check=True)
        return True

    @staticmethod
    def compile(compiler: str, source: str, flags: list[str], folder: Path) -> str:
        output = folder / Path(source).with_suffix(".o").name
        subprocess.run([compiler, *FLAGS, *flags, "-c", source, "-o", output], check=True)
        return str(output)


class Wheel(bdist_wheel):
    """Tags the wheel for every Python 3 on this platform, from this machine's version of glibc on."""

    def get_tag(self) -> tuple[str, str, str]:
        tag = super().get_tag()[2]
        # The libraries need nothing else but libstdc++, and of that no more than g++ of this age brings.
        name, version = platform.libc_ver()
        if name == "glibc":
            tag = tag.replace("linux", f"manylinux_{version.replace('.', '_')}", 1)
        return "py3", "none", tag


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
        ext_modules=[
            Extension("vllm_gqsa.kernels._cpu", list(SOURCES), optional=True),
            Extension("vllm_gqsa.kernels._cuda", [CUDA_SOURCE], optional=True),
        ],
        cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel},
    )
