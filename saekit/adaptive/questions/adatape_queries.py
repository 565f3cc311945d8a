"""AdaTape: which features of a query make what is read next, which end the tape, and whether one can steer it.

Scores are products of a query and an entry's key, so that they divide exactly among pairs of features. What is picked,
and whether reading ends, are jumps: they are asked by finite interventions, beside features like the one chosen.
"""

from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from saekit.adaptive.adatape import AdaTape
from saekit.adaptive.deciding import DecidingTarget
from saekit.adaptive.effects import against_random, dose_response, rank_p, strongest_by_effect, trace_edited
from saekit.adaptive.interventions import Shift, trace_with
from saekit.adaptive.questions.adatape_reading import (
    Reading,
    Screen,
    largest,
    like_it,
    mean_of,
    share,
    train_sae,
)
from saekit.adaptive.telling import activation_sums, auc, best_telling, overlap, probe_auc
from saekit.adaptive.trace import DecisionTrace
from saekit.errors import DataError
from saekit.patching import Add, Intervention, intervening
from saekit.patching.operation import Operation
from saekit.sae import SAE
from saekit.targets import Site

DOSES = (0.0, 0.5, 1.0, 2.0)
TOP = 5
# of answers may change where the length is to change alone; and how far the dial of tau is turned beside
FEW, DIAL = 0.02, 0.25


@dataclass(frozen=True, slots=True, eq=False)
class Gaps:
    """Of some steps: what the query makes of the difference between two entries.

    Attributes:
        query: `(n, d_key)`.
        better, other: `(n, d_key)` keys of the two entries.
        steps: `(n,)` the step of each.
    """

    query: Float[Tensor, "n d_key"]
    better: Float[Tensor, "n d_key"]
    other: Float[Tensor, "n d_key"]
    steps: Tensor

    @property
    def score(self) -> Float[Tensor, " n"]:
        return (self.query * (self.better - self.other)).sum(1)


@dataclass(frozen=True, slots=True, eq=False)
class Divided:
    """Gaps, taken apart: `features`, `constant` and `error` add up to the score.

    Attributes:
        features: of all pairs of a query feature and a key feature together.
        constant: of the query SAE's bias with key features; keys' own bias is the same for both entries.
        error: of everything with a part that either SAE leaves unexplained.
        pairs: `(query features, key features)` the mean size of each pair's part.
    """

    features: Float[Tensor, " n"]
    constant: Float[Tensor, " n"]
    error: Float[Tensor, " n"]
    pairs: Float[Tensor, "query_features key_features"]


@torch.no_grad()
def divided(queries: SAE, keys: SAE, gaps: Gaps) -> Divided:
    """Exact, since a score is a product of both."""
    active = queries.encode(gaps.query).to_dense()
    # dense, but for a few thousand steps on a few dozen features
    apart = keys.encode(gaps.better).to_dense() - keys.encode(gaps.other).to_dense()
    match = queries.W_dec @ keys.W_dec.T
    features = (active @ match * apart).sum(1)
    constant = apart @ (keys.W_dec @ queries.b_dec)
    return Divided(
        features=features,
        constant=constant,
        error=gaps.score - features - constant,
        pairs=active.abs().T @ apart.abs() / len(active) * match.abs(),
    )


@torch.no_grad()
def gaps_of(model: AdaTape, reading: Reading, *, kind: str) -> Gaps:
    """The last entry picked against the best one that was left ("pick"), or the first against the last ("weight").

    The one gap says what is read, the other how much the step adds towards halting. Pairs of equal entries, between
    which there is nothing to choose, are left out; and for picks, steps that leave nothing unread.
    """
    dimension = model.reader.d_key
    keys = model.reader.norm(model.bank_of(reading.inputs))[..., :dimension]
    entries, rows = reading.trace.more["entries"], torch.arange(len(keys))
    used = torch.zeros(keys.shape[:2], dtype=torch.bool)
    parts = []
    for step in range(entries.shape[1]):
        query, picked = reading.queries[:, step], entries[:, step]
        used = used.scatter(1, picked, True)
        better, other = keys[rows, picked[:, -1]], keys[rows, picked[:, -1]]
        if kind == "pick":
            scores = (keys @ query[..., None])[..., 0].masked_fill(used, -torch.inf)
            other, asked = keys[rows, scores.argmax(1)], reading.fresh[:, step] & ~used.all(1)
        else:
            better, asked = keys[rows, picked[:, 0]], reading.live[:, step]
        asked = asked & ((better - other).abs().amax(1) > 1e-6)
        parts.append((query[asked], better[asked], other[asked], torch.full((int(asked.sum()),), step)))
    return Gaps(*(torch.cat(part) for part in zip(*parts, strict=True)))


