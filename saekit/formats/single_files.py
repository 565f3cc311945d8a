"""Releases that are one file each, with two linear maps and little else.

Goodfire          relu(encoder_linear(x)), decoder_linear; nothing subtracted
Qwen Scope        `layer5.sae.pt`: W_enc (n_features, d), W_dec (d, n_features), TopK with the k of the repository's
                  name (`...-W32K-L0_50`), which must be in the path; b_dec is not subtracted
circuit-tracer    `layer_5.safetensors`: transcoders of one layer, W_enc (n_features, d), W_dec (n_features, d),
                  ReLU or JumpReLU, and W_skip in some; their `config.yaml` says the model
"""

import re

from saekit.errors import FileError
from saekit.formats.files import Files
from saekit.formats.weights import Weights, cuts, linear, relu
from saekit.selection import TopK

_PER_LAYER = re.compile(r"layer_([0-9]+)\.safetensors")
_QWEN_LAYER = re.compile(r"layer([0-9]+)\.sae\.pt")
_MATRICES = {"W_enc", "W_dec", "b_enc", "b_dec"}


def is_goodfire(files: Files) -> bool:
    return "encoder_linear.weight" in files.tensors


def read_goodfire(files: Files) -> Weights:
    """One of Goodfire's SAEs on Llama; the file's name says model and layer (`Llama-3.1-8B-Instruct-SAE-l19.pth`)."""
    found = re.fullmatch(r"(Llama-.+)-SAE-l([0-9]+)", files.weights.stem)
    return Weights(
        **linear(files.tensors, "encoder_linear", "decoder_linear"),
        b_dec=files.tensors["decoder_linear.bias"],
        rule=relu(),
        apply_b_dec_to_input=False,
        hook_name=f"model.layers.{found[2]}" if found else "",
        model_name=f"meta-llama/{found[1]}" if found else "",
    )


def is_qwen_scope(files: Files) -> bool:
    return bool(_QWEN_LAYER.fullmatch(files.weights.name)) and set(files.tensors) >= _MATRICES


def read_qwen_scope(files: Files) -> Weights:
    """One layer of Qwen Scope.

    Raises:
        FileError: if nothing in the path says how many features are active.
    """
    tensors, k = files.tensors, re.search(r"-W[0-9]+K-L0_([0-9]+)", files.place)
    if k is None:
        raise FileError(
            f"{files.weights} does not say how many features are active, and neither does its path; keep it in a "
            "folder with the name of its repository, which ends in -L0_ and that number"
        )
    layer = _QWEN_LAYER.fullmatch(files.weights.name)
    return Weights(
        encoder=tensors["W_enc"],
        decoder=tensors["W_dec"].T,
        b_enc=tensors["b_enc"],
        b_dec=tensors["b_dec"],
        rule=TopK(int(k[1])),
        apply_b_dec_to_input=False,
        hook_name=f"model.layers.{layer[1]}" if layer else "",
    )


def is_circuit_tracer(files: Files) -> bool:
    return bool(_PER_LAYER.fullmatch(files.weights.name)) and set(files.tensors) >= _MATRICES


def read_circuit_tracer(files: Files) -> Weights:
    """The transcoder of one layer, in the layout of circuit-tracer's per-layer sets."""
    tensors, settings = files.tensors, files.sibling("config.yaml")
    layer = _PER_LAYER.fullmatch(files.weights.name)
    threshold = next((tensors[name] for name in tensors if name.endswith("threshold")), None)
    return Weights(
        encoder=tensors["W_enc"],
        decoder=tensors["W_dec"],
        b_enc=tensors["b_enc"],
        b_dec=tensors["b_dec"],
        rule=relu() if threshold is None else cuts(threshold),
        skip=tensors.get("W_skip"),
        apply_b_dec_to_input=False,
        hook_name=f"blocks.{layer[1]}.{settings.text('feature_input_hook', 'mlp.hook_in')}" if layer else "",
        hook_name_out=f"blocks.{layer[1]}.{settings.text('feature_output_hook', 'hook_mlp_out')}" if layer else "",
        model_name=settings.text("model_name"),
    )
