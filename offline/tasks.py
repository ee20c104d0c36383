"""Task sets from files, scored by the rules of lm-evaluation-harness: choices, and words to continue with.

Read from lm-eval 0.4.13 (``api/model.py``, ``api/task.py``, ``models/huggingface.py``, ``models/vllm_causallms.py``):
no examples before the question, one space before what is scored, the tokenizer's own special tokens.
"""

import json
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vllm_gqsa.offline.arithmetic import fast_float32
from vllm_gqsa.offline.engine import Engine, load_transformers, load_vllm
from vllm_gqsa.offline.errors import InputError
from vllm_gqsa.offline.source import load_config, load_tokenizer, model_folder
from vllm_gqsa.offline.text import numbered_lines

__all__ = ["Item", "TaskScore", "evaluate_tasks", "read_task"]

_BATCH_TOKENS = 2048
"""Tokens at a time through transformers, padding with them: bounds the memory of the logits."""
_SEQUENCES = 16
"""Prompts at a time through vLLM."""
_KEYS = "query, choices and gold; question, choices and gold; goal, sol1, sol2 and label; or context and continuation"
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Item:
    """One line of a task file.

    Attributes:
        line: its number, from 1.
        context: text before what is scored.
        continuations: what is scored after it: the choices, or the one right continuation; without the space before.
        gold: index of the right choice; None where there is nothing to choose.
    """

    line: int
    context: str
    continuations: tuple[str, ...]
    gold: int | None


@dataclass(frozen=True)
class TaskScore:
    """What a model reached in one file.

    Attributes:
        task: the file.
        items: lines scored.
        truncated: requests whose context was cut at the left, because the model takes no more tokens.
        metrics: of choices ``acc`` and ``acc_norm``, of continuations ``acc`` and ``perplexity``: the value and its
            standard error, None of a single item.
    """

    task: str
    items: int
    truncated: int
    metrics: dict[str, tuple[float, float | None]]

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary, with the errors under ``acc_stderr`` and so on."""
        values = {name: value for name, (value, _) in self.metrics.items()}
        errors = {f"{name}_stderr": error for name, (_, error) in self.metrics.items()}
        return {"task": self.task, "items": self.items, "truncated": self.truncated, **values, **errors}


class Request(NamedTuple):
    """Tokens of a context and a continuation, of which the last ``scored`` are the continuation."""

    tokens: list[int]
    scored: int
    truncated: bool


class Likelihood(NamedTuple):
    """Log-likelihood of a continuation in nats, and whether each of its tokens was the most likely one."""

    value: float
    greedy: bool


Scorer = Callable[[Sequence[Request]], Iterator[tuple[int, Likelihood]]]
"""Yields the index of a request and its likelihood, in any order."""


def evaluate_tasks(
    model: str,
    files: Sequence[Path],
    *,
    limit: int | None,
    engine: Engine,
    dtype: str,
    device: str,
    progress: Progress,
) -> list[TaskScore]:
    """Score a dense or a GQSA model folder (or hub name) on task files.

    Args:
        model: the model.
        files: as :func:`read_task` reads them.
        limit: use only the first lines of each; all if None.
        engine: ``transformers``, or ``vllm`` through its prompt logprobs.
        dtype: a torch dtype's name.
        device: of the transformers engine; vLLM chooses its own.
        progress: called with a file's name, requests done and requests in all.

    Returns:
        One score a file.

    Raises:
        InputError: a file, the model or the engine cannot be used.
        FormatError: a GQSA checkpoint breaks the format.
    """
    tasks = [(str(file), read_task(file, limit)) for file in files]
    folder = model_folder(model)
    positions = getattr(load_config(folder), "max_position_embeddings", None)
    # transformers needs no position for the last token, which is only predicted; vLLM generates one more.
    most = None if positions is None else positions + (1 if engine == "transformers" else -1)
    tokenizer = load_tokenizer(folder)
    requests = [[_requests(name, item, tokenizer, most) for item in items] for name, items in tasks]
    score: Scorer
    if engine == "vllm":
        longest = max(len(request.tokens) for of_task in requests for of_item in of_task for request in of_item)
        score = partial(_through_vllm, *load_vllm(folder, dtype, longest, _SEQUENCES))
    else:
        score = partial(_through_transformers, load_transformers(folder, dtype, device))
    return [_run(name, items, of_task, score, progress) for (name, items), of_task in zip(tasks, requests, strict=True)]


def read_task(path: Path, limit: int | None = None) -> list[Item]:
    """Read a task file: one JSON object a line, .gz or not, all with the same keys.

    With ``query``, ``choices`` and ``gold`` (counted from 0) the query is the context as it is. ARC's ``question``
    instead of it, and PIQA's ``goal``, ``sol1``, ``sol2`` and ``label``, get the harness's prompt for those sets around
    them. With ``context`` and ``continuation`` there is nothing to choose (LAMBADA). Other keys are not looked at.

    Args:
        path: the file.
        limit: stop after so many items.

    Raises:
        InputError: it is not there, is empty, or a line of it is not such an object.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; --task takes a file with one JSON object a line: {_KEYS}")
    items: list[Item] = []
    for number, line in islice(numbered_lines(path), limit):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: line {number} is not JSON: {error}") from error
        item = _item(row, number, f"{path}: line {number}")
        if (item.gold is None) != ((items or [item])[0].gold is None):
            raise InputError(f"{path}: line {number} mixes choices and continuations; give them as two files")
        items.append(item)
    if not items:
        raise InputError(f"{path}: is empty; --task takes a file with one JSON object a line: {_KEYS}")
    return items


