"""Which implementation runs on a device, decided in one place so that `saekit doctor` can say it."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Backend:
    """The name of the implementation in use, and why it was chosen."""

    name: str
    reason: str


def choose_backend(device: torch.device | str) -> Backend:
    """What encodes and decodes tensors on this device."""
    kind = torch.device(device).type
    if kind == "cpu":
        return Backend(
            "sparse torch", "entries are gathered and summed by embedding_bag, sorted by a 16-bit radix sort"
        )
    return Backend(
        "sparse torch", f"no kernels written for {kind} in this version; the same torch operations run there"
    )
