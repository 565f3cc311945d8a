"""EleutherAI's sparsify: `cfg.json` and `sae.safetensors` in a folder that is named after the module.

    codes = top k (or the largest of each of k groups) of relu(u @ encoder.weight.T + encoder.bias)
    x_hat = codes @ W_dec + b_dec + x @ W_skip.T          W_skip only if `skip_connection`

`u` is `x - b_dec`, or `x` itself with `transcode`, which reads the module's input and writes its output. `W_dec` is
stored `(n_features, d)`. `num_latents` 0 means `expansion_factor * d_in`; the shapes say it anyway.
"""

import re
from typing import Any

from torch import Tensor

from saekit.errors import FileError, SaekitError
from saekit.formats.files import Files
from saekit.formats.weights import Weights
from saekit.normalisation import Plain
from saekit.selection import GroupMax, TopK

WEIGHTS_FILE = "sae.safetensors"
_RULES = {"topk": TopK, "groupmax": GroupMax}
# a module of a Hugging Face model, as folders of published runs are named; any other name says nothing
_HOOKPOINT = re.compile(r"(?:[a-z_]+\.)*(?:(?:layers|h|blocks)\.[0-9]+(?:\.[a-z_]+)*|embed_tokens|wte)")


def recognises(files: Files) -> bool:
    return "encoder.weight" in files.tensors and "W_dec" in files.tensors and "k" in files.config


def read(files: Files) -> Weights:
    """The SAE or transcoder of a sparsify folder.

    Raises:
        FileError: an activation that saekit has no rule for.
    """
    config, tensors, run = files.config, files.tensors, files.above("config.json")
    activation = config.text("activation", "topk")
    if activation not in _RULES or config.flag("signed"):
        raise FileError(
            f"{config.path}: activation is {activation!r}{', signed' if config.flag('signed') else ''}; "
            f"saekit reads {', '.join(_RULES)}, not signed"
        )
    module = files.folder.name if _HOOKPOINT.fullmatch(files.folder.name) else ""
    transcode = config.flag("transcode")
    return Weights(
        encoder=tensors["encoder.weight"],
        decoder=tensors["W_dec"],
        b_enc=tensors["encoder.bias"],
        b_dec=tensors["b_dec"],
        rule=_RULES[activation](config.number("k")),
        skip=tensors["W_skip"] if config.flag("skip_connection") else None,
        apply_b_dec_to_input=not transcode,
        hook_name=f"{module}:in" if module and transcode else module,
        hook_name_out=module if transcode else "",
        model_name=run.text("model"),
        context_size=run.count("ctx_len"),
        metadata={"dataset_path": run.text("dataset")} if run.text("dataset") else {},
    )


def write(weights: Weights) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and tensors of a sparsify folder that behaves the same.

    Raises:
        SaekitError: if sparsify has no such SAE.
    """
    rule = weights.rule
    if not (isinstance(rule, GroupMax) or (isinstance(rule, TopK) and rule.relu)):
        kept = f"{type(rule).__name__}{'' if getattr(rule, 'relu', True) else ' without ReLU'}"
        raise SaekitError(f"sparsify keeps a fixed number of features per token, {kept} does not; convert to saelens")
    if weights.normalisation != Plain():
        raise SaekitError(f"sparsify does not scale tokens, {weights.normalisation!r} does; convert to saelens")
    if weights.d_out != weights.d_in:
        raise SaekitError(
            f"sparsify writes as many numbers as it reads, this transcoder {weights.d_in} to {weights.d_out}"
        )
    expansion, left_over = divmod(weights.n_features, weights.d_in)
    config = {
        "activation": "groupmax" if isinstance(rule, GroupMax) else "topk",
        "expansion_factor": max(1, expansion),
        "normalize_decoder": False,
        "num_latents": weights.n_features if left_over or not expansion else 0,
        "k": rule.k,
        "multi_topk": False,
        "skip_connection": weights.skip is not None,
        "transcode": not weights.apply_b_dec_to_input,
        "d_in": weights.d_in,
    }
    tensors = {
        "encoder.weight": weights.encoder,
        "encoder.bias": weights.b_enc,
        "W_dec": weights.decoder,
        "b_dec": weights.b_dec,
        **({"W_skip": weights.skip} if weights.skip is not None else {}),
    }
    return config, tensors
