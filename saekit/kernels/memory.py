"""Memory for weight gradients that is kept between steps.

What is larger than 32 MB glibc takes from the system and gives back at every use, and fresh pages can cost several
times what writing them does. So the memory of a large gradient stays with the weight that it belongs to, and is
handed out again when nobody holds the last gradient any more.
"""

from weakref import ref

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

LARGE_BYTES = 1 << 25
# of each weight: its memory, and the view that was handed out last, which dies with the last tensor on it
_kept, _lent = WeakTensorKeyDictionary(), WeakTensorKeyDictionary()


def is_large(weight: Tensor) -> bool:
    """Whether its gradient's memory is worth keeping."""
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.nbytes >= LARGE_BYTES


def gradient_of(weight: Tensor) -> Tensor:
    """Unwritten contiguous memory in the shape of a large `weight`."""
    memory = _kept.get(weight)
    if memory is None or _lent[weight]() is not None:
        memory = _kept[weight] = np.empty(tuple(weight.shape), dtype=np.float32)
    view = memory[:]
    _lent[weight] = ref(view)
    return torch.from_numpy(view)
