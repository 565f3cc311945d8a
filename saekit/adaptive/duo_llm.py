"""Duo-LLM: a language model with a big and a small feed-forward in every layer, and a choice between them per token.

Alizadeh et al. (arXiv 2410.10846), a Llama-like decoder (RMSNorm, rotary positions, SwiGLU, tied embeddings). Trained
with a coin flip per token and layer, so that any route works; then one can ask which route would have been best
(`duo_oracle`), and which a trained router takes.

Known from the paper: the two feed-forwards, the shared attention, the coin flips, a linear router per layer, and its
budget loss. Our choices, where the paper is silent: one norm for both feed-forwards, the router reads that normed
vector and has a bias, `skip` leaves out the feed-forward alone, not attention, and the language model is frozen
while the router is trained.

Sites of layer l, `(batch, tokens, ...)`:

    layers.l.router:in          the normed vector as the router reads it: the path of the *decision*
    layers.l.feed:in            the same, as the feed-forwards read it: the path of the *content*
    layers.l.router.logits:out  one per option
    layers.l.choice:out         0 small, 1 big, 2 skip; may be edited
    layers.l.feed:out           what the one that was chosen gave
    layers.l:out                the residual stream behind the layer
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from saekit.adaptive.block import Attention, FeedForward, Rotation, initialise, rotation_of
from saekit.adaptive.trace import DecisionTrace
from saekit.errors import SaekitError, ShapeError

SMALL, BIG, SKIP = 0, 1, 2
OPTIONS = ("small", "big", "skip")
Past = Sequence[tuple[Tensor, Tensor]]
"""Keys and values of each layer, `(batch, heads, positions, d_head)`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DuoConfig:
    """Sizes of the model.

    Attributes:
        big, small: inner widths of the feed-forwards (in the paper 4 times the width, and a sixteenth of that).
        options: 2 for small and big, 3 for skip as well; of the router.
    """

    vocabulary: int = 4096
    width: int = 96
    layers: int = 6
    heads: int = 4
    big: int = 384
    small: int = 24
    context: int = 96
    options: int = 2

    def __post_init__(self) -> None:
        if self.options not in (2, 3) or not 0 < self.small < self.big:
            raise SaekitError(
                f"options={self.options}, small={self.small}, big={self.big}: give 2 or 3 options, and small below big"
            )


@dataclass(frozen=True, slots=True, eq=False)
class DuoRun:
    """What one forward pass gave.

    Attributes:
        logits: `(batch, tokens, vocabulary)`.
        route: `(batch, tokens, layers)` the option that each token took.
        router: `(batch, tokens, layers, options)` what the router said, whoever decided.
    """

    logits: Float[Tensor, "batch tokens vocabulary"]
    route: Int[Tensor, "batch tokens layers"]
    router: Float[Tensor, "batch tokens layers options"]


class Router(nn.Module):
    """A linear map from the normed vector to one number per option."""

    def __init__(self, width: int, options: int):
        super().__init__()
        self.linear = nn.Linear(width, options)
        self.logits = nn.Identity()

    def forward(self, z: Float[Tensor, "*tokens width"]) -> Float[Tensor, "*tokens options"]:
        return self.logits(self.linear(z))

    def readout(self) -> tuple[Float[Tensor, " width"], float]:
        """The margin of big over small as `z @ direction + constant`: it is linear in what the router reads."""
        weight, bias = self.linear.weight.detach(), self.linear.bias.detach()
        return weight[BIG] - weight[SMALL], float(bias[BIG] - bias[SMALL])


class DuoFeedForward(nn.Module):
    """Both feed-forwards; each computes only the tokens that chose it."""

    def __init__(self, config: DuoConfig):
        super().__init__()
        self.small = FeedForward(config.width, config.small, gated=True)
        self.big = FeedForward(config.width, config.big, gated=True)

    def forward(
        self, z: Float[Tensor, "batch tokens width"], choice: Int[Tensor, "batch tokens"]
    ) -> Float[Tensor, "batch tokens width"]:
        flat, chosen = z.flatten(0, 1), choice.flatten()
        out = torch.zeros_like(flat)
        for option, feed in ((SMALL, self.small), (BIG, self.big)):
            here = (chosen == option).nonzero()[:, 0]
            out = out.index_add(0, here, feed(flat[here]))
        return out.view_as(z)

    def mixed(self, z: Tensor, shares: Float[Tensor, "batch tokens options"]) -> Tensor:
        """Both, weighted; skip adds nothing. How the router is trained."""
        return shares[..., SMALL, None] * self.small(z) + shares[..., BIG, None] * self.big(z)


