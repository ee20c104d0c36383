"""The table of methods: tiny models through all of it but the peers' packages, which have their own test."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from benchmarks.accuracy import __main__ as command, peers
from benchmarks.accuracy.methods import ABLATIONS, Budget, methods, select
from benchmarks.accuracy.report import markdown, plot
from benchmarks.accuracy.rivals import GroupQuantizedLinear
from tests.offline.conftest import dense, text, tokenizer  # noqa: F401 - fixtures
from vllm_gqsa.offline.pipeline import Job, split_text
from vllm_gqsa.offline.recipe import NAMED
from vllm_gqsa.offline.source import DenseModel
from vllm_gqsa.offline.text import TextSource

BUDGET = Budget(tokens=100_000, samples=16, context=64)
FORMATS = {
    "W3": peers.Peer("W3", "gptq", "llmcompressor", bits=3, group_size=32),
    "2:4": peers.Peer("2:4", "sparsegpt", "llmcompressor", bits=4, group_size=32, kept=2),
}


def rounded(weight, peer):
    """To the nearest weight of a format."""
    groups = weight.view(len(weight), -1, peer.group_size)
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    scale = (high - low) / (2**peer.bits - 1)
    zero = (-low / scale).round()
    return (((groups / scale).round() + zero).clamp(0, 2**peer.bits - 1) - zero).mul(scale).view_as(weight)


def test_methods_are_distinct_and_all_trained_ones_but_the_named_recipes_get_the_same_tokens():
    rows = methods(BUDGET)
    assert len({row.slug for row in rows}) == len({row.name for row in rows}) == len(rows)
    assert {table for row in rows for table in row.tables} == {"main", *ABLATIONS}
    recipes = [row.recipe for row in rows if "recipes" in row.tables]
    assert recipes[:3] == [NAMED[name] for name in ("quick", "default", "best")]
    assert recipes[3:] == [NAMED["default"].changed({"sparsity": 0.3})]
    trained = {
        row.tokens
        for row in rows
        if row.recipe and (row.recipe.prune or row.recipe.distill) and not row.recipe.oqp and row.recipe not in recipes
    }
    assert max(trained) - min(trained) <= 2 * 64  # each stage is rounded up to whole windows
    assert min(trained) >= 100_000
    assert {row.peer for row in rows if row.peer} <= set(peers.PEERS)


def test_select_takes_whole_names():
    assert [row.name for row in select(methods(BUDGET), "W4S50 G16|dense")] == ["dense", "W4S50 G16"]


@pytest.mark.parametrize("name", FORMATS)
def test_a_rival_stays_in_its_format(name):
    peer = FORMATS[name]
    torch.manual_seed(0)
    weight = torch.randn(6, 64)
    if peer.kept < 4:
        weight[:, ::2] = 0
    linear = GroupQuantizedLinear(rounded(weight, peer), None, peer)
    x, target = torch.randn(50, 64), torch.randn(50, 6)
    optimizer = torch.optim.Adam(linear.parameters(), 1e-2)
    losses = []
    for _ in range(30):
        loss = (linear(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    stored = linear.matrix()
    levels = max(len(group.unique()) for group in stored.view(-1, 32))
    assert 2 < levels <= 2**peer.bits
    assert bool((stored[:, ::2] == 0).all()) == (peer.kept < 4)
    assert torch.equal(linear(x), torch.nn.functional.linear(x, stored))


@pytest.fixture
def run(dense, text, tmp_path, monkeypatch):  # noqa: F811
    """``run(only, *arguments)``: the command on a tiny model; peers round to nearest in place of their packages."""
    calls = []

    def compress(_python, name, model, windows, output):
        calls.append(name)
        assert load_file(windows)["tokens"].shape == (4, 32)
        made = AutoModelForCausalLM.from_pretrained(model)
        for linear in made.model.modules():
            if isinstance(linear, torch.nn.Linear):
                linear.weight.data = rounded(linear.weight.data, FORMATS["W3"])
        made.save_pretrained(output)
        for path in model.glob("*token*"):
            (output / path.name).write_bytes(path.read_bytes())

    monkeypatch.setattr(peers, "install", lambda *_: "python")
    monkeypatch.setattr(peers, "compress", compress)
    monkeypatch.setattr(peers, "PEERS", dict.fromkeys(peers.PEERS, FORMATS["W3"]))

    def run(only, *arguments):
        status = command.main([
            "--model", str(dense("llama")), "--calibration", str(text), "--text", f"words={text}", "--contexts", "64",
            "--windows", "6", "--tokens", "320", "--samples", "4", "--context", "32", "--only", only,
            "--folder", str(tmp_path / "models"), "--results", str(tmp_path), *arguments,
        ])  # fmt: skip
        path = tmp_path / "accuracy-llama.json"
        return status, json.loads(path.read_text()) if path.exists() else None

    run.calls, run.folder = calls, tmp_path
    return run


def test_minutes_of_a_peer_are_its_own_whichever_row_made_it(run):
    for only in (r"W3 g64 \+ distillation", r"GPTQ W3 g64"):
        status, document = run(only)
        assert status == 0
    minutes = {row["method"]: row["minutes"] for row in document["rows"]}
    folder = run.folder / "models"
    assert 0 < minutes["GPTQ W3 g64"] == json.loads((folder / "peers" / "gptq-w3.minutes.json").read_text())["minutes"]
    trained = json.loads((folder / "w3-g64-distillation" / "minutes.json").read_text())["minutes"]
    assert 0 < minutes["W3 g64 + distillation"] == trained


def test_the_whole_command(run, capsys):
    only = r"dense|W4S50 G16|GPTQ W3 g64|W3 g64 \+ distillation"
    status, document = run(only)
    assert status == 0, capsys.readouterr().err
    rows = {row["method"]: row for row in document["rows"]}
    assert list(rows) == ["dense", "W4S50 G16", "GPTQ W3 g64", "W3 g64 + distillation"]
    assert run.calls == ["gptq-w3"]  # once, for two rows
    perplexities = {name: row["perplexity"] for name, row in rows.items()}
    assert all(math.isfinite(value) for value in perplexities.values())
    assert len(set(perplexities.values())) == 4
    assert [row["tokens_trained"] for row in rows.values()] == [0, 320, 0, 320]
    assert rows["W4S50 G16"]["bits_per_weight"] == pytest.approx(2.8, abs=0.3)  # small matrices have long indices
    assert (run.folder / "accuracy-llama.md").read_text() in capsys.readouterr().out
    assert (run.folder / "accuracy-llama.png").stat().st_size > 5000

    windows = [row["windows"] for row in run("dense", "--windows", "3")[1]["rows"] if row["method"] == "dense"]
    assert windows == [3, 6]  # what was measured before stays

    assert run(only)[1]["rows"][2:] == document["rows"][1:]  # nothing is made or measured again
    assert run.calls == ["gptq-w3"]
    other = run.folder / "other.txt"
    other.write_text("another text " * 400)
    measured = run("dense", "--text", f"words={other}", "--windows", "6")[1]["rows"][1]
    assert measured["windows"] == 6
    assert measured["perplexity"] != perplexities["dense"]  # of another file of the same name
    recipe = run.folder / "models" / "w4s50-g16" / "model" / "gqsa_recipe.yaml"
    recipe.write_text(recipe.read_text().replace("seed: 0", "seed: 1"))
    assert run("W4S50 G16")[0] == 1
    assert "was made by another recipe; remove" in capsys.readouterr().err
    made_of = (run.folder / "models" / "calibration.jsonl").read_text()
    for asked in (("--tokens", "640"), ("--calibration", str(other))):
        assert run(only, *asked)[0] == 1
        assert "holds models of another budget" in capsys.readouterr().err
    assert (run.folder / "models" / "calibration.jsonl").read_text() == made_of


def test_tasks_and_dtype(run):
    task = run.folder / "words.jsonl"
    lines = [{"query": "one two", "choices": ["three", "four five"], "gold": number % 2} for number in range(3)]
    task.write_text("".join(json.dumps(line) + "\n" for line in lines))
    status, document = run("dense", "--task", str(task), "--limit", "2", "--dtype", "bfloat16")
    assert status == 0
    assert [row["dtype"] for row in document["rows"]] == ["bfloat16"]
    (score,) = document["tasks"]
    assert (score["method"], score["task"], score["items"], score["dtype"]) == ("dense", "words", 2, "bfloat16")
    assert score["acc"] == 0.5  # the same choice for the same question, right once
    report = (run.folder / "accuracy-llama.md").read_text()
    assert "words (2 items, bfloat16)" in report
    assert "| dense | 16.00 | 50.0 ± 50.0 |" in report


def test_what_was_measured_before_there_was_a_dtype_is_measured_anew(run):
    assert run("dense")[0] == 0
    (found,) = (run.folder / "models" / "dense").glob("ppl-*.json")
    old = {key: value for key, value in json.loads(found.read_text()).items() if key != "dtype"}
    found.with_name("ppl-words-64-6.json").write_text(json.dumps(old))
    status, document = run("dense")
    assert (status, len(document["rows"])) == (0, 1)


def test_tasks_of_the_same_name_are_refused(run, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run("dense", "--task", str(tmp_path / "a" / "test.jsonl"), "--task", str(tmp_path / "b" / "test.jsonl"))
    assert "two files of --task have the same name" in capsys.readouterr().err


def test_results_of_another_form_are_refused(run, capsys):
    (run.folder / "accuracy-llama.json").write_text('{"methods": []}')
    assert run("dense")[0] == 1
    assert "accuracy-llama.json is not of this version's form" in capsys.readouterr().err


def test_a_method_that_is_not_there(run, capsys):
    assert run("W5") == (1, None)
    assert "--only W5: no method has such a name" in capsys.readouterr().err


def test_all_methods_calibrate_on_the_same_windows(dense, text):  # noqa: F811
    """Whatever they train on, and peers on the same: those of the first trained recipe."""
    model = DenseModel(str(dense("llama")))
    recipes = [row.recipe for row in methods(Budget(4000, 4, 32)) if row.recipe and "recipes" not in row.tables]
    jobs = [Job(model.folder, text, recipe, TextSource(str(text)), evaluation_windows=2) for recipe in recipes]
    calibration, training = zip(*(split_text(job, model)[:2] for job in jobs), strict=True)
    assert all(torch.equal(windows, calibration[0]) for windows in calibration)
    assert calibration[0].shape == (4, 32)
    assert len({len(windows) for windows in training}) > 2


def test_report_of_rows_with_different_scores(tmp_path):
    def rows(name, tables, **scores):
        facts = {"method": name, "tables": tables, "bits_per_weight": 2.57, "tokens_trained": 9, "minutes": 1.0}
        facts |= {"context": 64, "tokens": 63, "dtype": "float32", "calibration": f"of {name}"}
        return [facts | {"text": t, "perplexity": p} for t, p in scores.items()]

    a, b = rows("a", ["main", "scope"], wiki=20.0), rows("b", ["main", "scope", "stages"], wiki=30.0, web=40.0)
    document = {
        "model": "m", "date": "today", "versions": {"torch": "2"}, "budget": {"samples": 1, "context": 2, "tokens": 3},
        "calibration": "of a", "rows": a + b,
        "tasks": [{**a[0], "task": "piqa", "items": 8, "acc": 0.6, "acc_norm": 0.625, "acc_norm_stderr": 0.0171}],
    }  # fmt: skip
    lines = markdown(document).splitlines()
    assert "| a | 2.57 | 20.0 | – | 9 | 1 |" in lines
    assert "| b † | 2.57 | 30.0 | 40.0 | 9 | 1 |" in lines
    assert "† Not known to be made from the same text as the rest, in the same order." in lines
    assert "| a | 2.57 | 62.5 ± 1.7 |" in lines
    assert [line for line in lines if line.startswith("## ")] == ["## Main", "## Tasks", "## Scope"]
    plot(document, tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 5000
