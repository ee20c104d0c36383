"""Files that are either whole or not there, and the folder of a run that can be continued."""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from vllm_gqsa.format import read_json
from vllm_gqsa.offline.errors import InputError

__all__ = [
    "PARTIAL",
    "RUN_FILE",
    "WORK_FOLDER",
    "digest_files",
    "digest_tensor",
    "open_run",
    "write_atomically",
    "write_json",
    "write_tensors",
]

RUN_FILE = "gqsa_run.json"
"""Says what a folder is made of: its fingerprint. Written first, and kept as a record."""
WORK_FOLDER = "gqsa_work"
"""Folder in it for what is needed until it is finished."""
PARTIAL = ".partial-"
"""Files whose names begin so are not whole."""


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` make a temporary file beside ``path``, flush it to the disk, and rename it.

    Raises:
        InputError: it cannot be written: no room, or no right to.
    """
    temporary = path.with_name(PARTIAL + path.name)
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, SafetensorError, RuntimeError) as error:  # torch.save raises the last
        raise InputError(f"{path}: cannot be written: {error}; give the same command again to go on") from error
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object atomically."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    write_atomically(path, lambda p: p.write_text(text, encoding="utf-8"))


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a safetensors file atomically."""
    whole = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    write_atomically(path, lambda p: save_file(whole, p, metadata={"format": "pt"}))


def digest_tensor(tensor: torch.Tensor) -> str:
    """SHA-256 of a CPU tensor's bytes, hexadecimal."""
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


def digest_files(paths: list[Path]) -> str:
    """SHA-256 over names, sizes and contents of files, hexadecimal."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


@contextmanager
def open_run(folder: Path, run: Mapping[str, Any], *, restart: bool) -> Iterator[None]:
    """Take possession of an output folder: begin it, or go on with it if it was begun the same way.

    Args:
        folder: the output folder.
        run: the fingerprint: everything that determines the result.
        restart: throw away what an earlier run left.

    Raises:
        InputError: the folder cannot be made, holds something else, belongs to a run with another fingerprint, or is
            in use.
    """
    record = folder / RUN_FILE
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file; name a folder")
    if folder.is_dir() and not record.exists() and any(not p.name.startswith(PARTIAL) for p in folder.iterdir()):
        raise InputError(f"{folder}: is not empty and was not begun by gqsa compress; choose another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: the folder cannot be made: {error.strerror}") from error
    lock = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{folder}: another gqsa compress is writing to it") from None
        if restart and record.exists():
            _clear(folder)
        for leftover in folder.glob(PARTIAL + "*"):
            leftover.unlink()
        if record.exists():
            _compare(folder, read_json(record), json.loads(json.dumps(run)))
        else:
            write_json(record, run)
        yield
    finally:
        os.close(lock)


def _clear(folder: Path) -> None:
    """Remove what a run has left: first what makes it look finished, last what says that it is ours."""
    ordered = sorted(folder.iterdir(), key=lambda path: (path.name == RUN_FILE, path.name != "config.json"))
    for path in ordered:
        if path.is_file():
            path.unlink()
        elif path.name == WORK_FOLDER:
            shutil.rmtree(path)


def _compare(folder: Path, old: Any, new: Any, key: str = "") -> None:  # noqa: ANN401 - JSON values
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted(old.keys() | new.keys()):
            _compare(folder, old.get(name), new.get(name), f"{key}.{name}" if key else name)
    elif old != new:
        raise InputError(
            f"{folder}: was begun with {key} = {_short(old)}, now it is {_short(new)}; choose another folder, or "
            "--restart to throw away what is there"
        )


def _short(value: Any) -> str:  # noqa: ANN401
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
