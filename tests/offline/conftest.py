"""Tiny random dense models of every family, a tokenizer made on the spot, and text for it."""

import random
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

SIZES = {
    "vocab_size": 300,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
GATED = {**SIZES, "intermediate_size": 96, "num_key_value_heads": 2}
CONFIGS = {
    "llama": LlamaConfig(**GATED, tie_word_embeddings=False),
    "mistral": MistralConfig(**GATED, sliding_window=16, head_dim=16),
    "qwen2": Qwen2Config(**GATED, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**GATED, head_dim=16),
    "opt": OPTConfig(**SIZES, ffn_dim=96, word_embed_proj_dim=32),
}


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    """Words in an order that is not quite random, so that there is something to learn from."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 7))) for _ in range(150)]
    sentences = [" ".join(rng.choices(words, k=rng.randint(5, 12))) + "." for _ in range(1200)]
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(sentences))
    return path


@pytest.fixture(scope="session")
def tokenizer(text):
    fast = Tokenizer(models.BPE(unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.train([str(text)], trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "</s>"]))
    made = PreTrainedTokenizerFast(tokenizer_object=fast, unk_token="<unk>", eos_token="</s>")
    made.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    return made


@pytest.fixture(scope="session")
def dense(tmp_path_factory, tokenizer):
    """``dense(family)``: the folder of a tiny random dense model."""
    folders: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in folders:
            folder = tmp_path_factory.mktemp("dense") / family
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(CONFIGS[family])
            for parameter in model.parameters():
                if parameter.dim() == 1:  # biases and norms that do something
                    parameter.data.add_(torch.randn_like(parameter) * 0.02)
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            folders[family] = folder
        return folders[family]

    return make
