"""The study of adaptive models: it goes on where it stopped, and says mean and spread."""

import gzip
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.adaptive import images, study
from benchmarks.adaptive.arms import ARMS, Arm, tape_arm
from saekit.adaptive import kinds
from saekit.adaptive.adatape_baselines import BaselineRecipe
from saekit.adaptive.adatape_recipe import AdaTapeRecipe
from saekit.adaptive.digits import LabelledImages
from saekit.adaptive.stages import train_stages

SHORT = {"longest": 4, "batch": 8, "steps": 2}


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    tiny = replace(kinds.KINDS["adatape"], recipe=lambda seed: AdaTapeRecipe(seed=seed, **SHORT))
    monkeypatch.setattr(kinds, "KINDS", {**kinds.KINDS, "adatape": tiny})
    asked = replace(tiny, ask=lambda saved: {"who stops": {"area": 0.25 + saved.recipe["seed"] / 2}})
    monkeypatch.setattr(study, "KINDS", {**kinds.KINDS, "adatape": asked})
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
    assert "### adatape: who stops" in text and "| area | 0.500 | 0.250 | 0.750 |" in text
    assert (tmp_path / "adatape.html").read_text().count("<figure") == 4
    assert "adatape, seed 1" in capsys.readouterr().err
    again = study.study(["adatape"], [0, 1], tmp_path, rows=2)
    assert again.read_text() == text
    assert capsys.readouterr().err == ""  # nothing was trained again
    fewer = study.study(["adatape"], [0, 1], tmp_path, rows=2, arms=["ponder"]).read_text()
    assert "against ponder" in fewer and "against plain" not in fewer
    assert "who stops" not in study.study(["adatape"], [0, 1], tmp_path, rows=2, questions=False).read_text()


def test_the_table_has_mean_and_extremes_and_names_what_is_nested():
    facts = {"a": 1.0, "deep": {"b": 2}, "list": [1, 2], "none": None, "budgets": [{"budget": 3, "oracle": 0.5}]}
    numbers = study.numbers_of(facts)
    assert numbers == {"a": 1.0, "deep.b": 2, "list.0": 1, "list.1": 2, "budget 3.oracle": 0.5}
    assert study.table([numbers, {**numbers, "a": 3.0}])[2] == "| a | 2.000 | 1.000 | 3.000 |"
    # a number that not every seed has is that of the seeds that have it
    assert study.table([{"a": 1.0}, {"a": 3.0, "b": 5.0}])[3] == "| b | 5.000 | 5.000 | 5.000 |"


def test_an_arm_whose_data_are_not_there_is_named_and_left_out(tmp_path, monkeypatch, capsys):
    absent = replace(arm_of("plain"), needs=tmp_path / "images.gz")
    monkeypatch.setattr(study, "ARMS", {**study.ARMS, "adatape": {"pictures": absent}})
    assert "held against" not in study.study(["adatape"], [0], tmp_path / "out", rows=2).read_text()
    assert f"adatape without pictures: there is no {tmp_path / 'images.gz'}" in capsys.readouterr().err


def test_the_format_of_mnist_is_read(tmp_path):
    array = np.arange(2 * 3 * 5, dtype=np.uint8).reshape(2, 3, 5)
    header = bytes([0, 0, 8, 3]) + np.array(array.shape, dtype=">u4").tobytes()
    (tmp_path / "some-idx3-ubyte.gz").write_bytes(gzip.compress(header + array.tobytes()))
    assert np.array_equal(images._idx(tmp_path / "some-idx3-ubyte.gz").numpy(), array)


@pytest.mark.parametrize(
    ("name", "held_out"), [("mnist", (2000, 1, 32, 32)), ("cifar10", (500, 3, 36, 36))], ids=["mnist", "cifar10"]
)
def test_other_images_are_divided_and_fit_their_recipe(name, held_out):
    needs = ARMS["a-vit"][name].needs
    assert needs is not None
    if not needs.exists():
        pytest.skip(f"there is no {needs}")
    recipe = getattr(images.ImageRecipe, name)(seed=1)
    assert recipe.images.test_images(recipe.canvas).shape == held_out
    assert sorted(recipe.images.test_labels.unique().tolist()) == list(range(10))
    assert (
        recipe.build().tokens_of(recipe.images.test_images(recipe.canvas)[:1]).shape[1] == (recipe.canvas // 4) ** 2 + 1
    )


@pytest.mark.parametrize("channels", [1, 3])
def test_an_arm_of_other_images_has_the_numbers_of_the_report(channels, tmp_path, monkeypatch):
    draw = torch.Generator().manual_seed(0)
    shape = (40, 6, 6) if channels == 1 else (40, 3, 6, 6)
    data = LabelledImages(
        torch.rand(shape, generator=draw),
        torch.arange(40) % 10,
        torch.rand(shape, generator=draw),
        torch.arange(40) % 10,
    )
    monkeypatch.setattr(images.ImageRecipe, "images", property(lambda recipe: data))
    recipe = images.ImageRecipe(
        canvas=8, channels=channels, width=8, layers=2, batch=8, plain_epochs=1, halting_epochs=1
    )
    numbers = images.measure_images(recipe, train_stages(recipe, tmp_path))
    assert {"accuracy", "control_accuracy", "mac_ratio", "mean_depth", "shuffled_accuracy"} <= set(numbers)
    assert numbers["test_images"] == 40 and 0 <= numbers["mac_ratio"] <= 1
