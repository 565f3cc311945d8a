"""Runs whose rule changes: annealed k, a second phase, pooled budgets, new weights for dead features, transcoders."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from toy_runs import BATCH, N_FEATURES, OUT, SITE, config, source_of
from toy_runs import small_samples as small_samples
from toy_vectors import D_MODEL, mixtures

from saekit.activations.harvest import TensorSource
from saekit.density import RunningDensity, ZipfFit
from saekit.errors import SaekitError
from saekit.losses import fvu
from saekit.selection import FeatureChoice, MutualChoice, Threshold, TopK
from saekit.training.loop import train
from saekit.training.objectives import Gated, JumpReLU, Matryoshka, ReLUL1
from saekit.training.resample import Resample, resample
from saekit.training.schedule import AnnealK, ThenFeatureChoice
from saekit.training.step import TrainState, train_step

pytestmark = pytest.mark.usefixtures("small_samples")


@pytest.fixture(scope="module")
def vectors() -> Tensor:
    return mixtures(8192, seed=0)


# the family, from nothing to an SAE


@pytest.mark.parametrize(
    ("objective", "bound"),
    # L1 buys sparsity by making every activation too small, the others do not
    [(ReLUL1(3), 0.5), (Gated(3), 0.25), (JumpReLU(3), 0.25), (JumpReLU(3, penalty="tanh"), 0.25)],
    ids=str,
)
def test_an_objective_that_finds_its_own_sparsity_finds_the_one_asked_for(objective, bound, vectors):
    settings = config(250, rule=Threshold(0.0), objective=objective, learning_rate=1e-2, decay=0.3)
    (sae,) = train([settings], source_of(vectors))
    unseen = mixtures(2048, seed=1)
    with torch.no_grad():
        codes = sae.encode(unseen)
        assert float(codes.l0().double().mean()) == pytest.approx(3, rel=0.25)
        assert float(fvu(unseen, sae(unseen))) < bound
    assert isinstance(sae.rule, Threshold)
    assert str(objective) == sae.cfg.metadata["training"]["objective"]


@pytest.mark.parametrize("objective", [ReLUL1, Gated, JumpReLU])
def test_sparsity_responds_to_k(objective, vectors):
    def l0(k: int) -> float:
        settings = config(150, rule=Threshold(0.0), objective=objective(k), learning_rate=4e-3, decay=0.3)
        (sae,) = train([settings], source_of(vectors))
        return float(sae.encode(vectors[:2048]).l0().double().mean())

    assert l0(2) < l0(5) - 0.7


@pytest.mark.parametrize("rule", [TopK(3), MutualChoice(3), FeatureChoice(3)], ids=repr)
def test_a_matryoshka_sae_reconstructs_from_a_prefix_better_than_a_plain_one(rule, vectors):
    def unexplained(objective) -> tuple[float, float]:
        """FVU from the first quarter of the features, and from all."""
        changes = {} if objective is None else {"objective": objective}
        (sae,) = train([config(120, rule=rule, **changes)], source_of(vectors))
        with torch.no_grad():
            codes = sae.encode(vectors)
            return tuple(float(fvu(vectors, sae.decode(codes.where(codes.features < n)))) for n in (12, N_FEATURES))

    nested, plain = unexplained(Matryoshka((0.25, 1.0))), unexplained(None)
    assert nested[0] < plain[0] - 0.1
    assert nested[1] < 0.4


# transcoders


class TwoSites(TensorSource):
    """Vectors, and a linear function of them at another Site."""

    matrix = torch.randn(D_MODEL, 10, generator=torch.Generator().manual_seed(5))

    @property
    def widths(self):
        return {SITE: D_MODEL, OUT: 10}

    def stream(self, batch_tokens, *, seed):
        for batches in super().stream(batch_tokens, seed=seed):
            x = batches[SITE].vectors
            yield {SITE: batches[SITE], OUT: replace(batches[SITE], vectors=x @ self.matrix * 7 - 4)}


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("rule", [TopK(3), MutualChoice(3)], ids=repr)
def test_a_transcoder_learns_what_becomes_of_its_input(rule, skip, vectors):
    source = TwoSites(site=SITE, vectors=vectors, buffer_tokens=2048)
    (sae,) = train([config(150, rule=rule, site_out=OUT, skip=skip)], source)
    unseen = mixtures(1024, seed=3)
    target = unseen @ source.matrix * 7 - 4
    with torch.no_grad():
        assert float(fvu(target, sae(unseen))) < (0.02 if skip else 0.2)
    assert (sae.cfg.hook_name, sae.cfg.hook_name_out) == (str(SITE), str(OUT))
    assert (sae.d_model, sae.d_out, sae.cfg.d_out, sae.cfg.apply_b_dec_to_input) == (D_MODEL, 10, 10, False)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(N_FEATURES))
    if not skip:
        assert float(sae.encode(unseen).l0().double().mean()) == pytest.approx(3, rel=0.05)


def test_the_finished_transcoder_does_in_model_units_what_the_state_does_in_its_own(vectors):
    targets = vectors @ TwoSites.matrix * 7 - 4
    state = TrainState.start(config(site_out=OUT, skip=True), vectors, targets)
    for start in range(0, 2048, BATCH):
        train_step(state, vectors[start : start + BATCH], targets[start : start + BATCH])
    x = state.inputs(vectors[:100])
    torch.testing.assert_close(x.mean(), torch.zeros(()), atol=0.2, rtol=0)
    with torch.no_grad():
        finished = state.finished()
        torch.testing.assert_close(finished(vectors[:100]), state.sae(x) / state.output_scale, rtol=1e-3, atol=1e-3)
        mine, theirs = finished.encode(vectors[:100]), state.sae.encode(x)
        assert (mine.features == theirs.features).double().mean() > 0.99
        torch.testing.assert_close(mine.values.sum(), theirs.values.sum() / state.output_scale, rtol=1e-3, atol=0)


def test_a_source_without_the_output_site_is_refused(vectors):
    with pytest.raises(SaekitError, match=r"supplies layers\.1:out, not layers\.2:out; harvest that Site too"):
        train([config(site_out=OUT)], source_of(vectors))


# schedules


def test_k_falls_in_a_straight_line_to_that_of_the_rule(vectors):
    anneal = AnnealK(start=11, over=0.5)
    assert [anneal.k(3, share) for share in (0.0, 0.125, 0.25, 0.5, 0.9)] == [11, 9, 7, 3, 3]
    state = TrainState.start(config(8, anneal=anneal), vectors)
    entries = [len(train_step(state, vectors[:BATCH]).codes.values) // BATCH for _ in range(8)]
    assert entries == [11, 9, 7, 5, 3, 3, 3, 3]
    assert state.finished().rule == TopK(3)


def test_the_second_phase_begins_with_frozen_ranks_on_the_fitted_curve():
    line = ZipfFit(exponent=0.8, offset=3.0, scale=0.5)
    order = torch.randperm(400, generator=torch.Generator().manual_seed(0))
    average = torch.empty(400, dtype=torch.float64).scatter_(0, order, line.expected(400))
    density = RunningDensity(average=average, tokens_since_fired=torch.zeros(400, dtype=torch.int64), weight=1.0)
    rule = ThenFeatureChoice(cap=0.9).rule(4, density, relu=True)
    assert rule.exponent == pytest.approx(0.8, abs=0.02) and rule.offset == pytest.approx(3.0, abs=0.5)
    assert (rule.k, rule.cap) == (4, 0.9)
    assert torch.equal(rule.ranks[order], torch.arange(400))
    given = ThenFeatureChoice(exponent=0.3, offset=0.0).rule(4, density, relu=False)
    assert (given.exponent, given.offset, given.relu) == (0.3, 0.0, False)


def test_a_run_in_two_phases_switches_once_rewarms_and_ends_calibrated(vectors):
    then = ThenFeatureChoice(at=0.5, rewarm=0.4, pool=1)
    settings = config(20, rule=MutualChoice(3), then=then, warmup=0.0, decay=0.0)
    state = TrainState.start(settings, vectors)
    rules = []
    for start in range(0, 20 * BATCH, BATCH):
        train_step(state, vectors[start : start + BATCH])
        rules.append(state.sae.rule)
    assert all(rule == MutualChoice(3) for rule in rules[:10])
    assert all(isinstance(rule, FeatureChoice) for rule in rules[10:])
    assert all(torch.equal(rule.ranks, rules[10].ranks) for rule in rules[10:])
    assert [settings.lr_factor(step) for step in (9, 10, 11, 13, 19)] == [1.0, 0.25, 0.5, 1.0, 1.0]
    (sae,) = train([config(60, rule=MutualChoice(3), then=ThenFeatureChoice(at=0.5, pool=4))], source_of(vectors))
    assert isinstance(sae.rule, Threshold) and torch.as_tensor(sae.rule.theta).unique().numel() > 1


@pytest.mark.parametrize("rule", [MutualChoice(30, relu=False), TopK(30, relu=False)], ids=str)
def test_a_second_phase_of_a_run_without_relu_has_none(rule, vectors):
    (sae,) = train([config(40, rule=rule, then=ThenFeatureChoice(at=0.5, pool=1))], source_of(vectors))
    assert isinstance(sae.rule, Threshold) and not sae.rule.relu
    with torch.no_grad():
        assert (sae.encode(vectors).values < 0).any()


@pytest.mark.parametrize("at", [0.5, 0.8])
def test_each_phase_learns_as_a_run_of_its_own(at):
    settings = config(500, rule=MutualChoice(3), then=ThenFeatureChoice(at=at))
    first = round(at * 500)
    factors = [settings.lr_factor(step) for step in range(500)]
    alone = [config(first, rule=MutualChoice(3)).lr_factor(step) for step in range(first)]
    assert factors[:first] == alone
    assert max(factors[first:]) == 1.0 and sum(factors[first:]) / (500 - first) > 0.65
    assert factors[first - 1] < 0.02 and factors[-1] < 0.03


def test_feature_choice_pools_as_many_batches_as_its_rarest_feature_needs(vectors):
    rule = FeatureChoice(1, exponent=1.0)
    smallest = rule.smallest_batch(N_FEATURES)
    settings = config(9, rule=rule, batch_tokens=64)
    n_pool = -(-smallest // 64)
    assert n_pool > 2
    assert [settings.pool_starting_at(step) for step in range(2 * n_pool)] == [
        n_pool if step % n_pool == 0 else 0 for step in range(2 * n_pool)
    ]
    state = TrainState.start(settings, vectors)
    pool = vectors[: n_pool * 64]
    codes = [
        train_step(state, batch, pool=pool if number == 0 else None).codes
        for number, batch in enumerate(pool.split(64))
    ]
    # the first batch is cut where its share of the pool's budgets ends; later ones meet weights that have moved
    again = TrainState.start(settings, vectors)
    x = again.inputs(pool)
    ranked = replace(rule, ranks=again.demand.ranks())
    again.demand.observe(MutualChoice(1).encode(again.sae.prepare(again.inputs(pool[:64]))[0], *encoder_of(again)))
    ranked = replace(rule, ranks=again.demand.ranks())
    whole = again.sae.with_rule(ranked).encode(x)
    assert torch.equal(codes[0].to_dense() > 0, (whole.select(torch.arange(64)).to_dense() > 0))
    assert sum(len(part.values) for part in codes) == pytest.approx(len(pool), rel=0.4)


@pytest.mark.parametrize(
    "rule, then, least",
    [
        (FeatureChoice(3, exponent=4.0, floor=4), None, 4 / BATCH),
        (MutualChoice(3), ThenFeatureChoice(at=0.5, exponent=4.0, offset=0.0, pool=4), 1 / (4 * BATCH)),
    ],
)
def test_calibration_grants_the_rarest_features_the_share_that_training_did(vectors, rule, then, least):
    (sae,) = train([config(40, rule=rule, then=then)], source_of(vectors))
    n = 1 << 17
    counts = sae.encode(mixtures(n, seed=1)).feature_counts().double() / n
    # on such a curve most features have what the floor gives them
    assert float(counts.median()) == pytest.approx(least, rel=0.5)


def encoder_of(state: TrainState) -> tuple[Tensor, Tensor]:
    return state.sae.encoder, state.sae.b_enc


def test_pooling_reaches_the_loop_and_a_wide_dictionary_is_learnt_from_small_batches(vectors):
    settings = config(40, rule=FeatureChoice(3, exponent=0.5), batch_tokens=64, n_features=400)
    assert settings.pool_starting_at(0) > 2
    tokens = []
    (sae,) = train(
        [settings], source_of(vectors), on_step=lambda step, reports: tokens.append(len(reports[0].codes.values))
    )
    assert len(set(tokens)) > 10  # cuts, not quotas, within a pool
    unseen = mixtures(2048, seed=1)
    with torch.no_grad():
        assert float(fvu(unseen, sae(unseen))) < 0.6
        assert float(sae.encode(unseen).l0().double().mean()) == pytest.approx(3, rel=0.15)


# dead features


def test_dead_features_are_aimed_at_what_is_reconstructed_worst(vectors):
    state = TrainState.start(config(resample=Resample(at=(0.5,))), vectors)
    for start in range(0, 4 * BATCH, BATCH):
        train_step(state, vectors[start : start + BATCH])
    sae, x = state.sae, state.inputs(vectors[:BATCH]).clone()
    x[7] += 60 * torch.nn.functional.normalize(torch.arange(D_MODEL).float(), dim=0)  # one token nobody understands
    dead = torch.zeros(N_FEATURES, dtype=torch.bool)
    dead[[3, 11]] = True
    before = {name: weight.clone() for name, weight in sae.state_dict().items()}
    error = (x - sae(x)).detach()
    changed = resample(sae, state.optimizer, x, x, dead, encoder_norm=0.2, seed=0)
    assert changed.tolist() == [3, 11]
    alive_norm = before["encoder"][~dead].norm(dim=1).mean()
    for feature in (3, 11):
        torch.testing.assert_close(sae.W_dec[feature], torch.nn.functional.normalize(error[7], dim=0))
        torch.testing.assert_close(sae.encoder[feature].norm(), 0.2 * alive_norm)
        assert sae.b_enc[feature] == 0
        moments = state.optimizer.state[sae.encoder]
        assert not moments["exp_avg"][feature].any() and not moments["exp_avg_sq"][feature].any()
        assert moments["exp_avg"][feature + 1].any()
    for name in ("encoder", "decoder", "b_enc"):
        assert torch.equal(sae.state_dict()[name][~dead], before[name][~dead])
    assert torch.equal(sae.b_dec, before["b_dec"])


def test_nobody_is_resampled_where_nobody_is_dead_or_nothing_is_left_over(vectors):
    state = TrainState.start(config(), vectors)
    x = state.inputs(vectors[:8])
    alive = torch.zeros(N_FEATURES, dtype=torch.bool)
    assert len(resample(state.sae, state.optimizer, x, x, alive, encoder_norm=0.2, seed=0)) == 0
    explained = state.sae(x).detach()
    assert len(resample(state.sae, state.optimizer, x, explained, ~alive, encoder_norm=0.2, seed=0)) == 0


@pytest.mark.parametrize("settings", [{}, {"rule": Threshold(0.0), "objective": ReLUL1(3)}], ids=["topk", "relu_l1"])
def test_resampling_revives_features_that_nothing_else_would(vectors, settings):
    def dead_after(resampling: Resample | None) -> int:
        chosen = config(120, auxiliary=None, n_features=24, resample=resampling, **settings)
        state = TrainState.start(chosen, vectors)
        with torch.no_grad():
            state.sae.encoder[:8] = 0
            state.sae.b_enc[:8] = -5
        for step in range(120):
            codes = train_step(state, vectors[step * BATCH % 8192 :][:BATCH]).codes
        return int((codes.feature_counts()[:8] == 0).sum())

    assert dead_after(None) == 8
    assert dead_after(Resample(at=(0.25,))) <= 5


@pytest.mark.parametrize("due", [4, 6], ids=["at the start of a pool", "in the middle of one"])
def test_new_weights_are_not_held_to_the_cuts_of_the_old_ones(due, vectors):
    rule = FeatureChoice(3)
    settings = config(12, rule=rule, auxiliary=None, resample=Resample(at=(due / 12,)))
    state = TrainState.start(settings, vectors)
    with torch.no_grad():
        state.sae.encoder[:8] = 0  # nobody hears of them: their cut is at zero
    state.density.tokens_since_fired[:8] = 10**9
    batches = vectors.split(BATCH)
    share = []
    for step in range(12):
        pool = torch.cat(batches[step : step + 4]) if step % 4 == 0 else None
        counts = train_step(state, batches[step], pool=pool).codes.feature_counts()
        share.append(float(counts[:8].double().mean()) / BATCH)
    granted = 3 / N_FEATURES
    first = due if due == 4 else 8  # cuts of their own, here and with the next pool
    assert max(share[:first]) == 0
    assert 0 < share[first] < 3 * granted


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rule": TopK(3), "objective": Gated(3)}, r"Gated\(k=3\) finds its own sparsity and would ignore TopK"),
        ({"rule": Threshold(0.0), "objective": JumpReLU(48)}, "k=48 on 48 features would keep everything"),
        ({"rule": Threshold(0.0), "objective": Gated(3), "resample": Resample()}, "keep closed; leave resample away"),
        ({"anneal": AnnealK(2)}, r"cannot fall from 2 to 3 .*start at least at the rule's k"),
        ({"anneal": AnnealK(48)}, r"cannot fall from 48 to 3 on 48 features"),
        ({"density_horizon": 0}, "density_horizon=0: give a number of tokens"),
        ({"then": ThenFeatureChoice(at=0.99)}, r"at=0\.99 of 20 steps leaves one of the two phases empty"),
        ({"then": ThenFeatureChoice(cap=0.05)}, r"48 features on at most 0\.05 .* cannot spend k=3 on every"),
        ({"then": ThenFeatureChoice(), "rule": FeatureChoice(3)}, r"is that from the start; begin with TopK or Mutual"),
        ({"then": ThenFeatureChoice(pool=1), "n_features": 1000}, r"pool of 1 batches of 256 tokens cannot grant"),
        (
            {"rule": FeatureChoice(3, exponent=4.0)},
            r"shares its budgets over .* the run has 5,120; choose",
        ),
    ],
)
def test_what_would_fail_in_the_middle_of_a_run_is_refused_before_it(changes, message):
    with pytest.raises(SaekitError, match=message):
        config(**changes)


@pytest.mark.parametrize("objective", [ReLUL1, Gated, JumpReLU])
def test_a_sparsity_that_is_none_is_refused(objective):
    with pytest.raises(SaekitError, match=r"\(k=0\): k is the mean number of active features"):
        objective(0)


def test_without_relu_the_thresholds_of_a_batch_rule_let_negative_entries_through(vectors):
    (sae,) = train([config(20, rule=FeatureChoice(30, relu=False))], source_of(vectors))
    assert isinstance(sae.rule, Threshold) and not sae.rule.relu
    with torch.no_grad():
        codes = sae.encode(vectors)
    assert (codes.values < 0).any()
    assert float(codes.l0().double().mean()) == pytest.approx(30, rel=0.02)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: ThenFeatureChoice(rewarm=200.0),
            r"ThenFeatureChoice\(rewarm=200\.0\): give a share of the second phase",
        ),
        (lambda: ThenFeatureChoice(pool=0), r"ThenFeatureChoice\(pool=0\): give at least 1 batch"),
        (lambda: ThenFeatureChoice(exponent=-1.0), r"exponent=-1\.0.*finite numbers of at least 0"),
        (lambda: Resample(at=(0.5, 1.0)), r"Resample\(at=\(0\.5, 1\.0\)\): give shares of the run"),
        (lambda: AnnealK(9, over=0.0), r"AnnealK\(over=0\.0\): give the share"),
        (lambda: ThenFeatureChoice(at=1.0), r"ThenFeatureChoice\(at=1\.0\): give the share"),
    ],
)
def test_shares_of_a_run_that_are_none_are_refused(make, message):
    with pytest.raises(SaekitError, match=message):
        make()
