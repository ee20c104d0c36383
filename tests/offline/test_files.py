"""What is said where files cannot be written."""

import errno
import os
import re

import pytest
import torch

from tests.offline.test_pipeline import RECIPE, job, silent
from vllm_gqsa.offline.errors import InputError
from vllm_gqsa.offline.files import write_atomically, write_json, write_tensors
from vllm_gqsa.offline.pipeline import compress


@pytest.mark.parametrize("write", [
    lambda path: write_json(path, {"a": 1}),
    lambda path: write_tensors(path, {"a": torch.zeros(2)}),
    lambda path: write_atomically(path, lambda temporary: torch.save({"a": 1}, temporary)),
])  # fmt: skip
def test_what_cannot_be_written_is_one_sentence(write, tmp_path):
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "x"  # no folder: even root may not
    with pytest.raises(InputError, match=re.escape(f"{path}: cannot be written: ")):
        write(path)


def test_a_full_disk_is_noticed_before_hidden_states_are_mapped(dense, text, tmp_path, monkeypatch):
    """A write to a mapped file would end the process without a word."""

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    output, recipe = tmp_path / "out", RECIPE.changed({"pattern": "row"})
    with pytest.raises(InputError, match=r"no room for 0.0 GB of hidden states \(No space left on device\)"):
        compress(job(dense("llama"), text, output, recipe, memory=0), silent)
    assert not list((output / "gqsa_work").glob(".partial*"))
    monkeypatch.undo()
    assert compress(job(dense("llama"), text, output, recipe, memory=0), silent)["sparsity"] == recipe.sparsity
