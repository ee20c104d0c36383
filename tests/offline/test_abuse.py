"""What users get wrong, and what a machine lacks: one sentence, exit code 2, no traceback, nothing half-written."""

import gzip
import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from tests.fuzz.mutations import HOSTILE_VALUES
from tests.helpers import edit_json, edit_quantization, edit_tensors, quantization, sparse_model
from vllm_gqsa.offline.cli import main
from vllm_gqsa.offline.errors import InputError, missing_extra


@pytest.fixture
def gqsa(monkeypatch, capsys):
    """``gqsa(*arguments)``: exit code, stdout and stderr in one line."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["gqsa", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return code, captured.out, " ".join(captured.err.split())

    monkeypatch.setattr("vllm_gqsa.offline.estimate._gflops", lambda *_: 10.0)
    monkeypatch.setattr("vllm_gqsa.offline.estimate._copy_speed", lambda *_: 1e10)
    return run


@pytest.fixture
def model(dense, tmp_path):
    """A dense model of one's own to spoil."""
    return shutil.copytree(dense("llama"), tmp_path / "model")


TEXTS = {
    "latin.jsonl": ('{"text": "a"}\n{"text": "caf\u00e9"}\n'.encode("latin-1"), "is not UTF-8 text at line 2"),
    "plain.jsonl": (b"just words\n", "line 1 is not a JSON object with a key 'text'"),
    "deep.jsonl": (b"[" * 100_000 + b"\n", "line 1 is not a JSON object with a key 'text'"),
    "no.jsonl.gz": (b"not gzip at all", "is not UTF-8 text at line 0: Not a gzipped file"),
    "cut.jsonl.gz": (gzip.compress(b'{"text": "abc"}\n' * 9999)[:-40], "Compressed file ended before"),
    "bad.txt.gz": (gzip.compress(b"abc" * 9999)[:12] + b"\xff" * 50, "is not UTF-8 text"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_text_that_cannot_be_read(gqsa, dense, tmp_path, name):
    path = tmp_path / name
    path.write_bytes(TEXTS[name][0])
    code, _, err = gqsa("compress", dense("llama"), tmp_path / "out", "--calibration", path, "--context", 48)
    assert code == 2
    assert f"{name}: " in err
    assert TEXTS[name][1] in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("key", [
    "num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size", "hidden_act", "max_position_embeddings",
    "tie_word_embeddings", "rope_parameters", "model_type", "quantization_config",
])  # fmt: skip
def test_nonsense_in_a_dense_config(gqsa, model, key):
    for value in HOSTILE_VALUES:
        edit_json(model / "config.json", **{key: value})
        code, _, err = gqsa("estimate", model, "--context", 48)
        assert code in (0, 2), (key, value)
        assert code == 0 or err.startswith("error: "), (key, value, err)


def test_a_config_that_is_no_object(gqsa, model):
    (model / "config.json").write_text("[]")
    assert gqsa("estimate", model)[0] == 2


def test_an_output_below_a_file(gqsa, dense, text, tmp_path):
    (tmp_path / "file").write_text("")
    arguments = ("--calibration", text, "--samples", 2, "--context", 48)
    code, _, err = gqsa("compress", dense("llama"), tmp_path / "file" / "out", *arguments)
    assert (code, "file/out: the folder cannot be made: Not a directory" in err) == (2, True)


@pytest.mark.parametrize(("option", "value"), [("--seed", 2**70), ("--samples", 2**70), ("--context", 2**70)])
def test_numbers_beyond_any_use(gqsa, dense, text, tmp_path, option, value):
    code, _, err = gqsa("compress", dense("llama"), tmp_path / "out", "--calibration", text, option, value)
    assert code == 2
    assert f"{option}: Input should be less than" in err


def test_an_ignore_entry_that_matches_nothing(gqsa, dense):
    code, _, err = gqsa("estimate", dense("llama"), "--ignore", "re:.*no_such", "--context", 48)
    assert code == 2
    assert "--ignore re:.*no_such: matches no linear of the model; their names are like model.layers.0." in err
    assert gqsa("estimate", dense("llama"), "--ignore", "lm_head", "--context", 48)[0] == 0


def test_estimate_checks_the_context(gqsa, dense):
    code, _, err = gqsa("estimate", dense("llama"))
    assert (code, "--context 512 is longer than the 128 positions of the model" in err) == (2, True)


def test_estimate_of_a_file_larger_than_the_memory(gqsa, dense, model):
    from safetensors.torch import load_file

    size = sparse_model(model, load_file(model / "model.safetensors"))
    code, out, _ = gqsa("estimate", model, "--context", 48, "--json")
    whole = json.loads(gqsa("estimate", dense("llama"), "--context", 48, "--json")[1])
    assert (code, json.loads(out)["dense_bytes"] - whole["dense_bytes"]) == (0, pytest.approx(size, abs=1000))


@pytest.fixture
def llava(tmp_path):
    """A vision-language model, as far as anything looks at one here."""
    from transformers import LlavaConfig

    tensors = {"language_model.lm_head.weight": torch.zeros(4, 4)}
    LlavaConfig().save_pretrained(tmp_path / "llava")
    save_file(tensors, tmp_path / "llava" / "model.safetensors", {"format": "pt"})
    return tmp_path / "llava"


@pytest.mark.parametrize("command", ["compress", "estimate"])
def test_vision_language_models_are_not_compressed(gqsa, llava, text, tmp_path, command):
    rest = [tmp_path / "out", "--calibration", text] if command == "compress" else []
    code, _, err = gqsa(command, llava, *rest)
    assert (code, "model_type 'llava' is not supported; supported are llama," in err) == (2, True), err
    assert not (tmp_path / "out").exists()


def test_vision_language_models_are_not_verified(gqsa, llava):
    edit_json(llava / "config.json", quantization_config=quantization({}))
    code, _, err = gqsa("verify", llava)
    assert (code, "model_type 'llava' is no causal language model of text alone" in err) == (2, True), err


def test_estimate_downloads_no_weights(gqsa, dense, monkeypatch):
    """The hub as huggingface_hub shows it: names, and headers parsed by it from the file at hand."""
    import huggingface_hub
    from huggingface_hub.utils import SafetensorsFileMetadata, SafetensorsRepoMetadata, TensorInfo
    from safetensors import safe_open

    asked = []

    def snapshot(name, allow_patterns):
        asked.append((name, allow_patterns))
        return dense("llama")

    header = json.loads((dense("llama") / "model.safetensors").read_bytes()[8:].partition(b"}}")[0] + b"}}")
    metadata = header.pop("__metadata__")
    tensors = {n: TensorInfo(e["dtype"], e["shape"], tuple(e["data_offsets"])) for n, e in header.items()}
    weight_map = dict.fromkeys(tensors, "model.safetensors")
    found = SafetensorsRepoMetadata(
        metadata, False, weight_map, {"model.safetensors": SafetensorsFileMetadata(metadata, tensors)}
    )
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", lambda name: found)
    monkeypatch.setattr("vllm_gqsa.format.checkpoint.safe_open", lambda *_, **__: pytest.fail("weights were opened"))
    code, out, _ = gqsa("estimate", "some/model", "--context", 48, "--json")
    from_hub = json.loads(out)
    assert code == 0
    assert [name for name, _ in asked] == ["some/model"]
    assert not any("safetensors" in pattern for pattern in asked[0][1])
    monkeypatch.setattr("vllm_gqsa.format.checkpoint.safe_open", safe_open)
    from_folder = json.loads(gqsa("estimate", dense("llama"), "--context", 48, "--json")[1])
    for key in ("modules", "compressed_weights", "bits_per_weight", "peak_memory_bytes"):
        assert from_hub[key] == from_folder[key]
    # What differs is the header.
    assert from_hub["output_bytes"] == pytest.approx(from_folder["output_bytes"], abs=20_000)


def test_estimate_of_a_model_the_hub_does_not_give(gqsa, dense, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: dense("llama"))
    code, _, err = gqsa("estimate", "some/model", "--context", 48)
    assert (code, "some/model: its safetensors headers cannot be read from the hub" in err) == (2, True)


def test_verify_compares_modules_with_ignore(gqsa, tmp_path):
    from safetensors.torch import load_file

    from tests.helpers import compress_randomly, make_dense

    made = compress_randomly(make_dense(tmp_path / "dense"), tmp_path)
    up = "model.layers.1.mlp.up_proj"
    edit_quantization(made.checkpoint, ignore=["lm_head", up])
    code, _, err = gqsa("verify", made.checkpoint)
    assert (code, f"config.json: lists {up} in modules, and ignores it too" in err) == (2, True)
    config = json.loads((made.checkpoint / "config.json").read_text())["quantization_config"]
    del config["modules"][up]
    edit_quantization(made.checkpoint, ignore=["lm_head"], modules=config["modules"])
    weight = load_file(made.twin / "model.safetensors")[f"{up}.weight"]
    pieces = ("crow_indices", "group_mask", "qweight", "scale_zero")
    edit_tensors(made.checkpoint, remove=tuple(f"{up}.{p}" for p in pieces), **{f"{up}.weight": weight})
    code, _, err = gqsa("verify", made.checkpoint)
    assert (code, f"config.json: neither lists {up} in modules nor ignores it" in err) == (2, True)


@pytest.mark.parametrize("package", ["typer", "rich", "transformers", "datasets", "matplotlib"])
def test_without_the_extra(package, dense, tmp_path):
    """In a process of its own, in which the package is not there."""
    hide = f"import sys; sys.modules[{package!r}] = None; from vllm_gqsa.offline.__main__ import main; main()"
    command = ["compress", dense("llama"), tmp_path / "out", "--calibration", "some/dataset", "--context", "48"]
    done = subprocess.run([sys.executable, "-c", hide, *map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"{package} is not installed; in a clone of vllm-gqsa: pip install '.[offline]'" in " ".join(
        done.stderr.split()
    )
    assert "Traceback" not in done.stderr


def test_a_part_of_this_package_is_no_extra():
    with pytest.raises(ModuleNotFoundError):
        missing_extra(ModuleNotFoundError("no", name="vllm_gqsa.format.none"))
    assert isinstance(missing_extra(ModuleNotFoundError("no", name="typer")), InputError)
