"""Pictures as rows of patches."""

from jaxtyping import Float
from torch import Tensor, nn

from saekit.errors import ShapeError


def patches_of(
    images: Float[Tensor, "batch channels height width"], *, channels: int, image: int, patch: int
) -> Float[Tensor, "batch patches pixels"]:
    """The patches of square pictures, row by row.

    Raises:
        ShapeError: pictures of another size than the model was made for.
    """
    if tuple(images.shape[1:]) != (channels, image, image):
        raise ShapeError(
            f"images are {tuple(images.shape[1:])}, but this model works on ({channels}, {image}, {image}); "
            "resize or pad them"
        )
    return nn.functional.unfold(images, patch, stride=patch).transpose(1, 2)


def picture_from(
    patches: Float[Tensor, "batch patches pixels"], *, image: int, patch: int
) -> Float[Tensor, "batch channels image image"]:
    """The square pictures that `patches_of` cut up."""
    return nn.functional.fold(patches.transpose(1, 2), (image, image), patch, stride=patch)
