"""What one would ask of Duo-LLM's features: which go with a router's choice, with the best choice, with difficulty.

Features are taken from what the router of one layer reads, the layer whose choices are most balanced. They are chosen
on training rows and measured on others, each beside what the token id, the position or a linear probe tells. What
they do, and what the two feed-forwards make of them, is in `duo_llm_causes` and `duo_llm_modules`.
"""

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saekit.adaptive.attribution import attribute_decisions
from saekit.adaptive.deciding import DecidingTarget
from saekit.adaptive.duo_llm import BIG, DuoLLM
from saekit.adaptive.duo_oracle import ref
from saekit.adaptive.effects import score_shift, strongest
from saekit.adaptive.harvest import train_decision_sae
from saekit.adaptive.questions.answers import Answers, answered
from saekit.adaptive.questions.duo_llm_causes import steering, what_a_feature_does
from saekit.adaptive.questions.duo_llm_halves import Case, Half, by_balance, half_big_routes, half_of
from saekit.adaptive.questions.duo_llm_modules import small_beside_big, transfer_between_routes
from saekit.adaptive.telling import FEWEST_ACTIVE, auc, best_telling, feature_aucs, probe_auc, rate_by
from saekit.errors import DataError, SaekitError
from saekit.patching.statistics import rank_correlation

# of the training rows: to choose and fit by, and for SAEs on other routes
CHOOSING_ROWS, ROUTE_ROWS = 128, 256
STRONG = 5


def ask(
    target: DecidingTarget,
    model: DuoLLM,
    train_inputs: Int[Tensor, "train context"],
    test_inputs: Int[Tensor, "test context"],
    *,
    tokens: int = 200_000,
    seed: int = 0,
    n_features: int = 192,
    k: int = 8,
    controls: int = 19,
) -> Answers:
    """Seven questions, in the units that names say: areas under the ROC curve, nats per token, shares.

    Args:
        target: of `model`.
        tokens: that the SAE is trained on; those of `transfer_between_routes` get half as many each.
        controls: how many features like it each effect is held against.

    Raises:
        SaekitError: too few other features that fire, or a layer that takes one option everywhere.
    """
    if model.config.layers < 2:
        raise SaekitError("a model of one layer has no route with half of its layers big; ask one of two or more")
    number, other = by_balance(target, train_inputs[:CHOOSING_ROWS])[:2]
    sae = train_decision_sae(target, train_inputs, number, n_features=n_features, k=k, tokens=tokens, seed=seed)
    halves = [half_of(target, model, ids, sae, number) for ids in (train_inputs[:CHOOSING_ROWS], test_inputs)]
    case = Case(target=target, model=model, number=number, sae=sae, train=halves[0], test=halves[1])
    return answered(
        {
            "which features go with the router's choice": lambda: router_choice(case),
            "can the best choice be told": lambda: best_choice(case),
            "what a feature does to the choice and to the content": lambda: what_a_feature_does(
                case, other, controls=controls
            ),
            "do router features follow absolute or relative difficulty": lambda: difficulty(case),
            "is the small module an approximation of the big one": lambda: small_beside_big(case, seed=seed),
            "do features learnt on one route serve another": lambda: transfer_between_routes(
                target,
                train_inputs[:ROUTE_ROWS],
                test_inputs,
                n_features=n_features,
                k=k,
                tokens=tokens // 2,
                seed=seed,
            ),
            "can a feature steer compute": lambda: steering(case, controls=controls),
        }
    )


def router_choice(case: Case) -> dict[str, float]:
    """Areas under the curve for the router's choice of big, and what features add to its margin.

    `within_tokens` counts only pairs of the same token id: a score that knows no more than that gets one half.
    `from_token_behind_bos` is what the router says of the token where nothing else stands before it.
    """
    train, test = case.train, case.test
    best = best_telling((train.codes, train.big), (test.codes, test.big))
    learnt = attribute_decisions(case.sae, train.read.vectors, case.step)
    found = attribute_decisions(case.sae, test.read.vectors, case.step)
    first = strongest(learnt, count=STRONG)
    added = [-score_shift(found, feature) for feature in first]
    usable = train.firing(FEWEST_ACTIVE)
    sign = 1.0 if best.with_decision else -1.0
    alone = _margins_alone(case)
    return {
        "layer": float(case.number),
        "share_of_big": float(test.big.float().mean()),
        "standard_error": standard_error(test.big),
        "from_position": auc(rate_by(train.read.position, train.big, test.read.position), test.big),
        "from_token": auc(rate_by(train.read.token, train.big, test.read.token), test.big),
        "from_token_behind_bos": auc(alone, test.big),
        "from_a_probe_on_what_is_read": probe_auc(train.read.vectors, train.big, test.read.vectors, test.big),
        "best_feature": float(best.feature),
        "from_best_feature": best.auc,
        "from_best_feature_within_tokens": auc_within(sign * test.activation(best.feature), test.big, test.read.token),
        "pairs_within_tokens": float(pairs_within(test.big, test.read.token)),
        "strongest_feature": float(first[0]),
        "from_strongest_feature": auc(added[0], test.big),
        "from_strongest_feature_within_tokens": auc_within(added[0], test.big, test.read.token),
        "from_the_five_strongest": auc(torch.stack(added).sum(0), test.big),
        "from_the_five_strongest_within_tokens": auc_within(torch.stack(added).sum(0), test.big, test.read.token),
        "from_all_features": auc(found.score - found.error, test.big),
        "error_share": found.error_share,
        "strongest_feature_adds_on_average": float(found.mean_added[first[0]]),
        "mean_size_of_margin": float(found.score.abs().mean()),
        "share_of_all_sizes_in_the_five_strongest": float(found.mean_size[first].sum() / found.mean_size.sum()),
        "rank_correlation_of_auc_and_attribution": rank_correlation(
            feature_aucs(train.codes, train.big)[usable], learnt.mean_added[usable]
        ),
    }


