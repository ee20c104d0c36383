"""Rarer models and settings, each in an engine of its own: the tokens of the compressed model are those of its twin."""

import pytest
import torch

pytest.importorskip("vllm", reason="needs vLLM")

from openai import OpenAI

from benchmarks.demo.server import Server
from tests.helpers import FAMILIES, MIXTURES, compress_randomly, make_dense
from tests.plugin.models import TOKENS, write_tokenizer
from tests.plugin.test_engine import PROMPTS, engines

pytestmark = pytest.mark.slow

ROUTERS = ("lm_head", r"re:.*\.(shared_expert_)?gate$")


def make(folder, family="llama", *, ignore=("lm_head",), **changes):
    dense = make_dense(folder / "dense", family, vocab_size=TOKENS, **changes)
    write_tokenizer(dense)
    return compress_randomly(dense, folder, ignore=ignore)


def both(made, **job):
    """Jobs for the twin and the checkpoint."""
    return [{"model": str(each), "prompts": PROMPTS, **job} for each in (made.twin, made.checkpoint)]


def assert_equal_pairs(names, results):
    for name, twin, compressed in zip(names, results[::2], results[1::2], strict=True):
        assert "tokens" in twin, (name, twin)
        assert compressed.get("tokens") == twin["tokens"], (name, compressed)


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory):
    """The mixtures of experts; those of Qwen have a block without experts."""
    folder = tmp_path_factory.mktemp("mixtures")
    plain = {"mixtral": {}, "qwen2_moe": {"mlp_only_layers": [0]}, "qwen3_moe": {"mlp_only_layers": [1]}}
    return {name: make(folder / name, name, ignore=ROUTERS, **plain[name]) for name in MIXTURES}


@pytest.fixture(scope="module")
def mixtures_served(mixtures, tmp_path_factory):
    jobs = [job for made in mixtures.values() for job in both(made)]
    return engines(tmp_path_factory.mktemp("run"), jobs, timeout=600)


def test_mixtures_of_experts(mixtures_served):
    assert_equal_pairs(MIXTURES, mixtures_served)


def test_mixtures_of_experts_compiled(mixtures, tmp_path):
    jobs = [job for made in mixtures.values() for job in both(made, options={"enforce_eager": False})]
    assert_equal_pairs(MIXTURES, engines(tmp_path / "run", jobs, timeout=900))


def test_mixtures_of_experts_reloaded(mixtures, mixtures_served, tmp_path):
    made = mixtures["qwen2_moe"]
    other = compress_randomly(made.twin.parent / "dense", tmp_path, ignore=ROUTERS, scale=1.5)
    reload = [str(other.checkpoint), str(made.checkpoint)]
    jobs = [
        {"model": str(other.twin), "prompts": PROMPTS},
        {"model": str(made.checkpoint), "prompts": PROMPTS, "reload": reload},
        {"model": str(made.checkpoint), "prompts": PROMPTS, "options": {"load_format": "dummy"}},
    ]
    twin, compressed, dummy = engines(tmp_path / "run", jobs, timeout=600)
    expected = mixtures_served[2 * list(MIXTURES).index("qwen2_moe")]["tokens"]
    assert compressed.get("after") == [twin["tokens"], expected], compressed
    assert all(len(tokens) == 12 for tokens in dummy["tokens"])


@pytest.mark.parametrize("spread", [False, True], ids=["experts cut", "experts spread"])
def test_mixtures_of_experts_on_two_ranks(mixtures, mixtures_served, tmp_path, spread):
    options = {"tensor_parallel_size": 2, "enable_expert_parallel": spread}
    jobs = [{"model": str(made.checkpoint), "prompts": PROMPTS, "options": options} for made in mixtures.values()]
    results = engines(tmp_path / "two", jobs, own_process=True, timeout=900)
    assert [result.get("tokens") for result in results] == [twin["tokens"] for twin in mixtures_served[::2]], results


def test_dense_experts_beside_compressed_attention(tmp_path):
    made = make(tmp_path, "qwen3_moe", ignore=(*ROUTERS, r"re:.*\.experts\."))
    assert not any(".experts." in name for name in made.matrices)
    assert_equal_pairs(["qwen3_moe"], engines(tmp_path / "run", both(made)))


def latent_attention(folder, **changes):
    """A tiny DeepSeek-V2: multi-head latent attention in the sizes that vLLM's kernels are made for."""
    import torch
    import transformers as hf

    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    latent = {"kv_lora_rank": 512, "q_lora_rank": None, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128}
    experts = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    config = hf.DeepseekV2Config(
        **{**sizes, **latent, **experts, "v_head_dim": 128, "num_key_value_heads": 4, "vocab_size": 256},
        **{"n_group": 1, "topk_group": 1, "initializer_range": 0.1, "max_position_embeddings": 256, **changes},
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder / "dense")
    # The projection into the latent space has columns of its own for the position, 64 of 576.
    return compress_randomly(folder / "dense", folder, ignore=(*ROUTERS, "re:.*kv_a_proj_with_mqa"))


