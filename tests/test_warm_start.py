"""Training that goes on from an SAE: nothing is lost in the change of units, and thresholds can be fine-tuned."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from toy_runs import N_FEATURES, OUT, SITE, config, source_of
from toy_runs import small_samples as small_samples
from toy_vectors import D_MODEL, mixtures

from saekit.errors import SaekitError
from saekit.losses import fvu
from saekit.normalisation import EqualNorms
from saekit.sae import SAE
from saekit.sae_config import SAEConfig
from saekit.selection import AbsTopK, FeatureChoice, GroupMax, MutualChoice, SelectionRule, Threshold, TopK
from saekit.training.loop import train
from saekit.training.objectives import Gated, JumpReLU
from saekit.training.step import TrainState, measure

pytestmark = pytest.mark.usefixtures("small_samples")


@pytest.fixture(scope="module")
def vectors() -> Tensor:
    return mixtures(8192, seed=0) * 7 + 3


def random_sae(rule: SelectionRule, cfg: SAEConfig, *, skip: bool = False) -> SAE:
    """Weights without any order: decoder rows of many lengths, biases everywhere."""
    sae, generator = SAE(D_MODEL, N_FEATURES, rule, skip=skip, cfg=cfg), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return sae


def cfg_of(**changes) -> SAEConfig:
    return SAEConfig(**{"d_in": D_MODEL, "d_sae": N_FEATURES, "hook_name": str(SITE), **changes})


@pytest.fixture(scope="module")
def trained(vectors) -> SAE:
    (sae,) = train([config(150)], source_of(vectors))
    return sae


@pytest.mark.parametrize("equal_norms", [False, True])
def test_a_start_means_the_same_in_the_units_of_training(equal_norms, vectors):
    start = random_sae(Threshold(torch.linspace(0.5, 2.0, N_FEATURES)), cfg_of(
        normalisation=EqualNorms() if equal_norms else cfg_of().normalisation
    ))  # fmt: skip
    objective = JumpReLU(3)
    settings = config(rule=Threshold(0.0), objective=objective, equal_norms=equal_norms)
    finished = TrainState.start(settings, vectors, start=start).finished()
    with torch.no_grad():
        torch.testing.assert_close(finished(vectors), start(vectors), rtol=1e-3, atol=1e-3)
        # codes are counted in lengths of what they add, which rows of unit norm make their own size
        norms = start.decoder.norm(dim=1)
        got, expected = finished.encode(vectors).to_dense(), start.encode(vectors).to_dense() * norms
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    assert torch.allclose(finished.decoder.norm(dim=1), torch.ones(N_FEATURES), atol=1e-5)


def test_a_transcoder_goes_on_with_its_skip_connection(vectors):
    cfg = cfg_of(d_out=10, hook_name_out=str(OUT), apply_b_dec_to_input=False)
    start = random_sae(Threshold(1.0), cfg, skip=True)
    settings = config(rule=Threshold(0.0), objective=JumpReLU(3), site_out=OUT, skip=True)
    targets = vectors @ torch.randn(D_MODEL, 10, generator=torch.Generator().manual_seed(5)) * 4 - 9
    finished = TrainState.start(settings, vectors, targets, start=start).finished()
    with torch.no_grad():
        torch.testing.assert_close(finished(vectors), start(vectors), rtol=1e-3, atol=1e-2)


def test_going_on_begins_where_the_first_run_ended(trained, vectors):
    reports = []
    train(
        [config(20, learning_rate=1e-3)],
        source_of(vectors),
        start=[trained],
        on_step=lambda step, found: reports.append(float(found[0].fvu)),
    )
    with torch.no_grad():
        before = float(fvu(vectors, trained(vectors)))
    assert reports[0] == pytest.approx(before, rel=0.1)
    assert max(reports) < 1.2 * before


@pytest.mark.parametrize("penalty", ["step", "tanh"])
def test_thresholds_that_are_right_stay_when_they_begin_to_learn(penalty, trained, vectors):
    from saekit.training.calibrate import calibrate

    start = trained.with_rule(calibrate(trained.with_rule(MutualChoice(3)), vectors))
    settings = config(rule=Threshold(0.0), objective=JumpReLU(3, penalty=penalty))
    state = TrainState.start(settings, vectors, start=start)
    measure(state, vectors).loss.backward()
    pull = state.extra["log_theta"].grad
    assert pull is not None
    assert float(pull.abs().sum()) > 0
    assert abs(float(pull.sum())) < 1e-3 * float(pull.abs().sum())


@pytest.mark.parametrize("cuts", ["calibrated", "topk"])
def test_gates_begin_where_the_cuts_of_the_start_are(cuts, trained, vectors):
    from saekit.training.calibrate import calibrate

    shared = trained.with_rule(calibrate(trained.with_rule(MutualChoice(3)), vectors))
    start = trained if cuts == "topk" else shared
    state = TrainState.start(config(rule=Threshold(0.0), objective=Gated(3)), vectors, start=start)
    with torch.no_grad():
        expected, found = shared(vectors), state.finished()(vectors)
        assert float(state.finished().encode(vectors).l0().double().mean()) == pytest.approx(3, rel=0.01)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-2)


def test_fine_tuned_thresholds_keep_their_sparsity_and_serve_better(trained, vectors):
    from saekit.training.calibrate import calibrate

    start = trained.with_rule(calibrate(trained.with_rule(MutualChoice(3)), vectors))
    settings = config(240, rule=Threshold(0.0), objective=JumpReLU(3), learning_rate=2e-3)
    (tuned,) = train([settings], source_of(vectors), start=[start])
    unseen = mixtures(4096, seed=1) * 7 + 3
    with torch.no_grad():
        assert float(tuned.encode(unseen).l0().double().mean()) == pytest.approx(3, rel=0.05)
        assert float(fvu(unseen, tuned(unseen))) < float(fvu(unseen, start(unseen)))
    theta = torch.as_tensor(tuned.rule.theta)  # pyright: ignore[reportAttributeAccessIssue]
    assert theta.std() > 0  # one cut has become one for each feature


def test_a_feature_that_is_granted_nothing_has_a_threshold_that_can_be_trained(trained, vectors):
    from saekit.training.calibrate import calibrate

    quiet = vectors / 100  # which training makes larger, and the cuts with it
    steep = trained.rescaled(0.01).with_rule(FeatureChoice(3, exponent=6.0, floor=0))
    start = steep.with_rule(calibrate(steep, quiet))
    assert torch.as_tensor(start.rule.theta).max() > 1e30  # pyright: ignore[reportAttributeAccessIssue]
    (tuned,) = train([config(4, rule=Threshold(0.0), objective=JumpReLU(3))], source_of(quiet), start=[start])
    assert all(torch.isfinite(tensor).all() for tensor in tuned.state_dict().values())
    assert torch.isfinite(torch.as_tensor(tuned.rule.theta)).all()  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("rule", [TopK(3, relu=False), AbsTopK(3), Threshold(0.5, relu=False)], ids=repr)
@pytest.mark.parametrize(
    "changes", [{}, {"rule": GroupMax(3)}, {"rule": Threshold(0.0), "objective": JumpReLU(3)}], ids=str
)
def test_an_sae_that_keeps_negative_activations_goes_on_only_under_a_rule_that_does(changes, rule, trained, vectors):
    start = trained.with_rule(rule)
    with pytest.raises(SaekitError, match="this SAE keeps negative activations, and the run would drop them"):
        train([config(4, **changes)], source_of(vectors), start=[start])
    train([config(4, rule=TopK(3, relu=False))], source_of(vectors), start=[start])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"n_features": N_FEATURES * 2}, f"d_sae is {N_FEATURES}, the run asks for {N_FEATURES * 2}"),
        ({"equal_norms": True}, "normalisation is"),
    ],
)
def test_an_sae_of_another_shape_is_refused(changes, said, trained, vectors):
    with pytest.raises(SaekitError, match="cannot start from this SAE") as refused:
        train([config(**changes)], source_of(vectors), start=[trained])
    assert said in str(refused.value)


@pytest.mark.gpu
def test_training_happens_on_the_device_that_is_asked_for(trained, vectors):
    (new,) = train([config(3)], source_of(vectors), device="cuda")
    (going_on,) = train([config(3)], source_of(vectors), start=[trained], device="cuda")
    assert new.b_dec.is_cuda
    assert going_on.b_dec.is_cuda


def test_one_start_for_each_config(trained, vectors):
    configs = [config(), replace(config(), learning_rate=1e-3)]
    with pytest.raises(SaekitError, match="1 SAEs to start from for 2 to train"):
        train(configs, source_of(vectors), start=[trained])
