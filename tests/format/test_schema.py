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


@pytest.mark.parametrize("size", [12, "32", None, True])
def test_wrong_group_sizes_of_a_module_are_named(size):
    with pytest.raises(FormatError, match=r"^config.json: quantization_config.modules.a.group_size: "):
        GqsaConfig.parse({**GOOD, "modules": {"a": {"nnz": 1, "group_size": size}}}, "config.json")


def test_a_module_may_have_a_group_size_of_its_own():
    modules = {"a.q_proj": {"nnz": 1}, "a.o_proj": {"nnz": 1, "group_size": 64}}
    config = GqsaConfig.parse({**GOOD, "modules": modules}, "config.json")
    assert [config.group_size_of(name) for name in modules] == [16, 64]
    assert config.group_sizes == [16, 64]
    assert config.to_json()["modules"] == modules


@pytest.mark.parametrize(("one", "other", "is_joined"), [
    ("a.q_proj", "a.v_proj", True),
    ("a.q_proj", "b.v_proj", False),
    ("a.q_proj", "a.o_proj", False),
    ("a.gate_proj", "a.up_proj", True),
    ("a.gate_proj", "a.down_proj", False),
    ("a.experts.0.w1", "a.experts.1.w3", True),
    ("a.experts.0.down_proj", "a.experts.11.down_proj", True),
    ("a.experts.0.up_proj", "a.experts.0.down_proj", False),
    ("a.experts.0.w1", "b.experts.0.w1", False),
    ("layers.0.fc1", "layers.1.fc1", False),
])  # fmt: skip
def test_what_is_served_as_one_layer_has_one_group_size(one, other, is_joined):
    raw = {**GOOD, "modules": {one: {"nnz": 1}, other: {"nnz": 1, "group_size": 32}}}
    if not is_joined:
        GqsaConfig.parse(raw, "config.json")
        return
    says = f"^config.json: quantization_config.modules: {one} has groups of 16, {other} of 32; they are served as one"
    with pytest.raises(FormatError, match=says):
        GqsaConfig.parse(raw, "config.json")


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
    assert GqsaConfig.parse({**GOOD, "pattern": "model"}, "config.json").pattern == "model"
    assert is_ignored("lm_head", ("lm_head",))
    assert not is_ignored("model.lm_head", ("lm_head",))
    assert is_ignored("model.layers.3.mlp.up_proj", ("re:.*mlp",))
