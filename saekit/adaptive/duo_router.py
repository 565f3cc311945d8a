"""Training Duo-LLM's router on a frozen model, and bringing it to a budget afterwards.

Known from the paper: a softmax over options mixes the feed-forwards' outputs; loss = cross-entropy + alpha * budget
loss, over all layers at once, in place of load balancing. Its temperature, as printed, cancels; what is meant must
be a softmax that hardens, so it is `softmax(tau * h)` with tau growing from 1 to 10 (our reading). alpha is ours.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saekit.adaptive.duo_llm import BIG, SMALL, DuoLLM, decide
from saekit.errors import SaekitError


def budget_loss(
    shares: Float[Tensor, "batch tokens layers options"], budget: Float[Tensor, " options"]
) -> Float[Tensor, ""]:
    """Squared gap between a sequence's mean share of big and its budget, averaged over sequences.

    With three options the sum over all of them: our generalisation.
    """
    gaps = (shares.mean((1, 2)) - budget.to(shares)).square()
    # of two options the gaps are the same, and the paper counts one
    return (gaps[:, BIG] if len(budget) == 2 else gaps.sum(1)).mean()


@torch.no_grad()
def calibrate(router: Float[Tensor, "batch tokens layers options"], budget: float) -> float:
    """The threshold at which the mean number of big layers per token is closest to the budget, by bisection.

    Raises:
        SaekitError: a budget outside the model, or a router with a third option.
    """
    layers = router.shape[2]
    if router.shape[3] != 2 or not 0 <= budget <= layers:
        raise SaekitError(f"a budget of {budget} on {layers} layers with {router.shape[3]} options; give 0 to {layers}")
    margins = (router[..., BIG] - router[..., SMALL]).flatten()
    low, high = float(margins.min()) - 1, float(margins.max()) + 1
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if n_big(router, middle) > budget else (low, middle)
    return (low + high) / 2


def n_big(router: Float[Tensor, "batch tokens layers options"], threshold: float) -> float:
    """Mean number of big layers per token."""
    return float((decide(router, threshold) == BIG).float().sum(-1).mean())


@torch.no_grad()
def router_logits(model: DuoLLM, ids: Int[Tensor, "batch tokens"]) -> Float[Tensor, "batch tokens layers options"]:
    """What the router says while it decides for itself."""
    return model(ids).router
