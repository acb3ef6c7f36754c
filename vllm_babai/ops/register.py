"""How a custom op becomes known to PyTorch."""

from collections.abc import Callable

import torch
from torch import Tensor

DISPATCH_KEYS = ("CPU", "CUDA")


def register(signature: str, run: Callable[..., Tensor], fake: Callable[..., Tensor]) -> torch.library.Library:
    """Make `babai::` and `signature` an op; it lives as long as what is returned.

    fake: gives an output of the right size, for compiling.
    """
    library = torch.library.Library("babai", "FRAGMENT")
    library.define(signature)
    name = signature.partition("(")[0]
    for key in DISPATCH_KEYS:
        library.impl(name, run, key)
    torch.library.register_fake(f"babai::{name}", fake, lib=library)
    return library
