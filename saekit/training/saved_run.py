"""Saving a run of training whole, and going on with it to the bit.

A saved run is one safetensors file: for the n-th SAE its weights and those of its objective, Adam's moments
and step counts, running densities, ranks and cuts, as tensors named `n....`; and as JSON in the metadata the
step, the rules, what scales and fills the tensors, the place in the stream of activations, and the settings
of the run. The place is numbers: what the shuffle buffer held is read from the model again, at most one buffer.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from saekit.activations.stream import Place
from saekit.errors import FileError
from saekit.sae_config import SAEConfig, describe_rule, read_rule, rule_tensors
from saekit.selection import SelectionRule
from saekit.training.config import TrainConfig, recipe
from saekit.training.state_file import (
    check_unfinished,
    optimizer_tensors,
    read_state,
    restore_optimizer,
    write_state,
)
from saekit.training.step import TrainState

FORMAT_VERSION = 1
SAVE_EVERY_S = 300.0


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFile:
    """Where an unfinished run is kept, and how often it is saved.

    It is saved now and then, after the last step and when SIGTERM or Ctrl-C stops it. How often has no
    influence on the weights. Whoever has the finished SAEs in a safe place deletes the file.

    Attributes:
        path: of the file.
        resume: go on with the run that the file holds.
        every: steps between saves; None saves about every five minutes.
    """

    path: Path
    resume: bool = False
    every: int | None = None

    def is_due(self, step: int, saved_at: float) -> bool:
        """Whether to save after this step, given when the run was last saved (`time.monotonic`)."""
        if self.every is not None:
            return step % self.every == 0
        return time.monotonic() - saved_at > SAVE_EVERY_S


def save_run(path: Path, states: Sequence[TrainState], place: Place, source: Mapping[str, Any]) -> None:
    """Write everything that going on needs.

    Args:
        place: in the stream, behind the last batch that the states have learnt from.
        source: the facts of the source.
    """
    tensors = {f"{n}.{name}": tensor for n, state in enumerate(states) for name, tensor in _tensors(state).items()}
    run = {
        "format_version": FORMAT_VERSION,
        "step": states[0].step,
        "place": asdict(place),
        "source": dict(source),
        "saes": [
            {
                "config": recipe(state.config),
                "input_scale": state.input_scale,
                "output_scale": state.output_scale,
                "density_weight": state.density.weight,
                "demand_weight": state.demand.weight,
                "pooled": state.pooled,
                "rules": {name: describe_rule(rule) for name, rule in _rules(state).items()},
            }
            for state in states
        ],
    }
    write_state(path, tensors, {"run": json.dumps(run)})


def run_bytes(states: Sequence[TrainState]) -> int:
    """How large the tensors of a saved run are."""
    return sum(tensor.nbytes for state in states for tensor in _tensors(state).values())


def load_run(
    path: Path,
    configs: Sequence[TrainConfig],
    cfgs: Sequence[SAEConfig],
    source: Mapping[str, Any],
    *,
    device: torch.device | str = "cpu",
) -> tuple[list[TrainState], Place]:
    """The states of a saved run, and the place where its stream goes on.

    Args:
        source: the facts of the source that the run is to go on with.
        device: where to go on, wherever the run was before.

    Raises:
        FileError: if the file is damaged or newer, or was saved by a run of other settings; the message names
            the first that differs.
    """
    tensors, run = _read(path)
    _check_same(path, run, configs, source)
    states = []
    for n, (config, cfg, saved) in enumerate(zip(configs, cfgs, run["saes"], strict=True)):
        states.append(_restored(config, cfg, _under(str(n), tensors), saved, run["step"], device))
    return states, Place(**run["place"])


def saved_source(path: Path) -> Mapping[str, Any]:
    """What the source of a saved run said of itself.

    Raises:
        FileError: if there is no run, or the file is damaged or newer.
    """
    return _read(path, contents=False)[1]["source"]


def _read(path: Path, *, contents: bool = True) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors of a saved run, none without `contents`, and what its metadata says."""
    check_unfinished(path, resume=True)
    try:
        tensors, metadata = read_state(path, contents=contents)
        run = json.loads(metadata["run"])
        version = run["format_version"]
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise FileError(f"{path} is not a saved run, or is damaged ({error}); start anew") from error
    if version > FORMAT_VERSION:
        raise FileError(
            f"{path} has format version {version}, this saekit reads up to {FORMAT_VERSION}; "
            "upgrade with `pip install -U saekit`"
        )
    return tensors, run


