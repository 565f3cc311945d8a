"""How long the encoder is at the start. (Our choice; the papers start it at the decoder's length.)

An encoder that is a copy of the unit-norm decoder reconstructs too much: dozens of directions that overlap each give
the whole of what they share. Training then begins by making everything smaller, and features that fall silent on the
way stay so. Scaling the encoder once, to where the first reconstruction fits best, spares them that. Under an L1
penalty, which makes everything smaller by itself, it does harm.
"""

import torch

from saekit.sae import SAE
from saekit.selection import FeatureChoice, MutualChoice
from saekit.training.objectives import Objective
from saekit.training.objectives.objective import Targets, Vectors


@torch.no_grad()
def fit_first_scale(sae: SAE, objective: Objective, x: Vectors, y: Targets) -> None:
    """Scale the encoder of a fresh autoencoder so that the reconstruction of `x` comes closest to `y`.

    Codes, and reconstructions about `b_dec`, are proportional to the encoder as long as `b_enc` is zero.
    """
    if isinstance(sae.rule, FeatureChoice):  # whose budgets may need more tokens than there are here
        sae = sae.with_rule(MutualChoice(sae.rule.k, relu=sae.rule.relu))
    made = objective.measure(sae, objective.extra(sae, x), x, y).y_hat - sae.b_dec
    fit = float(((y - sae.b_dec) * made).sum() / made.square().sum().clamp(min=1e-12))
    if fit > 0:
        sae.encoder.mul_(fit)
