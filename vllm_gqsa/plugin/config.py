"""The quantization config ``gqsa``: which layer of a vLLM model is compressed, and what is wrong where none fits."""

import inspect
import os
import weakref
from pathlib import Path
from typing import Any

import torch
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

from vllm_gqsa.format import (
    EMBEDDING,
    FUSED,
    HEAD,
    CheckpointReader,
    FormatError,
    GqsaConfig,
    few,
    is_ignored,
)
from vllm_gqsa.plugin.dense import check_model
from vllm_gqsa.plugin.report import LoadReport
from vllm_gqsa.plugin.shards import Sources

__all__ = ["GqsaQuantizationConfig"]

_WEIGHTS = ("model.safetensors.index.json", "model.safetensors")


class GqsaQuantizationConfig(QuantizationConfig):
    """vLLM's view of ``quantization_config``."""

    def __init__(self, config: GqsaConfig | None = None) -> None:
        """Wrap a configuration.

        Args:
            config: None when vLLM was told ``--quantization gqsa`` but the model has no quantization_config; the
                model's name is not known yet, so :meth:`maybe_update_config` says it.
        """
        super().__init__()
        self.config = config
        self._asked: set[str] = set()
        """Compressed vocabularies that the model under construction asked a method for."""
        self._methods: list[Any] = []
        """The methods that were handed out."""
        self._weights: weakref.ref[Any] | None = None
        """The stream of weights that was loaded last."""
        self._report = LoadReport()

    def __repr__(self) -> str:
        if self.config is None:
            return "GqsaQuantizationConfig(no quantization_config)"
        c = self.config
        return f"GqsaQuantizationConfig(G={c.group_size}, sparsity={c.sparsity}, modules={len(c.modules)})"

    # -- what vLLM asks of a method ------------------------------------------------------------------------

    def get_name(self) -> str:
        """``gqsa``."""
        return "gqsa"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Dtypes a model can run in."""
        return [torch.float32, torch.float16, torch.bfloat16]

    @classmethod
    def get_min_capability(cls) -> int:
        """Smallest CUDA compute capability, times ten."""
        return 70

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: everything is in config.json. vLLM then calls ``cls()`` for a model without quantization_config."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "GqsaQuantizationConfig":
        """Read the ``quantization_config`` of config.json.

        Raises:
            FormatError: one sentence with the key at fault.
            ValueError: an environment variable has a value that no kernel knows.
        """
        # Here and not when the first layer is built: a broken installation shows before a worker starts.
        import vllm_gqsa.plugin.linear  # noqa: F401, PLC0415
        from vllm_gqsa.kernels.choice import check_environment  # noqa: PLC0415

        check_environment()
        return cls(GqsaConfig.parse(config, "config.json"))

    def maybe_update_config(
        self,
        model_name: str,
        hf_config: Any = None,  # noqa: ANN401 - transformers chooses the class
        *_: object,
        **__: object,
    ) -> None:
        """Check the checkpoint as far as that needs no data; vLLM calls this once, before it starts workers.

        Args:
            model_name: folder or hub name. Only a folder can be looked at here; what comes from elsewhere is
                checked as it is loaded.
            hf_config: config.json as vLLM understood it.

        Raises:
            ValueError: the model is not a GQSA checkpoint.
            FormatError: a file is truncated or missing, tensors and config.json disagree, or the weights are pickled.
        """
        if self.config is None:
            raise ValueError(
                f"{model_name} is not a GQSA checkpoint (its config.json has no quantization_config): compress it "
                "with `gqsa compress`, or leave out --quantization gqsa to serve it as it is"
            )
        folder = Path(model_name)
        # --load-format dummy needs no weights at all.
        if any(os.path.lexists(folder / name) for name in _WEIGHTS):
            check_model(CheckpointReader(folder, self.config), hf_config)
            return
        pickled = [path for pattern in ("*.bin", "*.pt") for path in sorted(folder.glob(pattern))]
        if pickled:
            raise FormatError(f"{pickled[0]}: pickled weights are never read; a GQSA checkpoint is made of safetensors")

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:  # noqa: ANN401 - vLLM's WeightsMapper
        """Rename modules as this model class does.

        Regular expressions in ``ignore`` are left alone: they are matched with the names inside vLLM. Where one
        no longer matches, the layer is reported, never silently treated as something else.
        """
        if self.config is None:
            return
        exact = [name for name in self.config.ignore if not name.startswith("re:")]
        patterns = [name for name in self.config.ignore if name.startswith("re:")]
        # As names of weights, which is what mappers are for: "lm_head." would not match a module's name.
        ignore = hf_to_vllm_mapper.apply_list([f"{name}.weight" for name in exact])
        modules = hf_to_vllm_mapper.apply_dict({f"{name}.weight": e for name, e in self.config.modules.items()})
        self.config = self.config.model_copy(
            update={
                "ignore": (*(name.removesuffix(".weight") for name in ignore), *patterns),
                "modules": {name.removesuffix(".weight"): entry for name, entry in modules.items()},
            }
        )

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The method for one layer; None leaves it as it is.

        Raises:
            ValueError: the layer is half compressed, or neither compressed nor ignored.
            NotImplementedError: a compressed layer of a kind that is not known.
        """
        method = self._method(layer, prefix)
        if hasattr(method, "begin_loading"):
            self._methods.append(method)
        return method

    def _method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod  # noqa: PLC0415
        from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding  # noqa: PLC0415

        from vllm_gqsa.plugin.linear import GqsaLinearMethod  # noqa: PLC0415

        if self.config is None:
            raise ValueError("this model has no GQSA quantization_config; leave out --quantization gqsa")
        if _is_routed_experts(layer):
            return self._experts_method(layer, prefix, self.config)
        if isinstance(layer, VocabParallelEmbedding):
            return self._vocabulary_method(layer, prefix, self.config)
        if not isinstance(layer, LinearBase):
            if prefix and prefix in self.config.modules:
                raise NotImplementedError(
                    f"{prefix}: is compressed, but vllm-gqsa serves compressed linear layers, embeddings and output "
                    f"heads only, not {type(layer).__name__}; compress again with it in the ignore list"
                )
            return None
        names = self._unfused(prefix)
        if self._is_compressed(prefix, names, self.config):
            return GqsaLinearMethod(self.config, Sources.of(prefix, names, self.config), self._report)
        return UnquantizedLinearMethod()

    def get_cache_scale_mapper(self) -> Any:  # noqa: ANN401 - vLLM's WeightsMapper
        """Of no use here, but vLLM calls it whenever it begins to read weights, first or again.

        Raises:
            NotImplementedError: the vocabulary is compressed and the model class did not ask for a method for it.
        """
        from vllm.distributed import get_pp_group  # noqa: PLC0415

        weights = _weights_in_hand()
        if weights is None or self._weights is None or self._weights() is not weights:
            for method in self._methods:
                method.begin_loading()
        self._weights = None if weights is None else weakref.ref(weights)
        head = None if self.config is None else self.config.head
        # Some ranks of a pipeline build neither the embedding nor the head, and load nothing for them.
        if head is not None and head not in self._asked and get_pp_group().world_size == 1:
            raise NotImplementedError(
                f"{head}: is compressed, but vLLM's class for this model passes no quant_config to it, so only a "
                "dense one can be served; compress again without --lm-head"
            )
        return super().get_cache_scale_mapper()

    def _vocabulary_method(self, layer: torch.nn.Module, prefix: str, config: GqsaConfig) -> QuantizeMethodBase | None:
        """The method of an embedding or an output head; None where it is dense."""
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead  # noqa: PLC0415

        from vllm_gqsa.plugin.linear import GqsaVocabularyMethod  # noqa: PLC0415

        embeddings = [name for name in config.modules if name.rpartition(".")[2] == EMBEDDING]
        # A head that is neither listed nor ignored is tied to the embedding; and Llama names no embedding.
        borrowed = embeddings[:1] if isinstance(layer, ParallelLMHead) or not prefix else []
        name = next((n for n in (prefix, *borrowed) if n in config.modules), None)
        if name is None:
            return None
        for each in {name, prefix}:
            if is_ignored(each, config.ignore):
                raise ValueError(f"{each}: config.json ignores it, and lists {name}, its own matrix, as compressed")
        _check_lora(name, {EMBEDDING, HEAD}, "compress again without --lm-head")
        self._asked.add(name)
        return GqsaVocabularyMethod(config, Sources.of(prefix or name, [name], config), self._report)

    def _experts_method(
        self,
        layer: Any,  # noqa: ANN401 - vLLM's RoutedExperts
        prefix: str,
        config: GqsaConfig,
    ) -> QuantizeMethodBase | None:
        """The method of the routed experts of one layer; None where they are dense."""
        from vllm_gqsa.plugin.moe import GqsaMoEMethod, expert_names  # noqa: PLC0415

        names = expert_names(prefix, layer.moe_config.num_experts, config)
        flat = [name for expert in names for name in expert.values()]
        if not self._is_compressed(prefix, flat, config):
            return None
        _check_lora(prefix, {prefix.rpartition(".")[2]}, "compress again with the experts on the ignore list")
        return GqsaMoEMethod(layer.moe_config, config, names, self._report)

    # -- names ---------------------------------------------------------------------------------------------

    def _unfused(self, prefix: str) -> list[str]:
        """Names on disk of what the engine joins into ``prefix``; only itself when it is joined on disk too."""
        parent, dot, last = prefix.rpartition(".")
        assert self.config is not None
        if prefix in self.config.modules:
            return [prefix]
        names = [parent + dot + name for name in self.packed_modules_mapping.get(last, FUSED.get(last, [last]))]
        # Some model classes of vLLM do not say what they fuse in the blocks of another kind than most.
        known = any(name in self.config.modules or is_ignored(name, self.config.ignore) for name in names)
        return names if known or last in self.packed_modules_mapping else [prefix]

    @staticmethod
    def _is_compressed(prefix: str, names: list[str], config: GqsaConfig) -> bool:
        listed = [name for name in names if name in config.modules]
        ignored = [name for name in names if is_ignored(name, config.ignore)]
        both = [name for name in listed if name in ignored]
        if both:
            raise ValueError(f"{both[0]}: config.json lists it as compressed and ignores it too")
        if listed and ignored:
            raise ValueError(
                f"{prefix}: {few(listed)} compressed but {few(ignored)} ignored; they are served as one "
                "fused layer, so compress or ignore all of them"
            )
        unknown = [name for name in names if name not in listed and name not in ignored]
        if unknown:
            raise ValueError(
                f"{prefix}: config.json neither lists {few(unknown)} in modules nor ignores it, so this "
                "linear layer would have no weights"
            )
        return bool(listed)