def _margins_alone(case: Case) -> Float[Tensor, " n"]:
    tokens, place = case.test.read.token.unique(return_inverse=True)
    pairs = torch.stack([case.test.ids[0, 0].expand(len(tokens)), tokens], 1)
    return case.target.trace(pairs).margin[:, case.number, 1][place]


def best_choice(case: Case) -> dict[str, float]:
    """How well the oracle's choice in this layer can be told, and where regret and relative difficulty are large.

    Large is above the median of the training rows; `choice_in_layer` is the choice in each layer. What knows the
    label, or the outcome of the same routes behind other prefixes (`ref`), is there to say how far one could come.
    """
    train, test = case.train, case.test
    routes, nats = half_big_routes(case.model), ref(case.model, test.ids, half_big_routes(case.model))
    takes_big = routes[:, case.number] == BIG
    gap = test.at(nats[~takes_big].min(0).values - nats[takes_big].min(0).values)
    found = {
        "share_of_big": float(test.oracle.float().mean()),
        "standard_error": standard_error(test.oracle),
        "router_agrees": float((test.big == test.oracle).float().mean()),
        "mean_regret": float(test.regret.mean()),
        "choice_from_router_margin": auc(test.margin, test.oracle),
        "choice_from_token_to_come": auc(rate_by(train.following, train.oracle, test.following), test.oracle),
        "choice_from_oracle_behind_all_big": auc(gap, test.oracle),
    }
    wanted: Mapping[str, Callable[[Half], Tensor]] = {
        "choice": lambda half: half.oracle,
        "regret": lambda half: half.regret,
        "gain_of_big": lambda half: half.gain_of_big,
        "gain_of_oracle": lambda half: half.gain_of_oracle,
    }
    for name, of in wanted.items():
        found |= {f"{name}_{source}": value for source, value in _told(case, of).items()}
    return found | _choice_by_layer(case)


def _choice_by_layer(case: Case) -> dict[str, float]:
    train, test, found = case.train, case.test, {}
    for number in range(case.model.config.layers):
        was, asked = (half.route[:, number] == BIG for half in (train, test))
        token = rate_by(train.read.token, was, test.read.token)
        found |= {
            f"choice_in_layer_{number}_from_token": auc(token, asked),
            f"choice_in_layer_{number}_from_last_layer": probe_auc(train.last, was, test.last, asked),
        }
    return found


def difficulty(case: Case) -> dict[str, float]:
    """Rank correlations with absolute (nats of all small) and relative difficulty (how many of them big takes away).

    Then two sorts of tokens, each divided at quartiles of the training rows: `hard without gap`, whose loss is among
    the highest quarter and big gains no more than the median; and `large gap`, where big gains most.
    """
    train, test = case.train, case.test
    found: dict[str, float] = {}
    first = strongest(attribute_decisions(case.sae, train.read.vectors, case.step), count=2 * STRONG)
    others = [feature for feature in test.firing(FEWEST_ACTIVE).tolist() if feature not in first]
    sizes = {}
    for name, of in _DIFFICULTIES.items():
        rated = rate_by(train.read.token, of(train), test.read.token)
        placed = rate_by(train.read.position, of(train), test.read.position)
        sizes[name] = torch.tensor([abs(rank_correlation(test.activation(f), of(test))) for f in first]).nan_to_num(0)
        apart = [abs(rank_correlation(test.activation(feature), of(test))) for feature in others]
        found |= {
            f"{name}_and_best_feature": _most_correlated(case, of),
            f"{name}_and_token": rank_correlation(rated, of(test)),
            f"{name}_and_position": rank_correlation(placed, of(test)),
            f"{name}_and_router_margin": rank_correlation(test.margin, of(test)),
            f"{name}_and_strongest_features": float(sizes[name].mean()),
            f"{name}_and_other_features": sum(apart) / max(1, len(apart)),
        }
    found["share_of_strongest_that_follow_absolute_more"] = float(
        (sizes["absolute"] > sizes["relative"]).float().mean()
    )
    return found | _hard_beside_large_gap(case)


