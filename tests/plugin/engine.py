"""Runs one vLLM engine and writes what it did to a file; started as a process of its own by the tests.

Usage: engine.py SPEC RESULT. SPEC holds a JSON list of jobs ``{"model", "options", "prompts", "max_tokens",
"reload"}``; RESULT gets a list of ``{"tokens": [[...]], "after": {folder: [[...]]}}`` or ``{"error": text}``, in
the same order.
"""

import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch

DEFAULTS: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "skip_tokenizer_init": True,
    "max_model_len": 128,
    "max_num_seqs": 8,
    "enable_prefix_caching": False,
    "kv_cache_memory_bytes": 1 << 26,
    "disable_log_stats": True,
}


def generate(llm: Any, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
    """Greedy tokens for each prompt."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": each} for each in prompts], sampling, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Start an engine, generate, and reload weights as often as the job says."""
    from vllm import LLM

    llm = LLM(model=job["model"], **{**DEFAULTS, **job.get("options", {})})
    tokens = job.get("max_tokens", 12)
    result: dict[str, Any] = {"tokens": generate(llm, job["prompts"], tokens), "after": []}
    for folder in job.get("reload", []):
        llm.collective_rpc("reload_weights", kwargs={"weights_path": folder})
        result["after"].append(generate(llm, job["prompts"], tokens))
    return result


def clean_up() -> None:
    """Make room for the next engine of this process."""
    from vllm.distributed import cleanup_dist_env_and_memory

    gc.collect()
    cleanup_dist_env_and_memory()


def main() -> None:
    """Run all jobs, each to its end or its error."""
    results = []
    for job in json.loads(Path(sys.argv[1]).read_text()):
        try:
            results.append(run(job))
        except Exception as error:  # noqa: BLE001 - whatever it is, the test wants to see it
            results.append({"error": f"{type(error).__name__}: {error}"})
        clean_up()
        Path(sys.argv[2]).write_text(json.dumps(results))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
