"""What is done to tokens before encoding, written out by hand; and outputs that need more than the codes."""

import pytest
import torch
from torch import Tensor

from saekit.errors import ShapeError
from saekit.normalisation import BY_NAME, ConstantNorm, EqualNorms, LayerNorm, Normalisation, Plain
from saekit.sae import SAE
from saekit.sae_config import SAEConfig
from saekit.selection import TopK

D_MODEL, N_FEATURES, N_TOKENS = 6, 10, 7
ALL: list[Normalisation] = [Plain(), EqualNorms(), ConstantNorm(), LayerNorm(), LayerNorm(eps=0.1)]
all_of_them = pytest.mark.parametrize("normalisation", ALL, ids=repr)
subtracted = pytest.mark.parametrize("apply_b_dec", [True, False], ids=["b_dec subtracted", "b_dec not subtracted"])


def random_sae(normalisation: Normalisation = Plain(), *, apply_b_dec: bool = True, skip: bool = False) -> SAE:
    cfg = SAEConfig(d_in=D_MODEL, d_sae=N_FEATURES, normalisation=normalisation, apply_b_dec_to_input=apply_b_dec)
    sae = SAE(D_MODEL, N_FEATURES, TopK(3), cfg=cfg, skip=skip).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in sae.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator, dtype=torch.float64))
    return sae


def inputs() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    scales = torch.logspace(-1, 1, N_TOKENS, dtype=torch.float64)[:, None]
    return torch.randn(N_TOKENS, D_MODEL, generator=generator, dtype=torch.float64) * scales + scales


def by_hand(sae: SAE, x: Tensor) -> tuple[Tensor, Tensor]:
    """Dense codes and output, one token at a time."""
    bias = sae.b_dec if sae.cfg.apply_b_dec_to_input else torch.zeros(D_MODEL, dtype=x.dtype)
    codes, outputs = [], []
    for token in x:
        match sae.cfg.normalisation:
            case Plain():
                u, code_scale, scale, shift = token - bias, 1.0, 1.0, 0.0
            case EqualNorms():
                code_scale = (token - bias).square().mean().sqrt()
                u, scale, shift = (token - bias) / code_scale, 1.0, 0.0
            case ConstantNorm():
                scale = token.square().mean().sqrt()
                u, code_scale, shift = token / scale - bias, 1.0, 0.0
            case LayerNorm(eps=eps):
                shift = token.mean()
                scale = ((token - shift).square().sum() / (D_MODEL - 1)).sqrt()
                u, code_scale = (token - shift) / (scale + eps) - bias, 1.0
        h = u @ sae.encoder.T + sae.b_enc
        code = (h * (h >= h.topk(3).values[-1])).relu() * code_scale
        codes.append(code)
        outputs.append((code @ sae.decoder + sae.b_dec) * scale + shift)
    return torch.stack(codes), torch.stack(outputs)


@subtracted
@all_of_them
def test_each_is_what_its_formula_says(normalisation, apply_b_dec):
    sae, x = random_sae(normalisation, apply_b_dec=apply_b_dec), inputs()
    codes, outputs = by_hand(sae, x)
    torch.testing.assert_close(sae.encode(x).to_dense(), codes)
    torch.testing.assert_close(sae(x), outputs)


@all_of_them
def test_gradients_flow_through_it(normalisation):
    sae = random_sae(normalisation)
    assert torch.autograd.gradcheck(sae, (inputs().requires_grad_(),), fast_mode=True)


@all_of_them
def test_decoding_depends_on_its_arguments_alone(normalisation):
    sae, x = random_sae(normalisation), inputs()
    codes = sae.encode(x)
    sae.encode(x.flip(0) * 3)
    torch.testing.assert_close(sae.decode(codes, x), sae(x))
    torch.testing.assert_close(sae.decode(codes, x), sae.decode(codes, x))


@pytest.mark.parametrize("normalisation", [ConstantNorm(), LayerNorm()], ids=repr)
def test_an_output_that_needs_its_input_asks_for_it(normalisation):
    sae, x = random_sae(normalisation), inputs()
    codes = sae.encode(x)
    with pytest.raises(ShapeError, match=r"needs its input \(7, 6\) .*got None; call decode\(codes, x\)"):
        sae.decode(codes)
    with pytest.raises(ShapeError, match=r"got \(6, 6\); call decode"):
        sae.decode(codes, x[1:])


@pytest.mark.parametrize("normalisation", [Plain(), EqualNorms()], ids=repr)
def test_other_outputs_do_without(normalisation):
    sae, x = random_sae(normalisation), inputs()
    torch.testing.assert_close(sae.decode(sae.encode(x)), sae(x))


def test_a_skip_connection_carries_the_raw_input():
    sae, x = random_sae(skip=True), inputs()
    codes = sae.encode(x)
    torch.testing.assert_close(sae(x), codes.to_dense() @ sae.decoder + sae.b_dec + x @ sae.skip.T)
    with pytest.raises(ShapeError, match=r"it has a skip connection\), got None"):
        sae.decode(codes)


def test_every_kind_can_be_named_in_a_file():
    assert {type(normalisation) for normalisation in ALL} == set(BY_NAME.values())


@pytest.mark.parametrize(
    "cfg",
    [
        SAEConfig(d_in=D_MODEL, d_sae=N_FEATURES, d_out=4),
        SAEConfig(d_in=D_MODEL, d_sae=N_FEATURES, d_out=4, apply_b_dec_to_input=False, normalisation=LayerNorm()),
    ],
    ids=["shared bias", "shared scale"],
)
def test_an_output_of_another_width_shares_neither_bias_nor_scale(cfg):
    with pytest.raises(ShapeError, match=r"\(6 -> 4 numbers\) writes another Site.*apply_b_dec_to_input=False"):
        SAE(D_MODEL, N_FEATURES, TopK(3), cfg=cfg)


@pytest.mark.parametrize("normalisation", [Plain(), EqualNorms(), ConstantNorm(), LayerNorm(eps=0.0)], ids=repr)
def test_rescaled_does_the_same_to_inputs_of_another_scale(normalisation):
    sae, x = random_sae(normalisation), inputs()
    torch.testing.assert_close(sae.rescaled(10.0)(x * 10), sae(x) * 10, rtol=1e-4, atol=1e-4)


def test_a_transcoder_shares_no_bias_with_its_input_even_if_it_is_as_wide():
    cfg = SAEConfig(d_in=D_MODEL, d_sae=N_FEATURES, hook_name="a", hook_name_out="b")
    with pytest.raises(ShapeError, match=r"a transcoder \(6 -> 6 numbers\) writes another Site"):
        SAE(D_MODEL, N_FEATURES, TopK(3), cfg=cfg)
    assert not SAEConfig(d_in=6, d_sae=9, d_out=6).is_transcoder
