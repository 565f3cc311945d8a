"""Which features make a model decide: an SAE on what one step reads, its strongest features, and a test of each.

A feature counts as a cause of decisions where its ablation in the decision path alone flips more of them than that of
any feature like it (equal rate and strength). Ranks among 19 others cannot go below p = 0.05; ask for more controls
for more.
"""

from dataclasses import asdict
from typing import Any

from torch import Tensor

from saekit.adaptive.attribution import DecisionAttribution, attribute_decisions
from saekit.adaptive.deciding import DecidingTarget
from saekit.adaptive.effects import (
    against_random,
    answers_changed,
    dose_response,
    effect_of,
    strongest,
    strongest_by_effect,
    trace_edited,
)
from saekit.adaptive.harvest import harvest, live_only, train_decision_sae
from saekit.codes import SparseCodes
from saekit.losses import fvu
from saekit.sae import SAE

# of the inputs that the SAE learns from, where features have to be tried out one by one
SCREENED = 256


def explain_step(
    target: DecidingTarget,
    train_inputs: Tensor,
    test_inputs: Tensor,
    step: int,
    *,
    n_features: int = 192,
    k: int = 8,
    tokens: int = 300_000,
    features: int = 3,
    controls: int = 19,
    seed: int = 0,
) -> dict[str, Any]:
    """Facts of one step, on inputs that the SAE was not trained on.

    Where the score is linear in what is read, features are those that add most to it, and each has its exact share,
    and its effects along the three paths. Where it is not (AdaTape, RIN), features are those whose ablation changes
    most decisions. Either is seen on some of the inputs that the SAE was trained on: what is then measured on others is
    no product of that choice. Each has its effects by dose and its rank among features like it.

    Raises:
        SaekitError: a step without a free decision, or too few features like a chosen one.
    """
    here = target.step(step)
    sae = train_decision_sae(target, train_inputs, step, n_features=n_features, k=k, tokens=tokens, seed=seed)
    vectors = live_only(harvest(target, test_inputs, step)).vectors
    codes, attribution = sae.encode(vectors), None
    if here.readout is None:
        chosen = strongest_by_effect(target, train_inputs[:SCREENED], sae, step, count=features)
    else:
        some = live_only(harvest(target, train_inputs[:SCREENED], step)).vectors
        chosen = strongest(attribute_decisions(sae, some, here), count=features)
        attribution = attribute_decisions(sae, vectors, here)
    facts: dict[str, Any] = {
        "step": step,
        "site": str(here.reads),
        "sae": {"n_features": n_features, "k": k, "tokens": tokens, "seed": seed},
        "fvu": float(fvu(vectors, sae(vectors).detach())),
        "controls": controls,
    }
    found = [_facts_of(target, test_inputs, sae, codes, feature, step, controls) for feature in chosen]
    if attribution is not None:
        facts["error_share"] = attribution.error_share
        for one in found:
            one |= _along_paths(target, test_inputs, sae, attribution, one["feature"], step)
    return facts | {"features": found}


def _facts_of(
    target: DecidingTarget, inputs: Tensor, sae: SAE, codes: SparseCodes, feature: int, step: int, controls: int
) -> dict[str, Any]:
    ranked = against_random(target, inputs, sae, codes, feature, step, count=controls)
    doses = dose_response(target, inputs, sae, feature, step)
    return {
        "feature": feature,
        "rate": float(codes.feature_counts()[feature]) / codes.n_tokens,
        "decision": asdict(ranked.effect),
        "p": ranked.p,
        "strongest_control": max(ranked.others),
        "mean_control": sum(ranked.others) / len(ranked.others),
        "flipped_by_dose": {str(dose): effect.flipped for dose, effect in doses.items()},
    }


def _along_paths(
    target: DecidingTarget, inputs: Tensor, sae: SAE, attribution: DecisionAttribution, feature: int, step: int
) -> dict[str, Any]:
    clean = target.trace(inputs)
    content = trace_edited(target, inputs, sae, [feature], step, path="content")
    both = trace_edited(target, inputs, sae, [feature], step, path="both")
    return {
        "mean_added": float(attribution.mean_added[feature]),
        "both": asdict(effect_of(clean, both, step)),
        "answers_changed_by_content_alone": answers_changed(clean, content) if "logits" in clean.more else None,
    }
