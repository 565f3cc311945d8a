"""Questions to Duo-LLM: planted answers are found, baselines that know the answer get it, edits keep their laws."""

import math
from dataclasses import replace

import pytest
import torch
from adaptive_models import duo_of, ids_of

from saekit.adaptive.attribution import attribute_decisions
from saekit.adaptive.deciding import duo_target
from saekit.adaptive.duo_llm import DuoLLM
from saekit.adaptive.effects import strongest
from saekit.adaptive.harvest import train_decision_sae
from saekit.adaptive.interventions import trace_with
from saekit.adaptive.questions.duo_llm import ask, auc_within, best_choice, difficulty, pairs_within, router_choice
from saekit.adaptive.questions.duo_llm_causes import to_spend
from saekit.adaptive.questions.duo_llm_halves import Case, by_balance, half_of, worth
from saekit.adaptive.questions.duo_llm_modules import Coins, small_beside_big, transfer_between_routes

# an edit of tiny contents goes far
pytestmark = [
    pytest.mark.filterwarnings("ignore::saekit.patching.OffDistributionWarning"),
]
TRAIN, TEST = ids_of(50, 10), ids_of(24, 10, seed=1)


def balanced() -> DuoLLM:
    """Whose routers say big about as often as small."""
    model = duo_of()
    target = duo_target(model)
    with torch.no_grad():
        model.threshold.copy_(target.trace(TRAIN).score.median())
    return model


@pytest.fixture(scope="module")
def case() -> Case:
    model, number = balanced(), 1
    target = duo_target(model)
    sae = train_decision_sae(target, TRAIN, number, n_features=24, k=4, tokens=10_000)
    train, test = (half_of(target, model, ids, sae, number) for ids in (TRAIN, TEST))
    return Case(target=target, model=model, number=number, sae=sae, train=train, test=test)


def test_every_question_has_a_finite_answer_and_edits_keep_their_laws():
    model = balanced()
    found = ask(duo_target(model), model, TRAIN, TEST, tokens=4_000, n_features=24, k=4, controls=2)
    assert len(found) == 7
    assert [f"{q}: {name}" for q, some in found.items() for name, x in some.items() if not math.isfinite(x)] == []
    does = found["what a feature does to the choice and to the content"]
    assert does["choice_flipped_at_dose_1"] == does["choice_nats_at_dose_1"] == does["content_nats_at_dose_1"] == 0
    assert does["choice_flipped_at_dose_0"] == does["choice_flipped"] > 0
    assert does["content_nats_at_dose_0"] == does["content_nats"] != 0
    steers = found["can a feature steer compute"]
    way = "more" if steers["more_feature"] == does["feature"] else "less"
    assert steers[f"{way}_feature"] == does["feature"]
    # set to 0 is taken away
    assert steers[f"{way}_nats_at_dose_0"] == pytest.approx(does["choice_nats"], abs=1e-6)
    for one, sign in (("more", 1), ("less", -1)):
        assert sign * steers[f"{one}_margin_at_typical_strength"] > 0
        assert steers[f"{one}_adding_differs_from_a_shift"] == 0
        by_dose = [sign * steers[f"{one}_big_layers_at_dose_{dose:g}"] for dose in (0, 0.5, 1, 2)]
        assert by_dose == sorted(by_dose) and by_dose[-1] > by_dose[0]
    shares = [
        value
        for some in found.values()
        for name, value in some.items()
        if "from_" in name or "share" in name or "dead" in name or name.endswith("_p") or "flipped" in name
    ]
    assert len(shares) > 60 and all(0 <= value <= 1 for value in shares)


def test_what_is_known_of_a_token_is_known_of_the_right_one(case):
    half = case.test
    direction, constant = case.step.readout
    assert torch.allclose(half.read.vectors @ direction + constant, half.margin, atol=1e-4)
    assert torch.equal(half.big, half.margin > 0)
    assert torch.equal(half.following, half.ids[half.read.document, half.read.position + 1])
    assert (half.read.position < 9).all() and len(half.read) == 24 * 9
    routes = worth(case.model, half.ids)
    assert torch.equal(half.best, half.at(routes[:-2].min(0).values))
    assert (half.route.sum(1) == 1).all()  # half of three layers, rounded down
    on_its_own = case.model(half.ids, torch.ones(3, dtype=torch.int64)).logits[:, :-1].log_softmax(-1)
    nats = -on_its_own.gather(-1, half.ids[:, 1:, None])[..., 0]
    assert torch.allclose(half.at(nats), half.all_big, atol=1e-4)
    last = case.model.logits(half.last).log_softmax(-1)
    assert torch.allclose(-last.gather(-1, half.following[:, None])[:, 0], half.routed, atol=1e-4)


def test_a_baseline_that_knows_the_choice_gets_all_of_it(case):
    halves = [replace(half, big=half.read.token % 2 == 0) for half in (case.train, case.test)]
    found = router_choice(replace(case, train=halves[0], test=halves[1]))
    assert found["from_token"] == 1 and found["from_position"] < 0.7
    assert found["pairs_within_tokens"] == 0 and math.isnan(found["from_best_feature_within_tokens"])
    assert found["from_all_features"] < 0.7  # the margin is not about parity
    own = router_choice(case)
    assert own["from_all_features"] > 0.8 and own["pairs_within_tokens"] > 0


