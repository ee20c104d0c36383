"""Perplexity, by three engines that must agree: block by block, transformers, and vLLM's prompt logprobs."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from vllm_gqsa.offline.arithmetic import fast_float32
from vllm_gqsa.offline.engine import Engine, load_transformers, load_vllm
from vllm_gqsa.offline.errors import InputError
from vllm_gqsa.offline.source import load_config, load_tokenizer, model_folder
from vllm_gqsa.offline.stream import ModelStream
from vllm_gqsa.offline.text import TextSource, check_context, token_windows

__all__ = ["REPORTED_WINDOWS", "Perplexity", "evaluate", "streamed_perplexity"]

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
    model = load_transformers(folder, dtype, device)
    losses = []
    with torch.no_grad(), fast_float32(torch.device(device)):
        for done, window in enumerate(windows.to(device), 1):
            logits = model(window[None], use_cache=False).logits[0, :-1].float()
            losses.append(torch.nn.functional.cross_entropy(logits, window[1:], reduction="none").cpu())
            progress(done, len(windows))
    return losses


def _through_vllm(
    folder: Path, windows: torch.Tensor, dtype: str, _device: str, progress: Progress
) -> list[torch.Tensor]:
    llm, sampling = load_vllm(folder, dtype, windows.shape[1], sequences=4)
    losses = []
    for done, window in enumerate(windows.tolist(), 1):
        output = llm.generate({"prompt_token_ids": window}, sampling, use_tqdm=False)[0]
        scores = output.prompt_logprobs[1:]
        losses.append(torch.tensor([-score[token].logprob for score, token in zip(scores, window[1:], strict=True)]))
        progress(done, len(windows))
    return losses
