"""Training with a bar beside it, and how fast it was."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from .output import Progress

if TYPE_CHECKING:
    from saekit.sae import SAE
    from saekit.training.config import TrainConfig
    from saekit.training.loop import OnStep
    from saekit.training.step import Report

Trained = TypeVar("Trained")


def train_with_progress(
    configs: Sequence["TrainConfig"], *arguments: Any, **options: Any
) -> tuple[list["SAE"], dict[str, Any]]:
    """The SAEs of `saekit.training.loop.train`, and what `speed_line` says of it."""
    from saekit.training.loop import train

    return with_progress(configs[0], lambda on_step: train(configs, *arguments, on_step=on_step, **options))


def with_progress(first: "TrainConfig", trained: "Callable[[OnStep], Trained]") -> tuple["Trained", dict[str, Any]]:
    """What a training gives, which is told whom to call after every step, and what `speed_line` says of it."""
    from saekit.activations.clock import seconds_by_stage

    steps, began = [0], time.perf_counter()
    label, total = "training", first.steps * first.batch_tokens
    with Progress(label, total, unit="tok") as progress, seconds_by_stage() as seconds:

        def on_step(step: int, reports: Sequence["Report"]) -> None:
            steps[0] += 1
            progress.to(step * first.batch_tokens, f"fvu {float(reports[0].fvu):.3f}" if step % 10 == 0 else "")

        out = trained(on_step)
    took = time.perf_counter() - began
    return out, {
        "training_tokens_per_s": round(steps[0] * first.batch_tokens / took),
        "training_seconds": {stage: round(each, 1) for stage, each in seconds.items()},
    }


def speed_line(facts: Mapping[str, Any]) -> str:
    """How fast training was, and what its time went into, the most first."""
    seconds = facts["training_seconds"]
    stages = sorted(seconds, key=seconds.__getitem__, reverse=True)
    shares = ", ".join(f"{stage} {seconds[stage]:.1f} s" for stage in stages)
    return f"  trained on {facts['training_tokens_per_s']:,} tokens/s: {shares}"
