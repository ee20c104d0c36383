"""Makes the models of the table and scores them; what is done already is not done again."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.accuracy import peers
from benchmarks.accuracy.methods import Method
from benchmarks.accuracy.rivals import train_rival
from benchmarks.errors import BenchmarkError
from benchmarks.machine import processor
from vllm_gqsa.offline.files import digest_files, write_json
from vllm_gqsa.offline.pipeline import RECIPE_FILE, Job, split_text
from vllm_gqsa.offline.recipe import Recipe
from vllm_gqsa.offline.source import DenseModel
from vllm_gqsa.offline.text import TextSource

__all__ = ["Bench", "Measured", "Score"]

Say = Callable[[str], None]

MINUTES = "minutes.json"


@dataclass(frozen=True)
class Score:
    """One perplexity to measure.

    Attributes:
        label: of the text.
        text: file.
        context: tokens a window.
        windows: use only the first; all if None.
    """

    label: str
    text: Path
    context: int
    windows: int | None


@dataclass(frozen=True)
class Measured:
    """What is known of a method's model.

    Attributes:
        method: name, tables, bits a weight, tokens trained on, minutes, digest of the calibration text, machine.
        scores: all perplexities that were ever measured of it, with text, context, windows and tokens.
        tasks: the accuracies.
    """

    method: dict[str, Any]
    scores: list[dict[str, Any]]
    tasks: list[dict[str, Any]]


@dataclass(frozen=True)
class Bench:
    """Where things are.

    Attributes:
        model: dense folder.
        calibration: .jsonl of all text to calibrate and train on.
        digest: of that file.
        folder: for the models and what is known of them.
        scores: perplexities to measure.
        tasks: task files to score by `gqsa eval --task`.
        limit: items of each task; all if None.
        dtype: of the activations, where models are measured.
        recipe: samples, context and tokens that peers get their calibration windows by.
        device: torch device.
        say: told what is being done.
    """

    model: Path
    calibration: Path
    digest: str
    folder: Path
    scores: tuple[Score, ...]
    tasks: tuple[Path, ...]
    limit: int | None
    dtype: str
    recipe: Recipe
    device: str
    say: Say

    def measure(self, method: Method) -> Measured:
        """Make and score a method's model.

        Raises:
            BenchmarkError: a step failed.
        """
        place = self.folder / method.slug
        place.mkdir(parents=True, exist_ok=True)
        self.say(f"{method.name} ({place})")
        model, bits = self._make(method, place)
        on_gpu = self.device.startswith("cuda") and not method.is_peers  # which compute on CPUs
        facts = {
            "method": method.name, "tables": list(method.tables), "bits_per_weight": bits,
            "tokens_trained": method.tokens, "minutes": _minutes(self._clocked(method, place)),
            "calibration": None if model == self.model else self.digest,
            "machine": torch.cuda.get_device_name() if on_gpu else processor(),
        }  # fmt: skip
        for score in self.scores:
            self._score(place, model, score)
        for task in self.tasks:
            self._task(place, model, task)
        scores, labels = _found(place, "ppl-*.json"), [score.label for score in self.scores]
        scores.sort(key=lambda score: labels.index(score["text"]) if score["text"] in labels else len(labels))
        return Measured(facts, scores, _found(place, "task-*.json"))

    def _make(self, method: Method, place: Path) -> tuple[Path, float]:
        """The model's folder, and bits a weight of its compressed linears."""
        if method.recipe is None and method.peer is None:
            return self.model, 16.0
        if method.peer is None:
            assert method.recipe is not None
            return self._ours(method.recipe, place)
        spec = peers.PEERS[method.peer]
        begin = self._peer(method.peer)
        if method.recipe is None:
            return begin, spec.bits_per_weight
        output = place / "model"
        if not (output / "config.json").exists():
            windows = self._windows(method.recipe)[1]
            unfinished = place / "model.partial"
            folders = self.model, begin, unfinished
            with _clock(place / MINUTES):
                train_rival(spec, folders, method.recipe, windows, self.device, self._progress("training"))
            unfinished.rename(output)
        return output, spec.bits_per_weight

    def _ours(self, recipe: Recipe, place: Path) -> tuple[Path, float]:
        output, file = place / "model", place / "recipe.yaml"
        if not (output / "config.json").exists():
            file.write_text(recipe.to_yaml(), "utf-8")
            # The perplexity for the card is not what is reported here, so it is measured on little.
            with _clock(place / MINUTES):
                _gqsa(
                    "compress", str(self.model), str(output), "--recipe", str(file),
                    "--calibration", str(self.calibration), "--eval-windows", "2", "--device", self.device,
                )  # fmt: skip
        if (output / RECIPE_FILE).read_text("utf-8") != recipe.to_yaml():
            raise BenchmarkError(f"{output} was made by another recipe; remove {place} to make it again")
        return output, float(_gqsa_json("inspect", str(output))["bits_per_weight"])

    def _peer(self, name: str) -> Path:
        """The folder a peer leaves; several rows may begin with it."""
        output = self.folder / "peers" / name
        if not (output / "config.json").exists():
            output.parent.mkdir(parents=True, exist_ok=True)
            windows = self.folder / "peers" / "windows.safetensors"
            save_file({"tokens": self._windows(self.recipe)[0].long()}, windows)
            python = peers.install(self.folder / "peers-venv", self.say)
            unfinished = output.with_name(f"{name}.partial")
            shutil.rmtree(unfinished, ignore_errors=True)
            self._peer_clock(name).unlink(missing_ok=True)  # it cannot go on where it was stopped
            with _clock(self._peer_clock(name)):
                peers.compress(python, name, self.model, windows, unfinished)
            unfinished.rename(output)
        return output

    def _peer_clock(self, name: str) -> Path:
        return self.folder / "peers" / f"{name}.{MINUTES}"

    def _clocked(self, method: Method, place: Path) -> Path:
        """Where it stands how long the model took; the training alone, where it begins with a peer's."""
        return self._peer_clock(method.peer) if method.peer and method.is_peers else place / MINUTES

    def _windows(self, recipe: Recipe) -> tuple[torch.Tensor, torch.Tensor]:
        """Windows to calibrate on and to train on, as `gqsa compress` would choose them."""
        job = Job(str(self.model), Path(), recipe, TextSource(str(self.calibration)), evaluation_windows=2)
        calibration, training, *_ = split_text(job, DenseModel(str(self.model)))
        return calibration, training

    def _score(self, place: Path, model: Path, score: Score) -> None:
        name = f"ppl-{score.label}-{score.context}-{score.windows or 'all'}-{self.dtype}.json"
        asked = ["--max-windows", str(score.windows)] if score.windows else []

        def measure() -> dict[str, Any]:
            found = _gqsa_json(
                "eval", str(model), "--text", str(score.text), "--context", str(score.context),
                "--dtype", self.dtype, "--device", self.device, *asked,
            )  # fmt: skip
            kept = {key: found[key] for key in ("perplexity", "tokens", "windows", "context", "dtype")}
            return {"text": score.label, **kept}

        _once(place / name, score.text, measure)

    def _task(self, place: Path, model: Path, task: Path) -> None:
        asked = ["--limit", str(self.limit)] if self.limit else []

        def measure() -> dict[str, Any]:
            found = _gqsa_json(
                "eval", str(model), "--task", str(task), "--dtype", self.dtype, "--device", self.device, *asked
            )
            (score,) = found["tasks"]
            return {**score, "task": task.name.split(".")[0], "dtype": found["dtype"]}

        _once(place / f"task-{task.stem}-{self.limit or 'all'}-{self.dtype}.json", task, measure)

    def _progress(self, what: str) -> Callable[[int, int], None]:
        def progress(done: int, total: int) -> None:
            if done % max(1, total // 20) == 0 or done == total:
                self.say(f"  {what}: {done} of {total}")

        return progress


@contextmanager
def _clock(path: Path) -> Iterator[None]:
    """Adds the minutes to those of earlier attempts."""
    start = time.monotonic()
    try:
        yield
    finally:
        write_json(path, {"minutes": _minutes(path) + (time.monotonic() - start) / 60})


def _minutes(path: Path) -> float:
    return float(json.loads(path.read_text("utf-8"))["minutes"]) if path.exists() else 0.0


def _once(path: Path, file: Path, measure: Callable[[], dict[str, Any]]) -> None:
    """Write what is measured on a file, unless it was measured on that file before."""
    digest = digest_files([file])
    if not path.exists() or json.loads(path.read_text("utf-8")).get("digest") != digest:
        write_json(path, measure() | {"digest": digest})


def _found(place: Path, pattern: str) -> list[dict[str, Any]]:
    """What was ever measured; what says no dtype is from before there was a choice, and is measured anew."""
    found = [json.loads(path.read_text("utf-8")) for path in sorted(place.glob(pattern))]
    return [each for each in found if "dtype" in each]


def _gqsa(*arguments: str) -> None:
    command = [sys.executable, "-m", "vllm_gqsa.offline", *arguments]
    status = subprocess.call(command)
    if status:
        raise BenchmarkError(f"gqsa {' '.join(arguments)} failed with status {status}; its message stands above")


def _gqsa_json(*arguments: str) -> Mapping[str, Any]:
    command = [sys.executable, "-m", "vllm_gqsa.offline", *arguments, "--json"]
    run = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    if run.returncode:
        raise BenchmarkError(f"gqsa {' '.join(arguments)} failed with status {run.returncode}; see above")
    found: Mapping[str, Any] = json.loads(run.stdout)
    return found
