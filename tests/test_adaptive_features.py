"""SAEs on what a model decides by: exact shares of a score, and what taking a feature away does to decisions."""

import pytest
import torch
from adaptive_models import a_vit_of, duo_of, ids_of, images_of

from saekit.adaptive.attribution import attribute_decisions
from saekit.adaptive.deciding import DecidingTarget, a_vit_target, duo_target
from saekit.adaptive.effects import (
    against_random,
    dose_response,
    effect_of,
    matched_features,
    score_shift,
    strongest,
    trace_edited,
)
from saekit.adaptive.harvest import harvest, live_only, train_decision_sae
from saekit.errors import DataError, SaekitError, ShapeError
from saekit.sae import SAE
from saekit.selection import TopK

STEP = 1


def a_vit() -> tuple[DecidingTarget, torch.Tensor]:
    return a_vit_target(a_vit_of()), images_of(12)


def duo() -> tuple[DecidingTarget, torch.Tensor]:
    return duo_target(duo_of()), ids_of(8)


BOTH = pytest.mark.parametrize("case", [a_vit, duo], ids=["a-vit", "duo-llm"])


def sae_of(n_features: int = 40, seed: int = 0) -> SAE:
    sae = SAE(16, n_features, TopK(4))
    generator = torch.Generator().manual_seed(seed)
    sae.initialise(generator)
    torch.nn.init.normal_(sae.b_dec, std=0.1, generator=generator)
    return sae


@BOTH
def test_every_vector_knows_where_it_comes_from(case):
    target, inputs = case()
    batch = harvest(target, inputs, STEP)
    trace = target.trace(inputs)
    assert len(batch) == trace.decision[:, STEP].numel()
    assert set(batch.step.tolist()) == {STEP}
    assert torch.equal(batch.halted, ~trace.live[batch.document, STEP, batch.position])
    whole = target.target.read(inputs, [target.steps[STEP].reads])[target.steps[STEP].reads]
    assert torch.equal(batch.vectors, whole[batch.document, batch.position])
    assert torch.equal(batch.vectors, harvest(target, inputs, STEP, content=True).vectors)


def test_tokens_that_have_stopped_are_marked_and_can_be_left_out():
    target, images = a_vit()
    batch = harvest(target, images, 2)
    assert 0 < int(batch.halted.sum()) < len(batch)
    assert len(live_only(batch)) == int(target.trace(images).live[:, 2].sum())
    assert not harvest(target, images, 0).halted.any()
    with pytest.raises(DataError, match="vectors are of tokens that had stopped; choose an earlier step"):
        live_only(batch.select(batch.halted.nonzero()[:, 0]))


def test_token_ids_travel_with_the_vectors_of_a_text():
    target, ids = duo()
    batch = harvest(target, ids, STEP)
    assert torch.equal(batch.token, ids[batch.document, batch.position])


@BOTH
def test_a_score_is_the_sum_of_what_features_a_constant_and_the_error_add(case):
    target, inputs = case()
    vectors = live_only(harvest(target, inputs, STEP)).vectors
    found = attribute_decisions(sae_of(), vectors, target.steps[STEP])
    total = found.added.to_dense().sum(1) + found.constant + found.error
    torch.testing.assert_close(total, found.score, rtol=1e-4, atol=1e-4)
    trace = target.trace(inputs)
    margins = trace.score[:, STEP][trace.live[:, STEP]] if case is duo else None
    if margins is not None:
        torch.testing.assert_close(found.score, margins)
    else:
        scores = trace.score[:, STEP][trace.live[:, STEP]]
        torch.testing.assert_close(found.score.sigmoid(), scores)
    assert found.error_share > 0
    torch.testing.assert_close(found.mean_added, found.added.to_dense().mean(0))
    torch.testing.assert_close(found.mean_size, found.added.to_dense().abs().mean(0))


def test_an_sae_that_reconstructs_all_leaves_no_error():
    target, images = a_vit()
    vectors = live_only(harvest(target, images, STEP)).vectors
    sae = SAE(16, 32, TopK(16))
    with torch.no_grad():
        sae.decoder.copy_(torch.cat([torch.eye(16), -torch.eye(16)]))
        sae.encoder.copy_(sae.decoder)
    assert attribute_decisions(sae, vectors, target.steps[STEP]).error_share < 1e-6


@BOTH
def test_ablating_a_feature_in_the_decision_path_moves_the_score_by_what_it_added(case):
    target, inputs = case()
    sae, site = sae_of(), target.steps[STEP].reads
    batch = live_only(harvest(target, inputs, STEP))
    found = attribute_decisions(sae, batch.vectors, target.steps[STEP])
    feature = strongest(found, count=1)[0]
    moved = score_shift(found, feature)
    assert (moved != 0).any() and (moved == 0).any()
    edited = trace_edited(target, inputs, sae, [feature], STEP)
    at = (batch.document, batch.position)
    now = edited.score[:, STEP][at] if case is duo else edited.score[:, STEP][at].logit()
    torch.testing.assert_close(now - found.score, moved, rtol=1e-3, atol=1e-3)
    assert site == target.steps[STEP].reads


