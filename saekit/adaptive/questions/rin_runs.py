"""What RIN's questions are asked of: everything that sampling leaves behind, and dictionaries of its slots.

Slots are not exchangeable, since each starts from a learnt row of its own: vectors keep their slot, and a dictionary
may take the mean of each slot away before it encodes. Steps come first, as a Site gives them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saekit.adaptive.deciding import DecidingTarget
from saekit.adaptive.diffusion import Sampler, denoised
from saekit.adaptive.effects import as_many_like, rank_p
from saekit.adaptive.harvest import train_sae_on
from saekit.adaptive.rin import RIN
from saekit.adaptive.telling import activation_sums
from saekit.codes import SparseCodes
from saekit.sae import SAE
from saekit.targets import Site
from saekit.targets.target import Edit

N_FEATURES, K = 192, 8
CONTROLS = 19
# features that are tried out one by one, and on how many of the training pictures
CANDIDATES, SCREENED = 24, 150
Judging = Callable[[Tensor], Tensor]
Places = Float[Tensor, "steps n places width"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Runs:
    """Some pictures from noise to the end.

    Attributes:
        labels: the classes asked for.
        noisy: what each step was given.
        seen: the picture as each step saw it, the last one being what is returned.
        latents: behind each step's computing, which the next step is given.
        after_reading: in the last block, before computing.
        loaded: what the last block's slots read.
        written: what its patches are given.
        pattern: where the first block's slots read.
    """

    labels: Int[Tensor, " n"]
    noisy: Float[Tensor, "steps n channels height height"]
    seen: Float[Tensor, "steps n channels height height"]
    latents: Float[Tensor, "steps n slots latent"]
    after_reading: Float[Tensor, "steps n slots latent"]
    loaded: Float[Tensor, "steps n slots latent"]
    written: Float[Tensor, "steps n patches d"]
    pattern: Float[Tensor, "steps n heads slots patches"]

    @property
    def steps(self) -> int:
        return len(self.seen)


def read_runs(target: DecidingTarget, model: RIN, inputs: Int[Tensor, " n"]) -> Runs:
    """Sample once and keep what passed; edits that are in place act on it."""
    last = model.config.blocks - 1
    sites = {
        "noisy": "model:in@*",
        "latents": "model.z_final:out@*",
        "after_reading": f"model.blocks.{last}.z_read:out@*",
        "loaded": f"model.blocks.{last}.read:out@*",
        "written": f"model.blocks.{last}.write:out@*",
        "pattern": "model.blocks.0.read.pattern:out@*",
    }
    found = target.target.read(inputs, [Site.parse(name) for name in sites.values()])
    tensors = {what: found[Site.parse(name)] for what, name in sites.items()}
    return Runs(labels=inputs % model.config.classes, seen=cast(Sampler, target.target.model).seen, **tensors)


def read_edited(target: DecidingTarget, model: RIN, inputs: Int[Tensor, " n"], edits: Mapping[Site, Edit]) -> Runs:
    """The same with some tensors replaced."""
    with target.target.editing(edits):
        return read_runs(target, model, inputs)


def given(step: int) -> Site:
    """The latents that a step is given: the last step's, which come in nowhere else. Step 0 is given zeros."""
    return Site.parse(f"model.z_prev:out@{step}")


@torch.no_grad()
def estimate(target: DecidingTarget, model: RIN, runs: Runs, step: int, latents: Tensor) -> Float[Tensor, "n *picture"]:
    """The picture as step `step` would see it if it were given other latents, and the same noisy picture."""
    times = torch.linspace(1, 0, runs.steps + 1)
    gamma = cast(Sampler, target.target.model).schedule(times[step])
    label = torch.nn.functional.one_hot(runs.labels, model.config.classes).float()
    noise, _ = model(runs.noisy[step], gamma.expand(len(label)), label, latents)
    return denoised(runs.noisy[step], noise, gamma)


