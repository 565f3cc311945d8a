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

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saekit.activations.harvest import Harvest
from saekit.activations.mask import MaskPolicy
from saekit.activations.tokens import TokenRows
from saekit.analysis.language_losses import NO_LOSSES, language_losses, loss_batch_rows
from saekit.analysis.sums import Unexplained, Usage
from saekit.density import ZipfFit
from saekit.errors import DataError
from saekit.patching.splice import run_with_saes, writing_site
from saekit.patching.tokens import TokenMask
from saekit.sae import SAE
from saekit.targets import Site, Target


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
        ShapeError: if the mask keeps other tokens where a transcoder writes than where it reads.
    """
    if len(rows) == 0:
        raise DataError("there are no rows to evaluate on; give at least one")
    written = writing_site(sae, site)
    sites = (site,) if written == site else (site, written)
    harvest = Harvest(target=target, rows=rows, sites=sites, mask=mask, batch_rows=batch_rows)
    usage, unexplained = Usage(sae.n_features), Unexplained(sae.d_out)
    for part, batches in zip(rows.ids.split(batch_rows), harvest.in_order(), strict=True):
        if len(batches[site]):
            device = sae.b_dec.device
            vectors = batches[site].vectors.to(device)
            codes = sae.encode(vectors)
            usage.observe(codes)
            batches[site].check_same_tokens(batches[written])
            unexplained.observe(batches[written].vectors.to(device), sae.decode(codes, vectors))
        on_progress(len(part))
    check_observed(usage)
    losses = NO_LOSSES
    if loss_rows is None or loss_rows > 0:
        read = rows.select(slice(loss_rows))
        tokens = TokenMask(policy=mask, bos=rows.bos, pad=rows.pad)
        losses = language_losses(
            target,
            read,
            {written: unexplained.mean},
            lambda chosen: {
                written: lambda: run_with_saes(target, read.ids[chosen], {site: sae}, use_error_term=False, mask=tokens)
            },
            batch_rows=loss_batch_rows(target, read, batch_rows, looks_across_tokens=sae.rule.looks_across_tokens),
            on_progress=on_progress,
        )[written]
    return Evaluation(fvu=unexplained.fvu, explained_variance=1 - unexplained.fvu, **usage.metrics(), **losses)


def check_observed(usage: Usage) -> None:
    """Raises: DataError if no token was read."""
    if usage.tokens == 0:
        raise DataError(
            "every token of the text is masked; there is nothing to evaluate; give more text or another mask"
        )
