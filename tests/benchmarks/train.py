"""A training step against the published one: python -m tests.benchmarks.train --vs published

Both train one model, with the same weights, on the same batches in turns in one process; ours through everything that
a real run goes through but the reading of files. `--vs bare` times the forward pass of both trunks (embedding and
layers) over its bare matrix products and attention.
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F

from sedd_megatron.arguments import parse_pretrain_options
from sedd_megatron.diffusion.corruption import NoisyBatch
from sedd_megatron.parallel import cpu_backend
from sedd_megatron.parallel.groups import parallel_groups
from tests.benchmarks.pairs import Lines, measure_pairs, write_table
from tests.benchmarks.published import PublishedModel, PublishedStep, published_loss


class Case(NamedTuple):
    """Sizes of a model and its batch."""

    layers: int
    width: int
    heads: int
    batch: int
    length: int
    num_tokens: int
    graph: str = "absorb"


CASES = {
    "tiny": Case(2, 64, 4, 2, 32, 300),
    "narrow": Case(4, 256, 4, 4, 256, 50257),
    "narrow-uniform": Case(4, 256, 4, 4, 256, 50257, "uniform"),
    "small": Case(12, 768, 12, 1, 256, 50257),
    "characters": Case(4, 256, 4, 4, 256, 27),
    "characters-wide": Case(12, 768, 12, 1, 256, 27),
}
DEFAULTS = {"published": ["narrow", "narrow-uniform", "small"], "bare": ["characters", "characters-wide"]}


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vs", choices=DEFAULTS, default="published", help="what ours is compared with")
    parser.add_argument("--cases", nargs="+", choices=CASES, help="sizes; by default those of the comparison")
    parser.add_argument("--pairs", type=int, default=8, help="8 go once through the batches and their times t")
    parser.add_argument("--flags", default="", help="further flags of examples/pretrain_sedd.py, in quotes")
    parser.add_argument("--output", type=Path, help="a file of tests/benchmarks/results")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        cpu_backend.install()
    title, header, rows_of = {
        "published": (
            "Training step",
            "| case | layers x width, V, B x S | pass | seconds | published | faster | memory | published |\n"
            "|---|---|---|---|---|---|---|---|",
            against_published,
        ),
        "bare": (
            "Forward pass of the trunk",
            "| case | layers x width, V, B x S | bare products and attention | ours | published |\n"
            "|---|---|---|---|---|",
            against_bare_products,
        ),
    }[arguments.vs]
    lines = Lines()
    lines.say(header)
    for name in arguments.cases or DEFAULTS[arguments.vs]:
        for row in rows_of(CASES[name], arguments):
            lines.say(f"| {name} | {describe(CASES[name])} | {row} |")
    write_table(title, "tests.benchmarks.train", argv, arguments.output, lines)


def describe(case: Case) -> str:
    return f"{case.layers} x {case.width}, {case.num_tokens}, {case.batch} x {case.length}"


def against_published(case: Case, arguments: argparse.Namespace):
    """Two rows: forward and backward pass, and with the optimizer and the moving average."""
    options = options_of(case, arguments.flags)
    with parallel_groups(options.parallel) as groups:
        from sedd_megatron.training.step import begin_training_pass, forward_backward, train_step

        run, batches = build_ours(case, options, groups)
        model = build_published(case, run)
        opponent = PublishedStep(model, lr=options.training.lr)
        on_device = [NoisyBatch(*(field.to(groups.device) for field in batch.noisy)) for batch in batches]
        ours, theirs = itertools.cycle(batches), itertools.cycle(on_device)
        losses = SimpleNamespace()

        def our_pass() -> None:
            begin_training_pass(run)
            losses.ours = forward_backward(run, [ours], forward_only=False)[0]["numbers"][0].float()

        def their_pass() -> None:
            batch = next(theirs)
            opponent.optimizer.zero_grad()
            log_score = model(batch.x_t, batch.sigma)
            loss = published_loss(log_score, batch.sigma, batch.sigma_rate, batch.x_t, batch.x_0, model.absorbing)
            loss.backward()
            losses.theirs = loss.detach() / case.length

        def their_step() -> None:
            their_pass()
            opponent()

        our_pass(), their_pass()
        torch.testing.assert_close(losses.ours, losses.theirs, rtol=1e-4, atol=0)
        for name, one, other in (
            ("forward, backward", our_pass, their_pass),
            ("whole step", lambda: train_step(run, [ours]), their_step),
        ):
            found = measure_pairs(one, other, arguments.pairs)
            yield (
                f"{name} | {found.seconds:.3f} | {found.opponent_seconds:.3f} | {found.speedup:.2f}x | "
                f"{found.memory / 2**20:.0f} MiB | {found.opponent_memory / 2**20:.0f} MiB"
            )


def against_bare_products(case: Case, arguments: argparse.Namespace):
    """One row: how much longer each trunk's forward pass takes than its products and attention alone."""
    options = options_of(case, arguments.flags)
    with parallel_groups(options.parallel) as groups:
        run, batches = build_ours(case, options, groups)
        model, (chunk,) = build_published(case, run), run.model_chunks
        bare = bare_products(case, groups.device)
        x_t, sigma = (field.to(groups.device) for field in (batches[0].noisy.x_t, batches[0].noisy.sigma))
        chunk.train()

        def ours() -> torch.Tensor:
            return chunk.trunk(x_t, sigma)[0]

        def theirs() -> torch.Tensor:
            return model.trunk(x_t, sigma)[0]

        torch.testing.assert_close(ours().transpose(0, 1), theirs(), rtol=1e-4, atol=1e-4)
        found, other = measure_pairs(bare, ours, arguments.pairs), measure_pairs(bare, theirs, arguments.pairs)
        yield f"{found.seconds * 1e3:.1f} ms | {found.speedup:.2f}x | {other.speedup:.2f}x"


