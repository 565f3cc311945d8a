"""Which of many files are one SAE: told from their names alone, on a disk or in a repository."""

import re
from collections.abc import Iterable
from pathlib import PurePath, PurePosixPath

from saekit.errors import FileError
from saekit.formats.tensor_files import READERS

# what each format calls its weights; a folder with none of them may hold one file of any name
WEIGHTS = (
    "sae_weights.safetensors",
    "sae.safetensors",
    "ae.pt",
    "params.npz",
    "params.safetensors",
    "checkpoints/final.safetensors",
)
CONFIGS = ("cfg.json", "config.json", "hyperparams.json")
"""The first that is there is an SAE's own config."""
SIBLINGS = ("activation_scaler.json", "activation_whitening.safetensors", "config.yaml")
"""What else some formats read beside the weights."""
ABOVE = ("config.json",)
"""What some formats read in the folder above."""

_NOT_WEIGHTS = {"sparsity.safetensors", "activation_whitening.safetensors", "activations_store_state.safetensors"}


def weights_among(names: Iterable[str], *, place: str, example: str) -> str:
    """The name of the file that holds the weights.

    Args:
        names: of files, relative to the place where the SAE is, with `/` between folders.
        place: what the message calls that place.
        example: how a user writes one of several, with `{}` where its name goes.

    Raises:
        FileError: no weights there, or more than one SAE; the message names some.
    """
    names = list(names)
    known = next((name for name in WEIGHTS if name in names), None)
    if known is not None:
        return known
    others = sorted((name for name in names if "/" not in name and _may_be_weights(name)), key=_natural)
    if len(others) == 1:
        return others[0]
    if others:
        several = ", ".join(others[:3])
        raise FileError(
            f"{place} holds {len(others)} files of weights ({several}, ...); give one of them: "
            f"{example.format(others[0])}"
        )
    below = _saes_below(names)
    if below:
        several = ", ".join(below[:3])
        raise FileError(
            f"no SAE in {place} itself; it has {len(below)} below ({several}{', ...' if len(below) > 3 else ''}): "
            f"give one of them: {example.format(below[0])}"
        )
    raise FileError(f"no SAE in {place}: expected one of {', '.join(WEIGHTS)}; give the folder of one SAE")


def folder_of(weights: PurePath) -> PurePath:
    """The folder of the SAE whose weights these are: `checkpoints/final.safetensors` belongs to the folder above it."""
    return weights.parent.parent if weights.parent.name == "checkpoints" else weights.parent


def companions(weights: str, names: Iterable[str]) -> list[str]:
    """Those of `names` that may say what the weights mean: configs beside them and above."""
    folder = folder_of(PurePosixPath(weights))
    wanted = {folder / name for name in (*CONFIGS, *SIBLINGS)} | {folder.parent / name for name in ABOVE}
    return [name for name in names if PurePosixPath(name) in wanted]


def _may_be_weights(name: str) -> bool:
    path = PurePosixPath(name)
    return path.suffix in READERS and path.name not in _NOT_WEIGHTS


def _saes_below(names: Iterable[str]) -> list[str]:
    """What to name for each SAE in a folder further down: its folder, or its file where that has a name of its own."""
    candidates = [name for name in names if "/" in name and _may_be_weights(name)]
    folders = {name: str(folder_of(PurePosixPath(name))) for name in candidates}
    usual = {folders[name] for name in candidates if any(name == f"{folders[name]}/{known}" for known in WEIGHTS)}
    return sorted(usual | {name for name in candidates if folders[name] not in usual}, key=_natural)


def _natural(name: str) -> list[tuple[int, str]]:
    """A key by which layer_2 comes before layer_10."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"([0-9]+)", name)]
