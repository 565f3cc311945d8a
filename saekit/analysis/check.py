"""Is an SAE used as it should be? Measure it, compare with what is claimed of it, and find what explains a difference.

What is claimed is in the SAE's metadata, from its own files or from the index: L0, FVU (or the variance explained) and
the recovered cross-entropy. Two measurements of the same SAE differ with the text, so a claim holds within a tolerance
(`SAME_TEXT`, `OTHER_TEXT`: our choice). Where a claim does not hold, each of the usual suspects is tried alone, and the
one under which all claims hold is named.

Without claims there is only plausibility: an SAE that leaves more than `UNLIKELY_FVU` of the variance unexplained is
hardly used as it was trained, and a suspect is named if without it less than half of that is left.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from math import inf, log

from saekit.analysis.evaluate import Evaluation, evaluate
from saekit.analysis.suspects import Setting, Suspect, suspects
from saekit.errors import SaekitError
from saekit.sae import SAE

UNLIKELY_FVU = 0.6


@dataclass(frozen=True, kw_only=True, slots=True)
class Tolerance:
    """How far a measurement may be from a claim.

    Attributes:
        l0, fvu: as fractions of the claim.
        least_fvu: for FVU so small that a fraction of it is less than text makes of it.
        ce_recovered: absolute.
    """

    l0: float
    fvu: float
    least_fvu: float
    ce_recovered: float


SAME_TEXT = Tolerance(l0=0.1, fvu=0.1, least_fvu=0.01, ce_recovered=0.02)
"""For a claim that was measured on text from where this one is."""
OTHER_TEXT = Tolerance(l0=0.3, fvu=0.3, least_fvu=0.05, ce_recovered=0.05)
"""For a claim that was measured on who knows what."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Claims:
    """What is said of an SAE; None where nothing is."""

    l0: float | None = None
    fvu: float | None = None
    ce_recovered: float | None = None

    def __bool__(self) -> bool:
        return any(value is not None for value in asdict(self).values())


@dataclass(frozen=True, kw_only=True, slots=True)
class Tried:
    """A suspect, and the numbers without its mistake.

    Attributes:
        distance: of the numbers from what is claimed; at most 1 if all of it holds.
    """

    suspect: Suspect
    evaluation: Evaluation
    distance: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What was found out.

    Attributes:
        agrees: whether what is claimed holds; None if nothing is claimed and nothing is implausible.
        culprit: what explains the difference; None if nothing does, or there is none.
        tried: every suspect, in order; empty where none was needed.
    """

    claims: Claims
    evaluation: Evaluation
    distance: float
    agrees: bool | None
    culprit: Tried | None
    tried: tuple[Tried, ...]


def claims_of(sae: SAE) -> Claims:
    """What the SAE's metadata says of it."""
    recorded = sae.cfg.metadata
    measured = recorded.get("evaluation")
    said = {**recorded, **(measured if isinstance(measured, dict) else {})}
    explained = _number(said.get("explained_variance", said.get("variance_explained")))
    fvu = _number(said.get("fvu"))
    return Claims(
        l0=_number(said.get("l0")),
        fvu=fvu if fvu is not None or explained is None else 1 - explained,
        ce_recovered=_number(said.get("ce_recovered")),
    )


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def check(
    setting: Setting,
    claims: Claims,
    *,
    tolerance: Tolerance = OTHER_TEXT,
    on_progress: Callable[[str], None] = lambda what: None,
) -> Verdict:
    """Measure the SAE as it is used, and if its claims do not hold, find out why.

    Args:
        on_progress: called with what is measured next.

    Raises:
        SaekitError: if it cannot be used so at all: no such Site, vectors of another width, masked text.
    """
    losses = claims.ce_recovered is not None
    on_progress("as it is")
    evaluation = _measured(setting, losses=losses)
    distance = _distance(evaluation, claims, tolerance)
    if distance <= 1:
        return Verdict(
            claims=claims,
            evaluation=evaluation,
            distance=distance,
            agrees=True if claims else None,
            culprit=None,
            tried=(),
        )
    # what the model makes of it is only asked of those that the quicker numbers do not rule out
    quick = replace(claims, ce_recovered=None)
    tried = tuple(_each(setting, quick, tolerance, on_progress))
    likely = [one for one in tried if one.distance <= 1 or (losses and not quick)]
    if losses:
        likely = [_with_losses(one, claims, tolerance) for one in likely]
    fitting = [one for one in likely if one.distance <= 1 and (claims or 2 * one.evaluation.fvu <= evaluation.fvu)]
    return Verdict(
        claims=claims,
        evaluation=evaluation,
        distance=distance,
        agrees=False,
        culprit=min(fitting, key=lambda one: one.distance, default=None),
        tried=tried,
    )


def _each(
    setting: Setting, claims: Claims, tolerance: Tolerance, on_progress: Callable[[str], None]
) -> Iterator[Tried]:
    for suspect in suspects(setting):
        on_progress(suspect.kind)
        try:
            evaluation = _measured(suspect.setting, losses=False)
        except SaekitError:
            continue  # it does not even fit, so it explains nothing
        yield Tried(suspect=suspect, evaluation=evaluation, distance=_distance(evaluation, claims, tolerance))


def _with_losses(one: Tried, claims: Claims, tolerance: Tolerance) -> Tried:
    evaluation = _measured(one.suspect.setting, losses=True)
    return replace(one, evaluation=evaluation, distance=_distance(evaluation, claims, tolerance))


def _measured(setting: Setting, *, losses: bool) -> Evaluation:
    return evaluate(
        setting.sae,
        setting.target,
        setting.rows,
        setting.site,
        mask=setting.mask,
        loss_rows=None if losses else 0,
    )


def _distance(evaluation: Evaluation, claims: Claims, tolerance: Tolerance) -> float:
    """How far the numbers are from the claims, in tolerances; without claims, from what is plausible."""
    fvu = evaluation.fvu if evaluation.fvu == evaluation.fvu else inf
    if not claims:
        return fvu / UNLIKELY_FVU
    distances = [0.0]
    if claims.l0 is not None:
        ratio = max(evaluation.l0, 1e-3) / max(claims.l0, 1e-3)
        distances.append(abs(log(ratio)) / log(1 + tolerance.l0))
    if claims.fvu is not None:
        allowed = max(tolerance.fvu * claims.fvu, tolerance.least_fvu)
        distances.append(abs(fvu - claims.fvu) / allowed)
    if claims.ce_recovered is not None and evaluation.ce_recovered is not None:
        distances.append(abs(evaluation.ce_recovered - claims.ce_recovered) / tolerance.ce_recovered)
    return max(distances)
