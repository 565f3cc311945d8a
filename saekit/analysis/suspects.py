"""The usual ways in which an SAE is used wrongly, each as a setting in which the mistake would be undone.

One thing is changed at a time. Site: the other end of the module, or the same module one layer up or down. Text: rows
with or without BOS at their start, BOS among the activations or not. The SAE: the normalisation of its tokens, one
scale of all its inputs, whether b_dec is subtracted from them, whether they are centred, and bfloat16.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from saekit.activations.harvest import Harvest
from saekit.activations.mask import MaskPolicy
from saekit.activations.tokens import TokenRows
from saekit.errors import SaekitError
from saekit.formats.weights import Weights, with_input_scale
from saekit.loading import build, weights_of
from saekit.normalisation import ConstantNorm, EqualNorms, LayerNorm, Normalisation, Outputs, PerToken, Plain, Vectors
from saekit.sae import SAE
from saekit.selection import SelectionRule, Threshold
from saekit.targets import Side, Site, Target

_LAYER = re.compile(r"(?P<before>(?:.*\.)?(?:layers|h|blocks)\.)(?P<layer>[0-9]+)(?P<after>(?:\..+)?)")
_NORMALISATIONS: tuple[Normalisation, ...] = (Plain(), LayerNorm(), ConstantNorm(), EqualNorms())


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """An SAE, and how it is used."""

    sae: SAE
    target: Target
    site: Site
    rows: TokenRows
    mask: MaskPolicy


@dataclass(frozen=True, kw_only=True, slots=True)
class Suspect:
    """One thing that may be wrong.

    Attributes:
        kind: `site`, `layer`, `bos`, `normalisation`, `scale`, `bias`, `centred` or `bf16`.
        says: what would be the matter, and what to do.
        setting: the same use without that mistake.
    """

    kind: str
    says: str
    setting: Setting


def suspects(setting: Setting) -> Iterator[Suspect]:
    """Every setting to try, the likeliest mistakes first; what does not apply to this SAE or model is left out."""
    yield from _other_sites(setting)
    yield from _other_tokens(setting)
    yield from _other_scales(setting)
    yield from _other_encoders(setting)


def _other_sites(setting: Setting) -> Iterator[Suspect]:
    site, model = setting.site.resolve(setting.target.model), setting.target.model
    other = replace(site, side=Side.INPUT if site.side == Side.OUTPUT else Side.OUTPUT)
    flipped = ("site", other, f"it reads {other}, not {site}: the other end of the module; pass --site {other}")
    moved = []
    for beside in _beside(site):
        moved.append(("layer", beside, f"it reads {beside}, not {site}: one layer off; pass --site {beside}"))
    # what enters a block is what the one before it put out: name it by the end that was given
    for kind, candidate, says in [*moved, flipped] if site.side == Side.OUTPUT else [flipped, *moved]:
        try:
            fits = setting.target.width(candidate.resolve(model)) == setting.sae.d_model
        except (SaekitError, RuntimeError):
            continue  # the model has no such layer
        if fits:
            yield Suspect(kind=kind, says=says, setting=replace(setting, site=candidate))


def _beside(site: Site) -> list[Site]:
    """The same module one layer down and up; none for a module that is in no layer."""
    found = _LAYER.fullmatch(site.module)
    if found is None:
        return []
    layers = (int(found["layer"]) - 1, int(found["layer"]) + 1)
    return [replace(site, module=f"{found['before']}{n}{found['after']}") for n in layers if n >= 0]


def _other_tokens(setting: Setting) -> Iterator[Suspect]:
    rows, mask = setting.rows, setting.mask
    if rows.bos is None:
        return
    flipped = replace(mask, drop_bos=not mask.drop_bos)
    said = "only without BOS" if mask.drop_bos is False else "with BOS among the activations"
    yield Suspect(
        kind="bos",
        says=f"its numbers were measured {said}; compare like with like",
        setting=replace(setting, mask=flipped),
    )
    bos = torch.full_like(rows.ids[:, :1], rows.bos)
    if (rows.ids[:, 0] == rows.bos).all():
        without = TokenRows.from_ids(rows.ids[:, 1:], bos=rows.bos, pad=rows.pad)
        says = "its text had no BOS at the start of a row; set row_bos to false in its metadata"
        yield Suspect(kind="bos", says=says, setting=replace(setting, rows=without))
    else:
        with_bos = TokenRows.from_ids(torch.cat([bos, rows.ids[:, :-1]], 1), bos=rows.bos, pad=rows.pad)
        says = "its text had BOS at the start of every row; set row_bos to true in its metadata"
        yield Suspect(kind="bos", says=says, setting=replace(setting, rows=with_bos))


def _other_scales(setting: Setting) -> Iterator[Suspect]:
    weights = weights_of(setting.sae)
    scale = setting.sae.d_model**0.5 / mean_norm(setting)
    for factor, says in (
        (scale, f"its inputs must be scaled to a mean norm of sqrt(d); load it with input_scale={scale:.4g}"),
        (1 / scale, f"the scale of its inputs was folded twice; load it with input_scale={1 / scale:.4g}"),
    ):
        yield Suspect(kind="scale", says=says, setting=_with(setting, with_input_scale(weights, factor)))


def _other_encoders(setting: Setting) -> Iterator[Suspect]:
    sae, weights = setting.sae, weights_of(setting.sae)
    if not sae.is_transcoder:
        for kind in _NORMALISATIONS:
            if kind != sae.cfg.normalisation:
                says = f"its tokens are to be normalised by {kind!r}, not {sae.cfg.normalisation!r}; correct its config"
                yield Suspect(
                    kind="normalisation", says=says, setting=_with(setting, replace(weights, normalisation=kind))
                )
        flipped = replace(weights, apply_b_dec_to_input=not weights.apply_b_dec_to_input)
        to_be = "not to be" if weights.apply_b_dec_to_input else "to be"
        says = f"b_dec is {to_be} subtracted from its input; correct its config"
        yield Suspect(kind="bias", says=says, setting=_with(setting, flipped))
        if weights.skip is None and not sae.cfg.normalisation.needs_input:
            says = "it reads a residual stream without its mean, as TransformerLens has it with center_writing_weights"
            yield Suspect(kind="centred", says=says, setting=_with(setting, _centred(weights)))
    rounded = replace(
        weights,
        encoder=_rounded(weights.encoder),
        decoder=_rounded(weights.decoder),
        b_enc=_rounded(weights.b_enc),
        b_dec=_rounded(weights.b_dec),
        rule=_with_rounded_cuts(weights.rule),
        normalisation=InBfloat16(weights.normalisation),
    )
    yield Suspect(
        kind="bf16", says="its numbers were measured in bfloat16, which changes them", setting=_with(setting, rounded)
    )


@dataclass(frozen=True, slots=True)
class InBfloat16:
    """Another normalisation, of tokens that were rounded to bfloat16 before and after it."""

    inner: Normalisation
    needs_input: ClassVar[bool] = False

    def prepare(self, x: Vectors, bias: Tensor | None) -> tuple[Vectors, PerToken | None]:
        prepared, scale = self.inner.prepare(_rounded(x), bias)
        return _rounded(prepared), scale

    def restore(self, y: Outputs, x: Vectors | None) -> Outputs:
        return _rounded(self.inner.restore(y, x))


def mean_norm(setting: Setting) -> float:
    """The mean norm of the activations that the SAE reads."""
    harvest = Harvest(target=setting.target, rows=setting.rows, sites=(setting.site,), mask=setting.mask)
    norms = [batches[setting.site].vectors.norm(dim=1).double() for batches in harvest.in_order()]
    return float(torch.cat(norms).mean())


def _centred(weights: Weights) -> Weights:
    """The same SAE on inputs less their mean, which is given back to the output: both are linear, so both fold."""
    encoder = weights.encoder - weights.encoder.mean(1, keepdim=True)
    b_enc = weights.b_enc
    if weights.apply_b_dec_to_input:
        b_enc = b_enc - (weights.encoder - encoder) @ weights.b_dec
    mean = torch.full((weights.d_in, weights.d_in), 1 / weights.d_in, device=encoder.device)
    return replace(weights, encoder=encoder, b_enc=b_enc, skip=mean)


def _with_rounded_cuts(rule: SelectionRule) -> SelectionRule:
    if not isinstance(rule, Threshold):
        return rule
    theta = rule.theta
    return replace(rule, theta=_rounded(theta) if isinstance(theta, Tensor) else float(_rounded(torch.tensor(theta))))


def _with(setting: Setting, weights: Weights) -> Setting:
    return replace(setting, sae=build(weights, device=setting.sae.b_dec.device))


def _rounded(x: Tensor) -> Tensor:
    return x.bfloat16().to(x.dtype)
