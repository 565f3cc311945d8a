"""Gemma Scope (`params.npz`, Gemma 2) and Gemma Scope 2 (`params.safetensors`, Gemma 3): JumpReLU, no scaling.

    codes = h where h = x @ W_enc + b_enc exceeds threshold      b_dec is never subtracted from the input
    x_hat = codes @ W_dec + b_dec + x @ affine_skip_connection

The files of the first do not say where they belong, those of the second may not; paths do:
`gemma-scope-2b-pt-res/layer_20/width_16k/...`, `gemma-scope-2-1b-pt/resid_post/layer_12_...`. SAEs on embeddings
were trained before Gemma multiplies those with sqrt(d), and hook_embed comes after: their two matrices are scaled, and
b_dec is not, as in SAELens.
"""

import re
from dataclasses import replace

from torch import Tensor

from saekit.errors import FileError
from saekit.formats.files import Files
from saekit.formats.weights import Weights, cuts

_FIRST = re.compile(r"gemma-scope-(?P<size>2b|9b|27b)-(?P<tuning>pt|it)-(?P<kind>res|mlp|att|transcoders)")
_SECOND = re.compile(r"gemma-scope-2-(?P<size>[0-9]+[mb])-(?P<tuning>pt|it)")
_HOOKS = {"res": "hook_resid_post", "mlp": "hook_mlp_out", "att": "attn.hook_z", "transcoders": "ln2.hook_normalized"}
_SECOND_HOOKS = {
    "resid_post": ("model.layers.{}", ""),
    "attn_out": ("model.layers.{}.self_attn.o_proj:in", ""),
    "mlp_out": ("model.layers.{}.post_feedforward_layernorm", ""),
    "transcoder": (
        "model.layers.{}.pre_feedforward_layernorm",
        "model.layers.{}.post_feedforward_layernorm",
    ),
}


def recognises(files: Files) -> bool:
    names = {name.lower() for name in files.tensors}
    return {"w_enc", "w_dec", "b_enc", "b_dec", "threshold"} <= names and (
        files.weights.suffix == ".npz" or "w_enc" in files.tensors
    )


def read(files: Files) -> Weights:
    """The SAE or transcoder of one folder of either release.

    Raises:
        FileError: a cross-layer transcoder, whose decoder writes several layers.
    """
    decoder = _either(files, "w_dec")
    if decoder.ndim == 3:
        raise FileError(
            f"{files.weights} is part of a cross-layer transcoder (decoder {tuple(decoder.shape)}), which writes many "
            "layers at once; saekit reads transcoders of one layer"
        )
    weights = Weights(
        encoder=_either(files, "w_enc").T,
        decoder=decoder,
        b_enc=_either(files, "b_enc"),
        b_dec=_either(files, "b_dec"),
        rule=cuts(_either(files, "threshold")),
        skip=files.tensors["affine_skip_connection"].T if "affine_skip_connection" in files.tensors else None,
        apply_b_dec_to_input=False,
    )
    if files.weights.suffix == ".npz":
        return _placed_first(weights, files.place)
    return _placed_second(weights, files)


def _either(files: Files, name: str) -> Tensor:
    capital = name.replace("w_", "W_")
    return files.tensors[capital if capital in files.tensors else name]


def _placed_first(weights: Weights, place: str) -> Weights:
    release, layer = _FIRST.search(place), re.search(r"/layer_([0-9]+)/", place)
    if "/embedding/" in place:
        root = weights.d_in**0.5
        weights = replace(weights, encoder=weights.encoder / root, decoder=weights.decoder * root)
    if release is None or not (layer or "/embedding/" in place):
        return weights
    kind = release["kind"]
    hook_out = f"blocks.{layer[1]}.hook_mlp_out" if layer and kind == "transcoders" else ""
    return replace(
        weights,
        hook_name=f"blocks.{layer[1]}.{_HOOKS[kind]}" if layer else "hook_embed",
        hook_name_out=hook_out,
        model_name=f"google/gemma-2-{release['size']}{'-it' if release['tuning'] == 'it' else ''}",
    )


def _placed_second(weights: Weights, files: Files) -> Weights:
    release, layer = _SECOND.search(files.place), re.search(r"layer_([0-9]+)", files.place)
    config = files.config
    model = config.text("model_name") or (f"gemma-3-{release['size']}-{release['tuning']}" if release else "")
    if model:
        model = "google/" + model.removeprefix("google/").replace("-v3", "-3")
        model = model.replace("-pt", "") if "270m" in model else model
    kind = next((kind for kind in _SECOND_HOOKS if kind in files.place), None)
    site, site_out = _SECOND_HOOKS[kind] if kind else ("", "")
    return replace(
        weights,
        model_name=model,
        hook_name=site.format(layer[1]) if layer else "",
        hook_name_out=site_out.format(layer[1]) if layer else "",
        metadata={name: config[name] for name in ("hf_hook_point_in", "hf_hook_point_out") if name in config},
    )
