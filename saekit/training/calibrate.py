"""From a rule that looks across a batch to thresholds that serve a single token.

Batch rules have no answer for one prompt. Their cuts do: run the rule once over a large pool, as one
batch, and note the smallest pre-activation that it kept — of all for Mutual Choice, of each feature for
Feature Choice. (The papers leave inference open; this is our choice.)
"""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from saekit.density import RunningDensity
from saekit.errors import DataError, SaekitError
from saekit.kernels.select import Selection, top_of_all, top_of_columns
from saekit.sae import SAE
from saekit.selection import FeatureChoice, MutualChoice, Threshold


@torch.no_grad()
def calibrate(sae: SAE, pool: Float[Tensor, "n_tokens d_model"]) -> Threshold:
    """The thresholds under which `sae` keeps on single tokens what its rule keeps on `pool`.

    Args:
        pool: activations in the SAE's units; the more the better, tens of thousands at least. A floor of
            Feature Choice is in tokens of the pool.

    Raises:
        DataError: if the pool is empty.
        SaekitError: if the SAE's rule does not look across tokens and so needs no thresholds.
    """
    if not len(pool):
        raise DataError("no activations to calibrate on; give tens of thousands")
    rule = sae.rule
    prepared, _ = sae.prepare(pool.to(sae.b_dec.dtype))
    match rule:
        case MutualChoice():
            kept = top_of_all(prepared, sae.encoder, sae.b_enc, rule.k * len(pool))
            lowest = kept.scores.min().expand(sae.n_features)
        case FeatureChoice():
            if rule.ranks is None and rule.exponent > 0:
                rule = replace(rule, ranks=_ranks(sae, prepared, rule))
            budgets = rule.feature_budgets(len(pool), sae.n_features, pool.device)
            kept = top_of_columns(prepared, sae.encoder, sae.b_enc, budgets)
            lowest = _lowest_per_feature(kept, sae.n_features)
        case _:
            raise SaekitError(
                f"{type(rule).__name__} decides token by token already; "
                "only MutualChoice and FeatureChoice are calibrated"
            )
    # the cut is strict, so it must lie just under the smallest pre-activation that is to be kept
    just_under = torch.nextafter(lowest, torch.full_like(lowest, -torch.inf))
    return Threshold(just_under.clamp(min=0) if rule.relu else just_under, relu=rule.relu)


def _lowest_per_feature(kept: Selection, n_features: int) -> Float[Tensor, " n_features"]:
    lowest = kept.scores.new_full((n_features,), torch.inf)
    return lowest.scatter_reduce_(0, kept.features, kept.scores, reduce="amin")


def _ranks(sae: SAE, prepared: Tensor, rule: FeatureChoice) -> Tensor:
    """Ranks by how often each feature would fire if all matches competed."""
    density = RunningDensity.new(sae.n_features, device=prepared.device)
    density.observe(MutualChoice(rule.k).encode(prepared, sae.encoder, sae.b_enc))
    return density.ranks()
