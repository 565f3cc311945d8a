"""`check` is given an SAE that is used wrongly in one way, and must name that way."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from saekit.activations.mask import MaskPolicy
from saekit.activations.text import read_documents
from saekit.activations.tokens import TokenRows, tokenize_documents
from saekit.analysis.check import SAME_TEXT, Claims, check, claims_of
from saekit.analysis.evaluate import evaluate
from saekit.analysis.suspects import Setting, _centred, mean_norm, suspects
from saekit.errors import SaekitError
from saekit.formats.weights import with_input_scale
from saekit.loading import build, weights_of
from saekit.normalisation import LayerNorm, Plain
from saekit.sae import SAE
from saekit.sae_config import SAEConfig
from saekit.selection import Threshold, TopK
from saekit.targets import Site, Target
from saekit_cli.main import main


@pytest.fixture(scope="module")
def truth() -> Setting:
    """The bundled SAE as it was trained, on a little of the standard library, with a threshold in place of its rule."""
    return setting_of(Target.load("pystd"))


def setting_of(target: Target) -> Setting:
    sae = SAE.from_pretrained("pystd", "layers.2")
    rows = tokenize_documents(read_documents("stdlib", limit=3), target.tokenizer, context=64).select(slice(6))
    site = Site.parse(sae.cfg.hook_name)
    vectors = target.read(rows.ids, [site])[site].flatten(0, 1)[rows.ids.flatten() != rows.bos]
    with torch.no_grad():
        pre_acts = (vectors - sae.b_dec) @ sae.encoder.T + sae.b_enc
    # one cut that keeps as many features as TopK does, so that L0 depends on the input
    theta = float(pre_acts.flatten().topk(32 * len(vectors)).values[-1])
    return Setting(sae=sae.with_rule(Threshold(theta)), target=target, site=site, rows=rows, mask=MaskPolicy())


def claims(setting: Setting, *, losses: bool = False) -> Claims:
    found = evaluate(
        setting.sae, setting.target, setting.rows, setting.site, mask=setting.mask, loss_rows=None if losses else 0
    )
    return Claims(l0=found.l0, fvu=found.fvu, ce_recovered=found.ce_recovered)


def variant(setting: Setting, **changes: object) -> Setting:
    return replace(setting, sae=build(replace(weights_of(setting.sae), **changes)))


def scaled(setting: Setting, factor: float) -> Setting:
    return replace(setting, sae=build(with_input_scale(weights_of(setting.sae), factor)))


def culprit(used: Setting, claimed: Claims) -> str:
    """The kind of mistake that is named, once it is clear that all claims hold without it."""
    verdict = check(used, claimed, tolerance=SAME_TEXT)
    assert verdict.agrees is False and verdict.distance > 1
    assert verdict.culprit is not None and verdict.culprit.distance < 0.2
    return verdict.culprit.suspect.kind


def test_an_sae_that_is_used_as_it_should_be_is_left_alone(truth):
    verdict = check(truth, claims(truth, losses=True), tolerance=SAME_TEXT)
    assert verdict.agrees is True and verdict.culprit is None and verdict.tried == ()
    assert verdict.distance < 1e-6


@pytest.mark.parametrize(
    "site, kind", [("model.layers.2:in", "site"), ("model.layers.3", "layer"), ("model.layers.1", "layer")]
)
def test_a_wrong_site_is_named(truth, site, kind):
    claimed = claims(truth)
    used = replace(truth, site=Site.parse(site))
    assert culprit(used, claimed) == kind
    found = check(used, claimed, tolerance=SAME_TEXT).culprit.suspect
    # what leaves a block enters the next
    assert str(found.setting.site) in ("model.layers.2:out", "model.layers.3:in")
    assert f"pass --site {found.setting.site}" in found.says


def test_losses_are_asked_of_those_that_the_quick_numbers_leave(truth):
    used = replace(truth, site=Site.parse("model.layers.3"))
    claimed = claims(truth, losses=True)
    assert check(used, claimed, tolerance=SAME_TEXT).culprit.evaluation.ce_recovered == claimed.ce_recovered
    # the same, but that nothing gives the model what is claimed
    verdict = check(used, replace(claimed, ce_recovered=0.1), tolerance=SAME_TEXT)
    assert (verdict.agrees, verdict.culprit) == (False, None)
    # and where losses are all that is claimed, every suspect is asked
    only = Claims(ce_recovered=claimed.ce_recovered)
    assert check(used, only, tolerance=replace(SAME_TEXT, ce_recovered=1e-4)).culprit.suspect.kind == "layer"


@pytest.fixture
def sinking() -> Setting:
    """A model whose BOS is far from every other token, as it is in most."""
    target = Target.load("pystd")
    with torch.no_grad():
        target.model.get_input_embeddings().weight[setting_of(target).rows.bos] *= 200
    return setting_of(target)


def test_bos_among_the_activations_is_named(sinking):
    included = replace(sinking, mask=MaskPolicy(drop_bos=False))
    assert culprit(sinking, claims(included)) == "bos"
    assert culprit(included, claims(sinking)) == "bos"


def test_rows_with_and_without_bos_are_named(sinking):
    included = replace(sinking, mask=MaskPolicy(drop_bos=False))
    without = replace(included, rows=TokenRows.from_ids(sinking.rows.ids[:, 1:], bos=sinking.rows.bos))
    assert culprit(included, claims(without)) == "bos"
    assert culprit(without, claims(included)) == "bos"


def test_a_scale_that_was_not_folded_and_one_that_was_folded_twice_are_named(truth):
    factor = truth.sae.d_model**0.5 / mean_norm(truth)
    assert culprit(scaled(truth, 1 / factor), claims(truth)) == "scale"
    assert culprit(scaled(truth, factor), claims(truth)) == "scale"


def test_a_normalisation_that_is_missing_or_too_much_is_named(truth):
    normalised = variant(scaled(truth, mean_norm(truth) / truth.sae.d_model**0.5), normalisation=LayerNorm())
    assert culprit(variant(normalised, normalisation=Plain()), claims(normalised)) == "normalisation"
    assert culprit(variant(truth, normalisation=LayerNorm()), claims(truth)) == "normalisation"


def test_a_bias_that_is_or_is_not_subtracted_is_named(truth):
    without = variant(truth, apply_b_dec_to_input=False)
    assert culprit(without, claims(truth)) == "bias"
    assert culprit(truth, claims(without)) == "bias"


@pytest.mark.parametrize("apply", [True, False])
def test_a_centred_sae_is_the_sae_on_centred_inputs(truth, apply):
    weights = replace(weights_of(truth.sae), apply_b_dec_to_input=apply)
    x = torch.randn(20, weights.d_in, generator=torch.Generator().manual_seed(0)) * 3 + 5
    mean = x.mean(1, keepdim=True)
    centred, plain = build(_centred(weights)), build(weights)
    torch.testing.assert_close(centred.encode(x).to_dense(), plain.encode(x - mean).to_dense(), atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(centred(x), plain(x - mean) + mean, atol=1e-3, rtol=1e-4)


def test_inputs_that_should_be_centred_are_named():
    generator = torch.Generator().manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(50, 16))
    offset = torch.randn(50, 1, generator=generator)
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(50, 16, generator=generator) + 4 * offset)
    eye = torch.eye(16)
    sae = SAE(16, 32, Threshold(0.4))
    with torch.no_grad():
        sae.encoder.copy_(torch.cat([eye, -eye]))
        sae.decoder.copy_(torch.cat([eye, -eye]))
    rows = TokenRows.from_ids(torch.randint(0, 50, (8, 16), generator=generator))
    used = Setting(sae=sae, target=Target.wrap(model), site=Site.parse("0"), rows=rows, mask=MaskPolicy())
    assert culprit(used, claims(replace(used, sae=build(_centred(weights_of(sae)))))) == "centred"


def test_bfloat16_is_named(truth):
    weights = weights_of(truth.sae)
    # pre-activations so large that bfloat16 can hardly tell them apart
    used = variant(truth, b_enc=weights.b_enc + 1002, rule=Threshold(weights.rule.theta + 1002))
    rounded = next(one.setting for one in suspects(used) if one.kind == "bf16")
    assert culprit(used, claims(rounded)) == "bf16"


def test_two_mistakes_at_once_are_not_explained_by_one(truth):
    used = replace(scaled(truth, 3.0), site=Site.parse("model.layers.0"))
    verdict = check(used, claims(truth), tolerance=SAME_TEXT)
    assert (verdict.agrees, verdict.culprit) == (False, None)
    assert {one.suspect.kind for one in verdict.tried} >= {"site", "layer", "bos", "scale", "normalisation", "bf16"}


def test_without_claims_an_implausible_sae_is_still_explained(truth):
    assert check(truth, Claims()).agrees is None
    factor = truth.sae.d_model**0.5 / mean_norm(truth)
    verdict = check(scaled(truth, 1 / factor), Claims())
    assert verdict.agrees is False and verdict.culprit.suspect.kind == "scale"


def test_an_sae_of_another_width_is_refused_in_one_line(truth):
    with pytest.raises(SaekitError, match="encodes rows of 8 numbers"):
        check(replace(truth, sae=SAE(8, 16, TopK(2))), Claims())


@pytest.mark.parametrize(
    "metadata, expected",
    [
        ({}, Claims()),
        ({"l0": 60}, Claims(l0=60.0)),
        ({"l0": 60, "variance_explained": 0.9}, Claims(l0=60.0, fvu=1 - 0.9)),
        ({"evaluation": {"l0": 32.0, "fvu": 0.2, "ce_recovered": 0.9}}, Claims(l0=32.0, fvu=0.2, ce_recovered=0.9)),
        ({"l0": "many", "evaluation": "good"}, Claims()),
    ],
)
def test_claims_are_read_from_metadata(metadata, expected):
    assert claims_of(SAE(4, 8, TopK(2), cfg=SAEConfig(d_in=4, d_sae=8, metadata=metadata))) == expected


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.py"
    path.write_text("\n".join(document.text for document in read_documents("stdlib", limit=2))[:60_000])
    return path


def test_the_command_says_what_is_the_matter(truth, text, tmp_path, capsys):
    claimed = claims(truth)
    cfg = replace(
        truth.sae.cfg, hook_name="model.layers.3", context_size=64, metadata={"l0": claimed.l0, "fvu": claimed.fvu}
    )
    build(replace(weights_of(truth.sae), hook_name=cfg.hook_name, context_size=64, metadata=cfg.metadata)).save(
        tmp_path / "sae"
    )
    arguments = ["check", str(tmp_path / "sae"), "pystd", str(text), "--tokens", "512"]
    assert main([*arguments, "--json"]) == 1
    facts = json.loads(capsys.readouterr().out)
    assert (facts["agrees"], facts["culprit"]) == (False, "layer")
    assert facts["then"]["fvu"] < facts["measured"]["fvu"]
    assert main([*arguments, "--site", "model.layers.2"]) == 0
    assert "It does what is claimed of it." in capsys.readouterr().out


def test_the_command_asks_for_a_text_that_is_not_recorded(tmp_path, capsys):
    SAE(4, 8, TopK(2)).save(tmp_path / "sae")
    assert main(["check", str(tmp_path / "sae"), "pystd"]) == 1
    assert "does not record its text; give it: saekit check" in capsys.readouterr().err
