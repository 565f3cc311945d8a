"""Which implementation runs on a device, decided in one place so that `saekit doctor` can say it."""

import importlib.util
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Backend:
    """The name of the implementation in use, and why it was chosen."""

    name: str
    reason: str


def uses_triton(device: torch.device | str) -> bool:
    """Whether Triton's kernels run on this device."""
    return torch.device(device).type == "cuda" and importlib.util.find_spec("triton") is not None


def current(x: torch.Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the one that its arguments are on."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def has_fast_bf16() -> bool:
    """Whether this CPU has instructions for products in bfloat16."""
    # private in torch, but present since 1.12, where torch has oneDNN, and the one question that covers x86 and ARM
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def choose_backend(device: torch.device | str) -> Backend:
    """What encodes and decodes tensors on this device."""
    kind = torch.device(device).type
    if uses_triton(device):
        return Backend("triton", "entries are appended in the product's epilogue and summed without atomics")
    if kind == "cpu":
        screening = "can screen in bfloat16 when asked to" if has_fast_bf16() else "has no fast bfloat16 to screen in"
        return Backend(
            "sparse torch",
            "entries are selected by a cut that group maxima prove, gathered and summed by embedding_bag; "
            f"this CPU {screening}",
        )
    why = "triton is not installed; pip install triton" if kind == "cuda" else f"no kernels written for {kind}"
    return Backend("sparse torch", f"{why}; the same torch operations run there")
