"""What a changed forward pass costs a language model: nats per predicted token, beside the model as it is.

ce_*                 mean nats per predicted token; the two ablations replace every position, masked or not
ce_recovered         (ce_zero - ce_sae) / (ce_zero - ce_clean); None where zeroing the Site does no harm
ce_recovered_mean    the same against mean ablation, which is the harsher yardstick
kl                   nats from the clean prediction to the spliced one, mean over predicted tokens
"""

from collections.abc import Callable, Mapping
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


Spliced = Callable[[Int[Tensor, " chosen"]], Mapping[Site, Callable[[], Tensor]]]
"""From the chosen rows to, for each Site, how to get their logits from the forward pass that is changed there."""


def language_losses(
    target: Target,
    rows: TokenRows,
    means: Mapping[Site, Float[Tensor, " d_out"]],
    spliced: Spliced,
    *,
    batch_rows: int,
    on_progress: Callable[[int], None],
) -> dict[Site, dict[str, Any]]:
    """Losses of the model untouched, and for each Site spliced, at zero and at its mean; a pass per batch for each.

    Args:
        means: of what the model computes at each Site.
        batch_rows: rows of one pass.
        on_progress: called with the rows of a batch once for each Site.
    """
    names = ("ce_clean", "ce_sae", "ce_zero", "ce_mean", "kl")
    sums: dict[Site, dict[str, float]] = {site: dict.fromkeys(names, 0.0) for site in means}
    predicted = 0
    for chosen in torch.arange(len(rows)).split(batch_rows):
        ids = rows.ids[chosen]
        following = ids[:, 1:].flatten()
        wanted = following != rows.pad if rows.pad is not None else torch.ones_like(following, dtype=torch.bool)
        clean = _log_probs(target.run(ids), wanted)
        clean_nats = _nats(clean, following[wanted])
        _bound(clean)
        changed = spliced(chosen)
        for site, mean in means.items():
            sums[site]["ce_clean"] += clean_nats
            # each with its own logits, the largest tensors there are: one at a time, beside the clean ones
            for name, run in {"ce_sae": changed[site], **_ablations(target, ids, site, mean)}.items():
                log_probs = _log_probs(run(), wanted)
                sums[site][name] += _nats(log_probs, following[wanted])
                if name == "ce_sae":
                    _bound(log_probs)
                    sums[site]["kl"] += float(kl_div(log_probs, clean, log_target=True, reduction="sum"))
                del log_probs
            on_progress(len(ids))
        predicted += int(wanted.sum())
    if predicted == 0:  # rows of one token, or nothing but padding
        return dict.fromkeys(means, NO_LOSSES)
    return {site: _recovered(total, predicted) for site, total in sums.items()}


def _ablations(target: Target, ids: Tensor, site: Site, mean: Tensor) -> dict[str, Callable[[], Tensor]]:
    return {
        "ce_zero": lambda: target.run(ids, edits={site: torch.zeros_like}),
        "ce_mean": lambda: target.run(ids, edits={site: lambda x: mean.to(x).expand_as(x)}),
    }


def _recovered(sums: Mapping[str, float], predicted: int) -> dict[str, Any]:
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


def _bound(log_probs: Float[Tensor, "n_wanted vocabulary"]) -> None:
    """In place: where a model rules part of its vocabulary out, a divergence would be zero times infinity."""
    log_probs.clamp_(min=torch.finfo(log_probs.dtype).min)


def _nats(log_probs: Float[Tensor, "n_wanted vocabulary"], following: Int[Tensor, " n_wanted"]) -> float:
    return -float(log_probs.gather(1, following[:, None].to(log_probs.device)).double().sum())
