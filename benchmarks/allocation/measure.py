"""One run, from nothing to a row of results: train, evaluate in both modes, score, and say what it took."""

import math
import platform
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import reduce
from importlib.metadata import version
from operator import add
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.allocation.by_peer import train_by_peer
from benchmarks.allocation.datasets import HELD_OUT_SEED, Dataset, open_dataset
from benchmarks.allocation.process_memory import forget_peak, memory_mb
from benchmarks.allocation.recorded import Recording
from benchmarks.allocation.runs import BY_PEER, RULES, Run, Setting
from saekit.activations.batch import ActivationBatch, ActivationSource
from saekit.activations.harvest import Harvest
from saekit.analysis.concept_scores import count_concepts
from saekit.analysis.concepts import ConceptLabels, label_tokens
from saekit.analysis.evaluate import evaluate
from saekit.analysis.recovery import measure_recovery
from saekit.errors import SaekitError
from saekit.patching import statistics
from saekit.sae import SAE
from saekit.selection import SelectionRule
from saekit.targets import Site
from saekit.training.config import TrainConfig
from saekit.training.loop import CALIBRATION_TOKENS, train
from saekit.training.step import Report

Numbers = dict[str, float | int | None]
# held-out rows whose next tokens are predicted, by the model as it is and by what the SAE makes of it, in every mode;
# more where one batch takes more
LOSS_ROWS = 64


def config_of(run: Run, dataset: Dataset) -> TrainConfig:
    """The recipe of a run.

    Raises:
        SaekitError: if rule, width and batch do not go together, or budgets are shared over more tokens than there
            are to evaluate on.
    """
    setting = Setting(run=run, site=dataset.train_site, d_model=dataset.d_model, pre_bias=dataset.pre_bias)
    config = RULES[run.rule](setting)
    shared_over, held_out = config.batch_tokens * config.shared_over, len(dataset.rows) * dataset.rows.context
    if shared_over > held_out:
        raise SaekitError(f"budgets are shared over {shared_over:,} tokens, and {held_out:,} are held out")
    return config


def measure(run: Run, *, shared: Path, peer_python: Path, recordings: Path) -> dict[str, object]:
    """A whole row; nothing but the run and the data decides it, besides times, memory and the machine.

    Args:
        recordings: folder where the activations are, or come to be, for the next rule to read.
    """
    dataset = open_dataset(run.dataset, shared=shared)
    config = config_of(run, dataset)
    recording = Recording.of(
        dataset.source,
        config.site,
        tokens=config.tokens + CALIBRATION_TOKENS,
        batch_tokens=config.batch_tokens,
        seed=config.seed,
        path=recordings
        / f"{run.dataset}-{dataset.fingerprint}-{config.batch_tokens}-{config.seed}-{config.tokens}.f32",
    )
    forget_peak()
    start_mb = memory_mb("VmRSS")
    timed = TimedSource(recording)
    began = time.process_time()
    if run.rule in BY_PEER:
        elsewhere = train_by_peer(run, config, timed, python=peer_python)
        sae, batch_rule = elsewhere.sae, config.rule
        train_s, start_mb, peak_mb = elsewhere.cpu_s, elsewhere.start_mb, elsewhere.peak_mb
    else:
        sae, batch_rule = train_one(config, timed)
        train_s = time.process_time() - began - timed.seconds
        peak_mb = memory_mb("VmHWM")
    # as many tokens as training shared budgets over
    tokens = TokenFacts.read(dataset, config.batch_tokens * config.shared_over)
    inference = evaluate_mode(sae, dataset, tokens)
    batch = inference
    if batch_rule.looks_across_tokens:
        batch = evaluate_mode(sae.with_rule(batch_rule), dataset, tokens)
    mtok = config.steps * config.batch_tokens / 1e6
    return {
        **asdict(run),
        "fingerprint": dataset.fingerprint,
        "d_model": dataset.d_model,
        "n_features": config.n_features,
        "batch_tokens": config.batch_tokens,
        "learning_rate": config.peak_lr,
        **{f"batch_mode_{name}": number for name, number in batch.items()},
        **{f"inference_{name}": number for name, number in inference.items()},
        **concept_summary(sae, dataset, tokens),
        **recovery_summary(sae, dataset),
        "train_cpu_s_per_mtok": train_s / mtok,
        "source_cpu_s_per_mtok": recording.cpu_s_per_mtok,
        "start_mb": start_mb,
        "peak_mb": peak_mb,
        **machine(),
    }


def train_one(config: TrainConfig, source: ActivationSource) -> tuple[SAE, SelectionRule]:
    """The SAE as it serves single tokens, and the rule that it was trained under."""
    trained: list[SelectionRule] = [config.rule]

    def note(step: int, reports: Sequence[Report]) -> None:
        trained[0] = reports[0].rule

    (sae,) = train([config], source, on_step=note)
    return sae, trained[0] if trained[0].looks_across_tokens else sae.rule


@dataclass
class TimedSource:
    """A source that notes the processor's seconds that it takes."""

    source: ActivationSource
    seconds: float = 0.0

    @property
    def widths(self) -> Mapping[Site, int]:
        return self.source.widths

    def stream(self, batch_tokens: int, *, seed: int) -> Iterator[Mapping[Site, ActivationBatch]]:
        stream = self.source.stream(batch_tokens, seed=seed)
        while True:
            began = time.process_time()
            batch = next(stream)
            self.seconds += time.process_time() - began
            yield batch


