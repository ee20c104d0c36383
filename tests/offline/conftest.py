"""Tiny random dense models of every family, a tokenizer made on the spot, and text for it."""

import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.helpers import make_dense

SIZES = {"vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 3, "max_position_embeddings": 128}
GATED = {**SIZES, "intermediate_size": 96, "head_dim": 16}
CONFIGS = {
    "llama": GATED,
    "mistral": {**GATED, "sliding_window": 16},
    "qwen2": {**GATED, "tie_word_embeddings": True},
    "qwen3": GATED,
    "mixtral": GATED,
    # The first block has no experts.
    "qwen2_moe": {**GATED, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 32, "mlp_only_layers": [0]},
    "qwen3_moe": {**GATED, "moe_intermediate_size": 48, "mlp_only_layers": [0]},
    "opt": {**SIZES, "ffn_dim": 96, "word_embed_proj_dim": 32},
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
            make_dense(folder, family, **CONFIGS[family])
            tokenizer.save_pretrained(folder)
            folders[family] = folder
        return folders[family]

    return make
