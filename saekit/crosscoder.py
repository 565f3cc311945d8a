"""Crosscoders (Lindsey et al., 2024): one dictionary over several Sites, so that a feature is the same at all of them.

    codes      = rule(sum over Sites of (x_s - b_dec_s) @ W_enc_s + b_enc)
    x_hat_s    = codes @ W_dec_s + b_dec_s

An SAE over the Sites' vectors put end to end computes exactly this, so that is what it is here: all rules,
losses and objectives serve. A feature's decoder rows have unit norm over all Sites together, in units of
what is usual at each; how the norm is spread says where the feature lives.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saekit.codes import SparseCodes
from saekit.errors import FileError, ShapeError
from saekit.sae import SAE
from saekit.sae_config import with_metadata
from saekit.targets import Site

_KEY = "crosscoder"


@dataclass(frozen=True, slots=True)
class Crosscoder:
    """An SAE over several Sites.

    Attributes:
        sae: over the concatenation of the Sites' vectors, in their order.
        widths: how many numbers each Site has, in the order of the dictionary.
        scales: what brings each Site's vectors to the variance that training saw; 1 where none is given.
    """

    sae: SAE
    widths: dict[Site, int]
    scales: Mapping[Site, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if sum(self.widths.values()) != self.sae.d_model:
            raise ShapeError(
                f"Sites of {', '.join(map(str, self.widths.values()))} numbers make {sum(self.widths.values())}, but "
                f"the SAE encodes {self.sae.d_model}; give the widths that it was trained on"
            )

    def __repr__(self) -> str:
        return f"Crosscoder({', '.join(map(str, self.widths))}, n_features={self.sae.n_features})"

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(self.widths)

    def encode(self, vectors: Mapping[Site, Float[Tensor, "n_tokens d_site"]]) -> SparseCodes:
        """The codes that all Sites share.

        Raises:
            ShapeError: a Site is missing, or has another width or number of tokens than it should.
        """
        return self.sae.encode(join(vectors, self.widths))

    def decode(self, codes: SparseCodes) -> dict[Site, Tensor]:
        """The reconstruction at each Site, `(n_tokens, d_site)`."""
        return self._by_site(self.sae.decode(codes))

    def decoder(self) -> dict[Site, Tensor]:
        """What each feature writes at each Site, `(n_features, d_site)`."""
        return self._by_site(self.sae.W_dec)

    def decoder_norms(self) -> Float[Tensor, "n_features n_sites"]:
        """How much each feature writes at each Site, in units of what is usual there; their squares sum to 1."""
        written = self.decoder().items()
        return torch.stack([rows.norm(dim=1) * self.scales.get(site, 1.0) for site, rows in written], dim=1)

    def shares(self) -> Float[Tensor, "n_features n_sites"]:
        """Where each feature lives: what part of its squared norm it writes at each Site, in the same units."""
        squares = self.decoder_norms().square()
        return squares / squares.sum(1, keepdim=True).clamp(min=torch.finfo(squares.dtype).tiny)

    def save(self, folder: Path | str) -> None:
        """Write the native folder of the SAE; Sites and widths go with its metadata."""
        described = {str(site): [width, self.scales.get(site, 1.0)] for site, width in self.widths.items()}
        other = self.sae.with_rule(self.sae.rule)
        other.cfg = with_metadata(self.sae.cfg, **{_KEY: described})
        other.save(folder)

    @classmethod
    def load(cls, folder: Path | str, *, device: torch.device | str = "cpu") -> "Crosscoder":
        """Read a folder that `save` wrote.

        Raises:
            FileError: there is none, it is damaged, or it holds an SAE of one Site.
        """
        return cls.of(SAE.load(folder, device=device), name=folder)

    @classmethod
    def of(cls, sae: SAE, *, name: Path | str = "this") -> "Crosscoder":
        """The crosscoder whose whole is `sae`, as `saekit.load` gives it from the Hub.

        Args:
            name: of the SAE, for the error.

        Raises:
            FileError: it is an SAE of one Site.
        """
        if not joined_sites(sae.cfg.metadata):
            raise FileError(f"{name} holds an SAE of one Site, not a crosscoder; load it with SAE.load")
        by_site = {Site.parse(site): facts for site, facts in sae.cfg.metadata[_KEY].items()}
        return cls(
            sae,
            widths={site: int(width) for site, (width, _) in by_site.items()},
            scales={site: float(scale) for site, (_, scale) in by_site.items()},
        )

    def directions(self) -> tuple[Float[Tensor, "n_features d_model"], Float[Tensor, "n_features d_model"]]:
        """What each feature writes and reads over all Sites, in units of what is usual at each."""
        scale = per_dimension(self.widths, self.scales).to(self.sae.W_dec)
        return self.sae.W_dec * scale, self.sae.encoder.detach() / scale

    def _by_site(self, joined: Float[Tensor, "rows d_model"]) -> dict[Site, Tensor]:
        return dict(zip(self.widths, joined.split(list(self.widths.values()), dim=1), strict=True))


def joined_sites(metadata: Mapping[str, Any]) -> tuple[str, ...]:
    """The Sites of a crosscoder whose folder says this; none of an SAE of one Site."""
    described = metadata.get(_KEY)
    return tuple(described) if isinstance(described, Mapping) else ()


def per_dimension(widths: Mapping[Site, int], scales: Mapping[Site, float]) -> Float[Tensor, " d_model"]:
    """The scale of every number of the joined vectors; 1 where none is given."""
    return torch.cat([torch.full((width,), scales.get(site, 1.0)) for site, width in widths.items()])


def join(
    vectors: Mapping[Site, Float[Tensor, "n_tokens d_site"]], widths: Mapping[Site, int]
) -> Float[Tensor, "n_tokens d_model"]:
    """The vectors of each token end to end, in the order of `widths`.

    Raises:
        ShapeError: a Site is missing, or has another width or number of tokens than it should.
    """
    missing = [str(site) for site in widths if site not in vectors]
    if missing:
        raise ShapeError(f"a crosscoder reads all of its Sites, and {', '.join(missing)} is missing; read it too")
    shapes = {str(site): tuple(vectors[site].shape) for site in widths}
    n_tokens = len(vectors[next(iter(widths))])
    if any(shapes[str(site)] != (n_tokens, width) for site, width in widths.items()):
        raise ShapeError(
            "the Sites of a crosscoder need one vector for each token, "
            f"{', '.join(map(str, widths.values()))} numbers wide, got {', '.join(map(str, shapes.values()))}; "
            "read them in one pass, with one mask"
        )
    return torch.cat([vectors[site] for site in widths], dim=1)
