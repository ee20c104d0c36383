"""Perplexity, by three engines that must agree: block by block, transformers, and vLLM's prompt logprobs."""

import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from vllm_gqsa.offline.errors import InputError
from vllm_gqsa.offline.source import load_config, load_tokenizer, model_folder
from vllm_gqsa.offline.stream import ModelStream
from vllm_gqsa.offline.text import TextSource, check_context, token_windows

__all__ = ["REPORTED_WINDOWS", "Engine", "Perplexity", "evaluate", "streamed_perplexity"]

Engine = Literal["transformers", "vllm"]
REPORTED_WINDOWS = 16
"""Windows a compression measures for its model card, unless told otherwise."""
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Perplexity:
    """A measured perplexity and what it was measured on.

    Attributes:
        perplexity: exp of the mean next-token loss.
        tokens: tokens predicted; the first of each window is not.
        windows: windows, cut without overlap.
        context: tokens a window.
        text: name of the text.
    """

    perplexity: float
    tokens: int
    windows: int
    context: int
    text: str

    @classmethod
    def of(cls, losses: list[torch.Tensor], windows: torch.Tensor, text: str) -> "Perplexity":
        """From the next-token losses ``[context - 1]`` of each window.

        Raises:
            InputError: they are not finite.
        """
        mean = torch.cat(losses).double().mean().item()
        if not math.isfinite(mean):
            raise InputError(f"the loss on {text} is {mean}: the model's weights or activations are not finite")
        value = math.exp(mean) if mean < 700 else math.inf
        return cls(value, sum(loss.numel() for loss in losses), windows.shape[0], windows.shape[1], text)

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary."""
        return asdict(self)


def streamed_perplexity(
    stream: ModelStream, windows: torch.Tensor, text: str, batch: int, progress: Progress
) -> Perplexity:
    """Perplexity with one block in memory at a time, float32."""
    hidden = stream.embed(windows, batch)
    for index in range(len(stream)):
        stream.block(index).advance(hidden, batch, stream.device)
        progress(index + 1, len(stream))
    return Perplexity.of(list(stream.losses(windows, hidden)), windows, text)


def evaluate(
    model: str,
    text: TextSource,
    *,
    context: int,
    max_windows: int | None,
    engine: Engine,
    dtype: str,
    device: str,
    progress: Progress,
) -> Perplexity:
    """Perplexity of a dense or a GQSA model folder (or hub name) on a text.

    Args:
        model: the model.
        text: where the text comes from.
        context: tokens a window.
        max_windows: use only the first windows; all if None.
        engine: ``transformers``, or ``vllm`` through its prompt logprobs.
        dtype: a torch dtype's name.
        device: of the transformers engine; vLLM chooses its own.
        progress: called with windows done and windows in all.

    Raises:
        InputError: model, text or engine cannot be used.
        FormatError: a GQSA checkpoint breaks the format.
    """
    folder = model_folder(model)
    # vLLM always generates a token after the window.
    check_context(context + (engine == "vllm"), load_config(folder))
    windows = token_windows(text, load_tokenizer(folder), context, max_windows)
    run = _through_vllm if engine == "vllm" else _through_transformers
    return Perplexity.of(run(folder, windows, dtype, device, progress), windows, text.name)


def _through_transformers(
    folder: Path, windows: torch.Tensor, dtype: str, device: str, progress: Progress
) -> list[torch.Tensor]:
    from transformers import AutoModelForCausalLM  # noqa: PLC0415 - slow to import

    import vllm_gqsa.hf  # noqa: F401, PLC0415 - registers the quantiser

    model: Any
    model, loading = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), output_loading_info=True)
    if loading["missing_keys"]:
        # transformers only warns, and gives random values to what is missing.
        raise InputError(f"{folder}: tensor {min(loading['missing_keys'])} is missing")
    model = model.to(device).eval()
    losses = []
    with torch.no_grad():
        for done, window in enumerate(windows.to(device), 1):
            logits = model(window[None], use_cache=False).logits[0, :-1].float()
            losses.append(torch.nn.functional.cross_entropy(logits, window[1:], reduction="none").cpu())
            progress(done, len(windows))
    return losses


def _through_vllm(
    folder: Path, windows: torch.Tensor, dtype: str, _device: str, progress: Progress
) -> list[torch.Tensor]:
    # vLLM logs to stdout, where --json is read; and on a CPU it asks for most of the memory unless told otherwise.
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    try:
        from vllm import LLM, SamplingParams  # noqa: PLC0415 - optional and slow to import
    except ImportError as error:
        raise InputError(f"--engine vllm needs vLLM, which cannot be imported: {error}") from error

    context = windows.shape[1]
    # One token is always generated, so the window and one more must fit.
    llm = LLM(str(folder), dtype=dtype, max_model_len=context + 1, enforce_eager=True, max_num_seqs=4)
    sampling = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    losses = []
    for done, window in enumerate(windows.tolist(), 1):
        output = llm.generate({"prompt_token_ids": window}, sampling, use_tqdm=False)[0]
        scores = output.prompt_logprobs[1:]
        losses.append(torch.tensor([-score[token].logprob for score, token in zip(scores, window[1:], strict=True)]))
        progress(done, len(windows))
    return losses
