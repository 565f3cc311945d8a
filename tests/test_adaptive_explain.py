"""Explaining a step: an SAE, its strongest features, and a test of each against features like it."""

import pytest
from adaptive_models import a_vit_of, images_of

from saekit.adaptive import a_vit_target
from saekit.adaptive.adatape import AdaTape, AdaTapeConfig
from saekit.adaptive.deciding import adatape_target
from saekit.adaptive.explain import explain_step
from saekit.errors import SaekitError


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


def test_a_step_whose_score_is_not_linear_is_refused():
    model = AdaTape(AdaTapeConfig(length=8, width=16, heads=2, longest=4))
    with pytest.raises(SaekitError, match="step 0 of adatape has no linear score to find features by"):
        explain_step(adatape_target(model), images_of(), images_of(), 0)
