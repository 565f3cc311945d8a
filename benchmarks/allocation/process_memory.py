"""Memory of this process; imports nothing else, so that a peer's Python can read it too."""

from pathlib import Path


def memory_mb(field: str) -> float | None:
    """Of this process, from the kernel: VmRSS is now, VmHWM the most so far. None where there is no /proc."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    line = next(line for line in status.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def forget_peak() -> None:
    """Have VmHWM begin anew: what making the activations took is no part of training."""
    reset = Path("/proc/self/clear_refs")
    if reset.exists():
        reset.write_text("5")
