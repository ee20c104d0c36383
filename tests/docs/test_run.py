"""What the documentation tells to type, typed, with a tiny random model in the place of every other.

What a recipe trains and calibrates on is cut to a few windows. ``test_docs.py`` checks what cannot be run.
"""

import json
import os
import random
import runpy
import shutil
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from benchmarks.demo.server import Server
from tests.docs.pages import PAGES, ROOT, code, commands
from tests.helpers import make_dense
from tests.plugin.models import TOKENS, train_adapter, write_tokenizer
from vllm_gqsa.format import CheckpointReader
from vllm_gqsa.offline.cli import app
from vllm_gqsa.offline.families import FAMILIES
from vllm_gqsa.offline.recipe import Recipe

HUB = ("Qwen/Qwen2.5-0.5B-Instruct",)
"""Models that no test downloads; my-model takes their place."""
CPU = {"OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}


def run(*arguments):
    return CliRunner().invoke(app, list(arguments), catch_exceptions=False)


def shorten(recipe):
    """The same stages on a few tokens."""
    stages = {name: stage.model_copy(update={"tokens": 128}) for name, stage in recipe.whole_model_stages().items()}
    if recipe.bqpo is not None:
        stages["bqpo"] = recipe.bqpo.model_copy(update={"epochs": 1})
    return recipe.model_copy(update={"samples": 4, "context": 64, **stages})


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Several are slower for models this small, much slower on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def short_recipes():
    read = Recipe.read
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recipe, "read", classmethod(lambda _, name: shorten(read(name))))
        yield


