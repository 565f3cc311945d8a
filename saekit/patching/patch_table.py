"""Activation patching over features x Sites x positions: what each feature, at each place, carries of a difference.

For prompts and their corrupted counterparts, every feature whose strength differs between the two at some position of
some Site is given, alone, the strength that it has on the other side, and the model is run. That is the feature's
indirect effect (Pearl, 2001; Vig et al., arXiv 2004.12265): the part of the total effect of the corruption that goes by
way of it, all else as in the prompts' own run. Parts overlap, so they need not add up to the total.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from torch import Tensor

from saekit.activations.mask import MaskPolicy
from saekit.errors import FileError, SaekitError
from saekit.patching.attribution import change_between
from saekit.patching.effects import Candidates, Prompts, check_same_places, exact_effects, metric_of, read_prompts
from saekit.patching.effects_file import fingerprint
from saekit.patching.metric import Metric
from saekit.patching.splice import SAEs, place_saes
from saekit.patching.tokens import TokenMask
from saekit.targets import Site, Target
from saekit.training.state_file import check_unfinished, read_state, write_state

SAVE_EVERY_S = 30.0


@dataclass(frozen=True, slots=True)
class PatchTable:
    """Indirect effects at one Site.

    Attributes:
        at: every (prompt, position, feature) whose strength differs between the two sides.
        effect: `(n,)` of each on the metric of its prompt.
        total: `(prompts,)` the effect of the corruption as a whole: metric of the other prompts less that of these.
    """

    at: Candidates
    effect: Float[Tensor, " n"]
    total: Float[Tensor, " prompts"]


def patch_features(
    target: Target,
    saes: SAEs,
    ids: Int[Tensor, "prompts context"],
    other_ids: Int[Tensor, "_ _"],
    metric: Metric,
    *,
    mask: MaskPolicy | TokenMask = MaskPolicy(),
    batch_rows: int = 64,
    unfinished: Path | None = None,
    resume: bool = False,
    on_progress: Callable[[Site, int, int], None] = lambda site, done, of: None,
) -> dict[Site, PatchTable]:
    """One row of a forward pass for every place of every Site.

    Args:
        unfinished: a file to keep what is done in, every half minute and when the run is stopped; it is gone when
            the run is through. With `resume`, the run goes on from it, to the same numbers bit for bit.
        on_progress: is told the Site, how many of its places are done, and of how many.

    Raises:
        ShapeError: prompts of different sizes.
        SaekitError: prompts that differ in no feature.
        FileError: nothing to resume, or an unfinished run without `resume` or about something else.
    """
    check_same_places(ids, other_ids)
    if resume and unfinished is None:
        raise SaekitError("resume needs to know from where; pass unfinished=")
    placed, tokens = place_saes(saes), TokenMask.of(target, mask)
    about = {f"{i}": f"{site} {fingerprint(sae)}" for i, (site, sae) in enumerate(placed.items())}
    if unfinished is not None:  # before any work
        check_unfinished(unfinished, resume=resume)
    values = torch.stack([metric_of(target, side, metric) for side in (ids, other_ids)])
    given = {"ids": ids, "other_ids": other_ids, "batch_rows": torch.tensor(batch_rows), "metric": values}
    keeper = None if unfinished is None else _Keeper(unfinished, about, given, resume=resume)
    tables: dict[Site, PatchTable] = {}
    try:
        for number, (site, sae) in enumerate(placed.items()):
            own, other = (read_prompts(target, sae, site, side, mask=tokens) for side in (ids, other_ids))
            at = _differing(own, other)

            def keep(effects: Tensor, number: int = number, site: Site = site, n: int = len(at)) -> None:
                if keeper is not None:
                    keeper.note(number, effects)
                on_progress(site, len(effects), n)

            after = None if keeper is None else keeper.done.get(str(number))
            effect = exact_effects(
                target, sae, site, ids, metric, at,
                other=other, mask=tokens, batch_rows=batch_rows, after=after, on_batch=keep,
            )  # fmt: skip
            tables[site] = PatchTable(at, effect, values[1] - values[0])
        _check_some(tables)
    except BaseException:
        if keeper is not None and keeper.done:
            keeper.save()
        raise
    if unfinished is not None:
        unfinished.unlink(missing_ok=True)
    return tables


def _differing(own: Prompts, other: Prompts) -> Candidates:
    """Every place that counts where a feature's strength is not the same."""
    change = change_between(own, other).active()
    token, context = change.token_of_entry().cpu(), own.grid.keep.shape[1]
    return Candidates(token // context, token % context, change.features.cpu())


def _check_some(tables: Mapping[Site, PatchTable]) -> None:
    if not any(len(table.at) for table in tables.values()):
        raise SaekitError(
            f"no feature at {', '.join(map(str, tables))} differs between the prompts; choose others that do"
        )


class _Keeper:
    """Effects so far, by the number of their Site, and the file that they are written to."""

    def __init__(self, path: Path, about: Mapping[str, str], given: Mapping[str, Tensor], *, resume: bool):
        self._path, self._about, self._given = path, about, given
        self.done: dict[str, Tensor] = self._read() if resume else {}
        self._saved_at = time.monotonic()

    def note(self, number: int, effects: Tensor) -> None:
        self.done[str(number)] = effects
        if time.monotonic() - self._saved_at > SAVE_EVERY_S:
            self.save()

    def save(self) -> None:
        write_state(self._path, {**self._given, **self.done}, self._about)
        self._saved_at = time.monotonic()

    def _read(self) -> dict[str, Tensor]:
        try:
            tensors, about = read_state(self._path)
            same = about == self._about and all(_same(tensors[name], one) for name, one in self._given.items())
        except (OSError, SafetensorError, KeyError) as error:
            raise FileError(f"{self._path} cannot be read ({error}); delete it to start anew") from error
        if not same:
            raise FileError(
                f"{self._path} is about another model or metric, or other prompts, SAEs, Sites or batches; "
                "give the same, or delete it to start anew"
            )
        return {name: tensor for name, tensor in tensors.items() if name not in self._given}


def _same(kept: Tensor, now: Tensor) -> bool:
    """Whether two are equal; what a model computes, up to what another number of threads may change."""
    if kept.shape != now.shape:
        return False
    return torch.allclose(kept, now, rtol=1e-4, atol=1e-5) if now.is_floating_point() else torch.equal(kept, now)