class DuoLayer(nn.Module):
    """Attention, then the feed-forward of choice; one norm before each."""

    def __init__(self, config: DuoConfig):
        super().__init__()
        self.norm1 = nn.RMSNorm(config.width, eps=1e-6)
        self.attention = Attention(config.width, config.heads, bias=False)
        self.norm2 = nn.RMSNorm(config.width, eps=1e-6)
        self.router = Router(config.width, config.options)
        self.choice = nn.Identity()
        self.feed = DuoFeedForward(config)

    def forward(
        self, x: Tensor, attended: Tensor, route: Tensor | None, threshold: float, tau: float | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Args:
        attended: what attention gives at the tokens.
        route: options given from outside; None lets the router decide.
        tau: for the soft mixture, how sharp it is; None takes the one option.
        """
        u = x + attended
        z = self.norm2(u)
        said = self.router(z)
        choice = self.choice(decide(said, threshold) if route is None else route)
        if tau is not None:
            return u + self.feed.mixed(z, (tau * said).softmax(-1)), choice, said
        return u + self.feed(z, choice), choice, said


class DuoLLM(nn.Module):
    """See the module's docstring.

    Attributes:
        threshold: big is taken where its margin exceeds this: the dial that brings the mean number of big layers
            to a budget after training (`duo_router.calibrate`).
    """

    threshold: Tensor

    def __init__(self, config: DuoConfig, *, seed: int = 0):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocabulary, config.width)
        self.layers = nn.ModuleList(DuoLayer(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, eps=1e-6)
        self.register_buffer("threshold", torch.zeros(()))
        initialise(self, seed=seed, std=0.02, out_std=0.02 / (2 * config.layers) ** 0.5)

    def forward(
        self, ids: Int[Tensor, "batch tokens"], route: Int[Tensor, "*#route"] | None = None, *, tau: float | None = None
    ) -> DuoRun:
        """Args:
            route: options, broadcast to `(batch, tokens, layers)`; None lets the router decide.
            tau: mix both feed-forwards softly, this sharply, instead of taking one.

        Raises:
            ShapeError: a route that does not fit, or more tokens than the context.
            SaekitError: an option or a token id that does not exist.
        """
        self.check_ids(ids)
        given = self.spread(route, ids.shape) if route is not None else None
        rotation = self.rotation(torch.arange(ids.shape[1], device=ids.device))
        may_see = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).tril()
        x, routes, said = self.embed(ids), [], []
        threshold = float(self.threshold)
        for number, layer in enumerate(self.stack):
            attended = layer.attention(layer.norm1(x), may_see=may_see, rotation=rotation)
            x, choice, router = layer(x, attended, None if given is None else given[..., number], threshold, tau)
            routes.append(choice)
            said.append(router)
        return DuoRun(self.logits(x), torch.stack(routes, -1), torch.stack(said, 2))

    def beside(
        self,
        ids: Int[Tensor, "batch tokens"],
        route: Int[Tensor, "batch tokens layers"],
        past: Past,
        positions: Int[Tensor, " tokens"],
    ) -> tuple[Float[Tensor, "batch tokens vocabulary"], Past]:
        """Tokens that each see themselves and the `past` before them, not one another: what-ifs, side by side.

        Returns their logits and their own keys and values, `(batch, heads, tokens, d_head)` per layer.
        """
        rotation = self.rotation(positions)
        before = positions[:, None] > torch.arange(past[0][0].shape[2], device=ids.device)
        x, own = self.embed(ids), []
        for number, layer in enumerate(self.stack):
            normed = layer.norm1(x)
            q, k, v = layer.attention.project(normed, normed, rotation)
            own.append((k, v))
            attended = layer.attention.out(_past_and_self(q, k, v, *past[number], before))
            x, _, _ = layer(x, attended, route[..., number], 0.0, None)
        return self.logits(x), own

    @torch.no_grad()
    def keys_and_values(self, ids: Int[Tensor, "batch tokens"], route: Int[Tensor, "*#route"]) -> Past:
        """What later tokens see of these, on a route."""
        given = self.spread(route, ids.shape)
        rotation = self.rotation(torch.arange(ids.shape[1], device=ids.device))
        may_see = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).tril()
        x, past = self.embed(ids), []
        for number, layer in enumerate(self.stack):
            normed = layer.norm1(x)
            q, k, v = layer.attention.project(normed, normed, rotation)
            past.append((k, v))
            x, _, _ = layer(
                x, layer.attention.out(layer.attention.mix(q, k, v, may_see)), given[..., number], 0.0, None
            )
        return past

    @property
    def stack(self) -> list[DuoLayer]:
        """The layers, in their order."""
        return cast(list[DuoLayer], list(self.layers))

    def logits(self, x: Tensor) -> Tensor:
        return self.norm(x) @ self.embed.weight.T

    def rotation(self, positions: Int[Tensor, " tokens"]) -> Rotation:
        return rotation_of(positions, self.config.width // self.config.heads)

    def spread(self, route: Tensor, shape: Sequence[int]) -> Int[Tensor, "batch tokens layers"]:
        """A route for every token and layer, checked."""
        full = (*shape, self.config.layers)
        try:
            spread = route.expand(full)
        except RuntimeError as error:
            raise ShapeError(
                f"a route of shape {tuple(route.shape)} does not fit {full} (batch, tokens, layers); "
                f"give one option for each of the {self.config.layers} layers"
            ) from error
        if bool(((spread < 0) | (spread >= len(OPTIONS))).any()):
            raise SaekitError(f"a route holds {int(route.max())}; options are 0 small, 1 big, 2 skip")
        return spread

    def check_ids(self, ids: Tensor) -> None:
        if ids.shape[1] == 0 or ids.shape[1] > self.config.context:
            raise ShapeError(
                f"{ids.shape[1]} tokens in a row, but this model reads 1 to {self.config.context}; cut the text"
            )
        if bool(((ids < 0) | (ids >= self.config.vocabulary)).any()):
            raise SaekitError(
                f"token id {int(ids.max())} is outside a vocabulary of {self.config.vocabulary}; "
                "use the tokenizer that the model was trained with (pystd's, for the bundled one)"
            )

    def macs_per_option(self) -> Float[Tensor, " options"]:
        """Multiplications of one token in one feed-forward, by option."""
        feed = self.stack[0].feed
        return torch.tensor([feed.small.macs, feed.big.macs, 0.0])


def decide(said: Float[Tensor, "*tokens options"], threshold: float) -> Int[Tensor, "*tokens"]:
    """The option with the largest number, big being handicapped by the threshold."""
    handicap = said.new_zeros(said.shape[-1])
    handicap[BIG] = threshold
    return (said - handicap).argmax(-1)


def margin_of_big(said: Float[Tensor, "*tokens options"]) -> Float[Tensor, "*tokens"]:
    """By how much big is ahead of the best other option."""
    others = said.clone()
    others[..., BIG] = -torch.inf
    return said[..., BIG] - others.max(-1).values


def next_token_nats(logits: Float[Tensor, "batch tokens v"], ids: Int[Tensor, "batch tokens"]) -> Tensor:
    """Loss of each token but the last, at what comes next: `(batch, tokens - 1)`."""
    return nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")


@torch.no_grad()
def trace_of(
    model: DuoLLM, run: DuoRun, ids: Int[Tensor, "batch tokens"], *, texts: tuple[tuple[str, ...], ...] | None = None
) -> DecisionTrace:
    """The routes of a forward pass; `more` holds `nats (batch, tokens - 1)`. MACs are of the feed-forwards alone."""
    score = margin_of_big(run.router).transpose(1, 2)
    decision = run.route.transpose(1, 2)
    macs = model.macs_per_option()
    return DecisionTrace(
        model="duo-llm",
        options=OPTIONS,
        decision=decision,
        margin=score - float(model.threshold),
        score=score,
        live=torch.ones_like(decision, dtype=torch.bool),
        macs=macs[decision].sum((1, 2)),
        full_macs=float(macs[BIG]) * decision[0].numel(),
        counted="the feed-forwards' multiplications",
        texts=texts,
        more={"nats": next_token_nats(run.logits, ids)},
    )


def _past_and_self(
    q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor, before: Bool[Tensor, "tokens past"]
) -> Tensor:
    scale = q.shape[-1] ** -0.5
    to_past = (q @ past_k.transpose(-1, -2) * scale).masked_fill(~before, -torch.inf)
    to_self = (q * k).sum(-1, keepdim=True) * scale
    pattern = torch.cat([to_past, to_self], -1).softmax(-1)
    mixed = pattern[..., :-1] @ past_v + pattern[..., -1:] * v
    return mixed.transpose(1, 2).flatten(2)
