"""vLLM's reload of weights, with its own functions on single layers: what follows a reload that failed."""

import pytest
import torch

pytest.importorskip("vllm", reason="needs vLLM")

from vllm.config import VllmConfig, get_current_vllm_config, set_current_vllm_config
from vllm.model_executor.model_loader import reload

from tests.helpers import random_matrix
from tests.plugin.layers import WIDE, K, config_for, gate_up, load, pretend
from vllm_gqsa.format import TENSORS, FormatError, GroupSparseMatrix


def model(seed, density=0.5):
    """Matrices of a layer: other values for another seed, the same masks for the same density."""
    matrices = {}
    for at, name in enumerate(("m.gate_proj", "m.up_proj")):
        mask = random_matrix(WIDE, K, density=density, seed=at).keep()
        dense = torch.randn(WIDE, K, generator=torch.Generator().manual_seed(seed + at))
        matrices[name] = GroupSparseMatrix.from_dense(dense, mask)
    return matrices


A, B = model(10), model(20)


def dense(matrices):
    return torch.cat([each.to_dense() for each in matrices.values()])


@pytest.fixture
def engine(monkeypatch):
    """A configuration and a layer that runs with A."""
    pretend(monkeypatch, 0, 1)
    monkeypatch.setattr("vllm.distributed.get_pp_group", lambda: None)
    with set_current_vllm_config(VllmConfig()):
        config = config_for(A)
        layer = gate_up(config)
        reload.record_metadata_for_reloading(layer)
        load(layer, list(enumerate(A.values())))
        layer.quant_method.process_weights_after_loading(layer)
        yield config, layer


def begin(engine):
    """What vLLM does when a reload begins."""
    config, layer = engine
    reload.initialize_layerwise_reload(layer)
    config.get_cache_scale_mapper()


def feed(engine, matrices, left_out=(), seed=0):
    """All tensors but those of ``left_out``, pairs of a shard and a tensor's name."""
    _, layer = engine
    for shard, matrix in enumerate(matrices.values()):
        for name, tensor in matrix.tensors().items():
            if (shard, name) not in left_out:
                parameter = getattr(layer, name)
                parameter.weight_loader(parameter, tensor, shard)


def end(engine):
    reload.finalize_layerwise_reload(engine[1], None)


def weight(engine):
    return engine[1].quant_method.dequantize_weight(engine[1])


def test_to_other_weights_and_back(engine):
    storage = engine[1].qweight.data_ptr()
    for matrices in (B, A):
        begin(engine)
        feed(engine, matrices)
        end(engine)
        assert torch.equal(weight(engine), dense(matrices))
        assert engine[1].qweight.data_ptr() == storage


UNTIL = {"nothing": 8, "one tensor": 7, "half a matrix": 6, "a matrix": 4, "all but one": 1}


@pytest.mark.parametrize("missing", UNTIL.values(), ids=UNTIL)
@pytest.mark.parametrize("ended", [False, True])
def test_after_a_reload_that_broke_off(engine, missing, ended):
    """``ended``: vLLM noticed nothing and went on to the end, where the layer lacks tensors."""
    everything = [(shard, name) for shard in (0, 1) for name in TENSORS]
    begin(engine)
    feed(engine, B, left_out=everything[8 - missing :])
    if ended and missing < 8:
        with pytest.raises(FormatError, match="missing from the checkpoint"):
            end(engine)
    begin(engine)
    feed(engine, A)
    end(engine)
    assert torch.equal(weight(engine), dense(A))


@pytest.mark.parametrize("ended", [False, True])
def test_what_a_failed_reload_brought_does_not_complete_the_next(engine, ended):
    begin(engine)
    feed(engine, B, left_out=[(1, "scale_zero")])
    if ended:
        with pytest.raises(FormatError, match="m.up_proj.scale_zero missing"):
            end(engine)
    begin(engine)
    feed(engine, A, left_out=[(0, name) for name in TENSORS])
    with pytest.raises(FormatError, match=r"m.gate_proj.\* missing from the checkpoint"):
        end(engine)
    begin(engine)
    feed(engine, B)
    end(engine)
    assert torch.equal(weight(engine), dense(B))


def test_after_a_matrix_that_breaks_the_format(engine):
    begin(engine)
    broken = {**B, "m.up_proj": random_matrix(WIDE, K, density=0.9, seed=7)}
    with pytest.raises(FormatError, match="m.up_proj: holds nnz = [0-9]+ groups, config.json says [0-9]+"):
        feed(engine, broken)
    begin(engine)
    feed(engine, B)
    end(engine)
    assert torch.equal(weight(engine), dense(B))


def test_of_another_size(engine):
    other = model(30, density=0.9)
    sources = engine[1].quant_method.sources
    begin(engine)
    object.__setattr__(sources, "nnz", tuple(matrix.nnz for matrix in other.values()))
    feed(engine, other)
    with pytest.raises(FormatError, match="only a checkpoint with the same numbers"):
        end(engine)


@pytest.mark.parametrize("same", [True, False])
def test_vllm_may_begin_twice_in_one_load(engine, same):
    """It does where the head stands between other names of a file; only another stream is another load."""
    config, layer = engine
    reload.initialize_layerwise_reload(layer)

    def load_weights(weights, part):
        config.get_cache_scale_mapper()
        feed(engine, dict([list(B.items())[part]]) if part == 0 else B, [(0, name) for name in TENSORS] * part)

    stream = (name for name in B)
    load_weights(stream, 0)
    load_weights(stream if same else (name for name in B), 1)
    if same:
        reload.finalize_layerwise_reload(layer, None)
        assert torch.equal(layer.quant_method.dequantize_weight(layer), dense(B))
    else:
        with pytest.raises(FormatError, match=r"m.gate_proj.\* missing from the checkpoint"):
            reload.finalize_layerwise_reload(layer, None)


def compiled_for(monkeypatch, matrices, *, native=True):
    """What vLLM keeps compiled code under, once a layer with these matrices is loaded."""
    pretend(monkeypatch, 0, 1)
    with monkeypatch.context() as patch, set_current_vllm_config(VllmConfig()):
        if not native:
            patch.setattr("vllm_gqsa.kernels.native.available", lambda: False)
        vllm_config = get_current_vllm_config()
        before = vllm_config.compute_hash()
        layer = gate_up(config_for(matrices))
        load(layer, list(enumerate(matrices.values())))
        assert vllm_config.compute_hash() == before
        layer.quant_method.process_weights_after_loading(layer)
        return before, vllm_config.compute_hash()


def test_compiled_code_is_kept_by_layout_and_shapes(monkeypatch):
    """They follow from masks and installed kernels, which vLLM's own settings do not tell."""
    before, a = compiled_for(monkeypatch, A)
    assert a != before
    assert compiled_for(monkeypatch, B) == (before, a)  # the same masks
    others = [compiled_for(monkeypatch, model(10, 0.25)), compiled_for(monkeypatch, A, native=False)]
    assert [each[0] for each in others] == [before, before]
    assert len({a, *(each[1] for each in others)}) == 3


def test_a_reload_leaves_compiled_code_valid(engine):
    before = get_current_vllm_config().compute_hash()
    begin(engine)
    feed(engine, B)
    end(engine)
    assert get_current_vllm_config().compute_hash() == before
