"""What is asked of A-ViT's features, on a small untrained model that halts."""

import math

import pytest
import torch
from adaptive_models import HALTING, a_vit_of

from saekit.adaptive.a_vit import AViT
from saekit.adaptive.digits import LabelledImages
from saekit.adaptive.questions import a_vit, a_vit_causes
from saekit.adaptive.questions.a_vit import ask, open_layers
from saekit.adaptive.questions.answers import Answers
from saekit.errors import DataError


def pictures(n_train: int = 120, n_test: int = 60, seed: int = 0) -> LabelledImages:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(n_train + n_test, 6, 6, generator=generator)
    images = images * (torch.rand(images.shape, generator=generator) < 0.4)
    labels = torch.randint(10, (n_train + n_test,), generator=generator)
    return LabelledImages(images[:n_train], labels[:n_train], images[n_train:], labels[n_train:])


@pytest.fixture(scope="module")
def answers() -> Answers:
    patch = pytest.MonkeyPatch()
    patch.setattr(a_vit_causes, "CONTROLS", 4)
    patch.setattr(a_vit_causes, "FEWER_CONTROLS", 2)
    try:
        return ask(a_vit_of(), pictures(), tokens=20_000)
    finally:
        patch.undo()


def test_every_question_is_answered_by_numbers_for_every_layer_that_decides(answers: Answers):
    assert len(answers) == 9
    layers = {name.split(":")[0] for name in answers["what tells that a patch halts"]}
    assert layers and all(layer.startswith("layer ") for layer in layers)
    for question, numbers in answers.items():
        assert numbers, question
        assert all(math.isfinite(value) for value in numbers.values()), (question, numbers)


def test_areas_and_shares_are_between_nothing_and_all(answers: Answers):
    for question in ("what tells that a patch halts", "what tells that a patch stays to the end"):
        assert all(0 <= value <= 1 for value in answers[question].values())


def test_what_the_gate_reads_is_told_by_what_it_reads(answers: Answers):
    found = answers["what tells that a patch halts"]
    layers = {name.split(":")[0] for name in found}
    # one score decides; position says less than the vector from which the score is read
    assert max(found[f"{layer}: best feature"] - found[f"{layer}: position alone"] for layer in layers) > 0


def test_a_dose_of_one_changes_nothing_and_frozen_depths_answer_for_content_alone(answers: Answers):
    found = answers["what features do to decisions and answers"]
    ones = [value for name, value in found.items() if name.endswith("at dose 1")]
    assert ones and all(value == 0 for value in ones)
    assert any(value != 0 for name, value in found.items() if name.endswith("at dose 0"))


def test_a_score_shifted_down_costs_more_and_up_less(answers: Answers):
    found = answers["whether the same features decide when less or more halts"]
    usual = answers["how far one feature can drive the cost"]["usual: multiplications"]
    assert found["score -1: multiplications"] > usual > found["score +1: multiplications"]


def test_clamping_the_features_that_hold_back_costs_more_than_clamping_those_that_push(answers: Answers):
    found = answers["how far one feature can drive the cost"]
    assert found["slowing, dose 2: multiplications"] > found["usual: multiplications"]
    assert found["stopping, dose 2: multiplications"] < found["usual: multiplications"]


def test_the_class_token_says_the_final_answer_at_least_as_often_late_as_at_first(answers: Answers):
    found = answers["when the class token has its answer"]
    assert found["where it halts: says the final answer"] >= found["first layer: says the final answer"]


def test_a_model_in_which_nothing_halts_is_refused():
    model = a_vit_of()
    for layer in model.stack:
        layer.halt.shift = -1e4
    with pytest.raises(DataError, match="in no layer"):
        ask(model, pictures(40, 20), tokens=2_000)


def test_a_layer_counts_where_some_halt_and_some_go_on():
    target = a_vit.a_vit_target(a_vit_of())
    images = torch.randn(60, 1, HALTING.image, HALTING.image, generator=torch.Generator().manual_seed(1))
    trace = target.trace(images)
    half = a_vit.Seen(images, torch.zeros(60, dtype=torch.long), trace, HALTING.patch)
    for step in open_layers([half, half]):
        live, halts = trace.live[:, step, 1:], trace.decision[:, step, 1:] == 1
        assert int((live & halts).sum()) >= a_vit.FEWEST and int((live & ~halts).sum()) >= a_vit.FEWEST


def test_ink_is_the_mean_level_of_a_patch():
    model = AViT(HALTING)
    digits = pictures(4, 4)
    images = digits.test_images(HALTING.image)
    half = a_vit.Seen(images, digits.test_labels, a_vit.a_vit_target(model).trace(images), HALTING.patch)
    assert torch.allclose(half.ink.sum(1) * HALTING.patch**2, digits.test.flatten(1).sum(1), atol=1e-4)
