"""A-ViT: a vision transformer whose tokens stop when a score, read off one of their own channels, adds up to 1.

Yin et al., CVPR 2022 (arXiv 2112.07658). After every block, channel 0 of a token's residual vector becomes a
halting score; scores add up over the layers, and at `1 - eps` the token stops: later blocks neither compute nor
see it. The class token's states, weighted by its scores, are averaged over depth and classified.

Known from the paper's Algorithm 1 and its released code: the halting rule, the weights, the ponder loss, fixed
gain and shift. Our choices: halted tokens are multiplied out within the graph (the released code writes zeros past
it, and lets biases refill them), and scores of a token that is kept from halting never take more than what
remains, so that the weights of the class token add up to 1 under every intervention.

Sites of layer l, `(batch, tokens, ...)`, the class token first:

    layers.l.block:out          the residual stream behind the block
    layers.l.halt:in            the same, as the halting gate reads it: the path of the *decision*
    layers.l.content:in         the same, as the next block and the class average read it: the path of the *content*
    layers.l.halt.logit:out     gain * channel 0 + shift
    layers.l.halt.score:out     its sigmoid, before it is added up
    layers.l.halt.decision:out  True where a token halts here; may be edited
    layers.l.visible:out        True where a token may be attended to; halting aside
"""

from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from saekit.adaptive.block import Block, initialise
from saekit.adaptive.patches import patches_of
from saekit.adaptive.trace import DecisionTrace
from saekit.errors import SaekitError

OPTIONS = ("go on", "halt")


@dataclass(frozen=True, kw_only=True, slots=True)
class AViTConfig:
    """Sizes of the model, and the constants of its halting rule.

    Attributes:
        image: height and width in pixels.
        patch: height and width of a patch; a token each.
        gain, shift: of the halting logit, fixed. The paper's 5 and -10 (as two re-implementations give them):
            nothing stops before its channel 0 exceeds 2.
        eps: a token stops when its scores add up to `1 - eps`.
    """

    image: int = 16
    patch: int = 2
    channels: int = 1
    classes: int = 10
    width: int = 48
    layers: int = 6
    heads: int = 4
    ratio: int = 4
    gain: float = 5.0
    shift: float = -10.0
    eps: float = 0.01

    def __post_init__(self) -> None:
        if self.image % self.patch:
            raise SaekitError(f"{self.image} pixels are no whole number of patches of {self.patch}; give a multiple")
        if not 0 < self.eps < 1 or self.layers < 1:
            raise SaekitError(f"eps={self.eps}, layers={self.layers}: give eps between 0 and 1 and at least one layer")

    @property
    def side(self) -> int:
        return self.image // self.patch

    @property
    def tokens(self) -> int:
        """Patches and the class token."""
        return self.side**2 + 1


@dataclass(frozen=True, slots=True, eq=False)
class AViTRun:
    """What one forward pass gave, layer by layer.

    Attributes:
        logits: `(batch, classes)`.
        scores: `(batch, layers, tokens)` halting scores; the last layer's has no effect.
        live: `(batch, layers, tokens)` which tokens entered each block.
        reached: `(batch, layers, tokens)` where each token stopped.
        spent: `(batch, layers, tokens)` scores added up, this layer's included.
        remainder: `(batch, tokens)` 1 minus the scores before the layer at which the token stopped.
        weights: `(batch, layers)` of the class token's states in the average; they add up to 1.
        states: `(batch, layers, width)` of the class token.
    """

    logits: Float[Tensor, "batch classes"]
    scores: Float[Tensor, "batch layers tokens"]
    live: Bool[Tensor, "batch layers tokens"]
    reached: Bool[Tensor, "batch layers tokens"]
    spent: Float[Tensor, "batch layers tokens"]
    remainder: Float[Tensor, "batch tokens"]
    weights: Float[Tensor, "batch layers"]
    states: Float[Tensor, "batch layers width"]

    @property
    def depth(self) -> Float[Tensor, "batch tokens"]:
        """Blocks that each token went through."""
        return self.live.sum(1).float()

    @property
    def ponder(self) -> Float[Tensor, "batch tokens"]:
        """Depth plus remainder: the cost that training holds down. Only the remainder has a gradient."""
        return self.depth + self.remainder


class HaltGate(nn.Module):
    """Reads the halting score off channel 0; no weights."""

    def __init__(self, config: AViTConfig):
        super().__init__()
        self.gain, self.shift, self.threshold = config.gain, config.shift, 1 - config.eps
        self.logit, self.score, self.decision = nn.Identity(), nn.Identity(), nn.Identity()

    def forward(
        self,
        x: Float[Tensor, "*tokens width"],
        spent: Float[Tensor, "*tokens"],
        live: Bool[Tensor, "*tokens"],
    ) -> tuple[Float[Tensor, "*tokens"], Bool[Tensor, "*tokens"]]:
        """Scores, and which of the live tokens stop now."""
        score = self.score(self.logit(self.gain * x[..., 0] + self.shift).sigmoid())
        return score, self.decision((spent + score >= self.threshold) & live)

    def readout(self, width: int) -> tuple[Float[Tensor, " width"], float]:
        """The halting logit as `x @ direction + constant`: it is linear in the residual vector."""
        direction = torch.zeros(width)
        direction[0] = self.gain
        return direction, self.shift


