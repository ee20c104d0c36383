"""One process that runs cases and says how each ended; its parent notices when it dies or hangs."""

import contextlib
import os
import random
import resource
import shutil
import traceback
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING", "VLLM_CPU_KVCACHE_SPACE": "1",
}  # fmt: skip
ADDRESS_SPACE = 12 << 30
"""More than any case needs, and less than would take the machine down."""
MEMORY = {"read": 64 << 20, "verify": 64 << 20, "transformers": 128 << 20, "vllm": 256 << 20}
"""How far beyond the unspoilt checkpoint's peak a case may go, in bytes; the checkpoint has 60 kB."""


@dataclass
class Outcome:
    """How one case ended."""

    case: int
    did: str
    result: str
    """loaded, refused, refused by the host (an error of transformers or vLLM before ours), or what is wrong."""
    says: str = ""
    memory: int = 0
    failed: bool = False


def run_case(target: str, seed: int, case: int, bases: list[Path], work: Path, *, keep: bool = False) -> Outcome:
    """Spoil a copy of a good checkpoint and load it; a case is the same wherever and whenever it runs."""
    from tests.fuzz import base, targets
    from tests.fuzz.mutations import CANARY, mutate
    from vllm_gqsa.format import FormatError

    rng = random.Random(f"{seed} {case}")
    source = bases[rng.randrange(len(bases))]
    folder = work / "checkpoint"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder)
    outcome = Outcome(case, "nothing" if case < 0 else mutate(rng, folder), "loaded")
    before = memory(reset=True)
    try:
        with targets.watched():
            targets.TARGETS[target](folder, base.shapes(source))
    except targets.clean_errors(target) as error:
        outcome.result, outcome.says = "refused", f"{type(error).__name__}: {error}"
        if "\n" in str(error) and (target in ("read", "verify") or isinstance(error, FormatError)):
            outcome.failed, outcome.result = True, "more than one sentence"
    except Exception as error:  # noqa: BLE001 - what it is, the report says
        outcome.failed = not targets.is_hosts_own(target, error)
        outcome.result = type(error).__name__ if outcome.failed else "refused by the host"
        outcome.says = traceback.format_exc(limit=-6)
    outcome.memory = memory() - before
    if (work / CANARY).exists():
        outcome.result, outcome.failed = "EXECUTED", True
        (work / CANARY).rmdir()
    if not keep:
        shutil.rmtree(folder, ignore_errors=True)
    return outcome


def memory(*, reset: bool = False) -> int:
    """Bytes resident now, after a reset of the peak; or the peak since then."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    name = "VmRSS:" if reset else "VmHWM:"
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))


def serve(connection: Connection, target: str, seed: int, bases: list[Path], work: Path, quiet: bool) -> None:
    """Run the cases that come through the connection. The first thing is the unspoilt checkpoint."""
    if quiet:
        sink = os.open(work / f"{target}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
    os.environ.update(ENVIRONMENT)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    import torch

    torch.set_num_threads(1)
    allowed = 0
    for case in (-1, -2):  # the first warms up, the second measures
        good = run_case(target, seed, case, bases, work)
        allowed = good.memory + MEMORY[target]
        if good.result != "loaded":
            connection.send({**asdict(good), "failed": True, "result": f"the good checkpoint: {good.result}"})
            return
    connection.send(asdict(good))
    with contextlib.suppress(EOFError):
        while (case := connection.recv()) is not None:
            outcome = run_case(target, seed, case, bases, work)
            if outcome.memory > allowed:
                outcome.failed, outcome.result = True, f"{outcome.memory >> 20} MiB of memory"
            connection.send(asdict(outcome))


def as_outcome(raw: dict[str, Any]) -> Outcome:
    """What came through the connection."""
    return Outcome(**raw)
