"""Task files and their scores, against one request at a time through transformers, and against lm_eval itself."""

import copy
import gzip
import json
import math
import os
import random
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.helpers import compress_randomly, make_dense
from vllm_gqsa.offline import tasks
from vllm_gqsa.offline.errors import InputError
from vllm_gqsa.offline.tasks import Item, evaluate_tasks, read_task

CHOICES = {"query": "one", "choices": ["a", "b"], "gold": 0}


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def words(rng, count):
    return " ".join("".join(rng.choices("abcdefgh", k=rng.randint(2, 7))) for _ in range(count))


def load(folder):
    run = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return run, AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def choices(tmp_path):
    """Choices of different numbers, tokens and characters, and contexts that end in spaces."""
    rng = random.Random(1)
    rows = []
    for index in range(40):
        options = [words(rng, rng.randint(1, 6)) + "é" * rng.randint(0, 3) for _ in range(rng.randint(2, 4))]
        query = words(rng, rng.randint(1, 15)) + " " * (index % 3)
        rows.append({"query": query, "choices": options, "gold": rng.randrange(len(options))})
    return write(tmp_path / "choices.jsonl", rows)


def speaking(folder, tokenizer):
    """Give a model an output head that only ever says tokens which begin with a space; returns the folder."""
    tensors = load_file(folder / "model.safetensors")
    silent = [index for token, index in tokenizer.get_vocab().items() if token[0] != "Ġ" or not token[1:].isalpha()]
    tensors["lm_head.weight"][silent] = 0
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def model(tmp_path, tokenizer):
    # Heads of 32, the smallest that vLLM's attention takes on a CPU.
    dense = make_dense(tmp_path / "dense", vocab_size=300, max_position_embeddings=128)
    return speaking(dense, tokenizer)


@pytest.fixture
def continuations(tmp_path, model):
    """Half of them are what the dense model itself would say."""
    rng = random.Random(2)
    run, tokenizer = load(model)
    rows = []
    for _ in range(6):
        context = words(rng, 5)
        best = run(tokenizer(context, return_tensors="pt").input_ids).logits[0, -1].argmax().item()
        said = tokenizer.convert_ids_to_tokens(best).removeprefix("Ġ")
        rows += [{"context": context, "continuation": each} for each in (said, words(rng, 1))]
    return write(tmp_path / "continuations.jsonl", rows)


def score(folder, *files, **changes):
    settings = {"limit": None, "engine": "transformers", "dtype": "float32", "device": "cpu", **changes}
    return evaluate_tasks(str(folder), files, progress=lambda *_: None, **settings)


def one_by_one(folder, path):
    """Log-likelihood and greediness of every continuation of every line: no batches, no padding, all logits."""
    run, tokenizer = load(folder)
    most = run.config.max_position_embeddings
    for row in map(json.loads, path.read_text().splitlines()):
        context = row.get("query", row.get("context"))
        found = []
        for continuation in row.get("choices", [row.get("continuation")]):
            tokens = tokenizer(f"{context} {continuation}", return_tensors="pt").input_ids[0]
            count = len(tokens) - len(tokenizer(context.rstrip()).input_ids)
            tokens = tokens[-most - 1 :]
            scores = run(tokens[None, :-1]).logits[0].log_softmax(-1)[-count:]
            value = scores.gather(1, tokens[-count:, None]).sum().item()
            found.append((value, bool((scores.argmax(-1) == tokens[-count:]).all())))
        yield row, found


def mean(values):
    values = torch.tensor(values, dtype=torch.float64)
    return pytest.approx((values.mean().item(), (values.std() / len(values) ** 0.5).item()), rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "opt", "mixtral"])
def test_choices_are_scored_as_one_by_one(dense, choices, family, monkeypatch):
    monkeypatch.setattr(tasks, "_BATCH_TOKENS", 200)
    (found,) = score(dense(family), choices)
    by_sum, by_character = [], []
    for row, likelihoods in one_by_one(dense(family), choices):
        sums = torch.tensor([value for value, _ in likelihoods])
        lengths = torch.tensor([len(choice) for choice in row["choices"]])
        by_sum.append(sums.argmax().item() == row["gold"])
        by_character.append((sums / lengths).argmax().item() == row["gold"])
    assert by_sum != by_character
    assert found.metrics == {"acc": mean(by_sum), "acc_norm": mean(by_character)}
    assert (found.task, found.items, found.truncated) == (str(choices), 40, 0)


