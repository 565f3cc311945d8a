"""The transformer block that all models of this room are made of: attention, feed-forward, and their order.

Attention is written out, not fused, so that its pattern is a tensor with a Site (`attention.pattern:out`).
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from saekit.errors import SaekitError

Rotation = tuple[Float[Tensor, "context half"], Float[Tensor, "context half"]]
"""Cosine and sine of the angle that each position turns each pair of channels by."""


class Attention(nn.Module):
    """Multi-head attention of tokens over themselves, or over a `source` of another width.

    Attributes:
        pattern: passes on the pattern `(batch, heads, tokens, sources)`.
    """

    def __init__(
        self, width: int, heads: int, *, source_width: int | None = None, inner: int | None = None, bias: bool = True
    ):
        super().__init__()
        inner = inner or width
        if inner % heads:
            raise SaekitError(f"{heads} heads cannot share {inner} channels equally; give a number that divides them")
        self.heads = heads
        self.q = nn.Linear(width, inner, bias=bias)
        self.k = nn.Linear(source_width or width, inner, bias=bias)
        self.v = nn.Linear(source_width or width, inner, bias=bias)
        self.out = nn.Linear(inner, width, bias=bias)
        self.pattern = nn.Identity()

    def forward(
        self,
        x: Float[Tensor, "batch tokens width"],
        source: Float[Tensor, "batch sources source_width"] | None = None,
        *,
        may_see: Bool[Tensor, "*#mask"] | None = None,
        rotation: Rotation | None = None,
    ) -> Float[Tensor, "batch tokens width"]:
        """Args:
        may_see: True where a token (second to last dimension) may attend to a source (last); broadcast over
            `(batch, heads, tokens, sources)`. A token that may see nothing gets the plain mean.
        rotation: of the positions, for rotary embeddings; None for none.
        """
        q, k, v = self.project(x, x if source is None else source, rotation)
        return self.out(self.mix(q, k, v, may_see))

    def project(self, x: Tensor, source: Tensor, rotation: Rotation | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, `(batch, heads, tokens, d_head)` each, turned by their positions."""
        q, k, v = self.split(self.q(x)), self.split(self.k(source)), self.split(self.v(source))
        return (q, k, v) if rotation is None else (rotate(q, rotation), rotate(k, rotation), v)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, may_see: Tensor | None = None) -> Tensor:
        """Values mixed by the match of queries and keys, `(batch, tokens, inner)`; `out` has yet to come."""
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        if may_see is not None:
            # not minus infinity, which is NaN for a token that may see nothing
            scores = scores.masked_fill(~may_see, torch.finfo(scores.dtype).min)
        mixed = self.pattern(scores.softmax(-1)) @ v
        return mixed.transpose(1, 2).flatten(2)

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class FeedForward(nn.Module):
    """Two linear maps with a GELU between them; gated (SwiGLU), without biases, for Llama-like models."""

    def __init__(self, width: int, inner: int, *, gated: bool = False):
        super().__init__()
        self.up = nn.Linear(width, inner, bias=not gated)
        self.gate = nn.Linear(width, inner, bias=False) if gated else None
        self.down = nn.Linear(inner, width, bias=not gated)

    def forward(self, x: Float[Tensor, "*tokens width"]) -> Float[Tensor, "*tokens width"]:
        up = self.up(x)
        return self.down(nn.functional.gelu(up) if self.gate is None else nn.functional.silu(self.gate(x)) * up)

    @property
    def macs(self) -> int:
        """Multiplications per token."""
        return (2 if self.gate is None else 3) * self.up.weight.numel()


class Block(nn.Module):
    """Pre-norm transformer block, without a choice: `x += attention(norm1(x)); x += feed(norm2(x))`."""

    def __init__(self, width: int, heads: int, inner: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.feed = FeedForward(width, inner)

    def forward(
        self, x: Float[Tensor, "batch tokens width"], *, may_see: Bool[Tensor, "*#mask"] | None = None
    ) -> Float[Tensor, "batch tokens width"]:
        x = x + self.attention(self.norm1(x), may_see=may_see)
        return x + self.feed(self.norm2(x))


def macs_of_block(tokens: int, width: int, ratio: int) -> int:
    """Multiplications of a `Block` whose feed-forward is `ratio` times as wide."""
    return (4 + 2 * ratio) * tokens * width**2 + 2 * tokens**2 * width


def rotation_of(positions: Int[Tensor, " context"], d_head: int, *, base: float = 10_000.0) -> Rotation:
    """Angles of rotary position embeddings (Su et al., arXiv 2104.09864) for heads of `d_head` channels."""
    rates = base ** (-torch.arange(0, d_head, 2, device=positions.device) / d_head)
    angles = positions[:, None] * rates
    return angles.cos(), angles.sin()


def rotate(x: Float[Tensor, "batch heads context d_head"], rotation: Rotation) -> Tensor:
    """Each pair of channels (one of the first half, one of the second) turned by its position's angle."""
    cos, sin = rotation
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


def initialise(model: nn.Module, *, seed: int, std: float | None = None, out_std: float | None = None) -> None:
    """Normal weights, zero biases, norms of one.

    Args:
        std: of every weight; None scales each matrix so that its output has a third of its input's variance.
        out_std: of the maps that write into the residual stream, usually smaller; the same as the others if None.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            nn.init.constant_(parameter, 1.0 if name.endswith("weight") else 0.0)
        else:
            writes = name.endswith(("out.weight", "down.weight"))
            usual = (3 * parameter.shape[-1]) ** -0.5 if std is None else std
            nn.init.normal_(parameter, std=out_std if writes and out_std is not None else usual, generator=generator)
