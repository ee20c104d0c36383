"""Plain transformers: ``import vllm_gqsa.hf`` and ``AutoModelForCausalLM.from_pretrained`` reads GQSA checkpoints.

Without the import transformers only warns and returns a model with random linears.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.utils.quantization_config import QuantizationConfigMixin

from vllm_gqsa.experts import fused_experts, name_in_model, unfuse_experts
from vllm_gqsa.format import (
    TENSORS,
    CheckpointReader,
    FormatError,
    GqsaConfig,
    GroupSparseMatrix,
    check_group_size,
    missing_dense,
)
from vllm_gqsa.kernels import linear
from vllm_gqsa.kernels.choice import check_environment
from vllm_gqsa.kernels.embedding import embedding

__all__ = ["GqsaEmbedding", "GqsaHfConfig", "GqsaLinear", "GqsaQuantizer", "GqsaTiedHead"]


class _GqsaModule(torch.nn.Module):
    """The four tensors of a matrix ``[rows, columns]`` as buffers."""

    def __init__(self, rows: int, columns: int, nnz: int, group_size: int) -> None:
        """Make room for ``nnz`` groups on the default device; the values come from a checkpoint.

        Raises:
            FormatError: the group size is not supported or does not divide the columns.
        """
        super().__init__()
        check_group_size(group_size, columns, type(self).__name__)
        self.shape = (rows, columns)
        self.group_size = group_size
        shapes = {
            "crow_indices": (rows + 1,),
            "group_mask": (rows, -(-columns // group_size // 8)),
            "qweight": (nnz, group_size // 2),
            "scale_zero": (nnz,),
        }
        for name, dtype in TENSORS.items():
            self.register_buffer(name, torch.zeros(shapes[name], dtype=dtype))

    @property
    def matrix(self) -> GroupSparseMatrix:
        """The weight."""
        return GroupSparseMatrix.from_tensors(
            {name: getattr(self, name) for name in TENSORS}, self.shape[1], self.group_size
        )


class GqsaLinear(_GqsaModule):
    """A linear layer with a group-sparse INT4 weight.

    Buffers are the four tensors of the format; ``bias`` is a parameter ``[out_features]`` or None.
    """

    def __init__(
        self, in_features: int, out_features: int, nnz: int, group_size: int, bias: torch.Tensor | None = None
    ) -> None:
        """Make room for ``nnz`` groups on the default device; the values come from a checkpoint.

        Raises:
            FormatError: the group size is not supported or does not divide in_features.
        """
        super().__init__(out_features, in_features, nnz, group_size)
        self.in_features = in_features
        self.out_features = out_features
        self.bias = None if bias is None else torch.nn.Parameter(bias, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., in_features]`` to ``[..., out_features]`` in the dtype of ``x``."""
        return linear(x, self.matrix, self.bias)

    def extra_repr(self) -> str:
        """Shape and size, for ``print(model)``."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"group_size={self.group_size}, nnz={self.matrix.nnz}"
        )


class GqsaEmbedding(_GqsaModule):
    """An input embedding with a group-sparse INT4 table; :class:`GqsaTiedHead` multiplies by the same table."""

    _like: torch.Tensor

    def __init__(self, num_embeddings: int, embedding_dim: int, nnz: int, group_size: int, dtype: torch.dtype) -> None:
        """Make room for ``nnz`` groups on the default device; the values come from a checkpoint.

        Raises:
            FormatError: the group size is not supported or does not divide embedding_dim.
        """
        super().__init__(num_embeddings, embedding_dim, nnz, group_size)
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        # Holds nothing but the dtype of the result, which follows .to(dtype) as a dense table's would.
        self.register_buffer("_like", torch.empty(0, dtype=dtype), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """``[...]`` to ``[..., embedding_dim]``."""
        return embedding(ids, self.matrix, self._like.dtype)

    def extra_repr(self) -> str:
        """Shape and size, for ``print(model)``."""
        return f"{self.num_embeddings}, {self.embedding_dim}, group_size={self.group_size}, nnz={self.matrix.nnz}"


class GqsaTiedHead(torch.nn.Module):
    """An output head that is tied to a :class:`GqsaEmbedding` and holds nothing of its own."""

    def __init__(self, table: GqsaEmbedding) -> None:
        super().__init__()
        self._table = [table]  # in a list, lest it be registered, and saved, as a part of the head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., embedding_dim]`` to ``[..., num_embeddings]`` in the dtype of ``x``."""
        return linear(x, self._table[0].matrix)


class GqsaHfConfig(QuantizationConfigMixin):
    """transformers' view of ``quantization_config``."""

    def __init__(self, **raw: Any) -> None:  # noqa: ANN401 - JSON
        """Read the keys of ``quantization_config``.

        Raises:
            FormatError: one sentence with the key at fault.
        """
        self.quant_method = "gqsa"
        self.config = GqsaConfig.parse(raw, "config.json")

    def to_dict(self) -> dict[str, Any]:
        """What stands in config.json."""
        return self.config.to_json()


