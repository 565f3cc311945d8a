"""What a trained AdaTape does on parity: accuracy, how long its tapes are, and what becomes of it without them."""

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from saekit.adaptive.adatape import AdaTape
from saekit.adaptive.adatape_recipe import parity, sequences
from saekit.adaptive.deciding import DecidingTarget, adatape_target
from saekit.adaptive.interventions import Force, Where, trace_with
from saekit.adaptive.trace import DecisionTrace
from saekit.patching.statistics import rank_correlation
from saekit.targets import Site

N_TEST, TEST_SEED = 2048, 10_000


def measure_adatape(model: AdaTape) -> dict[str, Any]:
    """Facts on sequences from another seed than any training has.

    forced_length_accuracy reads tapes of one common length; frozen_query_accuracy reads with the first query
    throughout, in the model as it was trained; swapped_tape_accuracy gives each sequence the tape of another, and
    follows_the_donor says how often the answer is then that other's parity.
    """
    symbols = sequences(N_TEST, model.config.length, torch.Generator().manual_seed(TEST_SEED))
    labels = parity(symbols)
    target = adatape_target(model)
    clean = target.trace(symbols)
    length = clean.depth[:, 0]
    forced = [
        _accuracy(trace_with(target, symbols, _ending(n, clean)), labels) for n in range(1, clean.live.shape[1] + 1)
    ]
    swapped, donors = _swapped(target, symbols)
    return {
        "test_sequences": N_TEST,
        "accuracy": _accuracy(clean, labels),
        "mean_tape": float(length.float().mean()),
        "tape_lengths": torch.bincount(length, minlength=clean.live.shape[1] + 1).tolist(),
        "mac_ratio": float(clean.mac_ratio.mean()),
        "accuracy_by_tape": _accuracy_by(clean, labels, length),
        "rank_correlation_of_tape_with_ones": rank_correlation(length, (symbols == 1).sum(1)),
        "forced_length_accuracy": forced,
        "frozen_query_accuracy": _frozen(model, symbols, labels),
        "swapped_tape_accuracy": _accuracy(swapped, labels),
        "follows_the_donor": _accuracy(swapped, labels[donors]),
    }


def _accuracy(trace: DecisionTrace, labels: Int[Tensor, " n"]) -> float:
    return float((trace.more["logits"].argmax(1) == labels).float().mean())


def _accuracy_by(trace: DecisionTrace, labels: Tensor, length: Tensor) -> list[float | None]:
    right = (trace.more["logits"].argmax(1) == labels).float()
    groups = [right[length == n] for n in range(trace.live.shape[1] + 1)]
    return [float(group.mean()) if len(group) else None for group in groups]


def _ending(length: int, trace: DecisionTrace) -> list[Force]:
    is_free = length < trace.live.shape[1]
    return [Force("go on"), *([Force("halt", Where(steps=(length - 1,)))] if is_free else [])]


def _frozen(model: AdaTape, symbols: Tensor, labels: Tensor) -> float:
    twin = AdaTape(replace(model.config, moves_query=False))
    twin.load_state_dict(model.state_dict())
    return _accuracy(adatape_target(twin).trace(symbols), labels)


def _swapped(target: DecidingTarget, symbols: Tensor) -> tuple[DecisionTrace, Int[Tensor, " n"]]:
    """Every sequence with the tape of the next one, content and length."""
    donors = torch.arange(len(symbols)).roll(1)

    def swap(x: Tensor) -> Tensor:
        return x[donors]

    with target.target.editing({Site.parse("tape_map:out"): swap, Site.parse("valid:out"): swap}):
        return target.trace(symbols), donors