# what a router reads has been normed, and every edit leaves a vector of another norm
@pytest.mark.filterwarnings("ignore::saekit.patching.OffDistributionWarning")
@BOTH
def test_the_three_paths_differ_as_they_should(case):
    target, inputs = case()
    sae = sae_of()
    clean = target.trace(inputs)
    found = attribute_decisions(sae, live_only(harvest(target, inputs, STEP)).vectors, target.steps[STEP])
    features = strongest(found, count=6)
    traces = {
        path: trace_edited(target, inputs, sae, features, STEP, path=path) for path in ("decision", "content", "both")
    }
    effects = {path: effect_of(clean, trace, STEP) for path, trace in traces.items()}
    assert effects["decision"].flipped > 0
    assert effects["content"].flipped == effects["content"].anywhere == effects["content"].macs == 0
    assert effects["both"].flipped == effects["decision"].flipped  # what is decided here was read here
    answer = "nats" if case is duo else "logits"
    assert not torch.equal(traces["content"].more[answer], clean.more[answer])
    untouched = trace_edited(target, inputs, sae, features, STEP, path="both", dose=1.0)
    assert not untouched.changed(clean).any()


def test_effects_count_the_open_decisions_of_the_step():
    target, images = a_vit()
    clean = target.trace(images)
    sae = sae_of()
    found = attribute_decisions(sae, live_only(harvest(target, images, STEP)).vectors, target.steps[STEP])
    edited = trace_edited(target, images, sae, strongest(found, count=6), STEP)
    live = clean.live[:, STEP]
    differ = (clean.decision[:, STEP] != edited.decision[:, STEP]) & live
    effect = effect_of(clean, edited, STEP)
    assert effect.flipped == pytest.approx(int(differ.sum()) / int(live.sum()))
    assert effect.macs == pytest.approx(float(edited.macs.sum() / clean.macs.sum()) - 1)
    assert effect.anywhere >= int(differ.sum()) / live.numel()


def test_doses_go_through_no_change_at_one():
    target, images = a_vit()
    sae = sae_of()
    found = attribute_decisions(sae, live_only(harvest(target, images, STEP)).vectors, target.steps[STEP])
    by_dose = dose_response(target, images, sae, strongest(found, count=1)[0], STEP)
    assert by_dose[1.0].flipped == 0
    assert list(by_dose) == [0.0, 0.5, 1.0, 2.0]
    assert by_dose[0.5].flipped <= by_dose[0.0].flipped > 0


def test_matched_features_fire_as_often_and_as_strongly():
    codes = sae_of(n_features=200).encode(torch.randn(4000, 16, generator=torch.Generator().manual_seed(0)))
    rate = codes.feature_counts().float()
    feature = int(rate.argmax())
    matched = matched_features(codes, feature, count=10)
    assert feature not in matched and len(set(matched)) == 10
    rest = [f for f in range(200) if f not in (*matched, feature)]
    assert rate[list(matched)].mean() > rate[rest].mean()
    with pytest.raises(SaekitError, match="fires on fewer than 5 of these tokens"):
        matched_features(codes.select(torch.arange(2)), feature)
    with pytest.raises(SaekitError, match="ask for fewer than 500"):
        matched_features(codes, feature, count=500)


def test_a_feature_is_ranked_among_others_like_it():
    target, images = a_vit()
    sae = sae_of()
    vectors = live_only(harvest(target, images, STEP)).vectors
    feature = strongest(attribute_decisions(sae, vectors, target.steps[STEP]), count=1)[0]
    ranked = against_random(target, images, sae, sae.encode(vectors), feature, STEP, count=6)
    stronger = sum(other >= ranked.effect.flipped for other in ranked.others)
    assert ranked.p == pytest.approx((1 + stronger) / 7)
    assert len(ranked.others) == len(ranked.matched) == 6


def test_an_sae_on_a_decision_site_learns_from_live_tokens():
    target, images = a_vit_target(a_vit_of()), images_of(40)
    sae = train_decision_sae(target, images, STEP, n_features=32, k=4, tokens=20_000)
    vectors = live_only(harvest(target, images, STEP)).vectors
    error = (vectors - sae(vectors)).square().sum() / (vectors - vectors.mean(0)).square().sum()
    assert float(error.detach()) < 0.5
    assert sae.cfg.hook_name == "layers.1.halt:in"


def test_what_does_not_fit_is_refused():
    target, images = a_vit()
    vectors = live_only(harvest(target, images, STEP)).vectors
    with pytest.raises(ShapeError, match=r"the SAE reads 8 numbers, the vectors have 16"):
        attribute_decisions(SAE(8, 16, TopK(2)), vectors, target.steps[STEP])
    with pytest.raises(SaekitError, match="step 3 of a-vit has no free decision"):
        harvest(target, images, 3)
    with pytest.raises(SaekitError, match="feature 99 is out of range"):
        trace_edited(target, images, sae_of(), [99], STEP)
