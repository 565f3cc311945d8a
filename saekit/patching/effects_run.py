"""Measuring the effects of all features and checking some: a run that can be stopped and gone on with."""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from safetensors import SafetensorError
from torch import Tensor

from saekit.activations.harvest import checksum
from saekit.activations.mask import MaskPolicy
from saekit.activations.tokens import TokenRows
from saekit.errors import DataError, FileError, SaekitError
from saekit.patching.corpus_effects import (
    CheckSums,
    EffectSettings,
    EffectSums,
    check_exactly,
    corpus_effects,
)
from saekit.patching.effects import read_prompts
from saekit.patching.effects_file import KeptEffects, fingerprint
from saekit.patching.tokens import TokenMask
from saekit.sae import SAE
from saekit.targets import Site, Target
from saekit.training.state_file import check_unfinished, read_state, write_state
from saekit.training.stop import RunStopped, StopRequested, StopSignals

SAVE_EVERY_S = 30.0


@dataclass(frozen=True, kw_only=True, slots=True)
class EffectsRun:
    """What to measure, and where the unfinished run is kept.

    Attributes:
        facts: what the numbers depend on besides; a run goes on only with the same.
        check_features: how many features are checked exactly, drawn from those that were active.
        check_rows: on how many rows, the first.
        unfinished: file of the state, which is gone when the run is through.
        resume: whether to go on from it.
    """

    target: Target
    sae: SAE
    site: Site
    rows: TokenRows
    mask: MaskPolicy
    settings: EffectSettings
    facts: Mapping[str, Any]
    check_features: int
    check_rows: int
    unfinished: Path
    resume: bool = False

    def __post_init__(self) -> None:
        if self.check_features < 2 or self.check_rows < 1:
            raise SaekitError(
                f"{self.check_features} features on {self.check_rows} rows are no check; give at least 2 and 1"
            )


@dataclass(slots=True)
class _Progress:
    """The sums so far, and when they were last written."""

    effects: EffectSums | None = None
    check: CheckSums | None = None
    saved_at: float = 0.0


def measure_effects(
    run: EffectsRun, *, on_progress: Callable[[str, int, int], None] = lambda stage, rows_done, rows: None
) -> KeptEffects:
    """Attribute every feature over all rows, then check some features exactly on the first rows.

    Args:
        on_progress: is told the stage ("attributing" or "checking"), the rows done in it, and of how many.

    Raises:
        FileError: `resume` with nothing to resume, an unfinished run without `resume`, or one with other settings.
        RunStopped: SIGTERM or Ctrl-C came, and the state is in the file.
    """
    check_unfinished(run.unfinished, resume=run.resume)
    done = _read(run) if run.resume else _Progress()
    done.saved_at = time.monotonic()

    def attributed(sums: EffectSums) -> None:
        done.effects = sums
        on_progress("attributing", sums.rows, len(run.rows))
        _save_if_due(run, done)

    def checked(sums: CheckSums) -> None:
        done.check = sums
        on_progress("checking", sums.rows, min(run.check_rows, len(run.rows)))
        _save_if_due(run, done)

    signals = StopSignals()
    with signals:
        try:
            effects = corpus_effects(
                run.target, run.sae, run.site, run.rows,
                mask=run.mask, settings=run.settings, after=done.effects, on_batch=attributed,
            )  # fmt: skip
            checked_rows = run.rows.select(slice(run.check_rows))
            check = check_exactly(
                run.target, run.sae, run.site, checked_rows, _sample(run, effects.active, checked_rows),
                mask=run.mask, settings=run.settings, after=done.check, on_batch=checked,
            )  # fmt: skip
        except StopRequested as stop:
            with signals.held_back():
                _save(run, done)
            rows = done.effects.rows if done.effects is not None else 0
            raise RunStopped(
                stop.signal,
                f"stopped after {rows:,} of {len(run.rows):,} rows, saved in {run.unfinished}; "
                "the same command with --resume goes on from there",
            ) from None
    return KeptEffects(effects, check, _described(run))


def forget_unfinished(run: EffectsRun) -> None:
    """Delete the state, once the result is kept."""
    run.unfinished.unlink(missing_ok=True)


def _sample(run: EffectsRun, active: Int[Tensor, " n_features"], checked: TokenRows) -> Int[Tensor, " m"]:
    """Of the features that are active at all, some that are on the rows to be checked too."""
    alive = (active > 0).nonzero()[:, 0]
    order = torch.randperm(len(alive), generator=torch.Generator().manual_seed(run.settings.seed))
    tokens = TokenMask(policy=run.mask, bos=checked.bos, pad=checked.pad)
    there = read_prompts(run.target, run.sae, run.site, checked.ids, mask=tokens).codes.feature_counts().cpu() > 0
    drawn = alive[order]
    drawn = drawn[there[drawn]]
    if len(drawn) < 2:
        raise DataError(f"{len(drawn)} feature is active on this text, and a check needs 2; give more text")
    return drawn[: run.check_features].sort().values


def _described(run: EffectsRun) -> dict[str, Any]:
    return {
        **run.facts,
        "site": str(run.site),
        "rows": len(run.rows),
        "check_features": run.check_features,
        "check_rows": run.check_rows,
        "mask": asdict(run.mask),
        **asdict(run.settings),
    }


def _began_with(run: EffectsRun) -> dict[str, Any]:
    return {**_described(run), "text_checksum": checksum(run.rows.ids)}


def _save_if_due(run: EffectsRun, done: _Progress) -> None:
    if time.monotonic() - done.saved_at >= SAVE_EVERY_S:
        _save(run, done)
        done.saved_at = time.monotonic()


def _save(run: EffectsRun, done: _Progress) -> None:
    tensors: dict[str, Tensor] = {"rows": torch.tensor([0, 0])}
    if done.effects is not None:
        tensors |= {"total": done.effects.total, "drawn": done.effects.drawn}
        tensors["rows"][0] = done.effects.rows
    if done.check is not None:
        tensors["checked"] = done.check.total
        tensors["rows"][1] = done.check.rows
    metadata = {"of": fingerprint(run.sae), "facts": json.dumps(_began_with(run), sort_keys=True)}
    write_state(run.unfinished, tensors, metadata)


def _read(run: EffectsRun) -> _Progress:
    path = run.unfinished
    try:
        tensors, metadata = read_state(path)
        facts, of = json.loads(metadata["facts"]), metadata["of"]
        rows = tensors["rows"].tolist()
        effects = EffectSums(rows[0], tensors["total"], tensors["drawn"]) if rows[0] else None
        check = CheckSums(rows[1], tensors["checked"]) if rows[1] else None
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise FileError(f"{path} cannot be read ({error}); delete it to start anew") from error
    if of != fingerprint(run.sae):
        raise FileError(f"{path} is about another SAE; delete it to start anew")
    now = json.loads(json.dumps(_began_with(run)))
    for name in sorted(facts.keys() | now.keys()):
        if facts.get(name) != now.get(name):
            raise FileError(
                f"{path} was begun with {name} {facts.get(name)!r}, not {now.get(name)!r}; give the same, or delete "
                "that file to start anew"
            )
    return _Progress(effects, check)