def attributed(model: AdaTape, sae: SAE, train: Reading, test: Reading, *, tokens: int, seed: int) -> dict[str, float]:
    """Gaps between scores by pairs of features; beside what the mean query of a step makes of them.

    Shares are of the mean size of a gap, and may exceed 1 where parts cancel. explained_* is the share of the gap's
    variance; an SAE on keys learns from the entries of the training half, of which there are as many kinds as symbols.

    Raises:
        DataError: no step with a choice between unlike entries.
    """
    with torch.no_grad():
        bank = model.reader.norm(model.bank_of(train.inputs))[..., : model.reader.d_key].flatten(0, 1)
    keys = train_sae(Site.parse("reader.norm:out"), bank, n_features=16, k=2, tokens=tokens, seed=seed)
    found: dict[str, float] = {}
    for kind in ("pick", "weight"):
        known, gaps = gaps_of(model, train, kind=kind), gaps_of(model, test, kind=kind)
        if not len(gaps.steps):
            raise DataError("no step chooses between unlike entries; give more sequences")
        parts, size = divided(sae, keys, gaps), gaps.score.abs().mean()
        usual = torch.stack(
            [known.query[known.steps == step].mean(0) for step in range(test.live.shape[1])]
        ).nan_to_num(0)
        blind = (usual[gaps.steps] * (gaps.better - gaps.other)).sum(1)
        ordered = parts.pairs.flatten().sort(descending=True).values
        enough = (ordered.cumsum(0) < 0.9 * ordered.sum()).sum() + 1
        found |= {
            f"{kind}_gaps": float(len(gaps.steps)),
            f"{kind}_gap": float(size),
            f"{kind}_features_share": float(parts.features.abs().mean() / size),
            f"{kind}_constant_share": float(parts.constant.abs().mean() / size),
            f"{kind}_error_share": float(parts.error.abs().mean() / size),
            f"{kind}_explained_by_features": _explained(gaps.score, parts.features + parts.constant),
            f"{kind}_explained_by_step": _explained(gaps.score, blind),
            f"{kind}_pairs_for_90_percent": float(enough),
            f"{kind}_pairs": float((ordered > 0).sum()),
        }
    return found


def _explained(truth: Float[Tensor, " n"], guess: Float[Tensor, " n"]) -> float:
    return 1 - float((truth - guess).square().sum() / (truth - truth.mean()).square().sum().clamp(min=1e-12))


def causes_of_picks(
    target: DecidingTarget, sae: SAE, train: Reading, test: Reading, screen: Screen
) -> dict[str, float]:
    """The feature whose ablation changes most of what its step reads, beside features like it.

    What is read is a set of symbols: entries of one symbol are alike. The step is the one at which what is read
    varies most among sequences of the training half, of those that leave something unread.
    """
    open_steps = range(max(1, train.first_pass - 1))
    read = [_read(train.trace, train.inputs, step)[train.live[:, step]] for step in open_steps]
    varied = [len(one.unique(dim=0)) for one in read]
    step = max(range(len(varied)), key=varied.__getitem__)

    def changed(reading: Reading, feature: int, dose: float = 0.0) -> float:
        edited = trace_edited(target, reading.inputs, sae, [feature], step, dose=dose)
        was, now = (_read(trace, reading.inputs, step) for trace in (reading.trace, edited))
        return share((was != now).any(1)[reading.live[:, step]])

    codes = sae.encode(train.queries[:, step][train.live[:, step]])
    few = train.part(screen.inputs)
    tried = sorted(largest(codes, sae, screen), key=lambda one: changed(few, one), reverse=True)
    chosen, step_of_halts = tried[0], _open_step(train)
    halting = strongest_by_effect(target, few.inputs, sae, step_of_halts, count=TOP, candidates=screen.candidates)
    by_dose = {f"changed_at_{dose:g}": changed(test, chosen, dose) for dose in DOSES}
    others = [changed(test, one) for one in like_it(codes, chosen, screen)]
    return by_dose | {
        "step": float(step),
        "feature": float(chosen),
        "controls": float(len(others)),
        "changed_by_others": mean_of(others),
        "changed_by_others_most": max(others, default=0.0),
        "p": rank_p(by_dose["changed_at_0"], others),
        "also_among_those_that_halt": overlap(tried[:TOP], halting),
    }


def _read(trace: DecisionTrace, inputs: Tensor, step: int) -> Tensor:
    return inputs.gather(1, trace.more["entries"][:, step]).sort(1).values


def _open_step(reading: Reading) -> int:
    """The free step whose halts are least foregone.

    Raises:
        DataError: in none do some tapes end and others go on.
    """
    halts, live = (getattr(reading.trace, name)[:, :-1, 0].bool() for name in ("decision", "live"))
    either = torch.minimum((halts & live).sum(0), (~halts & live).sum(0))
    if not bool(either.any()):
        raise DataError("no step at which some tapes end and others go on; give other sequences")
    return int(either.argmax())


