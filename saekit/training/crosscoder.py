"""Training a crosscoder: several Sites of one source become one, and the SAE that comes of it is taken apart again."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from saekit.activations.batch import ActivationBatch, ActivationSource
from saekit.activations.stream import START, Place, PlacedStream, ResumableSource
from saekit.crosscoder import Crosscoder, join, per_dimension
from saekit.errors import FileError, SaekitError
from saekit.sae import SAE
from saekit.targets import Site
from saekit.training.config import TrainConfig
from saekit.training.loop import SAMPLE_TOKENS, Ahead, resumable, train, vectors_of
from saekit.training.saved_run import RunFile, saved_source
from saekit.training.step import check_varied


@dataclass(frozen=True)
class Joined:
    """Several Sites of a source as one: an `ActivationSource` whose vectors are theirs end to end.

    Attributes:
        scales: what each Site's vectors are multiplied by, so that none is heard above the others.
        begun: streams of the source that were looked into and are to be read on from their start, by batch size and
            seed; a buffer of activations is too dear to be filled twice.
    """

    source: ActivationSource
    site: Site
    scales: Mapping[Site, float]
    begun: dict[tuple[int, int], Ahead] = field(default_factory=dict)

    @property
    def widths(self) -> dict[Site, int]:
        return {self.site: sum(self.source.widths[site] for site in self.scales)}

    def facts(self) -> Mapping[str, str | int | float | bool | None]:
        """What decides the stream: the source's facts, the Sites in the order of the weights, and the scales.

        Raises:
            SaekitError: the source cannot say, and so a run that reads it cannot be resumed.
        """
        own = {"Sites": ", ".join(map(str, self.scales))}
        own |= {_scale_of(site): scale for site, scale in self.scales.items()}
        return dict(resumable(self.source).facts()) | own

    def stream(self, batch_tokens: int, *, seed: int, start: Place = START) -> Iterator[dict[Site, ActivationBatch]]:
        looked_into = self.begun.pop((batch_tokens, seed), None)  # in any case: its buffer is large
        begun = looked_into if start == START else None
        if isinstance(self.source, ResumableSource):
            return _PlacedJoined(self, begun or self.source.stream(batch_tokens, seed=seed, start=start))
        return map(self.join, begun or self.source.stream(batch_tokens, seed=seed))

    def join(self, batches: Mapping[Site, ActivationBatch]) -> dict[Site, ActivationBatch]:
        """One batch of the Sites as one of the whole."""
        scaled = {site: batches[site].vectors * scale for site, scale in self.scales.items()}
        widths = {site: vectors.shape[1] for site, vectors in scaled.items()}  # a source may run its model to say
        first, *others = (batches[site] for site in self.scales)
        for other in others:
            first.check_same_tokens(other)
        return {self.site: replace(first, vectors=join(scaled, widths))}


@dataclass(frozen=True, slots=True)
class _PlacedJoined:
    """A joined stream that is where the stream of its source is."""

    joined: Joined
    stream: PlacedStream | Ahead

    @property
    def place(self) -> Place | None:
        return self.stream.place

    def __iter__(self) -> Iterator[dict[Site, ActivationBatch]]:
        return self

    def __next__(self) -> dict[Site, ActivationBatch]:
        return self.joined.join(next(self.stream))


def train_crosscoder(
    config: TrainConfig,
    source: ActivationSource,
    sites: Sequence[Site],
    *,
    start: Crosscoder | None = None,
    run_file: RunFile | None = None,
    **options: Any,
) -> Crosscoder:
    """Train one dictionary on several Sites of a source.

    Every Site is brought to the same variance per dimension first, which is folded into the weights at the
    end: codes are in units of training, directions in those of the model.

    Args:
        config: `site` names the whole in reports, and need not be one of `sites`.
        start: a crosscoder of these Sites whose weights training goes on with.
        run_file, options: of `saekit.training.loop.train`.

    Raises:
        SaekitError: fewer than two Sites, one that the source lacks, a config that does not fit, or a start that is
            no crosscoder of these Sites.
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
    widths = {site: source.widths[site] for site in sites}
    # the order of the Sites is that of the weights
    if start is not None and (not isinstance(start, Crosscoder) or list(start.widths.items()) != list(widths.items())):
        raise SaekitError(
            f"cannot start from {start}; give the whole Crosscoder of {', '.join(map(str, widths))}, in that order, "
            "or leave start away"
        )
    if run_file is not None and run_file.resume:
        # another device would measure them otherwise in the last bits, and the weights are in units of these
        begun, scales = {}, _saved_scales(run_file.path, sites)
    else:
        ahead = Ahead(source.stream(config.batch_tokens, seed=config.seed))
        begun = {(config.batch_tokens, config.seed): ahead}
        scales = _scales(ahead.look(max(1, SAMPLE_TOKENS // config.batch_tokens)), sites)
    starts = None if start is None else [_for_scaled(start.sae, widths, scales)]
    joined = Joined(source, config.site, scales, begun=begun)
    (sae,) = train([config], joined, start=starts, run_file=run_file, **options)
    return Crosscoder(_for_scaled(sae, widths, {site: 1 / scale for site, scale in scales.items()}), widths, scales)


def _scales(head: Sequence[Mapping[Site, ActivationBatch]], sites: Sequence[Site]) -> dict[Site, float]:
    """What brings the vectors of each Site to unit variance per dimension."""
    vectors = {site: vectors_of(head, site) for site in sites}
    for site in sites:
        check_varied(vectors[site], site)
    return {site: float(1 / v.var(0, correction=0).mean().sqrt().clamp(min=1e-12)) for site, v in vectors.items()}


def _saved_scales(path: Path, sites: Sequence[Site]) -> dict[Site, float]:
    facts = saved_source(path)
    missing = [str(site) for site in sites if _scale_of(site) not in facts]
    if missing:
        raise FileError(
            f"{path} was saved by a run without {', '.join(missing)}; resume with the Sites it was started with, or "
            "choose another folder"
        )
    return {site: facts[_scale_of(site)] for site in sites}


def _scale_of(site: Site) -> str:
    return f"scale of {site}"


@torch.no_grad()
def _for_scaled(sae: SAE, widths: Mapping[Site, int], scales: Mapping[Site, float]) -> SAE:
    """The same SAE for vectors that are multiplied by their Site's scale."""
    scale = per_dimension(widths, scales)
    other = sae.rescaled(1.0)
    other.encoder.div_(scale.to(other.encoder))
    other.decoder.mul_(scale.to(other.decoder))
    other.b_dec.mul_(scale.to(other.b_dec))
    return other
