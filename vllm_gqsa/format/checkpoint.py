"""Reading a checkpoint folder: which tensor lies in which file, and one matrix at a time, checked."""

import json
import math
import re
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from vllm_gqsa.format.errors import FormatError
from vllm_gqsa.format.matrix import TENSORS, GroupSparseMatrix
from vllm_gqsa.format.schema import GqsaConfig, is_ignored

__all__ = [
    "CheckpointReader",
    "TensorFiles",
    "check_dense",
    "check_layer_count",
    "check_tensor_names",
    "missing_dense",
    "read_config",
    "read_json",
]

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def check_file(path: Path) -> None:
    """Check that a path leads to an ordinary file: a pipe or a device may never end.

    Raises:
        OSError: nothing is there.
        FormatError: something else is there.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise FormatError(f"{path}: is not an ordinary file")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        FormatError: the file is missing, is not JSON, or is not an object.
    """
    try:
        check_file(path)
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FormatError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise FormatError(f"{path}: holds {type(value).__name__}, expected an object")
    return value


class TensorFiles:
    """The safetensors files of a model folder, dense or compressed: names without data, tensors on demand."""

    def __init__(self, folder: Path | str) -> None:
        """Read the headers of all files.

        Raises:
            FormatError: no weights, an unreadable or truncated file, or an index that disagrees with the files.
        """
        self.folder = Path(folder)
        files = self._files()
        self.file_of: dict[str, Path] = {}
        """Tensor name to the file that holds it."""
        self._headers: dict[Path, Any] = {}
        self._data: dict[Path, Any] = {}
        for path in files:
            for name in self._header(path).keys():  # noqa: SIM118 - not a mapping
                if name in self.file_of:
                    raise FormatError(f"{path}: {name} is also in {self.file_of[name].name}")
                self.file_of[name] = path
        if (self.folder / INDEX).exists():
            self._check_index()

    def _files(self) -> list[Path]:
        index = self.folder / INDEX
        if not index.exists():
            if not (self.folder / SINGLE).exists():
                raise FormatError(f"{self.folder}: holds neither {INDEX} nor {SINGLE}")
            return [self.folder / SINGLE]
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise FormatError(f"{index}: weight_map is missing or empty")
        names = weight_map.values()
        for name in names:
            is_name = isinstance(name, str) and name.isprintable() and Path(name).name == name
            if not is_name or not name.endswith(".safetensors"):
                raise FormatError(f"{index}: {name!r} is not the name of a safetensors file in this folder")
        return [self.folder / name for name in sorted(set(names))]

    def _check_index(self) -> None:
        index = self.folder / INDEX
        weight_map: dict[str, str] = read_json(index)["weight_map"]
        for name, file in weight_map.items():
            if name not in self.file_of:
                raise FormatError(f"{index}: lists {name} in {file}, which does not hold it")
            if self.file_of[name].name != file:
                raise FormatError(f"{index}: lists {name} in {file}, but it is in {self.file_of[name].name}")
        for name, path in self.file_of.items():
            if name not in weight_map:
                raise FormatError(f"{path}: holds {name}, which {INDEX} does not list")

    def _header(self, path: Path) -> Any:  # noqa: ANN401 - safetensors has no types
        if path not in self._headers:
            try:
                check_file(path)
                # Not "pt": torch maps the file so that it can be changed, which Linux refuses beyond the memory's size.
                self._headers[path] = safe_open(path, framework="np")
            except FileNotFoundError:
                raise FormatError(f"{path}: no such file, though {INDEX} names it") from None
            except (SafetensorError, OSError) as error:
                raise FormatError(f"{path}: is not a complete safetensors file: {error}") from error
        return self._headers[path]

    def _open(self, path: Path) -> Any:  # noqa: ANN401
        if path not in self._data:
            try:
                self._data[path] = safe_open(path, framework="pt")
            except RuntimeError as error:
                raise FormatError(
                    f"{path}: cannot be mapped into memory ({error}); where it is larger than the memory, save the "
                    'model in smaller files, with save_pretrained(..., max_shard_size="5GB") on a larger machine'
                ) from error
        return self._data[path]

    def __contains__(self, name: str) -> bool:
        return name in self.file_of

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header alone."""
        return tuple(self._header(self.file_of[name]).get_slice(name).get_shape())

    def nbytes(self, name: str) -> int:
        """Bytes of a tensor, from the header alone."""
        dtype = self._header(self.file_of[name]).get_slice(name).get_dtype()  # BF16, U8, F8_E4M3, BOOL, ...
        bits = re.search(r"\d+", dtype)
        return math.prod(self.shape(name)) * (8 if bits is None else int(bits[0])) // 8

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU.

        Raises:
            FormatError: it is missing or cannot be read.
        """
        if name not in self.file_of:
            raise FormatError(f"{self.folder}: tensor {name} is missing")
        try:
            tensor: torch.Tensor = self._open(self.file_of[name]).get_tensor(name)
        except (SafetensorError, OSError, RuntimeError, KeyError) as error:
            raise FormatError(f"{self.file_of[name]}: {name} cannot be read: {error}") from error
        return tensor