def _weights_in_hand() -> Any:  # noqa: ANN401 - whatever yields names and tensors
    """The stream of weights that a model of vLLM is loading now, by which one load is told from the next.

    A model whose head stands between other names of a file loads its inner model twice in one load, and vLLM asks for
    the mapper each time. The outermost ``load_weights`` in progress still has the same stream. None where there is no
    such, or it cannot be remembered without being kept alive.
    """
    found, frame = None, inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == "load_weights" and "weights" in frame.f_locals:
            found = frame.f_locals["weights"]
        frame = frame.f_back
    try:
        weakref.ref(found)
    except TypeError:
        return None
    return found


def _check_lora(name: str, modules: set[str], advice: str) -> None:
    """Check that no LoRA layer will be put round a compressed vocabulary, or experts: those of vLLM read dense weights.

    Raises:
        NotImplementedError: one will.
    """
    from vllm.config import get_current_vllm_config  # noqa: PLC0415

    lora = get_current_vllm_config().lora_config
    targets = None if lora is None else lora.target_modules
    if lora is not None and (targets is None or modules & set(targets)):
        raise NotImplementedError(
            f"{name}: is compressed, and vLLM's LoRA layers need its dense weight; name other modules with "
            f"--lora-target-modules, or {advice}"
        )


def _is_routed_experts(layer: torch.nn.Module) -> bool:
    from vllm.model_executor.layers import fused_moe  # noqa: PLC0415

    # RoutedExperts from 0.32 on, FusedMoE before, where the latter is a class.
    kinds = (getattr(fused_moe, name, None) for name in ("RoutedExperts", "FusedMoE"))
    return isinstance(layer, tuple(kind for kind in kinds if isinstance(kind, type)))
