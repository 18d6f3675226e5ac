"""Arrays of the host as tensors on a device."""

import numpy as np
import torch
from torch import Tensor


def to_device(array: np.ndarray, device: torch.device | str) -> Tensor:
    """Return the array on the device, on a CPU a view of it. The caller may change the array once this returns.

    It does not wait for the copy; but out of pageable memory the copy may wait for earlier work of the stream, so
    batches to serve go by backends.staging.
    """
    return torch.from_numpy(array).to(device, non_blocking=True)
