"""A dense model on disk: its configuration, its tokenizer and its tensors, one at a time."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer

from vllm_gqsa.format import FormatError, TensorFiles, check_layers, read_json
from vllm_gqsa.offline.errors import InputError

__all__ = ["DenseModel", "load_config", "load_tokenizer", "model_folder"]


def model_folder(name: str) -> Path:
    """The folder of a model: a local one as it is, a hub name downloaded (safetensors and tokenizer only).

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

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (OSError, ValueError, HFValidationError) as error:
        raise InputError(f"{name}: is neither a folder nor a hub model that can be downloaded: {error}") from error


class DenseModel:
    """A dense model folder.

    Attributes:
        folder: where it lies.
        raw_config: config.json as it stands.
        config: the same as transformers understands it.
    """

    def __init__(self, name: str) -> None:
        """Open the model; no weights are read yet.

        Raises:
            InputError: not a model folder, no safetensors, or quantised already.
            FormatError: config.json or a header is not what it should be.
        """
        self.folder = model_folder(name)
        self.raw_config = read_json(self.folder / "config.json")
        self.config: Any = load_config(self.folder)
        try:
            self._files = TensorFiles(self.folder)
        except FormatError as error:
            if any(self.folder.glob("*.bin")):
                raise InputError(
                    f"{self.folder}: holds pickled weights (.bin), which are never read; load it once with "
                    "transformers and save_pretrained() it as safetensors"
                ) from error
            raise InputError(str(error)) from error
        check_layers(self.config, self._files)
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
