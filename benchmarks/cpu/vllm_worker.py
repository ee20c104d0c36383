"""A process with one model in vLLM on one thread: generates when asked, and says where the time went."""

import os
import random
import time
from collections.abc import Callable
from typing import Any

from benchmarks.cpu.timing import environment

__all__ = ["Stopwatch", "prepare"]

PROMPT = 32
_LARGEST_BATCH = 16
_KV_BYTES = 256 << 20
# One process: what is measured runs on the one core, and can be looked into. Everything vLLM allocates otherwise
# would be most of the memory.
ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING"}


class Stopwatch:
    """Adds up the seconds that modules take in steps of one token a request.

    The prefill is left out, and so is the first step after it, in which kernels are chosen and made.

    Attributes:
        seconds: by kind of module.
        steps: how many were timed.
    """

    def __init__(self, batch: int) -> None:
        self.batch = batch
        self.seconds = {"linears": 0.0, "lm_head": 0.0}
        self.steps = 0
        self._hooks: list[Any] = []
        self._began = 0.0
        self._skip = 2

    def watch(self, model: Any) -> None:  # noqa: ANN401 - a torch module; vLLM hands it over untyped
        """Put hooks on a model's linear layers and on its output layer."""
        from vllm.model_executor.layers.linear import LinearBase  # noqa: PLC0415
        from vllm.model_executor.layers.logits_processor import LogitsProcessor  # noqa: PLC0415

        for module in model.modules():
            if isinstance(module, LinearBase):
                self._hooks += self._pair(module, self._linear)
            elif isinstance(module, LogitsProcessor):
                self._hooks += self._pair(module, self._output)

    def _pair(self, module: Any, end: Callable[..., None]) -> list[Any]:  # noqa: ANN401
        return [module.register_forward_pre_hook(self._start), module.register_forward_hook(end)]

    def _start(self, *_: object) -> None:
        self._began = time.perf_counter()

    def _linear(self, _module: object, inputs: tuple[Any, ...], _output: object) -> None:
        if self._skip == 0:
            assert inputs[0].shape[0] == self.batch, "requests do not go on in step"
            self.seconds["linears"] += time.perf_counter() - self._began

    def _output(self, *_: object) -> None:
        # The output layer comes last in a step.
        if self._skip:
            self._skip -= 1
            return
        self.seconds["lm_head"] += time.perf_counter() - self._began
        self.steps += 1

    def remove(self) -> None:
        """Take the hooks off again."""
        for hook in self._hooks:
            hook.remove()


def prepare(settings: dict[str, Any]) -> tuple[dict[str, Any], Callable[[dict[str, Any]], dict[str, Any]]]:
    """Load the model; see :func:`benchmarks.protocol.serve`.

    Args:
        settings: ``folder``, ``dummy`` (no weights there), ``vocabulary`` (its size), ``eager``.
    """
    os.environ.update(ENVIRONMENT)
    start = time.monotonic()
    import torch  # noqa: PLC0415
    from vllm import LLM, SamplingParams  # noqa: PLC0415

    from benchmarks.cpu.contestants import int8_activations  # noqa: PLC0415

    llm = LLM(
        settings["folder"],
        load_format="dummy" if settings["dummy"] else "auto",
        dtype="bfloat16",
        skip_tokenizer_init=True,
        max_model_len=4 * PROMPT,
        max_num_seqs=_LARGEST_BATCH,
        max_num_batched_tokens=_LARGEST_BATCH * PROMPT,
        kv_cache_memory_bytes=_KV_BYTES,
        enforce_eager=settings["eager"],
        enable_prefix_caching=False,
        disable_log_stats=False,  # the times of a request's tokens
        seed=0,
    )
    if settings["dummy"]:
        llm.apply_model(_fill_codes)
    draw = random.Random(0)

    def answer(question: dict[str, Any]) -> dict[str, Any]:
        batch, tokens = question["batch"], question["tokens"]
        prompts = [
            {"prompt_token_ids": [draw.randrange(10, settings["vocabulary"]) for _ in range(PROMPT)]}
            for _ in range(batch)
        ]
        sampling = SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=0, detokenize=False)
        watch = Stopwatch(batch)
        if question["look_inside"]:
            llm.apply_model(watch.watch)
        with environment(question["environment"]):
            outputs = llm.generate(prompts, sampling, use_tqdm=False)
        watch.remove()
        return {**_times([output.metrics for output in outputs], tokens), "watched": watch.steps, **watch.seconds}

    facts = {"seconds": time.monotonic() - start, "threads": torch.get_num_threads()}
    return {**facts, "int8_activations": int8_activations()}, answer


def _times(metrics: list[Any], tokens: int) -> dict[str, Any]:
    """Prefill and decode apart: all requests are read in one step, and go on in step."""
    first = max(each.first_token_ts for each in metrics)
    return {
        "prefill": first - min(each.scheduled_ts for each in metrics),
        "decode": max(each.last_token_ts for each in metrics) - first,
        "steps": tokens - 1,
    }


def _fill_codes(model: Any) -> None:  # noqa: ANN401 - a torch module
    """Random codes in vLLM's INT4 layers: dummy loading leaves integers as they were in memory."""
    import torch  # noqa: PLC0415

    for name, parameter in model.named_parameters():
        if name.endswith("qweight") and parameter.dtype == torch.int32:
            parameter.data.random_()


if __name__ == "__main__":
    from benchmarks.protocol import serve

    serve(prepare)
