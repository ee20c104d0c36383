"""Spoil checkpoints and load them: ``python -m tests.fuzz``, or ``make fuzz``.

Every case ends in a clear error or in exactly the weights that the files hold, without a crash, a hang, memory beyond
the file's scale, or anything of the checkpoint executed. Cases are determined by seed and number; one is repeated by
``python -m tests.fuzz --target read --seed 0 --case 17``, which leaves the spoilt folder behind.
"""

import argparse
import collections
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path

from tests.fuzz.worker import ENVIRONMENT, Outcome, as_outcome, run_case, serve

CASES = {"read": 5000, "verify": 500, "transformers": 300, "vllm": 120}
SECONDS = {"read": 10.0, "verify": 20.0, "transformers": 30.0, "vllm": 120.0}
START_SECONDS = 300.0


def fuzz(target: str, seed: int, cases: int, bases: list[Path], work: Path, *, quiet: bool = True) -> list[Outcome]:
    """Run ``cases`` cases in a process of their own, which is started again where it dies or hangs."""
    context = multiprocessing.get_context("spawn")
    outcomes: list[Outcome] = []
    while len(outcomes) < cases:
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs, target, seed, bases, work, quiet))
        process.start()
        theirs.close()
        case, limit = -1, START_SECONDS
        try:
            while True:
                if not ours.poll(limit):
                    outcomes.append(Outcome(case, "", f"hangs: nothing after {limit:g} s", failed=True))
                    break
                outcome = as_outcome(ours.recv())
                if outcome.case >= 0 or outcome.failed:
                    outcomes.append(outcome)
                if len(outcomes) >= cases or (outcome.case < 0 and outcome.failed):
                    break
                case, limit = len(outcomes), SECONDS[target]
                ours.send(case)
        except EOFError:
            process.join()
            outcomes.append(Outcome(case, "", f"crash: exit code {process.exitcode}", failed=True))
        finally:
            process.kill()
            process.join()
            ours.close()
        if outcomes and outcomes[-1].case < 0:
            break
    return outcomes


def report(target: str, seed: int, outcomes: list[Outcome], seconds: float) -> bool:
    """Print how the cases ended; returns whether all ended well."""
    bad = [each for each in outcomes if each.failed]
    for each in bad:
        print(f"FAILED target {target}, seed {seed}, case {each.case}: {each.result}\n  {each.did}\n  {each.says}")
        print(f"  again: python -m tests.fuzz --target {target} --seed {seed} --case {each.case}")
    counts = collections.Counter("failed" if each.failed else each.result for each in outcomes)
    peak = max((each.memory for each in outcomes), default=0) >> 20
    print(
        f"{target}: seed {seed}, {len(outcomes)} cases in {seconds:.0f} s: {counts['refused']} refused, "
        f"{counts['refused by the host']} by transformers or vLLM themselves, {counts['loaded']} loaded exactly, "
        f"{counts['failed']} failed; a case added {peak} MiB at most",
        flush=True,
    )
    return not bad


def main() -> int:
    """Returns the exit status: 0 where every case ended well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=list(CASES), action="append", help="what loads them [all of them]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, help="how many of each target")
    parser.add_argument("--case", type=int, help="repeat this one case of --target in this process")
    options = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    from tests.fuzz.base import build

    work = Path(tempfile.mkdtemp(prefix="gqsa-fuzz-"))
    bases = list(build(work / "good"))
    chosen = options.target or list(CASES)
    if options.case is not None:
        outcome = run_case(chosen[0], options.seed, options.case, bases, work, keep=True)
        print(f"{outcome}\n{outcome.says}\nthe checkpoint: {work / 'checkpoint'}")
        return int(outcome.failed)
    good = True
    for target in chosen:
        start = time.monotonic()
        outcomes = fuzz(target, options.seed, options.cases or CASES[target], bases, work)
        good = report(target, options.seed, outcomes, time.monotonic() - start) and good
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
