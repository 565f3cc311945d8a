"""Short trainings on toy vectors, for the tests of what training can do."""

import pytest
from torch import Tensor

from saekit.activations.harvest import TensorSource
from saekit.selection import TopK
from saekit.targets import Site
from saekit.training import loop
from saekit.training.config import TrainConfig

SITE, OUT = Site.parse("layers.1"), Site.parse("layers.2")
BATCH, N_FEATURES = 256, 48


@pytest.fixture
def small_samples(monkeypatch) -> None:
    """Look at a few vectors where training looks at many."""
    monkeypatch.setattr(loop, "SAMPLE_TOKENS", 2048)
    monkeypatch.setattr(loop, "CALIBRATION_TOKENS", 8192)


def config(steps: int = 20, **changes) -> TrainConfig:
    defaults = {"site": SITE, "rule": TopK(3), "n_features": N_FEATURES, "tokens": steps * BATCH, "batch_tokens": BATCH}
    return TrainConfig(**{**defaults, "learning_rate": 1e-2, **changes})


def source_of(vectors: Tensor) -> TensorSource:
    return TensorSource(site=SITE, vectors=vectors, buffer_tokens=2048)
