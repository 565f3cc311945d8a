"""Effects over a corpus against the same by hand: row by row, feature by feature."""

import argparse
import inspect
from dataclasses import replace

import pytest
import torch
from small_models import BOS, FIRST, PAD, WIDTH, sae_of, tiny_llama
from torch.nn.functional import cross_entropy

from saekit.activations.tokens import TokenRows
from saekit.errors import DataError, SaekitError
from saekit.patching.attribution import difference
from saekit.patching.corpus_effects import (
    CheckSums,
    EffectSettings,
    EffectSums,
    check_exactly,
    corpus_effects,
)
from saekit.patching.curvature import loss_gradients, second_order
from saekit.patching.effects import read_prompts
from saekit.patching.statistics import rank_correlation, with_random_decoder
from saekit.patching.tokens import TokenMask
from saekit.sae import SAE
from saekit.selection import Threshold
from saekit.targets import Site, Target

CONTEXT = 6
FIRST_ORDER = EffectSettings(draws=0, seed=3)


@pytest.fixture(scope="module")
def target() -> Target:
    return Target.wrap(tiny_llama())


@pytest.fixture(scope="module")
def sae() -> SAE:
    return sae_of(Threshold(0.3))


@pytest.fixture(scope="module")
def rows() -> TokenRows:
    ids = torch.randint(2, 40, (40, CONTEXT), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = BOS
    ids[-1, 4:] = PAD
    return TokenRows.from_ids(ids, bos=BOS, pad=PAD)


def losses(target, rows, change=None) -> torch.Tensor:
    """Nats of each row, with `change` added to the activations."""
    logits = target.run(rows.ids, edits={} if change is None else {FIRST: lambda x: x + change})
    following = rows.ids[:, 1:]
    nats = cross_entropy(logits[:, :-1].transpose(1, 2), following, reduction="none")
    return (nats * (following != PAD)).sum(1)


def codes_of(target, sae, rows) -> torch.Tensor:
    """Dense, `(rows, context, n_features)`, 0 where masked."""
    x = target.read(rows.ids, [FIRST])[FIRST]
    codes = sae.encode(x.flatten(0, 1)).to_dense().view(*rows.ids.shape, -1).detach()
    return codes * ((rows.ids != BOS) & (rows.ids != PAD))[..., None]


@pytest.mark.parametrize("batch_rows", [7, 64])
def test_without_draws_the_mean_effect_is_the_derivative_of_the_loss_along_each_ablation(target, sae, rows, batch_rows):
    done = []
    settings = replace(FIRST_ORDER, batch_rows=batch_rows)
    found = corpus_effects(target, sae, FIRST, rows, settings=settings, on_batch=done.append)
    assert [sums.rows for sums in done] == [*range(batch_rows, 40, batch_rows), 40]
    codes = codes_of(target, sae, rows)
    assert torch.equal(found.active, (codes > 0).sum((0, 1)))
    for which, effects in ((sae, found.effect), (with_random_decoder(sae, seed=3), found.random)):
        share = torch.zeros(sae.n_features, requires_grad=True)  # of each feature's ablation, at every token at once
        losses(target, rows, -(codes * share) @ which.decoder.detach()).sum().backward()
        torch.testing.assert_close(effects, share.grad.double() / found.active.clamp(min=1), rtol=1e-3, atol=1e-5)


def test_draws_add_half_the_gauss_newton_curvature_along_each_ablation(target, sae, rows):
    """`1/2 sum_t Var_p(J_t change)`, the variance under the model's predictions, by differences of logits."""
    few = rows.select(torch.tensor([3, 39]))  # the last is padded
    own = read_prompts(target, sae, FIRST, few.ids, mask=TokenMask(bos=BOS, pad=PAD))
    change = difference(own.codes, None)
    gradients = loss_gradients(target, FIRST, few.ids, own.vectors, pad=PAD, draws=2000, seed=0)
    found = second_order(change, gradients, sae, own.vectors)
    found -= second_order(change, (gradients[0], []), sae, own.vectors)
    codes = codes_of(target, sae, few)
    counted = few.ids[:, 1:] != PAD
    with torch.no_grad():
        p = target.run(few.ids)[:, :-1].softmax(-1)
        for feature in codes.sum((0, 1)).topk(5).indices.tolist():
            step = -1e-2 * codes[..., feature, None] * sae.decoder[feature]
            moved = [target.run(few.ids, edits={FIRST: lambda x, s=s: x + s})[:, :-1] for s in (step, -step)]
            slope = (moved[0] - moved[1]) / 2e-2
            variance = (p * slope.square()).sum(-1) - (p * slope).sum(-1).square()
            want = 0.5 * (variance * counted).sum(1)
            torch.testing.assert_close(found[:, feature], want.double(), rtol=0.15, atol=1e-4)
            assert want.max() > 1e-3


def test_on_a_trained_model_curvature_is_what_gradients_miss():
    model, bundled = Target.load("pystd"), SAE.from_pretrained("pystd", "layers.2")
    site, bos = Site.parse(bundled.cfg.hook_name), model.tokenizer.bos_token_id
    ids = torch.tensor(model.tokenizer.encode(inspect.getsource(argparse))[: 16 * 47]).view(16, 47)
    text = TokenRows.from_ids(torch.cat([torch.full((16, 1), bos), ids], 1), bos=bos)
    active = corpus_effects(model, bundled, site, text, settings=FIRST_ORDER).active
    features = (active >= 2).nonzero()[:, 0][::5][:48]
    first, second = (
        check_exactly(model, bundled, site, text, features, settings=EffectSettings(draws=draws)) for draws in (0, 8)
    )
    assert torch.equal(first.exact, second.exact)
    assert second.rank_correlation > first.rank_correlation + 0.03
    assert second.rank_correlation > 0.75
    assert 0.6 < second.slope < 1.6


@pytest.mark.parametrize("done_batches", [1, 2])
def test_a_pass_that_goes_on_gives_the_same_numbers_bit_for_bit(target, sae, rows, done_batches):
    settings = EffectSettings(batch_rows=16, resamples=20)
    states: list[EffectSums] = []
    whole = corpus_effects(target, sae, FIRST, rows, settings=settings, on_batch=states.append)
    gone_on = corpus_effects(target, sae, FIRST, rows, settings=settings, after=states[done_batches - 1])
    for name in ("effect", "low", "high", "random", "active"):
        assert torch.equal(getattr(whole, name), getattr(gone_on, name)), name
    features = whole.active.topk(4).indices
    checks: list[CheckSums] = []
    check = check_exactly(target, sae, FIRST, rows, features, settings=settings, on_batch=checks.append)
    again = check_exactly(target, sae, FIRST, rows, features, settings=settings, after=checks[done_batches - 1])
    assert torch.equal(check.exact, again.exact) and torch.equal(check.attributed, again.attributed)
    other = corpus_effects(target, sae, FIRST, rows, settings=replace(settings, seed=1))
    assert not torch.equal(whole.effect, other.effect)


def test_intervals_hold_the_means_and_shrink_with_more_rows(target, sae, rows):
    few, many = (corpus_effects(target, sae, FIRST, rows.select(slice(n))) for n in (10, 40))
    often = few.active > 5
    for found in (few, many):
        assert ((found.low <= found.effect) & (found.effect <= found.high))[often].double().mean() > 0.95
        assert (found.low < found.high)[often].all()
    assert ((many.high - many.low)[often] < (few.high - few.low)[often]).double().mean() > 0.8
    again = corpus_effects(target, sae, FIRST, rows.select(slice(10)))
    assert torch.equal(few.low, again.low)


@torch.no_grad()
def test_the_exact_check_zeroes_features_for_good(target, sae, rows):
    codes = codes_of(target, sae, rows)
    features = codes.gt(0).sum((0, 1)).topk(6).indices.flip(0)
    found = check_exactly(target, sae, FIRST, rows, features, settings=EffectSettings(batch_rows=16))
    base = losses(target, rows)
    for i, feature in enumerate(features.tolist()):
        change = -codes[..., feature, None] * sae.decoder[feature]
        want = (losses(target, rows, change) - base).double().sum() / (codes[..., feature] > 0).sum()
        assert float(found.exact[i]) == pytest.approx(float(want), abs=1e-5)
    assert torch.equal(found.feature, features)
    assert found.rank_correlation == rank_correlation(found.attributed, found.exact)
    miss = [float((found.exact - s * found.attributed).abs().sum()) for s in (found.slope, found.slope * 1.05)]
    assert miss[0] <= miss[1] and miss[0] <= float((found.exact - 0.95 * found.slope * found.attributed).abs().sum())
    assert found.exact.abs().min() > 1e-4
    of_the_pass = corpus_effects(target, sae, FIRST, rows, settings=EffectSettings(batch_rows=16))
    torch.testing.assert_close(found.attributed, of_the_pass.effect[features])


def test_a_feature_that_was_never_zeroed_is_not_checked(target, sae, rows):
    silent = sae_of(Threshold(0.3))
    with torch.no_grad():
        silent.b_enc[5] = -1e6
    few, settings = rows.select(slice(4)), EffectSettings(batch_rows=16)
    active = codes_of(target, sae, few).gt(0).sum((0, 1)).topk(6).indices
    active = active[active != 5]
    found = check_exactly(target, silent, FIRST, few, torch.cat([active, torch.tensor([5])]), settings=settings)
    only = check_exactly(target, silent, FIRST, few, active, settings=settings)
    assert torch.equal(found.feature, active) and torch.equal(found.exact, only.exact)
    assert (found.rank_correlation, found.slope) == (only.rank_correlation, only.slope)
    with pytest.raises(DataError, match=r"1 of the features to be checked is active on these rows; give more of them"):
        check_exactly(target, silent, FIRST, few, torch.tensor([int(active[0]), 5]), settings=settings)


def test_a_feature_that_is_never_active_has_no_effect(target, sae, rows):
    silent = sae_of(Threshold(0.3))
    with torch.no_grad():
        silent.b_enc[5] = -1e6
    found = corpus_effects(target, silent, FIRST, rows)
    assert (found.effect[5], found.low[5], found.high[5], found.active[5]) == (0, 0, 0, 0)
    with pytest.raises(DataError, match=r"no feature is active on any token that counts; give more text"):
        corpus_effects(target, SAE(WIDTH, 20, Threshold(1e9)), FIRST, rows)


@pytest.mark.parametrize("wrong", [{"draws": -1}, {"resamples": 0}, {"batch_rows": 0}])
def test_settings_that_measure_nothing_are_refused(wrong):
    with pytest.raises(SaekitError, match=rf"{next(iter(wrong))}=.*; give [01] or more"):
        EffectSettings(**wrong)