def _item(row: Any, number: int, where: str) -> Item:  # noqa: ANN401 - whatever the line holds
    if not isinstance(row, dict):
        raise InputError(f"{where} is not a JSON object; it takes the keys {_KEYS}")

    def text(key: str) -> str:
        if key not in row:
            raise InputError(f"{where} has no key {key!r}; it takes {_KEYS}")
        value = row[key]
        if not isinstance(value, str) or not value.strip():
            raise InputError(f"{where}: {key!r} is {value!r}, expected text")
        return value

    if "context" in row:
        return Item(number, text("context"), (text("continuation"),), None)
    if "goal" in row:
        context, label = f"Question: {text('goal')}\nAnswer:", "label"
        choices: Any = [text("sol1"), text("sol2")]
    else:
        context = f"Question: {text('question')}\nAnswer:" if "question" in row else text("query")
        choices, label = row.get("choices"), "gold"
        if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
            raise InputError(f"{where}: 'choices' is {choices!r}, expected a list of two or more texts")
    gold = row.get(label)
    if type(gold) is not int or not 0 <= gold < len(choices):
        raise InputError(f"{where}: {label!r} is {gold!r}, expected the number of a choice, 0 to {len(choices) - 1}")
    return Item(number, context, tuple(choices), gold)


def _requests(name: str, item: Item, tokenizer: Any, most: int | None) -> list[Request]:  # noqa: ANN401
    """Tokenise as ``TemplateLM._encode_pair`` does, and cut at the left to ``most`` tokens."""
    # A context that begins with the special token already, as chat templates give it, gets no second one.
    bos = tokenizer.bos_token
    encode = partial(tokenizer.encode, add_special_tokens=not (bos and item.context.startswith(bos)), verbose=False)
    context = item.context.rstrip()
    space = item.context[len(context) :] + " "
    before = encode(context)
    found = []
    for continuation in item.continuations:
        scored = encode(context + space + continuation)[len(before) :]
        if not scored or (most is not None and len(scored) >= most):
            fits = f"with at most {most - 1} tokens" if most is not None and scored else "with tokens of its own"
            raise InputError(f"{name}: line {item.line}: {continuation[:40]!r} is not a continuation {fits}")
        tokens = before + scored
        found.append(Request(tokens[-most:] if most else tokens, len(scored), most is not None and len(tokens) > most))
    return found


