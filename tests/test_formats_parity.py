"""SAEs that other libraries wrote give here the codes and the outputs that they give there."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import saekit
from saekit.loading import convert, describe
from saekit.normalisation import ConstantNorm, LayerNorm
from saekit.sae import SAE
from saekit.selection import AbsTopK, GroupMax, Threshold, TopK

GOLDEN = Path(__file__).parent / "golden" / "formats"
CASES = sorted(path.parent for path in GOLDEN.rglob("expected.safetensors"))
every_case = pytest.mark.parametrize("folder", CASES, ids=lambda path: str(path.relative_to(GOLDEN)))


def loads_as(folder: Path) -> SAE:
    """The SAE in a folder, after a look at its headers that must say the same."""
    described, sae = describe(folder), saekit.load(folder)
    assert (described.format, described.dtype) == (folder.relative_to(GOLDEN).parts[0], "float32")
    weights = described.weights
    assert all(tensor.is_meta for tensor in (weights.encoder, weights.decoder, weights.b_enc, weights.b_dec))
    assert (weights.d_in, weights.n_features, weights.d_out) == (sae.d_model, sae.n_features, sae.d_out)
    assert type(weights.rule) is type(sae.rule)
    assert (weights.hook_name, weights.hook_name_out) == (sae.cfg.hook_name, sae.cfg.hook_name_out)
    return sae


def test_every_library_and_kind_has_its_golden_file():
    counts = {library.name: len(list(library.rglob("expected.safetensors"))) for library in GOLDEN.iterdir()}
    assert counts == {"dictionary_learning": 8, "saelens": 18, "sparsify": 6}


@every_case
def test_codes_and_output_are_those_of_the_library_that_wrote_it(folder):
    expected, sae = load_file(folder / "expected.safetensors"), loads_as(folder)
    codes = sae.encode(expected["x"])
    torch.testing.assert_close(codes.to_dense(), expected["codes"], atol=1e-5, rtol=1e-5)
    # twice, and with nothing encoded in between: the statistics of a layer norm are no state
    for _ in range(2):
        torch.testing.assert_close(sae.decode(codes, expected["x"]), expected["output"], atol=1e-5, rtol=1e-5)


@every_case
def test_it_stays_the_same_through_saekits_own_folder(folder, tmp_path):
    expected = load_file(folder / "expected.safetensors")
    convert(saekit.load(folder), tmp_path / "sae", to="saekit")
    sae = saekit.load(tmp_path / "sae")
    assert describe(tmp_path / "sae").format == "saekit"
    assert sae.cfg == saekit.load(folder).cfg
    torch.testing.assert_close(sae.encode(expected["x"]).to_dense(), expected["codes"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sae(expected["x"]), expected["output"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "name, rule, facts",
    [
        ("saelens/topk", TopK(3), {"hook_name": "blocks.8.hook_resid_pre", "model_name": "gpt2-small"}),
        ("saelens/abstopk", AbsTopK(3), {"context_size": 128}),
        ("saelens/topk_layer_norm", TopK(3), {"normalisation": LayerNorm()}),
        ("saelens/jumprelu_constant_norm", Threshold, {"normalisation": ConstantNorm()}),
        ("saelens/standard_without_b_dec", Threshold, {"apply_b_dec_to_input": False}),
        ("saelens/legacy_standard", Threshold, {"hook_name": "blocks.8.hook_resid_pre", "context_size": 128}),
        ("saelens/transcoder", Threshold, {"hook_name_out": "blocks.8.hook_mlp_out", "apply_b_dec_to_input": False}),
        ("sparsify/topk/layers.5", TopK(3), {"hook_name": "layers.5", "model_name": "EleutherAI/pythia-70m"}),
        ("sparsify/groupmax/h.3.attn", GroupMax(3), {"hook_name": "h.3.attn", "context_size": 64}),
        (
            "sparsify/transcode/layers.5.mlp",
            TopK(3),
            {"hook_name": "layers.5.mlp:in", "hook_name_out": "layers.5.mlp", "apply_b_dec_to_input": False},
        ),
        ("dictionary_learning/AutoEncoderNew", Threshold, {"apply_b_dec_to_input": False}),
        ("dictionary_learning/JumpReluAutoEncoder", Threshold, {"apply_b_dec_to_input": False}),
        (
            "dictionary_learning/AutoEncoderTopK",
            TopK(3),
            {"hook_name": "blocks.3.hook_resid_post", "model_name": "EleutherAI/pythia-70m-deduped"},
        ),
    ],
)
def test_what_it_belongs_to_is_read_too(name, rule, facts):
    sae = loads_as(GOLDEN / name)
    assert isinstance(sae.rule, rule) if isinstance(rule, type) else sae.rule == rule
    assert {fact: getattr(sae.cfg, fact) for fact in facts} == facts


def test_whether_rows_began_with_bos_is_kept_under_our_name_too():
    assert loads_as(GOLDEN / "saelens" / "topk").cfg.metadata["row_bos"] is False
    assert loads_as(GOLDEN / "saelens" / "legacy_topk").cfg.metadata["row_bos"] is True


def test_a_skip_connection_without_its_weight_in_the_config_is_not_lost():
    for name in ("saelens/skip_transcoder", "sparsify/skip_without_transcode/embed_tokens"):
        assert loads_as(GOLDEN / name).skip is not None


@pytest.mark.parametrize("kind", ["standard", "standard_without_b_dec", "gated", "topk_rescaled", "jumprelu"])
def test_a_checkpoint_that_was_trained_on_whitened_inputs_reads_raw_ones(kind, tmp_path):
    plain = saekit.load(GOLDEN / "saelens" / kind)
    folder = tmp_path / "sae"
    folder.mkdir()
    for path in (GOLDEN / "saelens" / kind).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    settings = json.loads((folder / "cfg.json").read_text()) | {"normalize_activations": "covariance_whitening"}
    (folder / "cfg.json").write_text(json.dumps(settings))
    generator = torch.Generator().manual_seed(0)
    width = plain.d_model
    mean, root = torch.randn(width, generator=generator), torch.randn(width, width, generator=generator)
    matrix = torch.linalg.qr(root).Q * torch.linspace(0.5, 2.0, width)
    inverse = torch.linalg.inv(matrix)
    whitening = {"mean": mean, "matrix": matrix.contiguous(), "inverse_matrix": inverse.contiguous()}
    save_file(whitening, folder / "activation_whitening.safetensors")
    x = torch.randn(40, width, generator=generator) * 3 + mean
    whitened = (x - mean) @ matrix
    sae, codes = saekit.load(folder), plain.encode(whitened)
    torch.testing.assert_close(sae.encode(x).to_dense(), codes.to_dense(), atol=1e-4, rtol=1e-4)
    expected = plain.decode(codes, whitened) @ inverse + mean
    torch.testing.assert_close(sae(x), expected, atol=1e-4, rtol=1e-4)
    assert describe(folder).weights.encoder.is_meta
