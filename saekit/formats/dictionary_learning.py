"""dictionary_learning: `ae.pt` and a `config.json` that names one of seven classes.

    AutoEncoder             relu(E(x - bias) + e)                              D a + bias
    AutoEncoderNew          relu(E x + e)                                      D a + decoder.bias
    GatedAutoEncoder        1[p + gate_bias > 0] * relu(exp(r_mag) p + mag_bias),  p = E(x - decoder_bias)
    AutoEncoderTopK         k largest of relu(E(x - b_dec) + e); the stored threshold is not used
    BatchTopKSAE            relu(E(x - b_dec) + e) where it exceeds the stored threshold, as that class does by default
    MatryoshkaBatchTopKSAE  the same, from W_enc and W_dec
    JumpReluAutoEncoder     h = x @ W_enc + b_enc where it exceeds threshold; b_dec is not subtracted

Codes are those of the class as stored, before that library's loader scales decoder columns to unit norm. A backup
holds weights for activations divided by its `norm_factor`; they are brought to raw units as that library does at
the end of training. Without a config the class is told from the names of the tensors, but for TopK and BatchTopK,
which have the same ones.
"""

from dataclasses import replace
from typing import Any

from saekit.errors import FileError
from saekit.formats.files import Config, Files
from saekit.formats.weights import Weights, cuts, gated, linear, relu
from saekit.selection import Threshold, TopK

# `submodule_name` is no module of the model but a word for one
_HOOKS = {"resid_post": "hook_resid_post", "attention_out": "hook_attn_out", "mlp_out": "hook_mlp_out"}
_CLASSES = (
    "AutoEncoder",
    "AutoEncoderNew",
    "GatedAutoEncoder",
    "AutoEncoderTopK",
    "BatchTopKSAE",
    "MatryoshkaBatchTopKSAE",
    "JumpReluAutoEncoder",
)


def recognises(files: Files) -> bool:
    return files.weights.suffix != ".safetensors" and ("trainer" in files.config or _class_by_tensors(files) != "")


def read(files: Files) -> Weights:
    """The SAE of a dictionary_learning folder, or of its `ae.pt` alone.

    Raises:
        FileError: a class that is not one of the seven, or none to be found.
    """
    # a backup carries the trainer's config itself
    trainer = files.config.part("trainer") if "trainer" in files.config else files.rest.part("config")
    kind = trainer.text("dict_class") or _class_by_tensors(files)
    if kind not in _CLASSES:
        raise FileError(
            f"{trainer.path}: dict_class is {kind!r}; expected one of {', '.join(_CLASSES)} in config.json beside the "
            "weights"
        )
    buffer = files.config.part("buffer")
    weights = Weights(
        **_tensors(kind, files, trainer),
        hook_name=_site(trainer, buffer),
        model_name=trainer.text("lm_name"),
        context_size=buffer.count("ctx_len"),
        metadata={"dict_class": kind, **{name: trainer[name] for name in ("layer", "steps", "lr") if name in trainer}},
    )
    factor = files.rest.get("norm_factor")
    return weights if factor is None else _in_raw_units(weights, files.rest.real("norm_factor"))


def _tensors(kind: str, files: Files, trainer: Config) -> dict[str, Any]:
    t = files.tensors
    match kind:
        case "AutoEncoder":
            return {**linear(t), "b_dec": t["bias"], "rule": relu()}
        case "AutoEncoderNew":
            return {**linear(t), "b_dec": t["decoder.bias"], "rule": relu(), "apply_b_dec_to_input": False}
        case "GatedAutoEncoder":
            encoder = gated(t["encoder.weight"], b_gate=t["gate_bias"], r_mag=t["r_mag"], b_mag=t["mag_bias"])
            return {**encoder, "decoder": t["decoder.weight"].T, "b_dec": t["decoder_bias"]}
        case "AutoEncoderTopK":
            k = int(t["k"]) if "k" in t else trainer.number("k")
            return {**linear(t), "b_dec": t["b_dec"], "rule": TopK(k)}
        case "BatchTopKSAE":
            return {**linear(t), "b_dec": t["b_dec"], "rule": cuts(t["threshold"])}
        case _:
            matrices = {"encoder": t["W_enc"].T, "b_enc": t["b_enc"], "decoder": t["W_dec"], "b_dec": t["b_dec"]}
            rule = cuts(t["threshold"])
            return {**matrices, "rule": rule, "apply_b_dec_to_input": kind != "JumpReluAutoEncoder"}


def _class_by_tensors(files: Files) -> str:
    names = set(files.tensors)
    own = {"group_sizes": "MatryoshkaBatchTopKSAE", "gate_bias": "GatedAutoEncoder", "decoder.bias": "AutoEncoderNew"}
    for name, kind in own.items():
        if name in names:
            return kind
    if {"encoder.weight", "bias"} <= names:
        return "AutoEncoder"
    return "JumpReluAutoEncoder" if {"W_enc", "b_dec", "threshold"} <= names else ""


def _site(trainer: Config, buffer: Config) -> str:
    """In the manner of TransformerLens where the name is one of the library's own; else the module's name."""
    name, layer = trainer.text("submodule_name"), trainer.get("layer")
    hook = next((hook for word, hook in _HOOKS.items() if name.startswith(word)), None)
    if hook is not None and layer is not None:
        return f"blocks.{layer}.{hook}"
    return f"{name}:in" if name and buffer.text("io") == "in" else name


def _in_raw_units(weights: Weights, factor: float) -> Weights:
    rule = weights.rule
    return replace(
        weights,
        b_enc=weights.b_enc * factor,
        b_dec=weights.b_dec * factor,
        rule=Threshold(rule.theta * factor) if isinstance(rule, Threshold) else rule,
    )
