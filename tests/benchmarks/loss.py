"""Head and loss, forward and backward, against the published formulas on dense logits: python -m tests.benchmarks.loss

Both go from the trunk's hidden states, through the final norm, to the loss and to the gradients of hidden states, norm,
modulation, weight and bias. Memory is what tensors take at the worst moment, above what was there before and beside the
gradient of the hidden states, which both have to give. Under the absorbing graph half of the positions are masked.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import torch

from sedd_megatron.config import ParallelOptions
from sedd_megatron.data.micro_batch import positions_that_count
from sedd_megatron.diffusion import LogLinearSchedule
from sedd_megatron.diffusion.corruption import NoisyBatch, corrupt
from sedd_megatron.diffusion.draws import Stream
from sedd_megatron.diffusion.graph import make_graph
from sedd_megatron.diffusion.transfers import to_device
from sedd_megatron.parallel import cpu_backend
from sedd_megatron.parallel.fused_head import ROW_MULTIPLE, TILE_ELEMENTS
from sedd_megatron.parallel.groups import parallel_groups
from tests.benchmarks.goals import HEAD_MEMORY_MIB, goal_of
from tests.benchmarks.pairs import Lines, measure_pairs, peak_memory, seconds_of, write_table
from tests.benchmarks.published import published_loss, scaled_log_score

HEADER = (
    "| graph | V | width | B x S | rows that count | seconds | published | faster | memory | published | smaller |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|"
)
ALONE_HEADER = (
    "\nOurs at a size whose dense logits no device has room for.\n\n"
    f"| graph | B x S | rows that count | ms | goal | its products alone | memory | at most {HEAD_MEMORY_MIB} MiB |\n"
    "|---|---|---|---|---|---|---|---|"
)
ROWS_HEADER = "\n| graph | rows that count | memory |\n|---|---|---|"
BOUND_HEADER = (
    "\nThe bound: the three products of the rows that count alone, at this machine's speed for them.\n\n"
    "| graph | seconds | bound | over the bound |\n|---|---|---|---|"
)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--graphs", nargs="+", choices=["absorb", "uniform"], default=["absorb", "uniform"])
    parser.add_argument("--num-tokens", type=int, default=50257)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--chunk-rows", type=int, default=2048)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--alone-batch", type=int, help="measure ours alone at this batch size as well")
    parser.add_argument("--rows", nargs="*", type=int, default=[2048, 4096, 8192, 16384], help="for memory alone")
    parser.add_argument("--output", type=Path, help="a file of tests/benchmarks/results")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        cpu_backend.install()
    lines = Lines()

    with parallel_groups(ParallelOptions()) as groups:
        lines.say(HEADER)
        bounds = []
        for graph_name in arguments.graphs:
            way = TwoWays(graph_name, arguments, arguments.batch, groups)
            found = measure_pairs(way.ours, way.theirs, arguments.pairs)
            memory, opponent_memory = found.memory - way.output_bytes, found.opponent_memory - way.output_bytes
            lines.say(
                f"| {graph_name} | {arguments.num_tokens} | {arguments.width} | {arguments.batch} x {arguments.length} "
                f"| {way.num_rows} | {found.seconds:.4f} | {found.opponent_seconds:.4f} | {found.speedup:.2f}x | "
                f"{memory / 2**20:.1f} MiB | {opponent_memory / 2**20:.0f} MiB | {opponent_memory / memory:.0f}x |"
            )
            bound = min(seconds_of(way.products) for _ in range(1 + arguments.pairs))
            bounds.append(f"| {graph_name} | {found.seconds:.4f} | {bound:.4f} | {found.seconds / bound:.2f}x |")
        lines.say(BOUND_HEADER)
        for bound in bounds:
            lines.say(bound)
        if arguments.alone_batch:
            lines.say(ALONE_HEADER)
            for graph_name in arguments.graphs:
                lines.say(alone_row(graph_name, arguments, groups))
        lines.say(ROWS_HEADER) if arguments.rows else None
        for graph_name in arguments.graphs:
            for rows in arguments.rows:
                # Twice as many positions where half of them count.
                batch_size = rows * (1 + (graph_name == "absorb")) // arguments.length
                way = TwoWays(graph_name, arguments, batch_size, groups)
                lines.say(
                    f"| {graph_name} | {way.num_rows} | {(peak_memory(way.ours) - way.output_bytes) / 2**20:.2f} MiB |"
                )
    write_table("Head and loss", "tests.benchmarks.loss", argv, arguments.output, lines)


def alone_row(graph_name: str, arguments: argparse.Namespace, groups) -> str:
    """The median time of ours, and its memory; the goal is for SEDD-small's 64k positions under the absorbing graph."""
    way = TwoWays(graph_name, arguments, arguments.alone_batch, groups)
    memory = (peak_memory(way.ours) - way.output_bytes) / 2**20
    ours, products = (
        1e3 * statistics.median(seconds_of(function) for _ in range(1 + arguments.pairs))
        for function in (way.ours, way.products)
    )
    sizes = (graph_name, arguments.num_tokens, arguments.width, arguments.alone_batch * arguments.length)
    has_goal = sizes == ("absorb", 50257, 768, 65536) and torch.cuda.is_available()
    return (
        f"| {graph_name} | {arguments.alone_batch} x {arguments.length} | {way.num_rows} | {ours:.2f} | "
        f"{goal_of('head and loss', torch.cuda.get_device_name()) if has_goal else ''} | {products:.2f} ms | "
        f"{memory:.1f} MiB | {'yes' if memory < HEAD_MEMORY_MIB else 'no'} |"
    )


