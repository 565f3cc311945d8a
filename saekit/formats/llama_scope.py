"""Llama Scope: JumpReLU with inputs brought to a mean norm of sqrt(d); b_dec is never subtracted from the input.

    first         `hyperparams.json`, `checkpoints/final.safetensors`; one threshold for all features
    R1 distill    `config.json`, `sae_weights.safetensors` with `log_jumprelu_threshold`

The first keeps its threshold in units of the raw input, while what it is compared with comes from scaled inputs; so
it is multiplied with the scale here, as its authors do. What their present code writes (`sae_type` in the config,
`W_E`, `W_D`) is not read yet.
"""

from collections.abc import Mapping
from dataclasses import replace

from saekit.errors import FileError
from saekit.formats.files import Config, Files
from saekit.formats.weights import Weights, cuts, linear
from saekit.selection import Threshold


def recognises(files: Files) -> bool:
    return (
        "jump_relu_threshold" in files.config
        or "log_jumprelu_threshold" in files.tensors
        or ("W_E" in files.tensors and "W_D" in files.tensors)
    )


def read(files: Files) -> Weights:
    """The SAE or transcoder of a Llama Scope folder.

    Raises:
        FileError: a folder of the present code, or a scale that is not a number above zero.
    """
    config, tensors = files.config, files.tensors
    if "W_E" in tensors:
        raise FileError(
            f"{files.weights} is in the format of present-day Llamascopium, which saekit does not read; save it there "
            "as a SAELens folder, or take a release in the older format"
        )
    hook_in = config.text("hook_point_in")
    hook_out = config.text("hook_point_out")
    is_transcoder = bool(hook_out) and hook_out != hook_in
    scale, out_scale = _scale(config, "in"), _scale(config, "out" if is_transcoder else "in")
    if "log_jumprelu_threshold" in tensors:
        rule = cuts(tensors["log_jumprelu_threshold"].float().exp())
    else:
        rule = Threshold(config.real("jump_relu_threshold") * (1.0 if scale is None else scale))
    weights = Weights(
        **linear(tensors),
        b_dec=tensors["decoder.bias"],
        rule=rule,
        apply_b_dec_to_input=False,
        hook_name=hook_in,
        hook_name_out=hook_out if is_transcoder else "",
        input_scale=scale,
    )
    # the output's scale of its own; the input's is folded with it later
    relative = 1.0 if scale is None or out_scale is None else out_scale / scale
    return replace(weights, decoder=weights.decoder.float() / relative, b_dec=weights.b_dec.float() / relative)


def _scale(config: Config, end: str) -> float | None:
    """sqrt(d) over the mean norm of the data at that end; None where the config does not tell it."""
    if not isinstance(config.get("dataset_average_activation_norm"), Mapping):
        return None
    norm = config.part("dataset_average_activation_norm").real(end)
    if not norm > 0:
        raise FileError(f"{config.path}: dataset_average_activation_norm is {norm}; expected a number above zero")
    return config.number("d_model") ** 0.5 / norm
