"""Keeping a run: it saves itself now and then and when it is told to stop."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from saekit.activations.stream import Place
from saekit.errors import DataError
from saekit.training.saved_run import RunFile, save_run
from saekit.training.step import TrainState
from saekit.training.stop import RunStopped, StopRequested, StopSignals


class Keeper:
    """Saves the states of a run; without a file it does nothing. Use as a context manager around the steps.

    Args:
        facts: of the source.
        place: in the stream, behind what the states have learnt from so far.

    Raises:
        RunStopped: on leaving, if SIGTERM or Ctrl-C came and the run has been saved.
        DataError: ... and its weights are no numbers any more, so that it has not.
    """

    def __init__(self, run_file: RunFile | None, states: Sequence[TrainState], facts: Mapping[str, Any], place: Place):
        self._file, self._states, self._facts, self._place = run_file, states, facts, place
        self._signals = StopSignals()
        self._saved_at = time.monotonic()

    def __enter__(self) -> "Keeper":
        if self._file is not None:
            self._signals.__enter__()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self._file is None:
            return
        try:
            if isinstance(error, StopRequested):
                step, steps = self._states[0].step, self._states[0].config.steps
                self.save()
                raise RunStopped(
                    error.signal,
                    f"stopped after step {step:,} of {steps:,}, saved in {self._file.path}; "
                    "the same command with --resume goes on from there",
                ) from None
        finally:
            self._signals.__exit__()

    @contextmanager
    def whole_step(self, place: Place | None) -> Iterator[None]:
        """The step that takes the run to `place`: a signal that comes in the middle of it waits for its end."""
        with self._signals.held_back():
            yield
            self._place = place or self._place

    def is_due(self, step: int) -> bool:
        """Whether to save after this step."""
        if self._file is None:
            return False
        return step == self._states[0].config.steps or self._file.is_due(step, self._saved_at)

    def _check_finite(self) -> None:
        """A run that has come to nothing must not replace what was saved before."""
        step = self._states[0].step
        for state in self._states:
            if not all(bool(weight.isfinite().all()) for weight in state.trained()):
                raise DataError(
                    f"stopped after step {step:,}, and not saved: the weights at {state.config.site} are no numbers "
                    f"any more; lower the learning rate (it is {state.config.peak_lr:.2g})"
                )

    def save(self) -> None:
        """Write the file, whatever signals come.

        Raises:
            DataError: the weights are no numbers any more.
        """
        if self._file is None:
            return
        self._check_finite()
        with self._signals.held_back():
            save_run(self._file.path, self._states, self._place, self._facts)
        self._saved_at = time.monotonic()
