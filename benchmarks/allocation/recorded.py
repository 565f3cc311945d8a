"""Activations on disk: rules that are compared read the same vectors, and the model runs once for all of them."""

import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import ceil
from pathlib import Path

import numpy as np
import torch

from saekit.activations.batch import ActivationBatch, ActivationSource
from saekit.errors import SaekitError
from saekit.targets import Site


@dataclass(frozen=True, kw_only=True, slots=True)
class Recording:
    """The first `tokens` vectors of a source at one Site, as float32 rows in a file.

    Attributes:
        path: of the file; what it took to make lies beside it.
    """

    path: Path
    site: Site
    d_model: int
    tokens: int
    batch_tokens: int
    seed: int

    @classmethod
    def of(
        cls, source: ActivationSource, site: Site, *, tokens: int, batch_tokens: int, seed: int, path: Path
    ) -> "Recording":
        """The recording at `path`, made now if it is not there; whole batches, at least `tokens`."""
        n_batches = ceil(tokens / batch_tokens)
        recording = cls(
            path=path,
            site=site,
            d_model=source.widths[site],
            tokens=n_batches * batch_tokens,
            batch_tokens=batch_tokens,
            seed=seed,
        )
        if not path.exists():
            recording._write(source.stream(batch_tokens, seed=seed))
        return recording

    @property
    def cpu_s_per_mtok(self) -> float:
        """Processor seconds of making a million of the vectors: the model's forward pass and shuffling."""
        return json.loads(self._facts.read_text())["cpu_s"] / self.tokens * 1e6

    @property
    def widths(self) -> Mapping[Site, int]:
        return {self.site: self.d_model}

    def stream(self, batch_tokens: int, *, seed: int) -> Iterator[Mapping[Site, ActivationBatch]]:
        """The recorded batches, which end.

        Raises:
            SaekitError: for another stream than the recorded one, or behind its end.
        """
        if (batch_tokens, seed) != (self.batch_tokens, self.seed):
            raise SaekitError(
                f"{self.path} holds batches of {self.batch_tokens} tokens, seed {self.seed}; "
                f"asked for {batch_tokens}, seed {seed}"
            )
        vectors = np.memmap(self.path, dtype=np.float32, mode="r", shape=(self.tokens, self.d_model))
        for begin in range(0, self.tokens, batch_tokens):
            batch = torch.from_numpy(vectors[begin : begin + batch_tokens].copy())
            yield {self.site: ActivationBatch.from_vectors(batch)}
        raise SaekitError(f"{self.path} holds {self.tokens:,} tokens and more are asked for")

    @property
    def _facts(self) -> Path:
        return self.path.with_suffix(".json")

    def _write(self, stream: Iterator[Mapping[Site, ActivationBatch]]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(".unfinished")
        began = time.process_time()
        with unfinished.open("wb") as file:
            for _ in range(self.tokens // self.batch_tokens):
                file.write(next(stream)[self.site].vectors.float().numpy().tobytes())
        self._facts.write_text(json.dumps({"cpu_s": time.process_time() - began}))
        os.replace(unfinished, self.path)
