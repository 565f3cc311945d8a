"""Several halting settings of A-ViT from one plain model: how much accuracy each saved multiplication costs."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from saekit.adaptive.a_vit import AViT
from saekit.adaptive.a_vit_recipe import CONTROL, HALTING, PLAIN, AViTRecipe
from saekit.adaptive.a_vit_report import accuracy
from saekit.adaptive.deciding import a_vit_target
from saekit.adaptive.saved import filled
from saekit.adaptive.stages import Stage


@dataclass(frozen=True, kw_only=True, slots=True)
class AViTSweep:
    """The stages of `of`, with one halting stage per setting; all halting stages see the same images in the same order.

    All borrow the channel that is chosen for `of`, so that they differ in nothing but the setting.

    Attributes:
        settings: pairs of mean depth asked for and weight of the ponder loss.
    """

    of: AViTRecipe
    settings: tuple[tuple[float, float], ...] = ((1.0, 5e-4), (2.0, 5e-4), (3.0, 5e-4), (4.0, 5e-4), (2.0, 5e-3))

    @property
    def stages(self) -> tuple[Stage, ...]:
        plain, control, halting = self.of.stages
        return plain, control, *(replace(halting, name=name) for name in self.by_name)

    @property
    def by_name(self) -> dict[str, AViTRecipe]:
        """What each halting stage minimises."""
        return {
            f"target {target:g}, ponder {weight:g}": replace(self.of, target=target, ponder_weight=weight)
            for target, weight in self.settings
        }

    def build(self) -> AViT:
        return self.of.build()

    def loss(self, model: nn.Module, stage: Stage, step: int) -> tuple[Tensor, Mapping[str, float]]:
        if stage.name in (PLAIN, CONTROL):
            return self.of.loss(model, stage, step)
        return self.by_name[stage.name].loss(model, replace(stage, name=HALTING), step)


@torch.no_grad()
def measure_sweep(sweep: AViTSweep, weights: Mapping[str, Mapping[str, Tensor]]) -> dict[str, float]:
    """Accuracy and share of the multiplications of every setting, on the test images."""
    images, labels = sweep.of.images.test_images(sweep.of.canvas), sweep.of.images.test_labels
    model = sweep.build()
    control = filled(model, weights[CONTROL])
    found = {"control.accuracy": accuracy(control(images, halts=False).logits, labels)}
    for name in sweep.by_name:
        filled(model, weights[name])
        trace = a_vit_target(model).trace(images)
        found[f"{name}.accuracy"] = accuracy(trace.more["logits"], labels)
        found[f"{name}.mac_ratio"] = float(trace.mac_ratio.mean())
    return found
