"""Effects on a model whose features and their effects are known in closed form, and on the bundled one.

In the planted model the stream holds orthonormal features, plus a part that no feature reads. Position t
reads a weighted sum of the stream up to t, and the logit of token v is `sum_f u[v, f] (s + q s^2)` over the
strengths `s` of that sum, plus a linear readout of the rest.
"""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from saekit.activations.mask import MaskPolicy
from saekit.codes import SparseCodes
from saekit.errors import DataError, SaekitError, ShapeError
from saekit.patching.attribution import attribute, difference
from saekit.patching.effects import (
    EVERYWHERE,
    Candidates,
    Prompts,
    exact_effects,
    metric_of,
    read_prompts,
    site_effects,
)
from saekit.patching.feature_sets import greedy_set, halved_set, read_behaviour
from saekit.patching.metric import LogitDifference, NextTokenLoss
from saekit.patching.statistics import bootstrap, matched_features, rank_correlation, with_random_decoder
from saekit.patching.tokens import Grid, TokenMask
from saekit.sae import SAE
from saekit.sae_config import SAEConfig
from saekit.selection import Threshold
from saekit.targets import Site, Target

BOS, VOCABULARY, CONTEXT, FEATURES, WIDTH = 0, 20, 7, 12, 18
SITE, OUT = Site("stream"), Site("mix")
MASK = TokenMask(bos=BOS)
Q = 0.15


class Planted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        basis = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=g)).Q
        self.basis, self.directions, rest = basis, basis[:FEATURES], basis[FEATURES:]
        active = torch.rand(VOCABULARY, FEATURES, generator=g) < 0.4
        self.strengths = active * (0.2 + torch.rand(VOCABULARY, FEATURES, generator=g))
        self.others = torch.randn(VOCABULARY, WIDTH - FEATURES, generator=g)
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.stream, self.mix = nn.Identity(), nn.Identity()
        self.weights = torch.rand(CONTEXT, CONTEXT, generator=g).tril()
        self.u = torch.randn(VOCABULARY, FEATURES, generator=g)
        self.v = torch.randn(VOCABULARY, WIDTH, generator=g) @ rest.T @ rest
        with torch.no_grad():
            self.embed.weight.copy_(self.strengths @ self.directions + self.others @ rest)

    def forward(self, ids: Tensor) -> Tensor:
        y = self.mix(self.weights[: ids.shape[1], : ids.shape[1]] @ self.stream(self.embed(ids)))
        s = y @ self.directions.T
        return (s + Q * s.square()) @ self.u.T + y @ self.v.T

    def sums(self, codes: Tensor) -> Tensor:
        """Strengths that the last position reads, `(..., FEATURES)` from codes `(..., CONTEXT, FEATURES)`."""
        return (self.weights[-1, :, None] * codes).sum(-2)

    def effect(self, codes: Tensor, edited: Tensor, metric: LogitDifference) -> Tensor:
        u = self.u[metric.right] - self.u[metric.wrong]  # (prompts, FEATURES)
        before, after = self.sums(codes), self.sums(edited)
        return (u * (after + Q * after**2 - before - Q * before**2)).sum(-1)


def prompts(seed: int, n: int = 3) -> Tensor:
    ids = torch.randint(1, VOCABULARY, (n, CONTEXT), generator=torch.Generator().manual_seed(seed))
    ids[:, 0] = BOS
    return ids


def metric_for(ids: Tensor) -> LogitDifference:
    n = len(ids)
    return LogitDifference(torch.arange(1, n + 1), torch.arange(5, n + 5), torch.full((n,), CONTEXT - 1))


MODEL = Planted()
TARGET = Target.wrap(MODEL)
IDS, OTHER_IDS = prompts(1), prompts(2)
METRIC = metric_for(IDS)


def codes_of(ids: Tensor) -> Tensor:
    """The planted codes of tokens that count."""
    return MODEL.strengths[ids] * (ids != BOS)[..., None]


@pytest.fixture(scope="module")
def sae() -> SAE:
    planted = SAE(WIDTH, FEATURES, Threshold(1e-4))
    with torch.no_grad():
        planted.decoder.copy_(MODEL.directions)
        planted.encoder.copy_(MODEL.directions)
    return planted


@pytest.fixture(scope="module")
def other(sae):
    return read_prompts(TARGET, sae, SITE, OTHER_IDS, mask=MASK)


