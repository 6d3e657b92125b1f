"""Peak memory of a call, from the allocator's own events."""

import gc
import os

from torch.profiler import ProfilerActivity, profile

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler prints a line per start and stop


def peak_extra_bytes(call) -> int:
    """Most bytes that ``call`` held at once beyond what it still holds when it returns."""
    call()  # first-call allocations (thread pools, caches) are not the call's
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        result = call()
    events = sorted(
        (event.start_ns(), event.nbytes())
        for event in prof.profiler.kineto_results.events()
        if event.name() == "[memory]"
    )
    assert events, "the profiler recorded no allocation"
    held = peak = 0
    for _, nbytes in events:
        held += nbytes
        peak = max(peak, held)
    del result
    return peak - held
