"""How a language model reads out its residual stream: final norm and output embedding, and which Sites stand in it."""

import copy
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saekit.targets.names import ATTENTION, DOWN_PROJECTION, MLP, OUT_PROJECTION, find_blocks
from saekit.targets.site import Side, Site

_FINAL_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "final_norm", "norm_f")
# Gemma 2 and 3 norm what a block's parts write before it is added; elsewhere the first of these is read from the stream
_NORMS_OF_WRITERS = ("post_attention_layernorm", "post_feedforward_layernorm")
_HAS_THEM = "pre_feedforward_layernorm"


def find_head(model: nn.Module) -> nn.Module | None:
    """What turns the normed stream into logits."""
    find: Any = getattr(model, "get_output_embeddings", None)
    return find() if find is not None else None


def find_final_norm(model: nn.Module) -> nn.Module | None:
    """The norm behind the last block, by the names it usually has."""
    body = getattr(model, "base_model", model)
    # OPT and its relatives keep it beside the blocks, one floor down
    places = (body, getattr(body, "decoder", None))
    norms = (getattr(place, name, None) for place in places for name in _FINAL_NORMS)
    return next((norm for norm in norms if isinstance(norm, nn.Module)), None)


def stream_to_logits(model: nn.Module, d_model: int) -> Float[Tensor, "vocab d_model"] | None:
    """What each token's logit gains by a direction of the residual stream, up to the scale of the final norm.

    That scale depends on the text. The norm's weight is folded in, as the norm itself applies it (Gemma's is
    `1 + weight`), and its centring where it has one. None if there is no such embedding of this width, or no norm to
    be found.
    """
    weight, norm = getattr(find_head(model), "weight", None), find_final_norm(model)
    if norm is None or not isinstance(weight, Tensor) or weight.ndim != 2 or weight.shape[1] != d_model:
        return None
    gain, centres = _gain(norm, d_model)
    matrix = weight.detach().float().cpu() * gain
    return matrix - matrix.mean(1, keepdim=True) if centres else matrix


@torch.no_grad()
def _gain(norm: nn.Module, d_model: int) -> tuple[Float[Tensor, " d_model"], bool]:
    """By what a norm multiplies each scaled number, and whether it takes the mean away; read off two inputs."""
    norm = copy.deepcopy(norm).float().cpu()
    x = 1e3 * torch.ones(1, 1, d_model)  # so large that no epsilon matters
    x[..., 1::2] *= -1
    up, down = norm(x), norm(-x)
    centres = torch.allclose(norm(x + 500), up, rtol=1e-3, atol=1e-3)
    scaled = x - x.mean() if centres else x
    scaled = scaled / scaled.square().mean().sqrt()
    return ((up - down) / 2 / scaled)[0, 0], centres


def is_in_stream(model: nn.Module, site: Site) -> bool:
    """Whether a Site is the residual stream, or is added to it as it is; False where there is no way to tell."""
    own, blocks = site.resolve(model), find_blocks(model)
    module = model.get_submodule(own.module)
    embed: Any = getattr(model, "get_input_embeddings", lambda: None)()
    if own.side is Side.OUTPUT and module is embed:
        return True
    if own.side is Side.INPUT and module is find_final_norm(model):
        return True
    if blocks is None or not own.module.startswith(f"{blocks}."):
        return False
    index, *rest = own.module.removeprefix(f"{blocks}.").split(".")
    if not rest:
        return True
    has_norms_of_writers = hasattr(model.get_submodule(f"{blocks}.{index}"), _HAS_THEM)
    if own.side is Side.INPUT:
        reads = len(rest) == 1 and ("norm" in rest[0] or rest[0].startswith("ln"))
        return reads and not (has_norms_of_writers and rest[0] in _NORMS_OF_WRITERS)
    if has_norms_of_writers:
        return len(rest) == 1 and rest[0] in _NORMS_OF_WRITERS
    if rest[0] in ATTENTION:
        return len(rest) == 1 or rest[1:] in [[name] for name in OUT_PROJECTION]
    if rest[0] in (*MLP, "mixer"):
        return len(rest) == 1 or rest[1:] in [[name] for name in DOWN_PROJECTION]
    return rest in [[name] for name in DOWN_PROJECTION]
