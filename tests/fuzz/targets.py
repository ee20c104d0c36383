"""What a checkpoint is given to: each function loads a folder and compares every weight with the independent reader.

A target raises one of its ``CLEAN`` errors, or :class:`WrongError` where it loaded something else than the files hold.
"""

import gc
import json
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

import vllm_gqsa
from tests.fuzz.base import expanded, stored_tensors
from vllm_gqsa.format import FormatError, GroupSparseMatrix
from vllm_gqsa.kernels.cpu import PackedMatrix
from vllm_gqsa.offline.errors import InputError

Shapes = dict[str, tuple[int, int]]


class WrongError(AssertionError):
    """A checkpoint was loaded, and not as it is."""


def same(name: str, ours: torch.Tensor, theirs: np.ndarray) -> None:
    """Compare bit for bit."""
    mine = ours.detach().contiguous()
    raw = mine.view(torch.uint8).numpy().tobytes() if mine.dim() else mine.numpy().tobytes()
    if raw != np.ascontiguousarray(theirs).tobytes():
        raise WrongError(f"{name} differs from what the file holds")


@contextmanager
def watched() -> Iterator[None]:
    """Within it nothing reaches the native kernels that breaks the format."""
    right = PackedMatrix.pack

    def pack(matrix: GroupSparseMatrix) -> PackedMatrix:
        try:
            matrix.validate()
        except FormatError as error:
            raise WrongError(f"a broken matrix reached the native kernels: {error}") from error
        return right(matrix)

    PackedMatrix.pack = pack  # type: ignore[method-assign]
    try:
        yield
    finally:
        PackedMatrix.pack = right  # type: ignore[method-assign]


def read(folder: Path, shapes: Shapes) -> None:
    """The format's reader, with the shapes that a model would ask for."""
    from vllm_gqsa.format import CheckpointReader, is_ignored

    reader = CheckpointReader(folder)
    is_ignored("model.layers.0.mlp.gate", reader.config.ignore)
    unknown = set(reader.config.modules) - set(shapes)
    if unknown:
        raise FormatError(f"{folder}/config.json: modules lists {unknown}, which the model has not")
    matrices = {name: reader.matrix(name, shapes[name]) for name in reader.config.modules}
    dense = {name: reader.files.tensor(name) for name in reader.files.file_of}
    stored = stored_tensors(folder)
    if set(dense) != set(stored):
        raise WrongError(f"names differ: {set(dense) ^ set(stored)}")
    for name, tensor in dense.items():
        same(name, tensor, stored[name])
    for name, matrix in matrices.items():
        same(name, matrix.to_dense(), expanded(stored, name, shapes[name]))


def verify(folder: Path, shapes: Shapes) -> None:
    """``gqsa verify``, then the reader, which must agree."""
    from vllm_gqsa.offline.verify import verify_checkpoint

    verify_checkpoint(folder, lambda *_: None)
    read(folder, shapes)


def transformers(folder: Path, shapes: Shapes) -> None:
    """``from_pretrained`` of plain transformers."""
    import transformers as hf

    import vllm_gqsa.hf as ours

    config = json.loads((folder / "config.json").read_text())
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict) or quantization.get("quant_method") != "gqsa":
        raise ValueError("not asked: transformers warns of an unknown quant_method and goes on")
    if not str(config.get("num_hidden_layers", 1)).isdigit() or int(config.get("num_hidden_layers", 1)) > 100:
        raise ValueError("not asked: transformers builds any number of layers before it asks a quantizer")
    model = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    stored = stored_tensors(folder)
    kinds = (ours.GqsaLinear, ours.GqsaEmbedding)
    compressed = {name for name, module in model.named_modules() if isinstance(module, kinds)}
    for name in compressed:
        same(name, model.get_submodule(name).matrix.to_dense(), expanded(stored, name, shapes[name]))
    for name, parameter in model.named_parameters():
        if name not in stored:
            raise WrongError(f"{name} came from nowhere")
        same(name, parameter, stored[name].astype(np.float32))
    model(torch.tensor([[1, 2, 3]]))


def vllm(folder: Path, shapes: Shapes) -> None:
    """A vLLM engine in this process: loads, compares, generates."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = None
    try:
        llm = LLM(
            model=str(folder), dtype="float32", enforce_eager=True, skip_tokenizer_init=True, max_model_len=32,
            max_num_seqs=2, kv_cache_memory_bytes=1 << 24, disable_log_stats=True,
        )  # fmt: skip
        stored = stored_tensors(folder)
        llm.apply_model(lambda model: _compare_vllm(model, stored, shapes))
        sampling = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, detokenize=False)
        llm.generate([{"prompt_token_ids": [1, 2, 3]}], sampling, use_tqdm=False)
    finally:
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def _compare_vllm(model: Any, stored: dict[str, np.ndarray], shapes: Shapes) -> None:
    from vllm_gqsa.plugin.linear import GqsaLinearMethod

    for name, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        if isinstance(method, GqsaLinearMethod):
            parts = [expanded(stored, source, shapes[source]) for source in method.sources.names]
            same(name, method.dequantize_weight(module), np.concatenate(parts))
    for name, parameter in model.named_parameters():
        if name in stored and name.endswith(".weight"):
            same(name, parameter[: len(stored[name])], stored[name].astype(np.float32))


TARGETS: dict[str, Callable[[Path, Shapes], None]] = {
    "read": read, "verify": verify, "transformers": transformers, "vllm": vllm,
}  # fmt: skip


def clean_errors(target: str) -> tuple[type[BaseException], ...]:
    """The errors that a target may end in."""
    if target == "read":
        return (FormatError,)
    if target == "verify":
        return (FormatError, InputError)
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    # Ours are ValueErrors; the others are transformers', safetensors' and vLLM's own words.
    return (ValueError, NotImplementedError, OSError, SafetensorError, StrictDataclassError)


def is_hosts_own(target: str, error: BaseException) -> bool:
    """Whether transformers or vLLM stumbled over a file before anything of ours was called."""
    if target not in ("transformers", "vllm") or isinstance(error, (WrongError, MemoryError)):
        return False
    frames = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)]
    here = Path(__file__).parent
    return not any(Path(file).is_relative_to(Path(vllm_gqsa.__file__).parent) for file in frames) and not (
        Path(frames[-1]).is_relative_to(here)
    )
