"""What Duo-LLM's small feed-forward does of what the big one does, and whether features hold on other routes."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cosine_similarity

from saekit.adaptive.deciding import DecidingTarget
from saekit.adaptive.duo_llm import BIG, SMALL
from saekit.adaptive.harvest import harvest, live_only, train_decision_sae
from saekit.adaptive.interventions import DecisionEdit, Force, deciding
from saekit.adaptive.questions.duo_llm_halves import Case
from saekit.codes import SparseCodes
from saekit.losses import fvu
from saekit.targets import Site
from saekit.targets.target import Edit

FEWEST_FIRINGS = 20
# a module writes for a feature if it does so alike on both halves, and less than this of it is none of it
ALIKE, NONE = 0.5, 0.1


@dataclass(frozen=True, slots=True)
class Coins:
    """Big or small by the toss of a coin for every token and step, other tosses in every pass."""

    generator: torch.Generator

    def edits(self, target: DecidingTarget) -> Mapping[Site, Edit]:
        def edit(decision: Tensor) -> Tensor:
            is_big = torch.rand(decision.shape, generator=self.generator) < 0.5
            return torch.where(is_big, BIG, SMALL).to(decision)

        return {target.overruled(step, "decision"): edit for step in range(len(target.steps))}


@torch.no_grad()
def small_beside_big(case: Case, *, seed: int = 0) -> dict[str, float]:
    """Both feed-forwards on the same input of one layer: cosines of their outputs, and the share left unexplained.

    `unexplained` is the FVU of the big one's output, taken for what the small one gives, the same times the best
    number, the best linear map of it, and, beside that, the best linear map of what both read; fitted on the
    training rows. Cosines by feature are means over the tokens where it is active.
    """
    feed = case.model.stack[case.number].feed
    big, small = ([module(half.read.vectors) for half in (case.train, case.test)] for module in (feed.big, feed.small))
    cosine = cosine_similarity(big[1], small[1])
    took = case.test.big
    features = case.test.firing(FEWEST_FIRINGS)
    by_feature = _mean_where_active(case.test.codes, cosine[:, None], features)[:, 0]
    by_luck = _mean_where_active(_dealt_anew(case.test.codes, seed), cosine[:, None], features)[:, 0]
    factor = (big[0] * small[0]).sum() / small[0].square().sum()
    found = {
        "layer": float(case.number),
        "cosine": float(cosine.mean()),
        "cosine_where_routed_big": float(cosine[took].mean()),
        "cosine_where_routed_small": float(cosine[~took].mean()),
        "cosine_with_another_tokens": float(cosine_similarity(big[1], small[1].roll(1, 0)).mean()),
        "norm_of_small_in_big": float(small[1].norm(dim=1).mean() / big[1].norm(dim=1).mean()),
        "unexplained": float(fvu(big[1], small[1])),
        "unexplained_where_routed_big": float(fvu(big[1][took], small[1][took])),
        "unexplained_where_routed_small": float(fvu(big[1][~took], small[1][~took])),
        "unexplained_by_a_multiple": float(fvu(big[1], factor * small[1])),
        "unexplained_by_a_linear_map_of_small": float(fvu(big[1], _mapped(small[0], big[0], small[1]))),
        "unexplained_by_a_linear_map_of_the_input": float(
            fvu(big[1], _mapped(case.train.read.vectors, big[0], case.test.read.vectors))
        ),
        "features": float(len(features)),
    }
    for quantile in (0.1, 0.5, 0.9):
        found[f"cosine_by_feature_quantile_{quantile:g}"] = float(by_feature.quantile(quantile))
    found |= {"spread_by_feature": float(by_feature.std()), "spread_by_luck": float(by_luck.std())}
    return found | _who_writes(case, big, small, seed)


def transfer_between_routes(
    target: DecidingTarget,
    train_inputs: Int[Tensor, "train context"],
    test_inputs: Int[Tensor, "test context"],
    *,
    n_features: int = 192,
    k: int = 8,
    tokens: int = 100_000,
    seed: int = 0,
) -> dict[str, float]:
    """SAEs on what the last layer's feed-forwards read, trained on one sort of route, tested on all.

    Routes are all big, all small, coins, and what the routers choose (tested only). `fvu` of the reconstruction, and
    `dead` the share of the features that are active on no test token. All SAEs start from the same seed.
    """
    number = len(target.steps) - 1
    saes = {}
    for name in ("big", "small", "coins"):
        with _on_route(target, name, seed):
            saes[name] = train_decision_sae(
                target, train_inputs, number, n_features=n_features, k=k, tokens=tokens, seed=seed
            )
    found = {"layer": float(number)}
    for route in ("big", "small", "coins", "routed"):
        with _on_route(target, route, seed + 1):
            vectors = live_only(harvest(target, test_inputs, number)).vectors
        for name, sae in saes.items():
            codes = sae.encode(vectors)
            found[f"fvu_of_{name}_on_{route}"] = float(fvu(vectors, sae.decode(codes).detach()))
            found[f"dead_of_{name}_on_{route}"] = float((codes.feature_counts() == 0).float().mean())
    return found


def _on_route(target: DecidingTarget, name: str, seed: int) -> ExitStack:
    edits: Mapping[str, DecisionEdit] = {
        "big": Force("big"),
        "small": Force("small"),
        "coins": Coins(torch.Generator().manual_seed(seed)),
    }
    stack = ExitStack()
    if name in edits:
        stack.enter_context(deciding(target, [edits[name]]))
    return stack


def _who_writes(case: Case, big: Sequence[Tensor], small: Sequence[Tensor], seed: int) -> dict[str, float]:
    """What a module writes for a feature is its mean output where the feature is active, less that on all tokens.

    It is written by the module if that has a cosine of at least one half between the two halves of the data. It is
    written by that one *only* if the other, on the test rows and along the direction learnt on the training rows,
    adds less than a tenth as much. What features dealt to other tokens come to says how much of it is luck.
    """
    features = case.test.firing(FEWEST_FIRINGS)
    features = features[torch.isin(features, case.train.firing(FEWEST_FIRINGS))]

    def written(outputs: Sequence[Tensor], codes: Sequence[SparseCodes]) -> list[Tensor]:
        return [_mean_where_active(some, out, features) - out.mean(0) for some, out in zip(codes, outputs, strict=True)]

    codes = (case.train.codes, case.test.codes)
    dealt = [_dealt_anew(some, seed) for some in codes]
    by_big, by_small, by_luck = written(big, codes), written(small, codes), written(big, dealt)
    is_by_big, is_by_small, is_by_luck = (
        cosine_similarity(train, test) >= ALIKE for train, test in (by_big, by_small, by_luck)
    )
    along_big, along_small = _along(by_big, by_small), _along(by_small, by_big)
    n_big, n_small = max(1, int(is_by_big.sum())), max(1, int(is_by_small.sum()))
    return {
        "written_by_big": float(is_by_big.float().mean()),
        "written_by_small": float(is_by_small.float().mean()),
        "written_by_luck": float(is_by_luck.float().mean()),
        "small_writes_of_big_median": float(along_big[is_by_big].median()) if is_by_big.any() else 0.0,
        "only_big_of_written_by_big": int((is_by_big & (along_big < NONE)).sum()) / n_big,
        "only_small_of_written_by_small": int((is_by_small & (along_small < NONE)).sum()) / n_small,
    }


def _along(one: Sequence[Float[Tensor, "f width"]], other: Sequence[Float[Tensor, "f width"]]) -> Float[Tensor, " f"]:
    """How much of what one writes the other does: both on the test half, along what the one wrote on the other half."""
    return (other[1] * one[0]).sum(1) / (one[1] * one[0]).sum(1)


def _mean_where_active(
    codes: SparseCodes, values: Float[Tensor, "n d"], features: Int[Tensor, " some"]
) -> Float[Tensor, "some d"]:
    active = codes.active()
    total = values.new_zeros(codes.n_features, values.shape[1])
    total.index_add_(0, active.features, values[active.token_of_entry()])
    return total[features] / active.feature_counts()[features, None].clamp(min=1)


def _dealt_anew(codes: SparseCodes, seed: int) -> SparseCodes:
    """The same codes on other tokens: sets of tokens as large, and as often together."""
    return codes.select(torch.randperm(codes.n_tokens, generator=torch.Generator().manual_seed(seed)))


def _mapped(
    read: Float[Tensor, "n a"], wanted: Float[Tensor, "n b"], asked: Float[Tensor, "m a"]
) -> Float[Tensor, "m b"]:
    """What a linear map with a constant gives, fitted by least squares (minimum norm, if inputs depend)."""
    one, other = (torch.cat([x, x.new_ones(len(x), 1)], 1).double() for x in (read, asked))
    return (other @ torch.linalg.lstsq(one, wanted.double(), driver="gelsd").solution).to(wanted)
