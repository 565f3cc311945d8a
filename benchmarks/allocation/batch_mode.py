"""Why Feature Choice reconstructs worse on a batch of held-out tokens than under its thresholds.

    python -m benchmarks.allocation.batch_mode [--datasets stories260K pystd] [--seeds 0 1 2] [--out batch_mode.md]

Trains Feature Choice as the study does, half a minute to two minutes for each seed and rule, and lets it choose among
the same tokens in several ways: in batches that are rows of text in their order, as the study measures; in batches
drawn from all rows, as training sees them; among all at once. The same on text that it was trained on tells what is due
to the order, to the size of a batch, and to held-out text itself, which asks for other features than the budgets
provide for.
"""

import argparse
import sys
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from benchmarks.allocation import measure, side_study
from benchmarks.allocation.datasets import open_dataset
from benchmarks.allocation.runs import Run
from benchmarks.allocation.side_study import Columns
from benchmarks.allocation.tables import beside_each_other
from saekit.losses import fvu
from saekit.sae import SAE

OTHER_ORDER = 99
RULES = ("feature_uniform+aux_zipf", "feature_zipf+aux_zipf")


def measured(options: argparse.Namespace) -> Columns:
    return {
        f"{name}, {rule}": [numbers_of(name, rule, seed, options) for seed in options.seeds]
        for name in options.datasets
        for rule in RULES
    }


def numbers_of(name: str, rule: str, seed: int, options: argparse.Namespace) -> dict[str, float]:
    """One trained SAE, and its FVU by where the tokens of a batch come from."""
    dataset = open_dataset(name, shared=options.shared)
    run = Run(dataset=name, rule=rule, expansion=16, k=options.k, seed=seed, tokens=options.tokens)
    config = measure.config_of(run, dataset)
    single, batch_rule = measure.train_one(config, dataset.source)
    together = single.with_rule(batch_rule)
    read = measure.TokenFacts.read(dataset, config.batch_tokens * config.shared_over)
    rows = [batch.vectors for batch in read.batches[: len(dataset.rows) // read.batch_rows]]
    held_out = torch.cat(rows)
    drawn = held_out[torch.randperm(len(held_out), generator=torch.Generator().manual_seed(seed))].tensor_split(
        len(rows)
    )
    # another order than that of training: its tokens, not its batches
    stream = dataset.source.stream(len(held_out) // len(rows), seed=OTHER_ORDER)
    trained_on = [next(stream)[config.site].vectors for _ in rows]
    return {
        "held-out text, thresholds": fvu_of(single, rows),
        "... batches of rows in their order": fvu_of(together, rows),
        "... batches drawn from all rows": fvu_of(together, drawn),
        "... all tokens as one batch": fvu_of(together, [held_out]),
        "training text, thresholds": fvu_of(single, trained_on),
        "... batches drawn from it": fvu_of(together, trained_on),
        "... all of these as one batch": fvu_of(together, [torch.cat(trained_on)]),
    }


@torch.no_grad()
def fvu_of(sae: SAE, batches: Sequence[Float[Tensor, "_ d_model"]]) -> float:
    """Of all tokens together; the rule sees one batch at a time."""
    return float(fvu(torch.cat(list(batches)), torch.cat([sae(batch) for batch in batches])))


def page(columns: Columns, options: argparse.Namespace) -> str:
    """All numbers as one Markdown table, a column per data set and rule."""
    how = (
        f"Written by `{side_study.command('batch_mode', options)}`: FVU at 16x, k = {options.k}, {options.tokens:,} "
        f"training tokens; up to 160 held-out rows of 256 tokens, and as many tokens of the training text; seeds "
        f"{', '.join(map(str, options.seeds))}."
    )
    title = "# Feature Choice on batches of text and on batches of tokens"
    return "\n".join([title, "", how, "", *beside_each_other(columns, 4)]) + "\n"


if __name__ == "__main__":
    sys.exit(side_study.run(__doc__, "batch_mode.md", measured, page))
