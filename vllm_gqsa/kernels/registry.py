"""How the ops of this package become known to torch."""

from collections.abc import Callable

import torch

__all__ = ["register"]

_autograd = torch.library.Library("gqsa", "FRAGMENT")


def register(name: str, schema: str, function: Callable[..., torch.Tensor], fake: Callable[..., torch.Tensor]) -> None:
    """Define a functional op, opaque to torch.compile, for every device.

    A second import of the file that registers it (reload, a test that clears sys.modules) finds the op in place.

    Args:
        name: ``gqsa::op``.
        schema: arguments and result, in torch's notation.
        function: computes it.
        fake: makes a result of the right shape, dtype and device without computing it.
    """
    if hasattr(torch.ops.gqsa, name.removeprefix("gqsa::")):
        return
    torch.library.define(name, schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(name, "default", function)
    torch.library.register_fake(name, fake)
    # Gradients, where there are any, are those of the operations inside.
    _autograd.impl(name.removeprefix("gqsa::"), torch.library.fallthrough_kernel, "Autograd")
