"""What tests of a served model need beside its weights: a tokenizer, and an adapter."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

TOKENS = 320
"""Size of the vocabulary: the 256 bytes, a few special tokens, and rows that no text gives."""
TARGETS = ("q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK, ALPHA = 8, 16


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of bytes, with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<bos>", "<eos>", "<pad>"]
    names = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({name: at for at, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", model_max_length=128
    )
    fast.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    fast.save_pretrained(folder)


def train_adapter(dense: Path, folder: Path) -> Path:
    """Train a LoRA adapter for a few steps, write it as peft does, and the model with it merged.

    By hand: peft is no requirement of anything here.

    Args:
        dense: the model that it is trained on.
        folder: gets ``adapter`` and ``merged``.

    Returns:
        The folder of the adapter.
    """
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32).requires_grad_(False)
    pairs = {}
    for name, linear in model.named_modules():
        if name.rpartition(".")[2] in TARGETS:
            down = torch.nn.Parameter(torch.randn(RANK, linear.in_features) / linear.in_features**0.5)
            up = torch.nn.Parameter(torch.zeros(linear.out_features, RANK))
            pairs[name] = down, up
            linear.register_forward_hook(lambda _, x, y, down=down, up=up: y + (x[0] @ down.T @ up.T) * (ALPHA / RANK))
    optimizer = torch.optim.Adam([each for pair in pairs.values() for each in pair], lr=0.01)
    text = torch.arange(10, 90).reshape(4, 20)
    losses = []
    for _ in range(8):
        loss = model(text, labels=text).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    write_adapter(pairs, folder / "adapter")
    merge(pairs, dense, folder / "merged")
    return folder / "adapter"


def write_adapter(pairs: dict[str, tuple[torch.Tensor, torch.Tensor]], folder: Path) -> None:
    """The two files of an adapter of peft."""
    folder.mkdir(parents=True)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": list(TARGETS),
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = {}
    for name, pair in pairs.items():
        for part, tensor in zip("AB", pair, strict=True):
            tensors[f"base_model.model.{name}.lora_{part}.weight"] = tensor.detach().clone()
    save_file(tensors, folder / "adapter_model.safetensors")


def merge(pairs: dict[str, tuple[torch.Tensor, torch.Tensor]], dense: Path, folder: Path) -> None:
    """The dense model with the adapter added to its weights."""
    folder.mkdir(parents=True)
    for file in dense.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(dense / "model.safetensors")
    for name, (down, up) in pairs.items():
        tensors[f"{name}.weight"] += (up @ down).detach() * (ALPHA / RANK)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
