"""What one step holds at most, beyond what is there before it: weights and optimizer states."""

import tracemalloc
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def peak(step: Callable[[], None], device: str) -> float:
    """Bytes a step holds at most, counted exactly from what it allocates.

    On a CPU torch's own tensors are counted in one step and everything of Python's allocator (numpy
    arrays too) in another, and the two peaks are added; on CUDA the allocator's peak is taken.
    """
    if device != "cpu":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return float(torch.cuda.max_memory_allocated() - before)
    tracemalloc.start()
    step()
    host = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    if profiler.profiler is None or profiler.profiler.kineto_results is None:
        raise RuntimeError("torch's profiler gave no result")
    events = profiler.profiler.kineto_results.events()
    memory: list[Any] = [e for e in events if e.name() == "[memory]"]  # torch's stub lacks nbytes
    changes = [(e.start_ns(), e.nbytes()) for e in memory]
    held = most = 0
    for _, change in sorted(changes):
        held += change
        most = max(most, held)
    return float(most + host)
