import copy

import pytest

from vllm_gqsa.format import FormatError, GqsaConfig, is_ignored, parse_pattern

GOOD = {
    "quant_method": "gqsa", "format_version": 1, "bits": 4, "group_size": 16, "sparsity": 0.5, "pattern": "row",
    "ignore": ["lm_head"], "modules": {"model.layers.0.self_attn.q_proj": {"nnz": 10368}},
}  # fmt: skip


def test_the_documented_example_is_read_and_written_back():
    assert GqsaConfig.parse(GOOD, "config.json").to_json() == GOOD


def test_the_head_is_found_by_its_name_or_that_of_its_tied_embedding():
    modules = {"model.layers.0.self_attn.q_proj": {"nnz": 1}}
    for name in (None, "lm_head", "model.embed_tokens"):
        listed = modules if name is None else {**modules, name: {"nnz": 2}}
        assert GqsaConfig.parse({**GOOD, "ignore": [], "modules": listed}, "config.json").head == name


@pytest.mark.parametrize(("key", "value", "says"), [
    ("format_version", 2, "format_version 2 is unknown"),
    ("format_version", None, "format_version None is unknown"),
    ("bits", 8, "bits.*found 8"),
    ("group_size", 24, "group_size.*must be one of.*found 24"),
    ("group_size", "16", "group_size.*found '16'"),
    ("sparsity", 1.5, "sparsity.*found 1.5"),
    ("pattern", "column", "pattern 'column' is neither"),
    ("pattern", "5:4", "pattern '5:4' is neither"),
    ("ignore", ["re:("], "is not a regular expression"),
    ("modules", {"a": {"nnz": -1}}, "modules.a.nnz"),
    ("modules", {"a": {"nnz": 1, "rows": 2}}, "modules.a.rows"),
    ("sparsity_config", {}, "sparsity_config: Extra inputs"),
    ("quant_method", "gptq", "quant_method.*found 'gptq'"),
])  # fmt: skip
def test_wrong_values_are_named(key, value, says):
    with pytest.raises(FormatError, match="^config.json: .*" + says):
        GqsaConfig.parse({**copy.deepcopy(GOOD), key: value}, "config.json")


@pytest.mark.parametrize("raw", [None, [], "gqsa", 3])
def test_what_is_no_object_is_refused(raw):
    with pytest.raises(FormatError, match="expected an object"):
        GqsaConfig.parse(raw, "config.json")


@pytest.mark.parametrize("key", ["group_size", "modules", "sparsity", "pattern"])
def test_missing_keys_are_named(key):
    raw = {k: v for k, v in GOOD.items() if k != key}
    with pytest.raises(FormatError, match=f"quantization_config.{key}: Field required"):
        GqsaConfig.parse(raw, "config.json")


def test_patterns_and_ignore_lists():
    assert parse_pattern("2:4") == (2, 4)
    assert is_ignored("lm_head", ("lm_head",))
    assert not is_ignored("model.lm_head", ("lm_head",))
    assert is_ignored("model.layers.3.mlp.up_proj", ("re:.*mlp",))
