"""The losses against dense autograd, and what their gradients must and must not reach."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from saekit import revival
from saekit.codes import SparseCodes
from saekit.density import RunningDensity, ZipfFit, expected_density, zipf_fit
from saekit.errors import SaekitError
from saekit.kernels import backend, select
from saekit.losses import (
    AuxK,
    AuxZipf,
    aux_k_loss,
    aux_zipf_loss,
    curve_density,
    fvu,
    normalised_mse,
    only_the_dead,
    revivable,
    summed_mse,
)
from saekit.normalisation import EqualNorms, Plain
from saekit.sae import SAE
from saekit.sae_config import SAEConfig
from saekit.selection import FeatureChoice, MutualChoice, SelectionRule, Threshold, TopK

D_MODEL, N_FEATURES, N_TOKENS = 5, 12, 8
MEMBERS = torch.tensor([1, 4, 5, 9])
RULES = [TopK(3), MutualChoice(3), FeatureChoice(3, exponent=0.8, floor=1), Threshold(0.5), Threshold(1e9)]


def random_sae(rule: SelectionRule = RULES[0], *, equal_norms: bool = False) -> SAE:
    generator = torch.Generator().manual_seed(0)
    cfg = SAEConfig(d_in=D_MODEL, d_sae=N_FEATURES, normalisation=EqualNorms() if equal_norms else Plain())
    sae = SAE(D_MODEL, N_FEATURES, rule, cfg=cfg).double()
    with torch.no_grad():
        for weight in sae.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator, dtype=torch.float64))
    return sae


def inputs(n_tokens: int = N_TOKENS) -> Tensor:
    return torch.randn(n_tokens, D_MODEL, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def member_mask(members: Tensor = MEMBERS) -> Tensor:
    return torch.zeros(N_FEATURES, dtype=torch.bool).index_fill_(0, members, True)


def dense_aux(sae: SAE, x: Tensor, codes: SparseCodes, members: Tensor, k_aux: int) -> tuple[Tensor, Tensor]:
    """The auxiliary loss on dense matrices, and which (token, feature) pairs contribute to it."""
    kept = codes.to_dense().detach()
    residual = (x - kept @ sae.decoder - sae.b_dec).detach()
    u = (x - sae.b_dec).detach()
    unit = (
        u.square().mean(1, keepdim=True).sqrt()
        if isinstance(sae.cfg.normalisation, EqualNorms)
        else torch.ones_like(u[:, :1])
    )
    pre_acts = u / unit @ sae.encoder.T + sae.b_enc
    place = pre_acts.detach().masked_fill(~members, -torch.inf).argsort(dim=1, descending=True).argsort(dim=1)
    chosen = (place < min(k_aux, int(members.sum()))) & (kept == 0)
    values = (pre_acts * chosen).relu() * unit
    error = (residual - values @ sae.decoder).square().sum()
    spread = (residual - residual.mean(0)).square().sum()
    return min(1.0, int(members.sum()) / k_aux) * error / spread, values > 0


def gradients(loss: Tensor, sae: SAE) -> dict[str, Tensor | None]:
    names, weights = zip(*sae.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, weights, allow_unused=True), strict=True))


def density_with(tokens_since_fired: Tensor, share: Tensor | None = None) -> RunningDensity:
    """Densities as they stand after long training."""
    share = torch.where(tokens_since_fired > 0, 0.0, 0.25).double() if share is None else share
    return RunningDensity(average=share, tokens_since_fired=tokens_since_fired, weight=1.0, horizon=1e6)


DEAD = density_with(member_mask() * 1000)
both_losses = pytest.mark.parametrize(
    ("loss", "options"), [(aux_k_loss, AuxK), (aux_zipf_loss, AuxZipf)], ids=["aux_k", "aux_zipf"]
)


def explained(sae: SAE, x: Tensor, codes: SparseCodes, *, k_aux: int, members: Tensor | None = None) -> Tensor:
    """The auxiliary loss where exactly the members are dead."""
    density = density_with((member_mask() if members is None else members) * 1000)
    return aux_k_loss(sae, x, codes, density=density, options=AuxK(k_aux=k_aux, dead_after=999))


def test_fvu_is_zero_for_a_perfect_and_one_for_the_mean_reconstruction():
    x = inputs() + 3
    assert float(fvu(x, x)) == 0
    assert float(fvu(x, x.mean(0).expand_as(x))) == pytest.approx(1)
    halfway = (x + x.mean(0)) / 2
    assert float(fvu(x, halfway)) == pytest.approx(0.25)
    assert float(fvu(x * 7, halfway * 7)) == pytest.approx(0.25)


def test_normalised_and_summed_mse():
    x, x_hat = torch.tensor([[3.0, 4.0], [10.0, 0.0]]), torch.tensor([[3.0, 3.0], [10.0, 2.0]])
    assert float(normalised_mse(x, x_hat)) == pytest.approx((1 / 25 + 4 / 100) / 2)
    assert float(summed_mse(x, x_hat)) == pytest.approx((1 + 4) / 2)


@pytest.mark.parametrize("loss", [fvu, normalised_mse, summed_mse])
def test_gradients_of_reconstruction_losses(loss):
    x = inputs().requires_grad_()
    assert torch.autograd.gradcheck(loss, (x, (inputs() * 0.5 + 0.1).detach().requires_grad_()))


@pytest.mark.parametrize("dense_from", [0.0, 2.0], ids=["dense blocks", "entries"])
@pytest.mark.parametrize("equal_norms", [False, True], ids=["own norms", "equal norms"])
@pytest.mark.parametrize("k_aux", [1, 3, 4, 10])
@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_aux_k_loss_and_its_gradients_are_those_of_dense_autograd(rule, k_aux, equal_norms, dense_from, monkeypatch):
    monkeypatch.setattr(revival, "_DENSE_FROM", dense_from)
    monkeypatch.setattr(revival, "_BLOCK_ELEMENTS", 12)  # three tokens at a time, then two
    sae, x = random_sae(rule, equal_norms=equal_norms), inputs()
    codes = sae.encode(x)
    got = explained(sae, x, codes, k_aux=k_aux)
    want, contributes = dense_aux(sae, x, codes, member_mask(), k_aux)
    torch.testing.assert_close(got, want)
    # of which it is a special case
    zipf = AuxZipf(k_aux=k_aux, dead_after=999, below=0.0, most_members=1.0)
    torch.testing.assert_close(aux_zipf_loss(sae, x, codes, density=DEAD, options=zipf), want)
    ours, theirs = gradients(got, sae), gradients(want, sae)
    for name in ("encoder", "decoder", "b_enc"):
        torch.testing.assert_close(ours[name], theirs[name])
        assert ours[name].any() == contributes.any()


@pytest.mark.parametrize("equal_norms", [False, True], ids=["own norms", "equal norms"])
@both_losses
def test_an_auxiliary_loss_reaches_encoder_and_decoder_of_what_it_revives_and_nothing_else(loss, options, equal_norms):
    sae, x = random_sae(equal_norms=equal_norms), inputs().requires_grad_()
    codes = sae.encode(x)
    value = loss(sae, x, codes, density=DEAD, options=options(k_aux=2, dead_after=999))
    _, contributes = dense_aux(sae, x, codes, member_mask(), 2)
    revived = contributes.any(0)
    assert revived.sum() >= 2 and not revived[~member_mask()].any()
    reached = gradients(value, sae)
    for name in ("encoder", "decoder"):
        assert torch.equal(reached[name].ne(0).all(1), revived), name
        assert torch.equal(reached[name].ne(0).any(1), revived), name
    assert torch.equal(reached["b_enc"].ne(0), revived)
    assert reached["b_dec"] is None
    # the residual and the input are constants: nothing flows back into what made them
    assert torch.autograd.grad(value, [x, codes.values], allow_unused=True) == (None, None)


def test_a_step_along_the_gradient_explains_more_of_the_residual():
    sae, x = random_sae(), inputs()
    codes = sae.encode(x)
    before = explained(sae, x, codes, k_aux=4)
    before.backward()
    with torch.no_grad():
        for name in ("encoder", "decoder"):
            weight = getattr(sae, name)
            weight[MEMBERS] -= 0.05 * weight.grad[MEMBERS]
    assert explained(sae, x, codes, k_aux=4) < before


def test_the_loss_is_one_for_a_useless_explanation_and_shrinks_with_the_share_of_k_aux_there_is():
    sae, x = random_sae(), inputs()
    codes = sae.encode(x)
    with torch.no_grad():
        # a residual of mean zero, and members that are silent
        sae.b_dec += (x - sae(x)).mean(0)
        sae.b_enc[MEMBERS] = -1e3
        codes = sae.encode(x)
        sae.b_dec += (x - sae.decode(codes)).mean(0)
        x = x + (sae.decode(codes) - x).mean(0)
    for k_aux, share in ((1, 1.0), (4, 1.0), (8, 0.5), (40, 0.1)):
        got = explained(sae, x, codes, k_aux=k_aux)
        assert got.item() == pytest.approx(share)


@both_losses
def test_with_nobody_to_revive_the_loss_is_zero_and_sends_no_gradient(loss, options):
    sae, x = random_sae(), inputs()
    alive = density_with(torch.zeros(N_FEATURES, dtype=torch.int64))
    value = loss(sae, x, sae.encode(x), density=alive, options=options(k_aux=2, dead_after=999))
    assert value.shape == () and value.item() == 0 and not value.requires_grad


def test_a_member_that_the_codes_use_on_a_token_is_not_used_there_again():
    sae, x = random_sae(MutualChoice(8)), inputs()
    codes = sae.encode(x)
    used = codes.to_dense() > 0
    assert used[:, MEMBERS].any()
    members = used.any(0)
    value = explained(sae, x, codes, members=members, k_aux=N_FEATURES)
    want, contributes = dense_aux(sae, x, codes, members, N_FEATURES)
    assert not (contributes & used).any()
    torch.testing.assert_close(value, want)


@pytest.mark.parametrize("case", ["one token", "nothing left over"])
def test_where_there_is_nothing_to_explain_loss_and_gradients_are_zero_not_nan(case):
    sae = random_sae()
    x = inputs(1) if case == "one token" else inputs()
    codes = sae.encode(x)
    if case == "nothing left over":
        x = sae.decode(codes).detach()
    value = explained(sae, x, codes, k_aux=4)
    assert value.item() == 0
    for gradient in gradients(value, sae).values():
        assert gradient is None or not gradient.any()  # nan counts as any


@both_losses
def test_measuring_an_auxiliary_loss_changes_nothing(loss, options):
    sae, x = random_sae(), inputs()
    density = density_with(member_mask() * 1000)
    before = [t.clone() for t in (*sae.state_dict().values(), density.average, density.tokens_since_fired)]
    loss(sae, x, sae.encode(x), density=density, options=options(k_aux=2, dead_after=999)).backward()
    after = [*sae.state_dict().values(), density.average, density.tokens_since_fired]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("dense_from", [0.0, 2.0], ids=["dense blocks", "entries"])
def test_the_auxiliary_loss_works_in_blocks(dense_from, monkeypatch):
    monkeypatch.setattr(revival, "_DENSE_FROM", dense_from)
    sae, x = random_sae(TopK(3), equal_norms=True), inputs(50)
    codes = sae.encode(x)
    whole = explained(sae, x, codes, k_aux=2)
    monkeypatch.setattr(select, "BLOCK_ELEMENTS", 8)
    monkeypatch.setattr(revival, "_BLOCK_ELEMENTS", 8)
    torch.testing.assert_close(explained(sae, x, codes, k_aux=2), whole)


@pytest.mark.parametrize("dense_from", [0.0, 2.0], ids=["dense blocks", "entries"])
def test_of_members_that_are_equally_strong_the_first_are_taken(dense_from, monkeypatch):
    monkeypatch.setattr(revival, "_DENSE_FROM", dense_from)
    sae, x = random_sae(), inputs()
    with torch.no_grad():
        sae.encoder[MEMBERS], sae.b_enc[MEMBERS] = 0.0, 1.0
    codes = sae.encode(x).with_values(torch.zeros(3 * len(x), dtype=torch.float64))
    found = gradients(explained(sae, x, codes, k_aux=2), sae)["decoder"]
    assert found is not None and found.abs().sum(1).nonzero()[:, 0].tolist() == MEMBERS[:2].tolist()


def test_gradients_of_gathered_rows_are_handed_over_to_the_weights():
    sae, x = random_sae(), inputs()
    codes = sae.encode(x)
    options = AuxK(k_aux=2, dead_after=999)
    want = gradients(aux_k_loss(sae, x, codes, density=DEAD, options=options), sae)
    members = revival.Members.of(sae, MEMBERS, apart=True)
    aux_zipf_loss(sae, x, codes, density=DEAD, options=only_the_dead(options), members=members).backward()
    assert all(weight.grad is None for weight in sae.parameters())
    sae.b_enc.grad = torch.ones(N_FEATURES, dtype=torch.float64)
    members.hand_over(sae)
    torch.testing.assert_close(sae.encoder.grad, want["encoder"])
    torch.testing.assert_close(sae.decoder.grad, want["decoder"])
    torch.testing.assert_close(sae.b_enc.grad, want["b_enc"] + 1)


def zipf_densities(n_features: int = 400) -> Tensor:
    return ZipfFit(exponent=0.9, offset=2.0, scale=0.4).expected(n_features)


def revived(share: Tensor, *, since: Tensor | None = None, weight: float = 1.0, **options) -> list[int]:
    since = torch.zeros(len(share), dtype=torch.int64) if since is None else since
    density = RunningDensity(average=share * weight, tokens_since_fired=since, weight=weight, horizon=1e6)
    chosen = AuxZipf(dead_after=999, **options)
    members = revivable(density, curve_density(density.density, chosen.curve), chosen)
    return members.nonzero()[:, 0].tolist()


def test_dead_and_under_used_features_are_revived():
    share = zipf_densities()
    share[350:380] *= 0.8
    share[380:] *= 0.2
    since = torch.zeros(400, dtype=torch.int64)
    since[[7, 360]] = 1000
    assert revived(share, since=since) == [7, 360, *range(380, 400)]
    assert revived(share, since=since, below=0.9) == [7, *range(350, 400)]
    assert revived(share, since=since, below=0.0) == [7, 360]


def test_where_the_line_expects_too_few_firings_to_tell_only_the_dead_test_counts():
    share = zipf_densities()
    share[380:] *= 0.2
    expected = float(zipf_densities()[389]) * 1e6
    assert revived(share) == list(range(380, 400))
    assert 385 <= revived(share, least_count=expected)[-1] <= 394


def test_at_most_half_is_revived_the_furthest_under_the_line_first():
    share = zipf_densities()
    share[150:] *= torch.linspace(0.3, 0.01, 250).double()
    since = torch.zeros(400, dtype=torch.int64)
    since[:3] = 1000
    found = revived(share, since=since, below=0.9)
    assert len(found) == 200
    assert found[:3] == [0, 1, 2]  # the dead before all others
    under = share / expected_density(share, zipf_fit(share))
    left_out = sorted(set(range(400)) - set(found))
    assert (under < 0.9).sum() > 200
    assert under[found[3:]].max() <= under[left_out].min()


@pytest.mark.parametrize("k_aux", [2, 6])
@pytest.mark.parametrize("dead", [MEMBERS, torch.arange(N_FEATURES)], ids=["some dead", "all dead"])
def test_aux_k_loss_is_aux_zipf_loss_in_which_nobody_is_under_used(k_aux, dead):
    sae, x = random_sae(), inputs()
    codes = sae.encode(x)
    share = zipf_densities(N_FEATURES)
    share[7:] *= 0.01
    density = density_with(member_mask(dead) * 1000, share)
    aux_k = aux_k_loss(sae, x, codes, density=density, options=AuxK(k_aux=k_aux, dead_after=999))

    def zipf(**options) -> Tensor:
        chosen = AuxZipf(k_aux=k_aux, dead_after=999, **options)
        return aux_zipf_loss(sae, x, codes, density=density, options=chosen)

    special = zipf(below=0.0, most_members=1.0)
    assert torch.equal(special, aux_k)
    ours, theirs = gradients(special, sae), gradients(aux_k, sae)
    assert all(torch.equal(ours[name], theirs[name]) for name in ("encoder", "decoder", "b_enc"))
    if len(dead) < N_FEATURES:
        assert not torch.equal(zipf(below=0.5, most_members=1.0), aux_k)
    else:
        assert not torch.equal(zipf(below=0.0), aux_k)  # half of the dictionary at most


@pytest.mark.parametrize("kind", [AuxK, AuxZipf])
@pytest.mark.parametrize("fast", [False, True])
def test_in_bfloat16_the_loss_and_its_gradient_are_nearly_the_same(fast, kind, monkeypatch):
    monkeypatch.setattr(backend, "has_fast_bf16", lambda: fast)
    sae, x = random_sae(), inputs()
    codes, density = sae.encode(x), density_with(member_mask(MEMBERS) * 1000, zipf_densities(N_FEATURES))

    def made(bf16: bool) -> tuple[Tensor, dict[str, Tensor]]:
        loss = aux_k_loss if kind is AuxK else aux_zipf_loss
        value = loss(sae, x, codes, density=density, options=kind(k_aux=2, dead_after=999, bf16=bf16))
        return value, gradients(value, sae)

    (exact, slopes), (rounded, rough) = made(False), made(True)
    assert torch.equal(exact, rounded) == (not fast)
    torch.testing.assert_close(rounded, exact, rtol=1e-2, atol=0)
    for name in ("encoder", "decoder", "b_enc"):
        assert (rough[name] - slopes[name]).norm() < 2e-2 * slopes[name].norm()


@pytest.mark.parametrize("claim", ["token", "feature"])
@pytest.mark.parametrize("given", [False, True], ids=["own residual", "given residual"])
def test_a_sampled_auxiliary_loss_is_that_of_the_first_tokens(claim, given):
    sae, x = random_sae(), inputs()
    density = density_with(member_mask(MEMBERS) * 1000, zipf_densities(N_FEATURES))

    def made(n_tokens: int, sample: float) -> tuple[Tensor, dict[str, Tensor]]:
        part = x[:n_tokens]
        codes = sae.encode(part)
        residual = part.flip(1) if given else None
        options = AuxZipf(k_aux=2, dead_after=999, claim=claim, sample=sample)
        value = aux_zipf_loss(sae, part, codes, density=density, options=options, residual=residual)
        return value, gradients(value, sae)

    (sampled, slopes), (of_part, theirs) = made(len(x), 0.45), made(math.ceil(0.45 * len(x)), 1.0)
    assert torch.equal(sampled, of_part)
    assert all(torch.equal(slopes[name], theirs[name]) for name in ("encoder", "decoder", "b_enc"))
    assert not torch.equal(sampled, made(len(x), 1.0)[0])


@pytest.mark.parametrize("kind", [AuxK, AuxZipf])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"weight": -1.0}, r"got weight=-1\.0; give 0 or more"),
        ({"weight": float("nan")}, "got weight=nan; give 0 or more"),
        ({"weight": float("inf")}, "got weight=inf; give 0 or more"),
        ({"k_aux": 0}, "got k_aux=0; give at least 1, or None"),
        ({"dead_after": -5}, "got dead_after=-5; give at least 1, or None"),
    ],
)
def test_weights_and_counts_that_mean_nothing_are_refused(kind, given, message):
    with pytest.raises(SaekitError, match=f"^{kind.__name__} {message}"):
        kind(**given)


def test_a_loss_cannot_begin_before_the_run():
    with pytest.raises(SaekitError, match="AuxZipf got warmup=-1; give a number of tokens, 0 to begin at once"):
        AuxZipf(warmup=-1)


@pytest.mark.parametrize("sample", [0.0, -0.5, 1.5, float("nan")])
@pytest.mark.parametrize("kind", [AuxK, AuxZipf])
def test_a_sample_of_nothing_or_of_more_than_all_is_refused(kind, sample):
    with pytest.raises(SaekitError, match="is no share of a batch's tokens"):
        kind(sample=sample)


def test_early_on_few_firings_have_been_seen_whatever_the_horizon():
    share = zipf_densities()
    share[380:] *= 0.2
    assert revived(share) == list(range(380, 400))
    assert revived(share, weight=1e-5) == []


def test_the_budgets_of_feature_choice_can_be_the_curve():
    rule = FeatureChoice(8, exponent=0.7, offset=1.0)
    share = rule.budgets(1 << 20, 400).double() / (1 << 20)
    order = torch.randperm(400, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(curve_density(share[order], rule), share[order], rtol=1e-3, atol=1e-6)
    behind = share.clone()
    behind[390:] *= 0.1
    assert revived(behind, curve=rule) == list(range(390, 400))


@pytest.mark.parametrize("rule", [FeatureChoice(8, exponent=3.0), FeatureChoice(8, exponent=1.0, cap=0.03)], ids=str)
def test_a_curve_needs_no_batch_that_would_grant_it(rule):
    share = zipf_densities()
    expected = curve_density(share, rule)
    assert float(expected.sum()) == pytest.approx(8)
    assert float(expected.max()) <= rule.cap and bool((expected > 0).all())


@pytest.mark.parametrize("rule", [FeatureChoice(8, exponent=1.0, cap=0.01), FeatureChoice(401)], ids=str)
def test_a_curve_that_no_dictionary_of_this_size_has_is_refused(rule):
    with pytest.raises(SaekitError, match=r"400 features on at most .* cannot spend k="):
        curve_density(zipf_densities(), rule)


def test_a_curve_with_a_floor_is_refused():
    with pytest.raises(SaekitError, match="whose floor counts tokens of a batch, and the curve is of densities"):
        AuxZipf(curve=FeatureChoice(3, floor=1))


def test_without_shrinking_few_members_count_in_full():
    sae, x = random_sae(), inputs()
    codes = sae.encode(x)
    arguments = {"density": DEAD, "options": AuxZipf(k_aux=8, dead_after=999)}
    shrunk = aux_zipf_loss(sae, x, codes, **arguments)
    full = aux_zipf_loss(sae, x, codes, density=DEAD, options=replace(arguments["options"], shrink=False))
    torch.testing.assert_close(shrunk, full * len(MEMBERS) / 8)


def test_members_that_claim_tokens_get_their_deficit_in_their_strongest_tokens():
    sae, x = random_sae(), inputs(400)
    with torch.no_grad():
        sae.b_enc[MEMBERS] = 5.0
    rule = FeatureChoice(3, exponent=0.5)
    share = rule.budgets(1 << 20, N_FEATURES).double() / (1 << 20)
    share[MEMBERS] = 0.0  # which puts them last
    expected = curve_density(share, rule)
    codes = sae.encode(x).with_values(torch.zeros(1200, dtype=torch.float64))  # nothing is taken already
    density = density_with(member_mask() * 1000, share)
    chosen = AuxZipf(claim="feature", curve=rule, below=0.5, dead_after=999, k_aux=4)
    loss = aux_zipf_loss(sae, x, codes, density=density, options=chosen, residual=x)
    claims = (0.5 * expected[MEMBERS] * 400).ceil().long()
    assert claims.unique().numel() > 1 and (claims >= 1).all()
    pre_acts = (x - sae.b_dec).detach() @ sae.encoder.T + sae.b_enc
    claimed = torch.zeros_like(pre_acts)
    for member, claim in zip(MEMBERS.tolist(), claims.tolist(), strict=True):
        claimed[pre_acts[:, member].topk(claim).indices, member] = 1
    values = pre_acts.relu() * claimed
    want = (x - values @ sae.decoder).square().sum() / (x - x.mean(0)).square().sum()
    torch.testing.assert_close(loss, want)
    ours, theirs = gradients(loss, sae), gradients(want, sae)
    for name in ("encoder", "decoder", "b_enc"):
        assert ours[name].any()
        torch.testing.assert_close(ours[name], theirs[name])


@pytest.mark.parametrize("options", [{"below": -0.1}, {"below": 1.5}, {"most_members": 0.0}, {"most_members": 1.1}])
def test_shares_that_are_none_are_refused(options):
    with pytest.raises(SaekitError, match=r"both are shares: give below from 0 to 1"):
        AuxZipf(**options)


def test_when_a_feature_is_dead_must_be_said():
    sae, x = random_sae(), inputs()
    with pytest.raises(SaekitError, match=r"dead_after is None.*give a number of tokens"):
        aux_zipf_loss(sae, x, sae.encode(x), density=DEAD, options=AuxZipf())
