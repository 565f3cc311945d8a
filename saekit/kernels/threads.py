"""Ranges of rows worked on side by side, in Python threads that share torch's among them.

Selection and its like are chains of small operations, many of them numpy's, and those run on one core however many
there are; ranges of rows do not need each other. Where torch has one thread, all of it happens in the caller.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Lock, current_thread
from typing import TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")

# each range holds a block of pre-activations, so there are never many
_MOST_RANGES = 4
# numbers in a range: handing one over takes some 50 microseconds
_WORTH_A_THREAD = 1 << 15
_NAME = "saekit-range"
_making = Lock()
_pools: dict[int, ThreadPoolExecutor] = {}
os.register_at_fork(after_in_child=_pools.clear)  # a child has the pools, but not their threads


def ranges(rows: Tensor) -> list[slice]:
    """All rows in equal ranges: as many as torch has threads, up to four; one off the CPU, and for little work.

    Without rows, one empty range.
    """
    wanted = min(_MOST_RANGES, torch.get_num_threads(), rows.numel() // _WORTH_A_THREAD)
    if rows.device.type != "cpu" or current_thread().name.startswith(_NAME):
        wanted = 1
    size = max(1, -(-len(rows) // max(1, wanted)))
    return [slice(start, min(len(rows), start + size)) for start in range(0, max(1, len(rows)), size)]


def side_by_side(work: Callable[[slice], Result], parts: list[slice]) -> list[Result]:
    """`[work(part) for part in parts]`, without gradients.

    Results are those of one part after the other, whatever the threads do: parts must not write where others read.
    """
    inference = torch.is_inference_mode_enabled()

    def alone(part: slice) -> Result:
        with torch.inference_mode(inference), torch.no_grad():  # which threads do not inherit
            return work(part)

    if len(parts) == 1:
        return [alone(parts[0])]
    return list(_pool(torch.get_num_threads()).map(alone, parts))


def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads that together have `threads` of torch's."""
    with _making:
        if threads not in _pools:
            _pools[threads] = _made(threads)
        return _pools[threads]


def _made(threads: int) -> ThreadPoolExecutor:
    workers = min(_MOST_RANGES, threads)
    pool, together = ThreadPoolExecutor(workers, thread_name_prefix=_NAME), Barrier(workers)

    def begin(_: int) -> None:
        torch.get_num_threads()  # what a thread asks first sets it back to the number of the process
        torch.set_num_threads(threads // workers)
        together.wait()

    list(pool.map(begin, range(workers)))
    # it holds for the thread that says it, and for all that begin later
    torch.set_num_threads(threads)
    return pool
