"""AdaTape: which entries of the bank are read, and what that has to do with the class; learnt banks above all."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from saekit.adaptive.adatape import AdaTape
from saekit.adaptive.deciding import adatape_target
from saekit.adaptive.questions.adatape_reading import TAPE, Reading, mean_of, permuted, train_sae
from saekit.adaptive.telling import FEWEST_ACTIVE, mutual_information, probe, purity
from saekit.adaptive.trace import DecisionTrace


def bank_use(
    model: AdaTape,
    inputs: tuple[Tensor, Tensor],
    labels: tuple[Int[Tensor, " n"], Int[Tensor, " m"]],
    *,
    tokens: int = 200_000,
    seed: int = 0,
) -> dict[str, float]:
    """Which entries are read, and what that has to do with the class; of any AdaTape, on its inputs and their classes.

    An entry of an input-driven bank is a place in the input. Only where the bank is learnt is an entry the same for
    all inputs, and only then are dead rows, rows that go together, classes and rows' features asked about.

    Args:
        inputs, labels: a half to learn from, and one to measure on.
    """
    traces = [adatape_target(model).trace(half) for half in inputs]
    n_entries = model.seen.n_entries if model.learnt_bank is None else model.config.entries
    reads = [_reads(trace, n_entries) for trace in traces]
    is_read, generator = reads[1] > 0, torch.Generator().manual_seed(seed)
    found = {
        "entries_ever_read": float(is_read.any(0).float().mean()),
        "entries_of_an_input": float(is_read.float().mean()),
        "reads_of_entries_read_before": 1 - float(is_read.sum() / reads[1].sum()),
        "label_from_reads": mean_of([mutual_information(row, labels[1]) for row in reads[1].T]),
        "label_from_reads_floor": mean_of(
            [mutual_information(row, permuted(labels[1], generator)) for row in reads[1].T]
        ),
        "label_from_length": mutual_information(traces[1].depth[:, 0], labels[1]),
        "same_entries_as_usual": _usual(traces[0], traces[1]),
    }
    if model.learnt_bank is None:
        return found
    found |= {"dead_rows": float((~is_read.any(0)).float().mean())} | _together(is_read, generator)
    found |= _classes(reads, labels, generator)
    return found | _rows_of_features(model, inputs, traces, tokens=tokens, seed=seed)


def order_of(reading: Reading, *, seed: int) -> dict[str, float]:
    """Information that the step at which an entry is first read has about the entry's symbol, and where it stands."""
    entries = reading.trace.more["entries"]
    steps = torch.full_like(reading.inputs, entries.shape[1], dtype=torch.int64)
    for step in reversed(range(entries.shape[1])):
        read = entries[:, step][reading.live[:, step]]
        rows = reading.live[:, step].nonzero().expand(read.shape)
        steps[rows, read] = step
    generator = torch.Generator().manual_seed(seed)
    places = torch.arange(steps.shape[1]).expand(steps.shape)
    found: dict[str, float] = {}
    for name, values in (("symbol", reading.inputs.long()), ("place", places)):
        found[f"{name}_from_step"] = mutual_information(values.flatten(), steps.flatten())
        shuffled = permuted(steps.flatten(), generator)
        found[f"{name}_from_step_floor"] = mutual_information(values.flatten(), shuffled)
    return found


def _reads(trace: DecisionTrace, n_entries: int) -> Int[Tensor, "n entries"]:
    """How often each entry was read before the tape ended."""
    entries = trace.more["entries"]
    counted = trace.live.expand(entries.shape).long()
    return torch.zeros(len(trace), n_entries, dtype=torch.int64).scatter_add(1, entries.flatten(1), counted.flatten(1))


def _usual(train: DecisionTrace, test: DecisionTrace) -> float:
    """Of all reads of K entries, how many are those that are most common at their step."""
    same = torch.zeros(test.live.shape[:2], dtype=torch.bool)
    for step in range(same.shape[1]):
        some = train.more["entries"][train.live[:, step, 0], step].sort(1).values
        if len(some):
            kinds, counts = some.unique(dim=0, return_counts=True)
            same[:, step] = (test.more["entries"][:, step].sort(1).values == kinds[counts.argmax()]).all(1)
    return float(same[test.live[..., 0]].float().mean())


def _together(is_read: Bool[Tensor, "n rows"], generator: torch.Generator) -> dict[str, float]:
    """Size of the correlation of two rows' being read, beside that of rows permuted among inputs."""

    def size(read: Tensor) -> float:
        varies = read[:, (read.sum(0) >= FEWEST_ACTIVE) & ((~read).sum(0) >= FEWEST_ACTIVE)].float()
        if varies.shape[1] < 2:
            return 0.0
        off = torch.corrcoef(varies.T).abs()
        return float((off.sum() - len(off)) / (len(off) * (len(off) - 1)))

    apart = torch.stack([permuted(row.long(), generator) for row in is_read.T], 1).bool()
    return {"rows_together": size(is_read), "rows_together_floor": size(apart)}


def _classes(
    reads: Sequence[Int[Tensor, "n rows"]], labels: Sequence[Tensor], generator: torch.Generator
) -> dict[str, float]:
    """How often a linear probe names the class from which rows were read; and if it learns from permuted classes."""
    halves = [half.float() for half in reads]
    accuracies = []
    for taught in (labels[0], permuted(labels[0], generator)):
        named = taught.unique()[probe(halves[0], taught, halves[1]).argmax(1)]
        accuracies.append(float((named == labels[1]).float().mean()))
    most = labels[0].mode().values
    return {
        "class_from_rows": accuracies[0],
        "class_from_rows_floor": accuracies[1],
        "class_most_common": float((labels[1] == most).float().mean()),
    }


def _rows_of_features(
    model: AdaTape, inputs: Sequence[Tensor], traces: Sequence[DecisionTrace], *, tokens: int, seed: int
) -> dict[str, float]:
    """Whether features of tape tokens have a row each: of a feature's tokens, how many share their heaviest row."""
    target = adatape_target(model).target
    vectors, rows = [], []
    for half, trace in zip(inputs, traces, strict=True):
        live, entries, weights = trace.live[..., 0], trace.more["entries"], trace.more["weights"]
        vectors.append(target.read(half, [TAPE])[TAPE][live])
        rows.append(entries.gather(2, weights.argmax(2, keepdim=True))[..., 0][live])
    codes = train_sae(TAPE, vectors[0], tokens=tokens, seed=seed).encode(vectors[1])
    purities = purity(codes, rows[1], fewest=FEWEST_ACTIVE)
    usual = float((rows[1] == rows[1].mode().values).float().mean())
    return {"one_row_per_feature": mean_of(purities[~purities.isnan()].tolist()), "one_row_per_feature_floor": usual}