class GqsaQuantizer(HfQuantizer):
    """Puts :class:`GqsaLinear` and its like in place before the weights are read and checks them afterwards."""

    requires_calibration = True
    quantization_config: GqsaHfConfig
    _listed: dict[str, tuple[str, int]]
    """File and name in it, for messages, and kept groups of every compressed module, by its name in the model."""

    def _process_model_before_weight_loading(
        self,
        model: PreTrainedModel,
        checkpoint_files: list[str] | None = None,
        **kwargs: Any,  # noqa: ANN401 - transformers' signature
    ) -> PreTrainedModel:
        """Check names and replace modules; transformers itself only warns about what is missing.

        Raises:
            FormatError: a file is truncated, tensors are missing or not listed, or a listed module is not there.
        """
        config = self.quantization_config.config
        check_environment()
        if not checkpoint_files or not str(checkpoint_files[0]).endswith(".safetensors"):
            raise FormatError("a GQSA checkpoint is made of safetensors files, and none were found")
        files = CheckpointReader(Path(checkpoint_files[0]).parent, config).files
        if {Path(file) for file in checkpoint_files} != set(files.file_of.values()):
            raise FormatError(f"{files.folder}: holds two sets of weights, and transformers reads the wrong one")
        kind = model.config.model_type
        listed = {name_in_model(name, kind): name for name in config.modules}
        self._listed = {
            name: (f"{files.file_of[f'{on_disk}.qweight']}: {on_disk}", config.modules[on_disk].nnz)
            for name, on_disk in listed.items()
        }
        unfuse_experts(model, kind, lambda experts: any(name.startswith(f"{experts}.") for name in listed))
        for name, on_disk in listed.items():
            _replace(model, name, config.modules[on_disk].nnz, config.group_size_of(on_disk))
        # Experts that stay fused have other names in files; transformers itself says where one of them is missing.
        present = {name_in_model(name, kind) for name in files.file_of} | set(fused_experts(model))
        for name in missing_dense(config, model, present):
            raise FormatError(f"{files.folder}: {name} is missing, and config.json does not list it as compressed")
        return model

    def _process_model_after_weight_loading(
        self,
        model: PreTrainedModel,
        **kwargs: Any,  # noqa: ANN401 - transformers' signature
    ) -> PreTrainedModel:
        """Validate every matrix.

        Raises:
            FormatError: a matrix breaks the format or has another nnz than config.json says.
        """
        for name, module in model.named_modules():
            if not isinstance(module, _GqsaModule) or module.qweight.is_meta:
                continue
            matrix, (where, nnz) = module.matrix, self._listed[name]
            matrix.validate(where, module.shape)
            # Loading puts whatever shape the file holds in the place of the buffer.
            if matrix.nnz != nnz:
                raise FormatError(f"{where}: holds nnz = {matrix.nnz} groups, config.json says {nnz}")
        return model

    def is_serializable(self, *_: object, **__: object) -> bool:
        """Yes: ``save_pretrained`` writes the buffers as they are."""
        return True

    @property
    def is_trainable(self) -> bool:
        """No: codes and scales have no gradient."""
        return False


def _replace(model: PreTrainedModel, name: str, nnz: int, size: int) -> None:
    try:
        old = model.get_submodule(name)
    except AttributeError:
        raise FormatError(f"config.json lists {name}, which {type(model).__name__} does not have") from None
    if isinstance(old, torch.nn.Embedding):
        check_group_size(size, old.embedding_dim, name)
        table = GqsaEmbedding(old.num_embeddings, old.embedding_dim, nnz, size, old.weight.dtype)
        model.set_submodule(name, table)
        _tie(model, f"{name}.weight", table)
    elif isinstance(old, torch.nn.Linear):
        if f"{name}.weight" in model.all_tied_weights_keys:
            raise FormatError(
                f"config.json lists {name}, and ties it to {model.all_tied_weights_keys[name + '.weight']}; "
                "set tie_word_embeddings to false in it"
            )
        check_group_size(size, old.in_features, name)
        model.set_submodule(name, GqsaLinear(old.in_features, old.out_features, nnz, size, old.bias))
    else:
        raise FormatError(f"config.json lists {name}, which is a {type(old).__name__}, no linear and no embedding")


def _tie(model: PreTrainedModel, source: str, table: GqsaEmbedding) -> None:
    """Put a head that uses ``table`` in the place of what transformers would tie to its dense weight."""
    heads = [target for target, each in model.all_tied_weights_keys.items() if each == source]
    for target in heads:
        model.set_submodule(target.removesuffix(".weight"), GqsaTiedHead(table))
        del model.all_tied_weights_keys[target]
    # transformers works the mapping out anew, from the attribute of its class, whenever tie_weights() is called.
    model._tied_weights_keys = {t: s for t, s in (model._tied_weights_keys or {}).items() if t not in heads}


def _register() -> None:
    # transformers raises on a second registration; a reload of this module is none of its business.
    if "gqsa" not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config("gqsa")(GqsaHfConfig)
    if "gqsa" not in AUTO_QUANTIZER_MAPPING:
        register_quantizer("gqsa")(GqsaQuantizer)


_register()
