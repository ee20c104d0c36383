"""One matrix of a layer on one rank, from empty placeholders to the tensors of its kernel."""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.platforms import current_platform

from vllm_gqsa import kernels
from vllm_gqsa.format import TENSORS, FormatError, GroupSparseMatrix
from vllm_gqsa.kernels.choice import Choice, choose
from vllm_gqsa.plugin.loading import Placeholder, Staging, load_piece
from vllm_gqsa.plugin.report import LoadReport
from vllm_gqsa.plugin.shards import ShardPlan

__all__ = ["LayerMatrix", "process"]

_DUMMY_SEED = 0
_PICKLED = ("npcache", "pt")
_PICKLED_IF_NEED_BE = ("auto", "hf")
_COMPILED = "gqsa"
"""Key in vLLM's additional_config."""


class LayerMatrix:
    """Owns the four parameters of one matrix; it holds no reference to the layer, which vLLM copies and reloads."""

    def __init__(
        self,
        layer: torch.nn.Module,
        plan: ShardPlan,
        sparsity: float,
        report: LoadReport,
        prefix: str = "",
        loader: Callable[..., object] = load_piece,
        choice: Callable[[str, torch.dtype, int], Choice] = choose,
    ) -> None:
        """Register empty placeholders; the sizes are in the checkpoint.

        Args:
            layer: gets the parameters.
            plan: what this rank keeps of which matrices on disk.
            sparsity: of the matrix that ``--load-format dummy`` makes.
            report: is told what was loaded.
            prefix: in front of the names of the four parameters, where a layer has several matrices.
            loader: what vLLM calls with each tensor of the checkpoint.
            choice: which kernel will compute with it, by type of device, dtype and group size.

        Raises:
            NotImplementedError: vLLM was told to offload weights of a GPU.
            ValueError: vLLM was told to read pickles.
        """
        vllm_config = get_current_vllm_config()
        _check_offload(vllm_config)
        load_config = vllm_config.load_config
        load_format = load_config.load_format
        if load_format in _PICKLED:
            raise ValueError(f"--load-format {load_format} reads pickles; a GQSA checkpoint is made of safetensors")
        if load_format in _PICKLED_IF_NEED_BE:  # now, in a folder of the hub or in a later reload
            load_config.load_format = "safetensors"
        self.plan = plan
        self.staging = Staging(plan)
        self._sparsity = sparsity
        self._report = report
        self._dtype = torch.get_default_dtype()  # the model's, while vLLM builds it
        report.expect(plan.sources.names)
        self._choice = choice
        self._additional = vllm_config.additional_config
        self._prefix = prefix
        self._dummy = load_format == "dummy"
        self._layout = ""
        self._shapes: dict[str, torch.Size] = {}
        for piece in TENSORS:
            layer.register_parameter(prefix + piece, Placeholder(piece, self.staging, loader))

    def arguments(self, layer: torch.nn.Module) -> tuple[list[torch.Tensor], str]:
        """What the ops want of the matrix: its tensors and the name of their layout."""
        return [getattr(layer, self._prefix + name) for name in self._shapes], self._layout

    def begin_loading(self) -> None:
        """Forget what a reload that failed has left; the first load has nothing to forget."""
        if self.staging.loaded:
            self.staging.clear()

    def take(self, layer: torch.nn.Module) -> kernels.Matrix | None:
        """The loaded matrix as its kernel wants it; None without anything new.

        Raises:
            FormatError: see :func:`process`.
        """
        if self.staging.empty and not self._waits(layer):
            return None
        try:
            matrix = self._staged()
        finally:
            self.staging.clear()  # now, so that there are never more than two copies
        prepared = kernels.prepare(matrix, self._device(layer))
        self._check_shapes(prepared)
        self._report.take(self.plan, matrix)
        return prepared

    def install(self, layer: torch.nn.Module, prepared: kernels.Matrix) -> None:
        """Put the tensors of what :meth:`take` gave in place of what was there."""
        for name in {*TENSORS, *self._shapes}:
            layer._parameters.pop(self._prefix + name, None)
        for name, tensor in prepared.tensors().items():
            parameter = torch.nn.Parameter(tensor.contiguous(), requires_grad=False)
            layer.register_parameter(self._prefix + name, parameter)
        self._layout = kernels.layout_of(prepared)
        self._shapes = {name: tensor.shape for name, tensor in prepared.tensors().items()}
        if not self.staging.loaded:
            self._tell_compiler()
        self.staging.loaded = True
        self._report.done(self.plan, self._choice(self._device(layer).type, self._dtype, self.plan.group_size))

    def _tell_compiler(self) -> None:
        """Make layout and shapes part of what vLLM knows compiled code by, when it keeps it for the next start.

        They follow from the mask and from the kernels that are installed, neither of which its own settings tell.
        """
        if isinstance(self._additional, dict):
            text = f"{self._additional.get(_COMPILED, '')} {self._layout} {list(self._shapes.items())}"
            self._additional[_COMPILED] = hashlib.sha256(text.encode()).hexdigest()

    def to_dense(self, layer: torch.nn.Module, dtype: torch.dtype) -> torch.Tensor:
        """The dense weight ``[N, K]`` of this rank, also between loading and processing.

        Raises:
            FormatError: the checkpoint lacks tensors of this matrix.
        """
        if not self.staging.empty or self._waits(layer):
            matrix = self._staged().to(self._device(layer))
        else:
            tensors, layout = self.arguments(layer)
            plain = [tensor.data for tensor in tensors]
            matrix = kernels.restore(kernels.rebuild(plain, layout, self.plan.columns, self.plan.group_size))
        return matrix.to_dense(dtype)

    def _device(self, layer: torch.nn.Module) -> torch.device:
        return layer.get_parameter(self._prefix + "qweight").device

    def _waits(self, layer: torch.nn.Module) -> bool:
        return isinstance(layer.get_parameter(self._prefix + "qweight"), Placeholder)

    def _staged(self) -> GroupSparseMatrix:
        if not (self._dummy and self.staging.empty):
            return self.staging.finish()
        plan, generator = self.plan, torch.Generator().manual_seed(_DUMMY_SEED)
        return GroupSparseMatrix.synthesize(plan.rows, plan.columns, plan.group_size, self._sparsity, generator)

    def _check_shapes(self, prepared: kernels.Matrix) -> None:
        # Reload copies into the tensors that run now, which captured graphs and compiled code hold. With the same
        # number of groups in all, the CUDA layout may still be longer: rows differ in their lengths.
        shapes = {name: tensor.shape for name, tensor in prepared.tensors().items()}
        if self._shapes not in ({}, shapes):
            raise FormatError(
                f"{self.plan.sources.layer}: the reloaded weights keep other numbers of groups on this rank than the "
                "running ones; only a checkpoint with the same numbers can be loaded into a running engine"
            )

    def wait_again(self, layer: torch.nn.Module) -> None:
        """After a reload that failed: placeholders as vLLM makes them for a reload, on the meta device.

        vLLM does not begin anew with a layer that was left half reloaded, and feeds it what the failed reload brought
        once more, to the placeholders that are not on the meta device: see :func:`load_piece`.
        """
        for piece in TENSORS:
            placeholder = getattr(layer, self._prefix + piece, None)
            if self.staging.loaded and isinstance(placeholder, Placeholder):
                layer.register_parameter(self._prefix + piece, placeholder.on_meta())


