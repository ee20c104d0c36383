"""A checkpoint with groups of two sizes, from the recipe to tokens: transformers, vLLM and the dense twin agree."""

import random

import pytest
import torch

pytest.importorskip("vllm", reason="needs vLLM")

import vllm_gqsa.hf  # noqa: F401 - registers with transformers
from tests.helpers import make_dense
from tests.plugin.models import TOKENS, write_tokenizer
from tests.plugin.test_engine import PROMPTS, engines
from vllm_gqsa.format import CheckpointReader
from vllm_gqsa.offline.pipeline import Job, compress
from vllm_gqsa.offline.recipe import Recipe
from vllm_gqsa.offline.text import TextSource

RECIPE = Recipe(
    samples=4,
    context=64,
    lm_head=0.0,
    overrides={"re:.*mlp.down_proj$": {"group_size": 32}, "lm_head": {"group_size": 64}},
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folders of the checkpoint and of its dense twin."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("overrides")
    dense = make_dense(folder / "dense", vocab_size=TOKENS)
    write_tokenizer(dense)
    (folder / "text.txt").write_text(" ".join(random.Random(0).choices(["alpha", "beta", "gamma", "delta"], k=400)))
    job = Job(str(dense), folder / "out", RECIPE, TextSource(str(folder / "text.txt")), evaluation_windows=1)
    compress(job, lambda *_: None)
    reader = CheckpointReader(folder / "out")
    twin = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    with torch.no_grad():
        for name in reader.config.modules:
            weight = twin.get_submodule(name).weight
            weight.copy_(reader.matrix(name, tuple(weight.shape)).to_dense())
    twin.save_pretrained(folder / "twin")
    return folder / "out", folder / "twin"


def test_there_are_groups_of_three_sizes(made):
    assert CheckpointReader(made[0]).config.group_sizes == [16, 32, 64]


def test_transformers_and_vllm_give_the_tokens_of_the_twin(made, tmp_path):
    from transformers import AutoModelForCausalLM

    models = [AutoModelForCausalLM.from_pretrained(each, dtype=torch.float32).eval() for each in made]
    for prompt in PROMPTS:
        both = [m.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False) for m in models]
        assert torch.equal(*both)
    compressed, twin = engines(tmp_path / "run", [{"model": str(each), "prompts": PROMPTS} for each in made])
    assert compressed.get("tokens") == twin["tokens"], compressed
    assert len({tuple(tokens) for tokens in twin["tokens"]}) == len(PROMPTS)
