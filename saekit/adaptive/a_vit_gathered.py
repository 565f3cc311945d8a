"""A-ViT's inference with halted tokens really removed: the same answers as the masked pass, in less time.

The released code never removes tokens, so both ways are ours:

    padded   after each block the live tokens move to the front, and the batch is cut to the longest row
    packed   one flat list of live tokens; padding for attention alone; an image whose class token has stopped
             goes as a whole, since nothing can change its answer any more

A hook on the model sees what is there: flat or shortened tensors. For traces and interventions use the masked pass.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saekit.adaptive.a_vit import AViT, AViTLayer, share_of

Images = Float[Tensor, "batch channels height width"]
Depths = Int[Tensor, "batch tokens"]


@dataclass(slots=True)
class _Rest:
    """What goes on from layer to layer: of every image the average, of every token what is spent and left of its 1.

    `depths` is where each token stops, if that is given and not decided.
    """

    average: Tensor
    spent: Tensor
    left: Tensor
    depths: Tensor | None

    def keep(self, pick: Callable[[Tensor], Tensor]) -> None:
        """Go on with some of the tokens."""
        self.spent, self.left = pick(self.spent), pick(self.left)
        self.depths = None if self.depths is None else pick(self.depths)


@torch.no_grad()
def run_padded(model: AViT, images: Images, depths: Depths | None = None) -> Float[Tensor, "batch classes"]:
    """Logits, as `model(images).logits`; with `depths`, as if each token stopped behind that many blocks."""
    x = model.tokens_of(images)
    live = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    rest = _Rest(torch.zeros_like(x[:, 0]), torch.zeros_like(x[..., 0]), torch.ones_like(x[..., 0]), depths)
    for number, layer in enumerate(model.stack):
        x = layer.block(x, may_see=None if bool(live.all()) else live[:, None, None, :])
        share, live = _halt(layer, x, live, rest, number=number, of=len(model.layers))
        # the class token is never moved, so that it is found in front after it has stopped, too
        rest.average = rest.average + share[:, :1] * x[:, 0]
        order = torch.cat([torch.zeros_like(live[:, :1]), ~live[:, 1:]], 1).long().argsort(dim=1, stable=True)
        order = order[:, : 1 + int(live[:, 1:].sum(1).max())]
        x = x.gather(1, order[..., None].expand(-1, -1, x.shape[2]))
        live = live.gather(1, order)
        rest.keep(partial(torch.gather, dim=1, index=order))
    return model.classify(rest.average)


@torch.no_grad()
def run_packed(model: AViT, images: Images, depths: Depths | None = None) -> Float[Tensor, "batch classes"]:
    """Logits, as `model(images).logits`; with `depths`, as if each token stopped behind that many blocks."""
    tokens = model.tokens_of(images)
    batch, per_image, width = tokens.shape
    x = tokens.flatten(0, 1)  # (live tokens, width)
    image = torch.arange(batch, device=x.device).repeat_interleave(per_image)
    is_class = torch.arange(per_image, device=x.device).repeat(batch) == 0
    flat = None if depths is None else depths.flatten()
    rest = _Rest(x.new_zeros(batch, width), x.new_zeros(len(x)), x.new_ones(len(x)), flat)
    for number, layer in enumerate(model.stack):
        x = x + _attend_packed(layer, x, image, batch)
        x = x + layer.block.feed(layer.block.norm2(x))
        live = torch.ones_like(is_class)
        share, live = _halt(layer, x, live, rest, number=number, of=len(model.layers))
        rest.average = rest.average.index_add(0, image[is_class], (share[:, None] * x)[is_class])
        answered = torch.zeros(batch, dtype=torch.bool, device=x.device)
        answered[image[is_class & ~live]] = True
        stay = (live & ~answered[image]).nonzero()[:, 0]
        x, image, is_class = x[stay], image[stay], is_class[stay]
        rest.keep(partial(torch.index_select, dim=0, index=stay))
        if not len(x):
            break
    return model.classify(rest.average)


def _halt(
    layer: AViTLayer, x: Tensor, live: Bool[Tensor, "*tokens"], rest: _Rest, *, number: int, of: int
) -> tuple[Tensor, Tensor]:
    """The share of each token's state in an average, and who is still live; as in `AViT.forward`."""
    score, reached = layer.halt(x, rest.spent, live)
    if rest.depths is not None:
        reached = rest.depths == number + 1
    reached = live if number == of - 1 else reached & live
    share = share_of(score, rest.left, live, reached)
    rest.spent = rest.spent + score * live
    rest.left = rest.left - share * ~reached
    return share, live & ~reached


def _attend_packed(
    layer: AViTLayer, x: Float[Tensor, "n width"], image: Int[Tensor, " n"], batch: int
) -> Float[Tensor, "n width"]:
    """Attention within each image: linear maps on the flat list, a rectangle for the pattern alone."""
    attention = layer.block.attention
    counts = torch.bincount(image, minlength=batch)
    rows, row = torch.unique_consecutive(image, return_inverse=True)
    counts = counts[rows]
    column = torch.arange(len(x), device=x.device) - (counts.cumsum(0) - counts)[row]
    longest = int(counts.max())
    normed = layer.block.norm1(x)
    flat = torch.cat([attention.q(normed), attention.k(normed), attention.v(normed)], 1)
    padded = flat.new_zeros(len(rows), longest, flat.shape[1])
    padded[row, column] = flat
    q, k, v = (attention.split(part) for part in padded.chunk(3, dim=2))
    there = torch.arange(longest, device=x.device) < counts[:, None]
    mixed = attention.mix(q, k, v, None if bool(there.all()) else there[:, None, None, :])
    return attention.out(mixed[row, column])
