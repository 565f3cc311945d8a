"""Releases whose own code is not at hand: each against its formula, written out here, and its place in the model."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

import saekit
from saekit.errors import FileError
from saekit.loading import describe
from saekit.normalisation import LayerNorm, Plain
from saekit.selection import TopK

D, F, K = 6, 10, 3


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


X = noise(0, 16, D) * 2 + 0.3
ENC, DEC, B_ENC, B_DEC = noise(1, F, D), noise(2, F, D), noise(3, F), noise(4, D)
CUT = noise(5, F).abs()


def jump(h: Tensor, cut: Tensor | float) -> Tensor:
    return h.relu() * (h > cut)


def top(h: Tensor) -> Tensor:
    kept = torch.zeros_like(h).scatter_(1, h.topk(K).indices, 1.0)
    return h.relu() * kept


def check(path: Path, codes: Tensor, output: Tensor, **facts: object) -> None:
    """Codes and output of the SAE at `path`, and what it is said to belong to, before and after reading its numbers."""
    sae = saekit.load(path)
    assert (codes != 0).any() and (codes == 0).any()
    torch.testing.assert_close(sae.encode(X).to_dense(), codes, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sae(X), output, atol=1e-5, rtol=1e-5)
    assert {name: getattr(sae.cfg, name) for name in facts} == facts
    described = describe(path).weights
    assert (described.hook_name, described.model_name) == (sae.cfg.hook_name, sae.cfg.model_name)


def saved(path: Path, tensors: dict, config: tuple[str, dict] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    match path.suffix:
        case ".npz":
            np.savez(path, **{name: tensor.numpy() for name, tensor in tensors.items()})
        case ".safetensors":
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
        case _:
            torch.save(tensors, path)
    if config is not None:
        text = yaml.safe_dump(config[1]) if config[0].endswith(".yaml") else json.dumps(config[1])
        (path.parent / config[0]).write_text(text)
    return path


def openai(**more: object) -> dict:
    statistics = {"stats_last_nonzero": torch.zeros(F, dtype=torch.int64), "latents_mean_square": torch.zeros(F)}
    weights = {"pre_bias": B_DEC, "encoder.weight": ENC, "latent_bias": B_ENC, "decoder.weight": DEC.T.contiguous()}
    return weights | statistics | more


def test_openai_topk_reads_after_layer_norm_and_writes_in_units_of_the_input(tmp_path):
    weights = openai(activation="TopK", activation_state_dict={"k": K, "postact_fn": "ReLU"})
    path = saved(tmp_path / "gpt2-small" / "resid_post_mlp_v5_32k" / "autoencoders" / "8.pt", weights)
    mean, std = X.mean(1, keepdim=True), X.std(1, keepdim=True)
    codes = top(((X - mean) / (std + 1e-5) - B_DEC) @ ENC.T + B_ENC)
    site = "blocks.8.hook_resid_post"
    check(path, codes, (codes @ DEC + B_DEC) * std + mean, hook_name=site, model_name="gpt2", normalisation=LayerNorm())


def test_openai_relu_reads_tokens_as_they_are(tmp_path):
    path = saved(tmp_path / "mlp_post_act" / "autoencoders" / "11.pt", openai(activation="ReLU"))
    codes = ((X - B_DEC) @ ENC.T + B_ENC).relu()
    check(path, codes, codes @ DEC + B_DEC, hook_name="blocks.11.mlp.hook_post", normalisation=Plain())
    with pytest.raises(FileError, match=r"activation is 'GELU'; expected ReLU or TopK"):
        saekit.load(saved(tmp_path / "x.pt", openai(activation="GELU")))


@pytest.mark.parametrize("capital", [True, False])
@pytest.mark.parametrize(
    "release, site, site_out",
    [
        ("gemma-scope-2b-pt-res", "blocks.20.hook_resid_post", ""),
        ("gemma-scope-2b-pt-mlp", "blocks.20.hook_mlp_out", ""),
        ("gemma-scope-2b-pt-att", "blocks.20.attn.hook_z", ""),
        (
            "models--google--gemma-scope-2b-pt-transcoders/snapshots/0a",
            "blocks.20.ln2.hook_normalized",
            "blocks.20.hook_mlp_out",
        ),
    ],
)
def test_gemma_scope_never_subtracts_its_decoder_bias(release, site, site_out, capital, tmp_path):
    letter = "W" if capital else "w"
    weights = {f"{letter}_enc": ENC.T, f"{letter}_dec": DEC, "b_enc": B_ENC, "b_dec": B_DEC, "threshold": CUT}
    path = saved(tmp_path / release / "layer_20" / "width_16k" / "average_l0_71" / "params.npz", weights)
    codes = jump(X @ ENC.T + B_ENC, CUT)
    facts = {"hook_name": site, "hook_name_out": site_out, "model_name": "google/gemma-2-2b"}
    check(path.parent, codes, codes @ DEC + B_DEC, **facts, apply_b_dec_to_input=False)


def test_gemma_scope_on_embeddings_is_scaled_back(tmp_path):
    weights = {"W_enc": ENC.T, "W_dec": DEC, "b_enc": B_ENC, "b_dec": B_DEC, "threshold": CUT}
    path = saved(tmp_path / "gemma-scope-9b-it-res" / "embedding" / "width_4k" / "params.npz", weights)
    codes = jump(X / D**0.5 @ ENC.T + B_ENC, CUT)
    output = codes @ DEC * D**0.5 + B_DEC
    check(path, codes, output, hook_name="hook_embed", model_name="google/gemma-2-9b-it")


def test_gemma_scope_outside_its_repository_has_no_site(tmp_path):
    weights = {"W_enc": ENC.T, "W_dec": DEC, "b_enc": B_ENC, "b_dec": B_DEC, "threshold": CUT}
    codes = jump(X @ ENC.T + B_ENC, CUT)
    check(saved(tmp_path / "params.npz", weights), codes, codes @ DEC + B_DEC, hook_name="", model_name="")


def second(**more: Tensor) -> dict[str, Tensor]:
    return {"w_enc": ENC.T, "w_dec": DEC, "b_enc": B_ENC, "b_dec": B_DEC, "threshold": CUT} | more


def test_gemma_scope_2_takes_its_place_from_the_path_and_its_model_from_the_config(tmp_path):
    folder = tmp_path / "resid_post" / "layer_12_width_16k_l0_medium"
    config = {"architecture": "jump_relu", "model_name": "gemma-v3-270m-pt"}
    path = saved(folder / "params.safetensors", second(), ("config.json", config))
    codes = jump(X @ ENC.T + B_ENC, CUT)
    check(folder, codes, codes @ DEC + B_DEC, hook_name="model.layers.12", model_name="google/gemma-3-270m")
    (path.parent / "config.json").unlink()
    check(folder, codes, codes @ DEC + B_DEC, hook_name="model.layers.12", model_name="")


def test_gemma_scope_2_transcoders_have_a_skip_connection_stored_the_other_way_round(tmp_path):
    folder = tmp_path / "gemma-scope-2-1b-pt" / "transcoder_all" / "layer_3_width_16k_l0_big_affine"
    skip, wide, bias = noise(7, D, 4), noise(8, F, 4), noise(9, 4)
    weights = second(w_dec=wide, b_dec=bias, affine_skip_connection=skip)
    saved(folder / "params.safetensors", weights)
    codes = jump(X @ ENC.T + B_ENC, CUT)
    block = "model.layers.3."
    sites = {"hook_name": block + "pre_feedforward_layernorm", "hook_name_out": block + "post_feedforward_layernorm"}
    check(folder, codes, codes @ wide + bias + X @ skip, **sites, model_name="google/gemma-3-1b-pt", d_out=4)


def test_a_cross_layer_transcoder_is_not_summed_into_one_layer(tmp_path):
    saved(tmp_path / "clt" / "params.safetensors", second(w_dec=noise(8, F, 3, D)))
    with pytest.raises(FileError, match=r"part of a cross-layer transcoder .*many layers at once; saekit reads"):
        saekit.load(tmp_path / "clt")


def linear(encoder: str, decoder: str) -> dict[str, Tensor]:
    return {
        f"{encoder}.weight": ENC,
        f"{encoder}.bias": B_ENC,
        f"{decoder}.weight": DEC.T,
        f"{decoder}.bias": B_DEC,
    }


def test_llama_scope_compares_scaled_inputs_with_a_threshold_in_raw_units(tmp_path):
    norm, cut = 4.2, 0.3
    config = {
        "d_model": D,
        "hook_point_in": "blocks.7.hook_resid_post",
        "hook_point_out": "blocks.7.hook_resid_post",
        "jump_relu_threshold": cut,
        "dataset_average_activation_norm": {"in": norm, "out": norm},
    }
    path = saved(tmp_path / "L7R-8x" / "checkpoints" / "final.safetensors", linear("encoder", "decoder"))
    (tmp_path / "L7R-8x" / "hyperparams.json").write_text(json.dumps(config))
    scale = D**0.5 / norm
    codes = jump(scale * X @ ENC.T + B_ENC, cut * scale)
    for given in (path, tmp_path / "L7R-8x"):
        check(given, codes, (codes @ DEC + B_DEC) / scale, hook_name="blocks.7.hook_resid_post", hook_name_out="")


def test_a_llama_scope_transcoder_has_one_scale_in_and_another_out(tmp_path):
    config = {
        "d_model": D,
        "hook_point_in": "blocks.7.ln2.hook_normalized",
        "hook_point_out": "blocks.7.hook_mlp_out",
        "jump_relu_threshold": 0.2,
        "dataset_average_activation_norm": {"in": 4.2, "out": 1.7},
    }
    saved(tmp_path / "checkpoints" / "final.safetensors", linear("encoder", "decoder"))
    (tmp_path / "hyperparams.json").write_text(json.dumps(config))
    scale, out_scale = D**0.5 / 4.2, D**0.5 / 1.7
    codes = jump(scale * X @ ENC.T + B_ENC, 0.2 * scale)
    check(tmp_path, codes, (codes @ DEC + B_DEC) / out_scale, hook_name_out="blocks.7.hook_mlp_out")


def test_llama_scope_r1_distill_stores_the_logarithm_of_its_thresholds_and_no_scale(tmp_path):
    weights = linear("encoder", "decoder") | {"log_jumprelu_threshold": CUT.log()}
    config = {"d_model": D, "expansion_factor": 2, "hook_point_in": "blocks.15.hook_resid_post"}
    saved(tmp_path / "sae_weights.safetensors", weights, ("config.json", config))
    with pytest.raises(FileError, match=r"trained on scaled inputs, .*do not say by how much; pass input_scale"):
        saekit.load(tmp_path)
    assert describe(tmp_path).weights.input_scale is None
    codes = jump(0.4 * X @ ENC.T + B_ENC, CUT)
    sae = saekit.load(tmp_path, input_scale=0.4)
    torch.testing.assert_close(sae.encode(X).to_dense(), codes)
    torch.testing.assert_close(sae(X), (codes @ DEC + B_DEC) / 0.4, atol=1e-5, rtol=1e-5)


def test_present_day_llamascopium_is_refused_by_name(tmp_path):
    saved(tmp_path / "sae_weights.safetensors", {"W_E": ENC, "W_D": DEC}, ("config.json", {"sae_type": "sae"}))
    with pytest.raises(FileError, match=r"present-day Llamascopium, which saekit does not read; save it there"):
        saekit.load(tmp_path)


def test_goodfire_subtracts_nothing(tmp_path):
    path = saved(tmp_path / "Llama-3.1-8B-Instruct-SAE-l19.pth", linear("encoder_linear", "decoder_linear"))
    codes = (X @ ENC.T + B_ENC).relu()
    facts = {"hook_name": "model.layers.19", "model_name": "meta-llama/Llama-3.1-8B-Instruct"}
    check(path, codes, codes @ DEC + B_DEC, **facts)


def test_deepseek_r1_distills_are_two_plain_layers(tmp_path):
    codes = (X @ ENC.T + B_ENC).relu()
    check(saved(tmp_path / "l37.pt", linear("encoder", "decoder")), codes, codes @ DEC + B_DEC)


def test_qwen_scope_finds_its_k_in_the_name_of_its_repository(tmp_path):
    weights = {"W_enc": ENC, "W_dec": DEC.T.contiguous(), "b_enc": B_ENC, "b_dec": B_DEC}
    path = saved(tmp_path / f"SAE-Res-Qwen3-1.7B-Base-W32K-L0_{K}" / "layer5.sae.pt", weights)
    codes = top(X @ ENC.T + B_ENC)
    check(path, codes, codes @ DEC + B_DEC, hook_name="model.layers.5")
    assert saekit.load(path).rule == TopK(K)
    with pytest.raises(FileError, match=r"does not say how many features are active.*name of its repository"):
        saekit.load(saved(tmp_path / "layer5.sae.pt", weights))


@pytest.mark.parametrize("jumps", [False, True])
def test_circuit_tracer_transcoders_of_one_layer(jumps, tmp_path):
    skip = noise(7, D, D)
    weights = {"W_enc": ENC, "W_dec": DEC, "b_enc": B_ENC, "b_dec": B_DEC}
    weights |= {"W_skip": skip, "activation_function.threshold": CUT} if jumps else {}
    config = {"model_name": "Qwen/Qwen3-4B", "feature_input_hook": "mlp.hook_in"}
    path = saved(tmp_path / "layer_9.safetensors", weights, ("config.yaml", config))
    codes = jump(X @ ENC.T + B_ENC, CUT if jumps else 0.0)
    output = codes @ DEC + B_DEC + (X @ skip.T if jumps else 0.0)
    sites = {"hook_name": "blocks.9.mlp.hook_in", "hook_name_out": "blocks.9.hook_mlp_out"}
    check(path, codes, output, **sites, model_name="Qwen/Qwen3-4B")
