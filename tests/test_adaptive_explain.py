"""Explaining a step: an SAE, its strongest features, and a test of each against features like it."""

import pytest
import torch
from adaptive_models import a_vit_of, images_of

from saekit.adaptive import a_vit_target
from saekit.adaptive.adatape import AdaTape, AdaTapeConfig
from saekit.adaptive.adatape_recipe import sequences
from saekit.adaptive.deciding import DecidingTarget, adatape_target
from saekit.adaptive.diffusion import Sampling
from saekit.adaptive.effects import effect_of, strongest_by_effect, trace_edited
from saekit.adaptive.explain import explain_step
from saekit.adaptive.harvest import train_decision_sae
from saekit.adaptive.rin import RIN, RINConfig
from saekit.adaptive.rin_target import rin_target


def test_an_explanation_has_all_that_is_needed_to_doubt_it():
    target = a_vit_target(a_vit_of())
    found = explain_step(
        target, images_of(40), images_of(20, seed=1), 1, n_features=32, k=4, tokens=20_000, features=2, controls=5
    )
    assert found["site"] == "layers.1.halt:in" and 0 < found["fvu"] < 1 and found["error_share"] > 0
    assert len(found["features"]) == 2
    for feature in found["features"]:
        assert feature["p"] in {n / 6 for n in range(1, 7)}
        assert feature["strongest_control"] >= feature["mean_control"]
        assert feature["flipped_by_dose"]["0.0"] == feature["decision"]["flipped"]
        assert feature["flipped_by_dose"]["1.0"] == 0
        assert 0 <= feature["answers_changed_by_content_alone"] <= 1
        is_first_choice = feature["p"] == 1 / 6
        assert is_first_choice == (feature["decision"]["flipped"] > feature["strongest_control"])


def tape() -> tuple[DecidingTarget, torch.Tensor, torch.Tensor]:
    model = AdaTape(AdaTapeConfig(length=12, width=16, split=2, heads=2, longest=6, bank="learnt", entries=24)).eval()
    with torch.no_grad():
        model.learnt_bank.normal_(generator=torch.Generator().manual_seed(0))
    train, test = (sequences(n, 12, torch.Generator().manual_seed(n)) for n in (300, 200))
    return adatape_target(model), train, test


def slots() -> tuple[DecidingTarget, torch.Tensor, torch.Tensor]:
    model = RIN(RINConfig(width=16, slots=5, latent=32, heads=2)).eval()
    return rin_target(model, Sampling(steps=3)), torch.arange(60), torch.arange(60, 80)


# slots ask with normed vectors, and what is ablated is another
@pytest.mark.filterwarnings("ignore::saekit.patching.OffDistributionWarning")
@pytest.mark.parametrize(
    "case, step, site", [(tape, 4, "reader.query:out@4"), (slots, 1, "model.blocks.0.read.q:in@1")]
)
def test_where_no_score_is_linear_features_are_found_by_their_effect(case, step, site):
    target, train, test = case()
    found = explain_step(target, train, test, step, n_features=16, k=4, tokens=20_000, features=2, controls=3)
    assert found["site"] == site and "error_share" not in found
    for feature in found["features"]:
        assert feature["flipped_by_dose"]["1.0"] == 0
        assert "mean_added" not in feature and feature["p"] in {n / 4 for n in range(1, 5)}
    assert found["features"][0]["decision"]["flipped"] > 0


@pytest.mark.filterwarnings("ignore::saekit.patching.OffDistributionWarning")
def test_the_strongest_by_effect_are_those_that_change_most_decisions():
    target, train, _ = tape()
    sae = train_decision_sae(target, train, 4, n_features=16, k=4, tokens=10_000)
    clean = target.trace(train)
    flipped = [effect_of(clean, trace_edited(target, train, sae, [one], 4), 4).flipped for one in range(16)]
    first, *rest = strongest_by_effect(target, train, sae, 4, count=3, candidates=16)
    assert flipped[first] == max(flipped) > 0
    assert [flipped[one] for one in rest] == sorted((flipped[one] for one in rest), reverse=True)
    assert len(strongest_by_effect(target, train, sae, 4, count=9, candidates=2)) == 2