def test_continuations_are_scored_as_one_by_one(model, continuations):
    (found,) = score(model, continuations)
    likelihoods = [each for _, (each,) in one_by_one(model, continuations)]
    assert found.metrics["acc"] == mean([greedy for _, greedy in likelihoods])
    assert 0 < found.metrics["acc"][0] < 1
    logs, error = mean([value for value, _ in likelihoods]).expected
    assert found.metrics["perplexity"] == pytest.approx((math.exp(-logs), math.exp(-logs) * error), rel=1e-4)


def test_what_is_longer_than_the_model_is_cut_at_the_left(dense, tmp_path):
    rng = random.Random(3)
    rows = [{"context": words(rng, count), "continuation": words(rng, 2)} for count in (3, 100)]
    path = write(tmp_path / "long.jsonl", rows)
    (found,) = score(dense("llama"), path)
    likelihoods = [each for _, (each,) in one_by_one(dense("llama"), path)]
    assert found.truncated == 1
    assert found.metrics["perplexity"][0] == pytest.approx(
        math.exp(-mean([v for v, _ in likelihoods]).expected[0]), rel=1e-4
    )


def test_a_continuation_longer_than_the_model(dense, tmp_path):
    path = write(tmp_path / "long.jsonl", [{"context": "a", "continuation": words(random.Random(4), 200)}])
    with pytest.raises(InputError, match=r"long.jsonl: line 1: .* is not a continuation with at most 128 tokens"):
        score(dense("llama"), path)


def test_a_beginning_of_text_token_stands_once(tokenizer):
    made = copy.deepcopy(tokenizer)
    made.bos_token = "</s>"
    made.backend_tokenizer.post_processor = TemplateProcessing("</s> $A", special_tokens=[("</s>", made.bos_token_id)])
    for context in ("abc def ", "</s>abc def "):
        (request,) = tasks._requests("file", Item(1, context, ("gh",), None), made, None)
        assert request.tokens == made.encode("abc def  gh")
        assert request.tokens[-request.scored :] == tokenizer.encode("  gh")


def test_files_of_all_kinds(tmp_path):
    own = Item(1, "one", ("a", "b"), 0)
    assert read_task(write(tmp_path / "own.jsonl", [CHOICES])) == [own]
    arc = {"question": "Why?", "choices": ["a", "b", "c"], "gold": 2, "id": "x"}
    piqa = {"goal": "Go", "sol1": "left", "sol2": "right ", "label": 1}
    prompts = [("Question: Why?\nAnswer:", ("a", "b", "c"), 2), ("Question: Go\nAnswer:", ("left", "right "), 1)]
    for row, expected in zip((arc, piqa), prompts, strict=True):
        assert read_task(write(tmp_path / "task.jsonl", [row])) == [Item(1, *expected)]
    packed = tmp_path / "many.jsonl.gz"
    packed.write_bytes(gzip.compress(b"\n" + b'{"context": "a", "continuation": "b"}\n' * 5 + b"not JSON"))
    assert read_task(packed, 5) == [Item(line, "a", ("b",), None) for line in range(2, 7)]
    with pytest.raises(InputError, match="line 7 is not JSON"):
        read_task(packed)


