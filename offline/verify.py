"""Is a checkpoint whole, and does it compute what the weights in it say?"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from vllm_gqsa.experts import MIXTURES, name_in_model, weight_in_model
from vllm_gqsa.format import HEAD, CheckpointReader, FormatError, check_dense, is_ignored
from vllm_gqsa.offline.errors import InputError
from vllm_gqsa.offline.inspect import module_shapes
from vllm_gqsa.offline.source import DenseModel, load_config, load_tokenizer, model_folder
from vllm_gqsa.offline.stream import meta_model

__all__ = ["Comparison", "compare", "verify_checkpoint"]

_PROMPT = "The capital of France is Paris. Water boils at one hundred degrees, and 2 + 2 = 4."


def verify_checkpoint(folder: Path, progress: Callable[[int, int], None]) -> int:
    """Check a whole checkpoint against the format and against the model its config.json describes.

    Returns:
        The number of compressed linears that were read and found valid.

    Raises:
        FormatError: the first violation, naming file, module and value.
    """
    reader = CheckpointReader(folder)
    shapes = module_shapes(reader)
    skeleton = meta_model(load_config(folder))
    check_dense(reader.config, skeleton, reader.files)
    for name, module in skeleton.named_modules():
        is_known = name in reader.config.modules or is_ignored(name, reader.config.ignore)
        if isinstance(module, torch.nn.Linear) and not is_known and name.rpartition(".")[2] != HEAD:
            raise FormatError(f"{folder}/config.json: neither lists {name} in modules nor ignores it")
    for name in skeleton.state_dict():
        if name not in reader.files:
            continue  # compressed, or tied to another
        if not torch.isfinite(reader.files.tensor(name)).all():
            raise FormatError(f"{reader.files.file_of[name]}: {name} holds infinite or NaN values")
    for done, (name, shape) in enumerate(shapes.items(), 1):
        reader.matrix(name, shape)
        progress(done, len(shapes))
    return len(shapes)


@dataclass(frozen=True)
class Comparison:
    """Logits of a checkpoint against two dense models, on one short text, float32.

    Attributes:
        tokens: positions compared.
        twin_max_difference: largest difference from the dense model whose linears are this checkpoint's,
            expanded; 0 where the checkpoint computes what its weights say.
        dense_max_difference: largest difference from the original dense model.
        twin_may_differ: by how much at most that may be: a mixture's experts are summed in another order there.
        mean_kl: mean Kullback-Leibler divergence of the next token from the original, in nats.
        same_best: share of positions where the most likely next token is the same as the original's.
    """

    tokens: int
    twin_max_difference: float
    twin_may_differ: float
    dense_max_difference: float
    mean_kl: float
    same_best: float

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary."""
        return asdict(self)


def compare(folder: Path, dense: str, text: str = _PROMPT) -> Comparison:
    """Recompute logits with the checkpoint, its expanded twin and the original dense model.

    Raises:
        InputError: the dense model is of another shape.
        FormatError: the checkpoint breaks the format.
    """
    import vllm_gqsa.hf  # noqa: F401, PLC0415 - registers the quantiser

    original_config, our_config = DenseModel(dense).config, load_config(folder)
    for key in ("model_type", "vocab_size", "hidden_size", "num_hidden_layers"):
        theirs, ours_is = getattr(original_config, key), getattr(our_config, key)
        if theirs != ours_is:
            raise InputError(
                f"{dense}: its {key} is {theirs}, the checkpoint's is {ours_is}; it was not made from this"
            )
    tokens = load_tokenizer(folder)(text, return_tensors="pt").input_ids
    ours: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = ours(tokens).logits[0]
    del ours
    model: Any = AutoModelForCausalLM.from_pretrained(model_folder(dense), dtype=torch.float32).eval()
    with torch.no_grad():
        original = model(tokens).logits[0]
        _make_twin(model, folder)
        twin = model(tokens).logits[0]
    log_p, log_q = original.log_softmax(-1), logits.log_softmax(-1)
    return Comparison(
        tokens=tokens.numel(),
        twin_max_difference=(logits - twin).abs().max().item(),
        twin_may_differ=1e-4 * original.abs().max().item() if our_config.model_type in MIXTURES else 0.0,
        dense_max_difference=(logits - original).abs().max().item(),
        mean_kl=(log_p.exp() * (log_p - log_q)).sum(-1).mean().item(),
        same_best=(original.argmax(-1) == logits.argmax(-1)).float().mean().item(),
    )


def _make_twin(model: Any, folder: Path) -> None:  # noqa: ANN401
    """Put everything a checkpoint holds, its linears expanded, into a dense model."""
    reader = CheckpointReader(folder)
    kind = model.config.model_type
    for name, shape in module_shapes(reader).items():
        weight = weight_in_model(model, name, kind)
        if tuple(weight.shape) != shape:
            raise InputError(f"{name} is {tuple(weight.shape)} in the dense model, {shape} in the checkpoint")
        weight.copy_(reader.matrix(name, shape).to_dense())
    stored = {name_in_model(name, kind): name for name in reader.files.file_of}
    for name, tensor in model.state_dict().items():
        if name in stored:
            tensor.copy_(reader.files.tensor(stored[name]))
