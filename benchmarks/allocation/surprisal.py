"""Why L0 falls with surprisal on one model and rises on another: the same correlation within kinds of token.

    python -m benchmarks.allocation.surprisal [--datasets stories260K pystd] [--seeds 0 1 2] [--out surprisal.md]

Trains Mutual Choice with aux_zipf as the study does, a minute or four a seed, and asks of each held-out token how
many features it got, how surprising it was, and what kind of token it is. A correlation over all tokens mixes two
things: which kinds of token get many features, and whether a token gets more where it is more surprising than
others of its kind.
"""

import argparse
import math
import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.allocation import measure, side_study
from benchmarks.allocation.datasets import Dataset, open_dataset
from benchmarks.allocation.runs import Run
from benchmarks.allocation.side_study import Columns
from benchmarks.allocation.tables import beside_each_other
from saekit.sae import SAE

RULE = "mutual+aux_zipf"
FEWEST = 50  # tokens of a kind, for a correlation within it to count
NORM_BINS = 20
BEGINS_WORD = ("▁", "Ġ")  # how SentencePiece and byte-level BPE mark it


@dataclass(frozen=True, slots=True)
class Read:
    """Held-out tokens that have a surprisal, `(n,)` each."""

    l0: Tensor
    surprisal: Tensor
    norm: Tensor
    token: Tensor
    begins_word: Tensor


def measured(options: argparse.Namespace) -> Columns:
    return {name: [numbers_of(name, seed, options) for seed in options.seeds] for name in options.datasets}


def numbers_of(name: str, seed: int, options: argparse.Namespace) -> dict[str, float]:
    """One trained SAE, and what its allocation goes with."""
    dataset = open_dataset(name, shared=options.shared)
    run = Run(dataset=name, rule=RULE, expansion=16, k=options.k, seed=seed, tokens=options.tokens)
    sae, _ = measure.train_one(measure.config_of(run, dataset), dataset.source)
    return describe(read(sae, dataset))


@torch.no_grad()
def read(sae: SAE, dataset: Dataset) -> Read:
    """What `sae`, calibrated, spends on every held-out token."""
    facts = measure.TokenFacts.read(dataset, batch_tokens=2048)
    parts = []
    for batch in facts.batches:
        at = batch.document * dataset.rows.context + batch.position
        parts.append((sae.encode(batch.vectors).l0().double(), at, (batch.vectors - sae.b_dec).norm(dim=1).double()))
    l0, at, norm = (torch.cat(column) for column in zip(*parts, strict=True))
    surprisal, token = facts.surprisal.flatten()[at].double(), dataset.rows.ids.flatten()[at]
    known = ~surprisal.isnan()
    return Read(l0[known], surprisal[known], norm[known], token[known], begins_word(dataset)[token[known]])


def begins_word(dataset: Dataset) -> Tensor:
    """`(vocabulary,)`: whether a piece begins a word (or a run of spaces)."""
    tokenizer = dataset.target.tokenizer
    pieces = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    return torch.tensor([piece.startswith(BEGINS_WORD) for piece in pieces])


def describe(tokens: Read) -> dict[str, float]:
    edges = tokens.norm.quantile(torch.linspace(0, 1, NORM_BINS + 1, dtype=torch.float64)[1:-1])
    kinds = {
        "pieces that begin a word, and pieces inside one": tokens.begins_word.long(),
        "one entry of the vocabulary": tokens.token,
        "one twentieth of the norms": torch.bucketize(tokens.norm, edges),
    }
    numbers = {"L0 ~ surprisal, over all tokens": within(torch.zeros_like(tokens.token), tokens)}
    numbers |= {f"... within {name}": within(kind, tokens) for name, kind in kinds.items()}
    for name, chosen in (("pieces that begin a word", tokens.begins_word), ("pieces inside", ~tokens.begins_word)):
        numbers[f"{name}: share of tokens"] = float(chosen.double().mean())
        numbers[f"{name}: mean L0"] = float(tokens.l0[chosen].mean())
        numbers[f"{name}: mean surprisal, nats"] = float(tokens.surprisal[chosen].mean())
    return numbers


def within(kind: Tensor, tokens: Read) -> float:
    """Spearman's correlation of L0 with surprisal inside each kind, averaged by the tokens that it holds."""
    total = weight = 0.0
    for one in kind.unique():
        chosen = kind == one
        found = None
        if int(chosen.sum()) >= FEWEST:
            found = measure.rank_correlation(tokens.l0[chosen], tokens.surprisal[chosen])
        if found is not None:
            total, weight = total + found * int(chosen.sum()), weight + int(chosen.sum())
    return total / weight if weight else math.nan


def page(columns: Columns, options: argparse.Namespace) -> str:
    """All numbers as one Markdown table, a column per data set."""
    how = (
        f"Written by `{side_study.command('surprisal', options)}`: {RULE}, 16x, k = {options.k}, {options.tokens:,} "
        f"training tokens, calibrated; 160 held-out rows of 256 tokens; seeds {', '.join(map(str, options.seeds))}. "
        f"Kinds with fewer than {FEWEST} tokens are left out of the averages."
    )
    lines = ["# Does a surprising token get more features?", "", how, "", *beside_each_other(columns, 2)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(side_study.run(__doc__, "surprisal.md", measured, page))