class TwoWays:
    """Ours and the published way on one batch."""

    def __init__(self, graph_name: str, arguments: argparse.Namespace, batch_size: int, groups) -> None:
        self.graph, self.chunk_rows, self.groups = (
            make_graph(graph_name, arguments.num_tokens),
            arguments.chunk_rows,
            groups,
        )
        device, width = groups.device, arguments.width
        generator = torch.Generator().manual_seed(0)
        x_0 = torch.randint(0, self.graph.num_tokens, (batch_size, arguments.length), generator=generator)
        self.host = corrupt(x_0, torch.arange(batch_size), graph=self.graph, schedule=LogLinearSchedule(), seed=0,
                            stream=Stream.TRAIN_NOISE)  # fmt: skip
        self.batch = NoisyBatch(*(field.to(device) for field in self.host))
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

        def parameter(*shape: int, scale: float = 1.0, dtype: torch.dtype = self.dtype) -> torch.nn.Parameter:
            return torch.nn.Parameter((torch.randn(shape, generator=generator) * scale).to(device, dtype))

        self.hidden_states = parameter(arguments.length, batch_size, width)
        self.factor, self.shift = (parameter(batch_size, width, dtype=torch.float32) for _ in range(2))
        self.weight = parameter(self.graph.num_states, width, scale=width**-0.5)
        self.bias = parameter(self.graph.num_states, scale=0.1)
        self.parameters = [self.hidden_states, self.factor, self.shift, self.weight, self.bias]
        for tensor in (self.weight, self.bias):
            tensor.main_grad = torch.zeros(tensor.shape, device=device)
        self.output_bytes = self.hidden_states.nbytes
        self.num_rows = (
            int((self.host.x_t == self.graph.mask_token_id).sum()) if graph_name == "absorb" else x_0.numel()
        )
        self.losses = SimpleNamespace()
        if x_0.numel() <= 8192:
            self.ours(), self.theirs()
            tolerance = 1e-4 if self.dtype == torch.float32 else 0.05
            torch.testing.assert_close(self.losses.ours, self.losses.theirs.float(), rtol=tolerance, atol=0)

    def ours(self) -> None:
        from sedd_megatron.parallel.fused_head import FusedHeadSettings, fused_head_score_entropy
        from sedd_megatron.training.forward_step import score_entropy_rows

        device = self.groups.device
        position, num_rows = positions_that_count(self.host.x_t, self.graph, ROW_MULTIPLE[device.type])
        position = to_device(position, device)
        rows, constant = score_entropy_rows(self.batch, self.graph, position, num_rows)
        settings = FusedHeadSettings(self.graph.num_tokens, self.chunk_rows, gradient_scale=1.0)
        loss = fused_head_score_entropy(*self.parameters, rows, settings, 1e-5, self.groups.collection.tp).loss
        self.losses.ours = loss.detach() + constant.sum()
        self._backward(loss)

    def theirs(self) -> None:
        absorbing, batch = self.graph.mask_token_id is not None, self.batch
        normalized = torch.nn.functional.layer_norm(self.hidden_states.transpose(0, 1).float(), self.weight.shape[1:])
        hidden = (normalized * self.factor[:, None] + self.shift[:, None]).to(self.dtype)
        logits = torch.nn.functional.linear(hidden, self.weight, self.bias)
        log_score = scaled_log_score(logits, batch.x_t, batch.sigma, absorbing)
        loss = published_loss(log_score, batch.sigma, batch.sigma_rate, batch.x_t, batch.x_0, absorbing)
        self.losses.theirs = loss.detach()
        self._backward(loss)

    def products(self) -> None:
        """Logits and both gradients of the rows that count, tile by tile, without a loss."""
        hidden = self.hidden_states.detach().flatten(0, 1)[: self.num_rows]
        weight, tile = self.weight.detach(), TILE_ELEMENTS[self.groups.device.type]
        for chunk in hidden.split(self.chunk_rows):
            for part in weight.split(tile // len(chunk)):
                logits = chunk @ part.t()
                logits @ part, logits.t() @ chunk

    def _backward(self, loss: torch.Tensor) -> None:
        loss.backward()
        for parameter in self.parameters:
            parameter.grad = None


if __name__ == "__main__":
    main(sys.argv[1:])
