"""What each adaptive model is held against: other models, or the same one made otherwise, trained as long."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from torch import Tensor

from benchmarks.adaptive.images import CIFAR, FOLDER, MNIST, ImageRecipe, measure_images
from saekit.adaptive.a_vit_recipe import AViTRecipe
from saekit.adaptive.a_vit_sweep import AViTSweep, measure_sweep
from saekit.adaptive.adatape_baselines import BaselineRecipe, Model, measure_baseline
from saekit.adaptive.duo_baselines import DuoBaseline, Way, measure_duo_baseline
from saekit.adaptive.duo_recipe import DuoRecipe, load_once
from saekit.adaptive.rin_recipe import DENOISING, RINRecipe
from saekit.adaptive.rin_report import WAYS, measure_pictures
from saekit.adaptive.saved import filled
from saekit.adaptive.stages import Recipe

Weights = Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """One thing to train and measure.

    Attributes:
        recipe: of a seed.
        measure: numbers, from the weights of the recipe's stages, and rows of held-out text for models of text.
        needs: a file without which it is left out.
    """

    recipe: Callable[[int], Recipe]
    measure: Callable[[Recipe, Weights, int], Mapping[str, float]]
    needs: Path | None = None


def tape_arm(task: str, model: str) -> Arm:
    def recipe(seed: int) -> BaselineRecipe:
        return BaselineRecipe(task=task, model=model, seed=seed)  # pyright: ignore[reportArgumentType]

    def measure(made: Recipe, weights: Weights, rows: int) -> Mapping[str, float]:
        assert isinstance(made, BaselineRecipe)
        return measure_baseline(made, filled(made.build(), weights[made.stages[0].name]))

    return Arm(recipe=recipe, measure=measure)


def rin_arm(*, rate: float = 0.9, full_layers: int | None = None) -> Arm:
    def measure(made: Recipe, weights: Weights, rows: int) -> Mapping[str, float]:
        assert isinstance(made, RINRecipe)
        model = made.build()
        filled(model, weights[DENOISING])
        # without latents there is nothing to reset
        ways = WAYS if full_layers is None else {"carried": WAYS["carried"]}
        return measure_pictures(model, seed=made.seed, ways=ways) | {"macs": model.config.macs}

    return Arm(recipe=lambda seed: RINRecipe(seed=seed, rate=rate, full_layers=full_layers), measure=measure)


def sweep_arm() -> Arm:
    def measure(made: Recipe, weights: Weights, rows: int) -> Mapping[str, float]:
        assert isinstance(made, AViTSweep)
        return measure_sweep(made, weights)

    return Arm(recipe=lambda seed: AViTSweep(of=AViTRecipe(seed=seed)), measure=measure)


def a_vit_arm(recipe: Callable[[int], AViTRecipe], *, needs: Path | None = None) -> Arm:
    def measure(made: Recipe, weights: Weights, rows: int) -> Mapping[str, float]:
        assert isinstance(made, AViTRecipe)
        return measure_images(made, weights)

    return Arm(recipe=recipe, measure=measure, needs=needs)


def duo_arm(way: Way) -> Arm:
    def measure(made: Recipe, weights: Weights, rows: int) -> Mapping[str, float]:
        assert isinstance(made, DuoBaseline)
        return measure_duo_baseline(made, weights, load_once(made.of.context).held_out.ids[:rows])

    return Arm(recipe=lambda seed: DuoBaseline(of=DuoRecipe(seed=seed), way=way), measure=measure)


PARITY = ("plain", "still", "universal", "ponder")
ARMS: Mapping[str, Mapping[str, Arm]] = {
    "a-vit": {
        "sweep": sweep_arm(),
        "first": a_vit_arm(lambda seed: AViTRecipe(seed=seed, channel="first")),
        "mnist": a_vit_arm(ImageRecipe.mnist, needs=FOLDER / MNIST[0]),
        "cifar10": a_vit_arm(ImageRecipe.cifar10, needs=FOLDER / CIFAR),
    },
    # the joint model is Duo-LLM itself, and is measured with it
    "duo-llm": {way: duo_arm(way) for way in get_args(Way) if way != "joint"},
    "adatape": {f"parity-{model}": tape_arm("parity", model) for model in PARITY}
    | {f"digits-{model}": tape_arm("digits", model) for model in get_args(Model)},
    "rin": {
        "rate-0": rin_arm(rate=0.0),
        "rate-0.5": rin_arm(rate=0.5),
        "full-1": rin_arm(full_layers=1),
        "full-2": rin_arm(full_layers=2),
    },
}