def test_latent_attention_with_and_without_experts(tmp_path):
    cases = {"dense": 2, "experts": 1}
    made = {name: latent_attention(tmp_path / name, first_k_dense_replace=first) for name, first in cases.items()}
    assert any(".experts." in name for name in made["experts"].matrices)
    jobs = [job for each in made.values() for job in both(each)]
    assert_equal_pairs(made, engines(tmp_path / "run", jobs))


def test_cache_in_fp8(tmp_path):
    made = make(tmp_path)
    jobs = both(made, options={"kv_cache_dtype": "fp8"})
    plain, twin, compressed = engines(tmp_path / "run", [both(made)[0], *jobs])
    assert compressed.get("tokens") == twin["tokens"] != plain["tokens"], compressed


def test_embeddings(tmp_path):
    options = {"runner": "pooling", "convert": "embed", "skip_tokenizer_init": False}
    twin, compressed = engines(tmp_path / "run", both(make(tmp_path), options=options, features=["embed"]))
    assert compressed.get("embed") is not None, compressed
    for found, expected in zip(compressed["embed"], twin["embed"], strict=True):
        assert found == pytest.approx(expected, abs=1e-5)
    assert len({tuple(vector) for vector in twin["embed"]}) == len(PROMPTS)


def test_every_family_with_a_dense_tied_head(tmp_path):
    made = {name: make(tmp_path / name, name, tie_word_embeddings=True) for name in FAMILIES}
    assert_equal_pairs(made, engines(tmp_path / "run", [job for each in made.values() for job in both(each)]))


def test_every_family_compiled(tmp_path):
    made = {name: make(tmp_path / name, name) for name in FAMILIES}
    jobs = [job for each in made.values() for job in both(each, options={"enforce_eager": False})]
    assert_equal_pairs(made, engines(tmp_path / "run", jobs, timeout=1200))


HEADS = {"hidden_size": 192, "num_attention_heads": 6, "num_key_value_heads": 1}
"""For two ranks three heads each, and one key head for both."""


@pytest.mark.parametrize(
    ("family", "changes", "options"),
    [
        ("llama", HEADS, {}),
        ("qwen2", HEADS, {"enforce_eager": False}),  # with biases, and compiled
        ("opt", {}, {}),
    ],
)
def test_two_ranks(tmp_path, family, changes, options):
    made = make(tmp_path, family, **changes)
    (one,) = engines(tmp_path / "one", both(made)[:1])
    jobs = [{**both(made)[1], "options": {"tensor_parallel_size": 2, **options}}]
    (two,) = engines(tmp_path / "two", jobs, own_process=True)
    assert two.get("tokens") == one["tokens"], two


def servers(made, folder, *options):
    """A client of a server of the twin, then one of the checkpoint, and the name of the model."""
    for model in (made.twin, made.checkpoint):
        settings = ("--dtype", "float32", "--max-model-len", "128")
        with Server.vllm(model, folder / f"{model.name}.log", print, *settings, *options) as server:
            yield OpenAI(base_url=f"{server.url}/v1", api_key="none"), str(model)


def test_server_of_embeddings(tmp_path):
    made = make(tmp_path)
    answers = []
    for client, name in servers(made, tmp_path, "--runner", "pooling", "--convert", "embed"):
        found = client.embeddings.create(model=name, input=PROMPTS, encoding_format="float")
        asked = {"model": name, "input": PROMPTS, "encoding_format": "float"}
        pooled = client.post("../pooling", body=asked, cast_to=dict)
        answers.append([[each.embedding for each in found.data], [each["data"] for each in pooled["data"]]])
    for ours, twins in zip(answers[1], answers[0], strict=True):
        assert len(twins) == len(PROMPTS)
        for found, expected in zip(ours, twins, strict=True):
            assert torch.allclose(torch.tensor(found), torch.tensor(expected), atol=1e-5)
    assert len({tuple(vector) for vector in answers[0][0]}) == len(PROMPTS)


def test_server_streams_chats_and_keeps_to_a_schema(tmp_path):
    made = make(tmp_path)
    answers = []
    for client, name in servers(made, tmp_path):
        common = {"model": name, "max_tokens": 12, "temperature": 0}
        stream = client.completions.create(prompt=[5, 17, 33], stream=True, extra_body={"ignore_eos": True}, **common)
        pieces = [event.choices[0].text for event in stream if event.choices]
        messages = [{"role": "user", "content": "abc"}]
        chat = client.chat.completions.create(messages=messages, extra_body={"ignore_eos": True}, **common)
        choice = client.chat.completions.create(
            messages=messages, extra_body={"structured_outputs": {"choice": ["yes", "no"]}}, **common
        )
        # How many tokens come with one event depends on the moment.
        assert len(pieces) > 1
        answers.append(["".join(pieces), chat.choices[0].message.content, choice.choices[0].message.content])
    twin, compressed = answers
    assert compressed == twin
    said = [(tmp_path / f"{each.name}.log").read_text().count("GQSA: ") for each in (made.twin, made.checkpoint)]
    assert said == [0, 1], "one line when a checkpoint was loaded"
    assert compressed[2] in {"yes", "no"}
