"""Training on synthetic activations: determinism, purity of `measure`, learning, revival, refusals."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from toy_vectors import D_MODEL, mixtures

from saekit.activations.harvest import TensorSource
from saekit.errors import DataError, SaekitError
from saekit.losses import AuxK, AuxZipf, fvu
from saekit.sae import SAE
from saekit.selection import FeatureChoice, MutualChoice, Threshold, TopK
from saekit.targets import Site
from saekit.training import loop
from saekit.training.config import TrainConfig
from saekit.training.loop import train
from saekit.training.objectives import Gated, JumpReLU, Matryoshka, ReLUL1
from saekit.training.resample import Resample
from saekit.training.schedule import AnnealK, ThenFeatureChoice
from saekit.training.step import TrainState, geometric_median, measure, train_step

SITE, OTHER = Site.parse("layers.1"), Site.parse("layers.2")
BATCH = 256
OBJECTIVES = [
    *({"rule": Threshold(0.0), "objective": objective} for objective in (Gated(3), JumpReLU(3))),
    {"rule": MutualChoice(3), "objective": Matryoshka()},
]
RULES = [TopK(3), MutualChoice(3), FeatureChoice(3), FeatureChoice(3, exponent=1.0)]
ZIPF, DEAD_ONLY = AuxZipf(dead_after=2 * BATCH), AuxK(dead_after=2 * BATCH)


@pytest.fixture(scope="module")
def vectors() -> Tensor:
    return mixtures(8192, seed=0)


@pytest.fixture(autouse=True)
def _small_samples(monkeypatch):
    monkeypatch.setattr(loop, "SAMPLE_TOKENS", 2048)
    monkeypatch.setattr(loop, "CALIBRATION_TOKENS", 8192)


def config(steps: int = 20, **changes) -> TrainConfig:
    defaults = {"site": SITE, "rule": TopK(3), "n_features": 48, "tokens": steps * BATCH, "batch_tokens": BATCH}
    return TrainConfig(**{**defaults, "learning_rate": 1e-2, **changes})


def source_of(vectors: Tensor, site: Site = SITE) -> TensorSource:
    return TensorSource(site=site, vectors=vectors, buffer_tokens=1024)


def weights(sae: SAE) -> dict[str, Tensor]:
    found = {name: parameter.detach() for name, parameter in sae.named_parameters()}
    return found | ({"theta": torch.as_tensor(sae.rule.theta)} if isinstance(sae.rule, Threshold) else {})


def assert_same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def everything_in(state: TrainState) -> dict[str, Tensor]:
    """All that a state holds."""
    found = weights(state.sae)
    for number, moments in state.optimizer.state_dict()["state"].items():
        found |= {f"{number}.{name}": torch.as_tensor(moment).clone() for name, moment in moments.items()}
    found |= {"average": state.density.average.clone(), "tokens_since_fired": state.density.tokens_since_fired.clone()}
    found |= {"weight": torch.tensor(state.density.weight), "step": torch.tensor(state.step)}
    found["scale"] = torch.tensor(state.input_scale)
    found |= {f"grad.{name}": p.grad.clone() for name, p in state.sae.named_parameters() if p.grad is not None}
    if isinstance(state.sae.rule, FeatureChoice) and state.sae.rule.ranks is not None:
        found["ranks"] = state.sae.rule.ranks.clone()
    return {name: tensor.clone() for name, tensor in found.items()}


def trained_state(
    vectors: Tensor, settings: TrainConfig, *, after: Callable[[TrainState], object] = lambda state: None
) -> TrainState:
    state = TrainState.start(settings, vectors)
    for batch in vectors.split(BATCH)[: settings.steps]:
        train_step(state, batch)
        after(state)
    return state


# same seed, same result


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_seed_decides_every_bit_and_another_gives_another_result(rule, vectors):
    def run(seed: int) -> dict[str, Tensor]:
        return weights(train([config(12, rule=rule, seed=seed)], source_of(vectors))[0])

    first = run(0)
    assert_same(first, run(0))
    assert not torch.equal(first["encoder"], run(1)["encoder"])


@pytest.mark.parametrize("auxiliary", [ZIPF, DEAD_ONLY, None], ids=str)
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_measuring_more_often_does_not_change_training(rule, auxiliary, vectors):
    settings = config(12, rule=rule, auxiliary=auxiliary, ranks_every=5)

    def look(state: TrainState) -> None:
        before = everything_in(state)
        for _ in range(2):
            measure(state, vectors[:100])
        assert_same(before, everything_in(state))

    quiet, chatty = trained_state(vectors, settings), trained_state(vectors, settings, after=look)
    assert_same(everything_in(quiet), everything_in(chatty))
    assert quiet.step == 12


@pytest.mark.parametrize("rule", [TopK(3), FeatureChoice(3, exponent=1.0)], ids=str)
def test_two_saes_trained_together_are_the_two_trained_apart(rule, vectors):
    class TwoSites(TensorSource):
        @property
        def widths(self):
            return {SITE: D_MODEL, OTHER: D_MODEL}

        def stream(self, batch_tokens, *, seed):
            for batches in super().stream(batch_tokens, seed=seed):
                yield {SITE: batches[SITE], OTHER: replace(batches[SITE], vectors=batches[SITE].vectors.flip(1) * 5)}

    source = TwoSites(site=SITE, vectors=vectors, buffer_tokens=1024)
    configs = [config(8), config(8, site=OTHER, rule=rule, n_features=32, learning_rate=3e-3)]
    together = train(configs, source)
    for sae, settings in zip(together, configs, strict=True):
        assert_same(weights(sae), weights(train([settings], source)[0]))
        assert sae.cfg.hook_name == str(settings.site)


def test_every_batch_of_the_stream_is_learnt_from_once_and_in_its_order(vectors, monkeypatch):
    """Those that set up the pre-bias too, and calibration reads on behind them."""
    learnt, pools = [], []
    monkeypatch.setattr(
        loop, "train_step", lambda state, x, *a, **k: (learnt.append(x), train_step(state, x, *a, **k))[1]
    )
    calibrate = loop.calibrate
    monkeypatch.setattr(loop, "calibrate", lambda sae, pool: (pools.append(pool), calibrate(sae, pool))[1])
    train([config(12, rule=MutualChoice(3))], source_of(vectors))
    stream = source_of(vectors).stream(BATCH, seed=0)
    wanted = torch.cat([next(stream)[SITE].vectors for _ in range(12 + 8192 // BATCH)])
    assert torch.equal(torch.cat([*learnt, *pools]), wanted)


# learning


@pytest.mark.parametrize(
    "rule, bound",
    [(TopK(3), 0.15), (MutualChoice(3), 0.15), (FeatureChoice(3), 0.3), (FeatureChoice(3, exponent=1.0), 0.3)],
    ids=str,
)
def test_a_sparse_dictionary_is_learnt_and_serves_single_tokens(rule, bound, vectors):
    losses, unexplained = [], []

    def note(step, reports):
        assert step == len(losses) + 1
        losses.append(float(reports[0].loss.detach()))
        unexplained.append(float(reports[0].fvu))

    (sae,) = train([config(200, rule=rule)], source_of(vectors), model_name="toy", context_size=7, on_step=note)
    unseen = mixtures(2048, seed=1)
    with torch.no_grad():
        assert float(fvu(unseen, sae(unseen))) < bound
    assert len(losses) == 200
    assert losses[-1] < losses[10] / 1.5
    assert unexplained[-1] < bound < unexplained[0]
    assert not sae.rule.looks_across_tokens
    assert isinstance(sae.rule, TopK if isinstance(rule, TopK) else Threshold)
    assert (sae.cfg.model_name, sae.cfg.context_size, sae.cfg.hook_name) == ("toy", 7, "layers.1:out")
    assert sae.cfg.metadata["training"]["rule"] == repr(rule)
    assert sae.cfg.metadata["training"]["learning_rate"] == 1e-2
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(48))


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_decoder_rows_have_unit_norm_after_every_step(rule, vectors):
    def check(state: TrainState) -> None:
        torch.testing.assert_close(state.sae.W_dec.norm(dim=1), torch.ones(48), rtol=0, atol=1e-6)

    trained_state(vectors, config(6, rule=rule, learning_rate=0.1), after=check)


@pytest.mark.parametrize("auxiliary, revived", [(ZIPF, True), (DEAD_ONLY, True), (None, False)], ids=str)
@pytest.mark.parametrize("rule", [TopK(3), MutualChoice(3)], ids=str)
def test_an_auxiliary_loss_revives_a_planted_dead_feature(rule, auxiliary, revived, vectors):
    settings = config(120, rule=rule, auxiliary=auxiliary, n_features=20)
    state = TrainState.start(settings, vectors)
    with torch.no_grad():
        # a faint reading of a direction: open to gradients, but never among the strongest
        state.sae.encoder[7] *= 1e-3
    fired = []
    before = state.sae.encoder[7].detach().clone()
    for step in range(settings.steps):
        batch = vectors[step * BATCH % len(vectors) :][:BATCH]
        fired.append(int(train_step(state, batch).codes.feature_counts()[7]))
    assert sum(fired[:4]) == 0
    assert (sum(fired[-20:]) > 20) is revived
    assert torch.equal(state.sae.encoder[7].detach(), before) is not revived


def test_no_feature_is_asked_for_help_before_it_could_have_fired(vectors):
    settings = config(20, auxiliary=AuxK(dead_after=5 * BATCH), n_features=64)
    state = TrainState.start(settings, vectors)
    with torch.no_grad():
        state.sae.encoder[:16] *= 1e-3
    auxiliary = [float(train_step(state, vectors[:BATCH]).auxiliary.detach()) for _ in range(8)]
    assert auxiliary[:6] == [0.0] * 6  # after five batches the threshold is reached, not passed
    assert min(auxiliary[6:]) > 0


def test_the_auxiliary_loss_counts_with_its_weight(vectors):
    settings = config(20, auxiliary=AuxK(dead_after=BATCH, weight=0.25), n_features=64)
    state = TrainState.start(settings, vectors)
    with torch.no_grad():
        state.sae.encoder[:16] *= 1e-3
    for _ in range(3):
        report = train_step(state, vectors[:BATCH])
    main = (vectors[:BATCH] * state.input_scale).var(0, correction=0).sum() * report.fvu
    torch.testing.assert_close(report.loss, main + 0.25 * D_MODEL * report.auxiliary)
    assert report.auxiliary > 0


@pytest.mark.parametrize(
    "change",
    [
        {"auxiliary": DEAD_ONLY},
        {"auxiliary": None},
        {"auxiliary": replace(ZIPF, weight=1.0)},
        {"auxiliary": replace(ZIPF, k_aux=1)},
        {"auxiliary": replace(ZIPF, dead_after=4 * BATCH)},
        {"auxiliary": replace(ZIPF, below=0.01)},
        {"auxiliary": replace(ZIPF, claim="feature")},
        {"auxiliary": replace(ZIPF, warmup=6 * BATCH)},
        {"density_horizon": 2 * BATCH},
        {"auxiliary": replace(ZIPF, most_members=0.1)},
        {"auxiliary": replace(ZIPF, curve=FeatureChoice(3, exponent=2.0))},
        {"objective": Matryoshka()},
        {"anneal": AnnealK(8)},
        {"resample": Resample(at=(0.5,))},
        {"clip": 0.01},
        {"warmup": 0.5},
        {"decay": 0.9},
        {"equal_norms": True},
        {"encoder_start": "unit"},
        {"pre_bias": "zero"},
        {"batch_tokens": BATCH // 2},
    ],
    ids=str,
)
def test_no_option_is_ignored(change, vectors):
    def run(settings: TrainConfig) -> Tensor:
        state = TrainState.start(settings, vectors)
        with torch.no_grad():
            # some features dead, some that fire now and then
            state.sae.encoder[:16] *= 1e-3
            state.sae.b_enc[16:32] -= torch.linspace(0, 4, 16)
        for batch in vectors.split(settings.batch_tokens)[:16]:
            train_step(state, batch)
        return state.sae.encoder.detach()

    usual = config(16, n_features=64, auxiliary=ZIPF)
    assert torch.equal(run(usual), run(usual))
    assert not torch.equal(run(usual), run(replace(usual, **change)))


def test_feature_choice_ranks_features_by_how_often_they_would_win(vectors):
    state = TrainState.start(config(12, rule=FeatureChoice(3, exponent=1.0), ranks_every=5), vectors)
    budgets = state.config.rule.budgets(BATCH, 48)
    x = state.inputs(vectors[:BATCH])
    wins = MutualChoice(3).encode(x - state.sae.b_dec, state.sae.encoder, state.sae.b_enc).feature_counts()
    for step in range(7):
        if step == 2:  # from here on the last feature wins most often
            state.demand.average.copy_(torch.arange(48))
        report = train_step(state, vectors[:BATCH])
        ranks = state.sae.rule.ranks
        if step < 5:
            assert (wins[ranks.argsort()].diff() <= 0).all() and wins.unique().numel() > 5
        else:
            assert ranks.tolist() == list(range(48))[::-1]
        assert torch.equal(torch.bincount(report.codes.features, minlength=48), budgets[ranks])
    assert state.config.rule.ranks is None


# units, start, end


@pytest.mark.parametrize("equal_norms", [False, True])
@pytest.mark.parametrize("rule", [TopK(3), MutualChoice(3)], ids=str)
def test_the_finished_sae_does_in_model_units_what_the_state_does_in_its_own(rule, equal_norms, vectors):
    state = trained_state(vectors * 40, config(10, rule=rule, equal_norms=equal_norms))
    x = mixtures(64, seed=5) * 40
    finished = state.finished()
    with torch.no_grad():
        mine, theirs = finished.encode(x), state.sae.encode(x * state.input_scale)
        reconstructed = state.sae(x * state.input_scale) / state.input_scale
        torch.testing.assert_close(finished(x), reconstructed, rtol=1e-4, atol=1e-3)
    assert torch.equal(mine.features, theirs.features)
    torch.testing.assert_close(mine.values, theirs.values / state.input_scale, rtol=1e-4, atol=1e-4)
    finished.encoder.data.zero_()
    assert state.sae.encoder.any()  # a copy, not a view


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_the_unit_of_the_activations_does_not_matter(scale, vectors):
    state = TrainState.start(config(), vectors * scale)
    x = vectors * scale * state.input_scale
    torch.testing.assert_close(x.var(0, correction=0).sum(), torch.tensor(float(D_MODEL)))
    first = train_step(state, vectors[:BATCH] * scale)
    torch.testing.assert_close(
        first.fvu, train_step(TrainState.start(config(), vectors), vectors[:BATCH]).fvu, rtol=1e-3, atol=0
    )


@pytest.mark.parametrize("pre_bias", ["median", "mean", "zero"])
def test_the_pre_bias_starts_where_the_config_says(pre_bias, vectors):
    with_outlier = torch.cat([vectors[:500], torch.full((5, D_MODEL), 1e4)])
    state = TrainState.start(config(pre_bias=pre_bias), with_outlier)
    start = state.sae.b_dec.detach() / state.input_scale
    wanted = {"median": geometric_median(with_outlier), "mean": with_outlier.mean(0), "zero": torch.zeros(D_MODEL)}
    torch.testing.assert_close(start, wanted[pre_bias])


@pytest.mark.parametrize("equal_norms", [False, True])
@pytest.mark.parametrize("changes", [*({"rule": rule} for rule in RULES), *OBJECTIVES], ids=str)
def test_the_first_reconstruction_is_as_large_as_fits_best(changes, equal_norms, vectors):
    settings = config(**changes, equal_norms=equal_norms)
    state = TrainState.start(settings, vectors)
    x = state.inputs(vectors)[: settings.batch_tokens]
    # features that choose get as many tokens each as all of them compete for
    competing = state.sae.with_rule(MutualChoice(3)) if isinstance(state.sae.rule, FeatureChoice) else state.sae
    made = settings.objective.measure(competing, state.extra, x, x).y_hat.detach() - state.sae.b_dec
    centred = x - state.sae.b_dec
    # to the few per cent by which thresholds that are read off a larger sample differ
    torch.testing.assert_close((centred * made).sum(), made.square().sum(), rtol=0.05, atol=0)
    # a multiple of the decoder still, and not the decoder itself
    lengths = state.sae.encoder.detach().norm(dim=1)
    torch.testing.assert_close(state.sae.encoder, state.sae.decoder * lengths[:1, None])
    assert abs(float(lengths[0]) - 1) > 0.05


def test_an_annealed_run_starts_with_what_fits_its_first_k(vectors):
    annealed = TrainState.start(config(rule=TopK(3), anneal=AnnealK(24)), vectors)
    constant = TrainState.start(config(rule=TopK(24)), vectors)
    assert torch.equal(annealed.sae.encoder, constant.sae.encoder)


def test_the_encoder_of_a_transcoder_and_under_an_l1_penalty_starts_at_unit_norm(vectors):
    transcoder = TrainState.start(config(site_out=Site("y")), vectors, vectors.flip(1))
    under_l1 = TrainState.start(config(rule=Threshold(0.0), objective=ReLUL1(3)), vectors)
    for state in (transcoder, under_l1):
        torch.testing.assert_close(state.sae.encoder.norm(dim=1), torch.ones(state.sae.n_features))


def test_a_batch_too_small_for_the_budgets_of_features_is_enough_to_start_from(vectors):
    rule = FeatureChoice(1, exponent=1.5)
    state = TrainState.start(config(rule=rule, n_features=48, batch_tokens=64), vectors)
    mutual = TrainState.start(config(rule=MutualChoice(1), n_features=48, batch_tokens=64), vectors)
    assert torch.equal(state.sae.encoder, mutual.sae.encoder)


def test_the_geometric_median_resists_outliers():
    points = torch.randn(400, 3, generator=torch.Generator().manual_seed(0)) + torch.tensor([1.0, 2.0, 3.0])
    spoilt = torch.cat([points, torch.full((20, 3), 1e5)])
    assert (geometric_median(spoilt) - torch.tensor([1.0, 2.0, 3.0])).norm() < 0.3
    assert spoilt.mean(0).norm() > 1e3


def test_the_geometric_median_has_the_least_summed_distance():
    points = torch.randn(101, 2, generator=torch.Generator().manual_seed(1)).exp()
    found = geometric_median(points, iterations=200)

    def distance(point: Tensor) -> float:
        return float((points - point).norm(dim=1).sum())

    for angle in torch.arange(0, 6.3, 0.5):
        assert distance(found) < distance(found + 0.02 * torch.stack([angle.cos(), angle.sin()]))


def test_the_learning_rate_rises_stays_and_falls_to_zero():
    settings = config(100, warmup=0.1, decay=0.4)
    factors = [settings.lr_factor(step) for step in range(101)]
    assert factors[0] == pytest.approx(0.1) and factors[9] == 1.0
    assert set(factors[9:61]) == {1.0}
    assert factors[80] == pytest.approx(0.5) and factors[99] == pytest.approx(1 / 40) and factors[100] == 0.0
    assert factors[60:] == sorted(factors[60:], reverse=True)
    assert config(100, warmup=0.0, decay=0.0).lr_factor(0) == config(100, warmup=0.0, decay=0.0).lr_factor(99) == 1.0


def test_the_schedule_reaches_the_optimiser(vectors):
    rates = []
    settings = config(10, warmup=0.2, decay=0.5)
    trained_state(vectors, settings, after=lambda state: rates.append(state.optimizer.param_groups[0]["lr"]))
    assert rates == [1e-2 * settings.lr_factor(step) for step in range(10)]


def test_sizes_that_nobody_set_follow_from_the_others():
    derived = config(learning_rate=None, tokens=1_000_000)
    wide, wider = (config(n_features=n, learning_rate=None).peak_lr for n in (2**14, 2**16))
    assert wider == pytest.approx(wide / 2)  # falls with the square root of the width
    small, usual, large = (config(n_features=2**14, batch_tokens=n, learning_rate=None) for n in (64, 1024, 4096))
    assert large.peak_lr == 2 * small.peak_lr == 2 * usual.peak_lr  # grows with that of a large batch
    assert replace(large, rule=FeatureChoice(32)).peak_lr == usual.peak_lr
    assert config(learning_rate=0.02).peak_lr == 0.02
    assert derived.dead_threshold == 50_000
    assert config(1).dead_threshold == BATCH
    assert config(tokens=10**9).dead_threshold == 10_000_000
    assert config(auxiliary=AuxK(dead_after=7)).dead_threshold == 7
    assert config(tokens=BATCH * 3 + 5).steps == 3


# refusals


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"tokens": 255}, "tokens=255 is less than one batch of 256; raise tokens, or lower batch_tokens"),
        ({"rule": TopK(48)}, "k=48 on 48 features would keep everything; choose k below the number of features"),
        ({"rule": MutualChoice(50)}, "k=50 on 48 features would keep everything"),
        ({"rule": Threshold(0.5)}, r"nothing would make .* sparse; train TopK.*JumpReLU"),
        ({"rule": Threshold(0.5), "objective": Gated(3), "anneal": AnnealK(9)}, "Threshold has no k to anneal"),
        ({"batch_tokens": 0}, "batch_tokens=0: give at least 1 token for each step"),
        ({"learning_rate": -1.0}, r"learning_rate=-1\.0: give a number above 0"),
        ({"learning_rate": float("nan")}, "learning_rate=nan: give a number above 0"),
        ({"rule": Threshold(0.5), "objective": Gated(3), "then": ThenFeatureChoice()}, "no k to anneal or to hand on"),
        ({"site_out": SITE}, "layers.1:out to itself is an autoencoder; leave site_out away"),
        ({"skip": True}, "skip connection from a Site to itself would explain everything; give site_out"),
        ({"site_out": OTHER, "equal_norms": True}, "leave one of equal_norms and site_out away"),
    ],
)
def test_a_config_that_cannot_be_trained_is_refused_when_it_is_made(changes, message):
    with pytest.raises(SaekitError, match=message) as caught:
        config(**changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("changes", [{"tokens": 21 * BATCH}, {"batch_tokens": 128}, {"seed": 1}])
def test_configs_that_do_not_share_a_stream_are_refused(changes, vectors):
    with pytest.raises(SaekitError, match="differ in tokens, batch_tokens or seed; make these equal, or"):
        train([config(), config(**changes)], source_of(vectors))


def test_a_site_that_the_source_lacks_is_refused(vectors):
    with pytest.raises(SaekitError, match=r"the source supplies layers\.1:out, not layers\.2:out; harvest that"):
        train([config(), config(site=OTHER)], source_of(vectors))


def test_nothing_to_train_is_refused(vectors):
    with pytest.raises(SaekitError, match="pass at least one TrainConfig"):
        train([], source_of(vectors))


@pytest.mark.parametrize("pre_bias", ["median", "mean", "zero"])
def test_activations_far_from_zero_are_scaled_by_their_spread(pre_bias, vectors):
    far = vectors / vectors.std(0) + 10
    state = TrainState.start(config(pre_bias=pre_bias), far)
    assert float((far * state.input_scale).var(0, correction=0).mean()) == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize("pre_bias", ["median", "mean", "zero"])
def test_activations_that_are_all_equal_are_refused(pre_bias):
    with pytest.raises(DataError, match=r"activations at layers\.1:out are equal; there is nothing to learn; check"):
        train([config(pre_bias=pre_bias)], source_of(torch.full((1000, D_MODEL), 0.1)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_vectors_of_another_type_are_learnt_from_as_float32(dtype, vectors):
    # squares of these do not fit into float16
    given = (vectors * 300).to(dtype)
    (sae,), (same,) = (train([config(60)], source_of(x)) for x in (given, given.float()))
    assert_same(weights(sae), weights(same))


def test_a_loss_that_is_no_longer_finite_ends_training(vectors):
    steps = []
    with pytest.raises(DataError, match=r"the loss at layers\.1:out is nan after step 3; lower the learning rate"):
        train([config(3, learning_rate=1e38)], source_of(vectors), on_step=lambda step, reports: steps.append(step))
    assert steps == [1, 2, 3]
