"""What routes are worth: the oracle beside what it must be held against, by budget of big layers per token.

The oracle sees the next token, so that part of what it gains is selection: the best of many noisy guesses. Hence the
controls: fewer routes to choose from, a chooser that sees no label, and one that is told a wrong one.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saekit.adaptive.duo_llm import BIG, DuoLLM, next_token_nats
from saekit.adaptive.duo_oracle import all_routes, best_fixed, best_of, greedy, layer_usage, scan, with_budget
from saekit.adaptive.duo_router import n_big

GREEDY_ROWS = 4
CHOICES = (1, 2, 4, 6)
CHANCES = (0.0, 0.25, 0.5, 0.75, 1.0)
HARD = 0.1


def measure_duo(model: DuoLLM, ids: Int[Tensor, "batch tokens"], *, seed: int = 0) -> dict[str, Any]:
    """Facts on held-out rows, in nats per token. Oracle numbers are of the variant `scan` unless they say otherwise."""
    layers = model.config.layers
    routes = all_routes(layers)
    nats = scan(model, ids, routes)
    spent = (routes == BIG).sum(1)
    budgets = [_budget_row(nats[spent == budget], routes[spent == budget], budget) for budget in range(layers + 1)]
    with torch.no_grad():
        run = model(ids)
        routed = next_token_nats(run.logits, ids)
    router_big = n_big(run.router, float(model.threshold))
    half = layers // 2
    facts: dict[str, Any] = {
        "rows": len(ids),
        "tokens": nats[0].numel(),
        "nats_all_big": float(nats[spent == layers].mean()),
        "nats_all_small": float(nats[spent == 0].mean()),
        "nats_router": float(routed.mean()),
        "router_big_layers": router_big,
        "router_usage": layer_usage(run.route).tolist(),
        "budgets": budgets,
        "best_oracle_budget": min(range(layers + 1), key=lambda b: budgets[b]["oracle"]),
    }
    few = ids[:GREEDY_ROWS]
    facts["greedy"] = {
        "rows": len(few),
        "all_big": float(nats[spent == layers][:, : len(few)].mean()),
        **{f"budget_{b}": float(greedy(model, few, with_budget(routes, b)).nats.mean()) for b in (1, half)},
    }
    facts["controls"] = _controls(model, ids, nats[spent == half], routes[spent == half], seed)
    facts["split_oracle"] = split_oracle(nats[spent == half], ids)
    facts["nats_by_chance_of_big"] = {f"{chance:g}": nats_of_coins(model, ids, chance) for chance in CHANCES}
    facts["difficulty"] = _difficulty(nats, spent, best_of(nats[spent == half], routes[spent == half]).nats)
    return facts


@torch.no_grad()
def nats_of_coins(model: DuoLLM, ids: Int[Tensor, "batch tokens"], chance: float, *, seed: int = 0) -> float:
    """Mean loss where every token takes big in every layer with this chance."""
    coins = torch.rand(*ids.shape, model.config.layers, generator=torch.Generator().manual_seed(seed)) < chance
    return float(next_token_nats(model(ids, coins.long()).logits, ids).mean())


def split_oracle(
    nats: Float[Tensor, "routes batch predicted"], ids: Int[Tensor, "batch tokens"], *, gram: int = 3
) -> dict[str, float | int]:
    """What an oracle's choice is worth where it has not seen the label: at the next place with the same tokens before.

    For every place whose last `gram` tokens came before, the route is the best one for the place where they came
    last. If routes fit contexts, and are not only selected by labels, that beats one fixed route for all. But text
    repeats itself: where the same token follows, the other place had seen the label too, so that the places where
    another one follows are also told apart (`another_label`).

    Returns:
        How many places there are, and nats per token over them: of the routes chosen elsewhere, of the best fixed
        route, and of the oracle that sees the label.
    """
    last: dict[tuple[int, ...], int] = {}
    here, there = [], []
    width = nats.shape[2]
    for row, tokens in enumerate(ids.tolist()):
        for place in range(gram - 1, width):
            context = tuple(tokens[place - gram + 1 : place + 1])
            if context in last:
                here.append(row * width + place)
                there.append(last[context])
            last[context] = row * width + place
    if not here:
        return {"places": 0}
    labels, places = ids[:, 1:].flatten(), torch.tensor([here, there])
    apart = places[:, labels[places[0]] != labels[places[1]]]
    found = _chosen_elsewhere(nats.flatten(1), places)
    if not apart.shape[1]:
        return found
    return found | {f"another_label_{name}": x for name, x in _chosen_elsewhere(nats.flatten(1), apart).items()}


def _chosen_elsewhere(nats: Float[Tensor, "routes all"], places: Int[Tensor, "both n"]) -> dict[str, float | int]:
    now, before = nats[:, places[0]], nats[:, places[1]]
    return {
        "places": places.shape[1],
        "chosen_elsewhere": _chosen_by(before, now),
        "best_fixed": float(now.mean(1).min()),
        "oracle": float(now.min(0).values.mean()),
    }


def _budget_row(nats: Float[Tensor, "routes batch n"], routes: Tensor, budget: int) -> dict[str, Any]:
    oracle = best_of(nats, routes)
    return {
        "budget": budget,
        "routes": len(routes),
        "fixed": best_fixed(nats),
        "mean_fixed": float(nats.mean()),
        "oracle": float(oracle.nats.mean()),
        "usage": layer_usage(oracle.route).tolist(),
    }


@torch.no_grad()
def _controls(
    model: DuoLLM, ids: Tensor, nats: Float[Tensor, "routes batch n"], routes: Tensor, seed: int
) -> dict[str, float]:
    """At one budget: the oracle with fewer routes, the least unsure route, and the best for another token's label."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(nats.shape, generator=generator).argsort(0)
    found = {f"best_of_{m}": float(nats.gather(0, drawn[:m]).min(0).values.mean()) for m in CHOICES if m <= len(routes)}
    unsure, mislead = [], []
    order = torch.randperm(ids.numel(), generator=generator)
    wrong = ids.flatten()[order].view_as(ids)
    for route in routes:
        log_chances = model(ids, route).logits[:, :-1].log_softmax(-1)
        unsure.append(-(log_chances.exp() * log_chances).sum(-1))
        mislead.append(-log_chances.gather(-1, wrong[:, 1:, None])[..., 0])
    return found | {
        "least_entropy": _chosen_by(torch.stack(unsure), nats),
        "wrong_label": _chosen_by(torch.stack(mislead), nats),
        "worst": float(nats.max(0).values.mean()),
    }


