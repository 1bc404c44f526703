"""A device of which it is written down whenever the host would have to wait for it, simulated on a CPU.

Its tensors hold their values on the CPU and say that they are elsewhere. As with a GPU, mixing them with the host's
tensors is an error, what is copied from memory that is not pinned is waited for, and so is all whose shape or answer
depends on values: nonzero, indexing by bools, a number as a Python number, a copy to the host.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

aten = torch.ops.aten
# Any device but the CPU that torch does not ask its driver about.
DEVICE = torch.device("meta")
WAITING = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.bincount, aten._unique2, aten.unique_dim,
           aten.unique_consecutive, aten.repeat_interleave, aten.equal, aten.allclose, aten.is_nonzero}  # fmt: skip
MASKS = {torch.bool, torch.uint8}  # torch reads an index of bytes as a mask, too
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}


def waits_for_values(operation: Any, args: tuple) -> bool:
    """Whether the host has to see values before it can go on."""
    by_mask = operation in INDEXING and any(index is not None and index.dtype in MASKS for index in args[1])
    return by_mask or operation in WAITING


class WaitingOperations(TorchDispatchMode):
    """Of code all of whose tensors would be on a device: `names` of the operations that would make the host wait."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None) -> Any:
        if waits_for_values(function.overloadpacket, args):
            self.names.append(str(function))
        return function(*args, **(kwargs or {}))


class DeviceTensor(Tensor):
    """A tensor of the simulated device."""

    @staticmethod
    def __new__(cls, value: Tensor) -> "DeviceTensor":
        return torch.Tensor._make_wrapper_subclass(
            cls, value.shape, strides=value.stride(), dtype=value.dtype, device=DEVICE
        )

    def __init__(self, value: Tensor) -> None:
        self.value = value

    def __repr__(self) -> str:
        return f"DeviceTensor({self.value})"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise AssertionError(f"{function} outside of a SimulatedDevice")


class SimulatedDevice(TorchDispatchMode):
    """`waits`: what the host has waited for since the last look."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def take_waits(self) -> list[str]:
        waits, self.waits = self.waits, []
        return waits

    def __torch_dispatch__(self, function, types, args=(), kwargs=None) -> Any:
        kwargs, operation = dict(kwargs or {}), function.overloadpacket
        leaves = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
        on_device = any(isinstance(leaf, DeviceTensor) for leaf in leaves)
        goes_to = kwargs.get("device")
        if operation is aten.is_pinned:
            return hasattr(args[0], "is_pinned_here")
        if operation is aten._pin_memory:
            pinned = args[0].clone()
            pinned.is_pinned_here = True
            return pinned
        if operation is aten._to_copy and goes_to is not None and (goes_to == DEVICE) != on_device:
            return self._copied(args[0], kwargs)
        if on_device:
            self._note_waits(operation, args, leaves)
        if goes_to == DEVICE:
            kwargs["device"] = torch.device("cpu")
        result = function(*tree_map(_value, args), **tree_map(_value, kwargs))
        if (not on_device and goes_to != DEVICE) or operation is aten._local_scalar_dense:
            return result
        known = {id(_value(leaf)): leaf for leaf in leaves}

        def wrapped(leaf: Any) -> Any:
            # What was written in place stays the tensor that it was.
            return known[id(leaf)] if id(leaf) in known else DeviceTensor(leaf)

        return tree_map(lambda leaf: wrapped(leaf) if isinstance(leaf, Tensor) else leaf, result)

    def _copied(self, source: Tensor, kwargs: dict[str, Any]) -> Tensor:
        to_device, value = kwargs.pop("device") == DEVICE, _value(source)
        non_blocking = kwargs.pop("non_blocking", False)
        if not to_device:
            self.waits.append("copy to the host")
        elif not (non_blocking and hasattr(source, "is_pinned_here")):
            self.waits.append("copy from memory that is not pinned")
        copy = aten._to_copy(value, **kwargs)
        return DeviceTensor(copy) if to_device else copy

    def _note_waits(self, operation: Any, args: tuple, leaves: list[Tensor]) -> None:
        elsewhere = [leaf for leaf in leaves if not isinstance(leaf, DeviceTensor) and leaf.dim() > 0]
        if operation in INDEXING and elsewhere:
            self.waits.append("indexing by the host's tensor")
        elif elsewhere:
            raise RuntimeError(f"{operation}: expected all tensors to be on the same device")
        if waits_for_values(operation, args):
            self.waits.append(str(operation))


def _value(leaf: Any) -> Any:
    return leaf.value if isinstance(leaf, DeviceTensor) else leaf