@dataclass(frozen=True, slots=True)
class TokenFacts:
    """What is known of every held-out token besides its activation, `(rows, context)` each; nan where nothing is.

    Attributes:
        surprisal: nats of the token itself, given those before it.
        loss: nats of the token that follows, given it and those before it.
        true_l0: true features that fire on it.
        batches: the activations themselves; as many tokens each as budgets were shared over in training.
    """

    surprisal: Tensor
    loss: Tensor
    true_l0: Tensor
    labels: ConceptLabels | None
    batch_rows: int
    batches: tuple[ActivationBatch, ...]

    @classmethod
    def read(cls, dataset: Dataset, batch_tokens: int) -> "TokenFacts":
        ids = dataset.rows.ids
        batch_rows = max(1, batch_tokens // dataset.rows.context)
        surprisal, loss, true_l0 = (torch.full(ids.shape, torch.nan) for _ in range(3))
        if dataset.is_language:
            with torch.no_grad():
                nats = torch.cat([_nats(dataset.target.run(part), part) for part in ids.split(16)])
            surprisal[:, 1:], loss[:, :-1] = nats, nats
        if dataset.truth is not None:
            true_l0[:] = dataset.truth.codes(ids.flatten(), seed=HELD_OUT_SEED).l0().view_as(ids)
        labels = label_tokens(dataset.rows, dataset.documents) if dataset.documents else None
        return cls(surprisal, loss, true_l0, labels, batch_rows, tuple(held_out(dataset, batch_rows)))


def _nats(logits: Tensor, ids: Tensor) -> Tensor:
    flat = cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return flat.view(len(ids), -1)


@torch.no_grad()
def evaluate_mode(sae: SAE, dataset: Dataset, tokens: TokenFacts) -> Numbers:
    """Every metric of saekit's evaluation, and with what the number of active features goes.

    A batch rule shares its budget over as many tokens as in training, which are several batches where it needs them.
    """
    whole = len(dataset.rows) - len(dataset.rows) % tokens.batch_rows  # a short last batch would be another rule
    rows = dataset.rows.select(slice(whole))
    loss_rows = rows_to_predict(tokens.batch_rows) if dataset.is_language else 0
    numbers: Numbers = dict(
        evaluate(
            sae,
            dataset.target,
            rows,
            dataset.site,
            mask=dataset.mask,
            batch_rows=tokens.batch_rows,
            loss_rows=loss_rows,
        ).metrics()
    )
    l0, where, error = [], [], []
    for batch in tokens.batches[: whole // tokens.batch_rows]:
        codes = sae.encode(batch.vectors)
        l0.append(codes.l0().double())
        error.append((batch.vectors - sae.decode(codes, batch.vectors)).square().sum(1).double())
        where.append(batch.document * rows.context + batch.position)
    at = torch.cat(where)
    compared = {
        "error": torch.cat(error),
        "loss": tokens.loss.flatten()[at],
        "surprisal": tokens.surprisal.flatten()[at],
        "true_l0": tokens.true_l0.flatten()[at],
    }
    return numbers | {f"l0_{name}_corr": rank_correlation(torch.cat(l0), other) for name, other in compared.items()}


def rows_to_predict(batch_rows: int) -> int:
    """`LOSS_ROWS` in whole batches; at least one, since a shorter batch would be another rule."""
    return max(1, LOSS_ROWS // batch_rows) * batch_rows


def rank_correlation(left: Tensor, right: Tensor) -> float | None:
    """Spearman's; None where one of the two is unknown or constant, as L0 is under TopK."""
    known = ~(left.isnan() | right.isnan())
    found = statistics.rank_correlation(left[known], right[known]) if int(known.sum()) > 1 else math.nan
    return None if math.isnan(found) else found


def held_out(dataset: Dataset, batch_rows: int) -> Iterator[ActivationBatch]:
    harvest = Harvest(
        target=dataset.target, rows=dataset.rows, sites=(dataset.site,), mask=dataset.mask, batch_rows=batch_rows
    )
    for batches in harvest.in_order():
        yield batches[dataset.site]


@torch.no_grad()
def concept_summary(sae: SAE, dataset: Dataset, tokens: TokenFacts) -> Numbers:
    """How well the best feature of each concept tells it; chosen and scored on the same rows, for all rules alike."""
    if tokens.labels is None:
        return {}
    counts = []
    for batch in tokens.batches:
        labels = tokens.labels.at(batch.document, batch.position)
        known = tokens.labels.known[batch.document, batch.position]
        counts.append(count_concepts(sae.encode(batch.vectors), labels, known=known))
    total = reduce(add, counts)
    present = total.labelled > 0
    best = total.scores().f1.amax(0)[present]
    return {
        "concepts": int(present.sum()),
        "concept_f1_mean": float(best.mean()),
        "concepts_told": float((best >= 0.7).double().mean()),
    }


def recovery_summary(sae: SAE, dataset: Dataset) -> Numbers:
    """What was found of the truth, where there is one; bands are numbered from the densest."""
    if dataset.truth is None:
        return {}
    found = measure_recovery(sae, dataset.truth, n_tokens=dataset.rows.ids.numel(), seed=HELD_OUT_SEED)
    numbers = {name: value for name, value in found.summary().items() if "_to_" not in name and name != "above"}
    bands = {f"recovered_band_{number}": band.recovered for number, band in enumerate(found.bands, start=1)}
    return {f"truth_{name}": value for name, value in (numbers | bands).items()}


def machine() -> dict[str, object]:
    """What produced the numbers."""
    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "saekit": version("saekit"),
        "commit": commit,
        "torch": version("torch"),
        "python": platform.python_version(),
        "machine": f"{names[0]} x{len(names)}" if names else platform.processor(),
        "threads": torch.get_num_threads(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }
