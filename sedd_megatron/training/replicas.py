"""What several ranks hold alike, compared bit for bit: weights, master weights, Adam's moments, the moving average."""

import hashlib
import socket
from collections import defaultdict

import numpy as np
import torch
from torch import Tensor

from sedd_megatron.errors import UserError
from sedd_megatron.parallel.groups import on_first_rank, raise_on_every_rank
from sedd_megatron.training.build import TrainingRun
from sedd_megatron.training.checkpoint import run_shards
from sedd_megatron.training_schedule import is_due

# A mark by which ranks know the same part of the same tensor, and its digest.
ENTRY = np.dtype([("place", "<u8"), ("digest", "<i8")])


def check_replicas_if_due(run: TrainingRun) -> None:
    """`check_replicas` after the steps that --check-replicas-interval divides."""
    if is_due(run.iteration, run.options.faults.check_replicas_interval):
        check_replicas(run)


def check_replicas(run: TrainingRun) -> None:
    """Check that all ranks hold the same bits wherever they hold the same part of a tensor: replicas whole, ranks of
    one replica what they all need, such as norms and the noise conditioning. Collective over all ranks.

    Costs a pass over all that is kept on the device, one wait, and 16 bytes a tensor and rank to the first rank. A
    digest is a sum of 32-bit words: any single flipped bit changes it.

    Raises:
        UserError: on every rank, naming the tensor and the ranks.
    """
    run.gather_parameters()
    places, names, digests = [], {}, []
    for shard in run_shards(run):
        places.append(_mark(repr((shard.key, shard.slices, shard.range))))
        names[places[-1]] = shard.key
        digests.append(digest_on_device(shard.data))
    own = np.empty(len(digests), ENTRY)
    own["place"], own["digest"] = places, torch.stack(digests).tolist()
    gathered = [None] * torch.distributed.get_world_size() if torch.distributed.get_rank() == 0 else None
    torch.distributed.gather_object((own, socket.gethostname()), gathered, dst=0)
    found = on_first_rank(lambda: _first_difference(gathered))
    if found is None:
        return
    place, words = found
    error = None
    if place in names:
        interval = run.options.faults.check_replicas_interval
        error = UserError(
            f"the tensor {names[place]} is not the same where it should be at iteration {run.iteration}: {words}; "
            f"nothing is saved from here on: start again from a checkpoint of iteration {run.iteration - interval} or "
            "before, without that machine"
        )
    raise_on_every_rank(error)


def digest_on_device(tensor: Tensor) -> Tensor:
    """Sum of a tensor's bits in words, modulo 2^32: scalar int64 on its device, which no single flipped bit leaves as
    it was.
    """
    flat = tensor.detach().contiguous().view(-1)
    num_bytes = flat.numel() * flat.element_size()
    # In their own width, which is as fast as memory is; two of 16 bits together where they begin and end even.
    if num_bytes % 4 == 0 and flat.storage_offset() * flat.element_size() % 4 == 0:
        return flat.view(torch.int32).sum(dtype=torch.int32).long()
    return flat.view(torch.uint8).long().sum()


def _mark(place: str) -> int:
    return int.from_bytes(hashlib.sha256(place.encode()).digest()[:8], "little")


def _first_difference(gathered: list[tuple[np.ndarray, str]]) -> tuple[int, str] | None:
    """The mark of a place at which ranks differ, and in words which do; None if there is none."""
    lowest: dict[int, int] = {}
    for entries, _ in gathered:
        for place, digest in entries.tolist():
            if lowest.setdefault(place, digest) != digest:
                return place, _who_differs(place, gathered)
    return None


def _who_differs(place: int, gathered: list[tuple[np.ndarray, str]]) -> str:
    ranks = defaultdict(list)
    for rank, (entries, _) in enumerate(gathered):
        for digest in entries["digest"][entries["place"] == place].tolist():
            ranks[digest].append(rank)
    *few, most = sorted(ranks.values(), key=len)
    named = ", ".join(f"rank {rank} on {gathered[rank][1]}" for own in few for rank in own)
    others = ", ".join(str(rank) for rank in most[:8]) + (", ..." if len(most) > 8 else "")
    if len(few[-1]) == len(most):
        return f"{named} and rank {others} on {gathered[most[0]][1]} hold different bits, of which either may be wrong"
    return f"{named} has other bits than rank {others}"
