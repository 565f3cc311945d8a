"""What a changed forward pass costs a language model: nats per predicted token, beside the model as it is.

ce_*                 mean nats per predicted token; the two ablations replace every position, masked or not
ce_recovered         (ce_zero - ce_sae) / (ce_zero - ce_clean); None where zeroing the Site does no harm
ce_recovered_mean    the same against mean ablation, which is the harsher yardstick
kl                   nats from the clean prediction to the spliced one, mean over predicted tokens
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from saekit.activations.tokens import TokenRows
from saekit.targets import Site, Target

# logits held at once, per copy: half a gigabyte of float32
LOGITS = 1 << 27

NO_LOSSES: dict[str, Any] = {
    "predicted": 0,
    **dict.fromkeys(("ce_clean", "ce_sae", "ce_zero", "ce_mean", "ce_recovered", "ce_recovered_mean", "kl")),
}


def language_losses(
    target: Target,
    rows: TokenRows,
    written: Site,
    spliced: Callable[[Int[Tensor, " chosen"]], Tensor],
    *,
    mean: Float[Tensor, " d_out"],
    batch_rows: int,
    on_progress: Callable[[int], None],
) -> dict[str, Any]:
    """Losses of the model untouched, spliced, and with one Site at zero and at its mean; four passes per batch.

    Args:
        written: the Site that is spliced and ablated.
        spliced: the logits of the chosen rows in the changed forward pass.
        batch_rows: rows of one pass.
    """
    # each with its own logits, the largest tensors there are: one at a time, beside the clean ones
    variants: dict[str, Callable[[Tensor], Tensor]] = {
        "ce_sae": spliced,
        "ce_zero": lambda chosen: target.run(rows.ids[chosen], edits={written: torch.zeros_like}),
        "ce_mean": lambda chosen: target.run(rows.ids[chosen], edits={written: lambda x: mean.to(x).expand_as(x)}),
    }
    sums: dict[str, float] = dict.fromkeys(("ce_clean", *variants, "kl"), 0.0)
    predicted = 0
    for chosen in torch.arange(len(rows)).split(batch_rows):
        ids = rows.ids[chosen]
        following = ids[:, 1:].flatten()
        wanted = following != rows.pad if rows.pad is not None else torch.ones_like(following, dtype=torch.bool)
        clean = _log_probs(target.run(ids), wanted)
        sums["ce_clean"] += _nats(clean, following[wanted])
        for name, run in variants.items():
            log_probs = _log_probs(run(chosen), wanted)
            sums[name] += _nats(log_probs, following[wanted])
            if name == "ce_sae":
                sums["kl"] += float(kl_div(log_probs, clean, log_target=True, reduction="sum"))
            del log_probs
        predicted += int(wanted.sum())
        on_progress(len(ids))
    if predicted == 0:  # rows of one token, or nothing but padding
        return NO_LOSSES
    means = {name: total / predicted for name, total in sums.items()}
    recovered = {
        name: ce_recovered(clean=means["ce_clean"], spliced=means["ce_sae"], ablated=means[ablation])
        for name, ablation in (("ce_recovered", "ce_zero"), ("ce_recovered_mean", "ce_mean"))
    }
    return {**means, **recovered, "predicted": predicted}


def ce_recovered(*, clean: float, spliced: float, ablated: float) -> float | None:
    """Share of the damage of an ablation that the SAE avoids: 1 is lossless, 0 as bad as the ablation.

    None if the ablation does no damage: the model does not need the Site on this text, and nothing can be recovered.
    """
    return (ablated - spliced) / (ablated - clean) if ablated > clean else None


def loss_batch_rows(target: Target, rows: TokenRows, batch_rows: int, *, looks_across_tokens: bool) -> int:
    """Fewer rows where the logits of a batch would be too large; never under a rule that the batch decides for."""
    if looks_across_tokens or target.vocabulary is None:
        return batch_rows
    return max(1, min(batch_rows, LOGITS // (rows.context * target.vocabulary)))


def _log_probs(
    logits: Float[Tensor, "batch context vocabulary"], wanted: Bool[Tensor, " predictions"]
) -> Float[Tensor, "n_wanted vocabulary"]:
    return log_softmax(logits[:, :-1].flatten(0, 1)[wanted.to(logits.device)].float(), dim=-1)


def _nats(log_probs: Float[Tensor, "n_wanted vocabulary"], following: Int[Tensor, " n_wanted"]) -> float:
    return -float(log_probs.gather(1, following[:, None].to(log_probs.device)).double().sum())