@pytest.fixture(scope="module")
def places(sae):
    return read_prompts(TARGET, sae, SITE, IDS, mask=MASK).active()


def truth(at: Candidates, new: Tensor) -> Tensor:
    """The closed form of giving each candidate the strength that `new (prompts, CONTEXT, FEATURES)` has there."""
    effects = []
    codes = MODEL.strengths[IDS]  # BOS is not edited, but read like any other
    for prompt, position, feature in zip(at.prompt, at.position, at.feature, strict=True):
        edited = codes.clone()
        where = slice(1, None) if position == EVERYWHERE else position
        edited[prompt, where, feature] = new[prompt, where, feature]
        effects.append(MODEL.effect(codes, edited, METRIC)[prompt])
    return torch.stack(effects)


# --- the planted model


def test_the_planted_features_are_found_where_they_are(sae, places):
    wanted = codes_of(IDS).nonzero().T
    assert {*zip(*(w.tolist() for w in wanted), strict=True)} == {
        *zip(places.prompt.tolist(), places.position.tolist(), places.feature.tolist(), strict=True)
    }
    assert len(places) > 50


@pytest.mark.parametrize("batch_rows", [4, 1000])
def test_exact_ablation_gives_the_planted_effects(sae, places, batch_rows):
    for at in (places, places.everywhere()):
        got = exact_effects(TARGET, sae, SITE, IDS, METRIC, at, mask=MASK, batch_rows=batch_rows)
        torch.testing.assert_close(got, truth(at, torch.zeros_like(codes_of(IDS))).double(), rtol=0, atol=1e-5)
        assert got.abs().median() > 1e-2


