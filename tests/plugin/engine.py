"""Runs one vLLM engine and writes what it did to a file; started as a process of its own by the tests.

Usage: engine.py SPEC RESULT. SPEC holds a JSON list of jobs ``{"model", "options", "prompts", "max_tokens",
"reload", "features"}``; RESULT gets a list of ``{"tokens": [[...]], "after": [[[...]]], feature: ...}`` or
``{"error": text}``, in the same order. A reload that fails gives its error in "after"; what a feature gives is said by
the function of its name below.
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


def generate(llm: Any, prompts: list[list[int]], max_tokens: int, **options: Any) -> list[list[int]]:
    """Greedy tokens for each prompt."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": each} for each in prompts], sampling, use_tqdm=False, **options)
    return [list(output.outputs[0].token_ids) for output in outputs]


def ask(llm: Any, prompts: list[Any], **sampling: Any) -> list[Any]:
    """Greedy completions."""
    from vllm import SamplingParams

    return llm.generate(prompts, SamplingParams(**{"temperature": 0, "ignore_eos": True, **sampling}), use_tqdm=False)


def logprobs(llm: Any, job: dict[str, Any]) -> list[Any]:
    """For each prompt: the log probabilities of its tokens, and of the three best at each generated one."""
    prompts = [{"prompt_token_ids": each} for each in job["prompts"]]
    outputs = ask(llm, prompts, max_tokens=4, logprobs=3, prompt_logprobs=1, detokenize=False)

    def plain(positions: list[Any]) -> list[Any]:
        return [each and sorted((token, entry.logprob) for token, entry in each.items()) for each in positions]

    return [[plain(output.prompt_logprobs), plain(output.outputs[0].logprobs)] for output in outputs]


def cached(llm: Any, job: dict[str, Any]) -> list[Any]:
    """Tokens for a prompt of 90 tokens, twice, and how many of them came from the prefix cache."""
    prompt = {"prompt_token_ids": [7 + at % 50 for at in range(90)]}
    outputs = [ask(llm, [prompt], max_tokens=8)[0] for _ in range(2)]
    return [[list(each.outputs[0].token_ids), each.num_cached_tokens] for each in outputs]


def guided(llm: Any, job: dict[str, Any]) -> list[str]:
    """Answers that a regular expression, a choice and a JSON schema allow."""
    from vllm.sampling_params import StructuredOutputsParams

    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    wishes = ({"regex": "[a-c]{5}"}, {"choice": ["yes", "no"]}, {"json": schema})
    params = [{"structured_outputs": StructuredOutputsParams(**wish), "ignore_eos": False} for wish in wishes]
    return [ask(llm, ["abc"], max_tokens=60, **each)[0].outputs[0].text for each in params]


def chat(llm: Any, job: dict[str, Any]) -> str:
    """The answer to a conversation."""
    from vllm import SamplingParams

    messages = [{"role": "user", "content": "abc"}]
    sampling = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    return llm.chat(messages, sampling, use_tqdm=False)[0].outputs[0].text


def stream(llm: Any, job: dict[str, Any]) -> list[list[int]]:
    """The tokens of the first prompt as they come, step by step."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    sampling = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, output_kind=RequestOutputKind.DELTA)
    llm.llm_engine.add_request("stream", {"prompt_token_ids": job["prompts"][0]}, sampling)
    steps = []
    while llm.llm_engine.has_unfinished_requests():
        steps += [list(output.outputs[0].token_ids) for output in llm.llm_engine.step()]
    return steps


def lora(llm: Any, job: dict[str, Any]) -> list[list[int]]:
    """Tokens with the adapter of the job."""
    from vllm.lora.request import LoRARequest

    request = LoRARequest("adapter", 1, job["adapter"])
    return generate(llm, job["prompts"], job.get("max_tokens", 12), lora_request=request)


def accepted(llm: Any, job: dict[str, Any]) -> int:
    """How many guessed tokens speculative decoding took."""
    counts = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    return int(counts["vllm:spec_decode_num_accepted_tokens"])


def embed(llm: Any, job: dict[str, Any]) -> list[list[float]]:
    """Embeddings of the prompts."""
    outputs = llm.embed([{"prompt_token_ids": each} for each in job["prompts"]], use_tqdm=False)
    return [output.outputs.embedding for output in outputs]


def images(llm: Any, job: dict[str, Any]) -> list[list[int]]:
    """Tokens for the text of the job with each of two images of noise."""
    import numpy as np
    from PIL import Image

    noise = [np.random.default_rng(seed).integers(256, size=(40, 60, 3), dtype=np.uint8) for seed in range(2)]
    prompts = [{"prompt": job["text"], "multi_modal_data": {"image": Image.fromarray(each)}} for each in noise]
    return [list(output.outputs[0].token_ids) for output in ask(llm, prompts, max_tokens=12, detokenize=False)]


FEATURES = {each.__name__: each for each in (logprobs, cached, guided, chat, stream, lora, accepted, embed, images)}


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Start an engine, generate, reload weights as often as the job says, and try its features."""
    from vllm import LLM

    llm = LLM(model=job["model"], **{**DEFAULTS, **job.get("options", {})})
    result: dict[str, Any] = {"after": []}
    if job.get("options", {}).get("runner") != "pooling":
        result["tokens"] = generate(llm, job["prompts"], job.get("max_tokens", 12))
    for folder in job.get("reload", []):
        try:
            llm.collective_rpc("reload_weights", kwargs={"weights_path": folder})
        except Exception as error:  # noqa: BLE001 - the next reload must work all the same
            result["after"].append(f"{type(error).__name__}: {error}")
        else:
            result["after"].append(generate(llm, job["prompts"], job.get("max_tokens", 12)))
    return result | {name: FEATURES[name](llm, job) for name in job.get("features", [])}


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
