"""Scikit-learn's digits (1,797 scans of 8 x 8 pixels, 16 greys) on a larger canvas, so that there is background."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saekit.errors import SaekitError

MEAN, SPREAD = 0.25, 0.35
N_TEST = 360


@dataclass(frozen=True, slots=True, eq=False)
class Digits:
    """Digits divided once and for all by a seed; grey levels from 0 to 1.

    Attributes:
        train, test: `(n, 8, 8)`.
        train_labels, test_labels: `(n,)`.
    """

    train: Float[Tensor, "n 8 8"]
    train_labels: Int[Tensor, " n"]
    test: Float[Tensor, "m 8 8"]
    test_labels: Int[Tensor, " m"]

    def test_images(self, canvas: int) -> Float[Tensor, "m 1 canvas canvas"]:
        """The test digits, each with a shift of at most one pixel that never changes."""
        return on_canvas(self.test, canvas, shifts(len(self.test), seed=0))


def load_digits(seed: int = 0) -> Digits:
    """Read and divide them.

    Raises:
        SaekitError: scikit-learn, which they come with, is not installed.
    """
    try:
        from sklearn import datasets  # optional, and slow to import
    except ImportError as error:
        raise SaekitError(
            "the digits come with scikit-learn, which is not installed; pip install 'saekit[adaptive]'"
        ) from error
    bunch: Any = datasets.load_digits()
    images = torch.from_numpy(bunch.images).float() / 16
    labels = torch.from_numpy(bunch.target).long()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    train, test = order[N_TEST:], order[:N_TEST]
    return Digits(images[train], labels[train], images[test], labels[test])


def shifts(n: int, *, seed: int) -> Int[Tensor, "n 2"]:
    """A shift of -1, 0 or 1 pixel down and to the right for each image."""
    return torch.randint(-1, 2, (n, 2), generator=torch.Generator().manual_seed(seed))


def on_canvas(
    images: Float[Tensor, "n 8 8"], canvas: int, moved: Int[Tensor, "n 2"]
) -> Float[Tensor, "n 1 canvas canvas"]:
    """Each image in the middle of a larger one, moved a little, and normalised.

    Raises:
        SaekitError: a canvas without room for the shifts.
    """
    height = images.shape[1]
    if canvas < height + 2:
        raise SaekitError(
            f"a canvas of {canvas} has no room for {height} pixels and a shift; give {height + 2} or more"
        )
    rows = (canvas - height) // 2 + moved[:, :1] + torch.arange(height)
    columns = (canvas - height) // 2 + moved[:, 1:] + torch.arange(height)
    placed = images.new_zeros(len(images), canvas, canvas)
    placed[torch.arange(len(images))[:, None, None], rows[:, :, None], columns[:, None, :]] = images
    return ((placed - MEAN) / SPREAD)[:, None]


def foreground(images: Float[Tensor, "n 1 height width"], patch: int) -> Bool[Tensor, "n patches"]:
    """The patches with any ink in them."""
    ink = images * SPREAD + MEAN > 0.5 / 16
    return torch.nn.functional.max_pool2d(ink.float(), patch).flatten(1) > 0