@pytest.fixture(scope="module")
def models(short_recipes, tmp_path_factory):
    """A folder with everything that the pages name: my-model, my-text.txt, my-checkpoint and so on."""
    folder = tmp_path_factory.mktemp("docs")
    make_dense(folder / "my-model", vocab_size=TOKENS, max_position_embeddings=2048, tie_word_embeddings=True)
    write_tokenizer(folder / "my-model")
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 7))) for _ in range(150)]
    lines = [" ".join(rng.choices(words, k=10)) for _ in range(100)]
    for name in ("my-text.txt", "other-text.txt"):
        (folder / name).write_text("\n".join(lines))
    (folder / "my-text.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines))
    rows = [{"query": line, "choices": rng.choices(words, k=4), "gold": 2} for line in lines]
    (folder / "my-task.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for text in (text for page in PAGES for text in code("yaml", page)):
        (folder / text.split()[1]).write_text(text)
    for name, importance in (("my-checkpoint", "obs"), ("my-checkpoint-2", "wanda")):
        arguments = ("--recipe", "one-shot", "--pattern", "row", "--importance", importance)
        text = str(folder / "my-text.txt")
        run("compress", str(folder / "my-model"), str(folder / name), "--calibration", text, *arguments)
    return folder


@pytest.fixture
def here(models, tmp_path, monkeypatch):
    """A copy of it, as the working directory."""
    monkeypatch.chdir(shutil.copytree(models, tmp_path / "here"))
    return Path.cwd()


def typed(page):
    """The lines for gqsa of a page that can be run anywhere."""
    return [each.words for each in commands(page) if each.words[0] == "gqsa" and not each.planned]


@pytest.mark.parametrize("page", [page for page in PAGES if typed(page)], ids=lambda page: page.name)
def test_gqsa(page, here):
    for words in typed(page):
        arguments = ["my-model" if word in HUB else word for word in words[1:]]
        if arguments[0] == "compress":
            shutil.rmtree(arguments[2], ignore_errors=True)
        assert run(*arguments).exit_code == 0, words
        assert (here / "my-checkpoint" / "config.json").exists()


@pytest.mark.slow
def test_torchrun(here):
    lines = [
        each.words for page in PAGES for each in commands(page) if each.words[0] == "torchrun" and not each.planned
    ]
    assert lines
    for words in lines:
        file, output = words[words.index("--recipe") + 1], words[words.index("compress") + 2]
        (here / file).write_text(Recipe.read(file).to_yaml())  # the short one: a process of its own knows no patch
        shutil.rmtree(output)
        subprocess.run([str(Path(sys.executable).with_name("torchrun")), *words[1:]], check=True)
        assert CheckpointReader(here / output).config.modules


def snippets(*, vllm):
    """Python code of all pages that needs no server: with vLLM, or without."""
    texts = [(page, text) for page in PAGES for text in code("python", page)]
    pairs = [(page, text) for page, text in texts if "from openai import" not in text]
    found = [(page, text) for page, text in pairs if ("from vllm import" in text) == vllm]
    return pytest.mark.parametrize("text", [text for _, text in found], ids=[page.name for page, _ in found])


@snippets(vllm=False)
def test_snippet(text, here):
    (here / "snippet.py").write_text(text)
    names = runpy.run_path("snippet.py", run_name="__main__")
    if "family" in names:
        assert names["family"] == FAMILIES["opt"]
    if "requantise" in names:
        assert run("verify", "my-checkpoint-3").exit_code == 0
        modules = [CheckpointReader(here / name).config.modules for name in ("my-checkpoint", "my-checkpoint-3")]
        assert modules[0] == modules[1]


@pytest.fixture
def adapter(here):
    train_adapter(here / "my-model", here / "trained")
    return (here / "trained" / "adapter").rename(here / "my-adapter")


@pytest.mark.slow
@snippets(vllm=True)
def test_snippet_with_vllm(text, here, adapter):
    (here / "snippet.py").write_text(text)
    done = subprocess.run(
        [sys.executable, "snippet.py"], env={**os.environ, **CPU}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip()


@pytest.mark.slow
def test_reload_with_a_dense_head_of_its_own(short_recipes, here):
    """Such a head stands between other names of its file, so that vLLM begins to load the inner model twice."""
    make_dense(here / "untied", vocab_size=TOKENS)
    write_tokenizer(here / "untied")
    shutil.rmtree("my-checkpoint")
    run("compress", "untied", "my-checkpoint", "--calibration", "my-text.txt", "--recipe", "one-shot")
    lines = (
        "from vllm import LLM",
        "if __name__ == '__main__':",
        "    llm = LLM('my-checkpoint', enforce_eager=True)",
        "    llm.collective_rpc('reload_weights', kwargs={'weights_path': 'my-checkpoint'})",
    )
    (here / "snippet.py").write_text("\n".join(lines))
    done = subprocess.run(
        [sys.executable, "snippet.py"], env={**os.environ, **CPU}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_lm_eval_with_vllm_gives_what_gqsa_eval_does(here):
    """Run with lm-eval 0.4.13, which is no requirement of this project: pip install lm-eval."""
    pytest.importorskip("lm_eval", reason="needs lm-eval")
    (command,) = (each for each in commands(ROOT / "docs" / "evaluate.md") if each.words[0] == "lm_eval")
    done = subprocess.run(
        [sys.executable, "-m", *command.words, "--output_path", "scores"],
        env={**os.environ, **CPU, **command.environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (written,) = here.glob("scores/**/*.json")
    theirs = json.loads(written.read_text())["results"]["my-task"]
    (ours,) = json.loads(run("eval", "my-checkpoint", "--task", "my-task.jsonl", "--json").stdout)["tasks"]
    for name in ("acc", "acc_norm"):
        # One close call of the hundred may go the other way.
        assert ours[name] == pytest.approx(theirs[f"{name},none"], abs=0.011)


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [ROOT / "docs" / f"{name}.md" for name in ("quickstart", "serve", "adapters-and-reload")]
)
def test_serve_and_ask(page, here, adapter, monkeypatch):
    """Every server of a page, and the requests that stand below it, down to the next."""
    with ExitStack() as running:
        server, asked = None, 0
        for command in commands(page):
            words = command.words
            if words[:2] == ["vllm", "serve"] and not command.planned:
                running.close()
                for name, value in {**CPU, **command.environment}.items():
                    monkeypatch.setenv(name, value)
                vllm = str(Path(sys.executable).with_name("vllm"))
                server = running.enter_context(Server([vllm, *words[1:], "--enforce-eager"], here / "log", print))
            elif words[0] == "curl":
                assert server is not None
                words = [word.replace("http://localhost:8000", server.url) for word in words]
                done = subprocess.run([*words, "--fail-with-body"], capture_output=True, text=True, check=False)
                assert done.returncode == 0, (words, done.stdout)
                asked += 1
        assert asked
        assert server is not None
        for text in code("python", page):
            if "from openai import" in text:
                (here / "client.py").write_text(text.replace("http://localhost:8000", server.url))
                done = subprocess.run([sys.executable, "client.py"], capture_output=True, text=True, check=False)
                assert done.returncode == 0, done.stderr
                assert done.stdout.strip()
