"""Models without weights: their shapes, in several forms, and a tokenizer that vLLM's benchmarks can use."""

import json
from pathlib import Path
from typing import Any

from benchmarks.dummy import write_dummy

__all__ = ["FORMS", "MODELS", "TINY", "write_models"]

FORMS = {"dense": "FP16", "int4": "INT4 (GPTQ, Marlin on GPUs)", "gqsa": "GQSA S50"}
_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "dtype": "float16",
}
MODELS: dict[str, dict[str, Any]] = {
    "8B": {
        **_LLAMA,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
    },
    "70B": {
        **_LLAMA,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
    },
}
"""Shapes of Llama-3-8B and Llama-3-70B."""
TINY: dict[str, Any] = {
    **_LLAMA,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    # `vllm bench latency` asks for tokens up to 10000.
    "vocab_size": 10240,
    "dtype": "bfloat16",
}
"""To see that it works, on a CPU too."""


def write_models(folder: Path, config: dict[str, Any]) -> dict[str, Path]:
    """Folders with a config.json and a tokenizer for ``--load-format dummy``; returns them by form.

    Args:
        folder: gets one for every form.
        config: of the dense model.
    """
    folders = write_dummy(folder, config)
    for each in folders.values():
        _write_tokenizer(each, config["vocab_size"])
    return folders


def _write_tokenizer(folder: Path, size: int) -> None:
    """A tokenizer whose words are the numbers of their tokens: what is decoded is read again as the same tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: PLC0415 - comes with vLLM

    words = {"<s>": 0, "</s>": 1, **{f"t{i}": i for i in range(2, size)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<s>"))  # noqa: S106
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
