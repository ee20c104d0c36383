"""``register()`` never raises, whatever is broken, and what is broken is said when a checkpoint is loaded."""

import json
import subprocess
import sys
from importlib.metadata import entry_points

import pytest

import vllm_gqsa

vllm = pytest.importorskip("vllm", reason="needs vLLM")

# One process for all cases, since importing vLLM takes seconds. Each case breaks one import, registers twice and
# uses the method as vLLM does.
CHILD = """
import importlib, io, json, logging, sys
import vllm.model_executor.layers.quantization as quantization

class Finder:
    broken, error = None, None
    def find_spec(self, name, path=None, target=None):
        if name == self.broken:
            raise self.error
finder = Finder()
sys.meta_path.insert(0, finder)
log = io.StringIO()
logging.getLogger("vllm_gqsa").addHandler(logging.StreamHandler(log))

def case(broken, error):
    for name in list(sys.modules):
        if name.split(".")[0] == "vllm_gqsa" or name == broken:
            del sys.modules[name]
    quantization._CUSTOMIZED_METHOD_TO_QUANT_CONFIG.pop("gqsa", None)
    finder.broken, finder.error = broken, error
    log.seek(0); log.truncate()
    package = importlib.import_module("vllm_gqsa")
    package.register()
    package.register()
    finder.broken = broken if broken == "vllm_gqsa.plugin.linear" else None
    config = quantization._CUSTOMIZED_METHOD_TO_QUANT_CONFIG.get("gqsa")
    said = []
    for make in (lambda: config.from_config({}), config) if config else ():
        try:
            make()
        except Exception as problem:
            said.append(f"{type(problem).__name__}: {problem}")
    assert config is None or config.override_quantization_method({"quant_method": "fp8"}, None) is None
    return {"config": config and config.__name__, "said": said, "log": log.getvalue()}

print(json.dumps({
    "config": case("vllm_gqsa.plugin.config", SyntaxError("invalid syntax (config.py, line 3)")),
    "pydantic": case("vllm_gqsa.format.schema", ModuleNotFoundError("No module named 'pydantic'")),
    "format": case("vllm_gqsa.format", MemoryError("no room")),
    "linear": case("vllm_gqsa.plugin.linear", SyntaxError("bad")),
    "amx": case("vllm_gqsa.plugin.amx", ImportError("gone")),
    "registration": case("vllm_gqsa.plugin.registration", ImportError("gone")),
    "whole": case(None, None),
    "vllm": case("vllm.model_executor.layers.quantization", ImportError("gone")),
}))
"""


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def cases():
    return json.loads(run(CHILD))


def test_entry_point_is_installed():
    found = {point.name: point.value for point in entry_points(group="vllm.general_plugins")}
    if "gqsa" not in found:
        pytest.skip("vllm-gqsa is not installed, only on the path")
    assert found["gqsa"] == "vllm_gqsa:register"


def test_importing_the_package_is_cheap():
    out = run("import sys, vllm_gqsa; print('HEAVY', sorted({'torch', 'vllm', 'pydantic'} & set(sys.modules)))")
    assert "HEAVY []" in out


@pytest.mark.parametrize(
    ("broken", "cause"),
    [
        ("config", "SyntaxError: invalid syntax (config.py, line 3)"),
        ("pydantic", "ModuleNotFoundError: No module named 'pydantic'"),
        ("format", "MemoryError: no room"),
    ],
)
def test_half_broken_package(cases, broken, cause):
    sentence = f"ImportError: vllm-gqsa is installed but cannot be imported ({cause}); reinstall vllm-gqsa"
    assert len(cases[broken]["said"]) == 2
    assert all(said.startswith(sentence) for said in cases[broken]["said"])


def test_broken_linear_method_is_said_when_the_config_is_read(cases):
    assert cases["linear"]["config"] == "GqsaQuantizationConfig"
    assert cases["linear"]["said"] == ["SyntaxError: bad"]


@pytest.mark.parametrize("broken", ["registration", "vllm"])
def test_nothing_can_be_registered(cases, broken):
    assert cases[broken]["config"] is None
    assert "could not register with vLLM" in cases[broken]["log"]
    assert "gone" in cases[broken]["log"]


def test_broken_amx_does_not_matter(cases):
    assert cases["amx"]["config"] == "GqsaQuantizationConfig"
    assert "could not ask the kernel for AMX" in cases["amx"]["log"]


def test_whole_package_says_nothing(cases):
    assert cases["whole"]["config"] == "GqsaQuantizationConfig"
    assert cases["whole"]["log"] == ""


@pytest.mark.parametrize(
    ("version", "warns"),
    [
        ("0.32.0+cpu", False),
        ("0.32.3", False),
        ("0.29.0", False),
        ("0.28.1", True),
        ("0.33.0", True),
        ("1.0", True),
        ("dev", True),
    ],
)
def test_untested_versions_warn(version, warns, monkeypatch, caplog):
    from vllm_gqsa.plugin import registration

    monkeypatch.setattr(vllm, "__version__", version)
    registration._warn_if_untested()
    assert (f"this is {version} and may or may not work" in caplog.text) == warns
    caplog.clear()
    monkeypatch.setattr("multiprocessing.parent_process", lambda: "vLLM's first process")
    registration._warn_if_untested()
    assert not caplog.text


def test_version_is_the_distribution_version():
    from importlib.metadata import PackageNotFoundError, version

    try:
        assert version("vllm-gqsa") == vllm_gqsa.__version__
    except PackageNotFoundError:
        pytest.skip("vllm-gqsa is not installed, only on the path")


@pytest.mark.parametrize(
    ("is_cpu", "supported", "granted", "asked"),
    [(True, True, True, 1), (True, True, False, 1), (True, False, True, 0), (False, True, True, 0)],
)
def test_amx_is_asked_for_only_where_it_is_used(is_cpu, supported, granted, asked, monkeypatch):
    import torch
    from vllm import platforms

    from vllm_gqsa.plugin.amx import request_amx

    calls = []
    monkeypatch.setattr(type(platforms.current_platform), "is_cpu", lambda self: is_cpu)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: supported, raising=False)
    monkeypatch.setattr(torch.cpu, "_init_amx", lambda: calls.append(1) or granted, raising=False)
    assert request_amx() == bool(asked and granted)
    assert len(calls) == asked
