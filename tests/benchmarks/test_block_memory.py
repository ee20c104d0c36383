"""The measurement of one block, on a tiny one."""

import json
import sys

from benchmarks.accuracy import block_memory

STAGES = ["one_shot", "bqpo", "prune", "distill", "oqp"]


def test_all_stages_are_measured_and_estimated(tmp_path, monkeypatch):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2}
    monkeypatch.setattr(block_memory, "CONFIG", {**block_memory.CONFIG, **sizes})
    monkeypatch.setattr(block_memory, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["block_memory", "--context", "64", "--steps", "2"])
    monkeypatch.chdir(tmp_path)
    block_memory.main()
    (path,) = tmp_path.iterdir()  # the model is gone
    found = json.loads(path.read_text())
    assert list(found["stages"]) == STAGES
    assert found["weights"] == 4 * 64**2 + 3 * 64 * 128
    for name, stage in found["stages"].items():
        assert stage["seconds"] > 0
        assert name == "one_shot" or stage["estimate_bytes"] > 4 * found["weights"] / 2
        assert name == "one_shot" or sum(stage["of_the_peak"].values()) == stage["peak_bytes"]
