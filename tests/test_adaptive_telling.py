"""What tells decisions apart: areas under the curve, baselines, probes, mutual information."""

import pytest
import torch
from sklearn.metrics import mutual_info_score, roc_auc_score

from saekit.adaptive.questions.answers import LeftOutWarning, answered
from saekit.adaptive.telling import (
    activation_of,
    auc,
    best_telling,
    feature_aucs,
    mutual_information,
    overlap,
    probe,
    probe_auc,
    rate_by,
)
from saekit.codes import SparseCodes
from saekit.errors import DataError


def drawn(seed: int = 0, n: int = 200, features: int = 7) -> tuple[SparseCodes, torch.Tensor]:
    """Codes in which feature 3 follows the positive ones, and feature 6 fires twice only."""
    generator = torch.Generator().manual_seed(seed)
    positive = torch.rand(n, generator=generator) < 0.4
    dense = torch.rand(n, features, generator=generator).sub(0.6).relu()
    dense[:, 3] = (positive + torch.rand(n, generator=generator) * 1.2 - 0.6).relu()
    dense[:, 6] = 0
    dense[:2, 6] = 1.0
    return SparseCodes.from_dense(dense), positive


def test_areas_are_those_of_scikit_learn_ties_and_all():
    codes, positive = drawn()
    dense = codes.to_dense()
    found = feature_aucs(codes, positive)
    for feature in range(6):
        assert torch.equal(activation_of(codes, feature), dense[:, feature])
        assert found[feature] == pytest.approx(roc_auc_score(positive, dense[:, feature]), abs=1e-6)
    assert found[6].isnan()  # two tokens tell nothing
    assert torch.tensor(auc(dense[:, 0], positive | True)).isnan()


def test_the_feature_that_follows_is_found_and_measured_elsewhere_whichever_way_it_points():
    train, test = drawn(0), drawn(1)
    found = best_telling(train, test)
    assert found.feature == 3 and found.with_decision
    assert found.auc == pytest.approx(roc_auc_score(test[1], test[0].to_dense()[:, 3]), abs=1e-6)
    against = best_telling((train[0], ~train[1]), (test[0], ~test[1]))
    assert against.feature == 3 and not against.with_decision and against.auc == pytest.approx(found.auc, abs=1e-6)


def test_one_sort_of_decision_tells_nothing():
    codes, positive = drawn()
    with pytest.raises(DataError, match="give more examples"):
        best_telling((codes, positive & False), (codes, positive))
    with pytest.raises(DataError, match="two classes"):
        probe(torch.randn(5, 2), torch.zeros(5, dtype=torch.long), torch.randn(5, 2))


def test_a_baseline_is_the_mean_of_its_key_and_of_all_where_the_key_is_new():
    key, positive = torch.tensor([0, 0, 1, 3]), torch.tensor([True, False, True, True])
    assert rate_by(key, positive, torch.tensor([0, 1, 2, 3, 9])).tolist() == [0.5, 1.0, 0.75, 1.0, 0.75]


def test_a_probe_gives_chances_and_finds_what_is_linear():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(600, 4, generator=generator)
    three = (x @ torch.randn(4, 3, generator=generator)).argmax(1)
    chances = probe(x[:400], three[:400], x[400:])
    assert torch.allclose(chances.exp().sum(1), torch.ones(200, dtype=chances.dtype))
    assert (chances.argmax(1) == three[400:]).float().mean() > 0.95
    noise = torch.rand(600, generator=generator) < 0.5
    side = x[:, 0] + x[:, 1] > 0.3
    assert probe_auc(x[:400], side[:400], x[400:], side[400:]) > 0.99
    assert probe_auc(x[:400], noise[:400], x[400:], noise[400:]) < 0.65


def test_mutual_information_is_that_of_the_joint_counts():
    generator = torch.Generator().manual_seed(0)
    one, two = (torch.randint(-3, 4, (500,), generator=generator) for _ in range(2))
    bits = mutual_info_score(one.numpy(), (one + two).numpy()) / torch.log(torch.tensor(2.0)).item()
    assert mutual_information(one, one + two) == pytest.approx(bits, abs=1e-6)
    assert mutual_information(one, torch.zeros(500, dtype=torch.long)) == pytest.approx(0, abs=1e-12)


def test_overlap_is_a_share():
    assert overlap([1, 2, 3, 4], [4, 9, 1, 8]) == 0.5


def test_a_question_that_cannot_be_asked_is_left_out_and_named():
    def refused() -> dict[str, float]:
        raise DataError("all tapes are equally long")

    questions = {"first": lambda: {"a": 1.0}, "second": refused, "third": lambda: {"b": 2.0}}
    with pytest.warns(LeftOutWarning, match="left out: second; all tapes are equally long"):
        found = answered(questions)
    assert found == {"first": {"a": 1.0}, "third": {"b": 2.0}}
