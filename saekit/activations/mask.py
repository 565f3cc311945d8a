"""Which tokens count: one policy for harvest, training, evaluation, dashboards and patching.

BOS has a norm many times that of other tokens in most language models and says nothing about the text,
so by default it is neither trained on nor reconstructed. A masked token's activation passes by the SAE.
"""

from dataclasses import dataclass
from typing import Any

from jaxtyping import Bool, Float, Int
from torch import Tensor

from saekit.activations.tokens import TokenRows
from saekit.errors import ShapeError
from saekit.targets import Site


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskPolicy:
    """Which activations an SAE works on.

    Attributes:
        drop_bos: leave out BOS wherever it stands.
        drop_padding: leave out padding.
        max_norm: leave out vectors of a larger norm (attention sinks in the middle of a text); absolute,
            so that the same token is in or out at every stage.
    """

    drop_bos: bool = True
    drop_padding: bool = True
    max_norm: float | None = None

    def keep_tokens(self, rows: TokenRows, ids: Int[Tensor, "batch context"]) -> Bool[Tensor, "batch context"]:
        """True where a token counts, as far as its id decides."""
        keep = ids == ids
        if self.drop_bos and rows.bos is not None:
            keep = keep & (ids != rows.bos)
        if self.drop_padding and rows.pad is not None:
            keep = keep & (ids != rows.pad)
        return keep

    def keep(
        self,
        rows: TokenRows,
        ids: Int[Tensor, "batch context"],
        vectors: Float[Tensor, "*calls batch context d_model"],
    ) -> Bool[Tensor, "*calls batch context"]:
        """True where a token's activation counts."""
        keep = self.keep_tokens(rows, ids).expand(vectors.shape[:-1])
        if self.max_norm is not None:
            norms = vectors.norm(dim=-1)
            # what is not finite stays in, so that the harvest refuses it instead of losing it here
            keep = keep & ((norms <= self.max_norm) | ~norms.isfinite())
        return keep

    def as_dict(self) -> dict[str, Any]:
        """For a config file."""
        return {"drop_bos": self.drop_bos, "drop_padding": self.drop_padding, "max_norm": self.max_norm}


def on_grid(
    vectors: Float[Tensor, "*tokens d_model"], ids: Int[Tensor, "batch context"], site: Site
) -> Float[Tensor, "batch context d_model"]:
    """One vector for each token id; some submodules work on the tokens of all rows in one dimension.

    Raises:
        ShapeError: not one vector per token.
    """
    lead = tuple(vectors.shape[:-1])
    if lead not in (tuple(ids.shape), (ids.numel(),)):
        raise ShapeError(
            f"{site} gives vectors {lead} for token ids {tuple(ids.shape)}; choose a Site with one vector per token"
        )
    return vectors.reshape(*ids.shape, vectors.shape[-1])
