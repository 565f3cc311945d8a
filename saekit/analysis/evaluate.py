"""How good is an SAE: reconstruction, sparsity, use of the dictionary, and what splicing it in costs the model.

One pass over the rows reads activations and codes; for language models a second one runs the whole
model four times per batch: untouched, with the SAE spliced in, and with the Site's output replaced by
zero and by its mean. Definitions, since tools differ:

    fvu                  squared error over squared distance from the mean vector, over all tokens at once
    explained_variance   1 - fvu
    l0, l0_p5, l0_p95    active features per token: mean, 5th and 95th percentile
    dead_fraction        features that fired on none of the tokens read
    underused_fraction   features that fired, but under half as often as the Zipf line expects of their rank
    ce_*                 mean nats per predicted token; the SAE leaves masked tokens (BOS) as they were, the
                         two ablations replace every position, masked or not
    ce_recovered         (ce_zero - ce_sae) / (ce_zero - ce_clean); None where zeroing the Site does no harm
    ce_recovered_mean    the same against mean ablation, which is the harsher yardstick
    kl                   nats from the clean prediction to the spliced one, mean over predicted tokens

A transcoder is measured by what it makes of its input at the Site that it writes: all of the above but the
codes is about that Site.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from saekit.activations.harvest import Harvest
from saekit.activations.mask import MaskPolicy
from saekit.activations.tokens import TokenRows
from saekit.density import ZipfFit, expected_density, underused, zipf_fit
from saekit.errors import DataError
from saekit.patching.splice import run_with_saes, writing_site
from saekit.patching.tokens import TokenMask
from saekit.sae import SAE
from saekit.targets import Site, Target

# logits held at once, per copy: half a gigabyte of float32
LOGITS = 1 << 27


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """Metrics of one SAE; the definitions are in the module's docstring.

    Attributes:
        tokens: activations read for reconstruction and sparsity.
        predicted: next-token predictions behind the cross-entropies; 0 if the target is no language model.
        density: `(n_features,)` share of tokens on which each feature fired.
        l0_counts: `(most + 1,)` tokens with 0, 1, 2, ... active features.
    """

    tokens: int
    predicted: int
    fvu: float
    explained_variance: float
    l0: float
    l0_p5: float
    l0_p95: float
    dead_fraction: float
    underused_fraction: float
    ce_clean: float | None
    ce_sae: float | None
    ce_zero: float | None
    ce_mean: float | None
    ce_recovered: float | None
    ce_recovered_mean: float | None
    kl: float | None
    density: Float[Tensor, " n_features"]
    l0_counts: Int[Tensor, " most"]
    zipf: ZipfFit

    def metrics(self) -> dict[str, int | float]:
        """The numbers alone, those that exist, under their names."""
        skipped = {"density", "l0_counts", "zipf"}
        numbers = {name: value for name, value in asdict(self).items() if name not in skipped and value is not None}
        return numbers | {"zipf_exponent": self.zipf.exponent, "zipf_offset": self.zipf.offset}


@torch.no_grad()
def evaluate(
    sae: SAE,
    target: Target,
    rows: TokenRows,
    site: Site,
    *,
    mask: MaskPolicy = MaskPolicy(),
    batch_rows: int = 16,
    loss_rows: int | None = None,
    on_progress: Callable[[int], None] = lambda rows_done: None,
) -> Evaluation:
    """Measure `sae` on `rows`, which training should not have seen.

    Args:
        loss_rows: measure cross-entropies on this many rows, the first ones; all if None, none if 0. The
            target's output must be next-token logits if there are any.
        on_progress: called with the number of rows done since the last call; `len(rows)` in all, and
            `loss_rows` more.

    Raises:
        DataError: if there are no rows, or every token is masked.
        SaekitError: if `sae` is a transcoder that does not say which Site it writes.
    """
    if len(rows) == 0:
        raise DataError("there are no rows to evaluate on; give at least one")
    written = writing_site(sae, site)
    sites = (site,) if written == site else (site, written)
    harvest = Harvest(target=target, rows=rows, sites=sites, mask=mask, batch_rows=batch_rows)
    reconstruction = _Reconstruction(sae)
    for part, batches in zip(rows.ids.split(batch_rows), harvest.in_order(), strict=True):
        if len(batches[site]):
            device = sae.b_dec.device
            reconstruction.observe(batches[site].vectors.to(device), batches[written].vectors.to(device))
        on_progress(len(part))
    if reconstruction.tokens == 0:
        raise DataError(
            "every token of the text is masked; there is nothing to evaluate; give more text or another mask"
        )
    losses = _NO_LOSSES
    if loss_rows is None or loss_rows > 0:
        read = rows.select(slice(loss_rows))
        losses = _language_losses(sae, target, read, site, mask, reconstruction.mean, batch_rows, on_progress)
    density = reconstruction.density
    fit = zipf_fit(density)
    behind = underused(density, expected_density(density, fit)) & (density > 0)
    return Evaluation(
        tokens=reconstruction.tokens,
        fvu=reconstruction.fvu,
        explained_variance=1 - reconstruction.fvu,
        **reconstruction.l0(),
        dead_fraction=float((density == 0).double().mean()),
        underused_fraction=float(behind.double().mean()),
        density=density,
        l0_counts=reconstruction.l0_counts,
        zipf=fit,
        **losses,
    )


_NO_LOSSES: dict[str, Any] = {
    "predicted": 0,
    **dict.fromkeys(("ce_clean", "ce_sae", "ce_zero", "ce_mean", "ce_recovered", "ce_recovered_mean", "kl")),
}


def ce_recovered(*, clean: float, spliced: float, ablated: float) -> float | None:
    """Share of the damage of an ablation that the SAE avoids: 1 is lossless, 0 as bad as the ablation.

    None if the ablation does no damage: the model does not need the Site on this text, and nothing can be recovered.
    """
    return (ablated - spliced) / (ablated - clean) if ablated > clean else None


class _Reconstruction:
    """Sums over activations; float64, so that the order of batches does not show."""

    def __init__(self, sae: SAE):
        self.sae = sae
        self.tokens = 0
        self.error = 0.0
        self.total_square = 0.0
        self.total = torch.zeros(sae.d_out, dtype=torch.float64)
        self.counts = torch.zeros(sae.n_features, dtype=torch.int64)
        self.l0_counts = torch.zeros(1, dtype=torch.int64)

    def observe(self, vectors: Float[Tensor, "n d_model"], targets: Float[Tensor, "n d_out"]) -> None:
        codes = self.sae.encode(vectors)
        exact = targets.double()
        self.error += float((exact - self.sae.decode(codes, vectors)).square().sum())
        self.total_square += float(exact.square().sum())
        self.total += exact.sum(0).cpu()
        self.tokens += len(vectors)
        self.counts += codes.feature_counts().cpu()
        batch_l0 = torch.bincount(codes.l0().cpu())
        longest = max(len(self.l0_counts), len(batch_l0))
        self.l0_counts = _padded(self.l0_counts, longest) + _padded(batch_l0, longest)

    @property
    def mean(self) -> Float[Tensor, " d_out"]:
        return self.total / self.tokens

    @property
    def fvu(self) -> float:
        return self.error / (self.total_square - self.tokens * float(self.mean.square().sum()))

    @property
    def density(self) -> Float[Tensor, " n_features"]:
        return self.counts.double() / self.tokens

    def l0(self) -> dict[str, Any]:
        cumulative = self.l0_counts.cumsum(0).double() / self.tokens
        values = torch.arange(len(self.l0_counts), dtype=torch.float64)
        return {
            "l0": float((values * self.l0_counts).sum() / self.tokens),
            "l0_p5": float(values[(cumulative >= 0.05).nonzero()[0, 0]]),
            "l0_p95": float(values[(cumulative >= 0.95).nonzero()[0, 0]]),
        }


def _padded(counts: Tensor, length: int) -> Tensor:
    return torch.nn.functional.pad(counts, (0, length - len(counts)))


def _language_losses(
    sae: SAE,
    target: Target,
    rows: TokenRows,
    site: Site,
    mask: MaskPolicy,
    mean: Float[Tensor, " d_out"],
    batch_rows: int,
    on_progress: Callable[[int], None],
) -> dict[str, Any]:
    written = writing_site(sae, site)
    tokens = TokenMask(policy=mask, bos=rows.bos, pad=rows.pad)
    # each with its own logits, the largest tensors there are: one at a time, beside the clean ones
    variants: dict[str, Callable[[Tensor], Tensor]] = {
        "ce_sae": lambda ids: run_with_saes(target, ids, {site: sae}, use_error_term=False, mask=tokens),
        "ce_zero": lambda ids: target.run(ids, edits={written: torch.zeros_like}),
        "ce_mean": lambda ids: target.run(ids, edits={written: lambda x: mean.to(x).expand_as(x)}),
    }
    sums: dict[str, float] = dict.fromkeys(("ce_clean", *variants, "kl"), 0.0)
    predicted = 0
    for ids in rows.ids.split(_loss_batch_rows(sae, target, rows, batch_rows)):
        following = ids[:, 1:].flatten()
        wanted = following != rows.pad if rows.pad is not None else torch.ones_like(following, dtype=torch.bool)
        clean = _log_probs(target.run(ids), wanted)
        sums["ce_clean"] += _nats(clean, following[wanted])
        for name, run in variants.items():
            log_probs = _log_probs(run(ids), wanted)
            sums[name] += _nats(log_probs, following[wanted])
            if name == "ce_sae":
                sums["kl"] += float(kl_div(log_probs, clean, log_target=True, reduction="sum"))
            del log_probs
        predicted += int(wanted.sum())
        on_progress(len(ids))
    if predicted == 0:  # rows of one token, or nothing but padding
        return _NO_LOSSES
    means = {name: total / predicted for name, total in sums.items()}
    recovered = {
        name: ce_recovered(clean=means["ce_clean"], spliced=means["ce_sae"], ablated=means[ablation])
        for name, ablation in (("ce_recovered", "ce_zero"), ("ce_recovered_mean", "ce_mean"))
    }
    return {**means, **recovered, "predicted": predicted}


def _loss_batch_rows(sae: SAE, target: Target, rows: TokenRows, batch_rows: int) -> int:
    """Fewer rows where the logits of a batch would be too large; never under a rule that the batch decides for."""
    if sae.rule.looks_across_tokens or target.vocabulary is None:
        return batch_rows
    return max(1, min(batch_rows, LOGITS // (rows.context * target.vocabulary)))


def _log_probs(
    logits: Float[Tensor, "batch context vocabulary"], wanted: Bool[Tensor, " predictions"]
) -> Float[Tensor, "n_wanted vocabulary"]:
    return log_softmax(logits[:, :-1].flatten(0, 1)[wanted.to(logits.device)].float(), dim=-1)


def _nats(log_probs: Float[Tensor, "n_wanted vocabulary"], following: Int[Tensor, " n_wanted"]) -> float:
    return -float(log_probs.gather(1, following[:, None].to(log_probs.device)).double().sum())
