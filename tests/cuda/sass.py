"""Reads the machine code in the CUDA library, as ``cuobjdump`` prints it."""

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Kernel", "find_cuobjdump", "kernels"]

_ADDRESS = re.compile(r"\s+/\*([0-9a-f]{4,5})\*/\s+(.*?)\s*;")
_BRANCH = re.compile(r"BRA(?:\.\S+)? .*?0x([0-9a-f]+)")
_NAME = re.compile(r"Function : _ZN4gqsa4cuda\d(gemv|gemm|expand|look_up)I(\S+?)EEEv")


def find_cuobjdump() -> str | None:
    """The disassembler: of the CUDA toolkit, or what the package triton brings along."""
    try:
        import triton
    except ImportError:
        folder = None
    else:
        folder = str(Path(triton.__file__).parent / "backends/nvidia/bin")
    return shutil.which("cuobjdump") or (shutil.which("cuobjdump", path=folder) if folder else None)


@dataclass(frozen=True)
class Kernel:
    """The code of one kernel for one architecture.

    Attributes:
        kind: gemv, gemm, expand or look_up.
        parameters: of the template, as mangled: ``Li1ELi16`` is one token and groups of 16.
        code: address and text of every instruction.
    """

    kind: str
    parameters: str
    code: tuple[tuple[int, str], ...]

    def count(self, pattern: str) -> int:
        """Instructions that match a regular expression."""
        return sum(re.search(pattern, text) is not None for _, text in self.code)

    def main_loop(self) -> int:
        """Instructions of the innermost loop that holds all of the arithmetic on halves that is in loops."""
        loops = []
        for address, text in self.code:
            branch = _BRANCH.search(text)
            if branch and int(branch[1], 16) < address:
                body = [t for a, t in self.code if int(branch[1], 16) <= a <= address]
                loops.append((sum("HFMA2" in t or "HMMA" in t for t in body), -len(body)))
        return -max(loops)[1]


def resources(library: Path, cuobjdump: str) -> list[tuple[str, str, dict[str, int]]]:
    """(architecture, mangled name, registers, stack, local memory...) of every kernel."""
    output = subprocess.run([cuobjdump, "-res-usage", library], capture_output=True, text=True, check=True).stdout
    found, arch, name = [], "", ""
    for line in output.splitlines():
        if line.startswith("arch = "):
            arch = line.removeprefix("arch = ").strip()
        elif match := re.match(r" Function (\S+):", line):
            name = match[1]
        elif line.startswith("  REG:"):
            found.append((arch, name, {k: int(v) for k, v in re.findall(r"([A-Z]+):(\d+)", line)}))
    return found


def kernels(library: Path, arch: str, cuobjdump: str) -> list[Kernel]:
    """Every kernel of the library for an architecture, such as ``sm_90``."""
    command = [cuobjdump, "-sass", "-arch", arch, library]
    found: list[tuple[str, str, list[tuple[int, str]]]] = []
    for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines():
        if match := _NAME.search(line):
            found.append((match[1], match[2], []))
        elif (match := _ADDRESS.match(line)) and found:
            found[-1][2].append((int(match[1], 16), match[2]))
    return [Kernel(kind, parameters, tuple(code)) for kind, parameters, code in found]
