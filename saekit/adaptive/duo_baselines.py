"""What Duo-LLM's coin flips are held against: models that never had a choice, and one that got it afterwards.

All see the same batches in the same order for as many steps in all.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from jaxtyping import Int
from torch import Tensor, nn

from saekit.adaptive.duo_llm import DuoLLM
from saekit.adaptive.duo_recipe import LANGUAGE, DuoRecipe
from saekit.adaptive.duo_report import CHANCES, nats_of_coins
from saekit.adaptive.saved import filled
from saekit.adaptive.stages import Stage

Way = Literal["joint", "big", "small", "added"]
ADDED = "added"


@dataclass(frozen=True, kw_only=True, slots=True)
class DuoBaseline:
    """One way to come to a language model; no router.

    Attributes:
        way: joint (Duo-LLM's coin flips), big or small (that feed-forward alone: a dense model), added (big alone for
            two thirds of the steps, then small alone is trained, under coin flips, in the frozen model).
    """

    of: DuoRecipe
    way: Way

    @property
    def stages(self) -> tuple[Stage, ...]:
        language, _ = self.of.stages
        if self.way != "added":
            return (language,)
        before = 2 * language.steps // 3
        small = tuple(f"layers.{number}.feed.small" for number in range(self.of.layers))
        then = replace(language, name=ADDED, steps=language.steps - before, start=LANGUAGE, only=small)
        return replace(language, steps=before), then

    def build(self) -> DuoLLM:
        return self.of.build()

    def loss(self, model: nn.Module, stage: Stage, step: int) -> tuple[Tensor, Mapping[str, float]]:
        chance = {"big": 1.0, "small": 0.0, "joint": self.of.big_chance, "added": 1.0}[self.way]
        recipe = self.of if stage.name == ADDED else replace(self.of, big_chance=chance)
        # what is added afterwards goes on with the batches that would have come
        done = self.stages[0].steps if stage.name == ADDED else 0
        return recipe.loss(model, replace(stage, name=LANGUAGE), done + step)


def measure_duo_baseline(
    baseline: DuoBaseline, weights: Mapping[str, Mapping[str, Tensor]], ids: Int[Tensor, "batch tokens"]
) -> dict[str, float]:
    """Nats per token of held-out rows by the chance of big in each layer; a dense model has only its own."""
    model = baseline.build()
    filled(model, weights[baseline.stages[-1].name])
    chances = {"big": (1.0,), "small": (0.0,)}.get(baseline.way, CHANCES)
    return {f"nats_at_{chance:g}_big": nats_of_coins(model, ids, chance) for chance in chances}
