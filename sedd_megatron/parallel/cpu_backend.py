"""Unmodified Megatron-Core 0.16 on CPU over gloo: the one place that replaces torch.cuda calls.

Megatron-Core writes `device=torch.cuda.current_device()` and `device="cuda"` wherever it allocates. `install` makes
these mean the CPU for the rest of the process. It is called only where there is no GPU, or for `--device cpu`.
"""

import contextlib
import functools
import warnings
from typing import Any

import torch

_FACTORIES = [
    "tensor",
    "empty",
    "zeros",
    "ones",
    "full",
    "arange",
    "rand",
    "randn",
    "empty_like",
    "zeros_like",
    "ones_like",
    "full_like",
    "rand_like",
    "randn_like",
]

# What Megatron-Core says of a machine without a GPU, once per rank and import.
_EXPECTED_WARNINGS = (
    ".*Transformer Engine and Apex are not installed.*",
    ".*Apex is not installed.*",
    ".*full scope is deprecated.*",
    ".*CUDA_DEVICE_MAX_CONNECTIONS.*",
    ".*core_attn recompute is really needed.*",
    ".*torch.distributed.(all_gather_into_tensor|reduce_scatter_tensor). is deprecated.*",
    ".*The .grad attribute of a Tensor that is not a leaf Tensor.*",
)


class _InertStream:
    """Work on a CPU is done when the call returns: streams and events have nothing to order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_stream(self, stream: "_InertStream") -> None:
        pass

    def wait_event(self, event: "_InertEvent") -> None:
        pass

    def record_event(self, event: "_InertEvent | None" = None) -> "_InertEvent":
        return event or _InertEvent()

    def synchronize(self) -> None:
        pass


class _InertEvent(_InertStream):
    def record(self, stream: _InertStream | None = None) -> None:
        pass

    def wait(self, stream: _InertStream | None = None) -> None:
        pass

    def query(self) -> bool:
        return True


def install() -> None:
    """Make torch.cuda's names act on the CPU, in this process and for good; a second call does nothing."""
    if torch.cuda.current_device is _current_device:
        return
    for message in _EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    _replace_device_calls()
    _replace_streams()
    _replace_random_state()
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    torch.Tensor.cuda = lambda tensor, *args, **kwargs: tensor
    torch.Tensor.type = _cuda_type_names(torch.Tensor.type)


def _current_device() -> torch.device:
    return torch.device("cpu")


def _replace_device_calls() -> None:
    torch.cuda.current_device = _current_device
    torch.cuda.is_available = lambda: False
    torch.cuda.device_count = lambda: 0
    # One function object per name: torch.dynamo rejects an object that it meets under two names.
    for name in ("synchronize", "set_device", "empty_cache", "ipc_collect"):
        setattr(torch.cuda, name, lambda *args, **kwargs: None)
    torch.cuda.nvtx.range_push = lambda *args, **kwargs: None
    torch.cuda.nvtx.range_pop = lambda *args, **kwargs: None
    torch.cuda.is_current_stream_capturing = lambda: False


def _replace_streams() -> None:
    torch.cuda.Stream = _InertStream
    torch.cuda.Event = _InertEvent
    torch.cuda.stream = lambda stream: contextlib.nullcontext()
    torch.cuda.current_stream = lambda device=None: _InertStream()
    torch.cuda.default_stream = lambda device=None: _InertStream()


def _replace_random_state() -> None:
    # Imported here: importing Megatron's random module looks at torch.cuda, which must already be replaced.
    from megatron.core.tensor_parallel import random as megatron_random

    def get_rng_state(device: Any = None, clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(new_state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    # torch.manual_seed itself calls torch.cuda.manual_seed_all, which stays a no-op without CUDA.
    for module in (torch.cuda, torch.cuda.random):
        module.get_rng_state = get_rng_state
        module.set_rng_state = set_rng_state
        module.manual_seed = lambda seed: torch.default_generator.manual_seed(seed)
    megatron_random._get_cuda_rng_state = get_rng_state
    megatron_random._set_cuda_rng_state = set_rng_state
    megatron_random.CudaRNGStatesTracker.fork = _fork


@contextlib.contextmanager
def _fork(tracker: Any, name: str = "model-parallel-rng"):
    """Megatron's fork without its warning that the CPU generator moved: here it is the only generator."""
    outer_state = torch.get_rng_state()
    torch.set_rng_state(tracker.states_[name])
    try:
        yield
    finally:
        tracker.states_[name] = torch.get_rng_state()
        torch.set_rng_state(outer_state)


def _on_cpu(factory: Any) -> Any:
    """Read device="cuda" as the CPU. A TorchFunctionMode would cost a fifth of a layer's time and miss custom
    backwards.
    """

    @functools.wraps(factory)
    def wrapped(*args: Any, **kwargs: Any) -> torch.Tensor:
        device = kwargs.get("device")
        if device is not None and str(device).startswith("cuda"):
            kwargs["device"] = "cpu"
        return factory(*args, **kwargs)

    return wrapped


def _cuda_type_names(tensor_type: Any) -> Any:
    """Tensor.type() as on a GPU: Megatron's optimizer sorts parameters by names like torch.cuda.FloatTensor."""

    def wrapped(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = tensor_type(tensor, *args, **kwargs)
        return answer.replace("torch.", "torch.cuda.", 1) if isinstance(answer, str) else answer

    return wrapped