@pytest.mark.parametrize(("line", "says"), [
    ("", "is empty; --task takes a file with one JSON object a line: query, choices and gold;"),
    ("{", "line 2 is not JSON"),
    ("[1]", "line 2 is not a JSON object"),
    ({"text": "x"}, "line 2 has no key 'query'; it takes query, choices and gold; question,"),
    ({**CHOICES, "query": " "}, "line 2: 'query' is ' ', expected text"),
    ({"context": "x"}, "line 2 has no key 'continuation'"),
    ({"context": "x", "continuation": 3}, "line 2: 'continuation' is 3, expected text"),
    ({"goal": "x", "sol1": "a", "label": 0}, "line 2 has no key 'sol2'"),
    ({"query": "x"}, "line 2: 'choices' is None, expected a list of two or more texts"),
    ({**CHOICES, "choices": ["a", ""]}, "line 2: 'choices' is ['a', '']"),
    ({**CHOICES, "choices": ["a"]}, "line 2: 'choices' is ['a']"),
    ({"query": "x", "choices": ["a", "b"]}, "line 2: 'gold' is None, expected the number of a choice, 0 to 1"),
    ({**CHOICES, "gold": 2}, "line 2: 'gold' is 2, expected"),
    ({**CHOICES, "gold": True}, "line 2: 'gold' is True, expected"),
    ("\udcff", "is not UTF-8 text at line 2"),
])  # fmt: skip
def test_a_bad_line_is_named(line, says, tmp_path):
    path = tmp_path / "bad.jsonl"
    text = line if isinstance(line, str) else json.dumps(line)
    path.write_text("\n" + text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(InputError) as caught:
        read_task(path)
    assert str(caught.value).startswith(f"{path}: {says}")


def test_a_file_that_mixes_kinds_or_is_not_there(tmp_path):
    with pytest.raises(InputError, match="line 2 mixes choices and continuations"):
        read_task(write(tmp_path / "both.jsonl", [CHOICES, {"context": "a", "continuation": "b"}]))
    with pytest.raises(InputError, match=r"none.jsonl: no such file; --task takes"):
        read_task(tmp_path / "none.jsonl")


def test_weights_that_are_not_finite(dense, tmp_path):
    for path in dense("llama").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.norm.weight"][0] = math.nan
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="a log-likelihood is nan: the model's weights are not finite"):
        score(tmp_path, write(tmp_path / "task.jsonl", [CHOICES]))


@pytest.mark.slow
def test_vllm_scores_as_transformers_does(tmp_path, model, tokenizer, choices, continuations):
    """In processes of their own, as programs call it: stdout holds the JSON object and nothing else."""
    pytest.importorskip("vllm", reason="needs vLLM")
    checkpoint = compress_randomly(model, tmp_path).checkpoint
    tokenizer.save_pretrained(checkpoint)
    found = {}
    for engine in ("transformers", "vllm"):
        command = [sys.executable, "-m", "vllm_gqsa.offline.cli", "eval", str(checkpoint), "--engine", engine, "--json"]
        files = ["--task", str(choices), "--task", str(continuations)]
        env = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        done = subprocess.run([*command, *files], env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        found[engine] = json.loads(done.stdout)["tasks"]
        assert [each.pop("task") for each in found[engine]] == [str(choices), str(continuations)]
    assert found["vllm"] == [pytest.approx(each, rel=1e-3) for each in found["transformers"]]


LM_EVAL = {"dataset_path": "json", "test_split": "test"}


@pytest.mark.slow
def test_lm_eval_gives_the_same(model, choices, continuations, tmp_path, monkeypatch):
    """Run with lm-eval 0.4.13, which is no requirement of this project: pip install lm-eval."""
    lm_eval = pytest.importorskip("lm_eval", reason="needs lm-eval")
    from lm_eval.models.huggingface import HFLM

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    loaded, tokenizer = load(model)
    configs = [
        {**LM_EVAL, "task": "choices", "output_type": "multiple_choice", "doc_to_text": "{{query}}",
         "doc_to_choice": "choices", "doc_to_target": "gold",
         "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]},
        {**LM_EVAL, "task": "continuations", "output_type": "loglikelihood", "doc_to_text": "{{context}}",
         "doc_to_target": "{{' ' + continuation}}", "metric_list": [{"metric": "acc"}, {"metric": "perplexity"}]},
    ]  # fmt: skip
    for config, path in zip(configs, (choices, continuations), strict=True):
        config["dataset_kwargs"] = {"data_files": {"test": str(path)}}
    harness = HFLM(pretrained=loaded, tokenizer=tokenizer, device="cpu", batch_size=8)
    expected = lm_eval.simple_evaluate(harness, tasks=configs)["results"]
    for found in score(model, choices, continuations):
        for metric, (value, error) in found.metrics.items():
            theirs = expected[found.task.rpartition("/")[2].removesuffix(".jsonl")]
            assert value == pytest.approx(theirs[f"{metric},none"], rel=1e-5)
            # That of the perplexity is resampled there.
            assert error == pytest.approx(theirs[f"{metric}_stderr,none"], rel=1 if metric == "perplexity" else 1e-5)
