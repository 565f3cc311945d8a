"""What the scripts beside this one share: random weights, and a file that says what an SAE must give."""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

D_IN, D_OUT, N_FEATURES, N_TOKENS, K = 6, 5, 12, 16, 3


def out_folder() -> Path:
    """The folder to write into: the first argument."""
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} FOLDER")
    return Path(sys.argv[1])


def randomise(module: nn.Module, seed: int) -> None:
    """Every weight random, thresholds small and positive: no term of the mathematics stays at its zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise.abs() / 2 + 0.05 if name == "threshold" else noise / 2)


def tokens(seed: int, d_in: int = D_IN) -> Tensor:
    """Inputs of unlike norms and of a mean that is not zero."""
    generator = torch.Generator().manual_seed(1000 + seed)
    scale = torch.rand(N_TOKENS, 1, generator=generator) * 2 + 0.5
    return torch.randn(N_TOKENS, d_in, generator=generator) * scale + 0.3


def save_expected(folder: Path, *, x: Tensor, codes: Tensor, output: Tensor) -> None:
    """`x (n_tokens, d_in)`, dense `codes (n_tokens, n_features)` and `output (n_tokens, d_out)` of one SAE."""
    assert (codes != 0).any() and (codes == 0).any(), f"{folder}: codes that test nothing"
    tensors = {"x": x, "codes": codes, "output": output}
    save_file({name: t.detach().float().contiguous() for name, t in tensors.items()}, folder / "expected.safetensors")