def causes_of_halts(
    target: DecidingTarget, sae: SAE, train: Reading, test: Reading, screen: Screen
) -> dict[str, float]:
    """The feature whose ablation in the query changes most halts of its step, beside features like it.

    And what tells a halt there: the best feature, a probe on the query, and what had been added up before.
    """
    step = _open_step(train)
    halves = [half.queries[:, step][half.live[:, step]] for half in (train, test)]
    halts = [half.trace.decision[:, step, 0][half.live[:, step]] == 1 for half in (train, test)]
    codes = [sae.encode(half) for half in halves]
    chosen = strongest_by_effect(
        target, train.inputs[: screen.inputs], sae, step, count=1, candidates=screen.candidates
    )[0]
    ranked = against_random(
        target, test.inputs, sae, codes[0], chosen, step, count=len(like_it(codes[0], chosen, screen))
    )
    doses = dose_response(target, test.inputs, sae, chosen, step, doses=DOSES)
    before = test.trace.score[:, step - 1, 0] if step else torch.zeros(len(test.inputs))
    return {f"flipped_at_{dose:g}": effect.flipped for dose, effect in doses.items()} | {
        "step": float(step),
        "feature": float(chosen),
        "halts": share(halts[1]),
        "controls": float(len(ranked.others)),
        "flipped_by_others": mean_of(ranked.others),
        "flipped_by_others_most": max(ranked.others, default=0.0),
        "p": ranked.p,
        "towards_halting": ranked.effect.towards,
        "halt_auc_feature": best_telling((codes[0], halts[0]), (codes[1], halts[1])).auc,
        "halt_auc_probe": probe_auc(halves[0], halts[0], halves[1], halts[1]),
        "halt_auc_sum_before": auc(before[test.live[:, step]], halts[1]),
    }


def steered(target: DecidingTarget, sae: SAE, train: Reading, test: Reading, screen: Screen) -> dict[str, float]:
    """Add a feature to the first query: does reading become longer, or shorter, and the answer stay?

    For either way the feature and the sign with which its mean strength is added are those that change the mean length
    most on some of the training half, of those that change at most 2% of its answers there. Doses are in units of that
    amount; features like it and random directions are added as much. The dial shifts what is compared with tau.
    """
    codes = sae.encode(train.queries[train.live])
    strength = activation_sums(codes) / codes.feature_counts().clamp(min=1)
    tried = largest(codes, sae, screen)

    def pushed(reading: Reading, direction: Tensor, amount: float) -> tuple[float, float]:
        site = target.step(0).reads
        edit = Intervention(site=site, operation=cast(Operation, Add(amount)), direction=direction)
        with intervening(target.target, [edit]):
            return _moved(reading, target.trace(reading.inputs))

    few, row = train.part(screen.inputs), sae.W_dec.detach()
    effects = {(one, sign): pushed(few, row[one], sign * float(strength[one])) for one in tried for sign in (1.0, -1.0)}
    found = {"length": float(test.length.float().mean()), "tried": float(len(effects))}
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(screen.directions, sae.d_model, generator=generator)
    for way, towards in (("longer", 1.0), ("shorter", -1.0)):
        quiet = {key: effect for key, effect in effects.items() if effect[1] <= FEW}
        found[f"{way}_candidates"] = float(len(quiet))
        dialled = trace_with(target, test.inputs, [Shift(-towards * DIAL)])
        found[f"{way}_dial_length"], found[f"{way}_dial_answers"] = _moved(test, dialled)
        if not quiet:
            continue
        chosen, times = max(quiet, key=lambda key: towards * quiet[key][0])
        amount = times * float(strength[chosen])
        found[f"{way}_sign"] = times
        for dose in DOSES[1:]:
            length, answers = pushed(test, row[chosen], dose * amount)
            found |= {f"{way}_length_at_{dose:g}": length, f"{way}_answers_at_{dose:g}": answers}
        others = [pushed(test, row[one], amount)[0] for one in like_it(codes, chosen, screen)]
        random = [pushed(test, direction, amount)[0] for direction in drawn]
        reached = towards * found[f"{way}_length_at_1"]
        found |= {
            f"{way}_others": mean_of(others),
            f"{way}_others_most": towards * max(towards * other for other in others) if others else 0.0,
            f"{way}_p": rank_p(reached, [towards * other for other in others]),
            f"{way}_random": mean_of(random),
            f"{way}_random_most": towards * max(towards * other for other in random),
        }
    return found


def _moved(reading: Reading, edited: DecisionTrace) -> tuple[float, float]:
    """By how many tokens the mean tape is longer, and the share of answers changed."""
    longer = edited.live[..., 0].sum(1).float().mean() - reading.length.float().mean()
    return float(longer), share(edited.more["logits"].argmax(1) != reading.answers)
