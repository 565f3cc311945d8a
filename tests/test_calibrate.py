"""Thresholds that keep on single tokens what a batch rule keeps on a batch."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from saekit.activations.corpus import load_corpus
from saekit.activations.harvest import Harvest
from saekit.activations.tokens import TokenRows
from saekit.errors import DataError, SaekitError
from saekit.losses import fvu
from saekit.normalisation import EqualNorms, Plain
from saekit.sae import SAE
from saekit.sae_config import SAEConfig
from saekit.selection import FeatureChoice, MutualChoice, SelectionRule, Threshold, TopK
from saekit.targets import Site, Target
from saekit.training.calibrate import calibrate

D_MODEL, N_FEATURES, K = 12, 40, 4
UNIFORM, ZIPF = FeatureChoice(K), FeatureChoice(K, exponent=1.0, offset=2.0)
RULES = [MutualChoice(K), UNIFORM, ZIPF]


def sae_with(rule: SelectionRule, *, equal_norms: bool = False) -> SAE:
    sae = SAE(
        D_MODEL,
        N_FEATURES,
        rule,
        cfg=SAEConfig(d_in=D_MODEL, d_sae=N_FEATURES, normalisation=EqualNorms() if equal_norms else Plain()),
    )
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        sae.encoder.mul_(torch.rand(N_FEATURES, 1, generator=generator) + 0.5)
        sae.b_enc.copy_(torch.randn(N_FEATURES, generator=generator) / 4)
        sae.b_dec.copy_(torch.randn(D_MODEL, generator=generator))
    return sae


def vectors(n: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, D_MODEL, generator=generator) * torch.linspace(0.5, 3, D_MODEL) + 1


def active_per_token(sae: SAE, x: Tensor) -> float:
    with torch.no_grad():
        return float(sae.encode(x).l0().double().mean())


@pytest.mark.parametrize("equal_norms", [False, True])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_on_its_own_pool_the_threshold_keeps_exactly_what_the_rule_keeps(rule, equal_norms):
    sae, pool = sae_with(rule, equal_norms=equal_norms), vectors(3000, 0)
    threshold = calibrate(sae, pool)
    if rule is ZIPF:  # without ranks of its own, the rule is given those of a competition of all with all
        rule = FeatureChoice(K, exponent=1.0, offset=2.0, ranks=ranks_in_competition(sae, pool))
    with torch.no_grad():
        wanted, got = sae.with_rule(rule).encode(pool).active(), sae.with_rule(threshold).encode(pool)
    assert torch.equal(got.row_starts, wanted.row_starts)
    assert torch.equal(got.features, wanted.features)
    torch.testing.assert_close(got.values, wanted.values)
    assert not threshold.looks_across_tokens


def ranks_in_competition(sae: SAE, pool: Tensor) -> Tensor:
    with torch.no_grad():
        counts = sae.with_rule(MutualChoice(K)).encode(pool).feature_counts()
    order = counts.argsort(descending=True, stable=True)
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_unseen_tokens_get_k_features_on_average_one_by_one(rule):
    sae = sae_with(rule)
    served = sae.with_rule(calibrate(sae, vectors(40_000, 0)))
    unseen = vectors(20_000, 1)
    together = active_per_token(served, unseen)
    assert together == pytest.approx(K, rel=0.02)
    with torch.no_grad():
        for row in range(5):
            alone = served.encode(unseen[row : row + 1])
            assert torch.equal(alone.features, served.encode(unseen[:5]).select(torch.tensor([row])).features)


def test_mutual_choice_has_one_cut_for_all_and_feature_choice_one_each():
    pool = vectors(2000, 0)
    assert len(torch.as_tensor(calibrate(sae_with(MutualChoice(K)), pool).theta).unique()) == 1
    assert len(torch.as_tensor(calibrate(sae_with(UNIFORM), pool).theta).unique()) == N_FEATURES


def test_feature_choice_keeps_its_ranks_where_it_has_them():
    pool = vectors(2000, 0)
    ranks = torch.arange(N_FEATURES).flip(0)
    sae = sae_with(FeatureChoice(K, exponent=1.0, ranks=ranks))
    with torch.no_grad():
        counts = sae.with_rule(calibrate(sae, pool)).encode(pool).feature_counts()
    budgets = FeatureChoice(K, exponent=1.0).budgets(2000, N_FEATURES)[ranks]
    positive = (sae.prepare(pool)[0] @ sae.W_enc + sae.b_enc.detach() > 0).sum(0)
    assert torch.equal(counts, torch.minimum(budgets, positive))


def test_equal_budgets_need_no_competition_for_ranks(monkeypatch):
    monkeypatch.delattr("saekit.training.calibrate._ranks")
    calibrate(sae_with(UNIFORM), vectors(500, 0))
    with pytest.raises(NameError):
        calibrate(sae_with(ZIPF), vectors(500, 0))


def test_a_pool_of_another_type_serves_and_an_empty_one_is_refused():
    sae, pool = sae_with(ZIPF), vectors(500, 0)
    assert torch.equal(
        torch.as_tensor(calibrate(sae, pool.double()).theta), torch.as_tensor(calibrate(sae, pool).theta)
    )
    with pytest.raises(DataError, match="no activations to calibrate on; give tens of thousands"):
        calibrate(sae, pool[:0])


def test_calibration_leaves_the_sae_as_it_was():
    sae, pool = sae_with(ZIPF), vectors(500, 0)
    before = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    threshold = calibrate(sae, pool)
    assert all(torch.equal(before[name], tensor) for name, tensor in sae.state_dict().items())
    assert sae.rule is ZIPF
    assert not torch.as_tensor(threshold.theta).requires_grad


@pytest.mark.parametrize("rule", [TopK(K), Threshold(0.5)], ids=["TopK", "Threshold"])
def test_a_rule_that_decides_token_by_token_is_refused(rule):
    with pytest.raises(SaekitError, match=rf"{type(rule).__name__} decides token by token already; only Mutual"):
        calibrate(sae_with(rule), vectors(100, 0))


@dataclass(frozen=True)
class Bundled:
    """The bundled SAE, activations to calibrate on, and others: of rows not drawn, of whole held-out modules."""

    sae: SAE
    pool: Tensor
    others: dict[str, Tensor]


@pytest.fixture(scope="module")
def bundled() -> Bundled:
    target, sae = Target.load("pystd"), SAE.from_pretrained("pystd", "layers.2")
    site = Site.parse(sae.cfg.hook_name)
    corpus = load_corpus("stdlib", target.tokenizer, context=256)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randperm(len(corpus.train), generator=generator)

    def read(rows: TokenRows) -> Tensor:
        harvest = Harvest(target=target, rows=rows, sites=(site,))
        return torch.cat([batches[site].vectors for batches in harvest.in_order()])

    return Bundled(
        sae=sae,
        pool=read(corpus.train.select(drawn[:200])),
        others={
            "the same text": read(corpus.train.select(drawn[200:300])),
            "other modules": read(
                corpus.held_out.select(torch.randperm(len(corpus.held_out), generator=generator)[:200])
            ),
        },
    )


# modules that the model never saw drive features more: there the thresholds keep a little more than the budget
L0_WITHIN = {"the same text": 0.02, "other modules": 0.035}


@pytest.mark.parametrize("rule", [MutualChoice(32), FeatureChoice(32, exponent=0.7, offset=40.0, floor=1)], ids=str)
def test_on_a_real_model_thresholds_serve_unseen_tokens_as_the_rule_serves_a_batch_of_them(rule, bundled):
    sae = bundled.sae.with_rule(rule)
    if isinstance(rule, FeatureChoice):
        sae = sae.with_rule(replace(rule, ranks=ranks_in_competition(sae, bundled.pool)))
    single = sae.with_rule(calibrate(sae, bundled.pool))
    for text, unseen in bundled.others.items():
        with torch.no_grad():
            batch_l0, single_l0 = active_per_token(sae, unseen), active_per_token(single, unseen)
            batch_fvu, single_fvu = float(fvu(unseen, sae(unseen))), float(fvu(unseen, single(unseen)))
        assert single_l0 == pytest.approx(batch_l0, rel=L0_WITHIN[text]), text
        assert single_fvu == pytest.approx(batch_fvu, rel=0.02), text
        if isinstance(rule, MutualChoice):  # Feature Choice's budgets also hold matches that are not positive
            assert batch_l0 == pytest.approx(rule.k)
