"""What the machine is, and how a measuring process is tied to one core of it."""

import os
import re
from pathlib import Path
from typing import Any

from benchmarks.machine import processor

__all__ = ["INT8", "cache_bytes", "core", "facts", "one_thread"]

CPUINFO = Path("/proc/cpuinfo")
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
INT8 = {"GQSA_CPU_ACT": "int8"}
"""Asks for the group-sparse kernel with 8-bit activations; read at every call."""
# Where the system does not tell: large for one core, so that data stays cold.
DEFAULT_CACHE = 64 << 20
_FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_tile", "amx_int8", "amx_bf16")
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def cache_bytes(folder: Path = CACHES) -> int:
    """Size of the largest cache of the first core, the last level."""
    sizes = []
    for path in folder.glob("index*/size"):
        found = re.fullmatch(r"(\d+)([KMG]?)", path.read_text(encoding="utf-8").strip())
        if found:
            sizes.append(int(found[1]) * _UNITS.get(found[2], 1))
    return max(sizes, default=DEFAULT_CACHE)


def core() -> int:
    """The core to measure on: the last one this process may use; the first serves most interrupts."""
    return max(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1) - 1


def one_thread() -> dict[str, str]:
    """Environment of a measuring process: one thread, no network, no telemetry."""
    return {
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": str(core()),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }


def facts() -> dict[str, Any]:
    """The processor, its caches and features, memory, and huge pages, which decide how fast memory is read."""
    info = CPUINFO.read_text(encoding="utf-8") if CPUINFO.exists() else ""
    fields = dict(re.findall(r"^(.+?)\s*:\s*(.*)$", info, re.MULTILINE))
    flags = set(fields.get("flags", "").split())
    huge = re.search(r"\[(\w+)\]", HUGE_PAGES.read_text(encoding="utf-8")) if HUGE_PAGES.exists() else None
    return {
        "processor": processor(),
        "family_model_stepping": [fields.get(key) for key in ("cpu family", "model", "stepping")],
        "features": [name for name in _FEATURES if name in flags],
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "last_level_cache_bytes": cache_bytes(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "transparent_huge_pages": huge[1] if huge else None,
    }
