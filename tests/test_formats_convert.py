"""What is written for other tools, what is not and why, and the two commands."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import saekit
from saekit.errors import FileError, SaekitError
from saekit.formats.weights import Weights
from saekit.loading import build, convert, describe, load, weights_of
from saekit.normalisation import EqualNorms, LayerNorm
from saekit.sae import SAE
from saekit.sae_config import SAEConfig
from saekit.selection import AbsTopK, FeatureChoice, GroupMax, MutualChoice, SelectionRule, Threshold, TopK
from saekit.training.calibrate import calibrate
from saekit_cli.main import main

GOLDEN = Path(__file__).parent / "golden" / "formats"
D_IN, D_OUT, F = 6, 4, 12


def random_sae(
    rule: SelectionRule, *, d_out: int = D_IN, skip: bool = False, n_features: int = F, **cfg: object
) -> SAE:
    """An SAE in which every weight counts."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"d_in": D_IN, "d_sae": n_features, "d_out": d_out if d_out != D_IN else None}
    sae = SAE(D_IN, n_features, rule, skip=skip, cfg=SAEConfig(**sizes, **cfg))
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
    return sae


def inputs() -> torch.Tensor:
    return torch.randn(32, D_IN, generator=torch.Generator().manual_seed(1)) * 2 + 0.3