def test_a_feature_that_is_the_best_choice_is_found(case):
    feature = int((case.train.codes.feature_counts() - len(case.train.read) // 3).abs().argmin())
    halves = [replace(half, oracle=half.activation(feature) > 0) for half in (case.train, case.test)]
    found = best_choice(replace(case, train=halves[0], test=halves[1]))
    assert found["choice_from_best_feature"] == 1 > found["choice_from_token"]
    by_router = [replace(half, oracle=half.big) for half in (case.train, case.test)]
    found = best_choice(replace(case, train=by_router[0], test=by_router[1]))
    assert found["choice_from_router_margin"] == found["router_agrees"] == 1


def test_an_oracle_is_told_by_the_same_oracle_behind_other_prefixes(case):
    found = best_choice(case)
    assert found["choice_from_oracle_behind_all_big"] > 0.8 > found["choice_from_position"]


def test_the_difficulty_that_a_feature_follows_is_told_from_the_other(case):
    feature = strongest(attribute_decisions(case.sae, case.train.read.vectors, case.step), count=1)[0]
    halves = [
        replace(half, all_small=loss, all_big=loss - half.activation(feature))
        for half in (case.train, case.test)
        for loss in [half.read.token.float()]
    ]
    found = difficulty(replace(case, train=halves[0], test=halves[1]))
    assert found["relative_and_best_feature"] == pytest.approx(1)
    assert found["absolute_and_token"] == pytest.approx(1)
    assert found["absolute_and_best_feature"] < 0.9 and found["relative_and_token"] < 0.95
    assert found["large_gap_from_best_feature"] == 1


@pytest.mark.parametrize("n_big", [0, 1, 7, 20])
def test_a_threshold_spends_what_it_should(n_big):
    margin = torch.randn(20, generator=torch.Generator().manual_seed(0))
    assert int((margin + to_spend(margin, n_big) > 0).sum()) == n_big


def test_within_tokens_what_only_knows_the_token_says_nothing():
    token = torch.tensor([0, 0, 0, 1, 1, 1, 2])
    positive = torch.tensor([True, True, False, False, False, True, True])
    assert pairs_within(positive, token) == 4
    assert auc_within(-token.float(), positive, token) == 0.5
    assert auc_within(positive.float() + token, positive, token) == 1


def test_the_most_balanced_layer_comes_first():
    model = balanced()
    share = duo_target(model).trace(TRAIN).share("big")
    order = by_balance(duo_target(model), TRAIN)
    apart = (share[order] - 0.5).abs()
    assert sorted(order) == [0, 1, 2] and torch.equal(apart, apart.sort().values) and apart[0] < apart[-1]


@torch.no_grad()
def with_small(model: DuoLLM, *, silent: bool) -> DuoLLM:
    """Whose small feed-forwards are all of the big ones, or write nothing."""
    for layer in model.stack:
        small, big = layer.feed.small, layer.feed.big
        inner = small.up.out_features
        if silent:
            small.down.weight.zero_()
            continue
        big.down.weight[:, inner:] = 0
        big.down.weight[:, :inner] = small.down.weight
        for part in ("up", "gate"):
            getattr(big, part).weight[:inner] = getattr(small, part).weight
    return model


def test_a_small_module_that_is_the_big_one_approximates_it(case):
    found = small_beside_big(replace(case, model=with_small(balanced(), silent=False)))
    assert found["cosine"] == pytest.approx(1, abs=1e-5) and found["unexplained"] == pytest.approx(0, abs=1e-6)
    assert found["small_writes_of_big_median"] == pytest.approx(1, abs=1e-4)
    assert found["only_big_of_written_by_big"] == found["only_small_of_written_by_small"] == 0
    assert found["spread_by_feature"] == pytest.approx(0, abs=1e-5)
    assert found["cosine_with_another_tokens"] < 0.9 and found["unexplained_by_a_linear_map_of_the_input"] > 0.01


def test_what_a_silent_module_leaves_is_written_by_the_big_one_alone(case):
    found = small_beside_big(replace(case, model=with_small(balanced(), silent=True)))
    assert found["cosine"] == found["norm_of_small_in_big"] == found["written_by_small"] == 0
    assert found["unexplained_by_a_linear_map_of_small"] == pytest.approx(1, abs=0.1)
    assert found["only_big_of_written_by_big"] == 1 and found["written_by_big"] > found["written_by_luck"]


def test_where_modules_are_alike_features_serve_every_route():
    model = with_small(balanced(), silent=False)
    found = transfer_between_routes(duo_target(model), TRAIN, TEST, n_features=24, k=4, tokens=2_000)
    own = found["fvu_of_big_on_big"]
    assert 0 < own < 1
    for name, value in found.items():
        if name.startswith("fvu"):
            assert value == pytest.approx(own, abs=1e-3), name


def test_where_modules_differ_features_fit_the_route_that_they_are_from():
    model = with_small(balanced(), silent=True)
    found = transfer_between_routes(duo_target(model), TRAIN, TEST, n_features=24, k=4, tokens=4_000)
    for route, other in (("big", "small"), ("small", "big")):
        assert found[f"fvu_of_{route}_on_{route}"] < found[f"fvu_of_{other}_on_{route}"]


def test_coins_are_fair_and_fall_anew():
    target = duo_target(balanced())
    coins = Coins(torch.Generator().manual_seed(0))
    first, second = (trace_with(target, TEST, [coins]) for _ in range(2))
    assert ((first.share("big") - 0.5).abs() < 0.1).all()
    differ = (first.decision != second.decision).float().mean()
    assert 0.4 < float(differ) < 0.6