def test_exact_patching_gives_the_planted_effects(sae, other):
    n = torch.arange(3 * (CONTEXT - 1) * FEATURES)
    every = Candidates(n // ((CONTEXT - 1) * FEATURES), 1 + n // FEATURES % (CONTEXT - 1), n % FEATURES)
    for at in (every, every.everywhere()):
        got = exact_effects(TARGET, sae, SITE, IDS, METRIC, at, other=other, mask=MASK)
        torch.testing.assert_close(got, truth(at, codes_of(OTHER_IDS)).double(), rtol=0, atol=1e-5)


def test_patching_whole_sites_gives_the_planted_effects():
    got = site_effects(TARGET, [SITE, OUT], IDS, OTHER_IDS, METRIC, batch_rows=5)
    assert got.shape == (2, 3, CONTEXT)
    x, y = MODEL.embed(IDS), MODEL.embed(OTHER_IDS)
    base = metric_of(TARGET, IDS, METRIC)
    swapped = metric_of(TARGET, OTHER_IDS, METRIC)
    torch.testing.assert_close(got[1, :, -1], swapped - base)  # the last position reads its own sum alone
    assert not got[1, :, :-1].any()
    for position in range(CONTEXT):
        patched = x.clone()
        patched[:, position] = y[:, position]
        with torch.no_grad():
            logits = TARGET.run(IDS, edits={SITE: lambda _, patched=patched: patched})
        torch.testing.assert_close(got[0, :, position], METRIC(logits, torch.arange(3)).double() - base)


def test_attribution_is_the_gradient_and_ranks_like_the_exact_effects(sae, places):
    found = attribute(TARGET, sae, SITE, IDS, METRIC, mask=MASK, batch_rows=2)
    codes = codes_of(IDS)
    u = MODEL.u[METRIC.right] - MODEL.u[METRIC.wrong]
    slope = (u * (1 + 2 * Q * MODEL.sums(MODEL.strengths[IDS])))[:, None] * MODEL.weights[-1, :, None]
    at = found.at
    want = -(slope * codes)[at.prompt, at.position, at.feature].double()
    torch.testing.assert_close(found.effect, want, rtol=1e-4, atol=1e-5)
    exact = exact_effects(TARGET, sae, SITE, IDS, METRIC, at, mask=MASK)
    assert rank_correlation(found.effect, exact) >= 0.95
    assert not found.error.any()
    together, effect = found.everywhere()
    exact = exact_effects(TARGET, sae, SITE, IDS, METRIC, together, mask=MASK)
    assert rank_correlation(effect, exact) >= 0.95


@pytest.mark.parametrize("steps", [1, 4])
def test_integrated_gradients_and_error_nodes_add_up_to_replacing_the_site(sae, other, steps):
    """Exactly even with one step, since the planted model is of second order."""
    found = attribute(TARGET, sae, SITE, IDS, METRIC, other=other, steps=steps, mask=MASK)
    total = found.error.sum(1).index_add(0, found.at.prompt, found.effect)
    replacement = torch.where((IDS != BOS)[..., None], other.vectors, MODEL.embed(IDS))
    with torch.no_grad():
        logits = TARGET.run(IDS, edits={SITE: lambda _: replacement})
    base = metric_of(TARGET, IDS, METRIC)
    torch.testing.assert_close(total, METRIC(logits, torch.arange(3)).double() - base, rtol=1e-4, atol=1e-5)
    first_order = attribute(TARGET, sae, SITE, IDS, METRIC, other=other, mask=MASK)
    gap = first_order.error.sum(1).index_add(0, found.at.prompt, first_order.effect) - total
    assert gap.abs().min() > 1e-2
    assert found.error[:, 1:].abs().median() > 0.1 and not found.error[:, 0].any()


def test_the_error_nodes_carry_exactly_what_no_feature_reads(sae, other):
    found = attribute(TARGET, sae, SITE, IDS, METRIC, other=other, mask=MASK)
    v = MODEL.v[METRIC.right] - MODEL.v[METRIC.wrong]
    change = other.vectors - MODEL.embed(IDS)
    want = MODEL.weights[-1] * (change @ v[:, :, None])[..., 0]
    torch.testing.assert_close(found.error[:, 1:], want[:, 1:].double(), rtol=1e-4, atol=1e-5)


def test_a_masked_token_is_never_part_of_an_effect(sae):
    drop_nothing = MaskPolicy(drop_bos=False)
    assert not (read_prompts(TARGET, sae, SITE, IDS, mask=MASK).active().position == 0).any()
    everything = read_prompts(TARGET, sae, SITE, IDS, mask=drop_nothing)
    assert (everything.active().position == 0).any()
    feature = int(MODEL.strengths[BOS].argmax())
    at = Candidates(torch.tensor([0]), torch.tensor([EVERYWHERE]), torch.tensor([feature]))
    with_bos, without = (exact_effects(TARGET, sae, SITE, IDS, METRIC, at, mask=mask) for mask in (drop_nothing, MASK))
    assert (with_bos - without).abs() > 1e-3


def test_what_the_other_prompts_have_at_a_masked_token_takes_no_part(sae):
    ids = IDS.clone()
    ids[0, 3] = BOS
    assert bool((codes_of(OTHER_IDS)[0, 3] > 0).any())
    there = read_prompts(TARGET, sae, SITE, OTHER_IDS, mask=MASK)
    found = attribute(TARGET, sae, SITE, ids, METRIC, other=there, mask=MASK)
    assert not bool(((found.at.prompt == 0) & (found.at.position == 3)).any()) and found.error[0, 3] == 0
    exact_effects(TARGET, sae, SITE, ids, METRIC, found.at, other=there, mask=MASK)  # all of them are places that count
    behaviour = read_behaviour(TARGET, sae, SITE, ids, OTHER_IDS, METRIC, mask=MASK)
    everything = behaviour.vectors(behaviour.change.features.unique(), all_but=False)
    assert torch.equal(everything[0, 3], behaviour.own.vectors[0, 3])


def test_random_directions_are_the_control_of_equal_density_and_norm(sae, places):
    control = with_random_decoder(sae, seed=0)
    x = MODEL.embed(IDS).flatten(0, 1)
    assert torch.equal(control.encode(x).to_dense(), sae.encode(x).to_dense())
    torch.testing.assert_close(control.decoder.norm(dim=1), sae.decoder.norm(dim=1))
    assert torch.equal(with_random_decoder(sae, seed=0).decoder, control.decoder)
    assert not torch.equal(with_random_decoder(sae, seed=1).decoder, control.decoder)
    assert torch.equal(sae.decoder, MODEL.directions)
    real, random = (exact_effects(TARGET, s, SITE, IDS, METRIC, places, mask=MASK) for s in (sae, control))
    assert rank_correlation(real, random) < 0.5


def test_the_difference_of_codes_holds_the_entries_of_both(sae):
    own, other = (sae.encode(MODEL.embed(ids).flatten(0, 1)) for ids in (IDS, OTHER_IDS))
    torch.testing.assert_close(difference(own, other).to_dense(), other.to_dense() - own.to_dense())
    torch.testing.assert_close(difference(own, None).to_dense(), -own.to_dense())


@pytest.fixture(scope="module")
def through_mix() -> SAE:
    """A transcoder over what turns each position's stream into itself: planted features in, the same out."""
    cfg = SAEConfig(
        d_in=WIDTH, d_sae=FEATURES, d_out=WIDTH, apply_b_dec_to_input=False, hook_name="embed", hook_name_out="stream"
    )
    planted = SAE(WIDTH, FEATURES, Threshold(1e-4), cfg=cfg)
    with torch.no_grad():
        planted.decoder.copy_(MODEL.directions)
        planted.encoder.copy_(MODEL.directions)
    return planted


def test_effects_of_a_transcoder_are_of_what_it_writes(through_mix, sae, places, other):
    read = Site("embed")
    got = exact_effects(TARGET, through_mix, read, IDS, METRIC, places, mask=MASK)
    torch.testing.assert_close(got, truth(places, torch.zeros_like(codes_of(IDS))).double(), rtol=0, atol=1e-5)
    there = read_prompts(TARGET, through_mix, read, OTHER_IDS, mask=MASK)
    for patched in ({}, {"other": (there, other)}):
        pair = [{name: both[i] for name, both in patched.items()} for i in (0, 1)]
        found = attribute(TARGET, through_mix, read, IDS, METRIC, mask=MASK, **pair[0])
        want = attribute(TARGET, sae, SITE, IDS, METRIC, mask=MASK, **pair[1])
        torch.testing.assert_close(found.effect, want.effect)
        torch.testing.assert_close(found.error, want.error)
    sets = [
        greedy_set(read_behaviour(TARGET, which, site, IDS, OTHER_IDS, METRIC, mask=MASK), size=3)
        for which, site in ((through_mix, read), (sae, SITE))
    ]
    assert torch.equal(sets[0].features, sets[1].features)
    torch.testing.assert_close(sets[0].necessary, sets[1].necessary)


# --- metrics


def test_the_loss_of_a_row_is_the_sum_of_its_predictions():
    ids = torch.tensor([[0, 3, 4, 1], [0, 2, 1, 1]])
    logits = torch.randn(3, 4, VOCABULARY)
    which = torch.tensor([1, 0, 1])
    log_probs = logits.log_softmax(-1)
    want = -torch.stack(
        [
            log_probs[0, 0, 2],
            log_probs[1, 0, 3] + log_probs[1, 1, 4],
            log_probs[2, 0, 2],
        ]
    )
    torch.testing.assert_close(NextTokenLoss(ids, pad=1)(logits, which), want)
    full = NextTokenLoss(ids)(logits, which)
    torch.testing.assert_close(full[1], want[1] - log_probs[1, 2, 1])


# --- statistics


@settings(max_examples=30, deadline=None)
@given(
    values=st.lists(st.floats(-100, 100), min_size=2, max_size=30), shift=st.floats(-10, 10), seed=st.integers(0, 99)
)
def test_a_bootstrap_interval_moves_with_its_values_and_holds_their_mean(values, shift, seed):
    values = torch.tensor(values, dtype=torch.float64)
    found, moved = bootstrap(values, seed=seed), bootstrap(values + shift, seed=seed)
    assert found == bootstrap(values, seed=seed)
    assert float(values.min()) - 1e-9 <= found.low <= found.high <= float(values.max()) + 1e-9
    assert found.mean == pytest.approx(float(values.mean()), abs=1e-9)
    assert (moved.low, moved.high) == pytest.approx((found.low + shift, found.high + shift), abs=1e-6)


def test_a_bootstrap_interval_is_as_wide_as_the_normal_one_where_that_is_right():
    values = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = bootstrap(values, level=0.9)
    half = 1.6449 * float(values.std(correction=0)) / 20
    assert found.low == pytest.approx(found.mean - half, rel=0.1, abs=0.01)
    assert found.high == pytest.approx(found.mean + half, rel=0.1, abs=0.01)
    assert bootstrap(values, level=0.5).high < found.high


@settings(max_examples=50, deadline=None)
@given(values=st.lists(st.integers(-20, 20), min_size=3, max_size=30), seed=st.integers(0, 99))
def test_rank_correlation_sees_order_alone(values, seed):
    one = torch.tensor(values, dtype=torch.float64)
    two = one[torch.randperm(len(one), generator=torch.Generator().manual_seed(seed))]
    if len(set(values)) > 1:
        assert rank_correlation(one, one.exp()) == pytest.approx(1)
        assert rank_correlation(one, -one) == pytest.approx(-1)
        assert rank_correlation(one, two) == pytest.approx(rank_correlation(two, one**3))


def test_equal_values_share_the_mean_of_their_ranks():
    one, two = torch.tensor([1.0, 2.0, 2.0, 3.0]), torch.tensor([1.0, 2.0, 3.0, 4.0])
    # ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4
    assert rank_correlation(one, two) == pytest.approx(4.5 / (4.5 * 5) ** 0.5)
    assert rank_correlation(one, torch.ones(4)) != rank_correlation(one, torch.ones(4))


def test_matched_features_fire_about_as_often_and_are_others():
    density = torch.linspace(1, 0.001, 500)
    chosen = torch.tensor([3, 100, 101, 450])
    found = matched_features(density, chosen, seed=0, neighbours=10)
    assert not set(found.tolist()) & set(chosen.tolist()) and len(found.unique()) == 4
    assert (found - chosen).abs().max() <= 12
    assert not torch.equal(found, matched_features(density, chosen, seed=1, neighbours=10))
    density[5:] = 0
    with pytest.raises(SaekitError, match=r"4 other features fire, too few to match 5; compare a smaller set"):
        matched_features(density, torch.tensor([0, 5, 6, 7, 8]), seed=0)


# --- refusals


def at(prompt: int = 0, position: int = 2, feature: int = 1) -> Candidates:
    return Candidates(torch.tensor([prompt]), torch.tensor([position]), torch.tensor([feature]))


@pytest.mark.parametrize(
    "candidates, message",
    [
        (at(prompt=3), r"candidates name prompts from 3 to 3, but there are 3; count from 0"),
        (at(position=CONTEXT), r"candidates name positions from 7 to 7, but there are 7"),
        (at(feature=FEATURES), r"candidates name features from 12 to 12, but there are 12"),
        (at(position=0), r"candidate 0 is at position 0 of prompt 0, which is masked and passes by"),
    ],
)
def test_candidates_that_are_not_there_are_refused(sae, candidates, message):
    with pytest.raises(SaekitError, match=message):
        exact_effects(TARGET, sae, SITE, IDS, METRIC, candidates, mask=MASK)


def test_prompts_that_do_not_fit_are_refused(sae, other):
    short = IDS[:2]
    with pytest.raises(ShapeError, match=r"the other prompts are \(3, 7\), these \(2, 7\)"):
        exact_effects(TARGET, sae, SITE, short, METRIC, at(), other=other, mask=MASK)
    with pytest.raises(ShapeError, match=r"the other prompts are \(3, 7\), these \(2, 7\)"):
        attribute(TARGET, sae, SITE, short, METRIC, other=other, mask=MASK)
    with pytest.raises(ShapeError, match=r"so give prompts of the same sizes"):
        site_effects(TARGET, [SITE], short, IDS, METRIC)
    with pytest.raises(ShapeError, match=r"3 right tokens, 2 wrong ones and 3 positions"):
        LogitDifference(METRIC.right, METRIC.wrong[:2], METRIC.position)


def test_what_has_no_meaning_is_refused(sae):
    with pytest.raises(SaekitError, match=r"steps=-1; give 0 for attribution patching"):
        attribute(TARGET, sae, SITE, IDS, METRIC, steps=-1, mask=MASK)
    with pytest.raises(SaekitError, match=r"stream:out@\* stands for every call"):
        read_prompts(TARGET, sae, replace(SITE, call=None), IDS, mask=MASK)
    with pytest.raises(DataError, match=r"there are 1 values; an interval needs at least 2 prompts"):
        bootstrap(torch.ones(1))


# --- sets of features


@pytest.fixture(scope="module")
def behaviour(sae):
    return read_behaviour(TARGET, sae, SITE, IDS, OTHER_IDS, METRIC, mask=MASK)


def of_patched(features: list[int], *, error: bool) -> float:
    """The closed form of the mean metric with some features, and perhaps the rest, from the other prompts."""
    codes, other = MODEL.strengths[IDS].clone(), MODEL.strengths[OTHER_IDS]
    codes[:, 1:, features] = other[:, 1:, features]
    rest = MODEL.others[OTHER_IDS] if error else MODEL.others[IDS]
    rest = torch.cat([MODEL.others[IDS][:, :1], rest[:, 1:]], 1)
    u, v = (w[METRIC.right] - w[METRIC.wrong] for w in (MODEL.u, MODEL.v))
    s = MODEL.sums(codes)
    y = MODEL.sums(rest @ MODEL.basis[FEATURES:])
    return float(((u * (s + Q * s**2)).sum(-1) + (v * y).sum(-1)).mean())


def test_the_shares_of_a_set_are_those_of_the_planted_model(behaviour):
    base, goal = of_patched([], error=False), of_patched(list(range(FEATURES)), error=True)
    assert (behaviour.base, behaviour.goal) == pytest.approx((base, goal), abs=1e-5)
    for chosen in ([], [3], [0, 4, 7, 11], list(range(FEATURES))):
        others = [feature for feature in range(FEATURES) if feature not in chosen]
        sufficient = (of_patched(chosen, error=False) - base) / (goal - base)
        necessary = (goal - of_patched(others, error=True)) / (goal - base)
        found = behaviour.shares(torch.tensor(chosen, dtype=torch.int64))
        assert found == pytest.approx((sufficient, necessary), abs=1e-4)


def test_the_greedy_set_takes_what_helps_most_first(behaviour):
    found = greedy_set(behaviour, size=FEATURES)
    assert sorted(found.features.tolist()) == list(range(FEATURES))
    assert found.effect == pytest.approx(behaviour.goal - behaviour.base)
    for n in (0, 1, 5):
        sizes = behaviour.shares(found.features[:n])
        assert (float(found.sufficient[n]), float(found.necessary[n])) == pytest.approx(sizes, abs=1e-6)
    # no single feature, and no other set of two, beats the first ones by more than what is of second order
    singles = [behaviour.shares(torch.tensor([feature]))[0] for feature in range(FEATURES)]
    assert float(found.sufficient[1]) >= sorted(singles)[-2]
    helping = found.sufficient.diff() > 0
    assert helping[:3].all() and not helping[-1]


@pytest.mark.parametrize("size", [1, 3, 5, FEATURES])
def test_halving_ends_with_what_helps_most(behaviour, size):
    """In the planted model, whose second-order part is small beside a feature's own effect."""
    found = halved_set(behaviour, size=size)
    singles = torch.tensor([behaviour.shares(torch.tensor([feature]))[0] for feature in range(FEATURES)])
    assert len(found.features.unique()) == size == len(found.sufficient) - 1
    best = singles.topk(size).indices
    share = behaviour.shares(best)[0]
    assert float(found.sufficient[-1]) >= share - 0.05 * abs(share)
    sizes = behaviour.shares(found.features)
    assert (float(found.sufficient[-1]), float(found.necessary[-1])) == pytest.approx(sizes, abs=1e-6)
    assert float(singles[found.features[0]]) >= float(singles.sort(descending=True).values[1])


def test_sets_that_make_no_sense_are_refused(sae, behaviour):
    with pytest.raises(SaekitError, match=r"a set of 13 features is asked for, and 12 differ"):
        greedy_set(behaviour, size=13)
    with pytest.raises(SaekitError, match=r"a set of 0 features is asked for"):
        halved_set(behaviour, size=0)
    with pytest.raises(SaekitError, match=r"with and without what stream:out has on the other prompts"):
        read_behaviour(TARGET, sae, SITE, IDS, IDS, METRIC, mask=MASK)
    with pytest.raises(ShapeError, match=r"so give prompts of the same sizes"):
        read_behaviour(TARGET, sae, SITE, IDS[:2], IDS, METRIC, mask=MASK)


def test_a_feature_that_is_active_below_zero_is_a_candidate_too():
    codes = SparseCodes(
        values=torch.tensor([0.5, -0.7, 0.0]),
        features=torch.tensor([3, 1, 2]),
        row_starts=torch.tensor([0, 1, 2, 3]),
        n_features=4,
    )
    grid = Grid(torch.ones(1, 3, dtype=torch.bool), ids=None, past=0, number=0, call=0)
    found = Prompts(torch.zeros(1, 3, WIDTH), grid, codes).active()
    assert (found.position.tolist(), found.feature.tolist()) == ([0, 1], [3, 1])
