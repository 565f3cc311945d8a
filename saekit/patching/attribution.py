"""Estimates of effects from gradients: all features at all positions from a few passes.

    attribution patching   (other - own) * gradient at the untouched run    (Syed et al., arXiv 2310.10348)
    integrated gradients   (other - own) * mean gradient on the way there   (Sundararajan et al., arXiv 1703.01365)

`own` and `other` are strengths of a feature, and gradients are along what a unit of it writes: its decoder row (Marks
et al., arXiv 2403.19647), in the units of the token where the SAE normalises its input. With another run to take
strengths from, what the SAE does not reconstruct is patched too: the error node of each token. Then integrated
gradients add up to the effect of replacing the whole Site, up to the error of the sum over steps.

They estimate different things. Attribution patching is a first-order guess at each edit made alone, the
question that `exact_effects` answers; integrated gradients divide up the effect of all edits made together.
Check either against `exact_effects` on a sample before relying on it.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saekit.activations.mask import MaskPolicy
from saekit.codes import SparseCodes
from saekit.errors import SaekitError
from saekit.patching.effects import Candidates, Prompts, check_same_places, read_prompts
from saekit.patching.metric import Metric
from saekit.patching.splice import write, writing_site
from saekit.patching.tokens import TokenMask
from saekit.sae import SAE
from saekit.targets import Site, Target


@dataclass(frozen=True, slots=True)
class Attribution:
    """Estimated effects on a metric; everywhere else the estimate is 0.

    Attributes:
        at: the (prompt, position, feature) places.
        effect: `(n,)` of each, in float64.
        error: `(prompts, context)` of the error nodes; 0 for ablations, which leave the error as it is.
    """

    at: Candidates
    effect: Float[Tensor, " n"]
    error: Float[Tensor, "prompts context"]

    def everywhere(self) -> tuple[Candidates, Float[Tensor, " m"]]:
        """Each feature of each prompt once, with the sum over its positions."""
        pairs = torch.stack([self.at.prompt, self.at.feature], 1)
        _, group = pairs.unique(dim=0, return_inverse=True)
        together = self.at.everywhere()
        return together, self.effect.new_zeros(len(together)).index_add_(0, group, self.effect)


def attribute(
    target: Target,
    sae: SAE,
    site: Site,
    ids: Int[Tensor, "prompts context"],
    metric: Metric,
    *,
    other: Prompts | None = None,
    steps: int = 0,
    mask: MaskPolicy | TokenMask = MaskPolicy(),
    batch_rows: int = 32,
) -> Attribution:
    """Estimated effect of every feature at every position, of ablation or of patching from `other`.

    Args:
        steps: 0 for attribution patching; else integrated gradients over that many points of the way, all
            features moving together.
        other: as in `exact_effects`.

    Raises:
        ShapeError: `other` of other sizes than `ids`.
    """
    if steps < 0:
        raise SaekitError(f"steps={steps}; give 0 for attribution patching, or how many points to integrate over")
    own = read_prompts(target, sae, site, ids, mask=mask, batch_rows=batch_rows)
    if other is not None:
        check_same_places(ids, other.grid.keep)
    change = change_between(own, other)
    with torch.no_grad():
        rows = own.vectors.flatten(0, 1).to(sae.b_dec)
        written = write(change, sae, rows).to(own.vectors).view_as(own.vectors)
        whole = written
        if other is not None:
            whole = torch.where(own.grid.keep[..., None], other.vectors - own.vectors, 0.0)
    written_at = writing_site(sae, site)
    points = [0.0] if steps == 0 else [(i + 0.5) / steps for i in range(steps)]
    gradient = torch.zeros_like(own.vectors)
    for part in torch.arange(len(ids)).split(batch_rows):
        for point in points:
            start = own.vectors[part] + point * whole[part]
            gradient[part] += gradient_at(target, written_at, ids[part], metric, part, start) / len(points)
    token = change.token_of_entry()
    context = ids.shape[1]
    return Attribution(
        at=Candidates((token // context).cpu(), (token % context).cpu(), change.features.cpu()),
        effect=along_decoder(change, gradient.flatten(0, 1).to(sae.b_dec), sae, rows).double().cpu(),
        error=(gradient.double() * (whole - written).double()).sum(-1).cpu(),
    )


def gradient_at(
    target: Target, site: Site, ids: Tensor, metric: Metric, prompt: Int[Tensor, " batch"], vectors: Tensor
) -> Tensor:
    """Gradient of the metric, summed over prompts, at a Site that is given these vectors."""
    with torch.enable_grad():
        start = vectors.detach().requires_grad_()
        value = metric(target.run(ids, edits={site: lambda _: start}), prompt).sum()
        return torch.autograd.grad(value, start)[0]


@torch.no_grad()
def along_decoder(
    change: SparseCodes, gradient: Float[Tensor, "n_tokens d_model"], sae: SAE, rows: Float[Tensor, "n_tokens d_model"]
) -> Float[Tensor, " nnz"]:
    """`change * (gradient . what a unit writes there)` of every entry: the gradient of writing, asked for by values."""
    with torch.enable_grad():
        values = change.values.detach().requires_grad_()
        written = write(change.with_values(values), sae, rows.detach())
        dots = torch.autograd.grad(written, values, gradient.detach())[0]
    return change.values * dots


def change_between(own: Prompts, other: Prompts | None) -> SparseCodes:
    """`difference` at the tokens that count; the others pass by, whatever the other prompts have there."""
    change = difference(own.codes, None if other is None else other.codes)
    return change.where(own.grid.keep.flatten().to(change.device)[change.token_of_entry()])


def difference(own: SparseCodes, other: SparseCodes | None) -> SparseCodes:
    """`other - own`, entries of both; `-own` without another. Values may be negative."""
    own = own.active()
    if other is None:
        return own.with_values(-own.values)
    other = other.active()
    key = torch.cat([codes.token_of_entry() * own.n_features + codes.features for codes in (own, other)])
    found, group = key.unique(return_inverse=True)
    values = own.values.new_zeros(len(found)).index_add_(0, group, torch.cat([-own.values, other.values]))
    return SparseCodes.from_pairs(
        found // own.n_features, found % own.n_features, values, n_tokens=own.n_tokens, n_features=own.n_features
    )
