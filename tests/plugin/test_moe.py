"""Routed experts, without an engine: the op, and what every rank loads."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("vllm", reason="needs vLLM")

from vllm.config import VllmConfig, set_current_vllm_config

from tests.helpers import random_matrix
from tests.plugin.layers import config_for
from vllm_gqsa.format import FormatError, GroupSparseMatrix
from vllm_gqsa.plugin.moe import GqsaMoEMethod, expert_names

EXPERTS, TOP, K, WIDE = 4, 2, 64, 96
NAMES = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
# Down projections have groups of 8, the others of 16.
MATRICES = {
    f"m.experts.{expert}.{name}": random_matrix(
        *((K, WIDE, 8) if part == "w2" else (WIDE, K)), density=density, seed=3 * expert + at
    )
    for expert in range(EXPERTS)
    for at, ((part, name), density) in enumerate(zip(NAMES.items(), (0.3, 0.6, 0.5), strict=True))
}
DENSE = {name: matrix.to_dense() for name, matrix in MATRICES.items()}


def layer_on(rank, size, expert_map=None, config=None, **changes):
    """A layer as vLLM's RoutedExperts, with what the method reads of it, its weights not loaded yet."""
    config = config or config_for(MATRICES)
    parallel = SimpleNamespace(tp_rank=rank, tp_size=size)
    moe = SimpleNamespace(moe_parallel_config=parallel, has_bias=False, num_experts=EXPERTS)
    layer = torch.nn.Module()
    layer.layer_name, layer.activation, layer.apply_router_weight_on_input = "m.experts", "silu", False
    layer.expert_map = expert_map
    for name, value in changes.items():
        setattr(layer, name, value)
    layer.quant_method = GqsaMoEMethod(moe, config.config, expert_names("m.experts", EXPERTS, config.config))
    local = EXPERTS if expert_map is None else int((expert_map >= 0).sum())
    layer.quant_method.create_weights(layer, local, K, WIDE // size, torch.float32)
    return layer


def feed(layer, left_out=()):
    """Every tensor of every expert, as vLLM hands them out; returns how many were taken."""
    taken = 0
    for expert in range(EXPERTS):
        for part, name in NAMES.items():
            full = f"m.experts.{expert}.{name}"
            for piece, tensor in MATRICES[full].tensors().items():
                if f"{full}.{piece}" in left_out:
                    continue
                parameter = getattr(layer, ("w2_" if part == "w2" else "w13_") + piece)
                taken += parameter.weight_loader(
                    param=parameter, loaded_weight=tensor, weight_name=full, shard_id=part, expert_id=expert,
                    return_success=True,
                )  # fmt: skip
    return taken


@pytest.fixture(autouse=True)
def vllm_config():
    with set_current_vllm_config(VllmConfig()):
        yield


def loaded(*args, **kwargs):
    layer = layer_on(*args, **kwargs)
    feed(layer)
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def routed(tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, K, generator=generator)
    weights, ids = torch.randn(tokens, EXPERTS, generator=generator).softmax(-1).topk(TOP)
    return x, weights, ids


def expected(x, weights, ids):
    """Token by token, expert by expert, with the dense weights in float64."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    for token, (row, ws, es) in enumerate(zip(x.double(), weights.double(), ids.tolist(), strict=True)):
        for w, e in zip(ws, es, strict=True):
            gate, up, down = (DENSE[f"m.experts.{e}.{name}"].double() for name in NAMES.values())
            out[token] += w * (down @ (F.silu(gate @ row) * (up @ row)))
    return out


def assert_close(found, routing, tolerance=1e-5):
    reference = expected(*routing)
    assert (found.double() - reference).abs().max() <= tolerance * reference.abs().max()


@pytest.mark.parametrize("tokens", [1, 2, 7, 40])
def test_one_rank(tokens):
    layer = loaded(0, 1)
    routing = routed(tokens)
    assert_close(layer.quant_method.apply(layer, *routing), routing)


@pytest.fixture(params=["native", "checkpoint"])
def layout(request, monkeypatch):
    """With the native kernels, and as without a compiler."""
    if request.param == "checkpoint":
        monkeypatch.setattr("vllm_gqsa.kernels.native.available", lambda: False)
    return request.param


@pytest.mark.parametrize("tokens", [1, 2, 7])
@pytest.mark.parametrize("here", [0, 2])
def test_as_on_a_gpu(tokens, here, layout, monkeypatch):
    """Nobody looks at who was chosen: two tokens have copies of their experts, seven go through every expert."""
    monkeypatch.setattr("vllm_gqsa.kernels.moe._host_may_wait", lambda _: False)
    layer, (x, weights, ids) = loaded(0, 1), routed(tokens)
    elsewhere = ids < here  # experts of another rank
    found = layer.quant_method.apply(layer, x, weights, ids.masked_fill(elsewhere, -1))
    assert (layer.quant_method._matrices[0].arguments(layer)[1] == "checkpoint") == (layout == "checkpoint")
    assert_close(found, (x, weights.masked_fill(elsewhere, 0), ids))


@pytest.mark.parametrize("tokens", [1, 7])
def test_as_on_a_gpu_experts_that_were_not_chosen_may_overflow(tokens, monkeypatch):
    """In float16 anything does that multiplies by weights as large as these."""
    monkeypatch.setattr("vllm_gqsa.kernels.moe._host_may_wait", lambda _: False)
    for name in NAMES.values():
        full = f"m.experts.0.{name}"
        old = MATRICES[full]
        huge = GroupSparseMatrix.from_dense(3e3 * old.to_dense().sign(), old.keep(), old.group_size)
        monkeypatch.setitem(MATRICES, full, huge)
    layer, (x, weights, _) = loaded(0, 1, config=config_for(MATRICES)), routed(tokens)
    for ids, finite in (((0, 1), False), ((-1, 1), True), ((2, 1), True)):
        chosen = torch.tensor(ids).repeat(tokens, 1)
        found = layer.quant_method.apply(layer, x.half(), weights.half(), chosen)
        assert bool(found.isfinite().all()) == finite


def test_as_on_a_gpu_the_copies_are_made_one_after_another(monkeypatch):
    monkeypatch.setattr("vllm_gqsa.kernels.moe._host_may_wait", lambda _: False)
    monkeypatch.setattr("vllm_gqsa.kernels.moe._DENSE_BYTES", 1)
    layer, routing = loaded(0, 1), routed(2)
    assert_close(layer.quant_method.apply(layer, *routing), routing)


def test_as_on_a_gpu_batch_invariance_goes_through_every_expert(monkeypatch):
    monkeypatch.setattr("vllm_gqsa.kernels.moe._host_may_wait", lambda _: False)
    monkeypatch.setattr("vllm_gqsa.kernels.moe._gathered", lambda *_: pytest.fail("another way for few tokens"))
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    layer, routing = loaded(0, 1), routed(2)
    assert_close(layer.quant_method.apply(layer, *routing), routing)


def test_opcheck(layout):
    layer = loaded(0, 1)
    stacks, layouts = zip(*(matrix.arguments(layer) for matrix in layer.quant_method._matrices), strict=True)
    torch.library.opcheck(torch.ops.gqsa.moe.default, (*routed(3), *stacks, list(layouts), [16, 8], "silu"))


@pytest.mark.parametrize("size", [2, 3, 6])
def test_ranks_add_up(size):
    routing = routed(9)
    parts = [layer.quant_method.apply(layer, *routing) for layer in (loaded(rank, size) for rank in range(size))]
    assert_close(sum(parts), routing)
    assert not torch.allclose(parts[0], parts[1])


@pytest.mark.parametrize("places", [[[0, 1, -1, -1], [-1, -1, 0, 1]], [[0, -1, 1, -1], [-1, 0, -1, 1]]])
def test_experts_spread_over_ranks(places):
    routing = routed(9)
    layers = [loaded(0, 1, expert_map=torch.tensor(each, dtype=torch.int32)) for each in places]
    assert_close(sum(layer.quant_method.apply(layer, *routing) for layer in layers), routing)
    assert feed(layer_on(0, 1, expert_map=torch.tensor(places[0], dtype=torch.int32))) == EXPERTS // 2 * 3 * 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    layer = loaded(0, 1)
    routing = routed(5)
    found = layer.quant_method.apply(layer, routing[0].to(dtype), *routing[1:])
    assert found.dtype == dtype
    assert_close(found, routing, tolerance=2e-2)


def test_routing_where_vllm_leaves_it_to_the_method():
    """As vLLM 0.29 for CPU does."""
    x, weights, ids = routed(6)
    logits = torch.full((6, EXPERTS), -torch.inf).scatter(1, ids, weights.log())
    asked = ("use_grouped_topk", "renormalize", "topk_group", "num_expert_group", "custom_routing_function")
    asked += ("scoring_func", "routed_scaling_factor", "e_score_correction_bias")
    layer = loaded(0, 1, top_k=TOP, **dict.fromkeys(asked))
    layer.quant_method._select_experts = lambda *, router_logits, top_k, **_: router_logits.exp().topk(top_k)
    assert layer.quant_method.is_monolithic
    assert_close(layer.quant_method.apply_monolithic(layer, x, logits), (x, weights, ids))


def test_no_tokens():
    layer = loaded(0, 1)
    assert layer.quant_method.apply(layer, *routed(0)).shape == (0, K)


@pytest.mark.parametrize("left_out", ["m.experts.2.up_proj.qweight", "m.experts.3.down_proj.group_mask"])
def test_a_missing_tensor(left_out):
    layer = layer_on(0, 1)
    feed(layer, [left_out])
    with pytest.raises(FormatError, match=f"m.experts: {left_out} missing from the checkpoint"):
        layer.quant_method.process_weights_after_loading(layer)


@pytest.mark.parametrize("left_out", ["m.experts.2.up_proj.qweight", "m.experts.3.down_proj.group_mask"])
def test_a_reload_after_one_that_lacked_a_tensor(left_out):
    from vllm.model_executor.model_loader import reload

    layer, routing = layer_on(0, 1), routed(5)
    reload.record_metadata_for_reloading(layer)
    feed(layer)
    layer.quant_method.process_weights_after_loading(layer)
    before = layer.quant_method.apply(layer, *routing)
    for lacks in ([left_out], []):
        reload.initialize_layerwise_reload(layer)
        layer.quant_method.begin_loading()
        feed(layer, lacks)
        if lacks:
            with pytest.raises(FormatError, match=f"{left_out} missing"):
                reload.finalize_layerwise_reload(layer, None)
    reload.finalize_layerwise_reload(layer, None)
    assert torch.equal(layer.quant_method.apply(layer, *routing), before)


def test_dummy_weights():
    config = VllmConfig()
    config.load_config.load_format = "dummy"
    with set_current_vllm_config(config):
        layer = layer_on(0, 1)
    layer.quant_method.process_weights_after_loading(layer)
    assert layer.quant_method.apply(layer, *routed(3)).isfinite().all()


def test_group_size_that_does_not_divide_a_rank():
    matrices = {name: random_matrix(*dense.shape, group_size=32) for name, dense in DENSE.items()}
    with pytest.raises(FormatError, match="m.experts: in_features K = 96 split over 2 .* 48 a rank.* G = 32"):
        layer_on(0, 2, config=config_for(matrices, group_size=32))


def test_experts_of_two_group_sizes():
    odd = {**MATRICES, "m.experts.2.down_proj": random_matrix(K, WIDE)}
    expected = "m.experts.0.down_proj has groups of 8, m.experts.2.down_proj of 16; they are served as one fused layer"
    with pytest.raises(FormatError, match=expected):
        config_for(odd)


@pytest.mark.parametrize("change", [{"activation": "swigluoai"}, {"apply_router_weight_on_input": True}])
def test_kinds_of_experts_that_are_refused(change):
    with pytest.raises(NotImplementedError, match="m.experts: .*put its experts on the ignore list"):
        layer_on(0, 1, **change)


# -- which experts are compressed ------------------------------------------------------------------------------


def method(config, prefix="m.experts"):
    from vllm.model_executor.layers.fused_moe import RoutedExperts

    layer = RoutedExperts.__new__(RoutedExperts)
    torch.nn.Module.__init__(layer)
    layer.moe_config = SimpleNamespace(num_experts=EXPERTS)
    return config.get_quant_method(layer, prefix)


def test_dense_experts_are_left_to_vllm():
    assert method(config_for({}, ignore=[r"re:.*\.experts\."])) is None


def test_names_of_mixtral():
    matrices = {name.replace("gate", "w1").replace("up", "w3").replace("down", "w2"): m for name, m in MATRICES.items()}
    matrices = {name.removesuffix("_proj"): matrix for name, matrix in matrices.items()}
    assert isinstance(method(config_for(matrices)), GqsaMoEMethod)


@pytest.mark.parametrize(
    ("ignore", "message"),
    [
        ((), "m.experts: config.json neither lists m.experts.3.up_proj in modules nor ignores it"),
        (("m.experts.3.up_proj",), "m.experts: .* compressed but m.experts.3.up_proj ignored"),
    ],
)
def test_half_compressed_experts(ignore, message):
    matrices = {name: matrix for name, matrix in MATRICES.items() if name != "m.experts.3.up_proj"}
    with pytest.raises(ValueError, match=message):
        method(config_for(matrices, ignore=list(ignore)))


def test_experts_that_nobody_speaks_of():
    with pytest.raises(ValueError, match="m.experts: config.json neither lists m.experts.0.gate_proj, .* and 9 more"):
        method(config_for({}))
