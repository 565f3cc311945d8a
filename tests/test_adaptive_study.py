"""The study of adaptive models: it goes on where it stopped, and says mean and spread."""

from dataclasses import replace

import pytest

from benchmarks.adaptive import study
from benchmarks.adaptive.arms import Arm, tape_arm
from saekit.adaptive import kinds
from saekit.adaptive.adatape_baselines import BaselineRecipe
from saekit.adaptive.adatape_recipe import AdaTapeRecipe

SHORT = {"longest": 4, "batch": 8, "steps": 2}


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    tiny = replace(kinds.KINDS["adatape"], recipe=lambda seed: AdaTapeRecipe(seed=seed, **SHORT))
    monkeypatch.setattr(kinds, "KINDS", {**kinds.KINDS, "adatape": tiny})
    arms = {"plain": arm_of("plain"), "ponder": arm_of("ponder")}
    monkeypatch.setattr(study, "ARMS", {**study.ARMS, "adatape": arms})


def arm_of(model: str) -> Arm:
    return replace(
        tape_arm("parity", model), recipe=lambda seed: BaselineRecipe(model=model, seed=seed, steps=2, most=2)
    )


def test_a_study_trains_what_is_missing_and_writes_a_table_and_pictures(tmp_path, capsys):
    results = study.study(["adatape"], [0, 1], tmp_path, rows=2)
    text = results.read_text()
    assert "Seeds 0, 1." in text and "## adatape" in text
    for name in ("accuracy", "mean_tape", "length"):
        assert f"| {name} | " in text
    assert "### adatape, held against plain" in text and "### adatape, held against ponder" in text
    assert (tmp_path / "adatape.html").read_text().count("<figure") == 4
    assert "adatape, seed 1" in capsys.readouterr().err
    again = study.study(["adatape"], [0, 1], tmp_path, rows=2)
    assert again.read_text() == text
    assert capsys.readouterr().err == ""  # nothing was trained again
    fewer = study.study(["adatape"], [0, 1], tmp_path, rows=2, arms=["ponder"]).read_text()
    assert "against ponder" in fewer and "against plain" not in fewer


def test_the_table_has_mean_and_extremes_and_names_what_is_nested():
    facts = {"a": 1.0, "deep": {"b": 2}, "list": [1, 2], "none": None, "budgets": [{"budget": 3, "oracle": 0.5}]}
    numbers = study.numbers_of(facts)
    assert numbers == {"a": 1.0, "deep.b": 2, "budget 3.oracle": 0.5}
    assert study.table([numbers, {**numbers, "a": 3.0}])[2] == "| a | 2.000 | 1.000 | 3.000 |"
