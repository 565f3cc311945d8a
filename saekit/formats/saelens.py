"""SAELens' folder: `cfg.json` and `sae_weights.safetensors`, of version 6 and of the flat kind before it.

    standard, transcoder, skip_transcoder           relu(u @ W_enc + b_enc)
    jumprelu, jumprelu_..., (batchtopk once saved)  the same where it exceeds `threshold`
    gated                                           1[u @ W_enc + b_gate > 0] * relu(u @ (W_enc * exp(r_mag)) + b_mag)
    topk, abstopk                                   k largest; compared after multiplication with the norms of
                                                    W_dec's rows if `rescale_acts_by_decoder_norm`

`u` is the input after `normalize_activations`, less b_dec if `apply_b_dec_to_input`; transcoders never subtract it.
`expected_average_only_in` multiplies inputs with one number, which is folded here: it is in `activation_scaler.json`
of a training checkpoint, or in nothing but SAELens' list of SAEs. `covariance_whitening` is a linear map of the inputs,
folded too: it is in `activation_whitening.safetensors` of a training checkpoint.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from saekit.errors import FileError, SaekitError
from saekit.formats.files import Config, Files
from saekit.formats.weights import Weights, cuts, gated, relu, with_unit_decoder, with_whitening
from saekit.normalisation import ConstantNorm, LayerNorm, Normalisation, Plain
from saekit.selection import AbsTopK, Threshold, TopK

_WHITENING = "covariance_whitening"
_NORMALISATIONS: dict[str, Normalisation] = {
    "none": Plain(),
    "expected_average_only_in": Plain(),
    "constant_norm_rescale": ConstantNorm(),
    "layer_norm": LayerNorm(),
    _WHITENING: Plain(),
}
_TRANSCODERS = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")
_ARCHITECTURES = ("standard", "gated", "jumprelu", "topk", "abstopk", *_TRANSCODERS)
_BLOCK = re.compile(r"(?:[a-z_]+\.)*(?:layers|h|blocks)\.([0-9]+)(?::(in|out))?")
_RENAMED = {"hook_point": "hook_name", "hook_point_head_index": "hook_head_index", "activation_fn_str": "activation_fn"}
_MODEL_FACTS = (
    "model_name", "hook_name", "hook_name_out", "context_size", "prepend_bos", "dataset_path", "hook_head_index",
    "model_from_pretrained_kwargs", "model_class_name", "seqpos_slice", "neuronpedia_id", "sae_lens_version",
)  # fmt: skip


def recognises(files: Files) -> bool:
    return files.weights.name == "sae_weights.safetensors" and ("W_dec" in files.tensors or "d_sae" in files.config)


def read(files: Files) -> Weights:
    """The SAE of a SAELens folder.

    Raises:
        FileError: an architecture or a normalisation that saekit has no equal of, or no `cfg.json`, which says them.
    """
    if not files.config:
        raise FileError(f"{files.weights} has no cfg.json beside it, which says its rule; copy the folder whole")
    config, tensors = _modern(files.config), files.tensors
    architecture = config.text("architecture", "standard")
    if architecture not in _ARCHITECTURES:
        raise FileError(f"{config.path}: architecture is {architecture!r}, {_advice(architecture)}")
    facts = config.part("metadata")
    is_transcoder = architecture in _TRANSCODERS
    weights = Weights(
        decoder=tensors["W_dec"],
        b_dec=tensors["b_dec"],
        **_encoder(architecture, config, tensors),
        normalisation=_normalisation(config, is_transcoder=is_transcoder),
        skip=tensors["W_skip"] if "skip" in architecture else None,
        apply_b_dec_to_input=not is_transcoder and config.flag("apply_b_dec_to_input", default=True),
        hook_name=facts.text("hook_name"),
        hook_name_out=facts.text("hook_name_out"),
        model_name=facts.text("model_name"),
        context_size=facts.count("context_size"),
        input_scale=_input_scale(config, files.sibling("activation_scaler.json")),
        metadata=_metadata(facts),
    )
    if config.flag("rescale_acts_by_decoder_norm"):
        weights = with_unit_decoder(weights)
    if config.get("normalize_activations") == _WHITENING:
        found = files.sibling_tensors("activation_whitening.safetensors")
        weights = with_whitening(weights, mean=found["mean"], matrix=found["matrix"], inverse=found["inverse_matrix"])
    if "scaling_factor" in tensors:  # learnt after training, one for each feature; all ones in most files
        weights = replace(weights, decoder=weights.decoder * tensors["scaling_factor"][:, None])
    return weights


def _modern(config: Config) -> Config:
    """A config in the form of version 6."""
    if "metadata" in config:
        return config
    flat = {_RENAMED.get(name, name): value for name, value in config.items()}
    settings = dict(flat)
    if flat.get("activation_fn") == "topk":
        arguments = flat.get("activation_fn_kwargs")
        settings |= {"architecture": "topk", "k": arguments.get("k") if isinstance(arguments, Mapping) else None}
    elif flat.get("activation_fn") not in (None, "relu"):
        raise FileError(
            f"{config.path}: activation_fn is {flat['activation_fn']!r}, which saekit has no rule for; "
            "relu and topk are read"
        )
    if isinstance(flat.get("normalize_activations"), bool):
        settings["normalize_activations"] = "expected_average_only_in" if flat["normalize_activations"] else "none"
    settings["metadata"] = {"prepend_bos": True} | {name: flat[name] for name in _MODEL_FACTS if name in flat}
    return Config(config.path, config.kind, settings)


def _encoder(architecture: str, config: Config, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    encoder = tensors["W_enc"].T
    if architecture == "gated":
        return gated(encoder, b_gate=tensors["b_gate"], r_mag=tensors["r_mag"], b_mag=tensors["b_mag"])
    if architecture == "topk":
        rule = TopK(config.number("k"))
    elif architecture == "abstopk":
        rule = AbsTopK(config.number("k"))
    else:
        rule = cuts(tensors["threshold"]) if architecture.startswith("jumprelu") else relu()
    return {"encoder": encoder, "b_enc": tensors["b_enc"], "rule": rule}


def _normalisation(config: Config, *, is_transcoder: bool) -> Normalisation:
    name = config.text("normalize_activations", "none")
    if name not in _NORMALISATIONS:
        raise FileError(
            f"{config.path}: normalize_activations is {name!r}; saekit reads {', '.join(_NORMALISATIONS)}: "
            "save the SAE with a SAELens that knows one of these"
        )
    if is_transcoder and (name == _WHITENING or _NORMALISATIONS[name].needs_input):
        raise FileError(
            f"{config.path}: a transcoder with normalize_activations {name!r} has no defined output scale; "
            "only none and expected_average_only_in are read"
        )
    return _NORMALISATIONS[name]


def _input_scale(config: Config, saved: Config) -> float | None:
    if config.get("normalize_activations") != "expected_average_only_in":
        return 1.0
    return None if saved.get("scaling_factor") is None else saved.real("scaling_factor")


def _metadata(facts: Config) -> dict[str, Any]:
    """What has no field of its own; `row_bos` is saekit's word for `prepend_bos`."""
    own = ("hook_name", "hook_name_out", "model_name", "context_size", "prepend_bos")
    bos = {} if facts.get("prepend_bos") is None else {"row_bos": facts.flag("prepend_bos")}
    return {name: value for name, value in facts.items() if name not in own} | bos


