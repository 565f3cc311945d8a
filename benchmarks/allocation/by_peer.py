"""A run that another library trains: on the same vectors in the same order, in an environment of its own."""

import resource
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import saekit
from benchmarks.allocation.runs import Run
from saekit.activations.batch import ActivationSource
from saekit.activations.harvest import take
from saekit.errors import SaekitError
from saekit.sae import SAE
from saekit.training.config import TrainConfig

SCRIPT = Path(__file__).parent / "peer.py"


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """What a peer has trained, and what that took.

    Attributes:
        cpu_s: processor seconds of its process, reading the vectors included.
        peak_mb: the highest memory of its process.
    """

    sae: SAE
    cpu_s: float
    peak_mb: float


def train_by_peer(run: Run, config: TrainConfig, source: ActivationSource, *, python: Path) -> Elsewhere:
    """Write the vectors down, have the peer train on them, and load what it saved.

    Raises:
        SaekitError: if the peer's process fails; the message ends with the last it said.
    """
    with tempfile.TemporaryDirectory() as folder:
        vectors, out = Path(folder) / "vectors.npy", Path(folder) / "sae"
        tokens = config.steps * config.batch_tokens
        np.save(
            vectors, take(source.stream(config.batch_tokens, seed=config.seed), tokens, config.site).vectors.numpy()
        )
        options = {
            "features": config.n_features,
            "k": run.k,
            "batch-tokens": config.batch_tokens,
            "learning-rate": config.peak_lr,
            "dead-after": config.dead_threshold,
            "seed": run.seed,
        }
        arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
        before = _children_s()
        done = subprocess.run([python, SCRIPT, vectors, out, *arguments], capture_output=True, text=True)
        if done.returncode:
            raise SaekitError(f"{run.rule} failed: {done.stderr.strip().splitlines()[-1:]}; run {SCRIPT.name} by hand")
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        peak_mb = peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)
        return Elsewhere(saekit.load(out), _children_s() - before, peak_mb)


def _children_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
