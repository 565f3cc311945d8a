"""Going on from an SAE that is already trained: on other data, at another k, or with thresholds that learn.

`train(..., start=[sae])` with the objective `JumpReLU` is the fine-tuning of thresholds: a calibrated SAE has
cuts that give the right number of active features, and training moves each to where it serves best.
"""

from dataclasses import replace

import torch

from saekit.activations.harvest import checksum
from saekit.errors import SaekitError
from saekit.sae import SAE
from saekit.sae_config import SAEConfig, rule_tensors
from saekit.selection import SelectionRule, Threshold, keeps_negatives


def check_start(start: SAE, cfg: SAEConfig, *, skip: bool, rule: SelectionRule) -> None:
    """Refuse an SAE that training could not go on with as it is.

    Args:
        rule: that of the run.

    Raises:
        SaekitError: if widths, normalisation or the kind of SAE are others than the run's, or its negative
            activations would be lost.
    """
    if keeps_negatives(start.rule) and not keeps_negatives(rule):
        raise SaekitError(
            "this SAE keeps negative activations, and the run would drop them; train under a rule with a budget and "
            "relu=False (--no-relu), or start without it"
        )
    is_, asked = _shape(start.cfg, skip=start.skip is not None), _shape(cfg, skip=skip)
    differing = [f"{name} is {is_[name]}, the run asks for {asked[name]}" for name in asked if is_[name] != asked[name]]
    if differing:
        raise SaekitError(f"cannot start from this SAE: {'; '.join(differing)}; change the run, or start without it")


def checksum_of_weights(sae: SAE) -> int:
    """Differs for SAEs whose weights differ; a run that goes on must have begun with the same."""
    found = 0
    for tensor in (*sae.parameters(), *rule_tensors(sae.rule, sae.n_features).values()):
        found = checksum(tensor, found)
    return found


@torch.no_grad()
def in_training_units(start: SAE, *, input_scale: float, output_scale: float) -> SAE:
    """A copy for inputs at the scale of training, with decoder rows of unit norm.

    What a feature adds stays the same; codes are measured by it, so a rule that compares features may keep others.
    """
    sae = start.rescaled(input_scale, out_scale=output_scale)
    norms = sae.decoder.norm(dim=1).clamp(min=1e-12)
    sae.encoder.mul_(norms[:, None])
    sae.b_enc.mul_(norms)
    sae.decoder.div_(norms[:, None])
    if isinstance(sae.rule, Threshold):
        sae.rule = replace(sae.rule, theta=torch.as_tensor(sae.rule.theta).to(norms) * norms)
    return sae


def _shape(cfg: SAEConfig, *, skip: bool) -> dict[str, object]:
    return {
        "d_in": cfg.d_in,
        "d_sae": cfg.d_sae,
        "d_out": cfg.d_out or cfg.d_in,
        "apply_b_dec_to_input": cfg.apply_b_dec_to_input,
        "normalisation": cfg.normalisation,
        "skip": skip,
    }
