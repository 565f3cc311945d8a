"""One contender at one size, in a process of its own: prints its times as one line of JSON.

    python -m benchmarks.speed.worker CONTENDER SIZE [--repeats N] [--device cpu]

The encoder product alone, in float32 and in bfloat16, takes turns with the contender's steps, so that whatever
else the machine does falls on both.
"""

import argparse
import importlib
import json
import resource
import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import cycle, islice

import torch
from torch import Tensor

from benchmarks.speed.case import Size, batches

MB = 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("contender")
    parser.add_argument("size", type=Size.parse)
    parser.add_argument("--module", default="ours", choices=["ours", "peers"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=None)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    print(json.dumps(measure(options.module, options.contender, options.size, options.repeats, options.device)))


def measure(module: str, contender: str, size: Size, repeats: int, device: str) -> dict[str, object]:
    """Milliseconds of each step and of each product, and the most memory that steps took beyond the batches."""
    data = batches(size, device)
    build = importlib.import_module(f"benchmarks.speed.{module}").build
    before = _memory(device)
    step = build(contender, size, data[0])
    for batch in data[:2]:
        step(batch)
    peak_mb = (_memory(device) - before) / MB
    product = _product(size, data[0], torch.float32)
    fast = _product(size, data[0], torch.bfloat16)
    samples: dict[str, list[float]] = {"step": [], "matmul": [], "matmul_bf16": []}
    product()
    fast()
    for batch in islice(cycle(data), repeats):
        samples["matmul"].append(_milliseconds(product, device))
        samples["step"].append(_milliseconds(partial(step, batch), device))
        samples["matmul_bf16"].append(_milliseconds(fast, device))
    facts = {"torch": torch.__version__, "threads": torch.get_num_threads(), "device": _name(device)}
    return {**samples, **facts, "peak_mb": round(peak_mb), "median": statistics.median(samples["step"])}


def _product(size: Size, x: Tensor, dtype: torch.dtype) -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(2)
    weights = torch.randn(size.n_features, size.d_model, generator=generator).to(x.device, dtype)
    bias, x = torch.zeros(size.n_features, device=x.device, dtype=dtype), x.to(dtype)
    return lambda: torch.nn.functional.linear(x, weights, bias)


def _milliseconds(call: Callable[[], object], device: str) -> float:
    _wait(device)
    start = time.perf_counter()
    call()
    _wait(device)
    return 1e3 * (time.perf_counter() - start)


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize(device)


def _memory(device: str) -> float:
    if device == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
    return float(torch.cuda.max_memory_allocated(device))


def _name(device: str) -> str:
    return "cpu" if device == "cpu" else torch.cuda.get_device_name(device)


if __name__ == "__main__":
    main()
