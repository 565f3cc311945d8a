"""Where the seconds of a run go, for those who ask; nothing is measured for anybody else.

Stages name themselves with `spent_on`. A stage within another counts for itself alone, so that the seconds of all
stages of a thread add up to what they took together.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import Context, ContextVar, copy_context

_asked: ContextVar[dict[str, float] | None] = ContextVar("seconds_by_stage", default=None)
# seconds that stages within the current one have taken
_within: ContextVar[list[float] | None] = ContextVar("seconds_within", default=None)


@contextmanager
def seconds_by_stage() -> Iterator[dict[str, float]]:
    """A dict that fills up with the seconds of every stage that runs within."""
    seconds: dict[str, float] = {}
    token = _asked.set(seconds)
    try:
        yield seconds
    finally:
        _asked.reset(token)


def context_for_a_thread() -> Context:
    """The caller's context for work beside it: measured too, but not taken off the stage that the caller is in."""
    context = copy_context()
    context.run(_within.set, None)
    return context


@contextmanager
def spent_on(stage: str) -> Iterator[None]:
    """Count what happens within for `stage`."""
    seconds = _asked.get()
    if seconds is None:
        yield
        return
    outer, inner = _within.get(), [0.0]
    token = _within.set(inner)
    start = time.perf_counter()
    try:
        yield
    finally:
        took = time.perf_counter() - start
        _within.reset(token)
        seconds[stage] = seconds.get(stage, 0.0) + took - inner[0]
        if outer is not None:
            outer[0] += took
