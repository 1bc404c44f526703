"""Between host and device: what is sent need not be waited for, and what is read always is."""

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor on the device; one of the host's is copied while the host goes on."""
    if torch.device(device).type == tensor.device.type:
        return tensor
    # From memory that may be swapped out, the copy would be made before the host goes on.
    return tensor.pin_memory().to(device, non_blocking=True)


def to_host(tensor: Tensor) -> Tensor:
    """A device's tensor on the host, which waits until all that was asked of the device before is done."""
    return tensor.cpu()
