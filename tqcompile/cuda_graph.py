"""Capturing calls in CUDA graphs."""

from collections.abc import Callable
from typing import Any

import torch


def capture(call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """(replay, result): ``call()`` in a CUDA graph of the current device, after one run on a side stream as torch asks
    for. The tensors that ``call`` reads and the result keep their places: change them in place and replay."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # Other threads, NCCL's for one, may go on calling CUDA meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = call()
    return graph.replay, result
