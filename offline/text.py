"""Text in, windows of tokens out: for calibration and for perplexity."""

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, cast

import torch

from vllm_gqsa.offline.errors import InputError

__all__ = ["TextSource", "check_context", "choose_windows", "numbered_lines", "read_documents", "token_windows"]


@dataclass(frozen=True)
class TextSource:
    """Where text comes from.

    Attributes:
        name: a .txt, .jsonl or .parquet file (.gz too for the first two), or a name or folder for
            ``datasets.load_dataset``, with a configuration after a colon (``wikitext:wikitext-2-raw-v1``).
        split: split of a dataset.
        column: column of a .jsonl, .parquet or dataset that holds the text.
        more: names of other texts to mix with it.
    """

    name: str
    split: str = "train"
    column: str = "text"
    more: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """All names, for messages and reports."""
        return ", ".join((self.name, *self.more))


def read_documents(source: TextSource) -> Iterator[str]:
    """Yield the documents of a text source.

    Of several texts, the next document is from the one that has given the fewest characters yet, as long as it lasts:
    any beginning is an even mixture.

    Raises:
        InputError: it is not there, not of a known kind, or lacks the column.
    """
    texts = [_one_text(replace(source, name=name, more=())) for name in (source.name, *source.more)]
    given = dict.fromkeys(range(len(texts)), 0)
    while given:
        text = min(given, key=lambda index: given[index])
        document = next(texts[text], None)
        if document is None:
            del given[text]
        else:
            given[text] += len(document)
            yield document


def _one_text(source: TextSource) -> Iterator[str]:
    path = Path(source.name)
    if not path.is_file():
        if path.suffix in (".txt", ".jsonl", ".parquet", ".gz"):
            raise InputError(f"{path}: no such file")
        yield from _dataset(source)
        return
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    readers: dict[str, Callable[[Path, str], Iterator[str]]] = {
        ".txt": _plain,
        ".jsonl": _json_lines,
        ".parquet": _parquet,
    }
    if suffix not in readers:
        raise InputError(f"{path}: text files end in .txt, .jsonl or .parquet (.txt.gz and .jsonl.gz too)")
    yield from readers[suffix](path, source.column)


def token_windows(source: TextSource, tokenizer: Any, context: int, most: int | None = None) -> torch.Tensor:  # noqa: ANN401
    """Join the documents by an empty line, tokenise, cut into windows without overlap and drop the rest.

    Args:
        source: the text.
        tokenizer: of transformers; called with its own special tokens, so that a beginning-of-text token
            that the model expects stands once, at the very front.
        context: tokens a window.
        most: stop after about this many windows.

    Returns:
        int64 ``[windows, context]``.

    Raises:
        InputError: there is not one whole window of text.
    """
    # A token is rarely under two characters: reading this much is enough, and a whole web crawl is not read.
    budget = None if most is None else most * context * 12
    texts, length = [], 0
    for document in read_documents(source):
        texts.append(document)
        length += len(document)
        if budget is not None and length >= budget:
            break
    tokens = tokenizer("\n\n".join(texts), return_tensors="pt", verbose=False).input_ids[0]
    count = tokens.numel() // context
    if count == 0:
        raise InputError(f"{source.label}: {tokens.numel()} tokens of text are less than one window of {context}")
    windows: torch.Tensor = tokens[: count * context].view(count, context)
    return windows[:most]


def check_context(context: int, config: Any) -> None:  # noqa: ANN401 - a transformers configuration
    """Check that a model takes windows of ``context`` tokens.

    Raises:
        InputError: it takes fewer.
    """
    most = getattr(config, "max_position_embeddings", None)
    if most is not None and context > most:
        raise InputError(f"--context {context} is longer than the {most} positions of the model")


def choose_windows(windows: torch.Tensor, samples: int, seed: int, name: str) -> torch.Tensor:
    """Choose ``samples`` windows at random, in their order in the text; all of them where there are no more.

    Raises:
        InputError: there are fewer windows than samples.
    """
    if windows.shape[0] < samples:
        raise InputError(
            f"{name}: holds {windows.shape[0]} windows of {windows.shape[1]} tokens, {samples} are asked for; "
            "give more text, or a smaller --samples or --context"
        )
    generator = torch.Generator().manual_seed(seed)
    return windows[torch.randperm(windows.shape[0], generator=generator)[:samples].sort().values]


_PIECE = 8192
"""Characters or more a document: a plain file is cut at empty lines, so that it can be mixed with others."""
_UNREADABLE = (UnicodeDecodeError, OSError, EOFError, zlib.error)
"""What reading a text file raises that is not UTF-8, or not what its .gz says."""


def _open(path: Path) -> IO[bytes]:
    return cast("IO[bytes]", gzip.open(path)) if path.suffix == ".gz" else path.open("rb")


def _plain(path: Path, _column: str) -> Iterator[str]:
    try:
        with _open(path) as file:
            paragraphs = io.TextIOWrapper(file, encoding="utf-8").read().split("\n\n")
    except _UNREADABLE as error:
        raise InputError(f"{path}: is not UTF-8 text: {error}") from error
    piece, length = [], 0
    for paragraph in paragraphs:
        piece.append(paragraph)
        length += len(paragraph)
        if length >= _PIECE:
            yield "\n\n".join(piece)
            piece, length = [], 0
    if piece:
        yield "\n\n".join(piece)


def _json_lines(path: Path, column: str) -> Iterator[str]:
    for number, line in numbered_lines(path):
        try:
            text = json.loads(line)[column]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(f"{path}: line {number} is not a JSON object with a key {column!r}: {error}") from error
        yield _as_text(text, f"{path}: line {number}")


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a UTF-8 file, .gz too, that are not empty, with their numbers from 1.

    Raises:
        InputError: it is not what it should be; lines are decoded one by one, so the number of the bad one is right.
    """
    number = 0
    try:
        with _open(path) as file:
            for line in file:
                number += 1
                if line.strip():
                    yield number, line.decode("utf-8")
    except _UNREADABLE as error:
        raise InputError(f"{path}: is not UTF-8 text at line {number}: {error}") from error


def _parquet(path: Path, column: str) -> Iterator[str]:
    import pyarrow  # noqa: PLC0415 - only where it is needed
    import pyarrow.parquet  # noqa: PLC0415

    try:
        file = pyarrow.parquet.ParquetFile(path)
        if column not in file.schema_arrow.names:
            raise InputError(f"{path}: has no column {column!r}; it has {', '.join(file.schema_arrow.names)}")
        for batch in file.iter_batches(columns=[column]):
            for text in batch.column(0).to_pylist():
                yield _as_text(text, str(path))
    except pyarrow.ArrowException as error:
        raise InputError(f"{path}: is not a Parquet file: {error}") from error


def _dataset(source: TextSource) -> Iterator[str]:
    import datasets  # noqa: PLC0415 - slow to import

    name, _, config = source.name.partition(":")
    try:
        rows = datasets.load_dataset(name, config or None, split=source.split, streaming=True)
        for row in rows:
            if source.column not in row:
                raise InputError(f"dataset {name}: has no column {source.column!r}; it has {', '.join(row)}")
            yield _as_text(row[source.column], f"dataset {name}")
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"dataset {source.name} (split {source.split}) cannot be loaded: {error}") from error


def _as_text(value: Any, where: str) -> str:  # noqa: ANN401
    if not isinstance(value, str):
        raise InputError(f"{where}: the text column holds {type(value).__name__}, expected text")
    return value
