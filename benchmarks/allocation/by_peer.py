"""A run that another library trains: on the same vectors in the same order, in an environment of its own."""

import json
import subprocess
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
        cpu_s: processor seconds of training, as its process counts them.
        start_mb, peak_mb: memory of that process before training, and its highest; None where it cannot be known.
    """

    sae: SAE
    cpu_s: float
    start_mb: float | None
    peak_mb: float | None


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
        done = subprocess.run([python, SCRIPT, vectors, out, *arguments], capture_output=True, text=True)
        if done.returncode:
            raise SaekitError(f"{run.rule} failed: {done.stderr.strip().splitlines()[-1:]}; run {SCRIPT.name} by hand")
        # libraries may talk before
        return Elsewhere(saekit.load(out), **json.loads(done.stdout.splitlines()[-1]))
