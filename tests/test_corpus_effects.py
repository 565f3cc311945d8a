"""Effects over a corpus against the same by hand: row by row, feature by feature."""

import pytest
import torch
from small_models import BOS, FIRST, PAD, WIDTH, sae_of, tiny_llama
from torch.nn.functional import cross_entropy

from saekit.activations.tokens import TokenRows
from saekit.errors import DataError
from saekit.patching.corpus_effects import check_exactly, corpus_effects
from saekit.patching.statistics import rank_correlation, with_random_decoder
from saekit.sae import SAE
from saekit.selection import Threshold
from saekit.targets import Target

CONTEXT = 6


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
def test_the_mean_effect_is_the_derivative_of_the_loss_along_each_ablation(target, sae, rows, batch_rows):
    done = []
    found = corpus_effects(target, sae, FIRST, rows, batch_rows=batch_rows, seed=3, on_progress=done.append)
    assert sum(done) == found.rows == 40
    codes = codes_of(target, sae, rows)
    assert torch.equal(found.active, (codes > 0).sum((0, 1)))
    for which, effects in ((sae, found.effect), (with_random_decoder(sae, seed=3), found.random)):
        share = torch.zeros(sae.n_features, requires_grad=True)  # of each feature's ablation, at every token at once
        losses(target, rows, -(codes * share) @ which.decoder.detach()).sum().backward()
        torch.testing.assert_close(effects, share.grad.double() / found.active.clamp(min=1), rtol=1e-3, atol=1e-5)


def test_intervals_hold_the_means_and_shrink_with_more_rows(target, sae, rows):
    few, many = (corpus_effects(target, sae, FIRST, rows.select(slice(n)), seed=0) for n in (10, 40))
    often = few.active > 5
    for found in (few, many):
        assert ((found.low <= found.effect) & (found.effect <= found.high))[often].double().mean() > 0.95
        assert (found.low < found.high)[often].all()
    assert ((many.high - many.low)[often] < (few.high - few.low)[often]).double().mean() > 0.8
    again = corpus_effects(target, sae, FIRST, rows.select(slice(10)), seed=0)
    assert torch.equal(few.low, again.low)


@torch.no_grad()
def test_the_exact_check_zeroes_features_for_good(target, sae, rows):
    codes = codes_of(target, sae, rows)
    features = codes.gt(0).sum((0, 1)).topk(6).indices.flip(0)
    found = check_exactly(target, sae, FIRST, rows, features, batch_rows=16)
    base = losses(target, rows)
    for i, feature in enumerate(features.tolist()):
        change = -codes[..., feature, None] * sae.decoder[feature]
        want = (losses(target, rows, change) - base).double().mean()
        assert float(found.exact[i]) == pytest.approx(float(want), abs=1e-5)
    assert torch.equal(found.feature, features)
    assert found.rank_correlation == rank_correlation(found.attributed, found.exact)
    assert found.exact.abs().min() > 1e-4


def test_a_feature_that_is_never_active_has_no_effect(target, sae, rows):
    silent = sae_of(Threshold(0.3))
    with torch.no_grad():
        silent.b_enc[5] = -1e6
    found = corpus_effects(target, silent, FIRST, rows)
    assert (found.effect[5], found.low[5], found.high[5], found.active[5]) == (0, 0, 0, 0)
    with pytest.raises(DataError, match=r"no feature is active on any token that counts; give more text"):
        corpus_effects(target, SAE(WIDTH, 20, Threshold(1e9)), FIRST, rows)
