"""What a trained RIN makes: how often a judge sees the class that was asked for, how near the digits are to real ones.

The judge is scikit-learn's, trained on the same real digits as the generator; its second hidden layer is where
distances between sets of pictures are measured (Fréchet's, with the distance between two halves of the real digits
as the floor).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from saekit.adaptive.diffusion import Denoiser, Sampler, Sampling
from saekit.adaptive.digits import LabelledImages, load_digits
from saekit.adaptive.rin import RIN
from saekit.errors import SaekitError

N_SAMPLES, STEPS = 500, 50


class Judge:
    """A small classifier of 8 x 8 digits, grey levels from -1 to 1."""

    def __init__(self, digits: LabelledImages):
        try:
            from sklearn.neural_network import MLPClassifier  # optional, and slow to import
        except ImportError as error:
            raise SaekitError("the judge comes with scikit-learn; pip install 'saekit[adaptive]'") from error
        self.model = MLPClassifier((64, 32), alpha=1e-3, max_iter=120, early_stopping=True, random_state=0)
        self.model.fit(_rows(digits.train * 2 - 1), digits.train_labels.numpy())

    def says(self, images: Tensor) -> Int[Tensor, " n"]:
        return torch.from_numpy(self.model.predict(_rows(images)))

    def features(self, images: Tensor) -> np.ndarray:
        """Its second hidden layer, `(n, 32)`."""
        x = _rows(images)
        for weight, bias in zip(self.model.coefs_[:2], self.model.intercepts_[:2], strict=True):
            x = np.maximum(x @ weight + bias, 0)
        return x


WAYS: Mapping[str, Mapping[str, Any]] = {"carried": {}, "reset": {"carries": False}, "ddpm": {"sampler": "ddpm"}}


def measure_rin(model: RIN, *, seed: int) -> dict[str, Any]:
    """Facts on pictures of all classes, from the same noise for every way of carrying latents.

    eps_error_* are one step's errors of the predicted noise on unseen digits, without latents, with those of a first
    pass over the same picture, and with another example's.
    """
    facts = measure_pictures(model, seed=seed, ways=WAYS) | _eps_errors(model, load_digits(seed))
    facts |= {"constant_macs": model.config.constant_macs, "macs_per_patch": model.config.macs_per_patch}
    return facts | {"carry_scale": float(model.carry_out.weight.detach().abs().mean())}


@torch.no_grad()
def measure_pictures(model: Denoiser, *, seed: int, ways: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """For each way of sampling: how often the judge sees the class that was asked for, and the distance to real digits.

    distance_floor is that of one half of the real digits to the other.
    """
    digits = load_digits(seed)
    judge = Judge(digits)
    labels = torch.arange(N_SAMPLES) % model.config.classes
    noise = torch.randn(N_SAMPLES, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    real = judge.features(digits.train * 2 - 1)
    facts: dict[str, Any] = {
        "samples": N_SAMPLES,
        "steps": STEPS,
        "judge_accuracy": float((judge.says(digits.test * 2 - 1) == digits.test_labels).float().mean()),
        "distance_floor": frechet(real[::2], real[1::2]),
    }
    for name, how in ways.items():
        made = Sampler(model.eval(), Sampling(steps=STEPS, **how))(noise, labels)
        facts[f"class_accuracy_{name}"] = float((judge.says(made) == labels).float().mean())
        facts[f"distance_{name}"] = frechet(judge.features(made), real)
    return facts


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Distance of two Gaussians fitted to rows of features."""
    spread_a, spread_b = np.cov(a.T), np.cov(b.T)
    # the trace of the root of a product, which is real although the product is not symmetric
    of_root = np.sqrt(np.linalg.eigvals(spread_a @ spread_b).real.clip(0)).sum()
    return float(np.square(a.mean(0) - b.mean(0)).sum() + np.trace(spread_a + spread_b) - 2 * of_root)


@torch.no_grad()
def _eps_errors(model: RIN, digits: LabelledImages) -> dict[str, float]:
    images, n = digits.test[:, None] * 2 - 1, len(digits.test)
    generator = torch.Generator().manual_seed(2)
    gamma, noise = torch.rand(n, generator=generator), torch.randn(images.shape, generator=generator)
    g = gamma[:, None, None, None]
    noisy = g.sqrt() * images + (1 - g).sqrt() * noise
    label = torch.nn.functional.one_hot(digits.test_labels, model.config.classes).float()
    plain, z = model(noisy, gamma, label, model.no_latents(n))
    own, other = (model(noisy, gamma, label, latents)[0] for latents in (z, z.roll(1, 0)))
    errors = {"without": plain, "own": own, "anothers": other}
    return {f"eps_error_{name}": float((found - noise).square().mean()) for name, found in errors.items()}


def _rows(images: Float[Tensor, "n *pixels"]) -> np.ndarray:
    return images.flatten(1).numpy().astype(np.float64)