def check_tensor_names(config: GqsaConfig, names: Iterable[str], where: str) -> None:
    """Check that every listed module has its four tensors, that no others have any, and that none is ignored too.

    Args:
        config: the checkpoint's configuration.
        names: all tensor names of the checkpoint.
        where: put in front of the message.

    Raises:
        FormatError: a tensor is missing or belongs to a module that is not listed, or a module is listed and ignored.
    """
    present = set(names)
    for module in config.modules:
        if is_ignored(module, config.ignore):
            raise FormatError(f"{where}/config.json: lists {module} in modules, and ignores it too")
        for suffix in TENSORS:
            if f"{module}.{suffix}" not in present:
                raise FormatError(f"{where}: {module}.{suffix} is missing, though config.json lists {module}")
        if f"{module}.weight" in present:
            raise FormatError(f"{where}: {module} has a dense weight beside its compressed tensors")
    for name in sorted(present):
        module, _, suffix = name.rpartition(".")
        if suffix in TENSORS and module not in config.modules:
            raise FormatError(f"{where}: {name} belongs to {module}, which config.json does not list in modules")


def missing_dense(config: GqsaConfig, model: torch.nn.Module, names: Iterable[str]) -> list[str]:
    """Tensors outside the compressed linears that a model needs and a checkpoint lacks.

    Args:
        config: the checkpoint's configuration.
        model: of transformers, with or without memory for its weights, its tensors named as in ``names``; what it ties
            to another is not needed.
        names: all tensor names of the checkpoint.
    """
    present = {*names, *(getattr(model, "all_tied_weights_keys", None) or ())}
    needed = (name for name in model.state_dict() if name.removesuffix(".weight") not in config.modules)
    return [name for name in needed if name not in present]


def check_layer_count(config: Any, tensors: int, folder: Path) -> None:  # noqa: ANN401 - a transformers configuration
    """Check that config.json asks for no more layers than there are tensors, before a model is built of it.

    Args:
        config: config.json as transformers understands it.
        tensors: how many the safetensors files hold.
        folder: of the model, put in front of the message.

    Raises:
        FormatError: it does; building them would take for ever.
    """
    layers = getattr(config, "num_hidden_layers", None)
    if isinstance(layers, int) and layers > tensors:
        raise FormatError(f"{folder}/config.json: num_hidden_layers is {layers}, but there are only {tensors} tensors")


def check_dense(config: GqsaConfig, model: torch.nn.Module, files: TensorFiles) -> None:
    """Check that the tensors outside the compressed linears are there, with the shapes that a model needs.

    Args:
        config: the checkpoint's configuration.
        model: of transformers, with or without memory for its weights.
        files: the checkpoint's files.

    Raises:
        FormatError: one is missing or has another shape.
    """
    for name in missing_dense(config, model, files.file_of):
        raise FormatError(f"{files.folder}: tensor {name}, which the model needs, is missing")
    for name, tensor in model.state_dict().items():
        if name in files and files.shape(name) != tuple(tensor.shape):  # else compressed, or tied to another
            raise FormatError(
                f"{files.file_of[name]}: {name} has shape {files.shape(name)}, the model needs {tuple(tensor.shape)}"
            )


class CheckpointReader:
    """A GQSA checkpoint folder, opened and checked as far as names and counts go; data is read on demand."""

    def __init__(self, folder: Path | str, config: GqsaConfig | None = None) -> None:
        """Open a folder.

        Args:
            folder: the checkpoint.
            config: use this instead of config.json (a checkpoint that is still being written has none).

        Raises:
            FormatError: config.json, the index or the names of the tensors break the format.
        """
        self.folder = Path(folder)
        self.config = config or read_config(self.folder)
        self.files = TensorFiles(self.folder)
        self._check_strangers()
        check_tensor_names(self.config, self.files.file_of, str(self.folder))

    def _check_strangers(self) -> None:
        """Refuse files that vLLM would load beside ours, or (consolidated*) instead of them."""
        ours = {path.name for path in self.files.file_of.values()} | {SINGLE}
        indexed = (self.folder / INDEX).exists()
        for path in sorted(self.folder.glob("*.safetensors")):
            stranger = path.name not in ours and not path.name.startswith(".")
            if stranger and (not indexed or path.name.startswith("consolidated")):
                raise FormatError(f"{path}: is no part of the checkpoint, and vLLM would load it; remove it")

    def matrix(self, module: str, expect: tuple[int, int]) -> GroupSparseMatrix:
        """Read and validate one compressed linear.

        Args:
            module: its unfused Hugging Face name.
            expect: shape ``(out_features, in_features)`` the model asks for.

        Raises:
            FormatError: anything :meth:`GroupSparseMatrix.validate` rejects, or another nnz than config.json says.
        """
        if module not in self.config.modules:
            raise FormatError(f"{self.folder}: module {module} is not listed in config.json")
        where = f"{self.files.file_of[module + '.qweight']}: {module}"
        tensors = {suffix: self.files.tensor(f"{module}.{suffix}") for suffix in TENSORS}
        matrix = GroupSparseMatrix.from_tensors(tensors, expect[1], self.config.group_size_of(module))
        matrix.validate(where, expect)
        if matrix.nnz != self.config.modules[module].nnz:
            listed = self.config.modules[module].nnz
            raise FormatError(f"{where}: holds nnz = {matrix.nnz} groups, config.json says {listed}")
        return matrix


def read_config(folder: Path) -> GqsaConfig:
    """The GQSA configuration of a checkpoint folder.

    Raises:
        FormatError: no config.json, no quantization_config in it, or one that breaks the format.
    """
    path = folder / "config.json"
    raw = read_json(path)
    if "quantization_config" not in raw:
        raise FormatError(f"{path}: has no quantization_config; this is not a GQSA checkpoint")
    return GqsaConfig.parse(raw["quantization_config"], str(path))
