"""Layers of vLLM with compressed weights, without an engine: for every rank of a pretended tensor-parallel group."""

import random

from vllm.model_executor.layers import linear as vllm_linear, vocab_parallel_embedding as vllm_vocabulary

from tests.helpers import quantization, random_matrix
from vllm_gqsa.format import GqsaConfig
from vllm_gqsa.plugin.config import GqsaQuantizationConfig

HEAD, HEADS, KV_HEADS, K, WIDE = 16, 8, 2, 128, 256
VOCABULARY = 300
"""Padded to 320 by vLLM: on four ranks the last holds 60 tokens and 20 empty rows."""
RANKS = [*((rank, size) for size in (1, 2, 4) for rank in range(size)), (0, 8), (5, 8), (7, 8)]

MATRICES = {
    "a.q_proj": random_matrix(HEADS * HEAD, K, density=0.3, seed=1),
    "a.k_proj": random_matrix(KV_HEADS * HEAD, K, density=0.7, seed=2),
    "a.v_proj": random_matrix(KV_HEADS * HEAD, K, density=0.5, seed=3),
    "m.gate_proj": random_matrix(WIDE, K, density=0.35, seed=4),
    "m.up_proj": random_matrix(WIDE, K, density=0.65, seed=5),
    "m.down_proj": random_matrix(K, WIDE, 32, density=0.5, seed=6),
    "m.embed_tokens": random_matrix(VOCABULARY, K, 8, density=0.9, seed=7),
    "lm_head": random_matrix(VOCABULARY, K, 64, density=0.8, seed=8),
}
"""Three of them with groups of their own size, not of 16."""
DENSE = {name: matrix.to_dense() for name, matrix in MATRICES.items()}
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


def pretend(monkeypatch, rank, size):
    for module in (vllm_linear, vllm_vocabulary):
        monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: rank)
        monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: size)


def config_for(matrices, **changes):
    raw = quantization({name: m.nnz for name, m in matrices.items()}, **{"pattern": "matrix", "ignore": [], **changes})
    for name, matrix in matrices.items():
        if matrix.group_size != raw["group_size"]:
            raw["modules"][name]["group_size"] = matrix.group_size
    config = GqsaQuantizationConfig(GqsaConfig.parse(raw, "test"))
    config.packed_modules_mapping = FUSED
    return config


def qkv(config, heads=HEADS, kv_heads=KV_HEADS):
    return vllm_linear.QKVParallelLinear(K, HEAD, heads, kv_heads, bias=False, quant_config=config, prefix="a.qkv_proj")


def gate_up(config):
    return vllm_linear.MergedColumnParallelLinear(
        K, [WIDE, WIDE], bias=False, quant_config=config, prefix="m.gate_up_proj"
    )


def down(config):
    return vllm_linear.RowParallelLinear(WIDE, K, bias=False, quant_config=config, prefix="m.down_proj")


def load(layer, pieces, seed=0):
    """Feed ``(shard id, matrix)`` pairs to the layer's loaders, all tensors of all of them in random order."""
    arrivals = [(shard, name, tensor) for shard, m in pieces for name, tensor in m.tensors().items()]
    random.Random(seed).shuffle(arrivals)
    for shard, name, tensor in arrivals:
        parameter = getattr(layer, name)
        extra = () if shard is None else (shard,)
        parameter.weight_loader(parameter, tensor, *extra)
