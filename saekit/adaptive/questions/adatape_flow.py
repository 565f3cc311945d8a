"""AdaTape: how features of the tape and of the sequence's own token reach the answer, and what only long tapes have."""

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saekit.adaptive.adatape import AdaTape
from saekit.adaptive.deciding import DecidingTarget
from saekit.adaptive.effects import rank_p
from saekit.adaptive.interventions import Force, Where, deciding
from saekit.adaptive.questions.adatape_reading import (
    OWN,
    TAPE,
    VALID,
    Reading,
    Screen,
    instead,
    largest,
    like_it,
    mean_of,
    read_tapes,
    share,
)
from saekit.adaptive.telling import activation_of, auc, probe_auc
from saekit.codes import SparseCodes
from saekit.errors import DataError
from saekit.sae import SAE
from saekit.targets import Site
from saekit.targets.target import Edit

# of shared slots that a feature fires in, for it to be asked whether only long tapes have it
RAREST = 0.01


def flow(
    target: DecidingTarget,
    model: AdaTape,
    tape: SAE,
    own: SAE,
    train: Reading,
    test: Reading,
    screen: Screen,
) -> dict[str, float]:
    """How far the class token moves, block by block, if a feature of the tape or of the sequence's own token is gone.

    `block_b` takes its part away from what that block's attention reads and from nothing else; `everywhere` where it
    enters, with the reading as it was; `by_reading` (own token) from the first query alone. moved is a share of the
    class token's norm behind the last block, margin the change of the answer's logit difference. `all` is of all
    features together, `others` the mean of features like the one chosen, everywhere.
    """
    found: dict[str, float] = {}
    for side, sae in (("tape", tape), ("own", own)):
        codes, tokens = _codes_of(sae, side, train), _codes_of(sae, side, test)
        screened = train.part(screen.inputs)
        chosen = max(
            largest(codes, sae, screen),
            key=lambda one: _moved(
                target, model, screened, _everywhere(screened, side, _written(sae, side, screened, one))
            )["margin"],
        )
        parts = {"": _written(sae, side, test, chosen, tokens), "all_": _written(sae, side, test, None, tokens)}
        for name, part in parts.items():
            ways = {"everywhere": _everywhere(test, side, part)}
            for block in range(model.config.insert, model.config.layers):
                site = Site.parse(f"layers.{block}.norm1:in")
                ways[f"block_{block}"] = {site: _less(part, first=-test.tape.shape[1] if side == "tape" else 1)}
            if side == "own":
                ways["by_reading"] = _by_reading(target, model, test, part)
            for way, edits in ways.items():
                moved = _moved(target, model, test, edits)
                found |= {f"{side}_{name}{way}_{what}": value for what, value in moved.items()}
        others = [
            _moved(target, model, test, _everywhere(test, side, _written(sae, side, test, one, tokens)))["margin"]
            for one in like_it(codes, chosen, screen)
        ]
        found[f"{side}_others_margin"] = mean_of(others)
        found[f"{side}_p"] = rank_p(found[f"{side}_everywhere_margin"], others)
    return found


def _codes_of(sae: SAE, side: str, reading: Reading) -> SparseCodes:
    return sae.encode(reading.tape[reading.live] if side == "tape" else reading.base)


def _written(
    sae: SAE, side: str, reading: Reading, feature: int | None, codes: SparseCodes | None = None
) -> Float[Tensor, "n tokens width"]:
    """What one feature, or all of them, add to the tokens of a side; 0 in slots behind the end."""
    codes = _codes_of(sae, side, reading) if codes is None else codes
    if feature is None:
        part = sae.decode(codes) - sae.b_dec
    else:
        part = activation_of(codes, feature)[:, None] * sae.W_dec[feature]
    if side != "tape":
        return part[:, None]
    whole = torch.zeros_like(reading.tape)
    whole[reading.live] = part
    return whole


def _less(part: Float[Tensor, "n tokens width"], *, first: int) -> Edit:
    """Args: first: the token that the first of `part` is of; counted from the end where it is negative."""

    def edit(x: Tensor) -> Tensor:
        start = first % x.shape[1]
        return torch.cat([x[:, :start], x[:, start : start + part.shape[1]] - part, x[:, start + part.shape[1] :]], 1)

    return edit


def _everywhere(reading: Reading, side: str, part: Tensor) -> dict[Site, Edit]:
    if side == "tape":
        return {TAPE: _less(part, first=0)}
    return {OWN: _less(part, first=0), TAPE: instead(reading.tape), VALID: instead(reading.live)}


