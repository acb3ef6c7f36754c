"""Timing on a GPU: CUDA-graph replay, with operands that rotate so that the second-level cache never has them."""

import statistics
from collections.abc import Callable, Sequence

import torch

REPLAYS = 7


def seconds_per_call(calls: Sequence[Callable[[], object]]) -> float:
    """Median over some replays of one graph that holds all calls in a row, divided by their number.

    The calls should do the same work on operands of their own, together larger than the cache (see `copies_needed`).
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(REPLAYS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e-3)
    return statistics.median(times) / len(calls)


def copies_needed(bytes_each: int, device: torch.device) -> int:
    """How many operands of this size fill the device's cache four times over, at least 2 and at most 64."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(64, max(2, -(-4 * cache // bytes_each)))


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written per second by a copy of 1 GiB."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds_per_call([lambda: target.copy_(source)] * 4)