def _run(
    name: str, items: Sequence[Item], requests: Sequence[Sequence[Request]], score: Scorer, progress: Progress
) -> TaskScore:
    """Score the requests of one file."""
    flat = [request for of_item in requests for request in of_item]
    found = {}
    for index, likelihood in score(flat):
        if not math.isfinite(likelihood.value):
            raise InputError(f"{name}: a log-likelihood is {likelihood.value}: the model's weights are not finite")
        found[index] = likelihood
        progress(Path(name).name, len(found), len(flat))
    ordered = iter(found[index] for index in range(len(flat)))
    likelihoods = [list(islice(ordered, len(of_item))) for of_item in requests]
    metrics = _of_continuations(likelihoods) if items[0].gold is None else _of_choices(items, likelihoods)
    return TaskScore(name, len(items), sum(request.truncated for request in flat), metrics)


def _of_choices(
    items: Sequence[Item], likelihoods: Sequence[list[Likelihood]]
) -> dict[str, tuple[float, float | None]]:
    sums = [[each.value for each in of_item] for of_item in likelihoods]
    # A character, not a token or a byte, is what the harness divides by.
    means = [
        [value / len(choice) for value, choice in zip(values, item.continuations, strict=True)]
        for item, values in zip(items, sums, strict=True)
    ]
    return {
        name: _mean([float(row.index(max(row)) == item.gold) for item, row in zip(items, rows, strict=True)])
        for name, rows in (("acc", sums), ("acc_norm", means))
    }


def _of_continuations(likelihoods: Sequence[list[Likelihood]]) -> dict[str, tuple[float, float | None]]:
    mean, error = _mean([likelihood.value for (likelihood,) in likelihoods])
    perplexity = math.exp(-mean) if mean > -700 else math.inf
    return {
        "acc": _mean([float(likelihood.greedy) for (likelihood,) in likelihoods]),
        # To first order; the harness resamples, which gives about the same and another value every time.
        "perplexity": (perplexity, None if error is None else perplexity * error),
    }


def _mean(values: list[float]) -> tuple[float, float | None]:
    """Mean and its standard error."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return statistics.fmean(values), error


def _through_transformers(model: Any, requests: Sequence[Request]) -> Iterator[tuple[int, Likelihood]]:  # noqa: ANN401
    """Batches of like length, the longest first: what does not fit into memory fails at once."""
    order = sorted(range(len(requests)), key=lambda index: -len(requests[index].tokens))
    while order:
        rows = max(1, _BATCH_TOKENS // len(requests[order[0]].tokens))
        batch, order = order[:rows], order[rows:]
        yield from zip(batch, _batch(model, [requests[index] for index in batch]), strict=True)


def _batch(model: Any, requests: Sequence[Request]) -> Iterator[Likelihood]:  # noqa: ANN401
    """Score requests, the longest first, padded at the right, where a causal model does not look."""
    inputs = [torch.tensor(request.tokens[:-1]) for request in requests]
    tokens = torch.nn.utils.rnn.pad_sequence(inputs, batch_first=True).to(model.device)
    padding = [tokens.shape[1] - len(row) for row in inputs]
    keep = max(pad + request.scored for pad, request in zip(padding, requests, strict=True))
    with torch.no_grad(), fast_float32(model.device):
        logits = model(tokens, use_cache=False, logits_to_keep=keep).logits
    for row, pad, request in zip(logits, padding, requests, strict=True):
        end = len(row) - pad
        own = row[end - request.scored : end].float()
        targets = torch.tensor(request.tokens[-request.scored :], device=own.device)
        loss = torch.nn.functional.cross_entropy(own, targets, reduction="none").double().sum().item()
        yield Likelihood(-loss, bool((own.argmax(-1) == targets).all()))


def _through_vllm(llm: Any, sampling: Any, requests: Sequence[Request]) -> Iterator[tuple[int, Likelihood]]:  # noqa: ANN401
    for start in range(0, len(requests), 4 * _SEQUENCES):
        batch = requests[start : start + 4 * _SEQUENCES]
        prompts = [{"prompt_token_ids": request.tokens} for request in batch]
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        for index, (request, output) in enumerate(zip(batch, outputs, strict=True), start):
            scores, tokens = output.prompt_logprobs[-request.scored :], request.tokens[-request.scored :]
            chosen = [score[token] for score, token in zip(scores, tokens, strict=True)]
            value = sum(each.logprob for each in chosen)
            yield index, Likelihood(value, all(each.rank == 1 for each in chosen))
