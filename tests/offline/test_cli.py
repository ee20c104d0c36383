"""The command line as a user types it."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from rich.console import Console
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from tests.helpers import compress_randomly, make_dense
from vllm_gqsa.offline import cli
from vllm_gqsa.offline.cli import app, main

COMMANDS = ("compress", "estimate", "inspect", "verify", "eval")
SMALL = ("--recipe", "one-shot", "--pattern", "row", "--samples", "6", "--context", "48", "--eval-windows", "4")


def run(monkeypatch, capsys, *arguments):
    """Call ``gqsa`` in this process; returns exit code, stdout and stderr."""
    monkeypatch.setattr(sys, "argv", ["gqsa", *map(str, arguments)])
    code = 0
    try:
        main()
    except SystemExit as stop:
        code = stop.code or 0
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture(scope="module")
def checkpoint(dense, text, tmp_path_factory):
    output = tmp_path_factory.mktemp("cli") / "out"
    arguments = ["compress", str(dense("llama")), str(output), "--calibration", str(text), *SMALL, "--json"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert json.loads(result.stdout)["modules"] == 21
    return output


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_every_option_and_says_what_it_is_for(command):
    result = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    for line in result.stdout.splitlines():
        if line.startswith("│ --"):
            assert len(line.strip("│ ").split()) > 3, line


def test_help_does_not_wait_for_transformers():
    code = "import sys, vllm_gqsa.offline.cli; sys.exit('transformers' in sys.modules or 'vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_command_in_the_card_makes_the_same_checkpoint(checkpoint, monkeypatch, capsys):
    """Typed again it is recognised as the same run, so it holds every setting that counts."""
    command = json.loads((checkpoint / "gqsa_report.json").read_text())["command"].split()
    assert run(monkeypatch, capsys, *command[1:])[0] == 0


def test_all_settings_reach_the_card(dense, text, tmp_path, monkeypatch, capsys):
    settings = [
        "--sparsity", "0.25", "--group-size", "8", "--pattern", "matrix", "--importance", "wanda", "--damping", "0.05",
        "--samples", "5", "--context", "40", "--seed", "3", "--eval-windows", "2", "--batch", "3", "--no-compensate",
        "--ignore", "re:.*down_proj", "--lm-head", "0.125", "--recipe", "one-shot",
    ]  # fmt: skip
    code, out, _ = run(
        monkeypatch, capsys, "compress", dense("llama"), tmp_path / "out", "--calibration", text, *settings, "--json"
    )
    assert code == 0
    command = json.loads(out)["command"]
    for option, value in zip(settings, [*settings[1:], ""], strict=True):
        if option.startswith("--"):
            assert option + ("" if value.startswith("--") else f" {value}") in command.replace("'", "")
    assert run(monkeypatch, capsys, *command.replace("'", "").split()[1:])[0] == 0


def test_inspect_shows_modules_and_totals_and_draws(checkpoint, tmp_path, monkeypatch, capsys):
    code, out, _ = run(monkeypatch, capsys, "inspect", checkpoint, "--json", "--plot", tmp_path / "p.png")
    found = json.loads(out)
    assert code == 0
    assert len(found["modules"]) == 21
    assert found["modules"][0] == {
        "name": "model.layers.0.self_attn.q_proj", "out_features": 64, "in_features": 64, "group_size": 16,
        "nnz": 128, "sparsity": 0.5,
        "bits_per_weight": 8 * found["modules"][0]["bytes"] / 4096, "bytes": 4 * 65 + 64 + 128 * 10,
        "row_nnz_min": 2, "row_nnz_max": 2,
    }  # fmt: skip
    assert found["compressed_bytes"] == sum(m["bytes"] for m in found["modules"])
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr("vllm_gqsa.offline.cli._out", Console(width=150))
    assert "model.layers.0.self_attn.q_proj" in run(monkeypatch, capsys, "inspect", checkpoint)[1]


def test_verify_and_its_comparison(checkpoint, dense, monkeypatch, capsys):
    code, out, _ = run(monkeypatch, capsys, "verify", checkpoint, "--against", dense("llama"), "--json")
    found = json.loads(out)
    assert (code, found["valid"], found["modules"]) == (0, True, 21)
    assert found["against"]["twin_max_difference"] == 0 < found["against"]["dense_max_difference"]


def test_verify_refuses_to_compare_with_another_model(checkpoint, dense, monkeypatch, capsys):
    for other, says in ((dense("opt"), "its model_type is opt"), (checkpoint, "is quantised already")):
        code, _, err = run(monkeypatch, capsys, "verify", checkpoint, "--against", other)
        assert code == 2
        assert says in " ".join(err.split())


def test_verify_refuses_a_damaged_checkpoint(checkpoint, tmp_path, monkeypatch, capsys):
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    shard = copy / "model-00002-of-00004.safetensors"
    shard.write_bytes(shard.read_bytes()[:-40])
    code, out, err = run(monkeypatch, capsys, "verify", copy)
    assert (code, out) == (2, "")
    assert "model-00002-of-00004.safetensors: is not a complete safetensors file" in err
    assert "Traceback" not in err


def test_verify_refuses_a_checkpoint_without_a_dense_tensor(checkpoint, tmp_path, monkeypatch, capsys):
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    shard = copy / "model-00004-of-00004.safetensors"
    tensors = load_file(shard)
    del tensors["model.norm.weight"]
    save_file(tensors, shard)
    index = copy / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    del listed["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(listed))
    code, _, err = run(monkeypatch, capsys, "verify", copy)
    assert code == 2
    assert "tensor model.norm.weight, which the model needs, is missing" in err.replace("\n", " ")


def test_eval_prints_a_perplexity(checkpoint, text, monkeypatch, capsys):
    code, out, _ = run(
        monkeypatch, capsys, "eval", checkpoint, "--text", text, "--context", 32, "--max-windows", 2, "--json"
    )
    found = json.loads(out)
    assert code == 0
    assert (found["windows"], found["context"], found["tokens"]) == (2, 32, 62)


def test_eval_scores_tasks(checkpoint, tmp_path, monkeypatch, capsys):
    files = [tmp_path / "choices[1].jsonl", tmp_path / "continuations.jsonl"]
    files[0].write_text('{"query": "abc", "choices": ["de", "fgh"], "gold": 1}\n' * 3)
    files[1].write_text(json.dumps({"context": "abc " * 200, "continuation": "de"}))
    arguments = ["eval", checkpoint, "--task", files[0], "--task", files[1], "--limit", 2]
    code, out, err = run(monkeypatch, capsys, *arguments, "--json")
    choices, continuation = json.loads(out)["tasks"]
    assert code == 0
    assert (choices["task"], choices["items"], choices["acc_stderr"]) == (str(files[0]), 2, 0)
    assert {choices["acc"], choices["acc_norm"]} <= {0, 1}
    assert (continuation["items"], continuation["truncated"], continuation["acc_stderr"]) == (1, 1, None)
    assert "choices[1].jsonl: 4 of 4" in err
    code, out, _ = run(monkeypatch, capsys, *arguments)
    assert code == 0
    assert "choices[1].jsonl" in out
    assert f"{continuation['perplexity']:.4f}" in out
    assert "continuations.jsonl: 1 contexts, longer than the model takes, were cut at the left" in out


def test_vllm_measures_the_perplexity_that_transformers_does(tmp_path, tokenizer, text):
    """In processes of their own, as programs call it: stdout holds the JSON object and nothing else."""
    pytest.importorskip("vllm", reason="needs vLLM")
    # Heads of 32, the smallest that vLLM's attention takes on a CPU.
    checkpoint = compress_randomly(make_dense(tmp_path / "dense", vocab_size=300), tmp_path).checkpoint
    tokenizer.save_pretrained(checkpoint)
    found = {}
    for engine in ("transformers", "vllm"):
        command = [sys.executable, "-m", "vllm_gqsa.offline.cli", "eval", str(checkpoint), "--text", str(text)]
        options = ["--context", "32", "--max-windows", "3", "--engine", engine, "--json"]
        env = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        done = subprocess.run([*command, *options], env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        found[engine] = json.loads(done.stdout)["perplexity"]
    assert found["vllm"] == pytest.approx(found["transformers"], rel=1e-4)


def test_estimate_is_right_about_sizes(checkpoint, dense, monkeypatch, capsys):
    code, out, _ = run(monkeypatch, capsys, "estimate", dense("llama"), *SMALL[:8], "--json")
    costs, report = json.loads(out), json.loads((checkpoint / "gqsa_report.json").read_text())
    assert code == 0
    assert costs["bits_per_weight"] == pytest.approx(report["bits_per_weight"])
    # What differs are the headers of the files, a few hundred bytes a tensor.
    assert costs["output_bytes"] == pytest.approx(report["bytes"], abs=30_000)
    assert costs["disk_bytes"] > costs["output_bytes"]
    assert costs["modules"] == 21
    assert costs["seconds"] > 0


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_estimate_is_right_about_a_compressed_head(dense, family, text, tmp_path, monkeypatch, capsys):
    recipe = [*SMALL[:8], "--lm-head", "0", "--json"]
    _, costs, _ = run(monkeypatch, capsys, "estimate", dense(family), *recipe)
    arguments = [dense(family), tmp_path / "out", "--calibration", text, "--eval-windows", 2, *recipe]
    _, report, _ = run(monkeypatch, capsys, "compress", *arguments)
    costs, report = json.loads(costs), json.loads(report)
    assert costs["bits_per_weight"] == pytest.approx(report["bits_per_weight"])
    assert costs["output_bytes"] == pytest.approx(report["bytes"], abs=30_000)
    assert costs["modules"] == report["modules"] == 22


def test_estimate_counts_the_bytes_that_are_stored(dense, tmp_path, monkeypatch, capsys):
    """config.json may say another dtype than the files hold."""
    for path in dense("llama").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({name: t.bfloat16() for name, t in tensors.items()}, tmp_path / "model.safetensors")
    _, wide, _ = run(monkeypatch, capsys, "estimate", dense("llama"), *SMALL[:8], "--json")
    _, narrow, _ = run(monkeypatch, capsys, "estimate", tmp_path, *SMALL[:8], "--json")
    wide, narrow = json.loads(wide), json.loads(narrow)
    outside = wide["dense_bytes"] - 4 * wide["compressed_weights"]
    assert narrow["output_bytes"] == pytest.approx(wide["output_bytes"] - outside / 2, abs=20_000)


@pytest.mark.parametrize(("arguments", "says"), [
    (("compress", "{dense}", "{tmp}/o", "--calibration", "none.txt", "--context", "48"), "none.txt: no such file"),
    (("compress", "{dense}", "{tmp}/o", "--calibration", "{text}", "--group-size", "12"),
     "group_size 12 is not one of"),
    (("compress", "{dense}", "{tmp}/o", "--calibration", "{text}", "--pattern", "column"), "'column' is neither"),
    (("compress", "{dense}", "{tmp}/o", "--calibration", "{text}", "--pattern", "1:4", "--sparsity", "0.5"),
     "pattern 1:4 prunes 0.75 of the groups, sparsity says 0.5"),
    (("compress", "{dense}", "{tmp}/o", "--calibration", "{text}", "--sparsity", "1"), "--sparsity"),
    (("compress", "{dense}", "{tmp}/o", "--calibration", "{text}", "--device", "cuda:77"),
     "--device cuda:77: torch cannot compute there"),
    (("compress", "{dense}", "{tmp}/o", "--calibration", "{text}", "--context", "500"),
     "--context 500 is longer than the 128 positions of the model"),
    (("eval", "{dense}", "--text", "{text}"), "--context 2048 is longer than the 128 positions"),
    (("eval", "{dense}"), "takes either --text, for perplexity, or --task, for task sets"),
    (("eval", "{dense}", "--text", "{text}", "--task", "{text}"), "takes either --text"),
    (("eval", "{dense}", "--text", "{text}", "--limit", "3"), "--limit does not go with --text"),
    (("eval", "{dense}", "--task", "{text}", "--max-windows", "3"), "--max-windows does not go with --task"),
    (("eval", "{dense}", "--task", "{text}"), "text.txt: line 1 is not JSON"),
    (("estimate", "{dense}", "--lm-head", "1"), "--lm-head: Input should be less than 1"),
    (("estimate", "{dense}", "--lm-head", "0", "--ignore", "lm_head"), "ignore takes lm_head, which is to be"),
    (("estimate", "{dense}", "--ignore", "re:("), "ignore 're:(' is not a regular expression"),
    (("inspect", "{tmp}/[/x]"), "[/x]/config.json: no such file"),
    (("inspect", "{dense}"), "this is not a GQSA checkpoint"),
    (("verify", "{tmp}"), "config.json: no such file"),
    (("eval", "{tmp}", "--text", "{text}"), "has no config.json"),
])  # fmt: skip
def test_mistakes_get_one_sentence_and_exit_code_2(arguments, says, dense, text, tmp_path, monkeypatch, capsys):
    filled = [a.format(dense=dense("llama"), text=text, tmp=tmp_path) for a in arguments]
    code, out, err = run(monkeypatch, capsys, *filled)
    assert (code, out) == (2, "")
    assert says in " ".join(err.split())
    assert "Traceback" not in err
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(("silence", "lines"), [(60, ["0", "2", "4", "20"]), (-1, ["0", "1", "2", "3", "4", "20"])])
def test_a_log_gets_a_line_each_tenth_and_whenever_it_was_silent_for_long(silence, lines, monkeypatch, capsys):
    monkeypatch.setattr(cli, "_SILENCE", silence)
    with cli._progress() as report:
        for done in (0, 1, 2, 3, 4, 20):
            report("prune", done, 20)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("prune: ")]
    assert said == [f"prune: {done} of 20" for done in lines]
