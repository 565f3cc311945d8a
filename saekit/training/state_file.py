"""The file that holds an unfinished run: tensors and a few facts, whole or not there at all, never pickle."""

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from saekit.errors import FileError


def check_unfinished(path: Path, *, resume: bool) -> Path:
    """The same path, if there is a run to resume, or none that a new one would write over.

    Raises:
        FileError: `resume` without a file, or a file without `resume`.
    """
    if resume and not path.exists():
        raise FileError(f"nothing to resume: there is no {path}; start without --resume")
    if not resume and path.exists():
        raise FileError(
            f"{path} holds an unfinished run; pass --resume to go on, choose another folder, "
            "or delete that file to start anew"
        )
    return path


def write_state(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Written beside its place and renamed.

    Raises:
        FileError: if it cannot be written; what was there before is left alone.
    """
    beside = path.with_suffix(".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(dict(tensors), beside, metadata=dict(metadata))
        os.replace(beside, path)
    except (OSError, SafetensorError) as error:
        if beside.is_file():
            beside.unlink()
        raise FileError(f"cannot write {path}: {error}; check space and rights") from error


def read_state(path: Path, *, contents: bool = True) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors (none without `contents`) and metadata; what is wrong with a damaged file is the caller's to say."""
    # copies: what safetensors gives is the file itself, which may be written over
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()} if contents else {}
    with safe_open(path, framework="pt") as file:
        return tensors, file.metadata() or {}


def optimizer_tensors(optimizer: torch.optim.Optimizer, prefix: str) -> dict[str, Tensor]:
    """All that the optimiser remembers of its parameters: `{prefix}.{number}.{name}`."""
    return {
        f"{prefix}.{number}.{name}": tensor.clone()
        for number, entries in optimizer.state_dict()["state"].items()
        for name, tensor in entries.items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, prefix: str, tensors: Mapping[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`; other tensors may be there too."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith(f"{prefix}."):
            number, name = key.removeprefix(f"{prefix}.").split(".")
            state.setdefault(int(number), {})[name] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
