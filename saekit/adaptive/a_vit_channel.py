"""Which channel of a plain vision transformer its halting gate borrows.

A-ViT's losses never say *which* patch may stop: the task sees a halting score only through the class token, and the
ponder loss and the prior push on all patches alike. So what a patch's channel 0 held before there was a gate decides.
The paper takes the first channel as it is. Ours takes the one that is largest where the loss depends least on a patch.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from saekit.adaptive.a_vit import AViT
from saekit.patching.statistics import mean_ranks
from saekit.targets.names import Side
from saekit.targets.taps import tapped


def least_needed_channel(
    model: AViT,
    images: Float[Tensor, "n channels height width"],
    labels: Int[Tensor, " n"],
    stopping: Float[Tensor, " layers"],
) -> int:
    """The channel whose value goes down most steadily with how much a patch matters.

    A patch's state matters as much as `|x . dL/dx|`, gradient times activation of the cross-entropy at full depth.
    What is compared is the rank correlation with each channel, layer by layer.

    Args:
        stopping: what each layer counts: the share of patches that are to stop behind it. The last has no part, for
            there all stop.
    """
    states: list[Tensor] = []
    places = [(f"layers.{number}.content", Side.OUTPUT) for number in range(model.config.layers)]
    with tapped(model, dict.fromkeys(places, lambda call, state: states.append(state))), torch.enable_grad():
        loss = nn.functional.cross_entropy(model(images, halts=False).logits, labels)
    gradients = torch.autograd.grad(loss, states)
    agreement = torch.zeros(model.config.width)
    for state, gradient, share in list(zip(states, gradients, stopping.tolist(), strict=True))[:-1]:
        patches = state[:, 1:].detach().flatten(0, 1)
        needed = (patches * gradient[:, 1:].flatten(0, 1)).sum(1).abs()
        ranks = torch.stack([mean_ranks(values) for values in (needed, *patches.T)])
        agreement += share * torch.corrcoef(ranks)[0, 1:]
    return int(agreement.argmin())


@torch.no_grad()
def swap_channels(model: AViT, one: int, other: int) -> None:
    """Exchange two channels of the residual stream wherever they are written or read: the model computes the same."""
    order = torch.arange(model.config.width)
    order[[one, other]] = order[[other, one]]
    for weight, dim in _along_channels(model):
        weight.copy_(weight.index_select(dim, order.to(weight.device)))


def _along_channels(model: AViT) -> Iterator[tuple[Tensor, int]]:
    """Every weight with the dimension in which it has one entry per channel."""
    norms, writers, readers = [model.norm], [model.embed], [model.head]
    for layer in model.stack:
        attention, feed = layer.block.attention, layer.block.feed
        norms += [layer.block.norm1, layer.block.norm2]
        writers += [attention.out, feed.down]
        readers += [attention.q, attention.k, attention.v, feed.up]
    yield from ((token, 2) for token in (model.class_token, model.position))
    yield from ((weight, 0) for module in (*norms, *writers) for weight in (module.weight, module.bias))
    yield from ((module.weight, 1) for module in readers)
