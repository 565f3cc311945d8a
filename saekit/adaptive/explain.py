"""Which features make a model decide: an SAE on what one step reads, its strongest features, and a test of each.

A feature counts as a cause of decisions where its ablation in the decision path alone flips more of them than that of
any feature like it (equal rate and strength). Ranks among 19 others cannot go below p = 0.05; ask for more controls
for more.
"""

from dataclasses import asdict
from typing import Any

from torch import Tensor

from saekit.adaptive.attribution import attribute_decisions
from saekit.adaptive.deciding import DecidingTarget
from saekit.adaptive.effects import against_random, dose_response, effect_of, strongest, trace_edited
from saekit.adaptive.harvest import harvest, live_only, train_decision_sae
from saekit.errors import SaekitError
from saekit.losses import fvu


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

    Each feature has its share of the score (exact, where the score is linear in what is read), its effects along the
    three paths, by dose, and its rank among features like it.

    Raises:
        SaekitError: a step whose score is not linear in what it reads, or without a free decision.
    """
    if target.step(step).readout is None:
        raise SaekitError(f"step {step} of {target.target.name} has no linear score to find features by; see `effects`")
    sae = train_decision_sae(target, train_inputs, step, n_features=n_features, k=k, tokens=tokens, seed=seed)
    vectors = live_only(harvest(target, test_inputs, step)).vectors
    attribution, codes = attribute_decisions(sae, vectors, target.steps[step]), sae.encode(vectors)
    rates = codes.feature_counts() / len(vectors)
    clean = target.trace(test_inputs)
    found = []
    for feature in strongest(attribution, count=features):
        ranked = against_random(target, test_inputs, sae, codes, feature, step, count=controls)
        content = trace_edited(target, test_inputs, sae, [feature], step, path="content")
        both = trace_edited(target, test_inputs, sae, [feature], step, path="both")
        doses = dose_response(target, test_inputs, sae, feature, step)
        found.append(
            {
                "feature": feature,
                "rate": float(rates[feature]),
                "mean_added": float(attribution.mean_added[feature]),
                "decision": asdict(ranked.effect),
                "p": ranked.p,
                "strongest_control": max(ranked.others),
                "mean_control": sum(ranked.others) / len(ranked.others),
                "both": asdict(effect_of(clean, both, step)),
                "flipped_by_dose": {str(dose): effect.flipped for dose, effect in doses.items()},
                "answers_changed_by_content_alone": _answers_changed(clean.more, content.more),
            }
        )
    return {
        "step": step,
        "site": str(target.steps[step].reads),
        "sae": {"n_features": n_features, "k": k, "tokens": tokens, "seed": seed},
        "fvu": float(fvu(vectors, sae(vectors).detach())),
        "error_share": attribution.error_share,
        "controls": controls,
        "features": found,
    }


def _answers_changed(clean: Any, edited: Any) -> float | None:
    if "logits" not in clean:
        return None
    return float((clean["logits"].argmax(-1) != edited["logits"].argmax(-1)).float().mean())
