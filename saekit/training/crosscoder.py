"""Training a crosscoder: several Sites of one source become one, and the SAE that comes of it is taken apart again."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch

from saekit.activations.batch import ActivationBatch, ActivationSource
from saekit.crosscoder import Crosscoder, join
from saekit.errors import SaekitError
from saekit.sae import SAE
from saekit.targets import Site
from saekit.training.config import TrainConfig
from saekit.training.loop import SAMPLE_TOKENS, train


@dataclass(frozen=True)
class Joined:
    """Several Sites of a source as one: an `ActivationSource` whose vectors are theirs end to end.

    Attributes:
        scales: what each Site's vectors are multiplied by, so that none is heard above the others.
    """

    source: ActivationSource
    site: Site
    scales: Mapping[Site, float]

    @property
    def widths(self) -> dict[Site, int]:
        return {self.site: sum(self.source.widths[site] for site in self.scales)}

    def stream(self, batch_tokens: int, *, seed: int) -> Iterator[dict[Site, ActivationBatch]]:
        widths = {site: self.source.widths[site] for site in self.scales}
        for batches in self.source.stream(batch_tokens, seed=seed):
            scaled = {site: batches[site].vectors * scale for site, scale in self.scales.items()}
            first = batches[next(iter(self.scales))]
            yield {self.site: replace(first, vectors=join(scaled, widths))}


def train_crosscoder(
    config: TrainConfig, source: ActivationSource, sites: Sequence[Site], **options: Any
) -> Crosscoder:
    """Train one dictionary on several Sites of a source.

    Every Site is brought to the same variance per dimension first, which is folded into the weights at the
    end: codes are in units of training, directions in those of the model.

    Args:
        config: `site` names the whole in reports, and need not be one of `sites`.
        options: of `saekit.training.loop.train`.

    Raises:
        SaekitError: fewer than two Sites, one that the source lacks, or a config that does not fit.
    """
    missing = [str(site) for site in sites if site not in source.widths]
    if len(set(sites)) < 2 or len(set(sites)) < len(sites) or missing:
        raise SaekitError(
            f"a crosscoder needs two or more different Sites of its source, got {', '.join(map(str, sites))}; the "
            f"source supplies {', '.join(map(str, source.widths))}"
        )
    if config.site_out is not None or config.equal_norms:
        raise SaekitError(
            "a crosscoder writes where it reads and scales each Site as a whole; leave site_out and equal_norms away"
        )
    scales = _scales(source, sites, config)
    (sae,) = train([config], Joined(source, config.site, scales), **options)
    widths = {site: source.widths[site] for site in sites}
    return Crosscoder(_unscaled(sae, source, scales), widths, scales)


def _scales(source: ActivationSource, sites: Sequence[Site], config: TrainConfig) -> dict[Site, float]:
    stream = source.stream(config.batch_tokens, seed=config.seed)
    head = list(islice(stream, max(1, SAMPLE_TOKENS // config.batch_tokens)))
    vectors = {site: torch.cat([batches[site].vectors for batches in head]) for site in sites}
    return {site: float(1 / v.var(0, correction=0).mean().sqrt().clamp(min=1e-12)) for site, v in vectors.items()}


@torch.no_grad()
def _unscaled(sae: SAE, source: ActivationSource, scales: Mapping[Site, float]) -> SAE:
    """The same SAE for vectors that nobody has scaled."""
    per_dimension = torch.cat([torch.full((source.widths[site],), scale) for site, scale in scales.items()])
    other = sae.rescaled(1.0)
    other.encoder.mul_(per_dimension.to(other.encoder))
    other.decoder.div_(per_dimension.to(other.decoder))
    other.b_dec.div_(per_dimension.to(other.b_dec))
    return other
