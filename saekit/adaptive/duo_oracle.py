"""Which route would have been best: the oracle of Duo-LLM, which sees the true next token, and what it is held against.

The paper enumerates all routes that spend a budget of big layers, per token, and keeps the one of the lowest loss. It
does not say which routes the tokens *before* took meanwhile. Three answers, all ours; a number should say which:

    scan     the whole text runs on each route; every token keeps its best. Cheap, probably what the paper did, but no
             single forward pass gives it.
    greedy   from left to right; each token's best route is committed before the next is tried. Replaying the routes
             in one pass gives the same losses.
    ref      the tokens before took a reference route (all big); only the one token varies.

A minimum over many candidates that sees the label is partly mere selection; `duo_controls` says how much.
"""

from dataclasses import dataclass
from itertools import product

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saekit.adaptive.duo_llm import BIG, SMALL, DuoLLM, next_token_nats
from saekit.errors import SaekitError

# routes times rows of one forward pass: keeps the logits small
_ROWS_AT_ONCE = 64


@dataclass(frozen=True, slots=True, eq=False)
class Oracle:
    """Routes and what they led to.

    Attributes:
        variant: "scan", "greedy" or "ref".
        route: `(batch, tokens - 1, layers)`; the last token of a row predicts nothing.
        nats: `(batch, tokens - 1)` loss of each token on its route.
    """

    variant: str
    route: Int[Tensor, "batch predicted layers"]
    nats: Float[Tensor, "batch predicted"]


def all_routes(layers: int, *, options: tuple[int, ...] = (SMALL, BIG)) -> Int[Tensor, "routes layers"]:
    """Every combination of options."""
    return torch.tensor(list(product(options, repeat=layers)))


def with_budget(routes: Int[Tensor, "routes layers"], budget: int) -> Int[Tensor, "some layers"]:
    """The routes with exactly this many big layers.

    Raises:
        SaekitError: there are none.
    """
    found = routes[(routes == BIG).sum(1) == budget]
    if not len(found):
        raise SaekitError(f"no route spends {budget} big layers; give 0 to {routes.shape[1]}")
    return found


@torch.no_grad()
def scan(
    model: DuoLLM, ids: Int[Tensor, "batch tokens"], routes: Int[Tensor, "routes layers"]
) -> Float[Tensor, "routes batch predicted"]:
    """Losses with the whole text on each route; the last token of a row predicts nothing and is left out."""
    at_once = max(1, _ROWS_AT_ONCE // len(ids))
    parts = []
    for some in routes.split(at_once):
        repeated = ids.repeat(len(some), 1)
        route = some.repeat_interleave(len(ids), 0)[:, None, :]
        parts.append(next_token_nats(model(repeated, route).logits, repeated).unflatten(0, (len(some), len(ids))))
    return torch.cat(parts)


def best_of(
    nats: Float[Tensor, "routes batch predicted"], routes: Int[Tensor, "routes layers"], *, variant: str = "scan"
) -> Oracle:
    """Each token's best route."""
    least = nats.min(0)
    return Oracle(variant, routes[least.indices], least.values)


def best_fixed(nats: Float[Tensor, "routes batch predicted"]) -> float:
    """The lowest mean loss of any one route for all tokens."""
    return float(nats.mean((1, 2)).min())


@torch.no_grad()
def ref(
    model: DuoLLM,
    ids: Int[Tensor, "batch tokens"],
    routes: Int[Tensor, "routes layers"],
    *,
    reference: Int[Tensor, " layers"] | None = None,
) -> Float[Tensor, "routes batch predicted"]:
    """Losses of each token on each route, with all tokens before it on the reference route (all big)."""
    reference = torch.full((model.config.layers,), BIG) if reference is None else reference
    past = model.keys_and_values(ids, reference)
    positions = torch.arange(ids.shape[1])
    return torch.stack(
        [next_token_nats(model.beside(ids, model.spread(r, ids.shape), past, positions)[0], ids) for r in routes]
    )


@torch.no_grad()
def greedy(model: DuoLLM, ids: Int[Tensor, "batch tokens"], routes: Int[Tensor, "routes layers"]) -> Oracle:
    """From left to right, each token's best route given the routes committed so far."""
    model.check_ids(ids)
    batch, n_routes = len(ids), len(routes)
    d_head = model.config.width // model.config.heads
    past = [(torch.zeros(batch, model.config.heads, 0, d_head),) * 2 for _ in range(model.config.layers)]
    chosen, nats = [], []
    tried = routes.repeat(batch, 1)[:, None, :]
    for position in range(ids.shape[1] - 1):
        here, following = (ids[:, p].repeat_interleave(n_routes)[:, None] for p in (position, position + 1))
        spread = [(k.repeat_interleave(n_routes, 0), v.repeat_interleave(n_routes, 0)) for k, v in past]
        logits, own = model.beside(here, tried, spread, torch.tensor([position]))
        loss = torch.nn.functional.cross_entropy(logits[:, 0], following[:, 0], reduction="none")
        least = loss.view(batch, n_routes).min(1)
        winner = torch.arange(batch) * n_routes + least.indices
        past = [
            (torch.cat([k, own_k[winner]], 2), torch.cat([v, own_v[winner]], 2))
            for (k, v), (own_k, own_v) in zip(past, own, strict=True)
        ]
        chosen.append(routes[least.indices])
        nats.append(least.values)
    return Oracle("greedy", torch.stack(chosen, 1), torch.stack(nats, 1))


def layer_usage(route: Int[Tensor, "*tokens layers"]) -> Float[Tensor, " layers"]:
    """Share of the tokens that took the big feed-forward, by layer."""
    return (route == BIG).flatten(0, -2).float().mean(0)