_DIFFICULTIES: Mapping[str, Callable[[Half], Tensor]] = {
    "absolute": lambda half: half.all_small,
    "relative": lambda half: half.gain_of_big,
}


def _hard_beside_large_gap(case: Case) -> dict[str, float]:
    limits = [case.train.all_small.quantile(0.75), *case.train.gain_of_big.quantile(torch.tensor([0.5, 0.75]))]
    chosen, large = [], []
    for half in (case.train, case.test):
        is_large = half.gain_of_big > limits[2]
        is_hard = (half.all_small > limits[0]) & (half.gain_of_big <= limits[1])
        chosen.append((is_hard | is_large).nonzero()[:, 0])
        large.append(is_large[chosen[-1]])
    train, test = ((half, rows) for half, rows in zip((case.train, case.test), chosen, strict=True))
    found = {
        "large_gap_share": float(large[1].float().mean()),
        "large_gap_from_router_margin": auc(case.test.margin[test[1]], large[1]),
        "large_gap_from_token": auc(
            rate_by(case.train.read.token[train[1]], large[0], case.test.read.token[test[1]]), large[1]
        ),
        "large_gap_from_best_feature": best_telling(
            (train[0].codes.select(train[1]), large[0]), (test[0].codes.select(test[1]), large[1])
        ).auc,
    }
    decode = getattr(case.target.target.tokenizer, "decode", None)
    if decode is not None:
        ends = torch.tensor(["\n" in decode([token]) for token in case.test.read.token[test[1]].tolist()])
        found |= {
            "hard_without_gap_at_line_ends": float(ends[~large[1]].float().mean()),
            "large_gap_at_line_ends": float(ends[large[1]].float().mean()),
        }
    return found


def _told(case: Case, of: Callable[[Half], Tensor]) -> dict[str, float]:
    """Areas under the curve for a yes or no, or for being above the median of the training rows."""
    train, test = case.train, case.test
    value = of(train)
    limit = 0 if value.dtype == torch.bool else value.median()
    was, asked = value > limit, of(test) > limit
    found = {
        "from_position": auc(rate_by(train.read.position, was, test.read.position), asked),
        "from_token": auc(rate_by(train.read.token, was, test.read.token), asked),
        "from_what_is_read": probe_auc(train.read.vectors, was, test.read.vectors, asked),
        "from_last_layer": probe_auc(train.last, was, test.last, asked),
        "from_best_feature": best_telling((train.codes, was), (test.codes, asked)).auc,
    }
    if value.dtype != torch.bool:
        found["and_best_feature_in_ranks"] = _most_correlated(case, of)
        rated = rate_by(train.read.token, value, test.read.token)
        found["and_token_in_ranks"] = rank_correlation(rated, of(test))
    return found


def _most_correlated(case: Case, of: Callable[[Half], Tensor]) -> float:
    """The rank correlation, on the test rows, of the feature that has the largest on the training rows, so turned."""
    features = case.train.firing(FEWEST_ACTIVE).tolist()
    if not features:
        raise DataError("no feature is active on the training rows; give more rows, or train the SAE for longer")
    values = of(case.train)
    sizes = [rank_correlation(case.train.activation(feature), values) for feature in features]
    best = max(range(len(features)), key=lambda place: abs(sizes[place]))
    found = rank_correlation(case.test.activation(features[best]), of(case.test))
    return found if sizes[best] > 0 else -found


def auc_within(score: Float[Tensor, " n"], positive: Bool[Tensor, " n"], key: Int[Tensor, " n"]) -> float:
    """`auc` over the pairs that share a key (a token id); nan where no key has both sorts."""
    total = pairs = 0.0
    for one in key.unique():
        here = key == one
        n_pairs = pairs_within(positive[here], key[here])
        if n_pairs:
            total, pairs = total + n_pairs * auc(score[here], positive[here]), pairs + n_pairs
    return total / pairs if pairs else float("nan")


def pairs_within(positive: Bool[Tensor, " n"], key: Int[Tensor, " n"]) -> int:
    """How many pairs of a positive one and another share a key."""
    size = int(key.max()) + 1
    return int((torch.bincount(key[positive], minlength=size) * torch.bincount(key[~positive], minlength=size)).sum())


def standard_error(positive: Bool[Tensor, " n"]) -> float:
    """Of an area under the curve that is one half, were all tokens independent of one another."""
    n_positive = int(positive.sum())
    return ((1 / max(1, n_positive) + 1 / max(1, len(positive) - n_positive)) / 12) ** 0.5
