"""The documentation keeps its word: commands parse, links lead somewhere, sentences are said by the code."""

import ast
import importlib.util
import json
import re
import shlex
import tomllib
from urllib.parse import urlsplit

import pytest
from torch.distributed.run import get_args_parser
from typer.main import get_command

from benchmarks.accuracy import __main__ as accuracy
from tests.docs.pages import PAGES, ROOT, code, commands, inline_code, links
from vllm_gqsa.offline.cli import app
from vllm_gqsa.offline.recipe import NAMED

COMMANDS = [command for page in PAGES for command in commands(page)]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
NEVER_RUN = re.compile(r"cuda|\bray\b|70B|--pipeline-parallel-size|--nnodes")
"""What is in commands that need what nobody here has."""


def of(*programs):
    """Parameters: the commands of some programs."""
    found = [command for command in COMMANDS if command.words[0].removeprefix(".venv/bin/") in programs]
    assert found
    return pytest.mark.parametrize("command", found, ids=str)


def test_every_program_is_known():
    known = {"gqsa", "torchrun", "vllm", "make", "python", "pip", "curl", "ray", "lm_eval", "git", "cd", "source"}
    assert {command.words[0].removeprefix(".venv/bin/") for command in COMMANDS} <= known


@of("gqsa")
def test_gqsa_takes_the_command(command):
    _, name, *arguments = ("cpu" if word == "cuda" else word for word in command.words)
    get_command(app).commands[name].make_context(name, arguments)


@of("torchrun")
def test_torchrun_and_gqsa_take_the_command(command):
    options = get_args_parser().parse_args(command.words[1:])
    assert options.module
    assert options.training_script == "vllm_gqsa.offline"
    name, *arguments = ("cpu" if word == "cuda" else word for word in options.training_script_args)
    get_command(app).commands[name].make_context(name, arguments)


@pytest.fixture(scope="module")
def vllm_parser():
    pytest.importorskip("vllm", reason="needs vLLM")
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return make_arg_parser(FlexibleArgumentParser())


@of("vllm")
def test_vllm_takes_the_command(command, vllm_parser):
    _, verb, *arguments = command.words
    assert verb == "serve"
    vllm_parser.parse_args(arguments)


@of("lm_eval")
def test_lm_eval_takes_the_command(command):
    pytest.importorskip("lm_eval", reason="needs lm-eval")
    from lm_eval._cli import HarnessCLI

    HarnessCLI()._parser.parse_args(["run", *command.words[1:]])


@of("make")
def test_target_exists(command):
    variables = [word for word in command.words[1:] if "=" in word]
    assert {word for word in command.words[1:] if word not in variables} <= TARGETS
    for variable in variables:
        name, _, value = variable.partition("=")
        assert (command.words[1], name) == ("accuracy", "ARGUMENTS")
        accuracy._parse(shlex.split(value))


@of("python")
def test_module_and_files_exist(command):
    assert command.words[1] == "-m"
    assert importlib.util.find_spec(command.words[2])
    for path in (word for word in command.words[3:] if "/" in word):
        assert (ROOT / path).exists()


@of("pip")
def test_extra_exists(command):
    for extra in re.findall(r"\.\[(\w+)\]", " ".join(command.words)):
        assert extra in PROJECT["optional-dependencies"]


@of("curl")
def test_request_is_one(command):
    for option, value in zip(command.words, command.words[1:], strict=False):
        if option == "-d":
            assert isinstance(json.loads(value), dict)
    assert [urlsplit(word).netloc for word in command.words if "://" in word] == ["localhost:8000"]


def test_what_was_never_run_says_so():
    assert [str(each) for each in COMMANDS if NEVER_RUN.search(" ".join(each.words)) and not each.planned] == []
    assert any(each.planned for each in COMMANDS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_targets_and_options_in_the_text_exist(page, vllm_parser):
    options = {"--quick", "--marlin", "--model", "--only", "--windows"}  # of benchmarks.kernels and benchmarks.accuracy
    parameters = [each for command in get_command(app).commands.values() for each in command.params]
    options |= {name for each in parameters for name in (*each.opts, *each.secondary_opts)}
    options |= set(vllm_parser._option_string_actions) | set(get_args_parser()._option_string_actions)
    for text in inline_code(page):
        for target in re.findall(r"\bmake ([a-z-]+)", text):
            assert target in TARGETS, text
        for option in re.findall(r"(?:^|\s)(--[a-z-]+)", text):
            assert option in options, text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    assert [target for target in links(page) if not (page.parent / target).exists()] == []


def test_the_index_names_every_page():
    index = ROOT / "docs" / "README.md"
    assert {page.name for page in (ROOT / "docs").glob("*.md")} - {index.name} <= set(links(index))


@pytest.mark.parametrize("name", NAMED)
def test_recipes_are_as_the_page_says(name):
    page = (ROOT / "docs" / "compress.md").read_text("utf-8")
    (row,) = re.findall(rf"^\| `{name}` \| (.*)", page, re.MULTILINE)
    assert ("`bqpo`" in row) == (NAMED[name].bqpo is not None)
    for stage, settings in NAMED[name].whole_model_stages().items():
        assert f"`{stage}` on {settings.tokens / 1e6:g} million tokens" in row


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_snippets_compile(page):
    for text in code("python", page):
        compile(text, str(page), "exec")


def templates():
    """All texts of the source, with a 0 byte in the place of what differs."""
    for folder in ("vllm_gqsa", "offline"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    text = "".join(each.value if isinstance(each, ast.Constant) else "\0" for each in node.values)
                    yield re.sub("\0+", "\0", text)
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield re.sub(r"%[sd]", "\0", node.value)


SENTENCES = [line for text in code("text", ROOT / "docs" / "troubleshooting.md") for line in text.splitlines()]


@pytest.fixture(scope="module")
def said():
    return set(templates())


@pytest.mark.parametrize("sentence", SENTENCES)
def test_sentence_is_printed_by_the_code(sentence, said):
    template = re.sub(r"<[^>]*>", "\0", sentence)
    assert len(template.replace("\0", "").split()) >= 3
    assert template in said