def _chosen_by(measure: Tensor, nats: Tensor) -> float:
    return float(nats.gather(0, measure.argmin(0)[None]).mean())


def _difficulty(nats: Tensor, spent: Tensor, oracle: Tensor) -> dict[str, float]:
    """Absolute difficulty is the loss of all-small; relative difficulty is how much of it compute can remove."""
    small, big = nats[spent == 0][0].flatten(), nats[spent == int(spent.max())][0].flatten()
    hardest = small >= small.quantile(1 - HARD)
    return {
        "correlation_of_small_with_gain_of_big": _correlation(small, small - big),
        "correlation_of_small_with_gain_of_oracle": _correlation(small, small - oracle.flatten()),
        "hardest_tenth_with_gain_below_0.1_nats": float(((small - big)[hardest] < HARD).float().mean()),
        "big_is_worse": float((big > small).float().mean()),
    }


def _correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1])


def table(budgets: Sequence[dict[str, Any]]) -> str:
    """The rows by budget as text."""
    lines = ["  big layers  routes  best fixed  mean fixed  oracle (scan)"]
    lines += [
        f"  {row['budget']:>10}  {row['routes']:>6}  {row['fixed']:>10.3f}  {row['mean_fixed']:>10.3f}  "
        f"{row['oracle']:>13.3f}"
        for row in budgets
    ]
    return "\n".join(lines)
