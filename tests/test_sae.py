"""The SAE: its equations against a dense reading of them, gradients of every rule, units, and the folder."""

import jaxtyping
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from saekit.errors import ShapeError
from saekit.normalisation import EqualNorms, Plain
from saekit.sae import SAE
from saekit.sae_config import SAEConfig, with_metadata
from saekit.selection import AbsTopK, FeatureChoice, GroupMax, MutualChoice, SelectionRule, Threshold, TopK

D_MODEL, N_FEATURES, N_TOKENS = 5, 9, 7
RANKS = torch.tensor([3, 0, 8, 1, 7, 2, 6, 4, 5])
CUTS = torch.linspace(-0.2, 1.0, N_FEATURES)
RULES: dict[str, SelectionRule] = {
    "TopK": TopK(3),
    "MutualChoice": MutualChoice(6),  # few are positive, so the batch as a whole must keep closed ones too
    "FeatureChoice uniform": FeatureChoice(3),
    "FeatureChoice Zipf": FeatureChoice(3, exponent=0.9, offset=1.5),
    "FeatureChoice ranked": FeatureChoice(3, exponent=0.9, offset=1.5, ranks=RANKS),
    "Threshold": Threshold(0.25),
    "Threshold per feature": Threshold(CUTS),
}
# rules that let negative entries through, or choose otherwise than by the largest
MORE_RULES: dict[str, SelectionRule] = {
    "TopK without ReLU": TopK(3, relu=False),
    "MutualChoice without ReLU": MutualChoice(6, relu=False),
    "FeatureChoice without ReLU": FeatureChoice(3, exponent=0.9, offset=1.5, relu=False),
    "Threshold without ReLU": Threshold(-0.25, relu=False),
    "AbsTopK": AbsTopK(3),
    "GroupMax": GroupMax(3),
}
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
both_norms = pytest.mark.parametrize("equal_norms", [False, True], ids=["own norms", "equal norms"])


def random_sae(rule: SelectionRule, *, equal_norms: bool = False, seed: int = 0, dtype=torch.float32) -> SAE:
    """All four weights random, with a bias so negative that some selected entries are closed by ReLU."""
    generator = torch.Generator().manual_seed(seed)
    cfg = SAEConfig(
        d_in=D_MODEL,
        d_sae=N_FEATURES,
        hook_name="layers.2:out",
        model_name="pystd",
        context_size=256,
        normalisation=EqualNorms() if equal_norms else Plain(),
        metadata={"tokens": 1000, "fvu": 0.25, "note": "ünïcode"},
    )
    sae = SAE(D_MODEL, N_FEATURES, rule, cfg=cfg).to(dtype)
    with torch.no_grad():
        for weight in sae.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator, dtype=torch.float64))
        sae.b_enc.sub_(0.5)
    return sae


def inputs(n_tokens: int = N_TOKENS, *, seed: int = 1, dtype=torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(-1, 1, max(n_tokens, 2))[:n_tokens, None]  # norms that differ a hundredfold
    return (torch.randn(n_tokens, D_MODEL, generator=generator) * scales).to(dtype)


def dense_codes(sae: SAE, x: Tensor) -> Tensor:
    """The equations of `saekit.sae`, written out on dense matrices; autograd gives the gradients."""
    u, unit = x - sae.b_dec, torch.ones(len(x), 1, dtype=x.dtype)
    if isinstance(sae.cfg.normalisation, EqualNorms):
        unit = u.square().mean(1, keepdim=True).sqrt()
    pre_acts = (u / unit) @ sae.encoder.T + sae.b_enc
    return sae.rule(pre_acts).to_dense() * unit


@both_norms
@every_rule
def test_encode_and_decode_are_the_equations(rule, equal_norms):
    sae, x = random_sae(rule, equal_norms=equal_norms, dtype=torch.float64), inputs(dtype=torch.float64)
    codes, dense = sae.encode(x), dense_codes(sae, x)
    torch.testing.assert_close(codes.to_dense(), dense)
    torch.testing.assert_close(sae.decode(codes), dense @ sae.decoder + sae.b_dec)
    torch.testing.assert_close(sae(x), dense @ sae.decoder + sae.b_dec)


@both_norms
@every_rule
def test_gradients_of_encode_and_decode_are_right(rule, equal_norms):
    sae = random_sae(rule, equal_norms=equal_norms, dtype=torch.float64)
    both = _CodesAndOutput(sae)
    weights = dict(both.named_parameters())
    x = inputs(dtype=torch.float64).requires_grad_()
    codes = sae.encode(x)
    # the cases that hand-written backward passes get wrong
    assert isinstance(rule, Threshold) or (codes.values == 0).any()
    assert isinstance(rule, TopK) or len(codes.row_starts.diff().unique()) > 1

    def codes_and_output(x: Tensor, *values: Tensor) -> tuple[Tensor, Tensor]:
        return torch.func.functional_call(both, dict(zip(weights, values, strict=True)), x)

    assert torch.autograd.gradcheck(codes_and_output, (x, *weights.values()), fast_mode=True)


@both_norms
@pytest.mark.parametrize("rule", MORE_RULES.values(), ids=MORE_RULES.keys())
def test_gradients_of_rules_without_relu_and_of_groups_are_right(rule, equal_norms):
    both = _CodesAndOutput(random_sae(rule, equal_norms=equal_norms, dtype=torch.float64))
    weights = dict(both.named_parameters())
    x = inputs(dtype=torch.float64).requires_grad_()
    assert isinstance(rule, GroupMax) or (both.sae.encode(x).values < 0).any()

    def codes_and_output(x: Tensor, *values: Tensor) -> tuple[Tensor, Tensor]:
        return torch.func.functional_call(both, dict(zip(weights, values, strict=True)), x)

    assert torch.autograd.gradcheck(codes_and_output, (x, *weights.values()), fast_mode=True)


@pytest.mark.parametrize("skip", [False, True], ids=["plain", "skip"])
def test_gradients_of_transcoders_are_right(skip):
    cfg = SAEConfig(d_in=D_MODEL, d_sae=N_FEATURES, d_out=D_MODEL + 2, apply_b_dec_to_input=False)
    sae = SAE(D_MODEL, N_FEATURES, TopK(3), skip=skip, cfg=cfg).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in sae.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator, dtype=torch.float64))
    weights = dict(sae.named_parameters())
    assert ("skip" in weights) is skip

    def output(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(sae, dict(zip(weights, values, strict=True)), x)

    x = inputs(dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(output, (x, *weights.values()), fast_mode=True)


class _CodesAndOutput(torch.nn.Module):
    """Codes and reconstruction from one call, so that one check covers both."""

    def __init__(self, sae: SAE):
        super().__init__()
        self.sae = sae

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        codes = self.sae.encode(x)
        return codes.to_dense(), self.sae.decode(codes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["plain", "no bias on the input", "equal norms", "skip"])
def test_inputs_of_any_type_are_computed_in_that_of_the_weights(kind, dtype):
    cfg = SAEConfig(
        d_in=6,
        d_sae=12,
        d_out=6 if kind == "skip" else None,
        apply_b_dec_to_input=kind in ("plain", "equal norms"),
        normalisation=EqualNorms() if kind == "equal norms" else Plain(),
    )
    sae = SAE(6, 12, TopK(3), skip=kind == "skip", cfg=cfg)
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(sae(x), sae(x.float()))
    assert torch.equal(sae.encode(x).values, sae.encode(x.float()).values)


@both_norms
@every_rule
def test_gradients_are_those_of_the_dense_equations(rule, equal_norms):
    sae, target = random_sae(rule, equal_norms=equal_norms, dtype=torch.float64), inputs(seed=5, dtype=torch.float64)

    def gradients(reconstruct) -> list[Tensor]:
        x = inputs(dtype=torch.float64).requires_grad_()
        loss = (reconstruct(x) - target).square().sum()
        return list(torch.autograd.grad(loss, (x, *sae.parameters())))

    dense = gradients(lambda x: dense_codes(sae, x) @ sae.decoder + sae.b_dec)
    for ours, theirs in zip(gradients(sae), dense, strict=True):
        torch.testing.assert_close(ours, theirs)
        assert theirs.any()


def test_equal_norms_lets_no_token_win_by_its_length():
    x = inputs(2)
    x = torch.cat([x[:1], x[:1] * 100])
    sae = random_sae(MutualChoice(2), equal_norms=True)
    with torch.no_grad():
        sae.b_dec.zero_()
    codes = sae.encode(x)
    assert torch.equal(codes.features[:2], codes.features[2:])
    torch.testing.assert_close(codes.values[2:], codes.values[:2] * 100)


def test_a_token_equal_to_the_pre_bias_is_finite_under_equal_norms():
    sae = random_sae(TopK(3), equal_norms=True)
    x = sae.b_dec.detach().expand(2, -1).clone().requires_grad_()
    sae(x).sum().backward()
    for gradient in (x.grad, *(w.grad for w in sae.parameters())):
        assert gradient.isfinite().all()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**16), factor=st.integers(0, 8))
def test_decode_is_linear_in_values_and_depends_on_nothing_else(seed, factor):
    sae = random_sae(TopK(3), seed=seed).double()
    codes = sae.encode(inputs(seed=seed).double())
    sae.encode(inputs(3, seed=seed + 1).double())
    bias = sae.b_dec
    torch.testing.assert_close(
        sae.decode(codes.with_values(codes.values * factor)) - bias, (sae.decode(codes) - bias) * factor
    )


@pytest.mark.parametrize("leading", [(), (1,), (2, 3), (2, 1, 2)], ids=str)
def test_forward_keeps_leading_dimensions(leading):
    sae = random_sae(TopK(3))
    x = torch.randn(*leading, D_MODEL, generator=torch.Generator().manual_seed(0))
    assert sae(x).shape == x.shape
    torch.testing.assert_close(sae(x).reshape(-1, D_MODEL), sae(x.reshape(-1, D_MODEL)))


def test_weights_have_the_names_and_orientation_of_the_field():
    sae = random_sae(TopK(3))
    assert sae.W_enc.shape == (D_MODEL, N_FEATURES) and torch.equal(sae.W_enc, sae.encoder.T)
    assert sae.W_dec.shape == (N_FEATURES, D_MODEL) and torch.equal(sae.W_dec, sae.decoder)
    assert not sae.W_enc.requires_grad and not sae.W_dec.requires_grad
    assert (sae.cfg.d_in, sae.cfg.d_sae, sae.cfg.hook_name) == (D_MODEL, N_FEATURES, "layers.2:out")
    assert sorted(dict(sae.named_parameters())) == ["b_dec", "b_enc", "decoder", "encoder"]
    for name in ("W_enc", "W_dec"):
        with pytest.raises(AttributeError):
            setattr(sae, name, getattr(sae, name))


def test_a_new_sae_is_tied_of_unit_norm_and_the_same_every_time():
    sae = SAE(D_MODEL, N_FEATURES, TopK(3))
    torch.manual_seed(123)
    assert torch.equal(SAE(D_MODEL, N_FEATURES, TopK(3)).decoder, sae.decoder)
    torch.testing.assert_close(sae.decoder.norm(dim=1), torch.ones(N_FEATURES))
    assert torch.equal(sae.encoder, sae.decoder)
    assert not sae.b_enc.any() and not sae.b_dec.any()
    other = SAE(D_MODEL, N_FEATURES, TopK(3))
    other.initialise(torch.Generator().manual_seed(1))
    assert not torch.equal(other.decoder, sae.decoder)


def test_making_an_sae_does_not_touch_the_global_random_state():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    SAE(D_MODEL, N_FEATURES, TopK(3))
    assert torch.equal(torch.rand(1), expected)


def test_with_rule_shares_the_weights():
    sae = random_sae(TopK(3))
    other = sae.with_rule(Threshold(0.5))
    assert other.encoder is sae.encoder and other.cfg is sae.cfg
    assert isinstance(sae.rule, TopK) and isinstance(other.rule, Threshold)
    x = inputs()
    torch.testing.assert_close(
        other.encode(x).to_dense(), Threshold(0.5)((x - sae.b_dec) @ sae.W_enc + sae.b_enc).to_dense()
    )


@pytest.mark.parametrize("scale", [0.01, 37.0])
@both_norms
@every_rule
def test_rescaled_does_in_other_units_what_the_original_did(rule, equal_norms, scale):
    sae, x = random_sae(rule, equal_norms=equal_norms, dtype=torch.float64), inputs(dtype=torch.float64)
    weights = {name: weight.clone() for name, weight in sae.state_dict().items()}
    other = sae.rescaled(scale)
    before, after = sae.encode(x), other.encode(x * scale)
    assert torch.equal(before.features, after.features) and torch.equal(before.row_starts, after.row_starts)
    assert (before.values > 0).any()
    torch.testing.assert_close(after.values, before.values * scale)
    torch.testing.assert_close(other(x * scale), sae(x) * scale)
    torch.testing.assert_close(other.decoder, sae.decoder)
    assert other.cfg == sae.cfg
    for name, weight in sae.state_dict().items():
        assert torch.equal(weight, weights[name])
        assert weight.data_ptr() != other.state_dict()[name].data_ptr()


