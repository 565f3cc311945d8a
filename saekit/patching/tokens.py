"""The tokens of a running forward pass: which of them an SAE may touch, and where each stands."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from saekit.activations.mask import MaskPolicy, on_grid
from saekit.activations.tokens import TokenRows, bos_of, pad_of
from saekit.errors import SaekitError
from saekit.targets import Site, Target
from saekit.targets.passes import Passes


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenMask:
    """The one `MaskPolicy`, with the ids that it needs.

    Attributes:
        bos: the id that opens texts, None if there is none.
        pad: the id that fills rows up, None if there is none or texts use it too. Where the model is given an
            attention mask, that says what is padding instead.
    """

    policy: MaskPolicy = MaskPolicy()
    bos: int | None = None
    pad: int | None = None

    @classmethod
    def of(cls, target: Target, mask: "MaskPolicy | TokenMask") -> "TokenMask":
        """A policy with the ids of the target's tokenizer; a `TokenMask` as it is."""
        if isinstance(mask, TokenMask):
            return mask
        if target.tokenizer is None:
            return cls(policy=mask)
        return cls(policy=mask, bos=bos_of(target.tokenizer), pad=pad_of(target.tokenizer))


@dataclass(frozen=True, slots=True)
class Grid:
    """The tokens at one call of a submodule, as rows and positions.

    Attributes:
        keep: True where a token counts; the others pass by.
        ids: token ids; None where the model was given something else.
        past: position of the first column; more than 0 where a cache holds what came before.
        number: which forward pass of the context, from 0; under `generate`, 0 reads the prompt.
        call: which call of the submodule in that pass.
        padded_in_front: whether a row of this pass begins with padding, so that columns are not positions in its text.
    """

    keep: Bool[Tensor, "batch context"]
    ids: Int[Tensor, "batch context"] | None
    past: int
    number: int
    call: int
    padded_in_front: bool = False

    @property
    def draw(self) -> int:
        """A number for this pass and call, different in each: for edits that draw at random."""
        return self.number * 1009 + self.call

    def kept(self) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
        """Row and column of every token that counts, in the order in which codes hold them."""
        row, column = self.keep.nonzero(as_tuple=True)
        return row, column


def grid_of(x: Tensor, site: Site, passes: Passes, mask: TokenMask) -> Grid:
    """Which tokens the vectors `x (..., d_model)` belong to.

    Raises:
        ShapeError: the vectors do not fit the token ids of the pass.
        SaekitError: the mask goes by token ids, and the model was given none.
    """
    given, lead = passes.given, x.shape[:-1]
    if given.ids is None:
        if _needs_ids(mask):
            raise SaekitError(
                "the mask leaves out BOS or padding by token id, but the model was given none; "
                "call it on token ids, or pass mask=MaskPolicy(drop_bos=False, drop_padding=False)"
            )
        shape = (lead[0], math.prod(lead[1:])) if lead else (1, 1)
        ids = None
    else:
        shape, ids = given.ids.shape, given.ids.to(x.device)
    keep = torch.ones(shape, dtype=torch.bool, device=x.device)
    in_front = False
    if ids is not None:
        pad = mask.pad if given.attended is None else None
        rows = TokenRows.from_ids(ids, bos=mask.bos, pad=pad)
        keep = mask.policy.keep(rows, ids, on_grid(x.detach().float(), ids, site))
        if given.attended is not None and mask.policy.drop_padding:
            keep = keep & given.attended.to(x.device)
        attended = given.attended if given.attended is not None else torch.ne(ids, -1 if pad is None else pad)
        in_front = not bool(attended[:, :1].all())
    elif mask.policy.max_norm is not None:
        keep = x.detach().float().norm(dim=-1).reshape(shape) <= mask.policy.max_norm
    return Grid(keep, ids, given.past, passes.number, passes.call, in_front)


def _needs_ids(mask: TokenMask) -> bool:
    by_bos = mask.policy.drop_bos and mask.bos is not None
    return by_bos or (mask.policy.drop_padding and mask.pad is not None)