def _rules(state: TrainState) -> dict[str, SelectionRule]:
    """What this phase of the run, this step, and the cuts of the last pool have made of the config's rule."""
    return {"phase": state.rule, "step": state.in_force, "sae": state.sae.rule}


def _tensors(state: TrainState) -> dict[str, Tensor]:
    found = {f"weights.{name}": parameter.detach() for name, parameter in state.sae.named_parameters()}
    found |= {f"extra.{name}": parameter.detach() for name, parameter in state.extra.items()}
    found |= optimizer_tensors(state.optimizer, "optimizer")
    for name, density in (("density", state.density), ("demand", state.demand)):
        found |= {f"{name}.average": density.average, f"{name}.tokens_since_fired": density.tokens_since_fired}
    for name, rule in _rules(state).items():
        found |= {f"{name}.{part}": tensor for part, tensor in rule_tensors(rule, state.sae.n_features).items()}
    found["input_centre"] = state.input_centre
    if state.ranks is not None:
        found["ranks"] = state.ranks
    return {name: tensor.clone() for name, tensor in found.items()}  # a file holds no tensor twice


@torch.no_grad()
def _restored(
    config: TrainConfig,
    cfg: SAEConfig,
    tensors: Mapping[str, Tensor],
    saved: Mapping[str, Any],
    step: int,
    device: torch.device | str,
) -> TrainState:
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    scales = {name: saved[name] for name in ("input_scale", "output_scale")}
    state = TrainState.blank(config, cfg, **scales, device=device)
    state.set_extra(_under("extra", tensors))
    for name, parameter in state.sae.named_parameters():
        parameter.copy_(tensors[f"weights.{name}"])
    restore_optimizer(state.optimizer, "optimizer", tensors)
    for name, density in (("density", state.density), ("demand", state.demand)):
        density.average.copy_(tensors[f"{name}.average"])
        density.tokens_since_fired.copy_(tensors[f"{name}.tokens_since_fired"])
        density.weight = saved[f"{name}_weight"]
    rules = {name: read_rule(rule, _under(name, tensors)) for name, rule in saved["rules"].items()}
    state.rule, state.in_force, state.sae.rule = rules["phase"], rules["step"], rules["sae"]
    state.input_centre, state.ranks = tensors["input_centre"], tensors.get("ranks")
    state.pooled, state.step = saved["pooled"], step
    return state


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(f"{prefix}."): t for name, t in tensors.items() if name.startswith(f"{prefix}.")}


def _check_same(path: Path, run: Mapping[str, Any], configs: Sequence[TrainConfig], source: Mapping[str, Any]) -> None:
    saved: dict[str, Any] = {"number of SAEs": len(run["saes"]), **run["source"]}
    now: dict[str, Any] = {"number of SAEs": len(configs), **source}
    for n, (before, config) in enumerate(zip(run["saes"], configs, strict=False)):
        which = f" at {config.site}" + (f" (SAE {n + 1})" if n else "")  # several may be at one Site
        saved |= {name + which: value for name, value in before["config"].items()}
        now |= {name + which: value for name, value in recipe(config).items()}
    for name in saved | now:
        if name not in saved or name not in now or saved[name] != now[name]:
            raise FileError(
                f"{path} was saved by a run with {name} = {saved.get(name)}, and this one has {now.get(name)}; "
                "resume with the settings it was started with, or choose another folder"
            )
