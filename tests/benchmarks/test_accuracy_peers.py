"""The methods that others measure themselves by: what their bits are, what stops them, and what they leave."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.accuracy import peers
from benchmarks.accuracy.peer_worker import check_weight, read_windows
from benchmarks.errors import BenchmarkError
from tests.helpers import make_dense

ROOT = Path(__file__).resolve().parents[2]


# -- bits --------------------------------------------------------------------------------------------------


def stored_bits(peer):
    """Bits of one group, thing by thing."""
    kept = peer.group_size * peer.kept // 4
    places = 2 * kept if peer.kept < 4 else 0
    return kept * peer.bits + places + 16 + peer.bits


def test_bits_per_weight_count_codes_places_scales_and_zero_points():
    bits = {name: peer.bits_per_weight for name, peer in peers.PEERS.items()}
    assert bits["sparsegpt-2of4-int4"] == 3.3125
    assert bits["gptq-w3"] == bits["autoround-w3"] == 3.296875
    assert bits["gptq-w2"] == bits["autoround-w2"] == 2.28125
    for name, peer in peers.PEERS.items():
        assert bits[name] == stored_bits(peer) / peer.group_size
        assert peer.package in peers.VERSIONS


# -- what stops them ---------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path):
    (tmp_path / "dense").mkdir()
    (tmp_path / "dense" / "config.json").write_text("{}")
    return tmp_path / "dense"


@pytest.fixture
def windows(tmp_path):
    save_file({"tokens": torch.zeros(2, 4, dtype=torch.int64)}, tmp_path / "windows.safetensors")
    return tmp_path / "windows.safetensors"


def test_what_is_asked_for_must_be_there(tmp_path, model, windows):
    output, nothing = tmp_path / "out", tmp_path / "nothing"
    with pytest.raises(BenchmarkError, match=r"no peer awq-w4; those there are: sparsegpt-2of4-int4, gptq-w3"):
        peers.compress(Path("python"), "awq-w4", model, windows, output)
    with pytest.raises(BenchmarkError, match=r"nothing/config.json is not there"):
        peers.compress(Path("python"), "gptq-w3", nothing, windows, output)
    with pytest.raises(BenchmarkError, match=r"nothing is not there"):
        peers.compress(Path("python"), "gptq-w3", model, nothing, output)
    output.mkdir()
    with pytest.raises(BenchmarkError, match=r"out is there already"):
        peers.compress(Path("python"), "gptq-w3", model, windows, output)


@pytest.mark.parametrize(
    "tensors",
    [
        {"ids": torch.zeros(2, 4, dtype=torch.int64)},
        {"tokens": torch.zeros(2, 4, dtype=torch.int32)},
        {"tokens": torch.zeros(8, dtype=torch.int64)},
    ],
)
def test_windows_of_another_kind_are_refused(tensors, tmp_path):
    save_file(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(ValueError, match=r"bad.safetensors must hold one tensor `tokens`, int64"):
        read_windows(tmp_path / "bad.safetensors")


def test_worker_that_fails_is_one_sentence_and_leaves_nothing(tmp_path, model):
    bad = tmp_path / "bad.safetensors"
    save_file({"ids": torch.zeros(2)}, bad)
    with pytest.raises(BenchmarkError, match=r"GPTQ W3 died: ValueError: .*bad.safetensors must hold.*out.log"):
        peers.compress(Path(sys.executable), "gptq-w3", model, bad, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_environment_that_cannot_be_made_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(peers.subprocess, "call", lambda *arguments, **settings: 1)
    with pytest.raises(BenchmarkError, match=r"llmcompressor 0.12.0.2 and auto-round .* see .*venv.log"):
        peers.install(tmp_path / "venv", lambda text: None)


def test_packages_are_installed_beside_the_torch_that_is_there(monkeypatch):
    lines = {
        "llmcompressor": ["loguru<=0.7.3", "torch<=2.12.0,>=2.10.0", "auto-round<=0.13.0", 'ruff; extra == "dev"'],
        "auto-round": ["py-cpuinfo", "torch"],
    }
    calls = []
    monkeypatch.setattr(peers, "install_torch", lambda: calls.append("torch"))
    monkeypatch.setattr(peers, "pip", lambda *arguments: calls.append(arguments))
    monkeypatch.setattr(peers.metadata, "requires", lines.get)
    peers.install_packages()
    torch_first, packages, needed = calls
    assert torch_first == "torch"
    assert packages == ("--no-deps", "llmcompressor==0.12.0.2", "auto-round==0.16.1")
    assert needed == (f"torch=={peers.TORCH}", "loguru<=0.7.3", "py-cpuinfo")


# -- what they leave ---------------------------------------------------------------------------------------


def test_weights_that_are_not_what_is_counted_are_refused():
    weight = torch.tensor([[0.0, 1.0, 0.0, 2.0, 0.0, 0.0, 3.0, 1.0]])
    check_weight("m", weight, bits=2, group_size=8, kept=2)
    with pytest.raises(ValueError, match=r"m keeps 2 of four weights, not 1"):
        check_weight("m", weight, bits=2, group_size=8, kept=1)
    with pytest.raises(ValueError, match=r"m has 4 values in a group of 8, more than 1 bits hold"):
        check_weight("m", weight, bits=1, group_size=8, kept=2)
    with pytest.raises(ValueError, match=r"m has weights that are not finite"):
        check_weight("m", weight / 0, bits=2, group_size=8, kept=2)


@pytest.fixture(scope="module")
def python():
    """Of the environment that `make accuracy` uses; made where it is not there yet."""
    return peers.install(ROOT / "build" / "accuracy" / "peers-venv", print)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    folder = make_dense(tmp_path_factory.mktemp("peers") / "dense", "llama")
    words = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", peers.PEERS)
def test_peer_leaves_a_dense_model_of_its_kind(name, python, dense, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokens = torch.randint(0, 256, (8, 64), generator=torch.Generator().manual_seed(0))
    save_file({"tokens": tokens}, tmp_path / "windows.safetensors")
    output = tmp_path / "out"
    assert peers.compress(python, name, dense, tmp_path / "windows.safetensors", output, iterations=3) > 0

    before, after = (load_file(folder / "model.safetensors") for folder in (dense, output))
    assert before.keys() == after.keys()
    peer = peers.PEERS[name]
    for key, weight in after.items():
        if not key.endswith("_proj.weight"):
            assert torch.equal(weight, before[key].float()), key
            continue
        values = max(len(set(group.tolist())) for group in weight.reshape(-1, peer.group_size))
        assert 2 ** (peer.bits - 1) < values <= 2**peer.bits, key
        zeros = (weight.reshape(-1, 4) == 0).sum(1)
        assert (zeros >= 4 - peer.kept).all(), key
        assert 0 < (weight - before[key]).norm() < before[key].norm(), key
    AutoTokenizer.from_pretrained(output)
    logits = AutoModelForCausalLM.from_pretrained(output)(tokens[:1]).logits
    assert logits.isfinite().all()
