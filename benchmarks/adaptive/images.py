"""Harder pictures than digits of 8 x 8 pixels, where they are on this machine: handwriting and photographs.

MNIST's test images in their own format (8,000 to learn from, 2,000 held out), and 1,500 + 500 photographs of CIFAR-10.
Nothing is fetched; `FOLDER` beside the project is where they are looked for.
"""

import gzip
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from saekit.adaptive.a_vit_recipe import CONTROL, HALTING, AViTRecipe
from saekit.adaptive.a_vit_report import measure_a_vit
from saekit.adaptive.digits import LabelledImages, divided
from saekit.adaptive.saved import filled

FOLDER = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "images"
MNIST = "mnist-t10k-images-idx3-ubyte.gz", "mnist-t10k-labels-idx1-ubyte.gz"
CIFAR = "cifar10_2000.npz"
N_TEST = 2_000


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageRecipe(AViTRecipe):
    """`AViTRecipe` on other pictures, in patches of 4: 64 tokens of MNIST, 81 of CIFAR-10."""

    pictures: Literal["mnist", "cifar10"] = "mnist"
    patch: int = 4

    @classmethod
    def mnist(cls, seed: int) -> "ImageRecipe":
        return cls(pictures="mnist", canvas=32, seed=seed, plain_epochs=12, halting_epochs=6)

    @classmethod
    def cifar10(cls, seed: int) -> "ImageRecipe":
        return cls(pictures="cifar10", canvas=36, channels=3, seed=seed, plain_epochs=60, halting_epochs=30)

    @property
    def images(self) -> LabelledImages:
        return mnist(self.seed) if self.pictures == "mnist" else cifar10()


@cache
def mnist(seed: int) -> LabelledImages:
    """Divided by the seed."""
    images, labels = (_idx(FOLDER / name) for name in MNIST)
    return divided(images.float() / 255, labels.long(), n_test=N_TEST, seed=seed)


@cache
def cifar10() -> LabelledImages:
    """Divided as its authors did."""
    with np.load(FOLDER / CIFAR) as file:
        train, test = (torch.from_numpy(file[f"x_{part}"]).movedim(3, 1).float() / 255 for part in ("train", "test"))
        labels = [torch.from_numpy(file[f"y_{part}"]).long() for part in ("train", "test")]
    return LabelledImages(train, labels[0], test, labels[1])


def _idx(path: Path) -> Tensor:
    """An array in the format of the MNIST files: its number of dimensions in byte 3, each size in four bytes."""
    data = gzip.decompress(path.read_bytes())
    shape = np.frombuffer(data, dtype=">u4", count=data[3], offset=4).tolist()
    return torch.from_numpy(np.frombuffer(data, dtype=np.uint8, offset=4 + 4 * data[3]).reshape(shape).copy())


def measure_images(made: AViTRecipe, weights: Mapping[str, Mapping[str, Tensor]]) -> dict[str, float]:
    """What `saekit adaptive report a-vit` says, on the recipe's pictures; what does not exist of them is left out."""
    # two models: the second may not be written over the first
    model, control = (filled(made.build(), weights[stage]) for stage in (HALTING, CONTROL))
    facts = measure_a_vit(model, control, made.images)
    return {name: value for name, value in facts.items() if isinstance(value, int | float) and math.isfinite(value)}
