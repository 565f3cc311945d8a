"""Labelled images on a larger canvas, so that there is background; and scikit-learn's digits as such.

The digits are 1,797 scans of 8 x 8 pixels in 16 greys.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saekit.errors import SaekitError

MEAN, SPREAD = 0.25, 0.35
N_TEST = 360


@dataclass(frozen=True, slots=True, eq=False)
class LabelledImages:
    """Images to train on and others to test on; levels from 0 to 1.

    Attributes:
        train, test: `(n, height, width)` in grey, or `(n, channels, height, width)`.
        train_labels, test_labels: `(n,)`.
    """

    train: Float[Tensor, "n *channels height width"]
    train_labels: Int[Tensor, " n"]
    test: Float[Tensor, "m *channels height width"]
    test_labels: Int[Tensor, " m"]

    def train_images(self, canvas: int) -> Float[Tensor, "n channels canvas canvas"]:
        """The training images with a shift each, which never changes either: to look at, not to train on."""
        return on_canvas(self.train, canvas, shifts(len(self.train), seed=1))

    def test_images(self, canvas: int) -> Float[Tensor, "m channels canvas canvas"]:
        """The test images, each with a shift of at most one pixel that never changes."""
        return on_canvas(self.test, canvas, shifts(len(self.test), seed=0))


def load_digits(seed: int = 0) -> LabelledImages:
    """Read them, and divide them once and for all by a seed.

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
    return divided(images, labels, n_test=N_TEST, seed=seed)


def divided(
    images: Float[Tensor, "n *channels height width"], labels: Int[Tensor, " n"], *, n_test: int, seed: int
) -> LabelledImages:
    """`n_test` of them, chosen by the seed, to test on."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    train, test = order[n_test:], order[:n_test]
    return LabelledImages(images[train], labels[train], images[test], labels[test])


def shifts(n: int, *, seed: int) -> Int[Tensor, "n 2"]:
    """A shift of -1, 0 or 1 pixel down and to the right for each image."""
    return torch.randint(-1, 2, (n, 2), generator=torch.Generator().manual_seed(seed))


def on_canvas(
    images: Float[Tensor, "n *channels height width"], canvas: int, moved: Int[Tensor, "n 2"]
) -> Float[Tensor, "n channels canvas canvas"]:
    """Each image in the middle of a larger one, moved a little, and normalised.

    Raises:
        SaekitError: a canvas without room for the shifts.
    """
    images = images[:, None] if images.ndim == 3 else images
    channels, height, width = images.shape[1:]
    if canvas < max(height, width) + 2:
        raise SaekitError(
            f"a canvas of {canvas} has no room for {height} x {width} pixels and a shift; give "
            f"{max(height, width) + 2} or more"
        )
    rows = (canvas - height) // 2 + moved[:, :1] + torch.arange(height)
    columns = (canvas - width) // 2 + moved[:, 1:] + torch.arange(width)
    placed = images.new_zeros(len(images), canvas, canvas, channels)
    placed[torch.arange(len(images))[:, None, None], rows[:, :, None], columns[:, None, :]] = images.movedim(1, 3)
    return ((placed - MEAN) / SPREAD).movedim(3, 1).contiguous()


def foreground(images: Float[Tensor, "n channels height width"], patch: int) -> Bool[Tensor, "n patches"]:
    """The patches with any ink in them."""
    ink = (images * SPREAD + MEAN > 0.5 / 16).any(1, keepdim=True)
    return torch.nn.functional.max_pool2d(ink.float(), patch).flatten(1) > 0