def assert_same(sae: SAE, other: SAE) -> None:
    x = inputs()
    torch.testing.assert_close(other.encode(x).to_dense(), sae.encode(x).to_dense(), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(other(x), sae(x), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("n_features", [F, 10, 5], ids=["a multiple", "no multiple", "fewer than d"])
@pytest.mark.parametrize(
    "rule, more",
    [
        (TopK(3), {}),
        (GroupMax(2), {"hook_name": "layers.2"}),
        (TopK(3), {"apply_b_dec_to_input": False}),
        (TopK(3), {"skip": True, "hook_name": "mlp:in", "hook_name_out": "mlp", "apply_b_dec_to_input": False}),
    ],
)
def test_sparsify_and_back(rule, more, n_features, tmp_path):
    if isinstance(rule, GroupMax) and n_features % rule.k:
        rule = GroupMax(1)
    sae = random_sae(rule, n_features=n_features, **more)
    convert(sae, tmp_path / "layers.2.mlp", to="sparsify")
    assert {path.name for path in (tmp_path / "layers.2.mlp").iterdir()} == {"cfg.json", "sae.safetensors"}
    assert describe(tmp_path / "layers.2.mlp").format == "sparsify"
    assert_same(sae, load(tmp_path / "layers.2.mlp"))
    convert(sae, tmp_path / "layers.2.mlp", to="sparsify")  # again, in the place of the first


def test_a_folder_tells_saelens_whether_rows_open_with_bos(tmp_path):
    sae = random_sae(TopK(3), metadata={"row_bos": True})
    for how in (lambda folder: sae.save(folder), lambda folder: convert(sae, folder, to="saelens")):
        how(tmp_path)
        assert json.loads((tmp_path / "cfg.json").read_text())["metadata"]["prepend_bos"] is True
        assert dict(SAE.load(tmp_path).cfg.metadata) == {"row_bos": True}
    random_sae(TopK(3)).save(tmp_path / "unknown")
    assert "prepend_bos" not in json.loads((tmp_path / "unknown" / "cfg.json").read_text())["metadata"]


@pytest.mark.parametrize(
    "rule, more, architecture",
    [
        (TopK(3), {}, "topk"),
        (AbsTopK(3), {}, "abstopk"),
        (Threshold(0.4), {"normalisation": LayerNorm()}, "jumprelu"),
        (Threshold(0.4), {"d_out": D_OUT, "apply_b_dec_to_input": False}, "jumprelu_transcoder"),
        (Threshold(0.0), {"d_out": D_OUT, "skip": True, "apply_b_dec_to_input": False}, "jumprelu_skip_transcoder"),
    ],
)
def test_saelens_and_back(rule, more, architecture, tmp_path):
    sae = random_sae(rule, hook_name="model.layers.7:in", **more)
    convert(sae, tmp_path / "sae", to="saelens")
    config = json.loads((tmp_path / "sae" / "cfg.json").read_text())
    assert config["architecture"] == architecture
    assert config["metadata"]["hook_name"] == "blocks.7.hook_resid_pre"
    assert config["metadata"]["hf_hook_name"] == "model.layers.7:in"
    assert_same(sae, load(tmp_path / "sae"))
    # and what another reader of that folder would make of it, which does not look at our own keys
    config.pop("saekit")
    (tmp_path / "sae" / "cfg.json").write_text(json.dumps(config))
    assert describe(tmp_path / "sae").format == "saelens"
    assert_same(sae, load(tmp_path / "sae"))


@pytest.mark.parametrize("site, written", [
    ("layers.5", "blocks.5.hook_resid_post"),
    ("gpt_neox.layers.5:out", "blocks.5.hook_resid_post"),
    ("transformer.h.0:in", "blocks.0.hook_resid_pre"),
    ("layers.5.mlp", "layers.5.mlp"),
    ("blocks.5.hook_mlp_out", "blocks.5.hook_mlp_out"),
])  # fmt: skip
def test_only_the_residual_stream_is_renamed_for_saelens(site, written, tmp_path):
    convert(random_sae(TopK(3), hook_name=site), tmp_path / "sae", to="saelens")
    assert load(tmp_path / "sae").cfg.hook_name == written


@pytest.mark.parametrize("rule", [MutualChoice(3), FeatureChoice(3)], ids=repr)
def test_a_batch_rule_becomes_a_jumprelu_once_it_is_calibrated(rule, tmp_path):
    sae = random_sae(rule)
    for target in ("saelens", "sparsify"):
        with pytest.raises(SaekitError, match=type(rule).__name__):
            convert(sae, tmp_path / "sae", to=target)
    assert not (tmp_path / "sae").exists()
    served = sae.with_rule(calibrate(sae, inputs()))
    convert(served, tmp_path / "sae", to="saelens")
    assert json.loads((tmp_path / "sae" / "cfg.json").read_text())["architecture"] == "jumprelu"
    assert_same(served, load(tmp_path / "sae"))


@pytest.mark.parametrize(
    "sae, to, why",
    [
        (random_sae(Threshold(0.4)), "sparsify", "features per token, Threshold does not; convert to saelens"),
        (random_sae(TopK(3, relu=False)), "sparsify", "TopK without ReLU does not"),
        (random_sae(TopK(3), normalisation=LayerNorm()), "sparsify", r"not scale tokens, LayerNorm\(eps=1e-05\) does"),
        (random_sae(TopK(3), d_out=4, apply_b_dec_to_input=False), "sparsify", "as it reads, this .* 6 to 4"),
        (random_sae(TopK(3, relu=False)), "saelens", r"SAELens has no SAE with TopK\(k=3, relu=False\)"),
        (random_sae(Threshold(0.2, relu=False)), "saelens", r"no SAE with Threshold\(.*relu=False\)"),
        (random_sae(GroupMax(3)), "saelens", r"no SAE with GroupMax\(k=3\); keep"),
        (random_sae(TopK(3), skip=True), "saelens", r"no SAE with TopK\(k=3\) with a skip connection"),
        (random_sae(TopK(3), normalisation=EqualNorms()), "saelens", r"SAELens has no EqualNorms\(\)"),
        (random_sae(TopK(3), d_out=4, apply_b_dec_to_input=False), "saelens", "no transcoder with TopK; only ReLU"),
        (random_sae(MutualChoice(3)), "saelens", "MutualChoice decides over a batch, .*calibrate first"),
        (random_sae(TopK(3)), "onnx", "no format to write named 'onnx'; closest of 3"),
    ],
)  # fmt: skip
def test_what_would_not_be_the_same_is_refused(sae, to, why, tmp_path):
    with pytest.raises(SaekitError, match=why) as caught:
        convert(sae, tmp_path / "sae", to=to)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "sae").exists()


def test_a_folder_with_other_files_is_not_overwritten(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileError, match=r"holds more than an SAE \(notes\.txt\)"):
        convert(random_sae(TopK(3)), tmp_path, to="sparsify")


def test_weights_and_sae_are_two_forms_of_one_thing():
    sae = random_sae(
        Threshold(0.4), d_out=D_OUT, skip=True, apply_b_dec_to_input=False, hook_name="a", metadata={"x": 1}
    )
    weights = weights_of(sae)
    again = build(weights)
    assert isinstance(weights, Weights) and again.cfg == sae.cfg
    assert_same(sae, again)


def test_a_scale_the_caller_gives_wins_over_the_one_in_the_folder():
    folder = GOLDEN / "saelens" / "expected_average"
    assert describe(folder).weights.input_scale == 1.75
    x = load_file(folder / "expected.safetensors")["x"]
    torch.testing.assert_close(load(folder, input_scale=3.5)(x), load(folder)(2 * x) / 2, atol=1e-5, rtol=1e-5)


def test_bfloat16_on_disk_is_float32_in_use(tmp_path):
    sae = random_sae(TopK(3))
    sae.save(tmp_path / "sae", dtype=torch.bfloat16)
    assert describe(tmp_path / "sae").dtype == "bfloat16"
    assert {parameter.dtype for parameter in saekit.load(tmp_path / "sae").parameters()} == {torch.float32}


def test_info_says_the_same_in_words_and_in_json(capsys):
    folder = GOLDEN / "sparsify" / "skip" / "layers.5.mlp"
    assert main(["info", str(folder)]) == 0
    text = capsys.readouterr().out
    for said in ("sparsify, float32", "6 -> 12 features -> 6", "TopK(k=3)", "layers.5.mlp:in", "EleutherAI/pythia-70m"):
        assert said in text
    assert main(["info", str(folder), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["rule"] == {"name": "TopK", "k": 3, "relu": True}
    assert facts["parameters"] == 2 * 6 * 12 + 12 + 6 + 36 and facts["skip"] is True
    assert (facts["format"], facts["d_in"], facts["n_features"], facts["d_out"]) == ("sparsify", 6, 12, 6)
    assert (facts["hook_name"], facts["hook_name_out"]) == ("layers.5.mlp:in", "layers.5.mlp")


@pytest.mark.parametrize(
    "name, said",
    [
        ("saelens/jumprelu", "Threshold, one cut for each feature (JumpReLU)"),
        ("saelens/standard", "Threshold(0): ReLU"),
        ("dictionary_learning/BatchTopKSAE", "Threshold(0.4), one cut for all"),
        ("saelens/topk_layer_norm", "LayerNorm(eps=1e-05), b_dec subtracted from the input"),
        ("saelens/expected_average", "inputs are multiplied with 1.75"),
        ("saelens/batchtopk", "not in its files"),
    ],
)
def test_info_has_words_for_every_kind(name, said, capsys):
    assert main(["info", str(GOLDEN / name)]) == 0
    assert said in capsys.readouterr().out


def test_info_reads_headers_alone(tmp_path, capsys):
    # a million features: 4 GB that are not there, but a header that is right
    shapes = {"W_enc": [500, 10**6], "b_enc": [10**6], "W_dec": [10**6, 500], "b_dec": [500]}
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 4 * torch.Size(shape).numel()
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with (tmp_path / "sae_weights.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    (tmp_path / "cfg.json").write_text(
        json.dumps({"architecture": "topk", "k": 5, "d_in": 500, "d_sae": 10**6, "metadata": {}})
    )
    assert main(["info", str(tmp_path)]) == 0
    assert "500 -> 1,000,000 features -> 500" in capsys.readouterr().out


def test_convert_reports_what_it_wrote_and_refuses_in_one_line(tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["convert", str(GOLDEN / "sparsify/topk/layers.5"), str(out), "--to", "saelens", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["from"], facts["to"], facts["out"], facts["rule"]) == ("sparsify", "saelens", str(out), "TopK(k=3)")
    assert json.loads((out / "cfg.json").read_text())["metadata"]["hook_name"] == "blocks.5.hook_resid_post"
    assert main(["convert", str(GOLDEN / "saelens/gated"), str(tmp_path / "no"), "--to", "sparsify"]) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1 and "convert to saelens" in printed.err


def test_convert_folds_a_scale_that_only_the_caller_knows(tmp_path, capsys):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("cfg.json", "sae_weights.safetensors"):
        (source / name).write_bytes((GOLDEN / "saelens" / "expected_average" / name).read_bytes())
    assert main(["convert", str(source), str(tmp_path / "out")]) == 1
    assert "pass input_scale" in capsys.readouterr().err
    assert main(["convert", str(source), str(tmp_path / "out"), "--input-scale", "1.75"]) == 0
    assert_same(load(GOLDEN / "saelens" / "expected_average"), load(tmp_path / "out"))
