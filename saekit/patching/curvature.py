"""Attribution of the loss to second order: what a gradient alone cannot see of a trained model.

Training has gone on until the mean gradient of the loss is near 0 in every direction that it could take, so that
over a corpus the first-order effects of a feature cancel, and what is left of its ablation is the curve of the
loss. That curve is estimated from gradients too, by letting the model say what follows:

    effect(change) = change . g + 1/2 E[(change . h)^2]

with `g` the gradient of the loss of the text, and `h` that of the loss of continuations drawn from the model's
own predictions at the same places. The mean of `h h^T` is the Fisher information, which is the Gauss-Newton part
of the curvature (Martens, arXiv 1412.1193). It costs one backward pass per draw, for all features at once. To use
it for attribution patching is our choice; `check_exactly` says what it brings on a model.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saekit.codes import SparseCodes
from saekit.patching.attribution import along_decoder
from saekit.patching.metric import nats
from saekit.sae import SAE
from saekit.targets import Site, Target

# draws per row; the estimate's own noise is small beside what is left of the error after so many
DRAWS = 4


def loss_gradients(
    target: Target,
    site: Site,
    ids: Int[Tensor, "rows context"],
    vectors: Float[Tensor, "rows context d_model"],
    *,
    pad: int | None,
    draws: int,
    seed: int,
) -> tuple[Tensor, list[Tensor]]:
    """Gradients at a Site of the summed loss of rows, and of that of each of `draws` drawn continuations.

    Padding counts in neither.
    """
    with torch.enable_grad():
        start = vectors.detach().requires_grad_()
        logits = target.run(ids, edits={site: lambda _: start})[:, :-1].float()
        following = ids[:, 1:].to(logits.device)
        counted = torch.ones_like(following, dtype=torch.bool) if pad is None else following != pad
        labels = [following, *_drawn(logits.detach(), draws, seed)]
        losses = [nats(logits, each)[counted].sum() for each in labels]
        gradients = [torch.autograd.grad(loss, start, retain_graph=loss is not losses[-1])[0] for loss in losses]
    return gradients[0], gradients[1:]


def second_order(
    change: SparseCodes,
    gradients: tuple[Tensor, list[Tensor]],
    sae: SAE,
    vectors: Float[Tensor, "rows context d_model"],
) -> Float[Tensor, "rows n_features"]:
    """Estimated effect on the loss of each row of changing each feature everywhere in it, in nats, in float64.

    `gradients` are those of `loss_gradients` at `vectors`; without draws the estimate is of first order.
    """
    of_text, drawn = gradients
    tokens = vectors.flatten(0, 1).to(sae.b_dec)
    first, *others = (
        by_row(change, along_decoder(change, g.flatten(0, 1).to(sae.b_dec), sae, tokens), len(vectors))
        for g in (of_text, *drawn)
    )
    for other in others:
        first += other.square() / (2 * len(others))
    return first


def by_row(codes: SparseCodes, values: Float[Tensor, " nnz"], rows: int) -> Float[Tensor, "rows n_features"]:
    """Sums of values of entries over the tokens of each row, in float64 on the CPU."""
    row = (codes.token_of_entry() // (codes.n_tokens // rows)).cpu()
    sums = torch.zeros(rows * codes.n_features, dtype=torch.float64)
    return sums.index_add_(0, row * codes.n_features + codes.features.cpu(), values.double().cpu()).view(rows, -1)


def _drawn(logits: Float[Tensor, "rows places vocabulary"], draws: int, seed: int) -> list[Tensor]:
    if draws == 0:
        return []
    generator = torch.Generator(logits.device).manual_seed(seed)
    labels = torch.multinomial(logits.softmax(-1).flatten(0, 1), draws, replacement=True, generator=generator)
    return list(labels.view(*logits.shape[:2], draws).unbind(-1))
