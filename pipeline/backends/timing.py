"""Points in a batch's work, to measure its stages without waiting for the device."""

import time

import torch


class Mark:
    """A point in time: on a GPU, when its stream gets here; on a CPU, now."""

    def __init__(self, device: torch.device) -> None:
        self._event: torch.cuda.Event | None = None
        self._time_s = time.perf_counter()
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record(torch.cuda.current_stream(device))

    def ms_until(self, later: "Mark") -> float:
        """Return the milliseconds to a later mark of the device, which must have reached it."""
        if self._event is not None and later._event is not None:
            return self._event.elapsed_time(later._event)
        return 1e3 * (later._time_s - self._time_s)
