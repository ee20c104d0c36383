"""The folders that vLLM serves: a 1B-shaped model without weights, and SmolLM2-135M, in several forms."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.demo.errors import DemoError
from benchmarks.demo.model import find_gguf, write_dense_model, write_texts
from benchmarks.dummy import GROUP_SIZE, LINEARS, SPARSITY, gptq_config
from benchmarks.errors import BenchmarkError

__all__ = ["FORMS", "ONE_B", "write_smollm2"]

FORMS = ("dense", "int4", "gqsa", "gqsa_head")
ONE_B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "bfloat16",
}
"""Shape of Llama-3.2-1B."""
# Seconds that nobody waits for in vain: speed does not depend on how well the groups were chosen.
_SAMPLES = 4
_CONTEXT = 256


def write_smollm2(folder: Path, say: Callable[[str], None]) -> dict[str, Path]:
    """SmolLM2-135M dense, as GPTQ and twice as GQSA; what is there already is kept. Returns the folders by form.

    The quantised forms are made for speed alone: rounding to nearest, and the recipe one-shot with few samples.

    Raises:
        BenchmarkError: the model is not there, or could not be converted.
    """
    folders = {form: folder / form for form in FORMS}
    folder.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    try:
        write_dense_model(find_gguf(), folders["dense"])
        if not (folders["int4"] / "config.json").exists():
            write_gptq(folders["dense"], folders["int4"], group_size=64)
        for form, options in (("gqsa", ()), ("gqsa_head", ("--lm-head", "0"))):
            if not (folders[form] / "config.json").exists():
                write_texts(folder / "calibration.txt", folder / "eval.txt")
                calibration, log = folder / "calibration.txt", folder / "compress.log"
                _compress(folders["dense"], folders[form], calibration, log, *options)
    except DemoError as error:
        raise BenchmarkError(str(error)) from error
    if time.monotonic() - start > 1:
        say(f"SmolLM2-135M made in {folder}, {time.monotonic() - start:.0f} s; the next run uses it again")
    return folders


def write_gptq(dense: Path, folder: Path, group_size: int) -> None:
    """Round a dense folder to a GPTQ checkpoint; it appears whole or not at all.

    Args:
        dense: with one ``model.safetensors``.
        folder: to write.
        group_size: divides the inputs of every linear.
    """
    import torch  # noqa: PLC0415 - slow to import, and not needed where the folder is there
    from safetensors.torch import load_file, save_file  # noqa: PLC0415

    from benchmarks.gptq import gptq_tensors, round_to_nearest  # noqa: PLC0415

    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(dense / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if not module.endswith(LINEARS):
            tensors[name] = tensor
            continue
        codes, scales = round_to_nearest(tensor, group_size)
        for piece, value in gptq_tensors(codes, scales.bfloat16()).items():
            tensors[f"{module}.{piece}"] = value.contiguous()
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(dense, partial, ignore=shutil.ignore_patterns("*.safetensors"))
    save_file(tensors, partial / "model.safetensors", {"format": "pt"})
    config = json.loads((partial / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = gptq_config(group_size)
    (partial / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def _compress(dense: Path, folder: Path, calibration: Path, log: Path, *options: str) -> None:
    command = [
        str(Path(sys.executable).with_name("gqsa")), "compress", str(dense), str(folder),
        "--recipe", "one-shot", "--sparsity", str(SPARSITY), "--group-size", str(GROUP_SIZE),
        "--calibration", str(calibration), "--samples", str(_SAMPLES), "--context", str(_CONTEXT), *options,
    ]  # fmt: skip
    with log.open("w", encoding="utf-8") as output:
        status = subprocess.call(command, stdout=output, stderr=subprocess.STDOUT)
    if status != 0:
        raise BenchmarkError(f"gqsa compress failed with status {status}; see {log}")
