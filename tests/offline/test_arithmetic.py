"""Products of float32 are exact, whoever computes them; which arithmetic is chosen for a device."""

import pytest
import torch

from vllm_gqsa.offline import arithmetic
from vllm_gqsa.offline.arithmetic import fast_float32, reproducible, resolve_precision

CPU = torch.device("cpu")


def test_products_stay_exact():
    a, b = torch.randn(33, 900), torch.randn(900, 70)
    exact = a.double() @ b.double()
    with fast_float32(CPU):
        assert (a @ b - exact).norm() < 1e-6 * exact.norm()
        assert torch.get_float32_matmul_precision() == ("medium" if arithmetic._is_exact() else "highest")
    assert torch.get_float32_matmul_precision() == "highest"


def test_left_alone_where_products_would_be_less_exact(monkeypatch):
    monkeypatch.setattr(arithmetic, "_is_exact", lambda: False)
    with fast_float32(CPU):
        assert torch.get_float32_matmul_precision() == "highest"


def test_a_loss_of_exactness_is_found(monkeypatch):
    product = torch.Tensor.__matmul__
    monkeypatch.setattr(
        torch.Tensor,
        "__matmul__",
        lambda a, b: product(a.bfloat16(), b.bfloat16()).float() if a.dtype == torch.float32 else product(a, b),
    )
    assert not arithmetic._is_exact.__wrapped__()


def test_other_devices_are_not_touched():
    with fast_float32(torch.device("cuda")):
        assert torch.get_float32_matmul_precision() == "highest"


def test_restored_after_an_error():
    with pytest.raises(KeyError), fast_float32(CPU):
        raise KeyError
    assert torch.get_float32_matmul_precision() == "highest"


def settings():
    cuda = torch.backends.cuda
    return (
        torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled(),
        cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.cudnn_sdp_enabled(), cuda.math_sdp_enabled(),
    )  # fmt: skip


def test_on_a_gpu_attention_is_reproducible_too_and_all_is_put_back():
    before = settings()
    with reproducible(CPU):
        assert settings() == before
    with pytest.raises(KeyError), reproducible(torch.device("cuda")):
        assert settings() == (True, True, False, False, False, True)
        raise KeyError
    assert settings() == before


@pytest.mark.parametrize(("there", "in_hardware", "says"), [
    (True, True, "bfloat16"), (True, False, "float32"), (False, False, "bfloat16"),
])  # fmt: skip
def test_bfloat16_only_where_a_gpu_multiplies_it_in_hardware(monkeypatch, there, in_hardware, says):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: in_hardware or including_emulation)
    assert resolve_precision("auto", torch.device("cuda")) == says
    assert resolve_precision("float32", torch.device("cuda")) == "float32"