def _advice(architecture: str) -> str:
    if architecture == "saekit":
        return "a folder of saekit's own; load it with a saekit that is not older than it"
    if "batchtopk" in architecture:
        return "which is one of training; save it with SAELens' save_inference_model, which makes it a jumprelu"
    return f"which saekit has no equal of; it reads {', '.join(_ARCHITECTURES)}"


def check_lossless(weights: Weights) -> None:
    """Whether saekit's own folder, which is one of SAELens', behaves there as it does here.

    Raises:
        SaekitError: if SAELens has no such SAE.
    """
    rule, is_transcoder = weights.rule, bool(weights.hook_name_out) or weights.d_out != weights.d_in
    if rule.looks_across_tokens:
        raise SaekitError(
            f"{type(rule).__name__} decides over a batch, which no other tool serves; give the SAE the thresholds of "
            "saekit.training.calibrate.calibrate first, as `saekit train` does"
        )
    if weights.normalisation not in _NORMALISATIONS.values():
        raise SaekitError(f"SAELens has no {weights.normalisation!r}; keep this SAE in saekit's own format")
    if is_transcoder and not isinstance(rule, Threshold):
        raise SaekitError(f"SAELens has no transcoder with {type(rule).__name__}; only ReLU and JumpReLU ones convert")
    if is_transcoder and weights.apply_b_dec_to_input:
        raise SaekitError("transcoders of SAELens never subtract b_dec from their input, this one does")
    known = isinstance(rule, AbsTopK) or (isinstance(rule, Threshold | TopK) and rule.relu)
    if not known or (weights.skip is not None and not is_transcoder):
        skip = " with a skip connection" if weights.skip is not None else ""
        raise SaekitError(f"SAELens has no SAE with {rule!r}{skip}; keep this one in saekit's own format")


def hook_name(site: str) -> str:
    """TransformerLens' name for the residual stream around a block; other Sites as they are."""
    block = _BLOCK.fullmatch(site)
    return f"blocks.{block[1]}.hook_resid_{'pre' if block[2] == 'in' else 'post'}" if block else site
