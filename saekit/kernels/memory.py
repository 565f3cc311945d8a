"""Memory for weight gradients that is kept between steps.

What is larger than 32 MB glibc takes from the system and gives back at every use, and fresh pages can cost several
times what writing them does. So the memory of a large gradient stays with the weight that it belongs to, and is
handed out again when nobody holds the last gradient any more.
"""

import sys

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

LARGE_BYTES = 1 << 25
_kept = WeakTensorKeyDictionary()
# the dictionary, the name in `gradient_of` and the argument of getrefcount
_HOLDERS_WHEN_FREE = 3


def is_large(weight: Tensor) -> bool:
    """Whether its gradient's memory is worth keeping."""
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.nbytes >= LARGE_BYTES


def gradient_of(weight: Tensor) -> Tensor:
    """Unwritten contiguous memory in the shape of a large `weight`."""
    memory = _kept.get(weight)
    if memory is None or sys.getrefcount(memory) > _HOLDERS_WHEN_FREE:
        memory = _kept[weight] = np.empty(tuple(weight.shape), dtype=np.float32)
    return torch.from_numpy(memory)
