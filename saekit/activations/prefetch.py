"""Making the next of something in a thread while the last is used: the same things in the same order."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import TypeVar

from saekit.activations.clock import context_for_a_thread

Item = TypeVar("Item")
Read = TypeVar("Read")
Stopping = Callable[[Iterable[Read]], Iterator[Read]]


def one_ahead(make: Callable[[Stopping], Iterator[Item]]) -> Iterator[Item]:
    """The items of an iterator, each begun when the one before it is handed out; there are two in memory.

    What goes wrong in the thread is raised where its item would be. When nobody wants more, the thread stops at the
    next of the reads that `make` passes through the function it is given.
    """
    stop = Event()

    def until_stopped(reads: Iterable[Read]) -> Iterator[Read]:
        for read in reads:
            if stop.is_set():
                raise RuntimeError("stopped")  # to nobody: whoever would hear of it is gone
            yield read

    items, nothing = make(until_stopped), object()
    context = context_for_a_thread()
    with ThreadPoolExecutor(1, thread_name_prefix="saekit-prefetch") as thread:
        try:
            coming = thread.submit(context.run, next, items, nothing)
            while (item := coming.result()) is not nothing:
                coming = thread.submit(context.run, next, items, nothing)
                yield item  # type: ignore[misc]
                del item  # or there would be three
        finally:
            stop.set()
