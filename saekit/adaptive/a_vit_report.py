"""What a trained A-ViT does on digits it has not seen: accuracy, depth, cost, and whether depth follows the picture."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saekit.adaptive.a_vit import AViT
from saekit.adaptive.a_vit_gathered import run_packed, run_padded
from saekit.adaptive.deciding import DecidingTarget, a_vit_target
from saekit.adaptive.digits import LabelledImages, foreground
from saekit.adaptive.interventions import Force, Replay, shuffled, trace_with
from saekit.adaptive.telling import auc
from saekit.adaptive.trace import DecisionTrace

SHUFFLES = 5


def measure_a_vit(model: AViT, control: AViT | None, data: LabelledImages) -> dict[str, Any]:
    """Facts on the test images of what the model was trained with.

    depth_auc is how well depth tells patches with ink from those without. shuffled_accuracy gives each image the
    depth map of another (mean of several shuffles): the same compute elsewhere. early_exit_accuracy and
    early_exit_mac_ratio are of the same model without any choice: all tokens go on until the first layer by which at
    least as much has been multiplied, and its class token is classified. unanswered_by_layer is the share of class
    tokens that enter each layer.
    """
    images, labels = data.test_images(model.config.image), data.test_labels
    target = a_vit_target(model)
    trace = target.trace(images)
    unhalted = trace_with(target, images, [Force("go on")])
    inked = foreground(images, model.config.patch)
    depth = trace.depth[:, trace.extra :].float()
    facts: dict[str, Any] = {
        "test_images": len(images),
        "accuracy": accuracy(trace.more["logits"], labels),
        "control_accuracy": None if control is None else _plain_accuracy(control, images, labels),
        "mean_depth": float(trace.depth.float().mean()),
        "layers": model.config.layers,
        "mac_ratio": float(trace.mac_ratio.mean()),
        "useful_mac_ratio": float((trace.more["useful_macs"] / trace.full_macs).mean()),
        "depth_foreground": float(depth[inked].mean()),
        "depth_background": float(depth[~inked].mean()),
        "depth_auc": auc(depth.flatten(), inked.flatten()),
        "full_depth_accuracy": accuracy(unhalted.more["logits"], labels),
        "shuffled_accuracy": _shuffled_accuracy(target, trace, images, labels),
        **early_exit(model, unhalted.more["class_logits"], labels, mac_ratio=float(trace.mac_ratio.mean())),
        "live_per_block": trace.live.sum(2).float().mean(0).tolist(),
        "unanswered_by_layer": trace.live[:, :, 0].float().mean(0).tolist(),
    }
    return facts | _by_class(trace, labels)


def early_exit(
    model: AViT,
    class_logits: Float[Tensor, "n layers classes"],
    labels: Int[Tensor, " n"],
    *,
    mac_ratio: float,
) -> dict[str, float]:
    """All tokens as far as the first layer that costs at least `mac_ratio`, and the class token as it is there.

    Args:
        class_logits: what each layer's class token says where no token halts.
    """
    tokens, layers = model.config.tokens, model.config.layers
    entered = torch.ones(layers, layers).tril() * tokens  # (leaves behind layer, layer)
    ratios = model.macs(entered) / model.macs(entered[-1:])
    layer = int((ratios >= mac_ratio).nonzero()[0])
    return {
        "early_exit_accuracy": accuracy(class_logits[:, layer], labels),
        "early_exit_mac_ratio": float(ratios[layer]),
    }


def accuracy(logits: Float[Tensor, "n classes"], labels: Int[Tensor, " n"]) -> float:
    return float((logits.argmax(1) == labels).float().mean())


@torch.no_grad()
def measure_speed(model: AViT, images: Tensor, *, widths: Sequence[int] = (192,), repeats: int = 5) -> dict[str, float]:
    """How many times as many images a second with halted tokens removed; medians of interleaved runs on this machine.

    Small models spend their time elsewhere than in what is saved, so that untrained ones of other widths are
    timed too, with the depths that the trained one gave these images.
    """
    depths = model(images).depth.long()
    found: dict[str, float] = {}
    for width in (model.config.width, *widths):
        timed = model if width == model.config.width else AViT(replace(model.config, width=width)).eval()
        ways: Mapping[str, Callable[[], object]] = {
            "plain": partial(timed, images, halts=False),
            "padded": partial(run_padded, timed, images, depths),
            "packed": partial(run_packed, timed, images, depths),
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(repeats):
            for name, run in ways.items():
                began = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - began)
        plain = statistics.median(seconds["plain"])
        found[f"plain_images_per_second_width_{width}"] = len(images) / plain
        for name in ("padded", "packed"):
            found[f"{name}_speed_up_width_{width}"] = plain / statistics.median(seconds[name])
    return found


@torch.no_grad()
def _plain_accuracy(control: AViT, images: Tensor, labels: Tensor) -> float:
    return accuracy(control(images, halts=False).logits, labels)


def _shuffled_accuracy(target: DecidingTarget, trace: DecisionTrace, images: Tensor, labels: Tensor) -> float:
    runs = [trace_with(target, images, [Replay(shuffled(trace, seed=seed))]) for seed in range(SHUFFLES)]
    return sum(accuracy(run.more["logits"], labels) for run in runs) / SHUFFLES


def _by_class(trace: DecisionTrace, labels: Tensor) -> dict[str, Any]:
    depth = trace.depth.float().mean(1)
    right = trace.more["logits"].argmax(1) == labels
    wrong = float(depth[~right].mean()) if bool((~right).any()) else None
    return {
        "depth_by_class": [float(depth[labels == digit].mean()) for digit in range(10)],
        "depth_right": float(depth[right].mean()),
        "depth_wrong": wrong,
    }
