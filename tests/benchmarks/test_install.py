"""The setup script, without installing anything."""

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from benchmarks.demo import install


def test_old_python_is_one_sentence():
    with pytest.raises(install.SetupError, match=r"Python 3\.10 is too old, 3\.11 or later"):
        install.check_python((3, 10))
    install.check_python((3, 11))
    install.check_python((3, 14))


def test_script_parses_on_an_old_python():
    # The version message can only appear if an old Python gets as far as running it.
    import ast

    ast.parse(Path(install.__file__).read_text(encoding="utf-8"), feature_version=(3, 8))


@pytest.mark.parametrize(
    "requirement",
    [
        'torch==2.13.0+cpu; platform_machine == "x86_64"',
        'torchaudio; platform_machine != "s390x"',
        "torchvision",
        "torchcodec>=0.14",
        'pandas; extra == "bench"',
        'intel-openmp==2024.2.1; platform_machine == "x86_64" and extra == "omp"',
    ],
)
def test_requirements_left_out(requirement):
    assert install.kept_requirements([requirement]) == []


@pytest.mark.parametrize(
    "requirement",
    ["regex", "torchmetrics", "fastapi[standard]<0.137.0,>=0.133.0", 'py-cpuinfo; platform_machine == "aarch64"'],
)
def test_requirements_kept_as_they_are(requirement):
    assert install.kept_requirements([requirement]) == [requirement]


@pytest.mark.parametrize(("options", "version"), [([], install.VLLM_CPU), (["--vllm", "0.29.0"], "0.29.0")])
def test_version_of_vllm_reaches_the_second_process(options, version, monkeypatch, tmp_path):
    commands = []
    monkeypatch.setattr(install, "make_environment", lambda folder: Path("python"))
    monkeypatch.setattr(install.subprocess, "call", lambda command: commands.append(command) or 0)
    assert install.main([str(tmp_path), *options]) == 0
    installed = []
    monkeypatch.setattr(install, "install", installed.append)
    assert install.main(commands[0][2:]) == 0
    assert installed == [version]


def test_metadata_of_vllm_can_be_read_and_is_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(install, "installed", lambda name: None)
    install.write_vllm_metadata(tmp_path, "0.32.0")
    (found,) = metadata.distributions(path=[str(tmp_path)])
    assert (found.name, found.version) == ("vllm", "0.32.0+cpu")
    files = {str(path) for path in found.files}
    assert files == {f"{path.parent.name}/{path.name}" for path in tmp_path.glob("*/*")}


def test_metadata_of_a_real_vllm_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(install, "installed", lambda name: "0.33.0")
    install.write_vllm_metadata(tmp_path, "0.32.0")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("present", "reachable", "expected"),
    [
        ("2.13.0+cpu", True, []),
        ("2.13.0", False, []),
        (None, False, [("torch==2.13.0",)]),
        (None, True, [("torch==2.13.0", "--index-url", install.CPU_INDEX)]),
        ("2.12.1+cpu", False, [("torch==2.13.0",)]),
    ],
)
def test_torch_comes_from_the_cpu_index_where_it_answers(monkeypatch, present, reachable, expected):
    calls = []
    monkeypatch.setattr(install, "installed", lambda name: present)
    monkeypatch.setattr(install, "answers", lambda url: reachable)
    monkeypatch.setattr(install, "pip", lambda *arguments: calls.append(arguments))
    install.install_torch()
    assert calls == expected


def test_nothing_answers_on_a_closed_port():
    assert not install.answers("http://127.0.0.1:9/", seconds=1)


def test_pip_is_tried_three_times_then_says_so(monkeypatch):
    statuses = iter([1, 1, 1])
    monkeypatch.setattr(subprocess, "call", lambda command: next(statuses))
    monkeypatch.setattr(install.time, "sleep", lambda seconds: None)
    with pytest.raises(install.SetupError, match=r"pip install nonsense==1 failed 3 times"):
        install.pip("nonsense==1")
    assert next(statuses, None) is None


def test_pip_succeeds_on_a_second_attempt(monkeypatch):
    statuses = iter([1, 0])
    monkeypatch.setattr(subprocess, "call", lambda command: next(statuses))
    monkeypatch.setattr(install.time, "sleep", lambda seconds: None)
    install.pip("something")


def test_missing_venv_module_is_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(install.importlib.util, "find_spec", lambda name: None)
    assert install.main([str(tmp_path / "env")]) == 1
    assert "apt-get install python3-venv" in capsys.readouterr().err


def test_an_environment_that_works_is_kept(tmp_path):
    # A folder whose bin/python runs: the interpreter of these tests, by a script.
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    assert install.make_environment(tmp_path) == python
    assert python.read_text().startswith("#!/bin/sh")
