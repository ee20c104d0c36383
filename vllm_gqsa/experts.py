"""Mixtures of experts in transformers, whose files and models differ in the names and shapes of the experts.

Files hold every linear of every expert by itself, ``experts.3.up_proj.weight``. transformers 5 fuses those of a layer
into two 3-D parameters as it reads them. Here they are taken apart again, so that an expert's linears are linears with
the names that they have in files.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

__all__ = [
    "MIXTURES",
    "Experts",
    "Mixture",
    "empty_model",
    "fused_experts",
    "is_text_model",
    "name_in_model",
    "unfuse_experts",
    "weight_in_model",
]


@dataclass(frozen=True)
class Mixture:
    """What the files of a family call things."""

    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    block: str = "mlp"
    """The module that transformers calls ``mlp``, with the router and the experts in it."""


MIXTURES: Mapping[str, Mixture] = {
    "mixtral": Mixture("w1", "w3", "w2", "block_sparse_moe"),
    "qwen2_moe": Mixture(),
    "qwen3_moe": Mixture(),
}
"""Mixtures of experts by the ``model_type`` of config.json."""


class Experts(nn.Module):
    """The routed experts of one layer, each with three linears of its own."""

    def __init__(self, fused: nn.Module, names: Mixture) -> None:
        """Make linears of the shapes, dtype and device of what transformers fused; their values are not copied.

        Args:
            fused: with ``gate_up_proj`` ``[E, 2I, K]``, ``down_proj`` ``[E, K, I]`` and ``act_fn``.
            names: what the linears are called.
        """
        super().__init__()
        self._names = names
        self.act_fn = fused.get_submodule("act_fn")
        weight = fused.get_parameter("down_proj")
        count, hidden, width = weight.shape

        def linear(inputs: int, outputs: int) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias=False, device=weight.device, dtype=weight.dtype)

        for number in range(count):
            gate, up, down = linear(hidden, width), linear(hidden, width), linear(width, hidden)
            self.add_module(str(number), nn.ModuleDict({names.gate: gate, names.up: up, names.down: down}))

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """As the module of transformers that it replaces.

        Args:
            hidden_states: ``[M, K]``.
            top_k_index: ``[M, k]``, the experts of each token.
            top_k_weights: ``[M, k]``.

        Returns:
            ``[M, K]``.
        """
        names, out = self._names, torch.zeros_like(hidden_states)
        for number in top_k_index.unique().tolist():
            gate, up, down = (self.get_submodule(f"{number}.{each}") for each in (names.gate, names.up, names.down))
            token, place = torch.where(top_k_index == number)
            x = hidden_states[token]
            x = down(self.act_fn(gate(x)) * up(x)) * top_k_weights[token, place, None]
            out.index_add_(0, token, x.to(out.dtype))
        return out


def is_text_model(config: Any) -> bool:  # noqa: ANN401 - transformers chooses the class
    """Whether a model is a causal language model of text alone, whose tensors transformers calls as files do.

    Those of vision-language models have other names in files, also where transformers counts them as causal.

    Args:
        config: config.json as transformers understands it; None is of no model.
    """
    from transformers import AutoModelForCausalLM  # noqa: PLC0415 - slow, and only for local folders

    return type(config) in AutoModelForCausalLM._model_mapping and config.get_text_config() is config


def empty_model(auto: Any, config: Any, **options: Any) -> Any:  # noqa: ANN401 - transformers chooses the class
    """A model of transformers without memory for weights, its tensors under the names that they have in files.

    Args:
        auto: one of transformers' AutoModel classes.
        config: config.json as transformers understands it.
        options: for ``auto.from_config``.

    Raises:
        ImportError: it needs a package that is missing.
        ValueError: it cannot be built; like the other, it says why in one line.
    """
    try:
        with torch.device("meta"):
            model = auto.from_config(config, **options)
    except Exception as error:  # nonsense in config.json gets as far as it gets, and fails as it will
        kind = ImportError if isinstance(error, ImportError) else ValueError
        raise kind(" ".join(str(error).split()) or type(error).__name__) from error
    unfuse_experts(model, config.model_type)
    _name_as_in_files(model, config.model_type)
    return model


def fused_experts(model: nn.Module) -> list[str]:
    """Names of the 3-D parameters in which a model of transformers holds experts."""
    return [f"{name}.{part}" for name, module in _fused(model) for part, _ in module.named_parameters(recurse=False)]


def _fused(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [
        (name, each)
        for name, each in model.named_modules()
        if getattr(each._parameters.get("gate_up_proj"), "ndim", 0) == 3
    ]


def unfuse_experts(model: nn.Module, model_type: str, wanted: Callable[[str], bool] = lambda _: True) -> None:
    """Replace fused experts in a model whose weights are not read yet; other kinds of models stay as they are.

    Args:
        model: of transformers.
        model_type: of config.json.
        wanted: gets the name of a layer's experts in the model and says whether to replace them.
    """
    if model_type not in MIXTURES:
        return
    for name, module in _fused(model):
        if wanted(name):
            model.set_submodule(name, Experts(module, MIXTURES[model_type]))


def _name_as_in_files(model: nn.Module, model_type: str) -> None:
    """Call the modules of a model of transformers what they are called in files; the model runs as before."""
    block = MIXTURES[model_type].block if model_type in MIXTURES else "mlp"
    if block == "mlp":
        return
    for layer in list(model.modules()):
        if "mlp" in layer._modules:
            setattr(layer, block, layer._modules.pop("mlp"))
            # The code of the layer still says self.mlp; in __dict__ it is an attribute and no second submodule.
            layer.__dict__["mlp"] = getattr(layer, block)


def name_in_model(name: str, model_type: str) -> str:
    """What transformers calls a module or tensor of a file."""
    return name.replace(f".{MIXTURES[model_type].block}.", ".mlp.") if model_type in MIXTURES else name


def weight_in_model(model: nn.Module, name: str, model_type: str) -> torch.Tensor:
    """The weight ``[out_features, in_features]`` of a linear of a model of transformers, of fused experts a view.

    Args:
        model: as transformers makes it.
        name: of the linear in files.
        model_type: of config.json.
    """
    parent, _, linear = name_in_model(name, model_type).rpartition(".")
    experts, _, number = parent.rpartition(".")
    if model_type not in MIXTURES or not number.isdecimal():
        return model.get_submodule(name).get_parameter("weight")
    names, fused = MIXTURES[model_type], model.get_submodule(experts)
    if linear == names.down:
        return fused.get_parameter("down_proj")[int(number)]
    gate, up = fused.get_parameter("gate_up_proj")[int(number)].chunk(2)
    return up if linear == names.up else gate
