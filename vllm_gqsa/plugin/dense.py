"""What a checkpoint holds beside compressed linears: vLLM serves what was in memory instead of a missing tensor."""

import copy
from typing import Any

import torch

from vllm_gqsa.experts import empty_model, fused_experts, is_text_model
from vllm_gqsa.format import TENSORS, CheckpointReader, FormatError, check_dense, check_layer_count

__all__ = ["check_model"]


def check_model(reader: CheckpointReader, config: Any) -> None:  # noqa: ANN401 - transformers chooses the class
    """Check that the tensors outside the compressed linears are there, and of text models their shapes.

    Args:
        reader: of the checkpoint.
        config: config.json as transformers understands it. A kind of model that transformers does not know, or whose
            experts have unknown names in files, is not checked.

    Raises:
        FormatError: one is missing or has the wrong shape, or config.json describes no model.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText  # noqa: PLC0415 - slow

    is_text = is_text_model(config)
    auto: Any = AutoModelForCausalLM if is_text else AutoModelForImageTextToText
    if type(config) not in auto._model_mapping:
        return
    check_layer_count(config.get_text_config(), len(reader.files.file_of), reader.folder)
    try:
        model = empty_model(auto, config)
    except ValueError as error:
        raise FormatError(f"{reader.folder}/config.json: describes no model that can be built: {error}") from error
    if fused_experts(model):
        return
    if is_text:
        check_dense(reader.config, model, reader.files)
        return
    for name in _missing(reader, type(model), config):
        raise FormatError(
            f"{reader.folder}: tensor {name} (as transformers calls it), which the model needs, is missing"
        )


def _missing(reader: CheckpointReader, kind: Any, config: Any) -> list[str]:  # noqa: ANN401 - of transformers
    """What a vision-language model lacks, found by transformers itself: names in files differ, by their age too."""
    from transformers.utils import logging  # noqa: PLC0415

    shapes: dict[str, tuple[int, ...]] = {}
    for name in reader.files.file_of:
        module, _, piece = name.rpartition(".")
        if module not in reader.config.modules or piece not in TENSORS:
            shapes[name] = reader.files.shape(name)
        elif piece == "crow_indices":
            shapes[f"{module}.weight"] = (reader.files.shape(name)[0] - 1, 1)  # another shape does not matter
    config = copy.deepcopy(config)
    vars(config).pop("quantization_config", None)
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # else it prints a table of the shapes
    try:
        with torch.device("meta"):
            tensors = {name: torch.empty(shape) for name, shape in shapes.items()}
            options = {"output_loading_info": True, "ignore_mismatched_sizes": True, "device_map": "meta"}
            _, found = kind.from_pretrained(None, config=config, state_dict=tensors, **options)
    finally:
        logging.set_verbosity(verbosity)
    return sorted(found["missing_keys"])
