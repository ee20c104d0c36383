"""A dense model on disk: its configuration, its tokenizer and its tensors, one at a time."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer

from vllm_gqsa.format import FormatError, TensorFiles, check_layer_count, read_json
from vllm_gqsa.offline.errors import InputError

__all__ = ["DenseModel", "load_config", "load_tokenizer", "model_folder"]


def model_folder(name: str, *, weights: bool = True) -> Path:
    """The folder of a model: a local one as it is, a hub name downloaded (safetensors and tokenizer only).

    Args:
        name: folder or hub name.
        weights: download the safetensors files too.

    Raises:
        InputError: neither a folder with a config.json nor a hub model that can be downloaded.
    """
    folder = Path(name)
    if folder.is_dir():
        if not (folder / "config.json").exists():
            raise InputError(f"{folder}: has no config.json; give the folder of a Hugging Face model")
        return folder
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - only for hub names
    from huggingface_hub.errors import HFValidationError  # noqa: PLC0415

    patterns = ["*.json", "*.model", "*.txt", "*.jinja"] + ["*.safetensors"] * weights
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (OSError, ValueError, HFValidationError) as error:
        raise InputError(f"{name}: is neither a folder nor a hub model that can be downloaded: {error}") from error


class HubHeaders:
    """The headers of a hub model's safetensors files, as far as :class:`DenseModel` asks for them."""

    def __init__(self, name: str) -> None:
        """Fetch them: some kilobytes a file.

        Raises:
            InputError: the hub does not answer, or has no safetensors of that name.
        """
        import huggingface_hub  # noqa: PLC0415 - only for hub names

        try:
            found = huggingface_hub.get_safetensors_metadata(name)
        except Exception as error:  # of several libraries: network, HTTP, the hub's own
            raise InputError(f"{name}: its safetensors headers cannot be read from the hub: {error}") from error
        self.folder = Path(name)
        self.file_of = {tensor: self.folder / file for tensor, file in found.weight_map.items()}
        self._bytes = {
            tensor: info.data_offsets[1] - info.data_offsets[0]
            for file in found.files_metadata.values()
            for tensor, info in file.tensors.items()
        }

    def __contains__(self, name: str) -> bool:
        return name in self.file_of

    def nbytes(self, name: str) -> int:
        """Bytes of a tensor."""
        return self._bytes[name]

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(self._bytes.values())

    def tensor(self, name: str) -> torch.Tensor:
        """Not possible.

        Raises:
            InputError: always.
        """
        raise InputError(f"{self.folder}: {name} would have to be downloaded; download the model and give its folder")


class DenseModel:
    """A dense model folder.

    Attributes:
        folder: where it lies.
        raw_config: config.json as it stands.
        config: the same as transformers understands it.
    """

    def __init__(self, name: str, *, weights: bool = True) -> None:
        """Open the model; no weights are read yet.

        Args:
            name: folder or hub name.
            weights: of a hub model, download the weights too; else names and sizes alone are asked for.

        Raises:
            InputError: not a model folder, no safetensors, or quantised already.
            FormatError: config.json or a header is not what it should be.
        """
        self.folder = model_folder(name, weights=weights)
        self.raw_config = read_json(self.folder / "config.json")
        self.config: Any = load_config(self.folder)
        self._files: TensorFiles | HubHeaders
        try:
            self._files = TensorFiles(self.folder) if weights or Path(name).is_dir() else HubHeaders(name)
        except FormatError as error:
            if any(self.folder.glob("*.bin")):
                raise InputError(
                    f"{self.folder}: holds pickled weights (.bin), which are never read; load it once with "
                    "transformers and save_pretrained() it as safetensors"
                ) from error
            raise InputError(str(error)) from error
        check_layer_count(self.config, len(self._files.file_of), self.folder)
        if "quantization_config" in self.raw_config:
            config = self.raw_config["quantization_config"]
            method = config.get("quant_method") if isinstance(config, dict) else config
            raise InputError(f"{self.folder}: is quantised already ({method}); give the dense model")

    def tokenizer(self) -> Any:  # noqa: ANN401 - transformers chooses the class
        """The tokenizer.

        Raises:
            InputError: there is none in the folder.
        """
        return load_tokenizer(self.folder)

    def _stored_name(self, name: str) -> str:
        """Name in the files; some checkpoints leave out the ``model.`` that the causal LM puts in front."""
        short = name.removeprefix("model.")
        return short if name not in self._files and short in self._files else name

    def __contains__(self, name: str) -> bool:
        return self._stored_name(name) in self._files

    def tensor_bytes(self, name: str) -> int:
        """Bytes of a tensor, without reading it."""
        return self._files.nbytes(self._stored_name(name))

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor as stored.

        Raises:
            FormatError: it is missing or unreadable.
        """
        return self._files.tensor(self._stored_name(name))

    def files(self) -> list[Path]:
        """The safetensors files, sorted."""
        return sorted(set(self._files.file_of.values()))

    @property
    def nbytes(self) -> int:
        """Size of the safetensors files."""
        if isinstance(self._files, HubHeaders):
            return self._files.total_bytes
        return sum(path.stat().st_size for path in self.files())


def load_config(folder: Path) -> Any:  # noqa: ANN401 - transformers chooses the class
    """The transformers configuration of a model folder; code that a folder brings along is never run.

    Raises:
        FormatError: transformers cannot read it.
    """
    read_json(folder / "config.json")
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # nonsense in config.json gets as far as it gets, and fails as it will
        reason = " ".join(str(error).split())
        raise FormatError(f"{folder}/config.json: transformers cannot read it: {reason}") from error


def load_tokenizer(folder: Path) -> Any:  # noqa: ANN401
    """The tokenizer of a model folder.

    Raises:
        InputError: there is none that transformers can load.
    """
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the files of a tokenizer are read by several libraries
        reason = " ".join(str(error).split())
        raise InputError(f"{folder}: has no tokenizer that transformers can load: {reason}") from error
