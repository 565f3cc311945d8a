"""OpenAI's sparse autoencoders for GPT-2: one `.pt` with `pre_bias`, `latent_bias` and two linear layers.

    a     = activation(E (x' - pre_bias) + latent_bias)
    x_hat = (D a + pre_bias) * std + mean

TopK SAEs, and only these, read each token after layer normalisation (`x'`, with the deviation of a sample). The
file does not say where it belongs; the published paths do: `.../resid_post_mlp/.../8.pt`.
"""

import re

from saekit.errors import FileError
from saekit.formats.files import Files
from saekit.formats.weights import Weights, relu
from saekit.normalisation import LayerNorm, Plain
from saekit.selection import TopK

_HOOKS = {
    "mlp_post_act": "mlp.hook_post",
    "resid_delta_attn": "hook_attn_out",
    "resid_post_attn": "hook_resid_mid",
    "resid_delta_mlp": "hook_mlp_out",
    "resid_post_mlp": "hook_resid_post",
}


def recognises(files: Files) -> bool:
    return "pre_bias" in files.tensors and "latent_bias" in files.tensors


def read(files: Files) -> Weights:
    """The SAE of one of OpenAI's files.

    Raises:
        FileError: an activation other than ReLU and TopK.
    """
    tensors, activation = files.tensors, files.rest.text("activation", "ReLU")
    if activation not in ("ReLU", "TopK"):
        raise FileError(f"{files.weights}: activation is {activation!r}; expected ReLU or TopK")
    is_topk = activation == "TopK"
    found = re.search(rf"({'|'.join(_HOOKS)}).*?(?:layer_?|/)([0-9]+)(?:\.pt|/)", files.place)
    return Weights(
        encoder=tensors["encoder.weight"],
        decoder=tensors["decoder.weight"].T,
        b_enc=tensors["latent_bias"],
        b_dec=tensors["pre_bias"],
        rule=TopK(files.rest.part("activation_state_dict").number("k")) if is_topk else relu(),
        normalisation=LayerNorm() if is_topk else Plain(),
        hook_name=f"blocks.{found[2]}.{_HOOKS[found[1]]}" if found else "",
        model_name="gpt2" if found else "",
    )
