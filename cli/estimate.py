"""What a run of training would take."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from saekit.activations.harvest import Harvest
    from saekit.sae import SAE
    from saekit.targets import Site
    from saekit.training.config import TrainConfig
    from saekit.training.crosscoder import Joined
    from saekit.training.step import TrainState


def estimate(
    configs: Sequence["TrainConfig"],
    source: "Harvest",
    device: str,
    *,
    starts: Sequence["SAE"] = (),
    whole: "Joined | None" = None,
) -> dict[str, Any]:
    """Memory, disk and time of a run; time by doing some steps of it, with the auxiliary loss at work.

    Args:
        whole: what the configs read, if that is the Sites of the source put end to end.
    """
    import time

    import torch

    from saekit.errors import DataError
    from saekit.training.saved_run import run_bytes

    first = configs[0]
    widths = (whole or source).widths
    numbers = sum(
        config.n_features * (widths[config.site] + widths[config.site_out or config.site] + 2) for config in configs
    )
    row_bytes = sum(4 * width + 41 for width in source.widths.values())
    began = time.perf_counter()
    one_pass = next((read for read in source.in_order() if len(read[source.sites[0]])), None)
    if one_pass is None:
        raise DataError("every token of the text is masked; give other text")
    if whole is not None:
        one_pass = whole.join(one_pass)
    harvest_s = (time.perf_counter() - began) / len(one_pass[first.site]) * first.tokens
    n = first.batch_tokens
    vectors = {site: batch.vectors.repeat(-(-n // len(batch)), 1)[:n].to(device) for site, batch in one_pass.items()}
    states, step_s = _timed(configs, vectors, starts)
    # the buffer, what it is made from and a batch of it; and one more where the next is made meanwhile
    buffers = 3.5 if source.prefetch else 2.5
    return {
        "weights_mb": round(numbers * 4 / 1e6, 1),
        "memory_mb": round((numbers * 16 + source.buffer_tokens * buffers * row_bytes) / 1e6 + 700),
        # the SAE, and the unfinished run, which is there twice while it is replaced
        "disk_mb": round((numbers * 4 + 2 * run_bytes(states)) / 1e6, 1),
        "harvest_minutes": round(harvest_s / 60, 2),
        "training_minutes": round(step_s * first.steps / 60, 2),
        "passes_over_text": round(first.tokens / max(1, source.rows.ids.numel()), 2),
        "threads": torch.get_num_threads(),
    }


def _timed(
    configs: Sequence["TrainConfig"], vectors: Mapping["Site", "Tensor"], starts: Sequence["SAE"]
) -> tuple[list["TrainState"], float]:
    """States of the run after some steps on the vectors, and the seconds of one step."""
    import time

    from saekit.training.step import TrainState, train_step

    first = configs[0]
    batches = [(vectors[c.site], vectors[c.site_out] if c.site_out else None) for c in configs]
    states = [
        TrainState.start(config, *batch, start=start)
        for config, batch, start in zip(configs, batches, starts or [None] * len(configs), strict=True)
    ]
    # where budgets are shared over a pool, as many vectors as it holds, whatever they are
    pools = [batch[0].repeat(c.pool_starting_at(0), 1) for c, batch in zip(configs, batches, strict=True)]

    def take_step() -> None:
        for state, batch, pool in zip(states, batches, pools, strict=True):
            train_step(state, *batch, pool=pool if len(pool) else None)

    take_step()  # warms up
    for state in states:  # before this the auxiliary loss waits, and it is a good part of the time
        state.step = max(1, min(state.config.dead_threshold // first.batch_tokens + 1, first.steps - 3))
    began = time.perf_counter()
    for _ in range(3):
        take_step()
    return states, (time.perf_counter() - began) / 3
