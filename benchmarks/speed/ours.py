"""saekit's own training steps: the rules with and without the auxiliary loss, and the definition they must equal."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.speed.case import Size, dead_features
from saekit.codes import SparseCodes
from saekit.kernels import reference
from saekit.losses import AuxZipf
from saekit.sae import SAE
from saekit.selection import FeatureChoice, MutualChoice, SelectionRule, TopK
from saekit.targets import Site
from saekit.training.config import TrainConfig
from saekit.training.step import TrainState, train_step

Step = Callable[[Tensor], None]
RULES: dict[str, Callable[[int], SelectionRule]] = {
    "topk": TopK,
    "mutual": MutualChoice,
    "feature": FeatureChoice,
    "feature_zipf": partial(FeatureChoice, exponent=1.0, offset=3.0, floor=1),
}
# with an auxiliary loss; with one in which features choose, one on a quarter of the tokens, one made in bfloat16
AUXILIARIES = {
    "aux": AuxZipf(),
    "auxf": AuxZipf(claim="feature"),
    "aux/4": AuxZipf(sample=0.25),
    "aux16": AuxZipf(bf16=True),
}
EXTRAS = ("", "+aux", "+auxf", "+aux/4", "+screen", "+aux+screen", "+auxf+screen", "+aux16+screen")
LAST_STEP = 1_000


def contenders() -> list[str]:
    return ["reference_topk", *(rule + extra for extra in EXTRAS for rule in RULES)]


def build(name: str, size: Size, sample: Tensor) -> Step:
    """A function that takes one training step on a batch."""
    if name == "reference_topk":
        return _reference(size, sample)
    rule, *extras = name.split("+")
    auxiliary = next((AUXILIARIES[extra] for extra in extras if extra in AUXILIARIES), None)
    state = start(RULES[rule](size.k), size, sample, auxiliary=auxiliary, screens="screen" in extras)
    if auxiliary is None:
        return lambda batch: void(train_step(state, batch))
    dead = dead_features(size).to(sample.device)
    on_the_line = _zipf_densities(size, sample.device)

    def step(batch: Tensor) -> None:
        # training would revive them; a benchmark wants every step alike
        state.density.tokens_since_fired.masked_fill_(dead, 1 << 40)
        state.density.average, state.density.weight = on_the_line.clone(), 1.0
        train_step(state, batch)

    state.step = LAST_STEP // 2
    return step


def start(
    rule: SelectionRule, size: Size, sample: Tensor, *, auxiliary: AuxZipf | None, screens: bool = False
) -> TrainState:
    config = TrainConfig(
        site=Site("benchmark"),
        rule=rule,
        n_features=size.n_features,
        tokens=size.n_tokens * LAST_STEP,
        batch_tokens=size.n_tokens,
        auxiliary=auxiliary,
        bf16_screening=screens,
    )
    return TrainState.start(config, sample)


class DefinitionSAE(SAE):
    """The same weights, encoded and decoded as `kernels.reference` defines it: dense, and slow."""

    def encode(self, x: Tensor) -> SparseCodes:
        prepared, _ = self.prepare(x)
        return self.rule(reference.pre_acts(prepared, self.encoder, self.b_enc))

    def decode(self, codes: SparseCodes, x: Tensor | None = None) -> Tensor:
        return reference.decode_rows(codes.values, codes.features, codes.row_starts, self.decoder) + self.b_dec


def _reference(size: Size, sample: Tensor) -> Step:
    state = start(TopK(size.k), size, sample, auxiliary=None)
    state.sae.__class__ = DefinitionSAE
    return lambda batch: void(train_step(state, batch))


def _zipf_densities(size: Size, device: torch.device) -> Tensor:
    """Densities of living features exactly on a Zipf line, so that the dead alone are under-used."""
    line = (torch.arange(1, size.n_features + 1, dtype=torch.float64, device=device) + 3) ** -1.0
    return (line * size.k / line.sum()).clamp(max=1.0)


def void(_: object) -> None:
    """Forget what a step returns."""
