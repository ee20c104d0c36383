"""llama.cpp and its models: an environment of its own, and GGUF files in its 4-bit and 2-bit formats."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.cpu.machine import core, one_thread
from benchmarks.demo.errors import DemoError
from benchmarks.demo.model import find_gguf
from benchmarks.errors import BenchmarkError
from benchmarks.protocol import Worker

__all__ = ["FORMATS", "LLAMA_CPP_PYTHON", "dummy_files", "install", "smollm2_files"]

LLAMA_CPP_PYTHON = "0.3.36"
FORMATS = {"Q4_0": 2, "Q2_K": 10}
"""llama.cpp's numbers of them. Where a format does not fit a tensor's width llama.cpp takes a larger one."""
WORKER = "benchmarks.cpu.llamacpp_worker"
# Multimodal models need more code, which nothing here uses.
_BUILD = {"CMAKE_ARGS": "-DLLAVA_BUILD=OFF -DMTMD_BUILD=OFF"}
_TIMEOUT = 900
# Blocks of Q8_0: a half-precision scale and 32 integers.
_Q8_BLOCK, _Q8_BYTES = 32, 34


def install(folder: Path, say: Callable[[str], None]) -> Path:
    """Compile llama.cpp in an environment of its own unless it is there; returns its Python.

    Args:
        folder: of the environment.
        say: is told how long the first time takes.

    Raises:
        BenchmarkError: it cannot be built here.
    """
    python = folder.absolute() / "bin" / "python"
    check = [
        str(python),
        "-c",
        f"import llama_cpp; raise SystemExit(llama_cpp.__version__ != '{LLAMA_CPP_PYTHON}')",
    ]
    if python.exists() and subprocess.call(check, stderr=subprocess.DEVNULL) == 0:
        return python
    say(f"compiling llama-cpp-python {LLAMA_CPP_PYTHON} in {folder}; some minutes, the first time only")
    start = time.monotonic()
    log = folder.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as output:
        for command in (
            [sys.executable, "-m", "venv", "--clear", str(folder)],
            [
                str(python),
                "-m",
                "pip",
                "install",
                "--no-binary",
                "llama-cpp-python",
                f"llama-cpp-python=={LLAMA_CPP_PYTHON}",
            ],
            check,
        ):
            if subprocess.call(command, stdout=output, stderr=output, env={**os.environ, **_BUILD}) != 0:
                raise BenchmarkError(f"llama-cpp-python {LLAMA_CPP_PYTHON} cannot be built here; see {log}")
    say(f"compiled in {time.monotonic() - start:.0f} s")
    return python


def smollm2_files(python: Path, folder: Path, say: Callable[[str], None]) -> dict[str, Path]:
    """SmolLM2-135M in llama.cpp's formats, requantised from the 4-bit file that there is. Returns files by format.

    Raises:
        BenchmarkError: the model is not there, or llama.cpp refuses it.
    """
    try:
        source = find_gguf()
    except DemoError as error:
        raise BenchmarkError(str(error)) from error
    return {name: _quantise(python, source, folder / f"smollm2-{name}.gguf", say) for name in FORMATS}


def dummy_files(python: Path, folder: Path, config: dict[str, Any], say: Callable[[str], None]) -> dict[str, Path]:
    """A model of a given shape with random weights in llama.cpp's formats. Returns files by format.

    Args:
        python: of llama.cpp's environment.
        folder: for the files.
        config: as in config.json, of a Llama with tied embeddings.
        say: is told what happens.

    Raises:
        BenchmarkError: llama.cpp refuses it.
    """
    stem = f"dummy-{config['num_hidden_layers']}x{config['hidden_size']}"
    source = folder / f"{stem}-Q8_0.gguf"
    targets = {name: folder / f"{stem}-{name}.gguf" for name in FORMATS}
    if not all(path.exists() for path in targets.values()):
        say(f"writing {source}")
        write_random_gguf(source, config)
        for path in targets.values():
            _quantise(python, source, path, say)
        source.unlink()
    return targets


def write_random_gguf(path: Path, config: dict[str, Any]) -> None:
    """A GGUF file of a Llama with random weights in Q8_0 and no tokenizer.

    Args:
        path: to write.
        config: as in config.json, with tied embeddings.
    """
    import gguf  # noqa: PLC0415
    import numpy as np  # noqa: PLC0415

    path.parent.mkdir(parents=True, exist_ok=True)
    hidden, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    draw = np.random.default_rng(0)

    def add(name: str, rows: int, columns: int) -> None:
        blocks = draw.integers(0, 256, (rows, columns // _Q8_BLOCK, _Q8_BYTES), dtype=np.uint8)
        # Small weights keep the activations finite.
        blocks[..., :2] = np.frombuffer(np.float16(0.0003).tobytes(), dtype=np.uint8)
        writer.add_tensor(f"{name}.weight", blocks.reshape(rows, -1), raw_dtype=gguf.GGMLQuantizationType.Q8_0)

    def add_norm(name: str) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(hidden, dtype=np.float32))

    add("token_embd", config["vocab_size"], hidden)
    add_norm("output_norm")
    for i in range(config["num_hidden_layers"]):
        add_norm(f"blk.{i}.attn_norm")
        add_norm(f"blk.{i}.ffn_norm")
        add(f"blk.{i}.attn_q", heads * head, hidden)
        add(f"blk.{i}.attn_k", kv_heads * head, hidden)
        add(f"blk.{i}.attn_v", kv_heads * head, hidden)
        add(f"blk.{i}.attn_output", hidden, heads * head)
        add(f"blk.{i}.ffn_gate", inner, hidden)
        add(f"blk.{i}.ffn_up", inner, hidden)
        add(f"blk.{i}.ffn_down", hidden, inner)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _quantise(python: Path, source: Path, target: Path, say: Callable[[str], None]) -> Path:
    if target.exists():
        return target
    start = time.monotonic()
    partial = target.with_suffix(".partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    name = target.stem.rpartition("-")[2]
    settings = {
        "core": core(),
        "file": str(source.absolute()),
        "target": str(partial.absolute()),
        "ftype": FORMATS[name],
    }
    with Worker(f"llama.cpp's {name}", python, WORKER, settings, target.with_suffix(".log"), one_thread()) as worker:
        worker.start(_TIMEOUT)
        if worker.ready["status"] != 0:
            raise BenchmarkError(f"llama.cpp cannot quantise {source.name} to {name}; see {target.with_suffix('.log')}")
    partial.rename(target)
    say(f"{target.name} made in {time.monotonic() - start:.0f} s; the next run uses it again")
    return target