def _check_offload(vllm_config: Any) -> None:  # noqa: ANN401 - vLLM's VllmConfig
    """Check that no weights are to be moved off a GPU.

    Raises:
        NotImplementedError: they are.
    """
    offload = getattr(vllm_config, "offload_config", None)
    if current_platform.is_cpu() or offload is None:
        return
    if offload.uva.cpu_offload_gb or offload.prefetch.offload_group_size:
        raise NotImplementedError(
            "--cpu-offload-gb and --offload-group-size do not work with quantization gqsa: vLLM chooses what to "
            "offload before compressed weights have a size; leave them out, and spread the model over several GPUs "
            "instead"
        )


def process(layer: torch.nn.Module, matrices: Sequence[LayerMatrix]) -> None:
    """Put the loaded matrices of a layer in place of their placeholders, all or none; without anything new do nothing.

    Raises:
        FormatError: the checkpoint lacks tensors, which vLLM does not notice by itself, or a reload brings a matrix of
            another size.
    """
    try:
        taken = [matrix.take(layer) for matrix in matrices]
    except FormatError:
        for matrix in matrices:
            matrix.wait_again(layer)
        raise
    for matrix, prepared in zip(matrices, taken, strict=True):
        if prepared is not None:
            matrix.install(layer, prepared)