@both_norms
@every_rule
def test_a_saved_sae_comes_back_bit_for_bit(rule, equal_norms, tmp_path):
    sae, x = random_sae(rule, equal_norms=equal_norms), inputs()
    sae.save(tmp_path / "sae")
    other = SAE.load(tmp_path / "sae")
    for name, weight in sae.state_dict().items():
        assert torch.equal(other.state_dict()[name], weight), name
    assert other.cfg == sae.cfg
    assert type(other.rule) is type(rule)
    if not isinstance(rule, Threshold):  # cuts are tensors, which have no single truth value
        assert other.rule == rule
    before, after = sae.encode(x), other.encode(x)
    assert torch.equal(before.to_dense(), after.to_dense())
    assert torch.equal(sae(x), other(x))


def test_weights_of_any_type_are_stored_in_single_precision(tmp_path):
    for dtype in (torch.bfloat16, torch.float64):
        sae = random_sae(Threshold(CUTS.to(dtype)), dtype=dtype)
        sae.save(tmp_path / "sae")
        other = SAE.load(tmp_path / "sae")
        assert torch.equal(other.encoder, sae.encoder.float())
        assert torch.equal(other.rule.theta, CUTS.to(dtype).float().clamp(min=0))


def test_with_metadata_adds_and_keeps(tmp_path):
    sae = random_sae(TopK(3))
    sae.cfg = with_metadata(sae.cfg, fvu=0.5, seed=3)
    sae.save(tmp_path / "sae")
    assert SAE.load(tmp_path / "sae").cfg.metadata == {"tokens": 1000, "fvu": 0.5, "note": "ünïcode", "seed": 3}


def test_inputs_of_another_width_are_refused_with_the_site_they_should_come_from():
    with pytest.raises(ShapeError, match=r"rows of 5 numbers, got \(7, 4\).*its Site \(layers\.2:out\)"):
        random_sae(TopK(3)).encode(torch.zeros(7, 4))
    with pytest.raises(ShapeError, match="of its Site as"):
        SAE(5, 9, TopK(3)).encode(torch.zeros(7, 4))


def test_inputs_that_are_no_matrix_are_refused(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as users run; the annotation refuses it too
    with pytest.raises(ShapeError, match=r"got \(2, 7, 5\).*as \(n_tokens, d_model\)"):
        random_sae(TopK(3)).encode(torch.zeros(2, 7, 5))


def test_codes_of_another_sae_are_refused():
    codes = SAE(D_MODEL, N_FEATURES + 1, TopK(3)).encode(inputs())
    with pytest.raises(ShapeError, match="these codes have 10 features, this SAE 9; decode them with"):
        random_sae(TopK(3)).decode(codes)


def test_a_cfg_of_other_sizes_is_refused():
    with pytest.raises(ShapeError, match="cfg describes 4 -> 9 features, but the SAE is 5 -> 9"):
        SAE(5, 9, TopK(3), cfg=SAEConfig(d_in=4, d_sae=9))


def test_printing_an_sae_says_what_it_is():
    assert "d_model=5, n_features=9, rule=TopK(k=3), site=layers.2:out" in repr(random_sae(TopK(3)))


@pytest.mark.parametrize("rule", [TopK(3), MutualChoice(3)], ids=repr)
def test_the_bias_that_is_subtracted_has_one_gradient_whichever_way_it_is_found(rule):
    sae = SAE(6, 20, rule)
    with torch.no_grad():
        sae.b_dec.copy_(torch.linspace(-1, 1, 6))
    x = torch.randn(30, 6, generator=torch.Generator().manual_seed(0))

    def gradients(x: torch.Tensor) -> list[torch.Tensor]:
        sae.zero_grad()
        sae.encode(x).values.square().sum().backward()
        return [sae.b_dec.grad, sae.b_enc.grad, sae.encoder.grad]

    short, long = gradients(x), gradients(x.clone().requires_grad_())
    assert short[0].abs().max() > 1
    for ours, theirs in zip(short, long, strict=True):
        torch.testing.assert_close(ours, theirs)