class AViTLayer(nn.Module):
    """One block, the gate behind it, and the places where its Sites are."""

    def __init__(self, config: AViTConfig):
        super().__init__()
        self.block = Block(config.width, config.heads, config.ratio * config.width)
        self.halt = HaltGate(config)
        self.content, self.visible = nn.Identity(), nn.Identity()


class AViT(nn.Module):
    """See the module's docstring; `a_vit_gathered` has the forward passes that compute only what is left."""

    def __init__(self, config: AViTConfig, *, seed: int = 0):
        super().__init__()
        self.config = config
        self.embed = nn.Linear(config.patch**2 * config.channels, config.width)
        self.class_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.position = nn.Parameter(torch.zeros(1, config.tokens, config.width))
        self.layers = nn.ModuleList(AViTLayer(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, eps=1e-6)
        self.head = nn.Linear(config.width, config.classes)
        initialise(self, seed=seed)

    def tokens_of(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch tokens d"]:
        """Embedded patches with their positions, the class token first.

        Raises:
            ShapeError: images of another size.
        """
        config = self.config
        patches = patches_of(images, channels=config.channels, image=config.image, patch=config.patch)
        tokens = torch.cat([self.class_token.expand(len(images), -1, -1), self.embed(patches)], dim=1)
        return tokens + self.position

    @property
    def stack(self) -> list[AViTLayer]:
        """The layers, in their order."""
        return cast(list[AViTLayer], list(self.layers))

    def classify(self, average: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch classes"]:
        """Logits of the class token's average, or of its state at any one layer."""
        return self.head(self.norm(average))

    def forward(self, images: Float[Tensor, "batch channels height width"], *, halts: bool = True) -> AViTRun:
        """Every token in every layer, halted ones masked out; `halts=False` is the plain vision transformer."""
        x = self.tokens_of(images)
        live = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        spent, left = torch.zeros_like(x[..., 0]), torch.ones_like(x[..., 0])
        remainder = torch.zeros_like(left)
        per_layer: list[tuple[Tensor, ...]] = []
        for number, layer in enumerate(self.stack):
            here = live[..., None]
            x = layer.block(x * here, may_see=layer.visible(live)[:, None, None, :]) * here
            score, reached = layer.halt(x, spent, live)
            if not halts:
                score, reached = torch.zeros_like(score), torch.zeros_like(reached)
            x = layer.content(x)
            reached = live if number == len(self.layers) - 1 else reached & live
            share = share_of(score, left, live, reached)
            remainder = remainder + left * reached
            spent = spent + score * live
            per_layer.append((score, live, reached, spent, share[:, 0], x[:, 0]))
            left = left - share * ~reached
            live = live & ~reached
        scores, lives, reaches, spents, weights, states = (
            torch.stack(parts, dim=1) for parts in zip(*per_layer, strict=True)
        )
        logits = self.classify((weights[..., None] * states).sum(1))
        return AViTRun(logits, scores, lives, reaches, spents, remainder, weights, states)

    def macs(self, counts: Float[Tensor, "batch layers"]) -> Float[Tensor, " batch"]:
        """Multiplications of images of which `counts` tokens enter each block, embedding and head included."""
        config, width = self.config, self.config.width
        per_layer = (4 + 2 * config.ratio) * width**2 * counts + 2 * width * counts**2
        ends = (config.tokens - 1) * config.patch**2 * config.channels * width + width * config.classes
        return per_layer.sum(1) + ends


def share_of(
    score: Float[Tensor, "*tokens"],
    left: Float[Tensor, "*tokens"],
    live: Bool[Tensor, "*tokens"],
    reached: Bool[Tensor, "*tokens"],
) -> Float[Tensor, "*tokens"]:
    """Of each token's 1, what this layer takes: its score, or all that is left where the token stops."""
    # without interventions a score that does not reach the threshold is less than what is left
    return torch.where(reached, left, torch.minimum(score, left)) * live


@torch.no_grad()
def trace_of(model: AViT, run: AViTRun) -> DecisionTrace:
    """The decisions of a forward pass.

    `more` holds `weights` and `class_logits` (what each layer's class token alone would say), `useful_macs`
    (counted until the class token stops: nothing later can change the answer) and `logits`.
    """
    counts = run.live.sum(2).float()
    answered = run.live[:, :, :1].float()[..., 0]
    full = torch.full((1, model.config.layers), float(model.config.tokens))
    # in the last layer whoever is left stops, whatever the score
    margin = run.spent - (1 - model.config.eps)
    return DecisionTrace(
        model="a-vit",
        options=OPTIONS,
        decision=run.reached.long(),
        margin=margin,
        score=run.scores,
        live=run.live,
        macs=model.macs(counts),
        full_macs=float(model.macs(full)),
        grid=(model.config.side, model.config.side),
        extra=1,
        more={
            "weights": run.weights,
            "class_logits": model.classify(run.states),
            "useful_macs": model.macs(counts * answered),
            "logits": run.logits,
        },
    )
