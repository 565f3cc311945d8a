"""Small random SAEs, written by SAELens itself, each with an input, its codes and its output."""

import json
from dataclasses import fields
from pathlib import Path

import torch
from case import D_IN, D_OUT, N_FEATURES, K, out_folder, randomise, save_expected, tokens
from sae_lens import (
    SAE,
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    GatedSAEConfig,
    JumpReLUSAEConfig,
    JumpReLUSkipTranscoderConfig,
    JumpReLUTranscoderConfig,
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
    SkipTranscoderConfig,
    StandardSAEConfig,
    TopKSAEConfig,
    TranscoderConfig,
)
from sae_lens.saes.abstopk_sae import AbsTopKSAEConfig
from sae_lens.saes.sae import SAEMetadata
from safetensors.torch import load_file, save_file

METADATA = {
    "model_name": "gpt2-small",
    "hook_name": "blocks.8.hook_resid_pre",
    "context_size": 128,
    "prepend_bos": False,
    "sae_lens_version": "6.54.12",
}
TRANSCODER = {
    "d_out": D_OUT,
    "apply_b_dec_to_input": False,
    "metadata": SAEMetadata(
        **METADATA | {"hook_name": "blocks.8.ln2.hook_normalized", "hook_name_out": "blocks.8.hook_mlp_out"}
    ),
}
CASES = {
    "standard": (StandardSAEConfig, {}),
    "standard_without_b_dec": (StandardSAEConfig, {"apply_b_dec_to_input": False}),
    "gated": (GatedSAEConfig, {}),
    "jumprelu": (JumpReLUSAEConfig, {"apply_b_dec_to_input": False}),
    "topk": (TopKSAEConfig, {"k": K}),
    "topk_rescaled": (TopKSAEConfig, {"k": K, "rescale_acts_by_decoder_norm": True}),
    "abstopk": (AbsTopKSAEConfig, {"k": K}),
    "topk_layer_norm": (TopKSAEConfig, {"k": K, "normalize_activations": "layer_norm"}),
    "jumprelu_constant_norm": (JumpReLUSAEConfig, {"normalize_activations": "constant_norm_rescale"}),
    "transcoder": (TranscoderConfig, TRANSCODER),
    "skip_transcoder": (SkipTranscoderConfig, TRANSCODER),
    "jumprelu_transcoder": (JumpReLUTranscoderConfig, TRANSCODER),
    "jumprelu_skip_transcoder": (JumpReLUSkipTranscoderConfig, TRANSCODER),
}


def write(folder: Path, seed: int, config_class: type, arguments: dict) -> None:
    shared = {"d_in": D_IN, "d_sae": N_FEATURES, "metadata": SAEMetadata(**METADATA)}
    config = config_class(**shared | arguments)
    sae = SAE.get_sae_class_for_architecture(config.architecture())(config)
    randomise(sae, seed)
    sae.save_model(folder)
    save_behaviour(folder, sae, seed)


def save_behaviour(folder: Path, sae: SAE, seed: int, x: torch.Tensor | None = None) -> None:
    x = tokens(seed) if x is None else x
    with torch.no_grad():
        codes = sae.encode(x)
        save_expected(folder, x=x, codes=codes.to_dense() if codes.is_sparse else codes, output=sae(x))


def write_batch_topk(folder: Path, seed: int, *, matryoshka: bool) -> None:
    """Saved from training, which is when a batch rule becomes a JumpReLU SAE."""
    if matryoshka:
        config = MatryoshkaBatchTopKTrainingSAEConfig(d_in=D_IN, d_sae=N_FEATURES, k=K, matryoshka_widths=[4, 12])
        training = MatryoshkaBatchTopKTrainingSAE(config)
    else:
        training = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(d_in=D_IN, d_sae=N_FEATURES, k=K))
    randomise(training, seed)
    training.topk_threshold.fill_(0.6)
    training.save_inference_model(folder)
    save_behaviour(folder, SAE.load_from_disk(folder), seed)


def write_folded(folder: Path, seed: int) -> None:
    """Weights for scaled inputs with the scale beside them, as a training checkpoint has; SAELens folds it."""
    config = StandardSAEConfig(d_in=D_IN, d_sae=N_FEATURES, normalize_activations="expected_average_only_in")
    config.metadata = SAEMetadata(**METADATA)
    sae = SAE.get_sae_class_for_architecture("standard")(config)
    randomise(sae, seed)
    sae.save_model(folder)
    (folder / "activation_scaler.json").write_text(json.dumps({"scaling_factor": 1.75}))
    sae.fold_activation_norm_scaling_factor(1.75)
    save_behaviour(folder, sae, seed)


def write_legacy(folder: Path, source: Path, **changes: object) -> None:
    """The weights of `source` under a flat config in the manner of version 3, read back by today's SAELens."""
    config = json.loads((source / "cfg.json").read_text())
    kept = {name: config[name] for name in ("d_in", "d_sae", "dtype", "device")}
    legacy = kept | {"model_name": "gpt2-small", "hook_point": "blocks.8.hook_resid_pre", "context_size": 128} | changes
    folder.mkdir(parents=True)
    (folder / "cfg.json").write_text(json.dumps(legacy))
    tensors = load_file(source / "sae_weights.safetensors")
    save_file(tensors | {"scaling_factor": torch.ones(N_FEATURES)}, folder / "sae_weights.safetensors")
    save_behaviour(folder, SAE.load_from_disk(folder), 0, load_file(source / "expected.safetensors")["x"])


def main() -> None:
    out = out_folder()
    assert all(any(f.name == "metadata" for f in fields(config)) for config, _ in CASES.values())
    for seed, (name, (config_class, arguments)) in enumerate(CASES.items()):
        write(out / name, seed, config_class, arguments)
    write_batch_topk(out / "batchtopk", 50, matryoshka=False)
    write_batch_topk(out / "matryoshka_batchtopk", 51, matryoshka=True)
    write_folded(out / "expected_average", 52)
    write_legacy(out / "legacy_standard", out / "standard", activation_fn_str="relu")
    write_legacy(
        out / "legacy_topk",
        out / "topk",
        architecture="standard",
        activation_fn_str="topk",
        activation_fn_kwargs={"k": K},
        normalize_activations=False,
    )


if __name__ == "__main__":
    main()
