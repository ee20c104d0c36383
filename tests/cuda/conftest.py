import ctypes
import os
from pathlib import Path

import pytest
import torch

from tests.cuda.build import COMPILER, build_shim
from vllm_gqsa.kernels import cuda


class Shim:
    """The device that csrc/cuda runs on over shim.h: the CPU."""

    name = "cpu"

    def __init__(self, library):
        self._library = ctypes.CDLL(str(library))

    def shuffle(self, seed):
        """From now on blocks run in a random order; 0 for ascending order."""
        self._library.gqsa_shim_shuffle(ctypes.c_uint32(seed))

    def written_late(self, x):
        """Make ``x`` garbage in every block until it waits for the kernel before; None ends it."""
        pointer, size = (None, 0) if x is None else (x.data_ptr(), x.nbytes)
        self._library.gqsa_shim_inputs(ctypes.c_void_p(pointer), ctypes.c_size_t(size))


class Gpu:
    """A real device, which cannot be told what to do."""

    name = "cuda"

    def shuffle(self, seed): ...

    def written_late(self, x): ...


def _forget():
    cuda._library.cache_clear()
    cuda._gemv_tokens.cache_clear()
    cuda.device_of.cache_clear()


@pytest.fixture(params=["shim", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    """Where the kernels run: on the CPU over the shim, or, with ``-m gpu``, on a GPU."""
    # What a kernel should have written, and did not, is NaN.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    if request.param == "gpu":
        chosen = Gpu()
    elif COMPILER is None:
        pytest.skip("needs g++")
    else:
        # test_planted.py runs these tests on kernels that it has spoilt.
        library = Path(os.environ.get("GQSA_TEST_SHIM") or build_shim())
        monkeypatch.setattr(cuda, "_LIBRARY", library)
        chosen = Shim(library)
    _forget()
    yield chosen
    torch.use_deterministic_algorithms(False)
    chosen.shuffle(0)
    chosen.written_late(None)
    monkeypatch.undo()
    _forget()
