"""A network's rows in sampling as calls of few shapes, whose kernels a GPU replays as one CUDA graph.

A round of sampling is some hundred small kernels, and to launch them takes longer than to run them where the batch is
small. A captured graph is launched at once, but it is fixed: the same kernels on the same memory, without a decision of
the host in between. So inputs are copied to where the graph reads them, and batch and number of positions are filled
up to powers of two, which makes few graphs. What follows the rows stays outside of it: how many positions there are
differs every time, the step samplers read which of them leave, and a law may be any function.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

# (x_t [B, S], sigma [B], table [Q, B]) -> [Q, B, H]
RowsFn = Callable[[Tensor, Tensor, Tensor], Tensor]


class FixedCall(NamedTuple):
    """A call whose inputs and output stay where they are."""

    inputs: tuple[Tensor, Tensor, Tensor]
    run: Callable[[], Tensor]


class FixedShapes:
    """A RowsFn that calls another with full shapes alone.

    Args:
        function: rows of sequences that do not look at each other.
        make_call: (function, inputs) -> what computes it of whatever lies in the inputs: CapturedCall.of on a GPU.
    """

    def __init__(self, function: RowsFn, make_call: Callable[[RowsFn, tuple[Tensor, ...]], Callable[[], Tensor]]):
        self.function, self.make_call = function, make_call
        self.calls: dict[tuple[int, int, int], FixedCall] = {}

    def __call__(self, x_t: Tensor, sigma: Tensor, table: Tensor) -> Tensor:
        """[Q, B, H], which the next call overwrites."""
        (num_rows, batch), length = table.shape, x_t.shape[1]
        shape = (filled_up(batch), length, min(filled_up(num_rows), length))
        if shape not in self.calls:
            self.calls[shape] = self._call_of(shape, x_t, sigma, table)
        call = self.calls[shape]
        # What an earlier call has left beyond them is a sequence as good as any, and its rows are not read.
        call.inputs[0][:batch].copy_(x_t)
        call.inputs[1][:batch].copy_(sigma)
        call.inputs[2][:num_rows, :batch].copy_(table)
        return call.run()[:num_rows, :batch]

    def _call_of(self, shape: tuple[int, int, int], x_t: Tensor, sigma: Tensor, table: Tensor) -> FixedCall:
        batch, length, num_rows = shape
        inputs = x_t.new_zeros(batch, length), sigma.new_ones(batch), table.new_zeros(num_rows, batch)
        return FixedCall(inputs, self.make_call(self.function, inputs))


def filled_up(number: int) -> int:
    """The next power of two."""
    return 1 << (number - 1).bit_length()


class CapturedCall:
    """A function's kernels as a CUDA graph, replayed on whatever lies in its inputs.

    torch asks that it is run on another stream first, so that nothing is compiled, planned or allocated for the first
    time while it is captured, and that the function neither waits nor reads a number; hidden states that come from
    another pipeline stage are out. All graphs of one pool share memory: right as long as they are replayed one after
    the other and an output is read before the next replay.
    """

    def __init__(self, graph: torch.cuda.CUDAGraph, output: Tensor) -> None:
        self.graph, self.output = graph, output

    @classmethod
    @torch.no_grad()
    def of(cls, function: RowsFn, inputs: tuple[Tensor, ...], pool: Any) -> "CapturedCall":
        """Run and capture it; pool is a torch.cuda.graph_pool_handle()."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                function(*inputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Another thread, as the one that watches collectives, may ask the device meanwhile.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            output = function(*inputs)
        return cls(graph, output)

    def __call__(self) -> Tensor:
        """The output, in the memory of the last one."""
        self.graph.replay()
        return self.output
