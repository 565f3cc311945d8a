"""Training a model of this room: a few stages, one after another, seeded and resumable.

A `Recipe` says what the stages are and what each minimises; randomness comes from the seed, the stage and the
number of the step alone, so that a run that is resumed ends where one that was never stopped does.
"""

import json
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from saekit.errors import DataError, FileError
from saekit.training.state_file import check_unfinished, optimizer_tensors, read_state, restore_optimizer, write_state
from saekit.training.stop import RunStopped, StopRequested, StopSignals

STATE_FILE = "adaptive_state.safetensors"
_GO_ON = "the same command with --resume goes on from there"
OnReport = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One part of a run, under AdamW with a linear warm-up and a cosine to nearly nothing.

    Attributes:
        start: the stage whose weights it begins with; None for those of the build.
        only: beginnings of the names of the weights that are trained; empty for all.
        prepare: what is done to the model, with those weights, before the first step; the same whenever it is done.
    """

    name: str
    steps: int
    learning_rate: float
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.99)
    clip: float = 1.0
    warmup: float = 0.05
    start: str | None = None
    only: tuple[str, ...] = ()
    prepare: Callable[[nn.Module], None] | None = None

    def lr_factor(self, step: int) -> float:
        """Share of the learning rate at this step."""
        rise = (step + 1) / max(1.0, self.warmup * self.steps)
        return min(rise, 0.01 + 0.99 * (0.5 + 0.5 * math.cos(math.pi * step / max(1, self.steps))))


@runtime_checkable
class Recipe(Protocol):
    """How one model is made. A frozen dataclass of plain numbers, so that a state file can say what it belongs to."""

    @property
    def stages(self) -> Sequence[Stage]: ...

    def build(self) -> nn.Module:
        """The model with seeded random weights."""
        ...

    def loss(self, model: nn.Module, stage: Stage, step: int) -> tuple[Tensor, Mapping[str, float]]:
        """What a step minimises, and what to report of it."""
        ...


def draw(seed: int, stage: Stage, step: int) -> torch.Generator:
    """Random numbers of one step."""
    name = zlib.crc32(stage.name.encode())
    return torch.Generator().manual_seed(((seed * 1_000_003 + name) * 1_000_003 + step) % 2**63)


def seeded(seed: int) -> torch.Generator:
    """Random numbers of one seed."""
    return torch.Generator().manual_seed(seed)


def train_stages(
    recipe: Recipe,
    out: Path,
    *,
    resume: bool = False,
    save_every: int = 200,
    on_report: OnReport = lambda report: None,
) -> dict[str, dict[str, Tensor]]:
    """The weights at the end of each stage.

    Args:
        out: folder for the state of an unfinished run; the caller removes the file when all is saved.
        resume: go on from that state.
        on_report: called after every step with stage, step, done (steps of all stages), loss and what the recipe adds.

    Raises:
        FileError: `resume` without a state, a state without `resume`, or a state of another recipe.
        DataError: a loss that is no longer finite.
        RunStopped: SIGTERM or Ctrl-C came, and the state is in `out`.
    """
    path = check_unfinished(out / STATE_FILE, resume=resume)
    model = recipe.build()
    run = _Run(recipe, model, path)
    if resume:
        run.restore()
    before, signals = 0, StopSignals()
    with signals:
        try:
            for stage in recipe.stages:
                if stage.name not in run.finished:
                    with signals.held_back():
                        steps = run.steps_of(stage)
                    for step in steps:
                        with signals.held_back():
                            report = run.step(stage, step)
                        on_report({"stage": stage.name, "step": step + 1, "done": before + step + 1, **report})
                        if (step + 1) % save_every == 0:
                            with signals.held_back():
                                run.save()
                    run.finish(stage)
                before += stage.steps
        except StopRequested as stop:
            with signals.held_back():
                run.save()
            raise RunStopped(stop.signal, f"stopped {run.reached}, saved in {path}; {_GO_ON}") from None
    return run.finished


class _Run:
    """Model, optimiser and the weights of the stages that are over."""

    def __init__(self, recipe: Recipe, model: nn.Module, path: Path):
        self.recipe, self.model, self.path = recipe, model, path
        self.built = _weights(model)
        self.finished: dict[str, dict[str, Tensor]] = {}
        self.resumed: tuple[str, int, dict[str, Tensor]] | None = None
        self.place: tuple[str, int] = recipe.stages[0].name, 0  # behind what has been trained
        self.optimizer: torch.optim.Optimizer

    def steps_of(self, stage: Stage) -> range:
        """The steps that are left of a stage, with model and optimiser set up for the first of them."""
        self.model.load_state_dict(self.built if stage.start is None else self.finished[stage.start])
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(not stage.only or name.startswith(stage.only))
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim >= 2], "weight_decay": stage.weight_decay},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=stage.learning_rate, betas=stage.betas)
        self.place = stage.name, 0
        if self.resumed is None or self.resumed[0] != stage.name:
            if stage.prepare is not None:
                stage.prepare(self.model)
            return range(stage.steps)
        _, step, tensors = self.resumed
        self.place = stage.name, step
        self.model.load_state_dict(_named(tensors, "model."))
        restore_optimizer(self.optimizer, "optimizer", tensors)
        return range(step, stage.steps)

    def step(self, stage: Stage, step: int) -> dict[str, Any]:
        loss, report = self.recipe.loss(self.model, stage, step)
        loss.backward()
        trained = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        nn.utils.clip_grad_norm_(trained, stage.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = stage.learning_rate * stage.lr_factor(step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        value = float(loss.detach())
        if not math.isfinite(value):
            raise DataError(
                f"the loss is {value} at step {step + 1} of {stage.name}; lower the learning rate "
                f"(it is {stage.learning_rate:.2g})"
            )
        self.place = stage.name, step + 1
        return {"loss": value, **report}

    @property
    def reached(self) -> str:
        """How far it is, for people."""
        stage, step = self.place
        return f"after step {step:,} of the stage {stage}"

    def finish(self, stage: Stage) -> None:
        self.finished[stage.name] = _weights(self.model)

    def save(self) -> None:
        stage, step = self.place
        tensors = {f"model.{name}": tensor for name, tensor in _weights(self.model).items()}
        tensors |= optimizer_tensors(self.optimizer, "optimizer")
        for done, weights in self.finished.items():
            tensors |= {f"finished.{done}.{name}": tensor for name, tensor in weights.items()}
        facts = {"recipe": _facts(self.recipe), "stage": stage, "step": str(step)}
        write_state(self.path, tensors, facts | {"finished": json.dumps(list(self.finished))})

    def restore(self) -> None:
        try:
            tensors, facts = read_state(self.path)
            if facts["recipe"] != _facts(self.recipe):
                raise FileError(
                    f"{self.path} belongs to a run with other settings ({facts['recipe']}); resume with the same "
                    "ones, or choose another folder"
                )
            self.finished = {name: _named(tensors, f"finished.{name}.") for name in json.loads(facts["finished"])}
            self.resumed = facts["stage"], int(facts["step"]), tensors
        except (SafetensorError, KeyError, ValueError) as error:
            raise FileError(f"{self.path} is damaged ({error}); delete it and start anew") from error


def _facts(recipe: Recipe) -> str:
    return json.dumps({"recipe": type(recipe).__name__, **asdict(recipe)}, sort_keys=True)  # pyright: ignore[reportArgumentType]


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def _named(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
