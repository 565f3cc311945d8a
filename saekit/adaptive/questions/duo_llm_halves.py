"""What is known of tokens in one layer of Duo-LLM: what its router read and chose, and what routes were worth."""

from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from saekit.activations.batch import ActivationBatch
from saekit.adaptive.deciding import DecidingTarget, Step
from saekit.adaptive.duo_llm import BIG, SMALL, DuoLLM
from saekit.adaptive.duo_oracle import all_routes, best_of, scan, with_budget
from saekit.adaptive.harvest import harvest
from saekit.adaptive.telling import activation_of
from saekit.adaptive.trace import DecisionTrace
from saekit.codes import SparseCodes
from saekit.errors import SaekitError
from saekit.sae import SAE
from saekit.targets import Site

_ROWS_AT_ONCE = 32


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Half:
    """Tokens of some rows, those that predict another one and are no BOS, and what is known of each.

    Attributes:
        ids: `(rows, context)` all the rows.
        read: what the layer's router read, with addresses.
        last: the residual stream behind the last layer.
        codes: of what was read.
        margin, big: what the router said, and whether it took big.
        route: the best one of those with half of the layers big (`scan`).
        oracle: whether it takes big in this layer.
        routed, best, all_small, all_big: nats under the router, on the best route, and with one option alone.
    """

    ids: Int[Tensor, "rows context"]
    read: ActivationBatch
    last: Float[Tensor, "n width"]
    codes: SparseCodes
    margin: Float[Tensor, " n"]
    big: Bool[Tensor, " n"]
    route: Int[Tensor, "n layers"]
    oracle: Bool[Tensor, " n"]
    routed: Float[Tensor, " n"]
    best: Float[Tensor, " n"]
    all_small: Float[Tensor, " n"]
    all_big: Float[Tensor, " n"]

    def at(self, grid: Shaped[Tensor, "rows places *rest"]) -> Shaped[Tensor, "n *rest"]:
        """What a table of all places holds for these tokens."""
        return _at(self.read, grid)

    @property
    def following(self) -> Int[Tensor, " n"]:
        """The tokens that were to be predicted."""
        return self.at(self.ids.roll(-1, 1))

    @property
    def regret(self) -> Float[Tensor, " n"]:
        """Nats that the router's route loses against the best one."""
        return self.routed - self.best

    @property
    def gain_of_big(self) -> Float[Tensor, " n"]:
        """Relative difficulty: the nats of all small that all big takes away."""
        return self.all_small - self.all_big

    @property
    def gain_of_oracle(self) -> Float[Tensor, " n"]:
        """The same, and what the best route takes away."""
        return self.all_small - self.best

    def activation(self, feature: int) -> Float[Tensor, " n"]:
        """One feature's."""
        return activation_of(self.codes, feature)

    def firing(self, fewest: int) -> Int[Tensor, " some"]:
        """The features that are active on at least so many tokens."""
        return (self.codes.feature_counts() >= fewest).nonzero()[:, 0]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Case:
    """One layer, an SAE on what its router reads, and the tokens to choose by (`train`) and to measure on (`test`)."""

    target: DecidingTarget
    model: DuoLLM
    number: int
    sae: SAE
    train: Half
    test: Half

    @property
    def step(self) -> Step:
        return self.target.step(self.number)


@torch.no_grad()
def half_of(target: DecidingTarget, model: DuoLLM, ids: Int[Tensor, "rows context"], sae: SAE, number: int) -> Half:
    """Everything that is known of these rows; the scan of the routes takes most of the time.

    Raises:
        SaekitError: rows of one token, which predict nothing.
    """
    if ids.shape[1] < 2:
        raise SaekitError("rows of one token predict nothing; give longer ones")
    read = harvest(target, ids, number)
    read = read.select((read.position < ids.shape[1] - 1).nonzero()[:, 0])
    routes, nats = half_big_routes(model), worth(model, ids)
    oracle = best_of(nats[: len(routes)], routes)
    trace = DecisionTrace.concatenate([target.trace(some) for some in ids.split(_ROWS_AT_ONCE)])
    behind = Site.parse(f"layers.{model.config.layers - 1}:out")
    last = torch.cat([target.target.read(some, [behind])[behind] for some in ids.split(_ROWS_AT_ONCE)])

    at = partial(_at, read)
    return Half(
        ids=ids,
        read=read,
        last=at(last),
        codes=sae.encode(read.vectors),
        margin=at(trace.margin[:, number]),
        big=at(trace.decision[:, number]) == BIG,
        route=at(oracle.route),
        oracle=at(oracle.route[..., number]) == BIG,
        routed=at(trace.more["nats"]),
        best=at(oracle.nats),
        all_small=at(nats[-2]),
        all_big=at(nats[-1]),
    )


def _at(read: ActivationBatch, grid: Shaped[Tensor, "rows places *rest"]) -> Shaped[Tensor, "n *rest"]:
    return grid[read.document, read.position]


def half_big_routes(model: DuoLLM) -> Int[Tensor, "routes layers"]:
    """The routes on which half of the layers are big, which is what the router is asked for."""
    layers = model.config.layers
    return with_budget(all_routes(layers), layers // 2)


def worth(model: DuoLLM, ids: Int[Tensor, "rows context"]) -> Float[Tensor, "routes rows predicted"]:
    """Nats on each of these routes (`scan`), then on all small, then on all big."""
    alone = torch.tensor([[option] * model.config.layers for option in (SMALL, BIG)])
    routes = torch.cat([half_big_routes(model), alone])
    return torch.cat([scan(model, some, routes) for some in ids.split(_ROWS_AT_ONCE)], 1)


def by_balance(target: DecidingTarget, ids: Int[Tensor, "rows context"]) -> list[int]:
    """The layers, those first that take big about as often as not."""
    share = DecisionTrace.concatenate([target.trace(some) for some in ids.split(_ROWS_AT_ONCE)]).share("big")
    return (share - 0.5).abs().argsort(stable=True).tolist()
