"""The engines that measure a finished model: transformers, and vLLM through its prompt logprobs."""

import os
from pathlib import Path
from typing import Any, Literal

import torch

from vllm_gqsa.offline.errors import InputError

__all__ = ["Engine", "load_transformers", "load_vllm"]

Engine = Literal["transformers", "vllm"]


def load_transformers(folder: Path, dtype: str, device: str) -> Any:  # noqa: ANN401 - transformers chooses the class
    """A causal language model, dense or GQSA, ready to be called.

    Args:
        folder: the model.
        dtype: a torch dtype's name.
        device: a torch device's name.

    Raises:
        InputError: a tensor is missing.
        FormatError: a GQSA checkpoint breaks the format.
    """
    from transformers import AutoModelForCausalLM  # noqa: PLC0415 - slow to import

    import vllm_gqsa.hf  # noqa: F401, PLC0415 - registers the quantiser
    from vllm_gqsa.offline.attention import use_plain_attention  # noqa: PLC0415

    model: Any
    model, loading = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), output_loading_info=True)
    if loading["missing_keys"]:
        # transformers only warns, and gives random values to what is missing.
        raise InputError(f"{folder}: tensor {min(loading['missing_keys'])} is missing")
    use_plain_attention(model, torch.device(device), dtype)
    return model.to(device).eval()


def load_vllm(folder: Path, dtype: str, length: int, sequences: int) -> tuple[Any, Any]:
    """vLLM, and sampling parameters that give the log-likelihood of every token of a prompt.

    Args:
        folder: the model.
        dtype: a torch dtype's name.
        length: tokens of the longest prompt.
        sequences: prompts at a time.

    Returns:
        A ``vllm.LLM`` and its ``SamplingParams``.

    Raises:
        InputError: vLLM cannot be imported.
    """
    # vLLM logs to stdout, where --json is read; and on a CPU it asks for most of the memory unless told otherwise.
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    try:
        from vllm import LLM, SamplingParams  # noqa: PLC0415 - optional and slow to import
    except ImportError as error:
        raise InputError(f"--engine vllm needs vLLM, which cannot be imported: {error}") from error

    # One token is always generated, so the prompt and one more must fit.
    llm = LLM(str(folder), dtype=dtype, max_model_len=length + 1, enforce_eager=True, max_num_seqs=sequences)
    return llm, SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
