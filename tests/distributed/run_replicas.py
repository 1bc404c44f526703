"""Bits flipped in what ranks hold, one at a time and back again. A job is a command line, a number of flips, and the
file for what the comparison of replicas said of each.
"""

import json
import random
from pathlib import Path

import torch

from sedd_megatron.arguments import parse_pretrain_options, weighted_corpora
from sedd_megatron.data.tokenizers import ByteTokenizer
from sedd_megatron.data.windows import open_windows
from sedd_megatron.errors import UserError
from sedd_megatron.parallel import cpu_backend
from sedd_megatron.parallel.groups import parallel_groups
from tests.distributed.launch import own_jobs


def outcomes(run, count: int) -> list[dict]:
    """Equal on every rank."""
    from sedd_megatron.training.checkpoint import run_shards
    from sedd_megatron.training.replicas import check_replicas
    from tests.distributed.bit_flips import flip_bit

    rank, num_ranks, draws, found = (
        torch.distributed.get_rank(),
        torch.distributed.get_world_size(),
        random.Random(7),
        [],
    )
    check_replicas(run)
    shards = list(run_shards(run))
    gathered: list = [None] * num_ranks
    torch.distributed.all_gather_object(gathered, [(s.key, s.offset, s.shape, s.range) for s in shards])
    for _ in range(count):
        flipped, bit, where, element = draws.randrange(num_ranks), draws.randrange(32), draws.random(), draws.random()
        place = gathered[flipped][int(where * len(gathered[flipped]))]
        data = shards[int(where * len(shards))].data
        # A share of the distributed optimizer may be empty.
        if place[3][0] == place[3][1]:
            continue
        if rank == flipped:
            flip_bit(data, element, bit)
        message = None
        try:
            check_replicas(run)
        except UserError as error:
            message = str(error)
        if rank == flipped:
            flip_bit(data, element, bit)
        holders = sum(places.count(place) for places in gathered)
        found.append({"rank": flipped, "key": place[0], "bit": bit, "holders": holders, "message": message})
    check_replicas(run)
    return found


def train_and_flip(arguments: list[str], count: int, output: str) -> None:
    cpu_backend.install()
    from sedd_megatron.training.build import build_run
    from sedd_megatron.training.iterators import training_iterators
    from sedd_megatron.training.step import train_step

    options = parse_pretrain_options(arguments)
    with parallel_groups(options.parallel, options.parallel.num_model_chunks(options.model.num_layers)) as groups:
        run = build_run(options, ByteTokenizer(), groups)
        windows = open_windows(weighted_corpora(options.data), seq_length=options.model.seq_length,
                               split="1,0,0", num_tokens=256, seed=0)  # fmt: skip
        batches = training_iterators(run, windows.train)
        for _ in range(2):
            train_step(run, batches)
        found = outcomes(run, count)
        everywhere: list = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everywhere, found)
        assert all(other == found for other in everywhere), "the ranks judge differently"
        if torch.distributed.get_rank() == 0:
            Path(output).write_text(json.dumps(found))


if __name__ == "__main__":
    for job in own_jobs():
        train_and_flip(*job)