def bare_products(case: Case, device: torch.device) -> Callable[[], None]:
    """The trunk's matrix products and attention, on inputs that are there already; recorded for a backward pass."""
    width, rows = case.width, case.batch * case.length
    shapes = ((3 * width, width), (width, width), (4 * width, width), (width, 4 * width))

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device).requires_grad_()

    layers = [[random(*shape) for shape in shapes] for _ in range(case.layers)]
    hidden, inner = random(rows, width), random(rows, 4 * width)
    heads = random(3, case.batch, case.heads, case.length, width // case.heads)

    def products() -> None:
        kept = []
        for qkv, out, fc1, fc2 in layers:
            kept += [F.linear(hidden, qkv), F.scaled_dot_product_attention(*heads), F.linear(hidden, out),
                     F.linear(hidden, fc1), F.linear(inner, fc2)]  # fmt: skip

    return products


def options_of(case: Case, flags: str):
    return parse_pretrain_options(
        f"--data-path random --num-layers {case.layers} --hidden-size {case.width} --num-attention-heads {case.heads} "
        f"--seq-length {case.length} --micro-batch-size {case.batch} --global-batch-size {case.batch} --graph "
        f"{case.graph} --hidden-dropout 0 --lr 1e-5 --lr-warmup-iters 0 {flags}".split()
    )


def build_ours(case: Case, options, groups):
    """A run at its first step, and batches for it, half masked as in training."""
    from sedd_megatron.diffusion.draws import Stream
    from sedd_megatron.training.build import build_run
    from sedd_megatron.training.iterators import micro_batch_collator

    run = build_run(options, SimpleNamespace(num_tokens=case.num_tokens), groups)
    collator = micro_batch_collator(run, Stream.TRAIN_NOISE)
    generator = torch.Generator().manual_seed(0)
    windows = torch.randint(0, case.num_tokens, (8, case.batch, case.length), generator=generator)
    batches = [
        collator([(n * case.batch + i, row) for i, row in enumerate(window)]) for n, window in enumerate(windows)
    ]
    return run, batches


def build_published(case: Case, run) -> PublishedModel:
    """The published model, whose random weights ours takes."""
    from sedd_megatron.model.published_weights import own_part, published_name

    absorbing = run.graph.mask_token_id is not None
    model = PublishedModel(case.layers, case.width, case.heads, run.graph.num_states, absorbing)
    model.to(run.groups.device)
    weights = model.state_dict()
    with torch.no_grad():
        for shard in run.model_chunks[0].sharded_tensors().values():
            name = published_name(shard)
            shard.data.copy_(own_part(weights[name], name, shard, case.heads))
    return model


if __name__ == "__main__":
    main(sys.argv[1:])
