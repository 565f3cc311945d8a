"""The family: every objective's gradients, what its finished SAE does, and that the sparsity asked for is reached."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from saekit.errors import SaekitError
from saekit.losses import summed_mse
from saekit.normalisation import EqualNorms, Plain
from saekit.sae import SAE
from saekit.sae_config import SAEConfig
from saekit.selection import FeatureChoice, MutualChoice, Threshold, TopK
from saekit.training.objectives import Gated, JumpReLU, Matryoshka, Objective, ReLUL1
from saekit.training.objectives.jumprelu import Jump, Step
from saekit.training.objectives.objective import held_to

D_MODEL, N_FEATURES, N_TOKENS = 5, 12, 9
OPEN = Threshold(0.0)
FAMILY: dict[str, tuple[Objective, object]] = {
    "L1": (ReLUL1(2), OPEN),
    "gated": (Gated(2), OPEN),
    "JumpReLU step": (JumpReLU(2, bandwidth=0.8), OPEN),
    "JumpReLU tanh": (JumpReLU(2, penalty="tanh", bandwidth=0.8), OPEN),
    "Matryoshka TopK": (Matryoshka((0.25, 0.5, 1.0)), TopK(3)),
    "Matryoshka MC": (Matryoshka(), MutualChoice(3)),
}
every_objective = pytest.mark.parametrize(("objective", "rule"), FAMILY.values(), ids=FAMILY.keys())
both_norms = pytest.mark.parametrize("normalisation", [Plain(), EqualNorms()], ids=repr)


def random_sae(rule, normalisation=Plain(), *, seed: int = 0, skip: bool = False, d_out: int | None = None) -> SAE:
    cfg = SAEConfig(d_in=D_MODEL, d_sae=N_FEATURES, normalisation=normalisation)
    if d_out:
        cfg = replace(cfg, d_out=d_out, hook_name_out="out", apply_b_dec_to_input=False)
    sae = SAE(D_MODEL, N_FEATURES, rule, cfg=cfg, skip=skip).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in sae.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator, dtype=torch.float64))
    return sae


def inputs(seed: int = 1, width: int = D_MODEL) -> Tensor:
    return torch.randn(N_TOKENS, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_extra(objective: Objective, sae: SAE, seed: int = 2) -> dict[str, Tensor]:
    """What the objective trains, moved away from where it starts."""
    generator = torch.Generator().manual_seed(seed)
    start = objective.extra(sae, inputs())
    noise = {name: torch.randn(value.shape, generator=generator, dtype=torch.float64) for name, value in start.items()}
    # a fifth of the logarithm of a threshold is what is trained, so a little is much
    far = {name: 0.06 if name == "log_theta" else 0.3 for name in start}
    return {name: (value + far[name] * noise[name]).detach().requires_grad_() for name, value in start.items()}


def gradients(loss: Tensor, sae: SAE, extra: dict[str, Tensor]) -> dict[str, Tensor]:
    named = dict(sae.named_parameters()) | extra
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(named, found, strict=True))


def dense_loss(objective: Objective, sae: SAE, extra: dict[str, Tensor], x: Tensor) -> Tensor:
    """Each loss on dense matrices, with surrogates written so that autograd gives the gradients that are meant."""
    u, scale = sae.prepare(x)
    scale = torch.ones(len(x), 1, dtype=x.dtype) if scale is None else scale
    linear = u @ sae.encoder.T
    h = linear + sae.b_enc

    def decoded(codes: Tensor) -> Tensor:
        return codes @ sae.decoder + sae.b_dec

    def penalised(loss: Tensor, codes: Tensor, penalty: Tensor) -> Tensor:
        l0 = float((codes != 0).sum() / len(x))
        weight = (5 * extra["log_weight"].detach()).exp()
        # its value is not the loss's, its gradients are
        return loss + weight * penalty - torch.tensor(l0 / 2).log() * extra["log_weight"]

    match objective:
        case ReLUL1():
            codes = h.relu() * scale
            return penalised(summed_mse(x, decoded(codes)), codes, codes.sum() / len(x))
        case Gated():
            gate = linear + extra["b_gate"]
            codes = (linear * extra["r_mag"].exp() + sae.b_enc).relu() * (gate > 0) * scale
            frozen = gate.relu() * scale @ sae.decoder.detach() + sae.b_dec.detach()
            loss = summed_mse(x, decoded(codes)) + summed_mse(x, frozen)
            return penalised(loss, codes, (gate.relu() * scale).sum() / len(x))
        case JumpReLU(bandwidth=width):
            theta = (5 * extra["log_theta"]).exp()
            window = ((h - theta).abs() < width / 2).detach() / width
            # a constant plus something whose value is zero and whose slope is the estimate
            slope = theta - theta.detach()
            values = h * (h > theta) - theta.detach() * window * slope
            step = (h > theta).double() - window * slope
            active = step if objective.penalty == "step" else (values / theta).tanh()
            return penalised(summed_mse(x, decoded(values * scale)), h * (h > theta), active.sum() / len(x))
        case Matryoshka(prefixes=prefixes):
            codes = sae.rule(h).to_dense() * scale
            ends = [round(share * N_FEATURES) for share in prefixes]
            return torch.stack([summed_mse(x, decoded(codes * (torch.arange(N_FEATURES) < e))) for e in ends]).mean()
    raise AssertionError(objective)


@both_norms
@every_objective
def test_gradients_are_those_of_the_dense_equations(objective, rule, normalisation):
    if isinstance(objective, Matryoshka) and len(objective.prefixes) == 5:
        objective = Matryoshka((0.25, 1.0))
    sae, x = random_sae(rule, normalisation), inputs()
    extra = random_extra(objective, sae)
    measured = objective.measure(sae, extra, x, x)
    assert (measured.codes.values != 0).any()
    ours, theirs = (
        gradients(measured.loss, sae, extra),
        gradients(dense_loss(objective, sae, extra, x).sum(), sae, extra),
    )
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], msg=lambda text, name=name: f"{name}: {text}")
        assert ours[name].any() or name == "b_gate", name


@both_norms
@every_objective
def test_the_finished_sae_does_by_itself_what_training_measured(objective, rule, normalisation):
    sae, x = random_sae(rule, normalisation), inputs()
    if isinstance(objective, Matryoshka):
        objective = Matryoshka((0.5, 1.0))
    extra = random_extra(objective, sae)
    before = {name: weight.clone() for name, weight in sae.state_dict().items()}
    with torch.no_grad():
        measured, finished = objective.measure(sae, extra, x, x), objective.finished(sae, extra)
        torch.testing.assert_close(finished.encode(x).to_dense(), measured.codes.to_dense())
        torch.testing.assert_close(finished(x), measured.y_hat)
    assert measured.codes.values.any()
    assert all(torch.equal(sae.state_dict()[name], weight) for name, weight in before.items())


@pytest.mark.parametrize("objective", [ReLUL1(3), Gated(3), JumpReLU(3)], ids=repr)
def test_objectives_of_one_site_serve_a_transcoder_with_a_skip_connection_too(objective):
    sae, x, y = random_sae(OPEN, d_out=7, skip=True), inputs(), inputs(3, width=7)
    extra = random_extra(objective, sae)
    measured = objective.measure(sae, extra, x, y)
    torch.testing.assert_close(measured.y_hat, measured.codes.to_dense() @ sae.decoder + sae.b_dec + x @ sae.skip.T)
    assert gradients(measured.loss, sae, extra)["skip"].any()


def test_gates_are_not_asked_to_explain_what_a_skip_connection_does():
    sae, x = random_sae(OPEN, d_out=D_MODEL, skip=True), inputs()
    with torch.no_grad():
        sae.skip.copy_(torch.eye(D_MODEL))
        sae.b_dec.zero_()
    extra = random_extra(Gated(2), sae) | {"b_gate": torch.full((N_FEATURES,), -1e3, dtype=torch.float64)}
    assert Gated(2).measure(sae, extra, x, x).loss.item() == pytest.approx(0)


def test_the_weight_of_a_penalty_rises_while_too_many_are_active_and_falls_while_too_few_are():
    codes = TopK(4)(inputs().abs())
    for k, rises in ((2, True), (4, None), (8, False)):
        log_weight = torch.zeros((), dtype=torch.float64, requires_grad=True)
        penalty = torch.tensor(5.0, dtype=torch.float64, requires_grad=True)
        loss = held_to(k, codes, log_weight, penalty)
        loss.backward()
        assert loss.item() == pytest.approx(5.0) and penalty.grad.item() == pytest.approx(1.0)
        assert log_weight.grad.item() == pytest.approx(-torch.tensor(4 / k).log().item())
        assert rises is None or (log_weight.grad.item() < 0) is rises


def test_the_jump_and_the_step_have_the_gradients_they_document():
    h = torch.tensor([0.2, 0.9, 1.05, 1.3, 2.0], dtype=torch.float64, requires_grad=True)
    theta = torch.ones(5, dtype=torch.float64, requires_grad=True)
    Jump.apply(h, theta, 0.5).sum().backward()
    assert h.grad.tolist() == [0, 0, 1, 1, 1]
    assert theta.grad.tolist() == [0, -2, -2, 0, 0]
    h.grad = theta.grad = None
    Step.apply(h, theta, 0.5).sum().backward()
    assert h.grad is None or not h.grad.any()
    assert theta.grad.tolist() == [0, -2, -2, 0, 0]


@pytest.mark.parametrize("prefixes", [(), (0.5,), (0.5, 0.25, 1.0), (0.0, 1.0), (0.5, 1.5)])
def test_prefixes_that_do_not_rise_to_one_are_refused(prefixes):
    with pytest.raises(SaekitError, match=r"prefixes=.*give shares of the dictionary that rise"):
        Matryoshka(prefixes)


def test_an_empty_prefix_is_refused():
    with pytest.raises(SaekitError, match=r"the first prefix, 0\.01 of 12 features, is empty"):
        Matryoshka((0.01, 1.0)).measure(random_sae(TopK(3)), {}, inputs(), inputs())


@pytest.mark.parametrize("rule", [TopK(3), MutualChoice(3), FeatureChoice(4)], ids=repr)
def test_a_single_prefix_is_plain_reconstruction(rule):
    sae, x = random_sae(rule), inputs()
    measured = Matryoshka((1.0,)).measure(sae, {}, x, x)
    torch.testing.assert_close(measured.loss, summed_mse(x, sae(x)))
    torch.testing.assert_close(measured.y_hat, sae(x))
