"""Running a model over token rows and keeping what it computes at some Sites."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from saekit.activations.batch import ActivationBatch
from saekit.activations.buffer import shuffled
from saekit.activations.mask import MaskPolicy
from saekit.activations.tokens import TokenRows
from saekit.errors import DataError
from saekit.targets import Site, Target

SiteBatches = dict[Site, ActivationBatch]


@dataclass(frozen=True, kw_only=True)
class Harvest:
    """The activations of `target` at `sites` over `rows`: an `ActivationSource`, and in order for analysis.

    All Sites come from one forward pass, which stops after the deepest of them.

    Attributes:
        batch_rows: token rows per forward pass.
        buffer_tokens: vectors held for shuffling; rows are read in random order besides.
    """

    target: Target
    rows: TokenRows
    sites: tuple[Site, ...]
    mask: MaskPolicy = MaskPolicy()
    batch_rows: int = 16
    buffer_tokens: int = 1 << 18

    @property
    def widths(self) -> dict[Site, int]:
        return {site: self.target.width(site) for site in self.sites}

    def in_order(self, rows: Int[Tensor, " chosen"] | None = None) -> Iterator[SiteBatches]:
        """Batches in the order of the rows (or of the chosen ones), unshuffled; `document` indexes `self.rows`."""
        chosen = torch.arange(len(self.rows)) if rows is None else rows
        for part in chosen.split(self.batch_rows):
            yield self._read(part)

    def stream(self, batch_tokens: int, *, seed: int) -> Iterator[SiteBatches]:
        """Shuffled batches for ever; every pass over the rows has its own order."""
        return shuffled(self._passes(seed), batch_tokens=batch_tokens, buffer_tokens=self.buffer_tokens, seed=seed)

    def _passes(self, seed: int) -> Iterator[SiteBatches]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            n_vectors = 0
            for batches in self.in_order(torch.randperm(len(self.rows), generator=generator)):
                n_vectors += sum(map(len, batches.values()))
                yield batches
            if n_vectors == 0:  # or the buffer would wait for ever
                raise DataError(
                    f"the mask leaves out every token of all {len(self.rows):,} rows; give another text or another mask"
                )

    def _read(self, chosen: Int[Tensor, " chosen"]) -> SiteBatches:
        ids = self.rows.ids[chosen]
        tensors = self.target.read(ids, list(self.sites))
        return {site: _addressed(site, tensors[site], chosen, ids, self.rows, self.mask) for site in self.sites}


def _addressed(
    site: Site, vectors: Tensor, chosen: Tensor, ids: Tensor, rows: TokenRows, mask: MaskPolicy
) -> ActivationBatch:
    """One row per token that counts, and per call where the Site stands for every call."""
    calls = vectors.float().cpu()
    calls = calls if site.call is None else calls[None]  # (calls, batch, context, d_model)
    step, row, position = mask.keep(rows, ids, calls).nonzero(as_tuple=True)
    return ActivationBatch(
        vectors=calls[step, row, position],
        document=chosen[row],
        position=position,
        token=ids[row, position],
        step=step,
        halted=torch.zeros(len(step), dtype=torch.bool),
    ).check_finite(site)


@dataclass(frozen=True, kw_only=True)
class TensorSource:
    """Vectors that are already there: an `ActivationSource` for synthetic data and for other people's caches."""

    site: Site
    vectors: Tensor
    buffer_tokens: int = 1 << 18

    @property
    def widths(self) -> dict[Site, int]:
        return {self.site: self.vectors.shape[1]}

    def stream(self, batch_tokens: int, *, seed: int) -> Iterator[SiteBatches]:
        return shuffled(self._passes(seed), batch_tokens=batch_tokens, buffer_tokens=self.buffer_tokens, seed=seed)

    def _passes(self, seed: int) -> Iterator[SiteBatches]:
        if len(self.vectors) == 0:
            raise DataError(f"there are no vectors at {self.site}; give at least one batch of them")
        batch = ActivationBatch.from_vectors(self.vectors).check_finite(self.site)
        generator = torch.Generator().manual_seed(seed)
        while True:
            for part in torch.randperm(len(batch), generator=generator).split(4096):
                yield {self.site: batch.select(part)}


def take(source: Iterator[SiteBatches], n_tokens: int, site: Site) -> ActivationBatch:
    """At least `n_tokens` rows off the front of a stream, cut to exactly that many."""
    parts: list[ActivationBatch] = []
    while sum(map(len, parts)) < n_tokens:
        parts.append(next(source)[site])
    return ActivationBatch.concatenate(parts).select(slice(n_tokens))
