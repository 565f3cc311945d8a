"""How a language model reads out its residual stream: final norm and output embedding, and which Sites stand in it."""

import copy
from contextlib import suppress
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saekit.errors import SaekitError
from saekit.targets.names import DOWN_PROJECTION, OUT_PROJECTION, Place, find_blocks, find_place
from saekit.targets.site import Side, Site

_FINAL_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "final_norm", "norm_f")


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
    index, *inside = own.module.removeprefix(f"{blocks}.").split(".")
    places = _stream_of_block(model, index)
    if (own.module, own.side) in places:
        return True
    parent, _, name = own.module.rpartition(".")
    is_child = len(inside) == 1
    if own.side is Side.INPUT:  # of a norm that reads the stream, not of one of what is added to it
        return is_child and ("norm" in name or name.startswith("ln")) and (own.module, Side.OUTPUT) not in places
    # what a part of the block ends with is what the part gives; some blocks have that end without the part
    ends = name in (*OUT_PROJECTION, *DOWN_PROJECTION) and (parent, Side.OUTPUT) in places
    return ends or (is_child and name in (*DOWN_PROJECTION, "mixer"))


def _stream_of_block(model: nn.Module, index: str) -> set[Place]:
    """Where a block has the stream, or what it adds to it, by TransformerLens' names for these."""
    places: set[Place] = set()
    for hook in ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out"):
        with suppress(SaekitError):  # a model that does not compute it alone
            places.add(find_place(model, f"blocks.{index}.{hook}", Side.OUTPUT))
    return places
