"""Does another seed find the same features? Dictionaries of SAEs of one Site, matched pair by pair.

Two SAEs trained alike but for the seed share some of their features and not others (Paulo and Belrose,
arXiv 2501.16615). Features are paired one-to-one by the cosines of their decoder rows, which is what
they write; the encoder rows of the same pairs, what they read, are then compared too. How large a
cosine counts as the same is a convention: shares are given for 0.7 and for 0.9.

    mean_max_cosine   for each feature of the first SAE the largest cosine with any of the second, mean
    matched_cosine    the same one-to-one, by decoder rows
    encoder_cosine    of the encoder rows of the same pairs
    shared_70         share of the features of the smaller dictionary whose partner's decoder cosine is at least 0.7
    encoder_70        the same with the encoder cosine of that partner
    both_70           the same with both
    everywhere_70     share of the first SAE's features with such a partner, by decoder, in every other SAE

Features that fire nowhere were never learnt. Where densities are given they are left out, and shares are
also reported by density.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saekit.activations.batch import ActivationSource
from saekit.analysis.matching import cosine_of_pairs, match_directions, nearest
from saekit.crosscoder import Crosscoder, joined_sites
from saekit.errors import DataError, SaekitError, ShapeError
from saekit.sae import SAE
from saekit.training.config import TrainConfig
from saekit.training.loop import train

LEVELS = (0.7, 0.9)


@dataclass(frozen=True, kw_only=True, slots=True)
class DensityBand:
    """Stability of features whose density lies in one decade: `10 ** exponent` up to ten times that.

    Attributes:
        n_features: features of the first SAE of each pair that lie here, over all pairs.
        matched_cosine: mean over those that have a partner.
        shared_70, shared_90: share of them with a partner of such a decoder cosine.
    """

    exponent: int
    n_features: int
    matched_cosine: float
    shared_70: float
    shared_90: float


@dataclass(frozen=True, kw_only=True, slots=True)
class PairStability:
    """How alike two dictionaries are; the definitions are in the module's docstring.

    Attributes:
        first, second: which of the SAEs.
        n_pairs: the size of the smaller dictionary.
        partner: `(n_features,)` of the first SAE's features, in the second SAE; -1 for none.
        cosine: `(n_features,)` decoder cosine with that partner; 0 without one.
    """

    first: int
    second: int
    n_pairs: int
    mean_max_cosine: float
    matched_cosine: float
    encoder_cosine: float
    shared_70: float
    shared_90: float
    encoder_70: float
    encoder_90: float
    both_70: float
    both_90: float
    partner: Int[Tensor, " n_features"]
    cosine: Float[Tensor, " n_features"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Stability:
    """How alike the dictionaries of several SAEs are.

    Attributes:
        live: features of each SAE that were compared.
        pairs: every two SAEs.
        everywhere_70, everywhere_90: share of the first SAE's features with such a partner in every other.
        bands: by density in the first SAE of each pair, rarest first; empty without densities.
    """

    live: tuple[int, ...]
    pairs: tuple[PairStability, ...]
    everywhere_70: float
    everywhere_90: float
    bands: tuple[DensityBand, ...]

    def summary(self) -> dict[str, float | int]:
        """Means over the pairs, with the smallest and the largest of the shares."""
        numbers = [
            {name: value for name, value in asdict(pair).items() if isinstance(value, float)} for pair in self.pairs
        ]
        facts: dict[str, float | int] = {"n_saes": len(self.live), "n_pairs": len(self.pairs)}
        facts |= {name: sum(pair[name] for pair in numbers) / len(numbers) for name in numbers[0]}
        for name in ("shared_70", "shared_90"):
            facts[f"{name}_min"] = min(pair[name] for pair in numbers)
            facts[f"{name}_max"] = max(pair[name] for pair in numbers)
        return facts | {"everywhere_70": self.everywhere_70, "everywhere_90": self.everywhere_90}


def train_over_seeds(
    config: TrainConfig,
    source: ActivationSource,
    seeds: Sequence[int],
    *,
    on_sae: Callable[[int, SAE], None] = lambda seed, sae: None,
) -> list[SAE]:
    """The same SAE once per seed, one after the other; a seed decides the first weights and the order of the data.

    Raises:
        SaekitError: if a seed comes twice: it would give the same SAE twice, and perfect stability.
    """
    if len(set(seeds)) < len(seeds):
        raise SaekitError(f"seeds {list(seeds)} repeat; the same seed gives the same SAE; give different ones")
    saes = []
    for seed in seeds:
        (sae,) = train([replace(config, seed=seed)], source)
        on_sae(seed, sae)
        saes.append(sae)
    return saes


@torch.no_grad()
def measure_stability(
    saes: Sequence[SAE], *, densities: Sequence[Float[Tensor, " n_features"]] | None = None
) -> Stability:
    """Match every two of the SAEs.

    Args:
        densities: share of tokens on which each feature fires, for each SAE, on the same text.

    Raises:
        SaekitError: for fewer than two SAEs, or SAEs of different Sites.
        ShapeError: if they differ in `d_model`, or densities do not belong to them.
        DataError: if no feature of an SAE fires.
    """
    live = _live(saes, densities)
    directions = [_directions(sae) for sae in saes]
    found = tuple(_match_pair(i, j, directions, live) for i, j in combinations(range(len(saes)), 2))
    with_first = torch.stack([pair.cosine[live[0]] for pair in found if pair.first == 0])
    in_all = with_first.amin(0)
    return Stability(
        live=tuple(int(mask.sum()) for mask in live),
        pairs=found,
        everywhere_70=_share(in_all, LEVELS[0]),
        everywhere_90=_share(in_all, LEVELS[1]),
        bands=_bands(found, densities, live) if densities is not None else (),
    )


def _live(
    saes: Sequence[SAE], densities: Sequence[Float[Tensor, " n_features"]] | None
) -> list[Bool[Tensor, " n_features"]]:
    if len(saes) < 2:
        raise SaekitError(f"stability compares SAEs with each other; got {len(saes)}, give at least 2")
    sites = sorted({" + ".join(joined_sites(sae.cfg.metadata)) or sae.cfg.hook_name for sae in saes})
    if len(sites) > 1:
        raise SaekitError(f"these SAEs read {', '.join(map(repr, sites))}; compare SAEs of one Site")
    if densities is None:
        return [torch.ones(sae.n_features, dtype=torch.bool) for sae in saes]
    if [len(density) for density in densities] != [sae.n_features for sae in saes]:
        raise ShapeError(
            f"densities of {[len(density) for density in densities]} features for SAEs of "
            f"{[sae.n_features for sae in saes]}; give one per SAE, in their order"
        )
    live = [density.cpu() > 0 for density in densities]
    for number, mask in enumerate(live):
        if not bool(mask.any()):
            raise DataError(f"no feature of SAE {number} fires on this text; give more text, or leave this SAE out")
    return live


def _directions(sae: SAE) -> tuple[Tensor, Tensor]:
    """What each feature writes and reads; no Site of a crosscoder counts for more because its numbers are larger."""
    both = Crosscoder.of(sae).directions() if joined_sites(sae.cfg.metadata) else (sae.W_dec, sae.encoder)
    return both[0].cpu(), both[1].cpu()


def _match_pair(
    first: int, second: int, directions: Sequence[tuple[Tensor, Tensor]], live: Sequence[Tensor]
) -> PairStability:
    left, right = live[first].nonzero()[:, 0], live[second].nonzero()[:, 0]
    (writes, reads), (other_writes, other_reads) = directions[first], directions[second]
    matching = match_directions(writes[left], other_writes[right])
    a, b = left[matching.left], right[matching.right]
    decoder = matching.cosine
    encoder = cosine_of_pairs(reads[a], other_reads[b])
    near, _ = nearest(writes[left], other_writes[right])
    n_features = len(writes)
    return PairStability(
        first=first,
        second=second,
        n_pairs=len(a),
        mean_max_cosine=float(near.mean()),
        matched_cosine=float(decoder.mean()),
        encoder_cosine=float(encoder.mean()),
        shared_70=_share(decoder, LEVELS[0]),
        shared_90=_share(decoder, LEVELS[1]),
        encoder_70=_share(encoder, LEVELS[0]),
        encoder_90=_share(encoder, LEVELS[1]),
        both_70=_share(torch.minimum(decoder, encoder), LEVELS[0]),
        both_90=_share(torch.minimum(decoder, encoder), LEVELS[1]),
        partner=torch.full((n_features,), -1).index_put((a,), b),
        cosine=torch.zeros(n_features).index_put((a,), decoder),
    )


def _share(cosine: Float[Tensor, " n"], level: float) -> float:
    return float((cosine >= level).double().mean())


def _bands(
    pairs: Sequence[PairStability], densities: Sequence[Tensor], live: Sequence[Tensor]
) -> tuple[DensityBand, ...]:
    density = torch.cat([densities[pair.first].cpu()[live[pair.first]] for pair in pairs])
    cosine = torch.cat([pair.cosine[live[pair.first]] for pair in pairs])
    paired = torch.cat([pair.partner[live[pair.first]] >= 0 for pair in pairs])
    decade = density.double().log10().floor().long()
    bands = []
    for exponent in decade.unique().tolist():
        here = decade == exponent
        bands.append(
            DensityBand(
                exponent=exponent,
                n_features=int(here.sum()),
                matched_cosine=float(cosine[here & paired].mean()),
                shared_70=_share(cosine[here], LEVELS[0]),
                shared_90=_share(cosine[here], LEVELS[1]),
            )
        )
    return tuple(bands)
