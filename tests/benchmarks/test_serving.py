"""The serving benchmark: with a stand-in for vLLM, and, slow, with vLLM itself on the CPU."""

import json
import subprocess
from pathlib import Path

import pytest

from benchmarks.serving import __main__ as command, models, report
from vllm_gqsa.format import GqsaConfig, GroupSparseMatrix


def vllm(monkeypatch, answer):
    """Stand in for the process of vLLM: ``answer`` gets its command and log, and returns its status."""
    commands = []

    def run(arguments, stdout, **settings):
        commands.append(arguments)
        return subprocess.CompletedProcess(arguments, answer(arguments, stdout))

    monkeypatch.setattr(command.subprocess, "run", run)
    monkeypatch.setattr(command, "versions", lambda: {"vllm": "0.32.0", "torch": "2.13.0"})
    monkeypatch.setattr(command, "_device", lambda: "Some GPU")
    return commands


def good(arguments, log):
    """Three seconds a batch of FP16, two otherwise."""
    log.write("INFO Model loading took 15.25 GiB memory and 3.0 seconds\n")
    seconds = 3.0 if arguments[arguments.index("--model") + 1].endswith("dense") else 2.0
    result = {"avg_latency": seconds, "elapsed_time": seconds, "requests_per_second": 10 / seconds}
    Path(arguments[arguments.index("--output-json") + 1]).write_text(json.dumps(result))
    return 0


def main(tmp_path, *arguments):
    places = ["--folder", str(tmp_path / "models"), "--results", str(tmp_path)]
    status = command.main(["--models", "tiny", *places, *arguments])
    path = tmp_path / "serving-some-gpu.json"
    return status, json.loads(path.read_text()) if path.exists() else None


def test_a_run(tmp_path, monkeypatch, capsys):
    commands = vllm(monkeypatch, good)
    status, document = main(tmp_path, "--batches", "4", "1", "--output-len", "20", "--", "--enforce-eager")
    assert status == 0
    assert [(row["form"], row["measured"], row["batch"]) for row in document["rows"][:3]] == [
        ("dense", "latency", 1), ("dense", "latency", 4), ("dense", "throughput", None),
    ]  # fmt: skip
    assert len(commands) == 9
    assert all(each[-1] == "--enforce-eager" for each in commands)
    assert commands[0][3:5] == ["bench", "latency"]
    assert commands[2][3:5] == ["bench", "throughput"]
    assert "--input-len" in commands[0]
    assert "--random-input-len" in commands[2]
    latency = document["rows"][7]
    assert (latency["form"], latency["tokens_per_second"], latency["ms_a_token"]) == ("gqsa", 40, 100)
    text = capsys.readouterr().out
    assert "| tiny | GQSA S50 | latency | 4 | 2.00 | 100.00 | 40.0 | 1.50 | 1.00 | 15.25 |" in text
    assert "| tiny | GQSA S50 | throughput | – | 2.00 | – | 100.0 | 1.50 | 1.00 | 15.25 |" in text
    assert text.strip() == (tmp_path / "serving-some-gpu.md").read_text().strip()


def test_what_does_not_fit_is_a_row_and_the_rest_goes_on(tmp_path, monkeypatch, capsys):
    def answer(arguments, log):
        if not arguments[arguments.index("--model") + 1].endswith("dense"):
            return good(arguments, log)
        log.write("torch.OutOfMemoryError: CUDA out of memory. Tried to | allocate\nsome more\n")
        return 1

    commands = vllm(monkeypatch, answer)
    status, _ = main(tmp_path, "--batches", "1", "4", "--forms", "dense", "gqsa")
    assert status == 0
    assert len(commands) == 1 + 3
    text = capsys.readouterr().out
    assert (
        "| tiny | FP16 | latency, batch 1 | status 1: torch.OutOfMemoryError: CUDA out of memory. Tried to / " in text
    )
    assert "| tiny | FP16 | throughput | not tried: status 1" in text
    assert "| tiny | GQSA S50 | latency | 1 | 2.00 |" in text


def test_nothing_measured_is_a_failure(tmp_path, monkeypatch):
    vllm(monkeypatch, lambda arguments, log: 3)
    status, document = main(tmp_path, "--batches", "1")
    assert status == 1
    assert document["rows"][0]["failed"].startswith("status 3: ")


def test_a_run_that_hangs_is_a_row(tmp_path, monkeypatch):
    def answer(arguments, log):
        raise subprocess.TimeoutExpired(arguments, 5)

    vllm(monkeypatch, answer)
    _, document = main(tmp_path, "--batches", "1", "--timeout", "5")
    assert document["rows"][0]["failed"].startswith("not done after 5 s (log: ")


def test_without_vllm_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "versions", dict)
    assert command.main(["--results", str(tmp_path)]) == 1
    assert "vLLM is not installed" in capsys.readouterr().err


def test_models_are_of_their_names_sizes():
    for name, billions in (("8B", 8.03), ("70B", 70.6)):
        from benchmarks.dummy import linear_sizes

        config = models.MODELS[name]
        linears = config["num_hidden_layers"] * sum(n * k for n, k in linear_sizes(config))
        assert linears + 2 * config["vocab_size"] * config["hidden_size"] == pytest.approx(billions * 1e9, rel=0.01)


def test_folders(tmp_path):
    from transformers import AutoTokenizer

    folders = models.write_models(tmp_path, models.TINY)
    assert set(folders) == set(models.FORMS)
    config = json.loads((folders["gqsa"] / "config.json").read_text())
    parsed = GqsaConfig.parse(config["quantization_config"], "config.json")
    assert parsed.modules["model.layers.1.mlp.down_proj"].nnz == GroupSparseMatrix.synthesize(256, 512).nnz
    tokenizer = AutoTokenizer.from_pretrained(folders["int4"])
    assert len(tokenizer) == models.TINY["vocab_size"]
    assert tokenizer.encode(tokenizer.decode([7, 9999, 12])) == [7, 9999, 12]


def test_ratios_are_of_the_same_batch():
    base = {"model": "8B", "measured": "latency", "seconds": 1.0, "ms_a_token": 1.0, "gib": None}
    rows = [
        {**base, "form": "dense", "batch": 1, "tokens_per_second": 10.0},
        {**base, "form": "gqsa", "batch": 1, "tokens_per_second": 30.0},
        {**base, "form": "gqsa", "batch": 4, "tokens_per_second": 90.0},
    ]
    assert report._cells(rows[1], rows)[7:9] == ["3.00", "–"]
    assert report._cells(rows[2], rows)[7:9] == ["–", "–"]


@pytest.mark.slow
def test_vllms_own_benchmarks(tmp_path, monkeypatch):
    pytest.importorskip("vllm")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    status = command.main([
        "--models", "tiny", "--forms", "gqsa", "--batches", "2", "--input-len", "16", "--output-len", "8",
        "--iterations", "1", "--warm-up", "1", "--prompts", "4", "--folder", str(tmp_path / "models"),
        "--results", str(tmp_path), "--", "--enforce-eager",
    ])  # fmt: skip
    assert status == 0
    (path,) = tmp_path.glob("serving-*.json")
    rows = json.loads(path.read_text())["rows"]
    assert [row.get("failed") for row in rows] == [None] * 2
    assert all(row["tokens_per_second"] > 0 for row in rows)