def _by_reading(target: DecidingTarget, model: AdaTape, reading: Reading, part: Tensor) -> dict[Site, Edit]:
    """The tape that is read without a part of the sequence's own token."""
    with target.target.editing({OWN: _less(part, first=0)}):
        other = read_tapes(target, model, reading.inputs)
    return {TAPE: instead(other.tape), VALID: instead(other.live)}


@torch.no_grad()
def _moved(target: DecidingTarget, model: AdaTape, reading: Reading, edits: Mapping[Site, Edit]) -> dict[str, float]:
    """How far the class token is moved behind the last block, what that does to the margin, and answers changed."""
    end = Site.parse("norm:in")
    clean = target.target.read(reading.inputs, [end])[end]
    with target.target.editing(edits):
        state = target.target.read(reading.inputs, [end])[end]
    logits = [model.head(model.norm(one)) for one in (clean, state)]
    margins = [one[:, 1] - one[:, 0] for one in logits]
    return {
        "moved": float(((state - clean).norm(dim=1) / clean.norm(dim=1)).mean()),
        "margin": float((margins[1] - margins[0]).abs().mean()),
        "flipped": share(logits[0].argmax(1) != logits[1].argmax(1)),
    }


def large_tapes(
    target: DecidingTarget, model: AdaTape, tape: SAE, last: SAE, train: Reading, test: Reading, *, seed: int
) -> dict[str, float]:
    """Whether a feature fires on long tapes alone, in slots that every tape has, and if a forced length keeps it.

    Rates are those of firing in shared slots. The feature is the one whose rate on the longest tapes is largest beside
    that on all others; *_by_luck is the same choice by permuted lengths. What enters the blocks was read before
    the tape ended, and cannot depend on the length; what the last block reads has seen the other slots.
    long_auc_probe is how well all of the latter together tells the length.

    Raises:
        DataError: all tapes are equally long.
    """
    shared = int(min(train.length.min(), test.length.min()))
    longest = int(train.length.max())
    if shared == longest:
        raise DataError(f"all tapes have {longest} tokens, so that none is long; give other sequences")
    runs = {"free": test}
    for name, length in (("short", shared), ("long", longest)):
        with deciding(target, _ending(length, train.live.shape[1])):
            runs[name] = read_tapes(target, model, test.inputs)
    is_long = test.length == longest
    found = {"shared_slots": float(shared), "share_longest": share(is_long)}
    shuffled = train.length[torch.randperm(len(train.length), generator=torch.Generator().manual_seed(seed))]
    for side, sae in (("tape", tape), ("last", last)):
        fires = {name: _fires(run, side, sae, shared) for name, run in runs.items()}
        on_train = _fires(train, side, sae, shared)
        feature, lucky = (_most_on(on_train, length == longest) for length in (train.length, shuffled))
        free = fires["free"][:, :, feature]
        kept = free[is_long] & fires["short"][is_long][:, :, feature]
        found |= {
            f"{side}_on_long": share(free[is_long].flatten()),
            f"{side}_on_others": share(free[~is_long].flatten()),
            f"{side}_by_luck_on_long": share(fires["free"][is_long][:, :, lucky].flatten()),
            f"{side}_by_luck_on_others": share(fires["free"][~is_long][:, :, lucky].flatten()),
            f"{side}_on_long_forced_short": share(fires["short"][is_long][:, :, feature].flatten()),
            f"{side}_on_others_forced_long": share(fires["long"][~is_long][:, :, feature].flatten()),
            f"{side}_kept_when_forced_short": float(kept.sum() / free[is_long].sum().clamp(min=1)),
            f"{side}_long_auc": auc(free.float().sum(1), is_long),
        }
    seen = [half.last[:, :shared].flatten(1) for half in (train, test)]
    return found | {"long_auc_probe": probe_auc(seen[0], train.length == longest, seen[1], is_long)}


def _ending(length: int, longest: int) -> list[Force]:
    """Every tape as long as this."""
    return [Force("go on"), *([Force("halt", Where(steps=(length - 1,)))] if length < longest else [])]


def _fires(reading: Reading, side: str, sae: SAE, shared: int) -> Bool[Tensor, "n shared features"]:
    # dense, but for a few hundred sequences on a few dozen features
    vectors = (reading.tape if side == "tape" else reading.last)[:, :shared]
    return (sae.encode(vectors.flatten(0, 1)).to_dense() > 0).unflatten(0, vectors.shape[:2])


def _most_on(fires: Bool[Tensor, "n shared features"], is_long: Bool[Tensor, " n"]) -> int:
    """The feature with the largest rate on these beside that on others, of those that fire at all often."""
    here, there = (fires[chosen].float().mean((0, 1)) for chosen in (is_long, ~is_long))
    ratio = (here + 1e-3) / (there + 1e-3)
    return int(ratio.masked_fill(fires.float().mean((0, 1)) < RAREST, 0).argmax())