@dataclass(frozen=True, slots=True, eq=False)
class Dictionary:
    """An SAE, and what is taken away from the vectors of each place (slot, patch) first; zeros for nothing."""

    sae: SAE
    centre: Float[Tensor, "places width"]

    def encode(self, vectors: Float[Tensor, "*lead places width"]) -> SparseCodes:
        """Codes in the order of `vectors`, places fastest."""
        return self.sae.encode((vectors - self.centre).flatten(0, -2))

    def decode(self, codes: SparseCodes, shape: torch.Size) -> Float[Tensor, "*lead places width"]:
        """The vectors again, in the shape that they had."""
        return self.sae.decode(codes).view(shape) + self.centre

    def scaling(self, feature: int, dose: float) -> Edit:
        """`dose` times a feature, wherever it is active; what the SAE does not explain stays."""

        def edit(latents: Tensor) -> Tensor:
            codes = self.encode(latents)
            own = (codes.features == feature).nonzero()[:, 0]
            change = torch.zeros_like(latents).flatten(0, -2)
            more = (dose - 1) * codes.values[own, None] * self.sae.W_dec[feature].detach()
            return latents + change.index_add(0, codes.token_of_entry()[own], more).view(latents.shape)

        return edit


def learn(vectors: Places, name: str, *, tokens: int, seed: int, centred: bool = True) -> Dictionary:
    """A dictionary of the vectors of all steps, pictures and places, with the slots' means taken away if `centred`."""
    site = Site.parse(name)
    centre = vectors.mean((0, 1)) * centred
    sizes = {"n_features": N_FEATURES, "k": K, "tokens": tokens}
    return Dictionary(train_sae_on(site, (vectors - centre).flatten(0, -2), seed=seed, name="rin", **sizes), centre)


@torch.no_grad()
def quality(
    dictionary: Dictionary, train_vectors: Float[Tensor, "steps m places width"], vectors: Places
) -> dict[str, float]:
    """FVU, as a share of what the places' means leave unexplained, beside that of as many principal components."""
    mean = train_vectors.mean((0, 1))
    left = vectors - mean
    axes = torch.linalg.eigh(torch.cov((train_vectors - mean).flatten(0, -2).T))[1][:, -K:]
    codes, total = dictionary.encode(vectors), left.square().sum()
    missed = (vectors - dictionary.decode(codes, vectors.shape)).square().sum()
    return {
        "fvu": float(missed / total),
        f"fvu of {K} components": float((left - left @ axes @ axes.T).square().sum() / total),
        "dead": float((codes.feature_counts() == 0).float().mean()),
    }


def chosen_by(codes: SparseCodes, effect: Callable[[int], float]) -> int:
    """Of the features with the largest activations the one with the largest effect."""
    total = activation_sums(codes)
    tried = total.topk(min(CANDIDATES, int((total > 0).sum()))).indices.tolist()
    return max(tried, key=effect)


def rms(change: Tensor) -> float:
    return float(change.square().mean().sqrt())


def rank_of(own: float, others: list[float]) -> dict[str, float]:
    """An effect beside those of others like it; p counts those at least as strong, and itself."""
    return {
        "feature": own,
        "mean of matched": sum(others) / len(others),
        "strongest of matched": max(others, key=abs),
        "p": rank_p(abs(own), [abs(other) for other in others]),
    }


def moments(steps: int) -> dict[str, int]:
    """Three steps that are given latents (the first is not)."""
    return {"early": max(1, steps // 5), "middle": max(1, steps // 2), "late": max(1, steps * 4 // 5)}


def like(codes: SparseCodes, feature: int) -> tuple[int, ...]:
    """Features of about the same rate and strength, as many as there are up to nineteen."""
    return as_many_like(codes, feature, most=CONTROLS)


def pictures(runs: Runs, part: slice) -> Runs:
    """Some of them."""
    return Runs(
        labels=runs.labels[part],
        **{
            name: getattr(runs, name)[:, part]
            for name in ("noisy", "seen", "latents", "after_reading", "loaded", "written", "pattern")
        },
    )
