"""Arrival counters for split-K kernels: zero at every launch, without a kernel that clears them.

The last program of a tile resets its counter, so a counter that starts at zero ends at zero. What is left is
to give launches that may overlap different counters.
"""

import logging
import threading

import torch

log = logging.getLogger("tqcompile")

_ARENA = 1 << 22  # counters per device, 16 MiB: of some hundred captured models
_STREAM_SHARE = 4096  # of them, for the launches of one stream
_lock = threading.Lock()
_arenas: dict = {}  # device -> (counters, {"used": how many are given out, stream: its share})


def _make_arena(device: torch.device) -> None:
    with torch.cuda.device(device):
        counters = torch.zeros(_ARENA, dtype=torch.int32, device=device)
        torch.cuda.current_stream().synchronize()  # zero for every stream; once per process
    _arenas.setdefault(device, (counters, {"used": 0}))


def split_counters(device: torch.device, tiles: int) -> torch.Tensor:
    """int32 counters that are zero when the kernel starts; the kernel leaves them zero again.

    Launches on one stream follow each other and share counters; streams do not. A captured launch may be
    replayed on any stream, so it owns its counters for good (a graph never overlaps itself). Where the arena
    does not exist yet or is used up, a launch clears its own; that it is used up is logged once.
    """
    if device.type == "cuda":
        capturing = torch.cuda.is_current_stream_capturing()
        if device not in _arenas and not capturing:
            # A thread of its own: while CUDA graph trees warm up, this thread allocates from a graph's pool.
            thread = threading.Thread(target=_make_arena, args=(device,))
            thread.start()
            thread.join()
        with _lock:
            arena, shares = _arenas.get(device, (None, {}))
            stream = None if capturing else torch.cuda.current_stream(device).cuda_stream
            if not capturing and tiles <= _STREAM_SHARE and stream in shares:
                return shares[stream]
            # Multiples of 32 keep pointers aligned; else Triton would compile again, inside the capture.
            size = -(-tiles // 32) * 32 if capturing else _STREAM_SHARE
            if arena is not None and tiles <= size and shares["used"] + size <= _ARENA:
                mine = arena[shares["used"] : shares["used"] + size]
                shares["used"] += size
                if not capturing:
                    shares[stream] = mine
                return mine
            if arena is not None and capturing and not shares.get("full"):
                shares["full"] = True
                log.warning("the %d counters of captured launches are used up; more launches clear their own", _ARENA)
    return torch.zeros(tiles, dtype=torch.int32, device=device)
