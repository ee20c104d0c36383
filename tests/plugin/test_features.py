"""What a user of vLLM switches on, with a compressed model: the same as with its dense twin, in float32."""

import json

import pytest

pytest.importorskip("vllm", reason="needs vLLM")

from tests.helpers import compress_randomly, make_dense
from tests.plugin.models import TARGETS, TOKENS, train_adapter, write_tokenizer
from tests.plugin.test_engine import PROMPTS, engines

REPEATING = [[5, 6, 7, 8] * 6, [40, 41, 42] * 7]
"""Prompts whose end stands in them before: what n-gram speculative decoding guesses from."""

ONE_ENGINE = {
    "skip_tokenizer_init": False,
    "enable_prefix_caching": True,
    "block_size": 32,
    "enable_chunked_prefill": True,
    "max_num_batched_tokens": 32,
    "enable_lora": True,
    "max_lora_rank": 8,
    # Else vLLM 0.32 fails on log probabilities of prompts, with dense models too.
    "lora_target_modules": list(TARGETS),
    "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
}
"""A prompt of 90 tokens is read in three chunks."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("features")
    dense = make_dense(folder / "dense", vocab_size=TOKENS)
    write_tokenizer(dense)
    # Some layers are left dense, by name and by expression, among them whole fused ones.
    ignore = (
        "lm_head",
        "model.layers.0.mlp.gate_proj",
        "model.layers.0.mlp.up_proj",
        r"re:.*layers\.1\..*\.[qkv]_proj",
    )
    made = compress_randomly(dense, folder, ignore=ignore)
    train_adapter(made.twin, folder)
    return made


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """A mixture of experts whose second block has none."""
    folder = tmp_path_factory.mktemp("mixture")
    dense = make_dense(folder / "dense", "qwen3_moe", mlp_only_layers=[1])
    return compress_randomly(dense, folder, ignore=("lm_head", r"re:.*\.gate$"))


@pytest.fixture(scope="module")
def served(model, mixture, tmp_path_factory):
    """What each engine gives, by name."""
    folder = model.twin.parent
    features = ["logprobs", "cached", "guided", "chat", "stream"]
    prompts = PROMPTS + REPEATING
    options = {k: v for k, v in ONE_ENGINE.items() if "lora" not in k}
    speculation = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    jobs = [
        {"model": str(model.twin), "prompts": prompts, "features": features, "options": options},
        {
            "model": str(model.checkpoint),
            "prompts": prompts,
            "features": [*features, "lora"],
            "adapter": str(folder / "adapter"),
            "options": ONE_ENGINE,
        },
        {"model": str(folder / "merged"), "prompts": prompts},
        *({"model": str(each), "prompts": PROMPTS} for each in (mixture.twin, mixture.checkpoint)),
        # Last: vLLM 0.32 starts no other engine in a process that has guessed from n-grams.
        {
            "model": str(model.checkpoint),
            "prompts": prompts,
            "features": ["accepted"],
            "options": {"speculative_config": speculation, "disable_log_stats": False},
        },
    ]
    names = ("twin", "compressed", "merged", "mixture twin", "mixture", "guessing")
    return dict(zip(names, engines(tmp_path_factory.mktemp("served"), jobs), strict=True))


def test_every_engine_ran(served):
    assert {name: result.get("error") for name, result in served.items()} == dict.fromkeys(served)


def test_layers_ignored_by_name_and_by_expression(served, model):
    assert len(model.matrices) == 2 * 7 - 2 - 3
    assert served["compressed"]["tokens"] == served["twin"]["tokens"]


def test_log_probabilities(served):
    found, expected = served["compressed"]["logprobs"], served["twin"]["logprobs"]
    for position, reference in zip(flat(found), flat(expected), strict=True):
        assert [token for token, _ in position] == [token for token, _ in reference]
        assert [value for _, value in position] == pytest.approx([value for _, value in reference], abs=1e-4)


def flat(logprobs):
    """The positions of all prompts and answers; the first token of a prompt has none."""
    return [position for output in logprobs for part in output for position in part if position is not None]


def test_prefix_caching_and_chunked_prefill(served):
    (first, none), (second, many) = served["compressed"]["cached"]
    assert none == 0
    assert many >= 32
    assert first == second == served["twin"]["cached"][0][0]


def test_structured_outputs(served):
    letters, choice, answer = served["compressed"]["guided"]
    assert set(letters) <= set("abc")
    assert len(letters) == 5
    assert choice in {"yes", "no"}
    assert json.loads(answer).keys() == {"a"}
    assert served["compressed"]["guided"] == served["twin"]["guided"]


def test_chat(served):
    assert served["compressed"]["chat"] == served["twin"]["chat"] != ""


def test_streaming(served):
    steps = served["compressed"]["stream"]
    assert len(steps) > 1
    assert [token for step in steps for token in step] == served["twin"]["tokens"][0][:8]


def test_speculative_decoding(served):
    assert served["guessing"]["accepted"] > 0
    assert served["guessing"]["tokens"] == served["twin"]["tokens"]


def test_adapters(served):
    assert served["compressed"]["lora"] == served["merged"]["tokens"]
    assert served["merged"]["tokens"] != served["twin"]["tokens"]


def test_mixture_of_experts(served):
    assert served["mixture"]["tokens"] == served["mixture twin"]["tokens"]
    assert len({tuple(tokens) for tokens in served["mixture"]["tokens"]}) == len(PROMPTS)
